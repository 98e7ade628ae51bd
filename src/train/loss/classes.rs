//! Losses against class ids.

use super::super::data::{Field, IGNORE};
use super::nodes::Nodes;
use crate::{Error, Result};

/// The number of classes that `output` scores.
pub(super) fn number(output: &Field) -> Result<usize> {
    output.classes().ok_or_else(|| {
        Error::model(format!(
            "the last axis of output {} has no fixed size in the model, so the number of classes cannot be told",
            output.name
        ))
    })
}

/// −log softmax at the label, mean over the labels that are not [`IGNORE`]; `smoothing` of it at all classes alike.
pub(super) fn cross_entropy(nodes: &mut Nodes, scores: &str, labels: &str, classes: usize, smoothing: f64) -> String {
    let column = nodes.unsqueeze(labels);
    let ids = nodes.integers(&(0..classes as i64).collect::<Vec<_>>());
    let zero = nodes.number(0.0);
    let log = nodes.log_softmax(scores);
    // An ignored label equals no class, so it falls out of both sums.
    let hot = nodes.op("Equal", &[&column, &ids]);
    let picked = nodes.op("Where", &[&hot, &log, &zero]);
    let mut sum = nodes.sum(&picked);
    if smoothing > 0.0 {
        let none = nodes.integers(&[IGNORE]);
        let ignored = nodes.op("Equal", &[&column, &none]);
        let counted = nodes.op("Where", &[&ignored, &zero, &log]);
        let all = nodes.sum(&counted);
        let spread = nodes.times(&all, smoothing / classes.max(1) as f64);
        let kept = nodes.times(&sum, 1.0 - smoothing);
        sum = nodes.op("Add", &[&kept, &spread]);
    }
    let hot = nodes.float(&hot);
    let count = nodes.sum(&hot);
    let one = nodes.number(1.0);
    let count = nodes.op("Max", &[&count, &one]);
    let mean = nodes.op("Div", &[&sum, &count]);
    nodes.op("Neg", &[&mean])
}

/// The scores of all tokens but the last, and the labels of all but the first.
pub(super) fn shifted(
    nodes: &mut Nodes,
    scores: &str,
    labels: &str,
    output: &Field,
    label_rank: usize,
) -> Result<(String, String)> {
    if label_rank < 2 {
        return Err(Error::model(format!(
            "the loss causal-lm wants scores for each token, [rows, tokens, classes], and output {} has no axis of \
             tokens; use cross-entropy",
            output.name
        )));
    }
    Ok((nodes.slice(scores, -2, 0, -1), nodes.slice(labels, -1, 1, i64::MAX)))
}
