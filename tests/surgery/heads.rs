//! An appended head: pooling is linear, so the head on pooled tokens is the pooled head on tokens, whatever operator
//! set the model is written in; unloading takes it out again, folding keeps it.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::adapter::{BoneConfig, Pool, TargetModules};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{HeadOptions, InjectOptions, inject};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::unload::unload;

use crate::common::{run, shared, worst};

const TOKENS: [(&str, &str); 2] = [
    ("bert.ts11", "/bert/encoder/layer.1/output/LayerNorm/Add_1_output_0"),
    ("bert.ts17", "/bert/encoder/layer.1/output/LayerNorm/LayerNormalization_output_0"),
];

/// Logits of a head of three labels on the tokens of `model`, and the path of the injected file.
fn head(model: &str, tokens: &str, pool: Pool, mask: Option<&str>, dir: &Path) -> Tensor {
    let base = Model::open(shared(&format!("models/{model}.onnx"))).expect("a model");
    let config =
        BoneConfig { r: 4, target_modules: Some(TargetModules::List(vec!["query".into()])), ..Default::default() };
    let head = HeadOptions { name: "topic".into(), labels: 3, input: tokens.into(), pool, mask: mask.map(Into::into) };
    let options = InjectOptions { config, head: Some(head), seed: 7, ..Default::default() };
    let injected = dir.join("injected.onnx");
    inject(&base, &options).and_then(|i| i.write(&base, &injected)).expect("an injection");
    let record = Model::open(&injected).expect("a model");

    let back = dir.join("back.onnx");
    record.write(record.patched(unload(&record).expect("unload")).expect("a patch"), &back).expect("a file");
    assert_eq!(std::fs::read(back).expect("a file"), std::fs::read(&base.path).expect("a file"));

    let inputs = inputs();
    let logits = run(&injected, &inputs).pop().expect("the head is the last output");
    let merged = dir.join("merged.onnx");
    fold(&record, &FoldOptions::default()).and_then(|f| f.write(&record, &merged)).expect("a fold");
    let again = run(&merged, &inputs).pop().expect("the head stays");
    assert!(worst(&logits, &again) <= 1e-6, "{model}: folding changed the head");
    logits
}

fn inputs() -> BTreeMap<String, Tensor> {
    let ids = (0..14).map(|i| (i * 5) % 30 + 1).collect();
    let mask: Vec<i64> = (0..14).map(|i| i64::from(i < 11)).collect();
    BTreeMap::from([
        ("input_ids".to_string(), Tensor::new::<i64>(&[2, 7], ids)),
        ("attention_mask".to_string(), Tensor::new::<i64>(&[2, 7], mask)),
    ])
}

#[test]
fn pooling_is_what_it_says_in_old_and_new_operator_sets() {
    let dir = tempfile::tempdir().expect("a directory");
    for (model, tokens) in TOKENS {
        let each = head(model, tokens, Pool::None, None, dir.path());
        assert_eq!(each.dims(), [2, 7, 3]);
        let each = each.to_f64();
        let pooled = |counts: [usize; 2]| -> Vec<f64> {
            let mean = |row: usize, label: usize| {
                (0..counts[row]).map(|t| each[(row * 7 + t) * 3 + label]).sum::<f64>() / counts[row] as f64
            };
            (0..6).map(|i| mean(i / 3, i % 3)).collect()
        };
        for (pool, mask, counts) in
            [(Pool::Cls, None, [1, 1]), (Pool::Mean, None, [7, 7]), (Pool::Mean, Some("attention_mask"), [7, 4])]
        {
            let logits = head(model, tokens, pool, mask, dir.path());
            assert_eq!(logits.dims(), [2, 3]);
            for (ours, expected) in logits.to_f64().iter().zip(pooled(counts)) {
                assert!((ours - expected).abs() <= 1e-5, "{model} {pool:?} {mask:?}: {ours} is not {expected}");
            }
        }
    }
}
