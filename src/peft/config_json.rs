//! `adapter_config.json`: read into a [`BoneConfig`], and written with PEFT's keys in PEFT's order.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::{CONFIG, content, put};
use crate::adapter::{Bias, BoneConfig, InitWeights, PeftType, TargetModules};
use crate::{Error, Result};

/// The keys of one config, sorted as PEFT sorts them.
pub(super) type Keys = BTreeMap<&'static str, Value>;

/// The PEFT release whose `MissConfig` is written.
const MISS_VERSION: &str = "0.21.2";

/// Reads and checks the config of the adapter in `dir`.
pub(super) fn read(dir: &Path, warnings: &mut Vec<String>) -> Result<BoneConfig> {
    let path = dir.join(CONFIG);
    if !path.exists() {
        return Err(Error::file(
            &path,
            "there is no such file; name the directory of an adapter, which holds adapter_config.json and \
             adapter_model.safetensors",
        ));
    }
    let bytes = content(&path)?;
    let json: Value = serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
    if json.is_object() && json.get("peft_type").is_none_or(Value::is_null) {
        let what =
            format!("peft_type is missing; it says what kind of adapter this is: {}", PeftType::WORDS.join(", "));
        return Err(Error::file(&path, what));
    }
    BoneConfig::from_json(&json, warnings).and_then(|config| config.validate().map(|()| config)).map_err(|e| match e {
        Error::Config(what) => Error::file(&path, what),
        other => other,
    })
}

/// The config as PEFT saves it: `MissConfig` of 0.21.2, or `BoneConfig` of 0.14 to 0.18. `modules` are the adapter's,
/// which stand where PEFT has resolved `all-linear` or its own table of targets.
pub(super) fn bone<'a>(
    config: &BoneConfig,
    peft_type: PeftType,
    modules: impl Iterator<Item = &'a String>,
    base_model: Option<&str>,
) -> Keys {
    let target_modules = match &config.target_modules {
        Some(targets) if !targets.is_all_linear() => targets.clone(),
        _ => TargetModules::List(modules.cloned().collect()),
    };
    let mut keys = common(config, base_model);
    let bias = match (config.bias, peft_type) {
        (Bias::Only, PeftType::Bone) => "bone_only".into(),
        (bias, _) => bias.to_string(),
    };
    let init_weights = match config.init_weights {
        InitWeights::Zeros => json!(true),
        InitWeights::Random => json!(false),
        word => json!(word.to_string()),
    };
    keys.extend([
        ("bias", json!(bias)),
        ("exclude_modules", json!(config.exclude_modules)),
        ("init_weights", init_weights),
        ("layers_pattern", layers_pattern(config)),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("peft_type", json!(peft_type)),
        ("r", json!(config.r)),
        ("target_modules", json!(target_modules)),
    ]);
    if peft_type == PeftType::Miss {
        keys.extend([
            ("mini_r", json!(config.mini_r)),
            ("miss_dropout", json!(config.miss_dropout)),
            ("peft_version", json!(MISS_VERSION)),
        ]);
    }
    if !config.packed_sizes.is_empty() {
        keys.insert("packed_sizes", json!(config.packed_sizes));
    }
    keys
}

/// A LoRA of this rank with scaling 1. These are the keys that PEFT's `LoraConfig` has had for long; a release takes
/// its defaults for newer ones, and would warn of those it does not know.
pub(super) fn lora<'a>(
    config: &BoneConfig,
    rank: usize,
    modules: impl Iterator<Item = &'a String>,
    base_model: Option<&str>,
) -> Keys {
    let mut keys = common(config, base_model);
    keys.extend([
        ("alpha_pattern", json!({})),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("init_lora_weights", json!(true)),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", Value::Null),
        ("lora_alpha", json!(rank)),
        ("lora_dropout", json!(0.0)),
        ("peft_type", json!("LORA")),
        ("r", json!(rank)),
        ("rank_pattern", json!({})),
        ("target_modules", json!(modules.collect::<Vec<_>>())),
        ("use_dora", json!(false)),
        ("use_rslora", json!(false)),
    ]);
    keys
}

/// What every kind of adapter's config holds.
fn common(config: &BoneConfig, base_model: Option<&str>) -> Keys {
    // PEFT adds the task's own output layers to the list, and saves it so.
    let saved = config.saved_modules();
    let saved = if saved.is_empty() { json!(config.modules_to_save) } else { json!(saved) };
    BTreeMap::from([
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(base_model)),
        ("inference_mode", json!(true)),
        ("modules_to_save", saved),
        ("revision", Value::Null),
        ("task_type", json!(config.task_type)),
    ])
}

/// One pattern is written as a string, which is the field's type in `BoneConfig`.
fn layers_pattern(config: &BoneConfig) -> Value {
    match config.layers_pattern.as_deref() {
        Some([one]) => json!(one),
        patterns => json!(patterns),
    }
}

pub(super) fn write(dir: &Path, keys: &Keys) -> Result<()> {
    let path = dir.join(CONFIG);
    let text = serde_json::to_vec_pretty(keys).map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
    put(&path, text)
}
