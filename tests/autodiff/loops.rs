//! Scan and Loop against differences: axes and directions, captured weights, states that only a loop makes active,
//! trip counts and conditions at run time, no step at all, loops in loops.

use std::collections::BTreeMap;

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::proto::{OperatorSetIdProto, TypeProto, type_proto};
use bone_onnx::onnx::{
    AttributeProto, DataType, GraphProto, ModelProto, NodeProto, Tensor, ValueInfoProto, node, value_info,
};

use super::harness::{Random, Tolerance, compare};

/// A value of unknown shape.
fn any(name: &str, element: DataType) -> ValueInfoProto {
    let mut info = value_info(name, element, &[]);
    if let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        tensor.shape = None;
    }
    info
}

fn double(name: &str) -> ValueInfoProto {
    any(name, DataType::Double)
}

fn with(mut node: NodeProto, attributes: Vec<AttributeProto>) -> NodeProto {
    node.attribute.extend(attributes);
    node
}

fn values(dims: &[usize], seed: u64) -> Tensor {
    let n = dims.iter().product();
    Tensor::new(dims, Random(seed).values(n, -1.0, 1.0))
}

fn flag(value: bool) -> Tensor {
    Tensor::Bool(ndarray::ArrayD::from_elem(ndarray::IxDyn(&[]), value))
}

/// Gradients of all outputs by all float inputs, with the inputs' sizes declared and not.
fn check(nodes: Vec<NodeProto>, feeds: &[(&str, Tensor)], outputs: &[&str]) {
    check_by(nodes, feeds, outputs, &[]);
}

