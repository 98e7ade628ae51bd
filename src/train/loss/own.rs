//! A loss of the user's own: an ONNX model whose inputs are named after outputs of the model and columns of the data.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::super::data::{Field, LabelKind, Target};
use super::LossNames;
use crate::onnx::shape::Shapes;
use crate::onnx::{DataType, GraphProto, Model, ModelProto, Names, data_type_name, node, value_info};
use crate::train::graph::merge::merge;
use crate::{Error, Result};

/// Where an input of the loss comes from.
#[derive(Debug, Clone, PartialEq)]
enum Source {
    /// An output of the model.
    Output(Field),
    /// An input of the model.
    Input,
    /// A column of the data.
    Column,
}

/// A loss that was read and checked.
#[derive(Debug)]
pub struct OwnLoss {
    path: PathBuf,
    proto: ModelProto,
    inputs: Vec<(Field, Source)>,
}

impl OwnLoss {
    /// Reads the loss at `path` for the model with this graph.
    ///
    /// # Errors
    /// Anything but one output, a float scalar; no input with the name of an output of the model.
    pub fn open(path: &Path, graph: &GraphProto) -> Result<Self> {
        let model = Model::open(path)?;
        let bad = |what: String| Error::file(path, what);
        let [output] = model.graph().output.as_slice() else {
            let count = model.graph().output.len();
            return Err(bad(format!("a loss has one output, a scalar, and this model has {count}")));
        };
        let field = Field::of(output);
        if let Some(other) = field.data_type.filter(|t| *t != DataType::Float) {
            let name = data_type_name(other);
            return Err(bad(format!("its output {} is {name}, and a loss is float32; cast it", field.name)));
        }
        let inferred = Shapes::infer(&model.proto, &Default::default()).dims(&field.name).map(<[_]>::len);
        if let Some(rank) = inferred.or(field.dims.as_ref().map(Vec::len)).filter(|rank| *rank != 0) {
            return Err(bad(format!(
                "its output {} has {rank} axes, and a loss is a scalar; reduce it (ReduceMean with keepdims 0)",
                field.name
            )));
        }
        let source = |input: Field| {
            let output = graph.output.iter().find(|o| o.name() == input.name).map(Field::of);
            let source = match output {
                Some(output) => Source::Output(output),
                None if Field::inputs(graph).iter().any(|own| own.name == input.name) => Source::Input,
                None => Source::Column,
            };
            (input, source)
        };
        let inputs: Vec<(Field, Source)> = Field::inputs(model.graph()).into_iter().map(source).collect();
        if !inputs.iter().any(|(_, source)| matches!(source, Source::Output(_))) {
            let inputs: Vec<&str> = inputs.iter().map(|(input, _)| input.name.as_str()).collect();
            let outputs: Vec<&str> = graph.output.iter().map(|o| o.name()).collect();
            return Err(bad(format!(
                "none of its inputs ({}) is named after an output of the model ({}), so nothing could be learned from it",
                inputs.join(", "),
                outputs.join(", ")
            )));
        }
        Ok(Self { path: path.into(), proto: model.to_inline()?, inputs })
    }

    /// The first output of the model that it reads.
    pub fn output(&self) -> Option<&str> {
        self.inputs
            .iter()
            .find_map(|(input, source)| matches!(source, Source::Output(_)).then_some(input.name.as_str()))
    }

    /// The columns of the data that it reads; `graph` is the model's.
    pub fn columns(&self, graph: &GraphProto) -> Vec<Target> {
        let columns = self.inputs.iter().filter(|(_, source)| *source == Source::Column);
        let others: Vec<String> = graph.output.iter().map(|o| o.name().to_string()).collect();
        columns
            .map(|(input, _)| Target {
                name: input.name.clone(),
                data_type: input.data_type.unwrap_or(DataType::Float),
                shapes: input.dims.iter().cloned().collect(),
                flag: None,
                others: others.clone(),
            })
            .collect()
    }

    /// What the column `labels` holds, where it is one that is read.
    pub fn label_kind(&self, labels: &str) -> Option<LabelKind> {
        let (input, _) =
            self.inputs.iter().find(|(input, source)| *source == Source::Column && input.name == labels)?;
        Some(if input.data_type == Some(DataType::Int64) { LabelKind::Class } else { LabelKind::Number })
    }

    /// Puts the loss behind the model. `output` is the one of the name `pooled_of` after pooling; `columns` are those of
    /// [`OwnLoss::columns`] as they were found.
    pub(in crate::train) fn append(
        &self,
        model: &mut ModelProto,
        (pooled_of, output): (&str, &Field),
        columns: &[Field],
    ) -> Result<LossNames> {
        let mut names = Names::of(model);
        let graph = model.graph.get_or_insert_default();
        let (mut bound, mut targets) = (HashMap::new(), Vec::new());
        for column in columns {
            let name = names.fresh(&column.name);
            graph.input.push(Field { name: name.clone(), ..column.clone() }.info());
            bound.insert(column.name.clone(), name.clone());
            targets.push(name);
        }
        for (input, source) in &self.inputs {
            let given = match source {
                Source::Column => continue,
                Source::Input => input.clone(),
                Source::Output(_) if input.name == pooled_of => output.clone(),
                Source::Output(given) => given.clone(),
            };
            let mut value = given.name.clone();
            // Losses are written for float32, whatever the model computes in.
            if *source != Source::Input && input.data_type.is_some() && given.data_type != input.data_type {
                value = names.fresh(&format!("loss/{}", input.name));
                let mut cast = node("Cast", &[&given.name], &[&value]);
                let to = input.data_type.unwrap_or(DataType::Float);
                cast.attribute.push(crate::onnx::AttributeProto::int("to", to as i64));
                graph.node.push(cast);
            }
            bound.insert(input.name.clone(), value);
        }
        let made = merge(model, self.proto.clone(), &self.path, "loss", &bound)?;
        let scalar = Names::of(model).fresh("loss");
        let graph = model.graph.get_or_insert_default();
        graph.node.push(node("Identity", &[made.first().map_or("", String::as_str)], &[&scalar]));
        graph.output.push(value_info(&scalar, DataType::Float, &[]));
        Ok(LossNames { targets, loss: scalar })
    }
}
