//! Sequences and optionals of fixed structure: tensors split, picked, reordered and joined again.

use std::collections::BTreeMap;

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::proto::{OperatorSetIdProto, type_proto::Value};
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, NodeProto, Tensor, node, value_info};

use super::harness::{Random, Tolerance, compare};

fn with(op: &str, inputs: &[&str], output: &str, attributes: &[(&str, i64)]) -> NodeProto {
    let attribute = attributes.iter().map(|(name, value)| AttributeProto::int(name, *value)).collect();
    NodeProto { attribute, ..node(op, inputs, &[output]) }
}

/// `x` of [3, 5], `w` of [5, 2] and whole numbers as constants; what the nodes make of them is `y`.
fn model(nodes: Vec<NodeProto>, dynamic: bool) -> ModelProto {
    let size = |n: &'static str| if dynamic { "" } else { n };
    let mut y = value_info("y", DataType::Double, &[]);
    if let Some(Value::TensorType(tensor)) = y.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        tensor.shape = None;
    }
    let graph = GraphProto {
        name: Some("sequences".into()),
        // What is split has to be known, the other axis need not be.
        input: vec![
            value_info("x", DataType::Double, &[size("3"), "5"]),
            value_info("w", DataType::Double, &["5", size("2")]),
        ],
        output: vec![y],
        initializer: vec![
            Tensor::scalar(0i64).to_proto("zero"),
            Tensor::scalar(1i64).to_proto("one"),
            Tensor::scalar(-1i64).to_proto("last"),
            Tensor::scalar(2i64).to_proto("two"),
            Tensor::new(&[3], vec![1i64, 3, 1]).to_proto("sizes"),
        ],
        node: nodes,
        ..Default::default()
    };
    let opset_import = vec![OperatorSetIdProto { version: Some(17), domain: Some(String::new()) }];
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, ..Default::default() }
}

fn check(nodes: Vec<NodeProto>) {
    let values = |dims: &[usize]| Tensor::new(dims, Random(9).values(dims.iter().product(), -1.0, 1.0));
    let feeds: BTreeMap<String, Tensor> =
        [("x".to_string(), values(&[3, 5])), ("w".to_string(), values(&[5, 2]))].into();
    let wrt = vec!["x".to_string(), "w".to_string()];
    for dynamic in [false, true] {
        for optimize in [false, true] {
            let model = model(nodes.clone(), dynamic);
            compare(&model, &["y".into()], &wrt, &feeds, optimize, Tolerance::DOUBLE)
                .unwrap_or_else(|e| panic!("dynamic {dynamic}, optimize {optimize}: {e}"));
        }
    }
}

#[test]
fn split_and_joined() {
    // Parts of 1, 3 and 1; the first and the last squared, and joined the other way round.
    check(vec![
        with("SplitToSequence", &["x", "sizes"], "parts", &[("axis", 1)]),
        with("SequenceAt", &["parts", "last"], "c", &[]),
        with("SequenceAt", &["parts", "one"], "b", &[]),
        with("SequenceAt", &["parts", "zero"], "a", &[]),
        with("Mul", &["a", "c"], "ac", &[]),
        with("SequenceConstruct", &["b", "ac", "a"], "turned", &[]),
        with("ConcatFromSequence", &["turned"], "joined", &[("axis", -1)]),
        with("MatMul", &["joined", "w"], "y", &[]),
    ]);
}

#[test]
fn equal_parts_and_single_ones() {
    // Parts of 2, 2 and 1 columns, of which the last is not used.
    check(vec![
        with("SplitToSequence", &["x", "two"], "parts", &[("axis", 1)]),
        with("SequenceErase", &["parts"], "kept", &[]),
        with("ConcatFromSequence", &["kept"], "joined", &[("axis", 1)]),
        with("SplitToSequence", &["w"], "rows", &[("axis", 0), ("keepdims", 0)]),
        with("SequenceErase", &["rows", "one"], "other", &[]),
        with("ConcatFromSequence", &["other"], "stacked", &[("axis", 0), ("new_axis", 1)]),
        with("MatMul", &["joined", "stacked"], "y", &[]),
    ]);
}

#[test]
fn grown_from_nothing() {
    check(vec![
        with("SequenceEmpty", &[], "none", &[("dtype", DataType::Double as i64)]),
        with("MatMul", &["x", "w"], "h", &[]),
        with("SequenceInsert", &["none", "h"], "one_part", &[]),
        with("Tanh", &["h"], "t", &[]),
        with("SequenceInsert", &["one_part", "t", "zero"], "parts", &[]),
        with("Optional", &["parts"], "maybe", &[]),
        with("OptionalGetElement", &["maybe"], "sure", &[]),
        with("ConcatFromSequence", &["sure"], "stacked", &[("axis", -1), ("new_axis", 1)]),
        with("Optional", &["stacked"], "wrapped", &[]),
        with("OptionalGetElement", &["wrapped"], "y", &[]),
    ]);
}

/// Which part is taken, only a run can tell.
#[test]
fn places_at_run_time_are_refused() {
    let nodes = vec![
        with("SplitToSequence", &["x", "two"], "parts", &[("axis", 1)]),
        node("Cast", &["w"], &["whole"]),
        with("ReduceMax", &["whole"], "at", &[("keepdims", 0)]),
        with("SequenceAt", &["parts", "at"], "y", &[]),
    ];
    let mut model = model(nodes, false);
    model.graph.as_mut().unwrap().node[1].attribute.push(AttributeProto::int("to", DataType::Int64 as i64));
    let request = Request { of: vec![("y".into(), Seed::Input)], wrt: vec!["x".into()], ..Default::default() };
    let message = gradient(&model, &request).unwrap_err().to_string();
    assert!(message.contains("SequenceAt") && message.contains("only a run can tell"), "{message}");
}
