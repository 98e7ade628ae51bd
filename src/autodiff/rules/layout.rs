//! Operators that move elements without changing them.

use super::super::vjp::known;
use super::pool::scatter_flat;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;
use crate::onnx::shape::Dim;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Reshape", reshape);
    rules.vjp("Flatten", reshape);
    rules.vjp("Squeeze", |v| match axes(v) {
        Some(axes) if v.static_dims(v.x(0)?).is_none() => v.first(v.unsqueeze(v.dy()?, axes)),
        _ => reshape(v),
    });
    rules.vjp("Unsqueeze", |v| match axes(v) {
        Some(axes) if v.static_dims(v.x(0)?).is_none() => v.first(v.squeeze(v.dy()?, axes)),
        _ => reshape(v),
    });
    rules.vjp("Transpose", |v| {
        let dy = v.dy()?;
        let Some(perm) = v.node.attr_ints("perm") else {
            // The default reverses all axes, and so does its inverse.
            return v.first(v.op("Transpose", &[dy], vec![]));
        };
        let mut inverse = vec![-1; perm.len()];
        for (i, p) in perm.iter().enumerate() {
            *usize::try_from(*p).ok().and_then(|p| inverse.get_mut(p)).ok_or_else(|| v.error("bad perm"))? = i as i64;
        }
        v.first(v.transpose(dy, &inverse))
    });
    for op in ["Optional", "OptionalGetElement"] {
        rules.vjp(op, |v| v.first(v.dy()?.to_string()));
    }
    rules.vjp("Expand", |v| Ok(vec![v.to_input(0, || v.dy().unwrap_or_default().into())]));
    rules.vjp("Concat", concat);
    rules.vjp("Split", split);
    rules.vjp("Slice", slice);
    rules.vjp("Tile", tile);
    rules.vjp("Pad", pad);
    // What is cut off on both sides gets zeros, and the other way round.
    rules.vjp("CenterCropPad", |v| {
        let (x, dy) = (v.x(0)?, v.dy()?);
        let shape = match v.node.attr_ints("axes") {
            None => v.shape_of(x),
            Some(axes) => {
                let rank = v.rank(x)?;
                let sizes =
                    axes.iter().map(|axis| Ok(v.dim_of(x, v.axis(*axis, rank)?))).collect::<Result<Vec<_>>>()?;
                v.join(&sizes)
            }
        };
        v.first(v.op("CenterCropPad", &[dy, &shape], v.node.attribute.clone()))
    });
    rules.vjp("Trilu", |v| {
        let inputs: Vec<&str> = [Some(v.dy()?), v.node.input_at(1)].into_iter().flatten().collect();
        v.first(v.op("Trilu", &inputs, vec![AttributeProto::int("upper", v.node.attr_i("upper", 1))]))
    });
    rules.vjp("DepthToSpace", |v| depth(v, "SpaceToDepth"));
    rules.vjp("SpaceToDepth", |v| depth(v, "DepthToSpace"));
}

fn reshape(v: &Vjp) -> Result<Adjoints> {
    v.first(v.reshape_like(v.dy()?, v.dims(v.y(0)?), v.x(0)?))
}

/// Axes of Squeeze and Unsqueeze: an input, or (before operator set 13) an attribute.
fn axes(v: &Vjp) -> Option<String> {
    match v.node.attr_ints("axes") {
        Some(axes) => Some(v.ints(axes)),
        None => v.node.input_at(1).map(String::from),
    }
}

fn concat(v: &Vjp) -> Result<Adjoints> {
    let dy = v.dy()?;
    let inputs = (0..v.node.input.len()).map(|i| v.x(i)).collect::<Result<Vec<_>>>()?;
    let axis = v.node.attr_i("axis", 0);
    let sizes = inputs.iter().map(|x| v.dim_at(x, axis)).collect::<Result<Vec<_>>>()?;
    let parts = v.node("", "Split", &[dy, &v.join(&sizes)], vec![AttributeProto::int("axis", axis)], inputs.len());
    Ok(parts.into_iter().enumerate().map(|(i, part)| v.wants(i).then_some(part)).collect())
}

