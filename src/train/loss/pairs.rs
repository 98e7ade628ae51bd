//! Losses that hold the rows of an output against each other: anchors, what belongs to them, what does not.

use super::super::data::Field;
use super::nodes::Nodes;
use crate::words::words;
use crate::{Error, Result};

/// How far two vectors are from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distance {
    /// The length of their difference, with 1e-6 in each element (`pairwise_distance`).
    Euclidean,
    /// The sum of the sizes of the same elements (`pairwise_distance` with p = 1).
    Manhattan,
    /// 1 − cosine.
    Cosine,
}

words!(Distance, "distance" { Euclidean = "euclidean", Manhattan = "manhattan", Cosine = "cosine" });

/// Squares of lengths below this count as this (PyTorch's `normalize`), so that a row of zeros has a gradient: none.
const LEAST_SQUARE: f64 = 1e-24;
/// What PyTorch adds to each difference.
const EPSILON: f64 = 1e-6;

/// The rows of `scores` by role: anchors, positives and, where `roles` is 3, negatives.
pub(super) fn parts(nodes: &mut Nodes, scores: &str, output: &Field, roles: usize, opset: i64) -> Result<Vec<String>> {
    match output.dims.as_ref().map(Vec::len) {
        None | Some(2) => Ok(nodes.split(scores, roles, opset)),
        Some(3) => Err(Error::config(format!(
            "the loss compares a vector for each text, and output {} has one for each token; make one of them with \
             --pool mean or --pool cls",
            output.name
        ))),
        Some(rank) => Err(Error::model(format!(
            "the loss compares vectors, [rows, features], and output {} has {rank} axes",
            output.name
        ))),
    }
}

/// Cross-entropy of scale·cos(anchor, each candidate) with the anchor's own positive.
pub(super) fn ranking(nodes: &mut Nodes, parts: &[String], scale: f64, symmetric: bool) -> String {
    let unit: Vec<String> = parts.iter().map(|part| normalized(nodes, part)).collect();
    let [anchors, candidates @ ..] = unit.as_slice() else { return nodes.number(0.0) };
    let all = match candidates {
        [only] => only.clone(),
        several => nodes.concat(&several.iter().map(String::as_str).collect::<Vec<_>>()),
    };
    let forward = own_of(nodes, anchors, &all, scale);
    match candidates.first().filter(|_| symmetric) {
        None => forward,
        Some(positives) => {
            let backward = own_of(nodes, positives, anchors, scale);
            let sum = nodes.op("Add", &[&forward, &backward]);
            nodes.times(&sum, 0.5)
        }
    }
}

/// −log softmax of scale·queries·candidatesᵀ at the candidate in the query's own place, mean over the queries.
fn own_of(nodes: &mut Nodes, queries: &str, candidates: &str, scale: f64) -> String {
    let columns = nodes.transpose(candidates);
    let cosines = nodes.op("MatMul", &[queries, &columns]);
    let scores = nodes.times(&cosines, scale);
    let log = nodes.log_softmax(&scores);
    let own = nodes.op("EyeLike", &[&log]);
    let picked = nodes.op("Mul", &[&log, &own]);
    let rows = nodes.sum_of_last(&picked);
    let mean = nodes.mean(&rows);
    nodes.op("Neg", &[&mean])
}

/// Each row at length 1.
fn normalized(nodes: &mut Nodes, rows: &str) -> String {
    let square = nodes.op("Mul", &[rows, rows]);
    let square = nodes.sum_of_last(&square);
    let least = nodes.number(LEAST_SQUARE);
    let square = nodes.op("Max", &[&square, &least]);
    let length = nodes.op("Sqrt", &[&square]);
    let length = nodes.unsqueeze(&length);
    nodes.op("Div", &[rows, &length])
}

/// max(d(anchor, positive) − d(anchor, negative) + margin, 0), mean over the anchors.
pub(super) fn triplet(nodes: &mut Nodes, parts: &[String], margin: f64, distance: Distance) -> Result<String> {
    let [anchors, positives, negatives] = parts else {
        return Err(Error::data("the loss triplet wants a negative with each anchor and positive"));
    };
    let [anchors, positives, negatives] = [anchors, positives, negatives].map(|part| match distance {
        Distance::Cosine => normalized(nodes, part),
        _ => part.clone(),
    });
    let near = apart(nodes, &anchors, &positives, distance);
    let far = apart(nodes, &anchors, &negatives, distance);
    let difference = nodes.op("Sub", &[&near, &far]);
    let margin = nodes.number(margin);
    let missing = nodes.op("Add", &[&difference, &margin]);
    let missing = nodes.op("Relu", &[&missing]);
    Ok(nodes.mean(&missing))
}

/// The distance of each row of `a` from that of `b`; for cosines, both are at length 1.
fn apart(nodes: &mut Nodes, a: &str, b: &str, distance: Distance) -> String {
    if distance == Distance::Cosine {
        let product = nodes.op("Mul", &[a, b]);
        let cosine = nodes.sum_of_last(&product);
        let one = nodes.number(1.0);
        return nodes.op("Sub", &[&one, &cosine]);
    }
    let difference = nodes.op("Sub", &[a, b]);
    let epsilon = nodes.number(EPSILON);
    let difference = nodes.op("Add", &[&difference, &epsilon]);
    if distance == Distance::Manhattan {
        let sizes = nodes.op("Abs", &[&difference]);
        return nodes.sum_of_last(&sizes);
    }
    let squares = nodes.op("Mul", &[&difference, &difference]);
    let square = nodes.sum_of_last(&squares);
    nodes.op("Sqrt", &[&square])
}
