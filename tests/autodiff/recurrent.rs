//! RNN, GRU and LSTM: every direction, optional input and output, sequences of unequal length, one step.

use std::collections::BTreeMap;

use bone_onnx::autodiff::{Gradient, Request, Seed, gradient};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, Tensor, constant_i64, node, value_info,
};

use super::cases::between;
use super::harness::{Arg, Case, Random, Tolerance, case, compare, load};

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

/// The model with its recurrent node of layout 1, which ONNX Runtime does not run, as one of layout 0 between
/// transpositions.
fn steps_first(model: &ModelProto) -> ModelProto {
    let mut model = model.clone();
    let graph = model.graph.as_mut().unwrap();
    for mut inner in std::mem::take(&mut graph.node) {
        if inner.attr_i("layout", 0) == 0 {
            graph.node.push(inner);
            continue;
        }
        inner.attribute.retain(|a| a.name() != "layout");
        let transpose = |from: &str, to: &str, perm: &[i64]| NodeProto {
            attribute: vec![AttributeProto::ints("perm", perm)],
            ..node("Transpose", &[from], &[to])
        };
        for i in [0, 5, 6] {
            if let Some(name) = inner.input_at(i).map(String::from) {
                graph.node.push(transpose(&name, &format!("{name}.steps"), &[1, 0, 2]));
                inner.input[i] = format!("{name}.steps");
            }
        }
        let names = inner.output.clone();
        for output in inner.output.iter_mut().filter(|o| !o.is_empty()) {
            *output = format!("{output}.steps");
        }
        graph.node.push(inner);
        for (i, name) in names.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
            let perm: &[i64] = if i == 0 { &[2, 0, 1, 3] } else { &[1, 0, 2] };
            graph.node.push(transpose(&format!("{name}.steps"), name, perm));
        }
    }
    model
}

/// Layout 1 ([batch, steps, inputs]): the gradient is that of layout 0 between transpositions.
#[test]
fn batches_may_come_first() {
    let with = With { bias: true, initial: true, peepholes: true, lengths: Some([4, 1, 3]) };
    for op in ["RNN", "GRU", "LSTM"] {
        let mut case = recurrent(op, "bidirectional", 4, with).int("layout", 1);
        for i in [0, 5, 6] {
            if let Some(Arg::By(dims, _)) = case.args.get_mut(i) {
                dims.swap(0, 1);
            }
        }
        let (model, wrt, mut feeds) = (case.model(true, 17), case.wrt(), case.feeds());
        let mut of = Vec::new();
        for (k, dims) in [vec![BATCH, 4, 2, HIDDEN], vec![BATCH, 2, HIDDEN], vec![BATCH, 2, HIDDEN]].iter().enumerate()
        {
            if k < case.outputs.len() {
                of.push((format!("y{k}"), Seed::Input));
                let values = Random(k as u64).values(dims.iter().product(), -1.0, 1.0);
                feeds.insert(format!("y{k}.seed"), Tensor::new(dims, values.iter().map(|v| *v as f32).collect()));
            }
        }
        let request = Request { of, wrt, ..Default::default() };
        let lent: Vec<(&str, &Tensor)> = feeds.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let run = |gradient: Gradient| {
            let names: Vec<&str> = gradient.gradients.iter().map(String::as_str).collect();
            load(&steps_first(&gradient.model), true).unwrap().run(&lent, &names).unwrap()
        };
        let ours = run(gradient(&model, &request).unwrap());
        let expected = run(gradient(&steps_first(&model), &request).unwrap());
        for ((a, b), name) in ours.iter().zip(&expected).zip(&request.wrt) {
            assert_eq!(a.dims(), b.dims(), "{op} {name}");
            let far = a.to_f64().iter().zip(b.to_f64()).any(|(a, b)| (a - b).abs() > 1e-5);
            assert!(!far && a.to_f64().iter().any(|v| *v != 0.0), "{op} {name}: {a:?} {b:?}");
        }
    }
}

