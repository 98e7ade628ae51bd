//! The gradient graph that a run would compute, with made-up inputs to run it on.

use std::collections::BTreeMap;

use super::data::{Axis, Field};
use super::goal::output_field;
use super::graph::precision::Precision;
use super::graph::{self, Learners, LossModel, Task};
use super::loss::{Loss, Pooling};
use crate::adapter::Injection;
use crate::engine::{Engine, LoadOptions};
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{DataType, Model, ModelProto, Tensor};
use crate::verify::random_inputs;
use crate::{Error, Result};

/// A gradient graph and an input for each of its names.
pub struct Probe {
    pub model: ModelProto,
    pub inputs: Vec<(String, Tensor)>,
}

/// The gradient graph of the injected `model` for a squared error on `output` (`None`: the head's, or the only one), with
/// inputs of `batch` rows of `length`.
///
/// # Errors
/// A model without adapters; one whose inputs cannot be made up; operators without a derivative rule.
pub fn probe(
    model: &Model,
    engine: &dyn Engine,
    options: &LoadOptions,
    output: Option<&str>,
    (batch, length): (usize, usize),
    precision: Precision,
) -> Result<Probe> {
    let injection = Injection::expect(model)?;
    let trained = injection.active.clone();
    let parameters = graph::parameters(model, &injection, &trained, false)?;
    let output = output_field(model, &injection, output)?;
    let inputs = random_inputs(model, batch, length, 1)?;
    let dims = match inferred(model, &inputs, &output.name) {
        Some(dims) => dims,
        None => {
            let mut session = engine.load(&model.to_inline()?, options)?;
            let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
            let value = session.run(&given, &[&output.name])?.pop();
            value.ok_or_else(|| Error::model("the model gave no output"))?.dims().to_vec()
        }
    };
    let learners = Learners { injection: &injection, trained: &trained, dropout: None };
    let labels = Field {
        name: "labels".into(),
        data_type: Some(DataType::Float),
        dims: Some(dims.iter().map(|_| Axis::Free).collect()),
    };
    let pooling = Pooling::default();
    let columns = [labels];
    let task = Task { precision, ..Task::new(Loss::Mse, &pooling, &output, &columns) };
    let loss = LossModel::new(model, learners, &parameters, task)?;
    let len = dims.iter().product();
    let (model, others) = loss.whole_gradient(vec![Tensor::new(&dims, vec![0f32; len])])?;
    let parameters = parameters.into_iter().map(|p| (p.name, p.value));
    let inputs = parameters.chain(inputs).chain(others).collect();
    Ok(Probe { model, inputs })
}

/// The dimensions of `output` for these inputs, where shape inference can tell.
fn inferred(model: &Model, inputs: &BTreeMap<String, Tensor>, output: &str) -> Option<Vec<usize>> {
    let given = inputs.iter().map(|(name, value)| (name.clone(), value.dims().iter().map(|d| *d as i64).collect()));
    let shapes = Shapes::infer(&model.proto, &given.collect());
    let known = |dim: &Dim| match dim {
        Dim::Known(n) => usize::try_from(*n).ok(),
        _ => None,
    };
    shapes.dims(output)?.iter().map(known).collect()
}