fn split(v: &Vjp) -> Result<Adjoints> {
    let parts = (0..v.node.output.len())
        .map(|i| Ok(v.adjoint(i).map_or(v.zeros_like(v.y(i)?), String::from)))
        .collect::<Result<Vec<_>>>()?;
    v.first(v.concat(&parts, v.node.attr_i("axis", 0)))
}

/// Zeros around dy by Pad where every step is 1 and the axes are known; else dy goes back to where it came from.
fn slice(v: &Vjp) -> Result<Adjoints> {
    match around(v) {
        Some(widths) => v.first(v.pad(v.dy()?, &widths)),
        None => back(v),
    }
}

/// What a Slice cut off before and behind each axis, those before first; `None` where it takes steps or only a run
/// tells the axes.
fn around(v: &Vjp) -> Option<Vec<String>> {
    let (x, y, starts) = (v.node.input_at(0)?, v.node.output_at(0)?, v.node.input_at(1)?);
    let rank = v.shapes.rank(x)?;
    let constant = v.constant_ints(1);
    let axes = match (v.node.input_at(3), v.dims(starts)) {
        (Some(_), _) => v.constant_ints(3)?,
        (None, Some([Dim::Known(n)])) => (0..*n).collect(),
        (None, _) => (0..constant.as_ref()?.len() as i64).collect(),
    };
    if v.node.input_at(4).is_some() && v.constant_ints(4)?.iter().any(|step| *step != 1) {
        return None;
    }
    let mut before = vec![v.ints(&[0]); rank];
    let mut after = before.clone();
    for (k, axis) in axes.into_iter().enumerate() {
        let axis = v.axis(axis, rank).ok()?;
        let (full, part) = (v.dim_of(x, axis), v.dim_of(y, axis));
        let size = |value: &str| known(v.dims(value)?.get(axis)?);
        let start = constant.as_ref().and_then(|s| s.get(k).copied());
        let from = match (start, size(x)) {
            (Some(start), Some(n)) => Some(if start < 0 { start.saturating_add(n) } else { start }.clamp(0, n.max(0))),
            (Some(0), None) => Some(0),
            _ => None,
        };
        (before[axis], after[axis]) = match (from, size(x), size(y)) {
            (Some(from), Some(n), Some(m)) => (v.ints(&[from]), v.ints(&[n - m - from])),
            (Some(from), ..) => (v.ints(&[from]), v.sub(v.sub(full, part), v.ints(&[from]))),
            (None, ..) => {
                let start = v.gather_one(starts, k);
                let wrapped = v.add(&start, v.select(v.less(&start, v.ints(&[0])), &full, v.ints(&[0])));
                let low = v.op("Max", &[&wrapped, &v.ints(&[0])], vec![]);
                let from = v.op("Min", &[&low, &full], vec![]);
                let after = v.sub(v.sub(full, part), &from);
                (from, after)
            }
        };
    }
    before.extend(after);
    Some(before)
}

/// dy at the places in x that its elements come from: what the node itself makes of the elements' numbers.
fn back(v: &Vjp) -> Result<Adjoints> {
    let x = v.x(0)?;
    let numbers = v.reshape(v.op("Range", &[&v.int(0), &v.size(x), &v.int(1)], vec![]), v.shape_of(x));
    let inputs: Vec<&str> =
        std::iter::once(numbers.as_str()).chain(v.node.input.iter().skip(1).map(String::as_str)).collect();
    let from = v.op(v.node.op_type(), &inputs, v.node.attribute.clone());
    v.first(scatter_flat(v, x, &from, v.dy()?))
}

