//! RNN, GRU and LSTM: every direction, optional input and output, sequences of unequal length, one step.

use bone_onnx::onnx::{AttributeProto, Tensor};

use super::cases::between;
use super::harness::{Arg, Case, case};

const BATCH: usize = 3;
const INPUTS: usize = 2;
const HIDDEN: usize = 4;

/// Inputs that are there beside X, W and R.
#[derive(Clone, Copy, Default)]
struct With {
    bias: bool,
    lengths: Option<[i32; BATCH]>,
    initial: bool,
    peepholes: bool,
}

fn recurrent(op: &'static str, direction: &str, steps: usize, with: With) -> Case {
    let d = if direction == "bidirectional" { 2 } else { 1 };
    let rows = HIDDEN
        * match op {
            "LSTM" => 4,
            "GRU" => 3,
            _ => 1,
        };
    let by = |there: bool, dims: &[usize]| if there { between(dims, -0.9, 0.8) } else { Arg::Missing };
    let mut args = vec![
        by(true, &[steps, BATCH, INPUTS]),
        by(true, &[d, rows, INPUTS]),
        by(true, &[d, rows, HIDDEN]),
        by(with.bias, &[d, 2 * rows]),
        with.lengths.map_or(Arg::Missing, |l| Arg::Given(Tensor::new(&[BATCH], l.to_vec()))),
        by(with.initial, &[d, BATCH, HIDDEN]),
    ];
    if op == "LSTM" {
        args.push(match by(with.initial, &[d, BATCH, HIDDEN]) {
            // Other values than the hidden state's.
            Arg::By(dims, values) => Arg::By(dims, values.iter().map(|v| 0.5 - v).collect()),
            other => other,
        });
        args.push(by(with.peepholes, &[d, 3 * HIDDEN]));
    }
    while matches!(args.last(), Some(Arg::Missing)) {
        args.pop();
    }
    let outputs: &[bool] = if op == "LSTM" { &[true, true, true] } else { &[true, true] };
    case(op, args)
        .int("hidden_size", HIDDEN as i64)
        .string("direction", direction)
        .outputs(outputs)
        .single()
        .opsets(&[14, 22])
}

fn activations(case: Case, names: &[&str]) -> Case {
    use bone_onnx::onnx::proto::attribute_proto::AttributeType;
    case.attr(AttributeProto {
        name: Some("activations".into()),
        r#type: Some(AttributeType::Strings as i32),
        strings: names.iter().map(|n| n.as_bytes().to_vec()).collect(),
        ..Default::default()
    })
}

pub fn cases() -> Vec<Case> {
    let all = With { bias: true, initial: true, peepholes: true, lengths: None };
    let ragged = With { lengths: Some([4, 1, 3]), ..all };
    let mut cases = Vec::new();
    for op in ["RNN", "GRU", "LSTM"] {
        for direction in ["forward", "reverse", "bidirectional"] {
            cases.push(recurrent(op, direction, 4, With::default()).what("bare"));
            cases.push(recurrent(op, direction, 4, all).what("all inputs"));
            cases.push(recurrent(op, direction, 4, ragged).what("ragged"));
        }
        cases.push(recurrent(op, "bidirectional", 1, all).what("one step"));
        cases.push(recurrent(op, "forward", 3, all).outputs(&[false, true]).what("last state alone"));
        cases.push(recurrent(op, "reverse", 3, all).outputs(&[true]).what("all states alone"));
    }
    for (direction, with) in [("forward", all), ("bidirectional", ragged)] {
        cases.push(recurrent("GRU", direction, 4, with).int("linear_before_reset", 1).what("linear before reset"));
    }
    cases.push(recurrent("GRU", "reverse", 4, With::default()).int("linear_before_reset", 1).what("linear, bare"));
    let no_peepholes = With { peepholes: false, ..all };
    cases.push(recurrent("LSTM", "forward", 4, no_peepholes).int("input_forget", 1).what("coupled"));
    cases.push(recurrent("LSTM", "reverse", 4, all).int("input_forget", 1).what("coupled, peepholes"));
    cases.push(recurrent("LSTM", "forward", 4, no_peepholes).outputs(&[false, false, true]).what("cell state alone"));
    cases.push(activations(recurrent("RNN", "bidirectional", 3, all), &["Sigmoid", "Relu"]).what("activations"));
    cases.push(activations(recurrent("GRU", "forward", 3, all), &["sigmoid", "Sigmoid"]).what("activations"));
    cases.push(activations(recurrent("LSTM", "forward", 3, all), &["Tanh", "Sigmoid", "Tanh"]).what("activations"));
    cases
}
