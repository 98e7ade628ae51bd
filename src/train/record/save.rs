//! What a run leaves behind: `injected.onnx` with the trained values and `adapter/` in PEFT's form.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Value, json};

use crate::adapter::{Adapter, Injection};
use crate::inject::{collect, extract};
use crate::onnx::{Due, Durability, Model, NewPlace, Patch, Rope, Scope, Tensor, write_atomic, write_beside};
use crate::peft::{self, WriteOptions};
use crate::train::graph::Parameter;
use crate::{Error, Result};

/// Writes `injected` with the parameters' values to `path`, and the external files it names beside it.
pub(in crate::train) fn injected(model: &Model, parameters: &[Parameter], path: &Path) -> Result<()> {
    let mut patch = Patch::default();
    let graph = patch.graph(&Scope::new());
    for parameter in parameters {
        let due = Due::from(parameter.value.clone());
        graph.replace_values.insert(parameter.index, NewPlace::Inline(due.into()));
    }
    write_beside(model, patch, path, Durability::OnDisk)
}

/// Writes every adapter of the model below `dir`: the one called `default` into it, each other one into a directory of
/// its name, as PEFT does. A head is saved with each, as PEFT saves `modules_to_save`.
pub(in crate::train) fn adapters(
    model: &Model,
    injection: &Injection,
    parameters: &[Parameter],
    dir: &Path,
) -> Result<()> {
    let mut values: HashMap<&str, Tensor> = parameters.iter().map(|p| (p.name.as_str(), p.value.clone())).collect();
    let trained: HashSet<&str> = values.keys().copied().collect();
    // What was frozen in an adapter that learned, and a frozen head, are as the model has them.
    let head = injection.head.iter().flat_map(|h| [h.weight.as_str(), h.bias.as_str()]);
    let all: HashSet<&str> = injection.adapters.iter().flat_map(|a| a.parameters()).chain(head).collect();
    for tensor in model.graph().initializer.iter().filter(|t| all.contains(t.name()) && !trained.contains(t.name())) {
        values.insert(tensor.name(), model.tensor(tensor)?);
    }
    for record in &injection.adapters {
        let adapter = if record.parameters().any(|p| trained.contains(p)) {
            collect(record, |p| values.get(p).cloned()).map_err(Error::model)?
        } else {
            extract(model, injection, &record.name)?
        };
        let adapter = with_head(adapter, injection, &values);
        let options = WriteOptions { peft_type: record.config.peft_type, base_model: None };
        peft::write(&peft::place(dir, &record.name)?, &adapter, &options)?;
    }
    Ok(())
}

/// How large the files are that hold the values which [`adapters`] wrote.
pub(in crate::train) fn adapter_bytes(injection: &Injection, dir: &Path) -> u64 {
    let file = |name: &str| peft::place(dir, name).map(|dir| dir.join("adapter_model.safetensors")).ok();
    let names = injection.adapters.iter().filter_map(|a| file(&a.name));
    names.filter_map(|path| std::fs::metadata(path).ok()).map(|m| m.len()).sum()
}

/// The adapter with the model's head as one of its saved modules.
fn with_head(mut adapter: Adapter, injection: &Injection, values: &HashMap<&str, Tensor>) -> Adapter {
    if let Some(head) = &injection.head {
        adapter.config.modules_to_save.get_or_insert_default().push(head.name.clone());
        for (leaf, parameter) in [("weight", &head.weight), ("bias", &head.bias)] {
            if let Some(value) = values.get(parameter.as_str()) {
                adapter.saved.insert(format!("{}.{leaf}", head.name), value.clone());
            }
        }
    }
    adapter
}

/// Writes the class names as `{"0": "first", …}`.
pub(in crate::train) fn labels(names: &[String], path: &Path) -> Result<()> {
    let ids: serde_json::Map<String, Value> =
        names.iter().enumerate().map(|(i, n)| (i.to_string(), json!(n))).collect();
    let text =
        serde_json::to_vec_pretty(&ids).map_err(|e| Error::model(format!("the label names cannot be written: {e}")))?;
    file(path, text)
}

/// Writes a small file, whole or not at all.
pub(in crate::train) fn file(path: &Path, bytes: Vec<u8>) -> Result<()> {
    let mut rope = Rope::default();
    rope.push(bytes);
    write_atomic(path, rope, &[], Durability::OnDisk)
}
