//! What a model takes and gives, and the check of a call against it: the same clear errors whichever engine runs.

use std::collections::{HashMap, HashSet};

use crate::onnx::proto::{ValueInfoProto, tensor_shape_proto::dimension::Value as DimValue};
use crate::onnx::{DataType, GraphProto, ModelProto, Tensor, data_type_name};
use crate::{Error, Result, did_you_mean};

/// Inputs and outputs of a model's main graph.
#[derive(Debug, Clone)]
pub(super) struct Signature {
    /// Inputs that have to be given.
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    /// Every input by name, those with a default value among them.
    known: HashMap<String, Input>,
}

#[derive(Debug, Clone)]
struct Input {
    /// Declared element type; `None` for what is not a tensor, or a type that [`Tensor`] does not hold.
    element: Option<DataType>,
    /// Declared dimensions, a free one as `None`; `None` where the rank is open.
    dims: Option<Vec<Option<i64>>>,
}

impl Signature {
    pub fn of(model: &ModelProto) -> Result<Self> {
        let graph = model.graph.as_ref().ok_or_else(|| Error::model("the model holds no graph"))?;
        let constants = initializer_names(graph);
        let known: HashMap<String, Input> =
            graph.input.iter().map(|info| (info.name().to_string(), Input::of(info))).collect();
        let inputs = graph.input.iter().map(|i| i.name().to_string()).filter(|i| !constants.contains(i.as_str()));
        let outputs = graph.output.iter().map(|o| o.name().to_string());
        Ok(Self { inputs: inputs.collect(), outputs: outputs.collect(), known })
    }

    /// Checks the arguments of [`super::Session::run`].
    pub fn check(&self, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<()> {
        let mut given = HashSet::new();
        for (name, tensor) in inputs {
            let Some(input) = self.known.get(*name) else {
                return Err(Error::data(format!(
                    "the model has no input {name:?}; its inputs are {}.{}",
                    list(&self.inputs),
                    did_you_mean(name, self.known.keys().map(String::as_str))
                )));
            };
            if !given.insert(*name) {
                return Err(Error::data(format!("input {name:?} is given twice")));
            }
            input.check(name, tensor)?;
        }
        if let Some(missing) = self.inputs.iter().find(|name| !given.contains(name.as_str())) {
            let given: Vec<&str> = inputs.iter().map(|(name, _)| *name).collect();
            return Err(Error::data(format!(
                "input {missing:?} of the model is not given; given are {}",
                list(&given)
            )));
        }
        match wanted.iter().find(|name| !self.outputs.iter().any(|o| o == *name)) {
            None => Ok(()),
            Some(unknown) => Err(Error::data(format!(
                "the model has no output {unknown:?}; its outputs are {}.{}",
                list(&self.outputs),
                did_you_mean(unknown, self.outputs.iter().map(String::as_str))
            ))),
        }
    }
}

impl Input {
    fn of(info: &ValueInfoProto) -> Self {
        let Some(tensor) = info.tensor() else {
            return Self { element: None, dims: None };
        };
        let element = DataType::try_from(tensor.elem_type()).ok().filter(|t| Tensor::zeros(*t, &[0]).is_ok());
        let dim = |value: &Option<DimValue>| match value {
            // Some exporters write a free dimension as -1 or 0.
            Some(DimValue::DimValue(n)) if *n > 0 => Some(*n),
            _ => None,
        };
        let dims = tensor.shape.as_ref().map(|shape| shape.dim.iter().map(|d| dim(&d.value)).collect());
        Self { element, dims }
    }

    fn check(&self, name: &str, tensor: &Tensor) -> Result<()> {
        if let Some(element) = self.element
            && element != tensor.data_type()
        {
            return Err(Error::data(format!(
                "input {name:?} takes {}, but {} is given",
                data_type_name(element),
                data_type_name(tensor.data_type())
            )));
        }
        let Some(dims) = &self.dims else { return Ok(()) };
        let fits = dims.len() == tensor.dims().len()
            && dims.iter().zip(tensor.dims()).all(|(want, got)| want.is_none_or(|w| usize::try_from(w) == Ok(*got)));
        if fits {
            return Ok(());
        }
        let want: Vec<String> = dims.iter().map(|d| d.map_or("?".into(), |d| d.to_string())).collect();
        Err(Error::data(format!(
            "input {name:?} takes the shape [{}], but {:?} is given",
            want.join(", "),
            tensor.dims()
        )))
    }
}

fn initializer_names(graph: &GraphProto) -> HashSet<&str> {
    let sparse = graph.sparse_initializer.iter().filter_map(|s| s.values.as_ref()).map(|t| t.name());
    graph.initializer.iter().map(|t| t.name()).chain(sparse).collect()
}

/// `a, b, c`, cut short where there are many.
fn list<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 12;
    if names.is_empty() {
        return "none".into();
    }
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let rest = names.len().saturating_sub(SHOWN);
    if rest == 0 { shown.join(", ") } else { format!("{} and {rest} more", shown.join(", ")) }
}
