//! Tensor names in `adapter_model.safetensors`, between PEFT's spelling and ours.

use std::collections::BTreeMap;

use crate::adapter::PeftType;

/// What PEFT puts before the path of every module it has wrapped.
const PREFIX: &str = "base_model.model.";

const BLOCKS: [&str; 2] = [".miss_block", ".bone_block"];

/// What a tensor of the file is.
#[derive(Debug, PartialEq)]
pub(super) enum Key {
    /// The block of this module.
    Block(String),
    /// The value of this parameter of the base model, by its path there.
    Saved(String),
    /// A block of another adapter that was loaded at the same time: PEFT's Bone, and MiSS to 0.19, save them too.
    OfAnother,
}

impl Key {
    pub fn parse(key: &str) -> Self {
        let path = key.strip_prefix(PREFIX).unwrap_or(key);
        if let Some(module) = BLOCKS.iter().find_map(|suffix| path.strip_suffix(suffix)) {
            return Self::Block(module.into());
        }
        if BLOCKS.iter().any(|suffix| path.contains(&format!("{suffix}."))) {
            return Self::OfAnother;
        }
        let path = path.replace(".base_layer.", ".");
        // In memory, and in files saved without PEFT's own function: `classifier.modules_to_save.<adapter>.weight`.
        match path.split_once(".modules_to_save.").map(|(module, rest)| (module, rest.split_once('.'))) {
            Some((module, Some((_adapter, parameter)))) => Self::Saved(format!("{module}.{parameter}")),
            _ => Self::Saved(path),
        }
    }
}

pub(super) fn block(module: &str, peft_type: PeftType) -> String {
    format!("{PREFIX}{module}.{}", peft_type.block())
}

/// One of LoRA's two matrices, `which` being `A` or `B`.
pub(super) fn lora(module: &str, which: char) -> String {
    format!("{PREFIX}{module}.lora_{which}.weight")
}

/// A parameter that trained in full. That of an adapted layer, a bias say, has moved into the wrapped layer.
pub(super) fn saved<T>(path: &str, adapted: &BTreeMap<String, T>) -> String {
    match path.rsplit_once('.') {
        Some((module, parameter)) if adapted.contains_key(module) => format!("{PREFIX}{module}.base_layer.{parameter}"),
        _ => format!("{PREFIX}{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_and_spelled_as_peft_does() {
        let block = |m: &str| Key::Block(m.into());
        let saved = |p: &str| Key::Saved(p.into());
        for (key, wanted) in [
            ("base_model.model.a.layer.0.query.bone_block", block("a.layer.0.query")),
            ("base_model.model.a.query.miss_block", block("a.query")),
            ("a.query.miss_block", block("a.query")),
            ("base_model.model.a.bone_block.other", Key::OfAnother),
            ("base_model.model.a.miss_block.second", Key::OfAnother),
            ("base_model.model.lin0.base_layer.bias", saved("lin0.bias")),
            ("base_model.model.classifier.weight", saved("classifier.weight")),
            ("base_model.model.score.modules_to_save.default.weight", saved("score.weight")),
            ("base_model.model.head.modules_to_save.default.dense.bias", saved("head.dense.bias")),
        ] {
            assert_eq!(Key::parse(key), wanted, "{key}");
        }
        let adapted = BTreeMap::from([("a.query".to_string(), ())]);
        assert_eq!(super::saved("a.query.bias", &adapted), "base_model.model.a.query.base_layer.bias");
        assert_eq!(super::saved("a.key.bias", &adapted), "base_model.model.a.key.bias");
        assert_eq!(super::block("a.query", PeftType::Bone), "base_model.model.a.query.bone_block");
    }
}
