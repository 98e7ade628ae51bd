//! The training runs that PEFT and PyTorch made (`shared/goldens/mlp`, `shared/goldens/bert`), replayed step by step
//! through the trainer: loss, learning rate and gradient norm of each step, the adapter at the end, predictions of the
//! trained and of the folded model.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use bone_onnx::adapter::{Adapter, BoneConfig, Injection, PeftType};
use bone_onnx::engine::{Engine, LoadOptions};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, import, inject};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::{self, Loss, Summary, TrainOptions};
use serde_json::{Value, json};

use crate::common::{arrays, metrics, mlp, onnxruntime, shared, tract, write_arrays};

/// A run as PEFT logged it.
struct Golden {
    name: String,
    truth: Value,
    peft_type: PeftType,
    /// The directory with the adapters that PEFT saved, and the file with everything else it gave.
    dir: PathBuf,
    values: HashMap<String, Tensor>,
}

fn goldens(room: &str, file: &str, peft_type: PeftType) -> Vec<Golden> {
    let json = std::fs::read(shared(&format!("goldens/{room}/{file}.json"))).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let runs = json["runs"].as_object().unwrap().iter();
    runs.map(|(name, truth)| Golden {
        name: name.clone(),
        truth: truth.clone(),
        peft_type,
        dir: shared(&format!("goldens/{room}")).join(name),
        values: arrays(&shared(&format!("goldens/{room}/{file}.safetensors"))),
    })
    .collect()
}

impl Golden {
    fn value(&self, what: &str) -> &Tensor {
        &self.values[&format!("{}/{what}", self.name)]
    }

    fn config(&self) -> BoneConfig {
        let mut config = BoneConfig::from_json(&self.truth["config"], &mut Vec::new()).unwrap();
        config.peft_type = self.peft_type;
        config
    }

    /// The model with a fresh adapter; where PEFT drew random values, with those.
    fn injected(&self, base: &Path, dir: &Path) -> Model {
        let model = Model::open(base).unwrap();
        let config = self.config();
        let path = dir.join("start.onnx");
        let start = format!("{}/start.base_model.model.", self.name);
        let blocks: BTreeMap<String, Tensor> = self
            .values
            .iter()
            .filter_map(|(key, value)| {
                let module = key.strip_prefix(&start)?.strip_suffix(".bone_block.default")?;
                Some((module.to_string(), value.clone()))
            })
            .collect();
        let injected = if blocks.is_empty() {
            inject(&model, &InjectOptions { config, ..Default::default() })
        } else {
            let adapter = Adapter { name: "default".into(), config, blocks, saved: BTreeMap::new() };
            import(&model, adapter, false, false)
        };
        injected.and_then(|i| i.write(&model, &path)).unwrap();
        Model::open(path).unwrap()
    }

    /// The settings of the run; `per_row` samples make a row of the data.
    fn options(&self, out: &Path, data: &Path, loss: Loss, per_row: usize) -> TrainOptions {
        let settings = &self.truth["train"];
        let number = |key: &str| settings[key].as_f64();
        let whole = if loss == Loss::Mse { 16 } else { 8 };
        let batch = settings["batches"][0].as_array().map_or(whole, Vec::len);
        TrainOptions {
            lr: number("lr").unwrap(),
            weight_decay: number("wd").unwrap(),
            decay_all: true,
            max_grad_norm: number("clip"),
            schedule: settings["sched"].as_str().unwrap_or("constant").parse().unwrap(),
            warmup_steps: number("warm").unwrap_or(0.0) as usize,
            batch_size: Some(batch / per_row),
            steps: number("steps").map(|n| n as usize),
            shuffle: false,
            ..TrainOptions::new(out, data, loss)
        }
    }