/// A tagger: embeddings, a GRU in both directions over sequences of unequal length, an LSTM, a head.
#[test]
fn a_tagger_agrees_with_differences() {
    let (steps, batch, hidden, tags) = (5, 2, 3, 4);
    let mut graph = GraphProto { name: Some("tagger".into()), ..Default::default() };
    let mut feeds: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut wrt = Vec::new();
    let weights: [(&str, &[usize]); 9] = [
        ("embeddings", &[7, hidden]),
        ("gru.W", &[2, 3 * hidden, hidden]),
        ("gru.R", &[2, 3 * hidden, hidden]),
        ("gru.B", &[2, 6 * hidden]),
        ("lstm.W", &[1, 4 * hidden, 2 * hidden]),
        ("lstm.R", &[1, 4 * hidden, hidden]),
        ("lstm.B", &[1, 8 * hidden]),
        ("head", &[hidden, tags]),
        ("head.bias", &[tags]),
    ];
    for (seed, (name, dims)) in weights.iter().enumerate() {
        let values = Random(seed as u64).values(dims.iter().product(), -0.8, 0.8);
        feeds.insert(name.to_string(), Tensor::new(dims, values.iter().map(|v| *v as f32).collect()));
        let text: Vec<String> = dims.iter().map(usize::to_string).collect();
        graph.input.push(value_info(name, DataType::Float, &text.iter().map(String::as_str).collect::<Vec<_>>()));
        wrt.push(name.to_string());
    }
    graph.input.push(value_info("ids", DataType::Int64, &["steps", "batch"]));
    graph.input.push(value_info("lengths", DataType::Int32, &["batch"]));
    let mut random = Random(40);
    let ids = (0..steps * batch).map(|_| (random.bits() % 7) as i64).collect();
    feeds.insert("ids".into(), Tensor::new(&[steps, batch], ids));
    feeds.insert("lengths".into(), Tensor::new(&[batch], vec![5i32, 2]));
    constant_i64(&mut graph, "merged", &[0, 0, -1]);
    constant_i64(&mut graph, "one", &[1]);
    let size = || AttributeProto::int("hidden_size", hidden as i64);
    graph.node = vec![
        node("Gather", &["embeddings", "ids"], &["x"]),
        NodeProto {
            attribute: vec![
                size(),
                AttributeProto::string("direction", "bidirectional"),
                AttributeProto::int("linear_before_reset", 1),
            ],
            ..node("GRU", &["x", "gru.W", "gru.R", "gru.B", "lengths"], &["both"])
        },
        NodeProto {
            attribute: vec![AttributeProto::ints("perm", &[0, 2, 1, 3])],
            ..node("Transpose", &["both"], &["last"])
        },
        node("Reshape", &["last", "merged"], &["joined"]),
        NodeProto { attribute: vec![size()], ..node("LSTM", &["joined", "lstm.W", "lstm.R", "lstm.B"], &["states"]) },
        node("Squeeze", &["states", "one"], &["h"]),
        node("MatMul", &["h", "head"], &["scores"]),
        node("Add", &["scores", "head.bias"], &["biased"]),
        node("LogSoftmax", &["biased"], &["tags"]),
    ];
    graph.output.push(value_info("tags", DataType::Float, &["steps", "batch", "4"]));
    let opset_import = vec![OperatorSetIdProto { version: Some(17), ..Default::default() }];
    let model = ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..Default::default() };
    for optimize in [false, true] {
        compare(&model, &["tags".into()], &wrt, &feeds, optimize, Tolerance::SINGLE).unwrap();
    }
}

/// What the rules cannot do is an error that says so.
#[test]
fn clip_and_other_activations_are_refused() {
    let refused = |case: Case, why: &str| {
        let of = vec![("y0".to_string(), Seed::Input)];
        let request = Request { of, wrt: case.wrt(), ..Default::default() };
        let error = gradient(&case.model(false, 17), &request).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(recurrent("LSTM", "forward", 2, With::default()).float("clip", 1.0), "it clips its gates");
    let softsign = activations(recurrent("RNN", "forward", 2, With::default()), &["Softsign"]);
    refused(softsign, "activation Softsign is not supported");
}
