//! What learns: the parameters of the adapters and of the head.

use super::TrainOptions;
use super::graph::freeze;
use super::graph::{Learners, Parameter, parameters};
use crate::adapter::Injection;
use crate::engine::Engine;
use crate::inject::check_shared;
use crate::onnx::Model;
use crate::{Error, Result};

/// What a run changes of a model.
pub(super) struct Subject {
    pub injection: Injection,
    /// The adapters that learn.
    pub trained: Vec<String>,
    /// At least one.
    pub parameters: Vec<Parameter>,
    /// Parameters that lie before the node where the gradients end, and stay as they are.
    pub frozen: Vec<String>,
    /// Whether inputs of an adapter that learns drop out.
    pub drops_out: bool,
}

impl Subject {
    /// # Errors
    /// Nothing to train; adapters of another base; dropout on an engine that has none.
    pub fn of(model: &Model, options: &TrainOptions, engine: &dyn Engine) -> Result<Self> {
        let injection = Injection::expect(model)?;
        check_shared(model, &injection, false)?;
        let trained = trained(&injection, options.adapter_names.as_deref())?;
        let mut parameters = parameters(model, &injection, &trained, options.decay_all)?;
        if parameters.is_empty() {
            let what = match injection.adapters.first() {
                Some(adapter) => format!(
                    "none of its adapters is active, so there is nothing to train; activate one: `bone-onnx adapter \
                     activate --adapters {}`",
                    adapter.name
                ),
                None => "nothing in it is trainable; inject an adapter or a head first".into(),
            };
            return Err(Error::file(&model.path, what));
        }
        let mut frozen = Vec::new();
        if let Some(node) = &options.freeze_until {
            let before = freeze::before(model, &injection, node)?;
            frozen = parameters.iter().map(|p| p.name.clone()).filter(|name| before.contains(name)).collect();
            parameters.retain(|p| !before.contains(&p.name));
            if parameters.is_empty() {
                return Err(Error::config(format!(
                    "freeze-until {node:?} leaves nothing to train: all adapters are before it"
                )));
            }
        }
        let drops_out = injection.active().any(|a| trained.contains(&a.name) && a.config.miss_dropout > 0.0);
        if drops_out && engine.name() == "tract" {
            return Err(Error::config(
                "miss_dropout needs ONNX Runtime: tract cannot drop inputs out. Use --engine onnxruntime, or inject \
                 without --miss-dropout",
            ));
        }
        Ok(Self { injection, trained, parameters, frozen, drops_out })
    }

    /// `dropout`: the seed of its masks.
    pub fn learners(&self, dropout: Option<u64>) -> Learners<'_> {
        Learners { injection: &self.injection, trained: &self.trained, dropout }
    }

    /// Numbers that are trained.
    pub fn trainable(&self) -> usize {
        self.parameters.iter().map(|p| p.value.len()).sum()
    }
}

/// The adapters that learn: those named, else all that are active.
fn trained(injection: &Injection, wanted: Option<&[String]>) -> Result<Vec<String>> {
    let Some(wanted) = wanted else { return Ok(injection.active.clone()) };
    for name in wanted {
        injection.named(name)?;
        if !injection.active.contains(name) {
            return Err(Error::config(format!(
                "adapter {name} is not active, so nothing it learns could have an effect; activate it first: \
                 `bone-onnx adapter activate --adapters {name}`"
            )));
        }
    }
    Ok(wanted.to_vec())
}
