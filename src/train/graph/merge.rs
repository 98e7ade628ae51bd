//! Another model's graph behind a model's own: a teacher's, or that of a loss.

use std::collections::HashMap;
use std::path::Path;

use crate::onnx::functions;
use crate::onnx::proto::FunctionProto;
use crate::onnx::upgrade::upgrade;
use crate::onnx::{ModelProto, Names, NodeProto, node};
use crate::train::data::Field;
use crate::{Error, Result};

/// The domain of the call that stands for the other model until it is written out.
const DOMAIN: &str = "org.bone-onnx.merged";

/// Puts `other` (read from `path`, tensors inline) behind `model`: its inputs are the values of `model` that `bound`
/// names for them, everything else in it gets names of its own that begin with `prefix`. Returns what its outputs are
/// called.
///
/// # Errors
/// Operator sets that cannot be brought together; a function that cannot be written out.
pub(in crate::train) fn merge(
    model: &mut ModelProto,
    mut other: ModelProto,
    path: &Path,
    prefix: &str,
    bound: &HashMap<String, String>,
) -> Result<Vec<String>> {
    let apart = |e: Error| Error::file(path, format!("it cannot be put behind the model: {e}"));
    functions::write_out(&mut other).map_err(apart)?;
    let newest = model.opset().max(other.opset());
    upgrade(model, newest).and_then(|()| upgrade(&mut other, newest)).map_err(apart)?;
    for import in &other.opset_import {
        if !model.opset_import.iter().any(|o| o.domain() == import.domain()) {
            model.opset_import.push(import.clone());
        }
    }
    let mut names = Names::of(model);
    let graph = other.graph.take().unwrap_or_default();
    // The other graph as a function of its inputs and its constants.
    let mut formal: Vec<String> = Field::inputs(&graph).into_iter().map(|input| input.name).collect();
    let mut actual: Vec<String> = formal.iter().map(|input| bound.get(input).cloned().unwrap_or_default()).collect();
    let own = model.graph.get_or_insert_default();
    for mut tensor in graph.initializer {
        formal.push(tensor.name().to_string());
        let name = names.fresh(&format!("{prefix}/{}", tensor.name()));
        tensor.name = Some(name.clone());
        own.initializer.push(tensor);
        actual.push(name);
    }
    let outputs: Vec<String> = graph.output.iter().map(|o| o.name().to_string()).collect();
    let made: Vec<String> = outputs.iter().map(|o| names.fresh(&format!("{prefix}/{o}"))).collect();
    own.node.push(NodeProto {
        name: Some(names.fresh(prefix)),
        domain: Some(DOMAIN.into()),
        input: actual,
        output: made.clone(),
        ..node(prefix, &[], &[])
    });
    model.functions.push(FunctionProto {
        name: Some(prefix.into()),
        domain: Some(DOMAIN.into()),
        input: formal,
        output: outputs,
        node: graph.node,
        opset_import: other.opset_import,
        ..Default::default()
    });
    functions::write_out(model).map_err(apart)?;
    Ok(made)
}
