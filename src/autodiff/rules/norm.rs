//! Normalizations. With x̂ = (x - μ)·r, r = 1/σ and g = dy·γ: dx = r·(g - mean(g) - x̂·mean(g·x̂)), where the mean that
//! is not subtracted in the forward pass (RMS) is not subtracted here either.

use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::DataType;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("LayerNormalization", |v| {
        only_the_first(v)?;
        let (x, dy) = (v.x(0)?, v.dy()?);
        let n = Normalized::layer(v, x, rows(v, x, v.node.attr_i("axis", -1))?, epsilon(v, 1e-5), Some((1, 2)));
        let dx = v.wants(0).then(|| n.backward(dy, v.node.input_at(1), true));
        let dscale = v.to_param(1, x, || v.mul(dy, &n.hat));
        Ok(vec![dx, dscale, v.to_param(2, x, || dy.into())])
    });
    rules.vjp("RMSNormalization", |v| rms(v, None));
    rules.vjp("SimplifiedLayerNormalization", |v| rms(v, Some(1)));
    rules.vjp("BatchNormalization", batch);
    rules.vjp("InstanceNormalization", instance);
}

/// A gradient that leaves out what comes back through the mean or the deviation would be wrong in silence.
fn only_the_first(v: &Vjp) -> Result<()> {
    match (1..v.node.output.len()).find(|i| v.adjoint(*i).is_some()) {
        Some(i) => Err(v.error(format!("a result depends on its output {i}, whose derivative is not written yet"))),
        None => Ok(()),
    }
}

fn rms(v: &Vjp, inv_std: Option<usize>) -> Result<Adjoints> {
    only_the_first(v)?;
    let (x, dy) = (v.x(0)?, v.dy()?);
    let n = Normalized::rms(v, x, rows(v, x, v.node.attr_i("axis", -1))?, epsilon(v, 1e-5), inv_std);
    let dx = v.wants(0).then(|| n.backward(dy, v.node.input_at(1), false));
    Ok(vec![dx, v.to_param(1, x, || v.mul(dy, &n.hat))])
}

/// A value normalized along its last axes.
pub(super) struct Normalized<'v, 'a> {
    v: &'v Vjp<'a>,
    /// Normalized value x̂.
    pub hat: String,
    /// 1/σ of each row.
    inv_std: String,
    rows: Rows,
}

/// What is normalized together.
pub(super) struct Rows {
    /// The axes, a 1-D int64 value.
    pub axes: String,
    /// Elements in a row, a scalar of the element type.
    pub count: String,
}

impl<'v, 'a> Normalized<'v, 'a> {
    /// Over the given axes. `outputs`: where the operator itself gives the mean and 1/σ.
    pub fn layer(v: &'v Vjp<'a>, x: &str, rows: Rows, epsilon: f64, outputs: Option<(usize, usize)>) -> Self {
        if let Some((mean, inv_std)) = outputs.filter(|_| keeps_statistics(v)) {
            let (mean, inv_std) = (statistic(v, mean), statistic(v, inv_std));
            return Self { v, hat: v.mul(v.sub(x, mean), &inv_std), inv_std, rows };
        }
        let mean = v.div(v.reduce_sum(x, &rows.axes, true), &rows.count);
        Self::scaled(v, v.sub(x, mean), rows, epsilon)
    }

    /// Over the given axes, without subtraction of the mean.
    pub fn rms(v: &'v Vjp<'a>, x: &str, rows: Rows, epsilon: f64, inv_std: Option<usize>) -> Self {
        if let Some(inv_std) = inv_std.filter(|_| keeps_statistics(v)) {
            let inv_std = statistic(v, inv_std);
            return Self { v, hat: v.mul(x, &inv_std), inv_std, rows };
        }
        Self::scaled(v, x.to_string(), rows, epsilon)
    }

    fn scaled(v: &'v Vjp<'a>, centred: String, rows: Rows, epsilon: f64) -> Self {
        let variance = v.div(v.reduce_sum(v.mul(&centred, &centred), &rows.axes, true), &rows.count);
        let inv_std = v.reciprocal(v.sqrt(v.add(variance, v.c(epsilon))));
        Self { v, hat: v.mul(centred, &inv_std), inv_std, rows }
    }

    /// Adjoint of x.
    pub fn backward(&self, dy: &str, scale: Option<&str>, centred: bool) -> String {
        let v = self.v;
        let g = scale.map_or_else(|| dy.to_string(), |scale| v.mul(dy, scale));
        let mean = |value: String| v.div(v.reduce_sum(value, &self.rows.axes, true), &self.rows.count);
        let mut inner = v.sub(&g, v.mul(&self.hat, mean(v.mul(&g, &self.hat))));
        if centred {
            inner = v.sub(inner, mean(g));
        }
        v.mul(inner, &self.inv_std)
    }
}

