//! What a `Where` leaves out pulls on nothing, even where the operator it came from is undefined or infinitely steep; and
//! the windows of attention, which the engine does not run, against masks, which it does.

use std::collections::BTreeMap;

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, NodeProto, Tensor, node, value_info};

use super::harness::{Random, Tolerance, compare, load};

/// y of x and of the mask m, in double precision.
fn model(nodes: Vec<NodeProto>, dims: &[&str]) -> ModelProto {
    let mut graph = GraphProto { name: Some("left out".into()), node: nodes, ..Default::default() };
    graph.input.push(value_info("x", DataType::Double, dims));
    graph.input.push(value_info("m", DataType::Bool, dims));
    graph.output.push(value_info("y", DataType::Double, dims));
    let numbers = [("zero", 0.0), ("one", 1.0), ("two", 2.0), ("half", 0.5), ("low", f64::NEG_INFINITY)];
    graph.initializer.extend(numbers.map(|(name, value)| Tensor::scalar(value).to_proto(name)));
    let opset = OperatorSetIdProto { version: Some(17), ..Default::default() };
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset], ..Default::default() }
}

fn check(nodes: Vec<NodeProto>, x: Tensor, seen: &[bool]) {
    let seen = Tensor::Bool(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(x.dims()), seen.to_vec()).unwrap());
    let sizes: Vec<String> = x.dims().iter().map(usize::to_string).collect();
    let known: Vec<&str> = sizes.iter().map(String::as_str).collect();
    for dims in [known, vec!["n"; x.dims().len()]] {
        // Square inputs alone would do for one symbol.
        let dims: Vec<&str> = dims.iter().enumerate().map(|(i, d)| if *d == "n" { ["a", "b"][i] } else { d }).collect();
        let model = model(nodes.clone(), &dims);
        let feeds = BTreeMap::from([("x".to_string(), x.clone()), ("m".to_string(), seen.clone())]);
        for optimize in [false, true] {
            let tolerance = Tolerance { step: 1e-5, relative: 1e-7 };
            if let Err(e) = compare(&model, &["y".into()], &["x".into()], &feeds, optimize, tolerance) {
                panic!("{}: {e}", nodes.iter().map(|n| n.op_type()).collect::<Vec<_>>().join(", "));
            }
        }
    }
}

/// A row of attention without a key is a softmax over nothing, which exporters clear afterwards.
#[test]
fn a_softmax_over_nothing() {
    let x = Tensor::new(&[3, 4], Random(3).values(12, -1.0, 1.0));
    let seen = [true, false, true, true, false, false, false, false, true, true, true, true];
    let scores = node("Where", &["m", "x", "low"], &["s"]);
    for op in ["Softmax", "LogSoftmax"] {
        let isnan = [node(op, &["s"], &["p"]), node("IsNaN", &["p"], &["n"])];
        let finite = [node("Exp", &["p"], &["e"]), node("Where", &["n", "zero", "e"], &["y"])];
        check([vec![scores.clone()], isnan.to_vec(), finite.to_vec()].concat(), x.clone(), &seen);
    }
    let cast = |x: &str, y: &str, to: DataType| NodeProto {
        attribute: vec![AttributeProto::int("to", to as i64)],
        ..node("Cast", &[x], &[y])
    };
    // The flag of the row, from the mask, and a cast between.
    let flag = NodeProto {
        attribute: vec![AttributeProto::ints("axes", &[-1]), AttributeProto::int("keepdims", 1)],
        ..node("ReduceMax", &["f"], &["best"])
    };
    let rows = vec![
        cast("m", "f", DataType::Float),
        flag,
        cast("best", "some", DataType::Bool),
        scores,
        node("Softmax", &["s"], &["p"]),
        cast("p", "q", DataType::Double),
        node("Where", &["some", "q", "zero"], &["y"]),
    ];
    check(rows, x, &seen);
}

