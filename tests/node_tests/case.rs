//! A case as it stands in the cache, and the same case in another floating-point type.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::onnx::proto::{TypeProto, type_proto::Value};
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, Tensor, TensorProto};
use prost::Message;

pub type Feeds = BTreeMap<String, Tensor>;

#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub model: ModelProto,
    pub feeds: Feeds,
}

pub fn is_float(element: i32) -> bool {
    use DataType::*;
    matches!(DataType::try_from(element), Ok(Float | Double | Float16 | Bfloat16))
}

impl Case {
    /// Reads the case in `dir`; the text says why its inputs cannot be given as tensors.
    pub fn read(dir: &Path) -> Result<Self, Box<(ModelProto, String)>> {
        let name = dir.file_name().expect("a name").to_string_lossy().into_owned();
        let bytes = std::fs::read(dir.join("model.onnx")).expect("a model");
        let model = ModelProto::decode(bytes.as_slice()).expect("a model");
        let mut feeds = Feeds::new();
        for (i, info) in model.graph.iter().flat_map(|g| &g.input).enumerate() {
            if info.tensor().is_none() {
                return Err(Box::new((model.clone(), format!("{} is a sequence or optional", info.name()))));
            }
            let bytes = std::fs::read(dir.join(format!("test_data_set_0/input_{i}.pb"))).expect("an input");
            let tensor = TensorProto::decode(bytes.as_slice()).expect("a tensor");
            match Tensor::from_proto(&tensor) {
                Ok(tensor) => feeds.insert(info.name().into(), tensor),
                Err(e) => return Err(Box::new((model.clone(), e.to_string()))),
            };
        }
        Ok(Self { name, model, feeds })
    }

    /// Graph inputs of a floating-point type.
    pub fn float_inputs(&self) -> Vec<String> {
        self.feeds.iter().filter(|(_, t)| is_float(t.data_type() as i32)).map(|(name, _)| name.clone()).collect()
    }

    /// Graph outputs that are floating-point tensors.
    pub fn float_outputs(&self) -> Vec<String> {
        float_outputs(&self.model)
    }

    /// The case with `to` in place of every other floating-point type; `None` where that changes nothing.
    pub fn in_type(&self, to: DataType) -> Option<Self> {
        let mut case = self.clone();
        retype_graph(case.model.graph.as_mut()?, to);
        for tensor in case.feeds.values_mut().filter(|t| is_float(t.data_type() as i32)) {
            *tensor = with_values(to, tensor.dims(), &tensor.to_f64());
        }
        (case.model != self.model).then_some(case)
    }
}

pub fn float_outputs(model: &ModelProto) -> Vec<String> {
    let outputs = model.graph.iter().flat_map(|g| &g.output);
    outputs.filter(|o| o.tensor().is_some_and(|t| is_float(t.elem_type()))).map(|o| o.name().to_string()).collect()
}

/// A floating-point tensor of type `element`.
pub fn with_values(element: DataType, dims: &[usize], values: &[f64]) -> Tensor {
    match element {
        DataType::Float => Tensor::new(dims, values.iter().map(|v| *v as f32).collect()),
        DataType::Float16 => Tensor::new(dims, values.iter().map(|v| half::f16::from_f64(*v)).collect()),
        DataType::Bfloat16 => Tensor::new(dims, values.iter().map(|v| half::bf16::from_f64(*v)).collect()),
        _ => Tensor::new(dims, values.to_vec()),
    }
}

fn retype_graph(graph: &mut GraphProto, to: DataType) {
    for info in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
        info.r#type.iter_mut().for_each(|t| retype(t, to));
    }
    graph.initializer.iter_mut().for_each(|t| retype_tensor(t, to));
    for node in &mut graph.node {
        let constant = node.is("Constant");
        for attribute in &mut node.attribute {
            match attribute.name() {
                "to" | "dtype" | "output_dtype" if is_float(attribute.i() as i32) => attribute.i = Some(to as i64),
                "value_float" if constant => {
                    let value = with_values(to, &[], &[f64::from(attribute.f())]);
                    *attribute = AttributeProto::tensor("value", value.to_proto(""));
                }
                "value_floats" if constant => {
                    let values: Vec<f64> = attribute.floats.iter().map(|v| f64::from(*v)).collect();
                    *attribute =
                        AttributeProto::tensor("value", with_values(to, &[values.len()], &values).to_proto(""));
                }
                _ => {}
            }
            attribute.t.iter_mut().for_each(|t| retype_tensor(t, to));
            attribute.g.iter_mut().for_each(|g| retype_graph(g, to));
        }
    }
}

fn retype(info: &mut TypeProto, to: DataType) {
    match &mut info.value {
        Some(Value::TensorType(tensor)) if is_float(tensor.elem_type()) => tensor.elem_type = Some(to as i32),
        Some(Value::SequenceType(inner)) => inner.elem_type.iter_mut().for_each(|t| retype(t, to)),
        Some(Value::OptionalType(inner)) => inner.elem_type.iter_mut().for_each(|t| retype(t, to)),
        _ => {}
    }
}

fn retype_tensor(tensor: &mut TensorProto, to: DataType) {
    if is_float(tensor.data_type())
        && let Ok(value) = Tensor::from_proto(tensor)
    {
        *tensor = with_values(to, value.dims(), &value.to_f64()).to_proto(tensor.name());
    }
}