fn model(nodes: Vec<NodeProto>, feeds: &[(&str, Tensor)], outputs: &[&str], sized: bool) -> ModelProto {
    let declare = |(name, tensor): &(&str, Tensor)| {
        let dims: Vec<String> =
            tensor.dims().iter().map(|d| if sized { d.to_string() } else { String::new() }).collect();
        value_info(name, tensor.data_type(), &dims.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let graph = GraphProto {
        name: Some("loops".into()),
        input: feeds.iter().map(declare).collect(),
        output: outputs.iter().map(|name| double(name)).collect(),
        node: nodes,
        ..Default::default()
    };
    let opset_import = vec![OperatorSetIdProto { version: Some(17), domain: Some(String::new()) }];
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..Default::default() }
}

fn check_by(nodes: Vec<NodeProto>, feeds: &[(&str, Tensor)], outputs: &[&str], frozen: &[&str]) {
    let floats = feeds.iter().filter(|(n, t)| t.data_type() == DataType::Double && !frozen.contains(n));
    let wrt: Vec<String> = floats.map(|(name, _)| name.to_string()).collect();
    let of: Vec<String> = outputs.iter().map(|o| o.to_string()).collect();
    let fed: BTreeMap<String, Tensor> = feeds.iter().map(|(n, t)| (n.to_string(), t.clone())).collect();
    for sized in [false, true] {
        for optimize in [false, true] {
            let model = model(nodes.clone(), feeds, outputs, sized);
            if let Err(e) = compare(&model, &of, &wrt, &fed, optimize, Tolerance::DOUBLE) {
                panic!("sized {sized}, optimize {optimize}: {e}");
            }
        }
    }
}

/// h' = tanh(x + h·W), twice out: as the state and as an output of the step.
fn cell() -> GraphProto {
    GraphProto {
        name: Some("cell".into()),
        input: vec![double("h"), double("x")],
        output: vec![double("h_next"), double("y")],
        node: vec![
            node("MatMul", &["h", "W"], &["hW"]),
            node("Add", &["hW", "x"], &["z"]),
            node("Tanh", &["z"], &["h_next"]),
            node("Mul", &["h_next", "x"], &["y"]),
        ],
        ..Default::default()
    }
}

fn scan(body: GraphProto, inputs: &[&str], outputs: &[&str], more: Vec<AttributeProto>) -> NodeProto {
    let count = AttributeProto::int("num_scan_inputs", 1);
    with(node("Scan", inputs, outputs), [vec![AttributeProto::graph("body", body), count], more].concat())
}

#[test]
fn scan_with_a_captured_weight() {
    let feeds = [("h0", values(&[2, 3], 1)), ("xs", values(&[4, 2, 3], 2)), ("W", values(&[3, 3], 3))];
    let plain = || vec![scan(cell(), &["h0", "xs"], &["hT", "ys"], vec![])];
    check(plain(), &feeds, &["hT", "ys"]);
    check(plain(), &feeds, &["ys"]);
    check(plain(), &feeds, &["hT"]);
    // The weight alone: the state is active by the loop only.
    check_by(plain(), &feeds, &["ys"], &["h0", "xs"]);
    check_by(plain(), &feeds, &["ys"], &["W", "h0"]);
}

#[test]
fn scan_axes_and_directions() {
    let feeds = [("h0", values(&[2, 3], 1)), ("xs", values(&[2, 4, 3], 2)), ("W", values(&[3, 3], 3))];
    for (read, write) in [(0, 1), (1, 0), (1, 1)] {
        let attributes = vec![
            AttributeProto::ints("scan_input_axes", &[1]),
            AttributeProto::ints("scan_input_directions", &[read]),
            AttributeProto::ints("scan_output_axes", &[-1]),
            AttributeProto::ints("scan_output_directions", &[write]),
        ];
        check(vec![scan(cell(), &["h0", "xs"], &["hT", "ys"], attributes)], &feeds, &["hT", "ys"]);
    }
}

/// The initial state is captured too.
#[test]
fn scan_with_values_used_twice() {
    let body = GraphProto {
        name: Some("twice".into()),
        input: vec![double("s"), double("x")],
        output: vec![double("s_next"), double("s_again"), double("same")],
        node: vec![
            node("Identity", &["x"], &["same"]),
            node("Mul", &["s", "s0"], &["a"]),
            node("Add", &["a", "x"], &["b"]),
            node("Sin", &["b"], &["s_next"]),
            node("Identity", &["s_next"], &["s_again"]),
        ],
        ..Default::default()
    };
    let feeds = [("s0", values(&[3], 1)), ("xs", values(&[4, 3], 2))];
    check(vec![scan(body, &["s0", "xs"], &["sT", "ss", "same"], vec![])], &feeds, &["sT", "ss", "same"]);
}

/// v' = sin(v·W) + v until the sum of squares passes a limit or the turns are over; gives 2·v as well.
fn turn() -> GraphProto {
    GraphProto {
        name: Some("turn".into()),
        input: vec![value_info("i", DataType::Int64, &[]), value_info("go", DataType::Bool, &[]), double("v")],
        output: vec![any("go_on", DataType::Bool), double("v_next"), double("twice")],
        node: vec![
            node("MatMul", &["v", "W"], &["vW"]),
            node("Sin", &["vW"], &["sine"]),
            with(node("Cast", &["i"], &["turn_number"]), vec![AttributeProto::int("to", DataType::Double as i64)]),
            node("Mul", &["sine", "turn_number"], &["weighted"]),
            node("Add", &["weighted", "v"], &["v_next"]),
            node("Add", &["v", "v_next"], &["twice"]),
            node("ReduceSumSquare", &["v_next"], &["size"]),
            node("Squeeze", &["size"], &["size_scalar"]),
            node("Less", &["size_scalar", "limit"], &["go_on"]),
        ],
        ..Default::default()
    }
}

fn looped(body: GraphProto, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    with(node("Loop", inputs, outputs), vec![AttributeProto::graph("body", body)])
}

#[test]
fn loops_by_count_and_by_condition() {
    for (count, limit) in [(4, 1e9), (100, 6.0), (1, 1e9)] {
        let feeds = [
            ("m", Tensor::scalar(count as i64)),
            ("c", flag(true)),
            ("v0", values(&[2, 3], 4)),
            ("W", values(&[3, 3], 5)),
            ("limit", Tensor::new(&[], vec![limit])),
        ];
        check_by(vec![looped(turn(), &["m", "c", "v0"], &["vT", "vs"])], &feeds, &["vT", "vs"], &["limit"]);
        check_by(vec![looped(turn(), &["m", "", "v0"], &["vT", "vs"])], &feeds, &["vT"], &["limit"]);
        check_by(vec![looped(turn(), &["m", "c", "v0"], &["vT", "vs"])], &feeds, &["vs"], &["limit", "v0"]);
    }
}

#[test]
fn loops_of_no_turn() {
    for (count, go) in [(0, true), (3, false)] {
        let feeds = [
            ("m", Tensor::scalar(count as i64)),
            ("c", flag(go)),
            ("v0", values(&[2, 3], 4)),
            ("W", values(&[3, 3], 5)),
            ("limit", Tensor::new(&[], vec![9.0])),
        ];
        check_by(vec![looped(turn(), &["m", "c", "v0"], &["vT", "vs"])], &feeds, &["vT"], &["limit"]);
    }
}

/// A state that nothing reads but the sum, whose steps alone are kept by their number.
#[test]
fn loop_that_only_adds() {
    let body = GraphProto {
        name: Some("adds".into()),
        input: vec![value_info("i", DataType::Int64, &[]), value_info("go", DataType::Bool, &[]), double("v")],
        output: vec![any("go_on", DataType::Bool), double("v_next")],
        node: vec![node("Identity", &["go"], &["go_on"]), node("Add", &["v", "w"], &["v_next"])],
        ..Default::default()
    };
    let feeds = [("m", Tensor::scalar(5i64)), ("c", flag(true)), ("v0", values(&[3], 4)), ("w", values(&[3], 5))];
    check(vec![looped(body, &["m", "c", "v0"], &["vT"])], &feeds, &["vT"]);
}

/// A Scan inside a Loop, an If inside a Scan.
#[test]
fn loops_in_loops() {
    let inner = scan(cell(), &["v", "xs"], &["v_next", "ys"], vec![]);
    let body = GraphProto {
        name: Some("outer".into()),
        input: vec![
            value_info("i", DataType::Int64, &[]),
            value_info("go", DataType::Bool, &[]),
            value_info("v", DataType::Double, &["", ""]),
        ],
        output: vec![any("go_on", DataType::Bool), double("v_next"), double("ys")],
        node: vec![node("Identity", &["go"], &["go_on"]), inner],
        ..Default::default()
    };
    let feeds = [
        ("m", Tensor::scalar(3i64)),
        ("c", flag(true)),
        ("v0", values(&[2, 3], 4)),
        ("W", values(&[3, 3], 5)),
        ("xs", values(&[2, 2, 3], 6)),
    ];
    check(vec![looped(body, &["m", "c", "v0"], &["vT", "yss"])], &feeds, &["vT", "yss"]);

    let branch = |op: &str, output: &str| GraphProto {
        name: Some(output.into()),
        output: vec![double(output)],
        node: vec![node(op, &["x", "w"], &[output])],
        ..Default::default()
    };
    let choice = with(
        node("If", &["positive"], &["s_next"]),
        vec![
            AttributeProto::graph("then_branch", branch("Mul", "product")),
            AttributeProto::graph("else_branch", branch("Add", "total")),
        ],
    );
    let body = GraphProto {
        name: Some("chosen".into()),
        input: vec![double("s"), double("x")],
        output: vec![double("s_out"), double("s_next")],
        node: vec![
            node("ReduceSum", &["x"], &["sum"]),
            node("Squeeze", &["sum"], &["sum_scalar"]),
            node("Sub", &["sum_scalar", "sum_scalar"], &["zero"]),
            node("Greater", &["sum_scalar", "zero"], &["positive"]),
            choice,
            node("Mul", &["s", "s_next"], &["s_out"]),
        ],
        ..Default::default()
    };
    let feeds = [("s0", values(&[3], 1)), ("xs", values(&[5, 3], 8)), ("w", values(&[3], 3))];
    check(vec![scan(body, &["s0", "xs"], &["sT", "ss"], vec![])], &feeds, &["sT", "ss"]);
}

/// A sequence that a Loop carries on the way is refused by name.
#[test]
fn sequences_are_refused() {
    let tensor = type_proto::Value::TensorType(type_proto::Tensor { elem_type: Some(11), shape: None });
    let list =
        type_proto::Sequence { elem_type: Some(Box::new(TypeProto { value: Some(tensor), ..Default::default() })) };
    let sequence = |name: &str| ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::SequenceType(Box::new(list.clone()))),
            ..Default::default()
        }),
        ..Default::default()
    };
    let body = GraphProto {
        name: Some("append".into()),
        input: vec![value_info("i", DataType::Int64, &[]), value_info("go", DataType::Bool, &[]), sequence("list")],
        output: vec![any("go_on", DataType::Bool), sequence("longer")],
        node: vec![node("Identity", &["go"], &["go_on"]), node("SequenceInsert", &["list", "w"], &["longer"])],
        ..Default::default()
    };
    let nodes = vec![
        node("SequenceConstruct", &["w"], &["start"]),
        looped(body, &["m", "c", "start"], &["all"]),
        with(node("ConcatFromSequence", &["all"], &["y"]), vec![AttributeProto::int("axis", 0)]),
    ];
    let feeds = [("m", Tensor::scalar(2i64)), ("c", flag(true)), ("w", values(&[3], 5))];
    let of = vec![("y".to_string(), Seed::Input)];
    let request = Request { of, wrt: vec!["w".into()], ..Default::default() };
    let error = gradient(&model(nodes, &feeds, &["y"], true), &request).unwrap_err().to_string();
    assert!(error.contains("SequenceInsert"), "{error}");
}