    /// Holds what a run left in `out` against PEFT's.
    fn check(&self, summary: &Summary, out: &Path, what: &str) {
        let log = self.truth["log"].as_array().unwrap();
        assert_eq!(summary.steps.len(), log.len());
        let relative = |got: f64, want: f64| (got - want).abs() / want.abs().max(1e-12);
        for (step, (got, want)) in summary.steps.iter().zip(log).enumerate() {
            let at = |key: &str| want[key].as_f64().unwrap();
            assert!(relative(got.loss, at("loss")) < 1e-5, "{what}, step {step}: loss {} not {}", got.loss, at("loss"));
            let (norm, wanted) = (got.grad_norm, at("grad_norm_before_clip"));
            assert!(relative(norm, wanted) < 1e-5, "{what}, step {step}: norm {norm} not {wanted}");
            assert!((got.lr - at("lr")).abs() < 1e-12, "{what}, step {step}: lr {} not {}", got.lr, at("lr"));
        }
        // The losses are float32 numbers; the JSON reader is only right to the last bit but one of a float64.
        let losses: Vec<f32> = metrics(out).iter().map(|l| l["loss"].as_f64().unwrap() as f32).collect();
        assert_eq!(losses, summary.steps.iter().map(|s| s.loss as f32).collect::<Vec<_>>());

        let mut wanted = arrays(&self.dir.join("adapter_model.safetensors"));
        // Biases that trained: PEFT leaves them out of Bone's file, so that they are lost.
        let trained = format!("{}/trained.", self.name);
        let biases = self.values.iter().filter_map(|(k, v)| Some((k.strip_prefix(&trained)?.to_string(), v.clone())));
        wanted.extend(biases);
        let saved = arrays(&out.join("adapter/adapter_model.safetensors"));
        assert_eq!(sorted(saved.keys()), sorted(wanted.keys()), "{what}");
        for (key, want) in &wanted {
            let off = worst(&saved[key], want);
            assert!(saved[key].dims() == want.dims() && off < 1e-4, "{what}: {key} is off by {off:e}");
        }
        self.same_config(out);
        holds_adapter(&Model::open(out.join("injected.onnx")).unwrap(), &saved, what);
    }

    /// PEFT's own config, but for what only PyTorch knows.
    fn same_config(&self, out: &Path) {
        let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
        let mut want = read(&self.dir.join("adapter_config.json"));
        want["auto_mapping"] = Value::Null;
        want["base_model_name_or_path"] = Value::Null;
        let mut got = read(&out.join("adapter/adapter_config.json"));
        for config in [&mut want, &mut got] {
            let names = config["target_modules"].as_array_mut().unwrap();
            names.sort_by_key(|n| n.as_str().unwrap().to_string());
            // One name or a list of one: the same to PEFT.
            if let Some([only]) = config["layers_pattern"].as_array().map(Vec::as_slice) {
                config["layers_pattern"] = only.clone();
            }
            if let Some([only]) = config["modules_to_save"].as_array().map(Vec::as_slice) {
                config["modules_to_save"] = json!([only]);
            }
            config.as_object_mut().unwrap().remove("peft_version");
        }
        assert_eq!(got, want, "{}", self.name);
    }

    /// The trained model and the folded one predict what PEFT's do.
    fn predicts(&self, engine: &dyn Engine, out: &Path, inputs: &[(&str, &Tensor)], wanted: [&Tensor; 2], what: &str) {
        let injected = Model::open(out.join("injected.onnx")).unwrap();
        let merged = out.join("merged.onnx");
        fold(&injected, &FoldOptions { safe: true, ..Default::default() })
            .and_then(|f| f.write(&injected, &merged))
            .unwrap();
        for (model, wanted) in [(injected, wanted[0]), (Model::open(merged).unwrap(), wanted[1])] {
            let mut session = engine.load(&model.to_inline().unwrap(), &LoadOptions::default()).unwrap();
            let output = model.graph().output[0].name().to_string();
            let got = session.run(inputs, &[&output]).unwrap().remove(0);
            let off = worst(&got, wanted);
            assert!(off < 1e-4, "{what}: {} predicts otherwise, off by {off:e}", model.path.display());
        }
    }
}

/// Largest difference over all elements, in memory order.
fn worst(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.len(), b.len());
    a.to_f64()
        .iter()
        .zip(b.to_f64())
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d.is_nan() { d } else { m.max(d) })
}

