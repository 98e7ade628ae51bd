//! Operators of ONNX Runtime's own domain that exporters and its optimizer emit (`ContribOperators.md`).

use super::elementwise::{gelu, gelu_tanh, swish};
use super::norm::{Normalized, epsilon, rows};
use super::rotary::counting;
use super::{Adjoints, MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    let mut row = |op: &str, rule: fn(&Vjp) -> Result<Adjoints>| rules.insert(MICROSOFT, op, Rule::vjp(rule));
    row("Gelu", |v| v.first(gelu(v, v.x(0)?, v.dy()?)));
    row("QuickGelu", |v| v.first(swish(v, v.x(0)?, v.y(0)?, v.dy()?, f64::from(v.node.attr_f("alpha", 1.702)))));
    row("FastGelu", |v| biased(v, gelu_tanh));
    row("BiasGelu", |v| biased(v, gelu));
    row("EmbedLayerNormalization", |v| v.through(embed));
    row("SkipLayerNormalization", |v| skip(v, Some(3), 4));
    row("SkipSimplifiedLayerNormalization", |v| skip(v, None, 3));
}

/// Token ids, segment ids, the tables of words, positions and segments, scale, shift, mask, positions: a normalization
/// of the sum of what the tables hold (outputs: it, the mask's index, the sum).
fn embed(v: &Vjp) -> Result<Vec<Option<String>>> {
    let row = |table: &str, at: &str| v.op("Gather", &[table, &v.cast(at, DataType::Int64)], vec![]);
    let ids = v.x(0)?;
    let places = match v.node.input_at(8) {
        Some(places) => places.to_string(),
        None => counting(v, &v.size_of(ids, 1)),
    };
    let mut sum = v.add(row(v.x(2)?, ids), row(v.x(3)?, &places));
    if let (Some(segments), Some(table)) = (v.node.input_at(1), v.node.input_at(4)) {
        sum = v.add(sum, row(table, segments));
    }
    let epsilon = vec![AttributeProto::float("epsilon", v.node.attr_f("epsilon", 1e-12))];
    let y = v.op("LayerNormalization", &[&sum, v.x(5)?, v.x(6)?], epsilon);
    Ok(vec![Some(y), None, Some(sum)])
}

/// An activation of x + bias, the bias being a vector or absent.
fn biased(v: &Vjp, activation: fn(&Vjp, &str, &str) -> String) -> Result<Adjoints> {
    let (x, dy) = (v.x(0)?, v.dy()?);
    let dx = match v.node.input_at(1) {
        Some(bias) => activation(v, &v.add(x, bias), dy),
        None => activation(v, x, dy),
    };
    let bias = v.to_param(1, x, || dx.clone());
    Ok(vec![v.wants(0).then_some(dx), bias])
}

/// A normalization of input + skip (+ bias), a sum that output 3 gives. (Outputs 1 and 2, mean and 1/σ, are declared but
/// ONNX Runtime never writes them.) `beta`: the place of the shift, where there is
/// one (and then a mean is subtracted); `bias`: that of the bias.
fn skip(v: &Vjp, beta: Option<usize>, bias: usize) -> Result<Adjoints> {
    if let Some(i) = [1, 2].into_iter().find(|i| v.adjoint(*i).is_some()) {
        return Err(
            v.error(format!("its output {i} is a statistic that ONNX Runtime never writes; nothing may use it"))
        );
    }
    let input = v.x(0)?;
    let sum = v.forward_output(v.node, 3);
    let rows = rows(v, input, -1)?;
    let normalized = match beta {
        Some(_) => Normalized::layer(v, &sum, rows, epsilon(v, 1e-12), None),
        None => Normalized::rms(v, &sum, rows, epsilon(v, 1e-12), None),
    };
    let mut parts: Vec<String> = v.adjoint(3).map(String::from).into_iter().collect();
    parts.extend(v.adjoint(0).map(|dy| normalized.backward(dy, v.node.input_at(2), beta.is_some())));
    let dsum = v.total(parts).ok_or_else(|| v.error("none of its results is used"))?;

    let mut adjoints = vec![None; v.node.input.len()];
    for i in [0, 1, bias] {
        if let Some(adjoint) = adjoints.get_mut(i) {
            *adjoint = v.to_param(i, input, || dsum.clone());
        }
    }
    if let Some(dy) = v.adjoint(0) {
        if let Some(scale) = adjoints.get_mut(2) {
            *scale = v.to_param(2, input, || v.mul(dy, &normalized.hat));
        }
        if let Some((beta, shift)) = beta.and_then(|beta| Some((beta, adjoints.get_mut(beta)?))) {
            *shift = v.to_param(beta, input, || dy.to_string());
        }
    }
    Ok(adjoints)
}
