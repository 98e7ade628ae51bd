//! The training runs that PEFT 0.16 and PyTorch made (`shared/goldens/mlp`), replayed step by step through the trainer:
//! loss, learning rate and gradient norm of each step, and the adapter at the end.

use std::path::Path;

use bone_onnx::adapter::Injection;
use bone_onnx::engine::Engine;
use bone_onnx::onnx::Due;
use bone_onnx::onnx::{Model, NewPlace, Patch, Scope, Tensor};
use bone_onnx::train::{self, Loss, TrainOptions};
use serde_json::Value;

use crate::common::{arrays, injected, metrics, mlp, onnxruntime, shared, tract, write_arrays};

const RUNS: [&str; 5] =
    ["bone_r4", "bone_r5_pad", "bone_r4_random_init", "bone_r4_minibatch_clip_linear", "bone_r4_cosine"];

/// The two exports: rows of 12 numbers for Gemm, four of them to a row for MatMul.
const FILES: [(&str, &[usize]); 2] = [("base_gemm.onnx", &[16]), ("base_matmul.onnx", &[4, 4])];

#[test]
fn peft_curves_on_onnxruntime() {
    all_runs(onnxruntime());
}

#[test]
fn peft_curves_on_tract() {
    all_runs(tract());
}

fn all_runs(engine: &dyn Engine) {
    let truth: Value = serde_json::from_slice(&std::fs::read(shared("goldens/mlp/train_bone.json")).unwrap()).unwrap();
    for run in RUNS {
        for (file, rows) in FILES {
            let what = format!("{run} on {file} with {}", engine.name());
            replay(engine, run, &truth["runs"][run], file, rows, &what);
        }
    }
}

fn replay(engine: &dyn Engine, run: &str, truth: &Value, file: &str, rows: &[usize], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let r = truth["config"]["r"].as_u64().unwrap() as usize;
    let mut model = injected(&mlp(file), dir.path(), r, "lin0,lin1", None);
    if run == "bone_r4_random_init" {
        model = with_start_values(model, dir.path());
    }

    let base = arrays(&shared("goldens/mlp/base.safetensors"));
    let reshaped = |name: &str, width: usize| {
        let dims: Vec<usize> = rows.iter().copied().chain([width]).collect();
        Tensor::new(&dims, base[name].values::<f32>().unwrap().to_vec())
    };
    let data = dir.path().join("data.safetensors");
    write_arrays(&data, &[("x", &reshaped("x", 12)), ("target", &reshaped("y", 4))]);

    let settings = &truth["train"];
    let number = |key: &str| settings[key].as_f64();
    let per_row = 16 / rows[0];
    let batch = settings["batches"][0].as_array().map_or(16, Vec::len);
    let out = dir.path().join("out");
    let options = TrainOptions {
        labels: "target".into(),
        lr: number("lr").unwrap(),
        weight_decay: number("wd").unwrap(),
        max_grad_norm: number("clip"),
        schedule: settings["sched"].as_str().unwrap_or("constant").parse().unwrap(),
        warmup_steps: number("warm").unwrap_or(0.0) as usize,
        batch_size: Some(batch / per_row),
        steps: number("steps").map(|n| n as usize),
        shuffle: false,
        ..TrainOptions::new(&out, &data, Loss::Mse)
    };
    let summary = train::run(&model, &options, engine, &mut ()).unwrap_or_else(|e| panic!("{what}: {e}"));

    let log = truth["log"].as_array().unwrap();
    assert_eq!(summary.steps.len(), log.len());
    let relative = |got: f64, want: f64| (got - want).abs() / want.abs().max(1e-12);
    for (step, (got, want)) in summary.steps.iter().zip(log).enumerate() {
        let at = |key: &str| want[key].as_f64().unwrap();
        assert!(relative(got.loss, at("loss")) < 1e-5, "{what}, step {step}: loss {} not {}", got.loss, at("loss"));
        let (norm, wanted) = (got.grad_norm, at("grad_norm_before_clip"));
        assert!(relative(norm, wanted) < 1e-5, "{what}, step {step}: norm {norm} not {wanted}");
        assert!((got.lr - at("lr")).abs() < 1e-12, "{what}, step {step}: lr {} not {}", got.lr, at("lr"));
    }
    let lines = metrics(&out);
    // The losses are float32 numbers; the JSON reader is only right to the last bit but one of a float64.
    let losses: Vec<f32> = lines.iter().map(|l| l["loss"].as_f64().unwrap() as f32).collect();
    assert_eq!(losses, summary.steps.iter().map(|s| s.loss as f32).collect::<Vec<_>>());

    let wanted = arrays(&shared(&format!("goldens/mlp/{run}/adapter_model.safetensors")));
    let saved = arrays(&out.join("adapter/adapter_model.safetensors"));
    assert_eq!(sorted(saved.keys()), sorted(wanted.keys()), "{what}");
    for (key, want) in &wanted {
        let worst = saved[key].to_f64().iter().zip(want.to_f64()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(saved[key].dims() == want.dims() && worst < 1e-4, "{what}: {key} is off by {worst:e}");
    }
    same_config(&out, run);
    holds_adapter(&Model::open(out.join("injected.onnx")).unwrap(), &saved, what);
}

/// PEFT's own config, but for what only PyTorch knows.
fn same_config(out: &Path, run: &str) {
    let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let mut want = read(&shared(&format!("goldens/mlp/{run}/adapter_config.json")));
    want["auto_mapping"] = Value::Null;
    let mut got = read(&out.join("adapter/adapter_config.json"));
    for config in [&mut want, &mut got] {
        let names = config["target_modules"].as_array_mut().unwrap();
        names.sort_by_key(|n| n.as_str().unwrap().to_string());
    }
    if run == "bone_r4_random_init" {
        // The injection was a zero one whose values were then replaced.
        got["init_weights"] = Value::Bool(false);
    }
    assert_eq!(got, want);
}

/// `injected.onnx` has the very values of `adapter/`.
fn holds_adapter(model: &Model, adapter: &std::collections::HashMap<String, Tensor>, what: &str) {
    let injection = Injection::expect(model).unwrap();
    for target in &injection.adapters[0].targets {
        let initializer = model.graph().initializer.iter().find(|t| t.name() == target.parameter).unwrap();
        let key = format!("base_model.model.{}.bone_block", target.module);
        assert_eq!(model.tensor(initializer).unwrap(), adapter[&key], "{what}: {key}");
    }
}

/// The model with the start values that PEFT drew.
fn with_start_values(model: Model, dir: &Path) -> Model {
    let start = arrays(&shared("goldens/mlp/train_bone.safetensors"));
    let injection = Injection::expect(&model).unwrap();
    let mut patch = Patch::default();
    for target in &injection.adapters[0].targets {
        let at = model.graph().initializer.iter().position(|t| t.name() == target.parameter).unwrap();
        let key = format!("bone_r4_random_init/start.base_model.model.{}.bone_block.default", target.module);
        let bytes = start[&key].to_bytes();
        let due = Due { len: bytes.len(), write: Box::new(move |out| Ok(out.write_all(&bytes)?)) };
        patch.graph(&Scope::new()).replace_values.insert(at, NewPlace::Inline(due));
    }
    let path = dir.join("random.onnx");
    model.write(model.patched(patch).unwrap(), &path).unwrap();
    Model::open(path).unwrap()
}

fn sorted<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<&'a String> {
    let mut keys: Vec<&String> = keys.collect();
    keys.sort();
    keys
}
