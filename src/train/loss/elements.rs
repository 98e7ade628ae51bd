//! Losses that compare number with number: a mean over all elements.

use super::Loss;
use super::nodes::Nodes;

/// The mean of `loss` over the elements of `scores` and `target`.
pub(super) fn mean(nodes: &mut Nodes, loss: Loss, scores: &str, target: &str) -> String {
    let element = match loss {
        Loss::BceWithLogits => bce_with_logits(nodes, scores, target),
        Loss::Huber { delta } => huber(nodes, scores, target, delta),
        Loss::Mae => distance(nodes, scores, target),
        _ => {
            let difference = nodes.op("Sub", &[scores, target]);
            nodes.op("Mul", &[&difference, &difference])
        }
    };
    nodes.mean(&element)
}

fn distance(nodes: &mut Nodes, scores: &str, target: &str) -> String {
    let difference = nodes.op("Sub", &[scores, target]);
    nodes.op("Abs", &[&difference])
}

/// max(x, 0) − x·y + softplus(−|x|): nothing overflows, and where a sure score is right the first two terms cancel
/// exactly.
fn bce_with_logits(nodes: &mut Nodes, scores: &str, target: &str) -> String {
    let zero = nodes.number(0.0);
    let positive = nodes.op("Max", &[scores, &zero]);
    let product = nodes.op("Mul", &[scores, target]);
    let line = nodes.op("Sub", &[&positive, &product]);
    let size = nodes.op("Abs", &[scores]);
    let opposite = nodes.op("Neg", &[&size]);
    let bend = nodes.op("Softplus", &[&opposite]);
    nodes.op("Add", &[&line, &bend])
}

/// With m = min(|d|, δ): m·(|d| − m/2), which is d²/2 up to δ and δ·(|d| − δ/2) beyond.
fn huber(nodes: &mut Nodes, scores: &str, target: &str, delta: f64) -> String {
    let distance = distance(nodes, scores, target);
    let delta = nodes.number(delta);
    let near = nodes.op("Min", &[&distance, &delta]);
    let half = nodes.times(&near, 0.5);
    let rest = nodes.op("Sub", &[&distance, &half]);
    nodes.op("Mul", &[&near, &rest])
}
