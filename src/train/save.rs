//! What a run leaves behind: `injected.onnx` with the trained values and `adapter/` in PEFT's form (BONE, PEFT 0.18.1:
//! `adapter_config.json`, `adapter_model.safetensors`).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use super::graph::Parameter;
use crate::adapter::{AdapterRecord, Injection, TargetModules};
use crate::onnx::{
    Due, Durability, Model, NewPlace, Patch, Rope, Scope, Tensor, copy_external, external, write_atomic,
};
use crate::{Error, Result};

/// Writes `injected` with the parameters' values to `path`, and the external files it names beside it.
pub(super) fn injected(model: &Model, parameters: &[Parameter], path: &Path) -> Result<()> {
    let mut patch = Patch::default();
    let graph = patch.graph(&Scope::new());
    for parameter in parameters {
        let bytes = parameter.value.to_bytes();
        let due = Due { len: bytes.len(), write: Box::new(move |out| Ok(out.write_all(&bytes)?)) };
        graph.replace_values.insert(parameter.index, NewPlace::Inline(due));
    }
    copy_external(model, &external::locations(model)?, path, Durability::OnDisk)?;
    model.write(model.patched(patch)?, path)
}

/// Writes every adapter of the model below `dir`: the one called `default` into it, each other one into a directory of
/// its name, as PEFT does. A head is saved with each, as PEFT saves `modules_to_save`.
pub(super) fn adapters(injection: &Injection, parameters: &[Parameter], dir: &Path) -> Result<()> {
    let values: HashMap<&str, &Tensor> = parameters.iter().map(|p| (p.name.as_str(), &p.value)).collect();
    for adapter in &injection.adapters {
        let dir = adapter_dir(adapter, dir)?;
        fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
        let config = serde_json::to_vec_pretty(&config(adapter, injection))
            .map_err(|e| Error::model(format!("the adapter's config cannot be written: {e}")))?;
        file(&dir.join("adapter_config.json"), config)?;
        file(&dir.join("adapter_model.safetensors"), tensors(adapter, injection, &values)?)?;
    }
    Ok(())
}

/// Writes the class names as `{"0": "first", …}`.
pub(super) fn labels(names: &[String], path: &Path) -> Result<()> {
    let ids: serde_json::Map<String, Value> =
        names.iter().enumerate().map(|(i, n)| (i.to_string(), json!(n))).collect();
    let text =
        serde_json::to_vec_pretty(&ids).map_err(|e| Error::model(format!("the label names cannot be written: {e}")))?;
    file(path, text)
}

/// Writes a small file, whole or not at all.
pub(super) fn file(path: &Path, bytes: Vec<u8>) -> Result<()> {
    let mut rope = Rope::default();
    rope.push(bytes);
    write_atomic(path, rope, None, Durability::OnDisk)
}

fn adapter_dir(adapter: &AdapterRecord, dir: &Path) -> Result<PathBuf> {
    // The name comes from the file, which may be a stranger's.
    let mut parts = Path::new(&adapter.name).components();
    match (parts.next(), parts.next()) {
        _ if adapter.name == "default" => Ok(dir.to_path_buf()),
        (Some(Component::Normal(name)), None) => Ok(dir.join(name)),
        _ => Err(Error::model(format!("adapter name {:?} cannot be the name of a directory", adapter.name))),
    }
}

/// `adapter_config.json` as PEFT writes it, keys in order.
fn config(adapter: &AdapterRecord, injection: &Injection) -> BTreeMap<&'static str, Value> {
    let config = &adapter.config;
    let target_modules = match &config.target_modules {
        // PEFT resolves `all-linear` when it builds the model and saves the list.
        Some(targets) if targets.is_all_linear() => {
            Some(TargetModules::List(adapter.targets.iter().map(|t| t.module.clone()).collect()))
        }
        other => other.clone(),
    };
    BTreeMap::from([
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", Value::Null),
        ("bias", json!("none")),
        ("exclude_modules", json!(config.exclude_modules)),
        ("inference_mode", json!(true)),
        ("init_weights", json!(config.init_weights)),
        ("layers_pattern", json!(config.layers_pattern)),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("modules_to_save", json!(injection.head.as_ref().map(|h| [&h.name]))),
        ("peft_type", json!("BONE")),
        ("r", json!(config.r)),
        ("revision", Value::Null),
        ("target_modules", json!(target_modules)),
        ("task_type", Value::Null),
    ])
}

/// `adapter_model.safetensors`: blocks as `base_model.model.<module>.bone_block`, the head as `<head>.weight`, `.bias`.
fn tensors(adapter: &AdapterRecord, injection: &Injection, values: &HashMap<&str, &Tensor>) -> Result<Vec<u8>> {
    let blocks = adapter.targets.iter().map(|t| (format!("{}.bone_block", t.module), &t.parameter));
    let head = injection
        .head
        .iter()
        .flat_map(|h| [(format!("{}.weight", h.name), &h.weight), (format!("{}.bias", h.name), &h.bias)]);
    let mut saved = Vec::new();
    for (key, parameter) in blocks.chain(head) {
        let value = values
            .get(parameter.as_str())
            .ok_or_else(|| Error::model(format!("parameter {parameter} of the injection record has no value")))?;
        saved.push((format!("base_model.model.{key}"), value.dims().to_vec(), value.to_bytes()));
    }
    let failed = |e: safetensors::SafeTensorError| Error::model(format!("the adapter cannot be written: {e}"));
    let views = saved
        .iter()
        .map(|(key, dims, bytes)| Ok((key, TensorView::new(Dtype::F32, dims.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(failed)
}
