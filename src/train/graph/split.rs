//! A loss model in two: the part that is computed once for each row of the data, and what is left for every step.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{LossModel, form};
use crate::autodiff;
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{GraphProto, ModelProto, ValueInfoProto, value_info};
use crate::{Error, Result};

impl LossModel {
    /// The model, in training form.
    pub(in crate::train) fn proto(&self) -> &ModelProto {
        &self.model
    }

    /// The inputs that are not the model's own: the parameters, and what the loss reads.
    pub(in crate::train) fn added_inputs(&self) -> HashSet<&str> {
        self.parameters.iter().chain(&self.names.targets).map(String::as_str).collect()
    }

    /// Whether it has weights in float16 or bfloat16.
    pub(in crate::train) fn in_halves(&self) -> bool {
        super::computes_in_halves(&self.model)
    }

    /// What computes the values `at` from the model's inputs; and the loss with `at` as inputs, beside those of the model
    /// that it still reads.
    ///
    /// # Errors
    /// A value that is not there, or whose type is not known.
    pub(in crate::train) fn split(&self, at: &[String]) -> Result<(ModelProto, Self)> {
        let shapes = Shapes::infer(&self.model, &BTreeMap::new());
        let values = at.iter().map(|name| declare(name, &shapes)).collect::<Result<Vec<_>>>()?;
        let mut first = self.model.clone();
        let mut rest = self.clone();
        let added: HashSet<&str> = self.added_inputs();
        if let (Some(first), Some(rest)) = (&mut first.graph, &mut rest.model.graph) {
            first.output.clone_from(&values);
            keep_needed(first, &HashSet::new(), &HashSet::new());
            form::lower(first);
            keep_needed(rest, &at.iter().map(String::as_str).collect(), &added);
            rest.input.extend(values);
        }
        Ok((first, rest))
    }
}

/// The declaration of a value as an input: its axes are numbers where they always are, else named alike where they are
/// alike.
fn declare(name: &str, shapes: &Shapes) -> Result<ValueInfoProto> {
    let found = shapes.get(name).and_then(|shape| Some((shape.element?, shape.dims.as_ref()?)));
    let (element, dims) = found.ok_or_else(|| Error::model(format!("type and rank of {name} are not known")))?;
    let dims: Vec<String> = dims
        .iter()
        .map(|dim| match dim {
            Dim::Known(n) => n.to_string(),
            Dim::Symbol(_) => shapes.show(*dim),
        })
        .collect();
    Ok(value_info(name, element, &dims.iter().map(String::as_str).collect::<Vec<_>>()))
}

/// Leaves of `graph` what its outputs need where `given` is given; inputs in `stay` stay in any case.
fn keep_needed(graph: &mut GraphProto, given: &HashSet<&str>, stay: &HashSet<&str>) {
    let makers: HashMap<&str, usize> = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(at, node)| node.output.iter().map(move |output| (output.as_str(), at)))
        .collect();
    let mut open: Vec<String> = graph.output.iter().map(|o| o.name().to_string()).collect();
    let (mut read, mut nodes) = (HashSet::new(), HashSet::new());
    while let Some(value) = open.pop() {
        if !given.contains(value.as_str())
            && let Some(at) = makers.get(value.as_str())
            && nodes.insert(*at)
        {
            open.extend(autodiff::inputs(&graph.node[*at]));
        }
        read.insert(value);
    }
    let mut at = 0..;
    graph.node.retain(|_| at.next().is_some_and(|at| nodes.contains(&at)));
    graph.input.retain(|i| stay.contains(i.name()) || read.contains(i.name()));
    graph.initializer.retain(|t| read.contains(t.name()));
    graph.value_info.retain(|v| read.contains(v.name()) && !given.contains(v.name()));
}
