//! Small makers of schema messages.

use super::proto::{
    GraphProto, TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto::Dimension,
    tensor_shape_proto::dimension::Value as DimValue, type_proto,
};
use super::{DataType, NodeProto, Tensor};

/// A node of the default domain, named after its first output.
pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: Some(op.into()),
        name: outputs.first().map(|o| o.to_string()),
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: outputs.iter().map(|s| s.to_string()).collect(),
        ..Default::default()
    }
}

/// Adds the 1-D int64 initializer `name` to `graph` (for Reshape shapes, axes, pads and the like).
pub fn constant_i64(graph: &mut GraphProto, name: &str, values: &[i64]) {
    graph.initializer.push(Tensor::from(ndarray::Array1::from(values.to_vec()).into_dyn()).to_proto(name));
}

/// A tensor-typed value. A dimension is a number, a name (`"n"`), or `""` for nothing known.
pub fn value_info(name: &str, element: DataType, dims: &[&str]) -> ValueInfoProto {
    let dim = dims
        .iter()
        .map(|d| Dimension {
            value: match d.parse::<i64>() {
                Ok(number) => Some(DimValue::DimValue(number)),
                Err(_) if d.is_empty() => None,
                Err(_) => Some(DimValue::DimParam(d.to_string())),
            },
            ..Default::default()
        })
        .collect();
    let tensor = type_proto::Tensor { elem_type: Some(element as i32), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}
