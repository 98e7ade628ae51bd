//! Losses of a classification: loss = -Σ wₜ·x[t] (and ÷ Σ wₜ for the mean) over the targets t that are not ignored.

use super::{Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("NegativeLogLikelihoodLoss", |v| {
        weights_are_fixed(v)?;
        v.first(likelihood(v, v.dy()?)?)
    });
    // x = LogSoftmax of the scores: dscores = dx - exp(x)·Σ dx.
    rules.vjp("SoftmaxCrossEntropyLoss", |v| {
        weights_are_fixed(v)?;
        let mut parts: Vec<String> = v.adjoint(1).map(String::from).into_iter().collect();
        if let Some(dy) = v.adjoint(0) {
            parts.push(likelihood(v, dy)?);
        }
        let Some(g) = v.total(parts) else { return Ok(vec![]) };
        let log_prob = v.forward_output(v.node, 1);
        let sum = v.reduce_sum(&g, v.ints(&[1]), true);
        v.first(v.sub(g, v.mul(v.exp(log_prob), sum)))
    });
}

fn weights_are_fixed(v: &Vjp) -> Result<()> {
    match v.wants(2) {
        true => Err(v.error("its class weights have no derivative here, as in PyTorch; freeze them")),
        false => Ok(()),
    }
}

/// -dy·w at the target's place on axis 1, and zeros beside it.
fn likelihood(v: &Vjp, dy: &str) -> Result<String> {
    let (x, target) = (v.x(0)?, v.x(1)?);
    let ignored = v.node.attr("ignore_index").map(|_| {
        let index = v.int(v.node.attr_i("ignore_index", 0));
        match v.shapes.element(target) {
            Some(DataType::Int64) => v.equal(target, index),
            Some(element) => v.equal(target, v.cast(index, element)),
            None => v.equal(v.cast(target, DataType::Int64), index),
        }
    });
    // Ignored targets need not be classes; any class does for them.
    let class = v.cast(target, DataType::Int64);
    let class = ignored.as_ref().map_or(class.clone(), |ignored| v.select(ignored, v.int(0), class));
    let weight = match v.node.input_at(2) {
        Some(weights) => v.op("Gather", &[weights, &class], vec![]),
        None => v.expand(v.c(1.0), v.shape_of(target)),
    };
    let weight = ignored.map_or(weight.clone(), |ignored| v.select(ignored, v.c(0.0), weight));
    let share = match v.node.attr_s("reduction").unwrap_or("mean") {
        "mean" => v.mul(dy, v.div(&weight, v.sum_all(&weight))),
        _ => v.mul(dy, weight),
    };
    let column = |value: &str| v.unsqueeze(value, v.ints(&[1]));
    let at = vec![AttributeProto::int("axis", 1)];
    Ok(v.op("ScatterElements", &[&v.zeros_like(x), &column(&class), &column(&v.neg(share))], at))
}