impl Vjp<'_> {
    /// Element `k` of a 1-D int64 value, as a 1-D value.
    pub(super) fn gather_one(&self, x: &str, k: usize) -> String {
        let k = k as i64;
        match self.constants.get(x) {
            Some(crate::onnx::Tensor::I64(a)) if a.iter().nth(k as usize).is_some() => {
                self.ints(&[a.iter().nth(k as usize).copied().unwrap_or_default()])
            }
            _ => {
                let one = self.op("Slice", &[x, &self.ints(&[k]), &self.ints(&[k + 1]), &self.ints(&[0])], vec![]);
                match self.shapes.element(x) {
                    Some(crate::onnx::DataType::Int64) => one,
                    _ => self.cast(one, crate::onnx::DataType::Int64),
                }
            }
        }
    }

    /// Dimension `axis`, which may count from the end, of a value whose rank may not be known; as [`Vjp::dim_of`].
    fn dim_at(&self, value: &str, axis: i64) -> Result<String> {
        if let Some(rank) = self.shapes.rank(value) {
            return Ok(self.dim_of(value, self.axis(axis, rank)?));
        }
        let mut span = vec![AttributeProto::int("start", axis)];
        span.extend((axis != -1).then(|| AttributeProto::int("end", axis.saturating_add(1))));
        Ok(self.op("Shape", &[value], span))
    }

    /// `x` with zeros before and after each axis; `widths` are 1-D values, first those before.
    pub(super) fn pad(&self, x: &str, widths: &[String]) -> String {
        self.op("Pad", &[x, &self.join(widths), &self.c(0.0)], vec![])
    }

    /// 1-D int64 values end to end, as one constant where they are constants.
    pub(super) fn join(&self, parts: &[String]) -> String {
        let values: Option<Vec<i64>> = parts.iter().map(|part| self.constant_value(part)).collect();
        match values {
            Some(values) => self.ints(&values),
            None => self.concat(parts, 0),
        }
    }
}

fn tile(v: &Vjp) -> Result<Adjoints> {
    // Each axis n·d as (n, d), summed over the first of each pair.
    let (x, dy) = (v.x(0)?, v.dy()?);
    let rank = v.rank(x)?;
    if rank == 0 {
        return v.first(dy.to_string());
    }
    let pair = match (v.constant_ints(1), v.static_dims(x)) {
        (Some(repeats), Some(dims)) => {
            v.ints(&repeats.iter().zip(&dims).flat_map(|(n, d)| [*n, *d]).collect::<Vec<_>>())
        }
        _ => {
            let column = |value: &str| v.unsqueeze(value, v.ints(&[1]));
            let pairs = v.concat(&[column(v.x(1)?), column(&v.shape_of(x))], 1);
            v.op("Reshape", &[&pairs, &v.ints(&[-1])], vec![])
        }
    };
    let axes: Vec<i64> = (0..rank as i64).map(|i| 2 * i).collect();
    v.first(v.reduce_sum(v.reshape(dy, pair), v.ints(&axes), false))
}

/// Padding is undone by padding with the negative widths, which crops.
fn pad(v: &Vjp) -> Result<Adjoints> {
    let dy = v.dy()?;
    if v.node.attr_s("mode").unwrap_or("constant") != "constant" {
        return back(v);
    }
    let widths = match v.constant_ints(1) {
        Some(widths) => v.ints(&widths.iter().map(|w| w.saturating_neg()).collect::<Vec<_>>()),
        None => v.neg(v.x(1)?),
    };
    let zero = v.c(0.0);
    let mut inputs = vec![dy, &widths, &zero];
    inputs.extend(v.node.input_at(3));
    let crop = v.op("Pad", &inputs, vec![]);
    let value = v.wants(2).then(|| v.sub(v.sum_all(dy), v.sum_all(&crop)));
    Ok(vec![v.wants(0).then_some(crop), None, value])
}

fn depth(v: &Vjp, inverse: &str) -> Result<Adjoints> {
    if v.node.attr_s("mode") == Some("CRD") {
        // SpaceToDepth knows DCR alone: (n, c, h·b, w·b) as (n, c, h, b, w, b), then the blocks next to the channels.
        let (x, dy, b) = (v.x(0)?, v.dy()?, v.ints(&[v.node.attr_i("blocksize", 1)]));
        let dims: Vec<String> = (0..4).map(|axis| v.dim_of(x, axis)).collect();
        let [n, _, h, w] = dims.as_slice() else { return Err(v.error("its input must have 4 axes")) };
        let parts = [n, &v.ints(&[-1]), h, &b, w, &b].map(String::from);
        let blocks = v.op("Reshape", &[dy, &v.join(&parts)], vec![]);
        return v.first(v.reshape(v.transpose(blocks, &[0, 1, 3, 5, 2, 4]), v.shape_of(x)));
    }
    v.first(v.op(inverse, &[v.dy()?], vec![AttributeProto::int("blocksize", v.node.attr_i("blocksize", 1))]))
}
