//! Going on from a checkpoint in ONNX Runtime, where layers drop inputs out.

use std::path::Path;

use bone_onnx::adapter::{BoneConfig, Pool, TargetModules};
use bone_onnx::inject::{HeadOptions, InjectOptions, inject};
use bone_onnx::onnx::Model;
use bone_onnx::train::{self, Loss, Progress, StepReport, TrainOptions};

use crate::common::{arrays, metrics, mlp, onnxruntime, shared, write_arrays};

/// Asks to stop after a number of steps.
struct Until(usize);

impl Progress for Until {
    fn step(&mut self, _report: &StepReport) {
        self.0 -= 1;
    }
    fn stop(&self) -> bool {
        self.0 == 0
    }
}

fn without_time(dir: &Path) -> Vec<serde_json::Value> {
    let mut lines = metrics(dir);
    lines.iter_mut().filter_map(|line| line.as_object_mut()).for_each(|line| drop(line.remove("seconds")));
    lines
}

#[test]
fn dropout_draws_what_it_would_have_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let base = Model::open(mlp("base_gemm.onnx")).unwrap();
    let config = BoneConfig {
        r: 4,
        miss_dropout: 0.5,
        target_modules: Some(TargetModules::parse("all-linear")),
        ..Default::default()
    };
    let head = HeadOptions { name: "goal".into(), labels: 4, input: "y".into(), pool: Pool::None, mask: None };
    let path = dir.path().join("start.onnx");
    let injection = InjectOptions { config, head: Some(head), seed: 1, ..Default::default() };
    inject(&base, &injection).unwrap().write(&base, &path).unwrap();
    let model = Model::open(&path).unwrap();
    let goldens = arrays(&shared("goldens/mlp/base.safetensors"));
    let data = dir.path().join("data.safetensors");
    write_arrays(&data, &[("x", &goldens["x"]), ("labels", &goldens["y"])]);
    let options = |out: &str| TrainOptions {
        steps: Some(12),
        batch_size: Some(5),
        eval_data: vec![data.clone()],
        head_lr: Some(1e-2),
        save_steps: Some(12),
        resume: true,
        ..TrainOptions::new(dir.path().join(out), &data, Loss::Mse)
    };
    let alone = train::run(&model, &options("alone"), onnxruntime(), &mut ()).unwrap();
    for steps in [3, 1, 4] {
        let summary = train::run(&model, &options("parts"), onnxruntime(), &mut Until(steps)).unwrap();
        assert!(summary.stopped && summary.checkpoint.is_some());
    }
    let parts = train::run(&model, &options("parts"), onnxruntime(), &mut ()).unwrap();
    assert!(!parts.stopped && parts.steps.len() == 12 && parts.evals == alone.evals);
    let (a, b) = (dir.path().join("alone"), dir.path().join("parts"));
    assert_eq!(without_time(&a), without_time(&b));
    for name in ["injected.onnx", "adapter/adapter_model.safetensors", "checkpoint-12/training_state.safetensors"] {
        assert!(std::fs::read(a.join(name)).unwrap() == std::fs::read(b.join(name)).unwrap(), "{name}");
    }
    // Masks that drew nothing would not have told.
    let last_loss = |out: &str, seed| {
        let options = TrainOptions { seed, shuffle: false, ..options(out) };
        train::run(&model, &options, onnxruntime(), &mut ()).unwrap().steps[11].loss
    };
    assert_ne!(last_loss("seed 0", 0), last_loss("seed 1", 1));
}
