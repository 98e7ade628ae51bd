//! Connectionist temporal classification (Graves et al. 2006): −log of the probability of the labels, over all ways to
//! place them on the frames. The recursion over the frames is a Scan, in logarithms.

use super::super::data::{Axis, Field, Target};
use super::nodes::Nodes;
use crate::onnx::{AttributeProto, DataType};
use crate::{Error, Result};

/// The logarithm of a probability of zero; finite, so that nothing becomes NaN.
const IMPOSSIBLE: f64 = -1e30;

/// The labels `[rows, labels]`, how many frames of each row count, and how many labels.
pub(super) fn columns(labels: &str, output: &Field) -> Vec<Target> {
    let rows = output.dims.as_ref().and_then(|dims| dims.first()).cloned().unwrap_or(Axis::Free);
    let target = |name: &str, shape: &[Axis], flag| Target {
        name: name.into(),
        data_type: DataType::Int64,
        shapes: vec![shape.to_vec()],
        flag,
        others: Vec::new(),
    };
    vec![
        target(labels, &[rows.clone(), Axis::Free], Some("--labels")),
        target("input_lengths", std::slice::from_ref(&rows), None),
        target("target_lengths", &[rows], None),
    ]
}

/// `scores` are `[rows, frames, classes]`, `targets` are [`columns`]. Mean over the rows of each one's loss divided by its
/// number of labels. A row with more labels than its frames can hold has an infinite loss, or none with `zero_infinity`.
pub(super) fn ctc(
    nodes: &mut Nodes,
    scores: &str,
    targets: &[String],
    output: &Field,
    (blank, zero_infinity): (usize, bool),
) -> Result<String> {
    if output.dims.as_ref().is_some_and(|dims| dims.len() != 3) {
        return Err(Error::model(format!(
            "the loss ctc wants scores for each frame, [rows, frames, classes], and output {} has other axes",
            output.name
        )));
    }
    if let Some(classes) = output.classes().filter(|classes| blank >= *classes) {
        let last = classes.saturating_sub(1);
        return Err(Error::config(format!(
            "blank is {blank}, and output {} has classes from 0 to {last}",
            output.name
        )));
    }
    let [labels, frames, lengths] = targets else {
        return Err(Error::data("the loss ctc reads labels, input_lengths and target_lengths"));
    };
    let (none, zero, one) = (nodes.number(IMPOSSIBLE), nodes.number(0.0), nodes.number(1.0));
    let [zero_id, one_id, two_ids] = [0, 1, 2].map(|n| nodes.integers(&[n]));
    let blank = nodes.integers(&[blank as i64]);

    // b l b l … b: blanks between the labels and around them. What fills up a row of labels may be negative.
    let labels = nodes.op("Max", &[labels, &zero_id]);
    let column = nodes.unsqueeze(&labels);
    let shape = nodes.op("Shape", &[&column]);
    let blanks = nodes.op("Expand", &[&blank, &shape]);
    let pairs = nodes.append(&blanks, &column);
    let flat = nodes.integers(&[0, -1]);
    let pairs = nodes.op("Reshape", &[&pairs, &flat]);
    let rows = nodes.slice(&shape, 0, 0, 1);
    let shape = nodes.append(&rows, &one_id);
    let behind = nodes.op("Expand", &[&blank, &shape]);
    let path = nodes.append(&pairs, &behind);

    // The logarithm of the probability of each place of the path in each frame, [frames, rows, places].
    let log = nodes.log_softmax(scores);
    let shape = nodes.op("Shape", &[&log]);
    let rows_and_frames = nodes.slice(&shape, 0, 0, 2);
    let frame_count = nodes.slice(&shape, 0, 1, 2);
    let shape = nodes.op("Shape", &[&path]);
    let place_count = nodes.slice(&shape, 0, 1, 2);
    let shape = nodes.append(&rows_and_frames, &place_count);
    let ids = nodes.op("Unsqueeze", &[&path, &one_id]);
    let ids = nodes.op("Expand", &[&ids, &shape]);
    let emitted = nodes.op_with("GatherElements", &[&log, &ids], Some(AttributeProto::int("axis", 2)));
    let emitted = nodes.op_with("Transpose", &[&emitted], Some(AttributeProto::ints("perm", &[1, 0, 2])));

    // A label may follow the one before it without a blank in between, unless they are the same.
    let two_before = earlier(nodes, &path, &blank, 2);
    let same = nodes.op("Equal", &[&path, &two_before]);
    let is_blank = nodes.op("Equal", &[&path, &blank]);
    let bound = nodes.op("Or", &[&same, &is_blank]);
    let skip = nodes.op("Where", &[&bound, &none, &zero]);

    // Before the first frame, every way is at the first place.
    let places = nodes.range(&place_count);
    let is_first = nodes.op("Equal", &[&places, &zero_id]);
    let start = nodes.op("Where", &[&is_first, &zero, &none]);
    let shape = nodes.op("Shape", &[&path]);
    let start = nodes.op("Expand", &[&start, &shape]);
    let reached = nodes.scan(&start, &emitted, |nodes, state, emitted| {
        let stepped = earlier(nodes, state, &none, 1);
        let skipped = earlier(nodes, state, &none, 2);
        let skipped = nodes.op("Add", &[&skipped, &skip]);
        let sum = log_sum(nodes, &[state, &stepped, &skipped]);
        nodes.op("Add", &[&sum, emitted])
    });

    // At the last frame of each row, the ways that end with the last label or with the blank behind it.
    let steps = nodes.range(&frame_count);
    let steps = nodes.unsqueeze(&steps);
    let end = nodes.op("Sub", &[frames, &one_id]);
    let is_end = nodes.op("Equal", &[&steps, &end]);
    let is_end = nodes.unsqueeze(&is_end);
    let at_end = nodes.op("Where", &[&is_end, &reached, &zero]);
    let at_end = nodes.op_with("ReduceSum", &[&at_end, &zero_id], Some(AttributeProto::int("keepdims", 0)));
    let last = nodes.op("Mul", &[lengths, &two_ids]);
    let at = |nodes: &mut Nodes, place: &str| {
        let place = nodes.unsqueeze(place);
        let here = nodes.op("Equal", &[&places, &place]);
        let there = nodes.op("Where", &[&here, &at_end, &zero]);
        nodes.sum_of_last(&there)
    };
    let with_blank = at(nodes, &last);
    let before_last = nodes.op("Sub", &[&last, &one_id]);
    let with_label = at(nodes, &before_last);
    let no_label = nodes.op("Equal", &[lengths, &zero_id]);
    let with_label = nodes.op("Where", &[&no_label, &none, &with_label]);
    let sum = log_sum(nodes, &[&with_blank, &with_label]);

    let loss = nodes.op("Neg", &[&sum]);
    let far = nodes.number(-IMPOSSIBLE / 10.0);
    let impossible = nodes.op("Greater", &[&loss, &far]);
    let instead = nodes.number(if zero_infinity { 0.0 } else { f64::INFINITY });
    let loss = nodes.op("Where", &[&impossible, &instead, &loss]);
    let count = nodes.float(lengths);
    let count = nodes.op("Max", &[&count, &one]);
    let each = nodes.op("Div", &[&loss, &count]);
    Ok(nodes.mean(&each))
}

/// The values of the last of two axes `by` places earlier, with `filling` in front.
fn earlier(nodes: &mut Nodes, value: &str, filling: &str, by: i64) -> String {
    let front = nodes.slice(value, 1, 0, by);
    let shape = nodes.op("Shape", &[&front]);
    let front = nodes.op("Expand", &[filling, &shape]);
    let rest = nodes.slice(value, 1, 0, -by);
    nodes.append(&front, &rest)
}

/// log Σ exp, element by element.
fn log_sum(nodes: &mut Nodes, values: &[&str]) -> String {
    let largest = nodes.op("Max", values);
    let shares: Vec<String> = values
        .iter()
        .map(|value| {
            let less = nodes.op("Sub", &[value, &largest]);
            nodes.op("Exp", &[&less])
        })
        .collect();
    let sum = nodes.op("Sum", &shares.iter().map(String::as_str).collect::<Vec<_>>());
    let log = nodes.op("Log", &[&sum]);
    nodes.op("Add", &[&largest, &log])
}
