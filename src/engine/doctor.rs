//! What engines this machine has, and whether they compute.

use crate::onnx::{DataType, GraphProto, ModelProto, node, proto::OperatorSetIdProto, value_info};

/// `Softmax(x · w)` for `x` of `[n, 3]` and `w` of `[3, 2]`.
pub(super) fn tiny_model() -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            name: Some("tiny".into()),
            node: vec![node("MatMul", &["x", "w"], &["z"]), node("Softmax", &["z"], &["y"])],
            input: vec![value_info("x", DataType::Float, &["n", "3"]), value_info("w", DataType::Float, &["3", "2"])],
            output: vec![value_info("y", DataType::Float, &["n", "2"])],
            ..Default::default()
        }),
        ..Default::default()
    }
}
