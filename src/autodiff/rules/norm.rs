//! Normalizations. With x̂ = (x - μ)·r, r = 1/σ and g = dy·γ: dx = r·(g - mean(g) - x̂·mean(g·x̂)), where the mean that
//! is not subtracted in the forward pass (RMS) is not subtracted here either.

use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::DataType;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("LayerNormalization", |v| {
        let x = v.x(0)?;
        let n = Normalized::layer(v, x, rows(v, x, v.node.attr_i("axis", -1))?, epsilon(v, 1e-5), Some((1, 2)));
        let mut adjoints = n.adjoints(x, true, v.adjoint(1), v.adjoint(2));
        adjoints.push(v.adjoint(0).and_then(|dy| v.to_param(2, x, || dy.into())));
        Ok(adjoints)
    });
    rules.vjp("RMSNormalization", |v| rms(v, None));
    rules.vjp("SimplifiedLayerNormalization", |v| rms(v, Some(1)));
    rules.vjp("BatchNormalization", |v| match v.node.attr_i("training_mode", 0) {
        0 => batch(v),
        _ => batch_in_training(v),
    });
    rules.vjp("InstanceNormalization", instance);
}

fn rms(v: &Vjp, inv_std: Option<usize>) -> Result<Adjoints> {
    let x = v.x(0)?;
    let n = Normalized::rms(v, x, rows(v, x, v.node.attr_i("axis", -1))?, epsilon(v, 1e-5), inv_std);
    Ok(n.adjoints(x, false, None, inv_std.and_then(|i| v.adjoint(i))))
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

    /// What comes back to x through its statistics: (shift + x̂·tilt)/n, where shift is the adjoint of the mean and tilt
    /// is -r²·dr, or 2·dσ²/r.
    fn through_statistics(&self, x: &str, shift: Option<String>, tilt: Option<String>) -> Option<String> {
        let v = self.v;
        let share = |value: String| v.div(value, &self.rows.count);
        match (shift.map(share), tilt.map(share)) {
            (None, None) => None,
            (Some(shift), None) => Some(v.expand_like(shift, x)),
            (shift, Some(tilt)) => v.total([Some(v.mul(&self.hat, tilt)), shift].into_iter().flatten().collect()),
        }
    }

    /// Adjoints of x and of the scale (input 1) from those of the result (output 0), of the mean and of 1/σ.
    fn adjoints(&self, x: &str, centred: bool, mean: Option<&str>, inv_std: Option<&str>) -> Adjoints {
        let (v, dy) = (self.v, self.v.adjoint(0));
        // Statistics may be in single precision where x is not.
        let own = |adjoint: &str| match v.element() {
            Some(DataType::Float) => adjoint.to_string(),
            Some(element) => v.cast(adjoint, element),
            None => v.cast_like(adjoint, x),
        };
        let tilt = |dr: &str| v.neg(v.mul(own(dr), v.mul(&self.inv_std, &self.inv_std)));
        let dx = || {
            let direct = dy.map(|dy| self.backward(dy, v.node.input_at(1), centred));
            let through = self.through_statistics(x, mean.map(own), inv_std.map(tilt));
            v.total([direct, through].into_iter().flatten().collect())
        };
        let dx = if v.wants(0) { dx() } else { None };
        vec![dx, dy.and_then(|dy| v.to_param(1, x, || v.mul(dy, &self.hat)))]
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

/// One parameter per channel (axis 1) of x.
struct Channels<'v, 'a> {
    v: &'v Vjp<'a>,
    /// The shape of a parameter against x.
    column: Vec<i64>,
    /// All other axes, a 1-D int64 value.
    others: String,
}

impl<'v, 'a> Channels<'v, 'a> {
    fn of(v: &'v Vjp<'a>, rank: usize) -> Self {
        let mut column = vec![1; rank.max(2)];
        column[1] = -1;
        column.truncate(rank);
        let others: Vec<i64> = (0..rank as i64).filter(|axis| *axis != 1).collect();
        Self { v, column, others: v.ints(&others) }
    }

    /// A parameter that broadcasts to x.
    fn across(&self, parameter: impl AsRef<str>) -> String {
        self.v.op("Reshape", &[parameter.as_ref(), &self.v.ints(&self.column)], vec![])
    }

    /// The sum over all other axes.
    fn sum(&self, value: impl AsRef<str>) -> String {
        self.v.reduce_sum(value, &self.others, false)
    }
}

/// Inference form: y = (x - μ)·s/√(σ² + ε) + b, all parameters per channel.
fn batch(v: &Vjp) -> Result<Adjoints> {
    let (x, scale, mean, var, dy) = (v.x(0)?, v.x(1)?, v.x(3)?, v.x(4)?, v.dy()?);
    let channels = Channels::of(v, v.rank(x)?);
    let inv_std = v.reciprocal(v.sqrt(v.add(var, v.c(epsilon(v, 1e-5)))));
    let gain = v.mul(scale, &inv_std);
    let centred = || channels.sum(v.mul(dy, v.sub(x, channels.across(mean))));
    Ok(vec![
        v.wants(0).then(|| v.mul(dy, channels.across(&gain))),
        v.wants(1).then(|| v.mul(centred(), &inv_std)),
        v.wants(2).then(|| channels.sum(dy)),
        v.wants(3).then(|| v.neg(v.mul(channels.sum(dy), &gain))),
        v.wants(4).then(|| v.mul(v.mul(v.mul(centred(), &gain), v.mul(&inv_std, &inv_std)), v.c(-0.5))),
    ])
}

/// Training form: y = x̂·s + b by the mean and variance of the batch, which also move the running ones: m·μ + (1 - m)·mean
/// and m·σ² + (1 - m)·variance.
fn batch_in_training(v: &Vjp) -> Result<Adjoints> {
    let (x, scale) = (v.x(0)?, v.x(1)?);
    let channels = Channels::of(v, v.rank(x)?);
    let size = |value: &str| v.static_dims(value)?.iter().try_fold(1i64, |n, d| n.checked_mul(*d));
    let count = v.ratio(x, scale, size(x).zip(size(scale)).and_then(|(x, c)| x.checked_div(c)));
    let n = Normalized::layer(v, x, Rows { axes: channels.others.clone(), count }, epsilon(v, 1e-5), None);
    let momentum = f64::from(v.node.attr_f("momentum", 0.9));
    let (dy, running) = (v.adjoint(0), [v.adjoint(1), v.adjoint(2)]);

    let moved = |d: &str, factor: f64| channels.across(v.mul(d, v.c(factor * (1.0 - momentum))));
    let dx = || {
        let direct = dy.map(|dy| n.backward(dy, Some(&channels.across(scale)), true));
        let (shift, tilt) = (running[0].map(|d| moved(d, 1.0)), running[1].map(|d| v.div(moved(d, 2.0), &n.inv_std)));
        v.total([direct, n.through_statistics(x, shift, tilt)].into_iter().flatten().collect())
    };
    let kept = |i: usize| running[i].filter(|_| v.wants(i + 3)).map(|d| v.mul(d, v.c(momentum)));
    Ok(vec![
        if v.wants(0) { dx() } else { None },
        dy.filter(|_| v.wants(1)).map(|dy| channels.sum(v.mul(dy, &n.hat))),
        dy.filter(|_| v.wants(2)).map(|dy| channels.sum(dy)),
        kept(0),
        kept(1),
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
    let channels = Channels::of(v, rank);
    Ok(vec![
        v.wants(0).then(|| n.backward(dy, Some(&channels.across(scale)), true)),
        v.wants(1).then(|| channels.sum(v.mul(dy, &n.hat))),
        v.wants(2).then(|| channels.sum(dy)),
    ])
}