/// The two exports: rows of 12 numbers for Gemm, four of them to a row for MatMul.
const FILES: [(&str, &[usize]); 2] = [("base_gemm.onnx", &[16]), ("base_matmul.onnx", &[4, 4])];

#[test]
fn peft_curves_on_onnxruntime() {
    assert_eq!(mlp_runs(onnxruntime()), 22);
}

#[test]
fn peft_curves_on_tract() {
    assert_eq!(mlp_runs(tract()), 22);
}

fn mlp_runs(engine: &dyn Engine) -> usize {
    let mut seen = 0;
    let base = arrays(&shared("goldens/mlp/base.safetensors"));
    let runs = goldens("mlp", "train_bone", PeftType::Bone);
    for golden in runs.iter().chain(&goldens("mlp", "train_miss", PeftType::Miss)) {
        for (file, rows) in FILES {
            let what = format!("{} on {file} with {}", golden.name, engine.name());
            let dir = tempfile::tempdir().unwrap();
            let model = golden.injected(&mlp(file), dir.path());
            let reshaped = |name: &str, width: usize| {
                let dims: Vec<usize> = rows.iter().copied().chain([width]).collect();
                Tensor::new(&dims, base[name].values::<f32>().unwrap().to_vec())
            };
            let (data, out, x) = (dir.path().join("data.safetensors"), dir.path().join("out"), reshaped("x", 12));
            write_arrays(&data, &[("x", &x), ("labels", &reshaped("y", 4))]);
            let options = golden.options(&out, &data, Loss::Mse, 16 / rows[0]);
            let summary = train::run(&model, &options, engine, &mut ()).unwrap_or_else(|e| panic!("{what}: {e}"));
            golden.check(&summary, &out, &what);
            let prediction = golden.value("pred_final");
            golden.predicts(engine, &out, &[("x", &x)], [prediction; 2], &what);
            seen += 1;
        }
    }
    seen
}

#[test]
fn bert_curves_of_peft() {
    let mut seen = 0;
    let base = arrays(&shared("goldens/bert/base.safetensors"));
    let inputs = ["input_ids", "attention_mask"].map(|name| (name, &base[&format!("data.{name}")]));
    for golden in goldens("bert", "train", PeftType::Bone) {
        let dir = tempfile::tempdir().unwrap();
        let model = golden.injected(&shared("goldens/bert/base.onnx"), dir.path());
        let record = Injection::expect(&model).unwrap();
        let mut modules: Vec<&str> = record.adapters[0].targets.iter().map(|t| t.module.as_str()).collect();
        modules.sort_unstable();
        assert_eq!(json!(modules), golden.truth["targeted_modules"], "{}", golden.name);
        let (data, out) = (dir.path().join("data.safetensors"), dir.path().join("out"));
        let labels = ("labels", &base["data.labels"]);
        write_arrays(&data, &[inputs[0], inputs[1], labels]);
        let options = golden.options(&out, &data, Loss::cross_entropy(), 1);
        let summary = train::run(&model, &options, onnxruntime(), &mut ()).unwrap();
        golden.check(&summary, &out, &golden.name);
        let wanted = [golden.value("logits_final"), golden.value("logits_merged")];
        golden.predicts(onnxruntime(), &out, &inputs, wanted, &golden.name);
        seen += 1;
    }
    assert_eq!(seen, 3);
}

/// `injected.onnx` has the very values of `adapter/`.
fn holds_adapter(model: &Model, adapter: &HashMap<String, Tensor>, what: &str) {
    let injection = Injection::expect(model).unwrap();
    let record = &injection.adapters[0];
    for target in &record.targets {
        let initializer = model.graph().initializer.iter().find(|t| t.name() == target.parameter).unwrap();
        let key = format!("base_model.model.{}.{}", target.module, record.config.peft_type.block());
        assert_eq!(model.tensor(initializer).unwrap(), adapter[&key], "{what}: {key}");
    }
}

fn sorted<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<&'a String> {
    let mut keys: Vec<&String> = keys.collect();
    keys.sort();
    keys
}
