//! Selection by indices: the adjoint of a gather is a scatter that adds (operator set 16 and later).

use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Gather", gather);
    rules.vjp("GatherElements", |v| {
        let axis = v.node.attr_i("axis", 0);
        v.first(scatter_elements(v, &v.zeros_like(v.x(0)?), v.x(1)?, v.dy()?, axis, Some("add")))
    });
    rules.vjp("GatherND", |v| {
        let indices = with_batch(v, v.x(1)?)?;
        v.first(scatter_nd(v, &v.zeros_like(v.x(0)?), &indices, v.dy()?, Some("add")))
    });
    // Each value is that of its first occurrence; what is equal to it belongs to that one.
    rules.vjp("Unique", |v| {
        let (x, dy) = (v.x(0)?, v.dy()?);
        let first = v.forward_output(v.node, 1);
        let Some(axis) = v.node.attr("axis") else {
            return v.first(super::pool::scatter_flat(v, x, &first, dy));
        };
        let rank = v.rank(x)?;
        let axis = v.axis(axis.i(), rank)?;
        let along: Vec<i64> = (0..rank).map(|i| if i == axis { -1 } else { 1 }).collect();
        let places = v.expand(v.respec(&first, &along), v.shape(dy));
        v.first(scatter_elements(v, &v.zeros_like(x), &places, dy, axis as i64, None))
    });
    rules.vjp("TopK", |v| {
        let (x, axis) = (v.x(0)?, v.node.attr_i("axis", -1));
        let indices = v.forward_output(v.node, 1);
        v.first(scatter_elements(v, &v.zeros_like(x), &indices, v.dy()?, axis, None))
    });
}

/// Indices of a GatherND that start with the place in the batch, as a scatter needs them.
fn with_batch(v: &Vjp, indices: &str) -> Result<String> {
    let rank = v.rank(indices)?;
    let batch = usize::try_from(v.node.attr_i("batch_dims", 0)).ok().filter(|n| *n < rank.max(1));
    let batch = batch.ok_or_else(|| v.error("its batch_dims do not fit its indices"))?;
    let last = rank.saturating_sub(1);
    let rows: Vec<String> = (0..last).map(|axis| v.dim_of(indices, axis)).chain([v.ints(&[1])]).collect();
    let mut parts = Vec::new();
    for axis in 0..batch {
        let along = v.op("Range", &[&v.int(0), &v.squeeze(&rows[axis], v.ints(&[0])), &v.int(1)], vec![]);
        let mut shape = vec![1; rank];
        shape[axis] = -1;
        parts.push(v.expand(v.op("Reshape", &[&along, &v.ints(&shape)], vec![]), v.join(&rows)));
    }
    parts.push(v.int64(indices));
    Ok(v.concat(&parts, -1))
}

impl Vjp<'_> {
    /// Indices as int64, the one type that ScatterND takes.
    fn int64(&self, indices: &str) -> String {
        match self.shapes.element(indices) {
            Some(DataType::Int64) => indices.to_string(),
            _ => self.cast(indices, DataType::Int64),
        }
    }
}

fn reduction(how: Option<&str>) -> Vec<AttributeProto> {
    how.map(|how| AttributeProto::string("reduction", how)).into_iter().collect()
}

fn scatter_elements(v: &Vjp, data: &str, indices: &str, updates: &str, axis: i64, how: Option<&str>) -> String {
    let mut attributes = vec![AttributeProto::int("axis", axis)];
    attributes.extend(reduction(how));
    v.op("ScatterElements", &[data, indices, updates], attributes)
}

fn scatter_nd(v: &Vjp, data: &str, indices: &str, updates: &str, how: Option<&str>) -> String {
    v.op("ScatterND", &[data, indices, updates], reduction(how))
}

fn gather(v: &Vjp) -> Result<Adjoints> {
    let (x, indices, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let axis = v.node.attr_i("axis", 0);
    let single = v.constant(indices).filter(|i| i.dims().is_empty()).and_then(|_| v.constant_ints(1));
    if let (Some(&[at]), Ok(rank)) = (single.as_deref(), v.rank(x)) {
        // One slice out of an axis: zeros before and after it.
        let axis = v.axis(axis, rank)?;
        let full = known_dim(v, x, axis);
        let (before, after) = match (at, full) {
            (_, Some(n)) => {
                let at = if at < 0 { at.saturating_add(n) } else { at };
                (v.ints(&[at]), v.ints(&[n - 1 - at]))
            }
            (0.., None) => (v.ints(&[at]), v.sub(v.dim_of(x, axis), v.ints(&[at.saturating_add(1)]))),
            (_, None) => (v.add(v.dim_of(x, axis), v.ints(&[at])), v.ints(&[-1 - at])),
        };
        let mut widths = vec![v.ints(&[0]); 2 * rank];
        widths[axis] = before;
        widths[rank + axis] = after;
        return v.first(v.pad(&v.unsqueeze(dy, v.ints(&[axis as i64])), &widths));
    }
    let column = v.unsqueeze(v.int64(indices), v.ints(&[-1]));
    if axis == 0 {
        return v.first(scatter_nd(v, &v.zeros_like(x), &column, dy, Some("add")));
    }
    // The axis goes to the front, and back at the end.
    let (rank, count) = (v.rank(x)?, v.rank(indices)?);
    let axis = v.axis(axis, rank)?;
    let front: Vec<i64> =
        (axis..axis + count).chain(0..axis).chain(axis + count..rank + count - 1).map(|i| i as i64).collect();
    let to_front: Vec<i64> = std::iter::once(axis).chain((0..rank).filter(|i| *i != axis)).map(|i| i as i64).collect();
    let mut back = vec![0; rank];
    for (i, p) in to_front.iter().enumerate() {
        back[*p as usize] = i as i64;
    }
    let dims: Vec<String> = to_front.iter().map(|i| v.dim_of(x, *i as usize)).collect();
    let zeros = v.expand(v.c(0.0), v.concat(&dims, 0));
    v.first(v.transpose(scatter_nd(v, &zeros, &column, &v.transpose(dy, &front), Some("add")), &back))
}

fn known_dim(v: &Vjp, x: &str, axis: usize) -> Option<i64> {
    known(v.dims(x)?.get(axis)?)
}
