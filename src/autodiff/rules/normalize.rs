//! Normalizations by groups of channels, by neighbouring channels and by a norm.

use super::norm::{Normalized, epsilon, rows};
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("GroupNormalization", group);
    rules.vjp("MeanVarianceNormalization", |v| {
        let (x, dy) = (v.x(0)?, v.dy()?);
        let axes = v.ints(v.node.attr_ints("axes").unwrap_or(&[0, 2, 3]));
        let n = Normalized::layer(v, x, over(v, x, axes), 0.0, None);
        v.first(n.backward(dy, None, true))
    });
    rules.vjp("LpNormalization", lp);
    rules.vjp("LRN", neighbours);
}

/// (n, groups, rest) normalized over the rest; the scale is one per channel (per group before operator set 21).
fn group(v: &Vjp) -> Result<Adjoints> {
    let (x, scale, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let rank = v.rank(x)?;
    let groups = v.node.attr_i("num_groups", 1);
    let grouped = |value: &str| v.op("Reshape", &[value, &v.ints(&[0, groups, -1])], vec![]);
    let parts = grouped(x);
    let n = Normalized::layer(v, &parts, rows(v, &parts, -1)?, epsilon(v, 1e-5), None);
    let by_group = v.opset < 21;
    let full = |value: &str| if by_group { value.to_string() } else { v.reshape(value, v.shape_of(x)) };
    let (axis, dims) = if by_group { (grouped(dy), 3) } else { (dy.to_string(), rank.max(2)) };
    let mut shape = vec![1; dims];
    shape[1] = -1;
    let across = v.op("Reshape", &[scale, &v.ints(&shape)], vec![]);
    let others: Vec<i64> = (0..dims as i64).filter(|i| *i != 1).collect();
    let per_channel = |value: &str| v.reduce_sum(value, v.ints(&others), false);
    Ok(vec![
        v.wants(0).then(|| v.reshape(n.backward(&grouped(&v.mul(&axis, &across)), None, true), v.shape_of(x))),
        v.wants(1).then(|| per_channel(&v.mul(&axis, full(&n.hat)))),
        v.wants(2).then(|| per_channel(&axis)),
    ])
}

fn over(v: &Vjp, x: &str, axes: String) -> super::norm::Rows {
    let count = v.ratio(x, v.reduce_sum(x, &axes, true), None);
    super::norm::Rows { axes, count }
}

/// y = x/‖x‖: dx = (dy - ∂‖x‖·Σ dy·y)/‖x‖ with ∂‖x‖ = y or, for p = 1, sign(x); 0 where the norm is 0.
fn lp(v: &Vjp) -> Result<Adjoints> {
    let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
    let axis = v.ints(&[v.node.attr_i("axis", -1)]);
    let dot = v.reduce_sum(v.mul(dy, y), &axis, true);
    let (norm, slope) = match v.node.attr_i("p", 2) {
        1 => (v.reduce_sum(v.abs(x), &axis, true), v.sign(x)),
        _ => (v.sqrt(v.reduce_sum(v.mul(x, x), &axis, true)), y.to_string()),
    };
    let empty = v.equal(&norm, v.c(0.0));
    let g = v.div(v.sub(dy, v.mul(slope, dot)), v.select(&empty, v.c(1.0), norm));
    v.first(v.select(empty, v.c(0.0), g))
}

/// y = x·s⁻ᵝ with s = bias + α·mean of x² over neighbouring channels: dx = dy·s⁻ᵝ - 2αβ·x·mean'(dy·y/s), where mean'
/// looks the other way.
fn neighbours(v: &Vjp) -> Result<Adjoints> {
    let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
    let size = v.node.attr_i("size", 1).max(1);
    let float = |name: &str, default: f32| f64::from(v.node.attr_f(name, default));
    let (alpha, beta, bias) = (float("alpha", 1e-4), float("beta", 0.75), float("bias", 1.0));
    let (low, high) = ((size - 1) / 2, size / 2);
    let mean = |value: &str, low: i64, high: i64| {
        let flat = v.unsqueeze(v.op("Reshape", &[value, &v.ints(&[0, 0, -1])], vec![]), v.ints(&[1]));
        let attributes = vec![
            AttributeProto::ints("kernel_shape", &[size, 1]),
            AttributeProto::ints("pads", &[low, 0, high, 0]),
            AttributeProto::int("count_include_pad", 1),
        ];
        v.reshape(v.op("AveragePool", &[&flat], attributes), v.shape_of(x))
    };
    let s = v.add(v.mul(mean(&v.mul(x, x), low, high), v.c(alpha)), v.c(bias));
    let inner = mean(&v.div(v.mul(dy, y), &s), high, low);
    let direct = v.mul(dy, v.pow(&s, v.c(-beta)));
    v.first(v.sub(direct, v.mul(v.mul(x, v.c(2.0 * alpha * beta)), inner)))
}
