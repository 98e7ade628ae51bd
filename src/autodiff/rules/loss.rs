//! Losses of a classification: loss = -Σ wₜ·x[t] (and ÷ Σ wₜ for the mean) over the targets t that are not ignored.

use super::pool::scatter_flat;
use super::{Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("NegativeLogLikelihoodLoss", |v| {
        let likelihood = Likelihood::of(v, v.x(0)?, v.dy()?)?;
        let scores = if v.wants(0) { Some(likelihood.scores()?) } else { None };
        Ok(vec![scores, None, if v.wants(2) { Some(likelihood.weights()?) } else { None }])
    });
    // x = LogSoftmax of the scores: dscores = dx - exp(x)·Σ dx.
    rules.vjp("SoftmaxCrossEntropyLoss", |v| {
        let log_prob = v.forward_output(v.node, 1);
        let (mut parts, mut weights) = (Vec::from_iter(v.adjoint(1).map(String::from)), None);
        if let Some(dy) = v.adjoint(0) {
            let likelihood = Likelihood::of(v, &log_prob, dy)?;
            parts.push(likelihood.scores()?);
            weights = if v.wants(2) { Some(likelihood.weights()?) } else { None };
        }
        let scores = v.total(parts).map(|g| {
            let sum = v.reduce_sum(&g, v.ints(&[1]), true);
            v.sub(g, v.mul(v.exp(&log_prob), sum))
        });
        Ok(vec![scores, None, weights])
    });
}

/// The loss of log-probabilities `x` and its adjoint `dy`.
struct Likelihood<'v, 'a> {
    v: &'v Vjp<'a>,
    x: &'v str,
    dy: &'v str,
    /// Which targets are ignored.
    ignored: Option<String>,
    /// The targets, those that are ignored as class 0, for they need not be classes.
    class: String,
    /// The weight of each target, 0 where it is ignored.
    weight: String,
    mean: bool,
}

impl<'v, 'a> Likelihood<'v, 'a> {
    fn of(v: &'v Vjp<'a>, x: &'v str, dy: &'v str) -> Result<Self> {
        let target = v.x(1)?;
        let ignored = v.node.attr("ignore_index").map(|_| {
            let index = v.int(v.node.attr_i("ignore_index", 0));
            match v.shapes.element(target) {
                Some(DataType::Int64) => v.equal(target, index),
                Some(element) => v.equal(target, v.cast(index, element)),
                None => v.equal(v.cast(target, DataType::Int64), index),
            }
        });
        let class = v.cast(target, DataType::Int64);
        let class = ignored.as_ref().map_or(class.clone(), |ignored| v.select(ignored, v.int(0), class));
        let weight = match v.node.input_at(2) {
            Some(weights) => v.op("Gather", &[weights, &class], vec![]),
            None => v.expand(v.c(1.0), v.shape_of(target)),
        };
        let weight = ignored.as_ref().map_or(weight.clone(), |ignored| v.select(ignored, v.c(0.0), weight));
        let mean = v.node.attr_s("reduction").unwrap_or("mean") == "mean";
        Ok(Self { v, x, dy, ignored, class, weight, mean })
    }

    /// The targets' places on axis 1.
    fn column(&self, value: &str) -> String {
        self.v.unsqueeze(value, self.v.ints(&[1]))
    }

    /// Adjoint of x: -dy·w at the target's place, and zeros beside it.
    fn scores(&self) -> Result<String> {
        let (v, zeros) = (self.v, self.v.zeros_like(self.v.x(0)?));
        let share = match self.mean {
            true => v.mul(self.dy, v.div(&self.weight, v.sum_all(&self.weight))),
            false => v.mul(self.dy, &self.weight),
        };
        let at = vec![AttributeProto::int("axis", 1)];
        Ok(v.op("ScatterElements", &[&zeros, &self.column(&self.class), &self.column(&v.neg(share))], at))
    }

    /// Adjoint of the class weights: each collects -dy·x[t] of its targets. In a mean they stand below the line as well:
    /// there it is -dy·(x[t] + loss)/Σ wₜ.
    fn weights(&self) -> Result<String> {
        let v = self.v;
        let at = vec![AttributeProto::int("axis", 1)];
        let picked = v.op("GatherElements", &[self.x, &self.column(&self.class)], at);
        let picked = v.squeeze(picked, v.ints(&[1]));
        let slope = match self.mean {
            true => v.div(v.add(picked, v.y(0)?), v.sum_all(&self.weight)),
            false => picked,
        };
        let g = v.neg(v.mul(self.dy, slope));
        let g = self.ignored.as_ref().map_or(g.clone(), |ignored| v.select(ignored, v.c(0.0), g));
        Ok(scatter_flat(v, v.x(2)?, &self.class, &g))
    }
}