/// Infinitely steep operators where they are left out, alone and behind others.
#[test]
fn steep_operators() {
    let seen = [true, false, true, false];
    let at = |hidden: f64| Tensor::new(&[2, 2], vec![0.7, hidden, 1.3, hidden]);
    let chosen = |nodes: &[NodeProto]| [nodes, &[node("Where", &["m", "u", "half"], &["y"])]].concat();
    for op in ["Log", "Sqrt", "Reciprocal"] {
        check(chosen(&[node(op, &["x"], &["u"])]), at(0.0), &seen);
    }
    check(chosen(&[node("Exp", &["x"], &["u"])]), at(800.0), &seen);
    check(chosen(&[node("Pow", &["x", "half"], &["u"])]), at(0.0), &seen);
    check(chosen(&[node("Div", &["two", "x"], &["u"])]), at(0.0), &seen);
    let entropy = [node("Log", &["x"], &["l"]), node("Mul", &["x", "l"], &["u"])];
    check(chosen(&entropy), at(0.0), &seen);
    let normal = [node("Mul", &["x", "x"], &["q"]), node("Div", &["x", "q"], &["u"])];
    check(chosen(&normal), at(0.0), &seen);
}

fn attention(attributes: Vec<AttributeProto>, opset: i64, mask: Option<&Tensor>) -> ModelProto {
    let mut graph = GraphProto { name: Some("attention".into()), ..Default::default() };
    let mut inputs = vec!["q", "k", "v"];
    for (name, length) in [("q", "4"), ("k", "6"), ("v", "6")] {
        graph.input.push(value_info(name, DataType::Float, &["1", "2", length, "3"]));
    }
    if let Some(mask) = mask {
        graph.initializer.push(mask.to_proto("mask"));
        inputs.push("mask");
    }
    graph.output.push(value_info("y", DataType::Float, &["1", "2", "4", "3"]));
    graph.node.push(NodeProto { attribute: attributes, ..node("Attention", &inputs, &["y"]) });
    let opset = OperatorSetIdProto { version: Some(opset), ..Default::default() };
    ModelProto { ir_version: Some(10), graph: Some(graph), opset_import: vec![opset], ..Default::default() }
}

/// Gradients by Q, K and V, without the forward pass.
fn gradients(model: &ModelProto) -> Vec<Tensor> {
    let wrt = ["q", "k", "v"].map(String::from);
    let request = Request { of: vec![("y".into(), Seed::Input)], wrt: wrt.to_vec(), ..Default::default() };
    let derived = gradient(model, &request).unwrap();
    let mut model = derived.model;
    let graph = model.graph.as_mut().unwrap();
    graph.node.retain(|n| !n.is("Attention"));
    graph.output.retain(|o| o.name() != "y");
    model.opset_import[0].version = Some(23);
    let mut random = Random(17);
    let mut value = |length: usize| {
        let numbers = random.values(6 * length, -1.0, 1.0).iter().map(|x| *x as f32).collect();
        Tensor::new(&[1, 2, length, 3], numbers)
    };
    let feeds = [("q", value(4)), ("k", value(6)), ("v", value(6)), ("y.seed", value(4))];
    let lent: Vec<(&str, &Tensor)> = feeds.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let names: Vec<&str> = derived.gradients.iter().map(String::as_str).collect();
    load(&model, false).unwrap().run(&lent, &names).unwrap()
}

/// Windows to both sides (operator set 25): as with the mask that says the same, also where a query is left no key.
#[test]
fn windows_are_masks() {
    let int = AttributeProto::int;
    for (left, right, causal) in [(2, -1, 1), (1, 2, 0), (0, 1, 0), (-1, 0, 0), (1, -1, 1)] {
        let attributes = vec![int("left_window_size", left), int("right_window_size", right), int("is_causal", causal)];
        let seen = (0..24).map(|i| {
            let (row, column) = (i / 6, i % 6);
            (left < 0 || row - left <= column) && (right < 0 || column <= row + right) && (causal == 0 || column <= row)
        });
        let mask = Tensor::Bool(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(&[4, 6]), seen.collect()).unwrap());
        let windowed = gradients(&attention(attributes, 25, None));
        let masked = gradients(&attention(vec![], 23, Some(&mask)));
        for (a, b) in windowed.iter().zip(&masked) {
            assert!(a.to_f64().iter().any(|g| g.abs() > 1e-3));
            let worst = a.to_f64().iter().zip(b.to_f64()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-6, "left {left}, right {right}, causal {causal}: {worst}");
        }
    }
}
