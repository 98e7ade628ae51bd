//! Losses that compare a row of numbers with another: a mean over all rows of the last axis.

use super::super::data::IGNORE;
use super::nodes::Nodes;

/// T²·Σ t·(log t − log softmax(x/T)); a target of 0 adds nothing.
pub(super) fn kl_div(nodes: &mut Nodes, scores: &str, target: &str, temperature: f64) -> String {
    let cooled = nodes.times(scores, 1.0 / temperature);
    let log = nodes.log_softmax(&cooled);
    let cross = nodes.op("Mul", &[target, &log]);
    let zero = nodes.number(0.0);
    let one = nodes.number(1.0);
    let positive = nodes.op("Greater", &[target, &zero]);
    let safe = nodes.op("Where", &[&positive, target, &one]);
    let log_target = nodes.op("Log", &[&safe]);
    let own = nodes.op("Mul", &[target, &log_target]);
    let terms = nodes.op("Sub", &[&own, &cross]);
    let rows = nodes.sum_of_last(&terms);
    let mean = nodes.mean(&rows);
    nodes.times(&mean, temperature * temperature)
}

/// Logarithms of probabilities below this count as this: a teacher may rule a class out.
const LEAST_LOG: f64 = -1e4;

/// T²·Σ t·(log t − log softmax(x/T)) with t = softmax(teacher/T), mean over the rows whose label is not [`IGNORE`].
pub(super) fn distilled(
    nodes: &mut Nodes,
    scores: &str,
    teacher: &str,
    labels: Option<&str>,
    temperature: f64,
) -> String {
    let mut log = |scores: &str| {
        let cooled = nodes.times(scores, 1.0 / temperature);
        nodes.log_softmax(&cooled)
    };
    let (log, target) = (log(scores), log(teacher));
    let share = nodes.op("Exp", &[&target]);
    let least = nodes.number(LEAST_LOG);
    let target = nodes.op("Max", &[&target, &least]);
    let apart = nodes.op("Sub", &[&target, &log]);
    let terms = nodes.op("Mul", &[&share, &apart]);
    let rows = nodes.sum_of_last(&terms);
    let mean = match labels {
        None => nodes.mean(&rows),
        Some(labels) => {
            let none = nodes.integers(&[IGNORE]);
            let ignored = nodes.op("Equal", &[labels, &none]);
            let (zero, one) = (nodes.number(0.0), nodes.number(1.0));
            let counted = nodes.op("Where", &[&ignored, &zero, &rows]);
            let sum = nodes.sum(&counted);
            let counts = nodes.op("Where", &[&ignored, &zero, &one]);
            let count = nodes.sum(&counts);
            let count = nodes.op("Max", &[&count, &one]);
            nodes.op("Div", &[&sum, &count])
        }
    };
    nodes.times(&mean, temperature * temperature)
}

/// What PyTorch adds to the squared lengths.
const EPSILON: f64 = 1e-12;

/// 1 − x·y / √((x·x + ε)(y·y + ε)).
pub(super) fn cosine_embedding(nodes: &mut Nodes, scores: &str, target: &str) -> String {
    let epsilon = nodes.number(EPSILON);
    let mut dot = |a: &str, b: &str| {
        let product = nodes.op("Mul", &[a, b]);
        nodes.sum_of_last(&product)
    };
    let [both, own, other] = [(scores, target), (scores, scores), (target, target)].map(|(a, b)| dot(a, b));
    let [own, other] = [own, other].map(|square| nodes.op("Add", &[&square, &epsilon]));
    let squares = nodes.op("Mul", &[&own, &other]);
    let lengths = nodes.op("Sqrt", &[&squares]);
    let cosine = nodes.op("Div", &[&both, &lengths]);
    let one = nodes.number(1.0);
    let distance = nodes.op("Sub", &[&one, &cosine]);
    nodes.mean(&distance)
}
