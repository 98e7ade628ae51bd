//! Selection by indices: the adjoint of a gather is a scatter that adds (operator set 16 and later).

use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Gather", gather);
    rules.vjp("GatherElements", |v| {
        let axis = v.node.attr_i("axis", 0);
        v.first(scatter_elements(v, &v.zeros_like(v.x(0)?), v.x(1)?, v.dy()?, axis, Some("add")))
    });
    rules.vjp("GatherND", |v| {
        if v.node.attr_i("batch_dims", 0) != 0 {
            return Err(v.error("batch_dims other than 0 is not supported"));
        }
        v.first(scatter_nd(v, &v.zeros_like(v.x(0)?), v.x(1)?, v.dy()?, Some("add")))
    });
    rules.vjp("ScatterElements", |v| {
        let (indices, dy, axis) = (v.x(1)?, v.dy()?, v.node.attr_i("axis", 0));
        let keep = written(v)?;
        let data = v.wants(0).then(|| match keep {
            true => dy.to_string(),
            false => scatter_elements(v, dy, indices, &v.zeros_like(indices), axis, None),
        });
        let updates =
            v.wants(2).then(|| v.op("GatherElements", &[dy, indices], vec![AttributeProto::int("axis", axis)]));
        Ok(vec![data, None, updates])
    });
    rules.vjp("ScatterND", |v| {
        let (indices, dy) = (v.x(1)?, v.dy()?);
        let keep = written(v)?;
        let updates = v.x(2)?;
        let data = v.wants(0).then(|| match keep {
            true => dy.to_string(),
            false => scatter_nd(v, dy, indices, &v.zeros_like(updates), None),
        });
        Ok(vec![data, None, v.wants(2).then(|| v.op("GatherND", &[dy, indices], vec![]))])
    });
    rules.vjp("TopK", |v| {
        let (x, axis) = (v.x(0)?, v.node.attr_i("axis", -1));
        let indices = v.forward_output(v.node, 1);
        v.first(scatter_elements(v, &v.zeros_like(x), &indices, v.dy()?, axis, None))
    });
}

/// Whether a scatter adds to the data (true) or replaces it (false).
fn written(v: &Vjp) -> Result<bool> {
    match v.node.attr_s("reduction").unwrap_or("none") {
        "none" => Ok(false),
        "add" => Ok(true),
        other => Err(v.error(format!("reduction {other:?} has no derivative here; \"none\" and \"add\" do"))),
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
    let column = v.unsqueeze(indices, v.ints(&[-1]));
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