/// Scan as operator set 8 had it: a batch of them, here each from the end.
#[test]
fn batched_scan_of_set_8() {
    let body = GraphProto {
        name: Some("body".into()),
        input: vec![double("h"), double("u")],
        output: vec![double("h2"), double("z")],
        node: vec![node("Add", &["h", "u"], &["a"]), node("Tanh", &["a"], &["h2"]), node("Mul", &["h2", "u"], &["z"])],
        ..Default::default()
    };
    let attributes = vec![
        AttributeProto::graph("body", body),
        AttributeProto::int("num_scan_inputs", 1),
        AttributeProto::ints("directions", &[1]),
    ];
    let feeds = [("h0", values(&[2, 3], 1)), ("x", values(&[2, 4, 3], 2))];
    for sized in [true, false] {
        let scan = with(node("Scan", &["", "h0", "x"], &["last", "all"]), attributes.clone());
        let mut old = model(vec![scan], &feeds, &["last", "all"], sized);
        old.opset_import[0].version = Some(8);
        // In double precision ONNX Runtime has none of the body's operators of set 8.
        let feeds: BTreeMap<String, Tensor> = feeds.iter().map(|(n, t)| (n.to_string(), t.clone())).collect();
        let (of, wrt) = (vec!["last".to_string(), "all".to_string()], vec!["h0".to_string(), "x".to_string()]);
        compare(&old, &of, &wrt, &feeds, true, Tolerance::DOUBLE).unwrap();
    }
}
