//! What a run keeps to: the same bits from the same seed, evaluation, heads, stopping.

use std::path::Path;

use bone_onnx::adapter::Pool;
use bone_onnx::inject::HeadOptions;
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::{self, EvalReport, Loss, Plan, Progress, StepReport, TrainOptions};

use crate::common::{arrays, files, injected, metrics, mlp, onnxruntime, shared, write_arrays};

/// Class ids 0..4 of the goldens' 16 rows: the largest of the four targets.
fn classes(dir: &Path) -> std::path::PathBuf {
    let base = arrays(&shared("goldens/mlp/base.safetensors"));
    let y = base["y"].values::<f32>().unwrap();
    let largest = |row: &[f32]| (0..4).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i64;
    let labels = Tensor::new(&[16], y.chunks(4).map(largest).collect());
    let path = dir.join("classes.safetensors");
    write_arrays(&path, &[("x", &base["x"]), ("labels", &labels)]);
    path
}

fn options(dir: &Path, out: &str) -> TrainOptions {
    TrainOptions {
        lr: 1e-2,
        batch_size: Some(5),
        epochs: Some(4),
        ..TrainOptions::new(dir.join(out), classes(dir), Loss::cross_entropy())
    }
}

fn bytes(dir: &Path, name: &str) -> Vec<u8> {
    std::fs::read(dir.join(name)).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let dir = tempfile::tempdir().unwrap();
    let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
    let run = |out: &str, seed| {
        let options = TrainOptions { seed, ..options(dir.path(), out) };
        train::run(&model, &options, onnxruntime(), &mut ()).unwrap();
        dir.path().join(out)
    };
    let (a, b, c) = (run("a", 7), run("b", 7), run("c", 8));
    for name in ["injected.onnx", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"] {
        assert_eq!(bytes(&a, name), bytes(&b, name), "{name}");
    }
    assert_ne!(bytes(&a, "injected.onnx"), bytes(&c, "injected.onnx"));
    assert_eq!(
        files(&a),
        ["adapter", "injected.onnx", "learning_rate.png", "loss.png", "metrics.jsonl", "report.html", "tensorboard"]
    );
    assert_eq!(files(&a.join("adapter")), ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
}

#[test]
fn training_from_the_trained_file_goes_on_where_it_stood() {
    let dir = tempfile::tempdir().unwrap();
    let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
    let full = TrainOptions { batch_size: Some(16), epochs: Some(10), ..options(dir.path(), "a") };
    let first = train::run(&model, &full, onnxruntime(), &mut ()).unwrap();
    // Into the directory that it was read from.
    let trained = Model::open(&first.injected).unwrap();
    let second = train::run(&trained, &full, onnxruntime(), &mut ()).unwrap();
    assert!(second.steps[0].loss < first.steps[9].loss);
    assert!(first.steps[9].loss < first.steps[0].loss);
}

#[test]
fn evaluation_is_the_mean_over_all_rows_after_each_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
    let data = classes(dir.path());
    let options = TrainOptions { eval_data: vec![data], steps: Some(7), epochs: None, ..options(dir.path(), "a") };
    let summary = train::run(&model, &options, onnxruntime(), &mut ()).unwrap();
    // 16 rows in batches of 5: an epoch is 4 steps, and the run ends inside the second.
    assert_eq!(summary.evals.iter().map(|e| e.step).collect::<Vec<_>>(), [4, 7]);

    let lines = metrics(&dir.path().join("a"));
    assert_eq!(lines.len(), 9);
    assert_eq!(lines[4]["eval_loss"].as_f64(), Some(summary.evals[0].eval_loss));
    assert!(lines[3].get("grad_norm").is_some() && lines[4].get("grad_norm").is_none());

    // One batch of all 16 rows before the first update gives the trained model's loss over the same rows.
    let trained = Model::open(&summary.injected).unwrap();
    let whole = TrainOptions {
        batch_size: Some(16),
        steps: Some(1),
        eval_data: Vec::new(),
        out: dir.path().join("b"),
        ..options
    };
    let again = train::run(&trained, &whole, onnxruntime(), &mut ()).unwrap();
    assert!((again.steps[0].loss - summary.evals[1].eval_loss).abs() < 1e-6);
}

#[test]
fn a_head_learns_at_its_own_rate_and_is_saved_with_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let head = HeadOptions { name: "classifier".into(), labels: 4, input: "y".into(), pool: Pool::None, mask: None };
    let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "lin0", Some(head));
    let start = |name: &str| {
        let tensor = model.graph().initializer.iter().find(|t| t.name() == name).unwrap();
        model.tensor(tensor).unwrap().to_f64()
    };
    let options = TrainOptions {
        head_lr: Some(1e-4),
        weight_decay: 0.5,
        batch_size: Some(16),
        steps: Some(1),
        epochs: None,
        ..options(dir.path(), "a")
    };
    train::run(&model, &options, onnxruntime(), &mut ()).unwrap();
    let saved = arrays(&dir.path().join("a/adapter/adapter_model.safetensors"));
    let mut keys: Vec<&str> = saved.keys().map(|k| k.strip_prefix("base_model.model.").unwrap()).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["classifier.bias", "classifier.weight", "lin0.miss_block"]);

    // AdamW's first step is lr in every coordinate with a gradient; decay takes lr·wd of a weight, nothing of a bias.
    let moved = |name: &str, decay: f64| {
        let now = saved[&format!("base_model.model.{name}")].to_f64();
        now.iter().zip(start(name)).map(|(now, was)| (now - was * (1.0 - decay)).abs()).fold(0.0, f64::max)
    };
    assert!((moved("classifier.bias", 0.0) - 1e-4).abs() < 2e-7, "{}", moved("classifier.bias", 0.0));
    assert!((moved("classifier.weight", 1e-4 * 0.5) - 1e-4).abs() < 2e-7);
    let block = saved["base_model.model.lin0.miss_block"].to_f64();
    let largest = block.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    assert!((largest - 1e-2).abs() < 1e-5, "{largest}");
}

/// Asks to stop after three steps.
#[derive(Default)]
struct Impatient {
    plan: Option<Plan>,
    steps: usize,
    evals: usize,
}

impl Progress for Impatient {
    fn started(&mut self, plan: &Plan) {
        self.plan = Some(plan.clone());
    }
    fn step(&mut self, _report: &StepReport) {
        self.steps += 1;
    }
    fn evaluated(&mut self, _report: &EvalReport) {
        self.evals += 1;
    }
    fn stop(&self) -> bool {
        self.steps == 3
    }
}

#[test]
fn a_run_that_is_stopped_keeps_what_it_learned() {
    let dir = tempfile::tempdir().unwrap();
    let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
    let mut impatient = Impatient::default();
    let summary = train::run(&model, &options(dir.path(), "a"), onnxruntime(), &mut impatient).unwrap();
    assert!(summary.stopped && summary.steps.len() == 3 && impatient.evals == 0);
    let plan = impatient.plan.unwrap();
    assert_eq!((plan.rows, plan.batch_size, plan.steps, plan.steps_per_epoch), (16, 5, 16, 4));
    assert_eq!((plan.output.as_str(), plan.trainable), ("y", 4 * 20 + 4 * 4));
    let other = TrainOptions { steps: Some(3), epochs: None, ..options(dir.path(), "b") };
    train::run(&model, &other, onnxruntime(), &mut ()).unwrap();
    let blocks = |out: &str| bytes(&dir.path().join(out), "adapter/adapter_model.safetensors");
    assert_eq!(blocks("a"), blocks("b"));
}