/// The operator gives its statistics in single precision only, so wider rules compute their own.
fn keeps_statistics(v: &Vjp) -> bool {
    v.element() != Some(DataType::Double) && v.element().is_some()
}

fn statistic(v: &Vjp, output: usize) -> String {
    let value = v.forward_output(v.node, output);
    match v.element() {
        Some(DataType::Float) | None => value,
        Some(element) => v.cast(value, element),
    }
}

pub(super) fn epsilon(v: &Vjp, default: f32) -> f64 {
    f64::from(v.node.attr_f("epsilon", default))
}

/// Axes from `axis` on, and the number of elements they span.
pub(super) fn rows(v: &Vjp, x: &str, axis: i64) -> Result<Rows> {
    let (axes, count) = match v.shapes.rank(x) {
        Some(rank) => {
            let first = v.axis(axis, rank)?;
            let dims = v.dims(x).and_then(|dims| dims.get(first..));
            let count = dims.and_then(|d| d.iter().try_fold(1i64, |n, d| n.checked_mul(known(d)?)));
            ((first as i64..rank as i64).collect(), count)
        }
        None if axis < 0 => ((axis..0).collect::<Vec<_>>(), None),
        None => return Err(v.error(format!("the rank of {x} is not known"))),
    };
    let axes = v.ints(&axes);
    let count = match count {
        Some(n) => v.c(n as f64),
        None => v.ratio(x, v.reduce_sum(x, &axes, true), None),
    };
    Ok(Rows { axes, count })
}

impl Vjp<'_> {
    /// The adjoint of parameter `i`, which is broadcast to `x`, if it wants one.
    pub(super) fn to_param(&self, i: usize, x: &str, g: impl FnOnce() -> String) -> Option<String> {
        let param = self.node.input_at(i).filter(|_| self.wants(i))?;
        Some(self.unbroadcast(g(), self.dims(x), param))
    }
}

/// Inference form: y = (x - μ)·s/√(σ² + ε) + b, all parameters per channel (axis 1).
fn batch(v: &Vjp) -> Result<Adjoints> {
    if v.node.attr_i("training_mode", 0) != 0 {
        return Err(v.error("its training mode is not supported"));
    }
    let (x, scale, mean, var, dy) = (v.x(0)?, v.x(1)?, v.x(3)?, v.x(4)?, v.dy()?);
    let rank = v.rank(x)?;
    let mut shape = vec![1; rank.max(2)];
    shape[1] = -1;
    shape.truncate(rank);
    let across = |value: &str| v.op("Reshape", &[value, &v.ints(&shape)], vec![]);
    let others: Vec<i64> = (0..rank as i64).filter(|axis| *axis != 1).collect();
    let per_channel = |value: String| v.reduce_sum(value, v.ints(&others), false);
    let inv_std = v.reciprocal(v.sqrt(v.add(var, v.c(epsilon(v, 1e-5)))));
    let gain = v.mul(scale, &inv_std);
    let centred = || per_channel(v.mul(dy, v.sub(x, across(mean))));
    Ok(vec![
        v.wants(0).then(|| v.mul(dy, across(&gain))),
        v.wants(1).then(|| v.mul(centred(), &inv_std)),
        v.wants(2).then(|| per_channel(dy.into())),
        v.wants(3).then(|| v.neg(v.mul(per_channel(dy.into()), &gain))),
        v.wants(4).then(|| v.mul(v.mul(v.mul(centred(), &gain), v.mul(&inv_std, &inv_std)), v.c(-0.5))),
    ])
}

/// Each channel of each sample over its spatial axes.
fn instance(v: &Vjp) -> Result<Adjoints> {
    let (x, scale, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let rank = v.rank(x)?;
    if rank < 3 {
        return Err(v.error("its input must have 3 axes or more"));
    }
    let n = Normalized::layer(v, x, rows(v, x, 2)?, epsilon(v, 1e-5), None);
    let mut shape = vec![1; rank];
    shape[1] = -1;
    let others: Vec<i64> = (0..rank as i64).filter(|axis| *axis != 1).collect();
    let per_channel = |value: String| v.reduce_sum(value, v.ints(&others), false);
    let across = v.op("Reshape", &[scale, &v.ints(&shape)], vec![]);
    Ok(vec![
        v.wants(0).then(|| n.backward(dy, Some(&across), true)),
        v.wants(1).then(|| per_channel(v.mul(dy, &n.hat))),
        v.wants(2).then(|| per_channel(dy.into())),
    ])
}
