//! The models of `../shared/models` and `../shared/goldens`, against their manifests.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use super::*;
use crate::onnx::{DataType, Model};

fn shared(path: &str) -> PathBuf {
    let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared"));
    let base = if beside.is_dir() { beside } else { PathBuf::from("/work/shared") };
    base.join(path)
}

fn linears_in(path: &str) -> Vec<Linear> {
    linears(&Model::open(shared(path)).unwrap())
}

fn manifest() -> Vec<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(shared("models/manifest.json")).unwrap()).unwrap()
}

/// Calls of one module share one stored matrix and its layout; different modules never share a path.
fn assert_paths_are_consistent(linears: &[Linear]) {
    let mut weights = HashMap::new();
    for l in linears {
        let weight = (l.weight.source.clone(), l.is_stored_out_in(), l.in_features, l.out_features);
        assert_eq!(weights.entry(&l.path).or_insert(weight.clone()), &weight, "{}", l.path);
    }
}

#[test]
fn every_target_of_the_manifest_is_found_and_named() {
    let mut named = 0;
    for entry in manifest() {
        let file = entry["file"].as_str().unwrap();
        let mut found = linears_in(&format!("models/{file}"));
        assert_paths_are_consistent(&found);
        for target in entry["targets"].as_array().unwrap() {
            let node = target["node"].as_str().unwrap();
            let context = format!("{file}: {node}");
            let shape: Vec<usize> = serde_json::from_value(target["shape"].clone()).unwrap();
            if shape.len() == 4 {
                // The manifest's maker looked names up flat (F12): in the branch that uses it, this name is an
                // activation. It must not be found.
                assert!(!found.iter().any(|l| l.node_name == node), "{context}");
                continue;
            }
            let at = found.iter().position(|l| l.node_name == node).unwrap_or_else(|| panic!("{context} not found"));
            let l = found.remove(at);
            assert_eq!(l.op, target["op"], "{context}");
            assert_eq!(l.weight.name, target["weight"], "{context}");
            assert_eq!(i64::from(l.trans_b), target["transB"].as_i64().unwrap(), "{context}");
            if l.op != "MatMulNBits" {
                let dims = if l.trans_b { [l.out_features, l.in_features] } else { [l.in_features, l.out_features] };
                assert_eq!(dims, shape.as_slice(), "{context}");
            }
            assert_eq!(crate::onnx::data_type_name(l.data_type), target["dtype"], "{context}");
            // F1: the exporter merged all zero biases; this one is an Identity of the tensor that was kept.
            let merged = file == "bert_zero.ts17.onnx" && node == "/bert/pooler/dense/Gemm";
            if merged {
                assert_eq!(l.bias.as_deref(), Some("bert.embeddings.LayerNorm.bias"), "{context}");
            } else if let Some(bias) = target["bias"].as_str() {
                let stored = l.bias.as_deref().map(|b| b.strip_suffix("_quantized").unwrap_or(b));
                assert_eq!(stored, Some(bias), "{context}");
            }
            let rule = match target["rule"].as_str() {
                Some("meta") => NameRule::Metadata,
                Some("W") => NameRule::Weight,
                Some("bias~name") => NameRule::BiasAndNode,
                Some("name") => NameRule::Node,
                Some("name+alias") => NameRule::Call,
                None => NameRule::None,
                Some(other) => panic!("{context}: rule {other}"),
            };
            // The manifest's maker did not look through Q/DQ for a bias; both ways give one path.
            if !file.contains("qdq") {
                assert_eq!(l.rule, rule, "{context}");
            }
            assert_eq!(l.module.as_deref(), target["recovered"].as_str(), "{context}");
            if let (Some(truth), Some(module)) = (target["truth"].as_array(), &l.module) {
                assert!(truth.iter().any(|t| t == module), "{context}: {truth:?}");
                named += 1;
            }
            assert_eq!(l.adaptable.is_ok(), l.data_type == DataType::Float, "{context}: {:?}", l.adaptable);
        }
        let extra: Vec<_> = found.iter().map(|l| &l.node_name).collect();
        assert!(extra.is_empty(), "{file}: {extra:?}");
    }
    assert_eq!(named, 197, "targets whose truth is known");
}

#[test]
fn the_goldens_are_named_as_peft_names_them() {
    let modules = |path| linears_in(path).into_iter().map(|l| l.module.unwrap()).collect::<Vec<_>>();
    assert_eq!(modules("goldens/mlp/base_gemm.onnx"), ["lin0", "lin1"]);
    assert_eq!(modules("goldens/mlp/base_matmul.onnx"), ["lin0", "lin1"]);
    let bert: BTreeSet<_> = modules("goldens/bert/base.onnx").into_iter().collect();
    let adapter = std::fs::read(shared("goldens/bert/bone_all_linear_r5_pad/adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&adapter).unwrap();
    let mut peft: BTreeSet<String> = tensors
        .names()
        .into_iter()
        .filter_map(|n| Some(n.strip_prefix("base_model.model.")?.strip_suffix(".bone_block")?.to_string()))
        .collect();
    // That run had task_type SEQ_CLS, under which PEFT trains the classifier in full.
    peft.insert("classifier".into());
    assert_eq!(bert, peft);
}
