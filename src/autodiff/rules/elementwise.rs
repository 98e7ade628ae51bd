//! Element by element: arithmetic with broadcasting, activations, selection, casts.

use std::f64::consts::{FRAC_2_SQRT_PI, PI, SQRT_2};

use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::Tensor;

/// A rule for `y = f(x)`: `adjoint` gets the context, x, y and dy.
fn unary(rules: &mut Rules, op: &str, adjoint: impl Fn(&Vjp, &str, &str, &str) -> String + Send + Sync + 'static) {
    rules.vjp(op, move |v| v.first(adjoint(v, v.x(0)?, v.y(0)?, v.dy()?)));
}

/// [`unary`] of an operator whose slope may be infinite.
fn steep(rules: &mut Rules, op: &str, adjoint: impl Fn(&Vjp, &str, &str, &str) -> String + Send + Sync + 'static) {
    unary(rules, op, move |v, x, y, dy| v.settled(adjoint(v, x, y, dy)));
}

pub(super) fn add(rules: &mut Rules) {
    unary(rules, "Abs", |v, x, _, dy| v.mul(dy, v.sign(x)));
    steep(rules, "Acos", |v, x, _, dy| v.neg(v.div(dy, v.sqrt(v.sub(v.c(1.0), v.mul(x, x))))));
    steep(rules, "Acosh", |v, x, _, dy| v.div(dy, v.sqrt(v.sub(v.mul(x, x), v.c(1.0)))));
    steep(rules, "Asin", |v, x, _, dy| v.div(dy, v.sqrt(v.sub(v.c(1.0), v.mul(x, x)))));
    unary(rules, "Asinh", |v, x, _, dy| v.div(dy, v.sqrt(v.add(v.mul(x, x), v.c(1.0)))));
    unary(rules, "Atan", |v, x, _, dy| v.div(dy, v.add(v.mul(x, x), v.c(1.0))));
    steep(rules, "Atanh", |v, x, _, dy| v.div(dy, v.sub(v.c(1.0), v.mul(x, x))));
    unary(rules, "Cos", |v, x, _, dy| v.neg(v.mul(dy, v.sin(x))));
    steep(rules, "Cosh", |v, x, _, dy| v.mul(dy, v.sinh(x)));
    unary(rules, "Erf", |v, x, _, dy| v.mul(dy, v.mul(v.exp(v.neg(v.mul(x, x))), v.c(FRAC_2_SQRT_PI))));
    steep(rules, "Exp", |v, _, y, dy| v.mul(dy, y));
    unary(rules, "HardSwish", |v, x, _, dy| {
        let middle = v.add(v.mul(x, v.c(1.0 / 3.0)), v.c(0.5));
        let upper = v.select(v.less(x, v.c(3.0)), middle, v.c(1.0));
        v.mul(dy, v.select(v.greater(x, v.c(-3.0)), upper, v.c(0.0)))
    });
    unary(rules, "Identity", |_, _, _, dy| dy.to_string());
    steep(rules, "Log", |v, x, _, dy| v.div(dy, x));
    unary(rules, "Mish", |v, x, _, dy| {
        let t = v.tanh(v.op("Softplus", &[x], vec![]));
        let slope = v.mul(v.mul(x, v.sigmoid(x)), v.sub(v.c(1.0), v.mul(&t, &t)));
        v.mul(dy, v.add(t, slope))
    });
    unary(rules, "Neg", |v, _, _, dy| v.neg(dy));
    steep(rules, "Reciprocal", |v, _, y, dy| v.neg(v.mul(dy, v.mul(y, y))));
    // Sign(y) is 1 where x > 0 and 0 elsewhere, in one pass and without a mask.
    unary(rules, "Relu", |v, _, y, dy| v.mul(dy, v.sign(y)));
    unary(rules, "Sigmoid", |v, _, y, dy| v.mul(dy, v.mul(y, v.sub(v.c(1.0), y))));
    unary(rules, "Sin", |v, x, _, dy| v.mul(dy, v.cos(x)));
    steep(rules, "Sinh", |v, x, _, dy| v.mul(dy, v.cosh(x)));
    unary(rules, "Softplus", |v, x, _, dy| v.mul(dy, v.sigmoid(x)));
    unary(rules, "Softsign", |v, x, _, dy| {
        let d = v.add(v.abs(x), v.c(1.0));
        v.div(dy, v.mul(&d, &d))
    });
    steep(rules, "Sqrt", |v, _, y, dy| v.div(v.mul(dy, v.c(0.5)), y));
    steep(rules, "Tan", |v, _, y, dy| v.mul(dy, v.add(v.mul(y, y), v.c(1.0))));
    unary(rules, "Tanh", |v, _, y, dy| v.mul(dy, v.sub(v.c(1.0), v.mul(y, y))));

    unary(rules, "Celu", |v, x, _, dy| {
        let slope = v.exp(v.div(x, v.c(attr(v, "alpha", 1.0))));
        v.mul(dy, v.select(v.greater(x, v.c(0.0)), v.c(1.0), slope))
    });
    unary(rules, "Elu", |v, x, y, dy| {
        let slope = v.add(y, v.c(attr(v, "alpha", 1.0)));
        v.mul(dy, v.select(v.greater(x, v.c(0.0)), v.c(1.0), slope))
    });
    unary(rules, "Gelu", |v, x, _, dy| match v.node.attr_s("approximate") {
        Some("tanh") => gelu_tanh(v, x, dy),
        _ => gelu(v, x, dy),
    });
    unary(rules, "HardSigmoid", |v, _, y, dy| {
        let inside = v.and(v.greater(y, v.c(0.0)), v.less(y, v.c(1.0)));
        v.mul(v.mul(dy, v.mask(inside)), v.c(attr(v, "alpha", 0.2)))
    });
    unary(rules, "LeakyRelu", |v, x, _, dy| {
        v.mul(dy, v.select(v.greater(x, v.c(0.0)), v.c(1.0), v.c(attr(v, "alpha", 0.01))))
    });
    unary(rules, "Selu", |v, x, y, dy| {
        let (alpha, gamma) = (attr(v, "alpha", 1.673_263_2), attr(v, "gamma", 1.050_701));
        v.mul(dy, v.select(v.greater(x, v.c(0.0)), v.c(gamma), v.add(y, v.c(alpha * gamma))))
    });
    unary(rules, "Shrink", |v, x, _, dy| v.mul(dy, v.mask(v.greater(v.abs(x), v.c(attr(v, "lambd", 0.5))))));
    unary(rules, "Swish", |v, x, y, dy| swish(v, x, y, dy, attr(v, "alpha", 1.0)));
    unary(rules, "ThresholdedRelu", |v, x, _, dy| v.mul(dy, v.mask(v.greater(x, v.c(attr(v, "alpha", 1.0))))));

    rules.vjp("Add", |v| {
        let dy = v.dy()?;
        Ok(vec![v.to_input(0, || dy.into()), v.to_input(1, || dy.into())])
    });
    rules.vjp("Sub", |v| {
        let dy = v.dy()?;
        Ok(vec![v.to_input(0, || dy.into()), v.to_input(1, || dy.into()).map(|d| v.neg(d))])
    });
    rules.vjp("Mul", |v| {
        let (a, b, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
        Ok(vec![v.to_input(0, || times(v, dy, b)), v.to_input(1, || times(v, dy, a))])
    });
    rules.vjp("Div", |v| {
        let (b, y, dy) = (v.x(1)?, v.y(0)?, v.dy()?);
        let da = || if scalar(v, b) { v.div(dy, b) } else { v.settled(v.div(dy, b)) };
        Ok(vec![v.to_input(0, da), v.to_input(1, || times(v, &da(), y)).map(|d| v.neg(d))])
    });
    rules.vjp("Pow", pow);
    rules.vjp("PRelu", |v| {
        let (x, slope, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
        let positive = || v.greater(x, v.c(0.0));
        Ok(vec![
            v.to_input(0, || v.mul(dy, v.select(positive(), v.c(1.0), slope))),
            v.to_input(1, || v.mul(dy, v.select(positive(), v.c(0.0), x))),
        ])
    });
    rules.vjp("Where", |v| {
        let (c, dy) = (v.x(0)?, v.dy()?);
        Ok(vec![None, v.to_input(1, || v.select(c, dy, v.c(0.0))), v.to_input(2, || v.select(c, v.c(0.0), dy))])
    });
    rules.vjp("Max", extremum);
    rules.vjp("Min", extremum);
    rules.vjp("Sum", |v| {
        let dy = v.dy()?;
        Ok((0..v.node.input.len()).map(|i| v.to_input(i, || dy.into())).collect())
    });
    rules.vjp("Mean", |v| {
        let n = v.node.input.len();
        let share = v.mul(v.dy()?, v.c(1.0 / n as f64));
        Ok((0..n).map(|i| v.to_input(i, || share.clone())).collect())
    });
    rules.vjp("Clip", clip);
    rules.vjp("Cast", cast);
    rules.vjp("CastLike", cast);
    rules.vjp("Dropout", dropout);
}

/// Whether `x` is one number for all elements: a scale, which is no place to look for infinities.
fn scalar(v: &Vjp, x: &str) -> bool {
    v.shapes.rank(x) == Some(0) || v.constant(x).is_some()
}

/// dy·x, where x may be infinite where it is left out.
fn times(v: &Vjp, dy: &str, x: &str) -> String {
    let product = v.mul(dy, x);
    if scalar(v, x) { product } else { v.settled(product) }
}

fn attr(v: &Vjp, name: &str, default: f32) -> f64 {
    f64::from(v.node.attr_f(name, default))
}

/// x·Φ(x), so dx = dy·(Φ(x) + x·φ(x)). With u = x/√2: ½·dy·(1 + erf u + 2u·exp(-u²)/√π), where the factor 2/√π goes
/// into the exponent.
pub(super) fn gelu(v: &Vjp, x: &str, dy: &str) -> String {
    let u = v.mul(x, v.c(1.0 / SQRT_2));
    let bell = v.exp(v.sub(v.c(FRAC_2_SQRT_PI.ln()), v.mul(&u, &u)));
    let slope = v.add(v.mul(bell, &u), v.add(v.erf(&u), v.c(1.0)));
    v.mul(v.mul(slope, dy), v.c(0.5))
}

/// ½x(1 + t) with t = tanh(√(2/π)(x + 0.044715x³)): dx = ½·dy·(1 + t + x(1 - t²)·√(2/π)(1 + 0.134145x²)).
pub(super) fn gelu_tanh(v: &Vjp, x: &str, dy: &str) -> String {
    const CUBIC: f64 = 0.044715;
    let k = (2.0 / PI).sqrt();
    let xx = v.mul(x, x);
    let t = v.tanh(v.mul(x, v.add(v.mul(&xx, v.c(k * CUBIC)), v.c(k))));
    let inner = v.mul(x, v.add(v.mul(&xx, v.c(3.0 * k * CUBIC)), v.c(k)));
    let slope = v.add(v.mul(inner, v.sub(v.c(1.0), v.mul(&t, &t))), v.add(&t, v.c(1.0)));
    v.mul(v.mul(slope, dy), v.c(0.5))
}

/// y = x·s with s = sigmoid(αx): dx = dy·(s + αy(1 - s)).
pub(super) fn swish(v: &Vjp, x: &str, y: &str, dy: &str, alpha: f64) -> String {
    let scaled = |value: &str| if alpha == 1.0 { value.to_string() } else { v.mul(value, v.c(alpha)) };
    let s = v.sigmoid(scaled(x));
    v.mul(dy, v.add(&s, v.mul(scaled(y), v.sub(v.c(1.0), &s))))
}

/// y = aᵇ: da = dy·b·aᵇ⁻¹, db = dy·y·ln a (taken as 0 where a ≤ 0, as PyTorch does at 0).
fn pow(v: &Vjp) -> Result<Adjoints> {
    let (a, b, y, dy) = (v.x(0)?, v.x(1)?, v.y(0)?, v.dy()?);
    let same_type = v.shapes.element(a).is_some() && v.shapes.element(a) == v.shapes.element(b);
    let exponent = || if same_type { b.to_string() } else { v.cast_like(b, a) };
    let da = || match v.constant(b).and_then(|t| t.as_f64()) {
        Some(0.0) => v.zeros_like(v.node.output_at(0).unwrap_or_default()),
        Some(1.0) => dy.to_string(),
        Some(2.0) => v.mul(v.mul(dy, a), v.c(2.0)),
        Some(3.0) => v.mul(v.mul(dy, v.mul(a, a)), v.c(3.0)),
        Some(n) => v.mul(v.mul(dy, v.pow(a, v.c(n - 1.0))), v.c(n)),
        None => {
            let power = v.pow(a, v.sub(exponent(), v.c(1.0)));
            let slope = v.select(v.equal(exponent(), v.c(0.0)), v.c(0.0), v.mul(power, exponent()));
            v.mul(dy, slope)
        }
    };
    let db = || {
        let positive = v.greater(a, v.c(0.0));
        let log = v.log(v.select(&positive, a, v.c(1.0)));
        v.mul(v.mul(dy, v.select(positive, y, v.c(0.0))), log)
    };
    let db = v.to_input(1, || v.settled(db())).map(|d| if same_type { d } else { v.cast_like(d, b) });
    Ok(vec![v.to_input(0, || v.settled(da())), db])
}

/// Max and Min of any number of operands; where several are the extremum, they share the adjoint equally.
fn extremum(v: &Vjp) -> Result<Adjoints> {
    let (y, dy) = (v.y(0)?, v.dy()?);
    let inputs = (0..v.node.input.len()).map(|i| v.x(i)).collect::<Result<Vec<_>>>()?;
    let hits: Vec<String> = inputs.iter().map(|x| v.mask(v.equal(x, y))).collect();
    let Some(count) = v.total(hits.clone()) else { return Ok(vec![]) };
    let share = v.div(dy, count);
    Ok(hits.iter().enumerate().map(|(i, hit)| v.to_input(i, || v.mul(&share, hit))).collect())
}

/// y = min(max(x, lo), hi). The adjoint passes inside the bounds, and none at them, as in PyTorch (since 2.14, and ever
/// in its relu6). Bounds that want an adjoint take part as the operands of Max and Min do.
fn clip(v: &Vjp) -> Result<Adjoints> {
    let (x, dy) = (v.x(0)?, v.dy()?);
    let (lo, hi) = (v.node.input_at(1), v.node.input_at(2));
    if v.wants(1) || v.wants(2) {
        return v.through(|v| {
            let raised = lo.map_or(x.to_string(), |lo| v.op("Max", &[x, lo], vec![]));
            Ok(vec![Some(hi.map_or(raised.clone(), |hi| v.op("Min", &[&raised, hi], vec![])))])
        });
    }
    let inside = match (lo.map(|lo| v.greater(x, lo)), hi.map(|hi| v.less(x, hi))) {
        (None, None) => return v.first(dy.to_string()),
        (Some(one), None) | (None, Some(one)) => one,
        (Some(above), Some(below)) => v.and(above, below),
    };
    v.first(v.mul(dy, v.mask(inside)))
}

pub(super) fn cast(v: &Vjp) -> Result<Adjoints> {
    let x = v.x(0)?;
    v.first(match v.shapes.element(x) {
        Some(element) if v.shapes.element(v.y(0)?) == Some(element) => v.dy()?.to_string(),
        Some(element) => v.cast(v.dy()?, element),
        None => v.cast_like(v.dy()?, x),
    })
}

/// The identity in inference; in training y = x·mask·s with the mask it drew and s = 1/(1 - ratio). While that mask
/// stays what it is, ∂y/∂ratio = y·s.
fn dropout(v: &Vjp) -> Result<Adjoints> {
    let dy = v.dy()?;
    let Some(training) = v.node.input_at(2) else { return v.first(dy.to_string()) };
    let constant = match v.constant(training) {
        Some(Tensor::Bool(mode)) => mode.first().copied(),
        _ => None,
    };
    if constant == Some(false) {
        return v.first(dy.to_string());
    }
    let unless_training = |value: String, otherwise: f64| match constant {
        Some(_) => value,
        None => v.select(training, value, v.c(otherwise)),
    };
    let ratio = v.node.input_at(1);
    let scale = match ratio.map(|ratio| (ratio, v.constant(ratio).and_then(Tensor::as_f64))) {
        None => v.c(2.0),
        Some((_, Some(ratio))) => v.c(1.0 / (1.0 - ratio)),
        Some((ratio, None)) => v.reciprocal(v.sub(v.c(1.0), v.cast_like(ratio, dy))),
    };
    let kept = v.mask(v.forward_output(v.node, 1));
    let dx = v.wants(0).then(|| v.mul(dy, v.mul(kept, unless_training(scale.clone(), 1.0))));
    let d_ratio = match ratio.filter(|_| v.wants(1)) {
        Some(ratio) => {
            let sum = v.sum_all(v.mul(dy, v.mul(v.y(0)?, scale)));
            let sum = v.cast_like(unless_training(sum, 0.0), ratio);
            Some(v.reshape_like(sum, Some(&[]), ratio))
        }
        None => None,
    };
    Ok(vec![dx, d_ratio])
}
