//! GELU as exporters write it, in each order of its factors: seen as one function, and right.

use std::collections::BTreeMap;

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{DataType, GraphProto, ModelProto, NodeProto, Tensor, node, value_info};

use super::harness::{Random, Tolerance, compare};

fn model(tail: Vec<NodeProto>, outputs: &[&str]) -> ModelProto {
    let mut graph = GraphProto { name: Some("gelu".into()), ..Default::default() };
    graph.input.push(value_info("x", DataType::Float, &["n", "5"]));
    graph.output.extend(outputs.iter().map(|y| value_info(y, DataType::Float, &["n", "5"])));
    for (name, value) in [("root", 2f32.sqrt()), ("one", 1.0), ("half", 0.5), ("near", 1.4)] {
        graph.initializer.push(Tensor::scalar(value).to_proto(name));
    }
    graph.node = tail;
    let opset = OperatorSetIdProto { version: Some(17), ..Default::default() };
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import: vec![opset], ..Default::default() }
}

fn check(model: &ModelProto, outputs: &[&str]) -> usize {
    let x = Tensor::new(&[3, 5], Random(2).values(15, -2.5, 2.5).iter().map(|v| *v as f32).collect());
    let of: Vec<String> = outputs.iter().map(|y| y.to_string()).collect();
    for optimize in [false, true] {
        let feeds = BTreeMap::from([("x".to_string(), x.clone())]);
        compare(model, &of, &["x".into()], &feeds, optimize, Tolerance::SINGLE).unwrap();
    }
    let request =
        Request { of: of.into_iter().map(|y| (y, Seed::Input)).collect(), wrt: vec!["x".into()], ..Default::default() };
    let forward = model.graph.as_ref().unwrap().node.len();
    gradient(model, &request).unwrap().model.graph.unwrap().node.len() - forward
}

fn erf(scale: &str) -> Vec<NodeProto> {
    vec![node("Div", &["x", scale], &["u"]), node("Erf", &["u"], &["e"]), node("Add", &["e", "one"], &["a"])]
}

#[test]
fn every_order_is_one_function() {
    let mut sizes = Vec::new();
    for tail in [
        vec![node("Mul", &["x", "a"], &["m"]), node("Mul", &["m", "half"], &["y"])],
        vec![node("Mul", &["half", "a"], &["m"]), node("Mul", &["x", "m"], &["y"])],
        vec![node("Mul", &["x", "half"], &["m"]), node("Mul", &["m", "a"], &["y"])],
    ] {
        sizes.push(check(&model([erf("root"), tail].concat(), &["y"]), &["y"]));
    }
    assert!(sizes.iter().all(|n| *n == sizes[0]) && sizes[0] <= 11, "{sizes:?}");
}

/// A near miss, and a value inside that is also an output: node by node, and right.
#[test]
fn what_only_looks_like_it_is_left_alone() {
    let tail = || vec![node("Mul", &["x", "a"], &["m"]), node("Mul", &["m", "half"], &["y"])];
    check(&model([erf("near"), tail()].concat(), &["y"]), &["y"]);
    check(&model([erf("root"), tail()].concat(), &["y", "e"]), &["y", "e"]);
    check(&model([erf("root"), tail()].concat(), &["y", "m"]), &["y", "m"]);
}
