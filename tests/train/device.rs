//! Training with the optimizer as a graph and everything on the engine's device (here the CPU's memory) is training on
//! the host.

use std::path::Path;

use bone_onnx::inject::HeadOptions;
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::optimizer::Rule;
use bone_onnx::train::schedule::Shape;
use bone_onnx::train::{self, Loss, Progress, StepReport, Summary, TrainOptions};

use crate::common::{arrays, injected, metrics, mlp, onnxruntime, tract, write_arrays};

/// The MLP with adapters and a head, and data for it.
fn case(dir: &Path) -> (Model, std::path::PathBuf) {
    let head = HeadOptions {
        name: "goal".into(),
        labels: 3,
        input: "y".into(),
        pool: bone_onnx::adapter::Pool::None,
        mask: None,
    };
    let model = injected(&mlp("base_gemm.onnx"), dir, 4, "all-linear", Some(head));
    let rows = 70;
    let x: Vec<f32> = (0..rows * 12).map(|i| (i as f32 * 0.7).sin()).collect();
    let labels: Vec<i64> = (0..rows).map(|row| if row % 9 == 4 { -100 } else { (row * 7 % 3) as i64 }).collect();
    let data = dir.join("data.safetensors");
    write_arrays(&data, &[("x", &Tensor::new(&[rows, 12], x)), ("labels", &Tensor::new(&[rows], labels))]);
    (model, data)
}

fn options(dir: &Path, data: &Path, on_device: bool) -> TrainOptions {
    TrainOptions {
        optimizer_on_device: Some(on_device),
        eval_data: vec![data.into()],
        steps: Some(50),
        batch_size: Some(8),
        lr: 1e-2,
        head_lr: Some(2e-2),
        weight_decay: 0.1,
        schedule: Shape::Cosine,
        warmup_steps: 5,
        ..TrainOptions::new(dir.join(if on_device { "device" } else { "host" }), data, Loss::cross_entropy())
    }
}

fn learned(summary: &Summary) -> Vec<f64> {
    let arrays = arrays(&summary.adapter.join("adapter_model.safetensors"));
    let mut names: Vec<&String> = arrays.keys().collect();
    names.sort();
    names.iter().flat_map(|n| arrays[*n].to_f64()).collect()
}

#[test]
fn every_optimizer_on_the_device_is_the_one_on_the_host() {
    const BETAS: (f64, f64) = (0.9, 0.999);
    type Change = fn(&mut TrainOptions);
    let cases: [(&str, Change); 8] = [
        ("adamw", |_| ()),
        ("adamw, clipped", |o| o.max_grad_norm = Some(0.05)),
        ("adamw, all decay, batches summed", |o| (o.decay_all, o.gradient_accumulation_steps) = (true, 3)),
        ("adam", |o| o.optimizer = Rule::Adam { betas: BETAS, eps: 1e-8 }),
        ("sgd", |o| o.optimizer = Rule::Sgd { momentum: 0.0, nesterov: false }),
        ("sgd with momentum", |o| o.optimizer = Rule::Sgd { momentum: 0.9, nesterov: false }),
        ("sgd of Nesterov", |o| o.optimizer = Rule::Sgd { momentum: 0.9, nesterov: true }),
        ("lion", |o| (o.optimizer, o.lr) = (Rule::Lion { betas: (0.9, 0.99) }, 1e-3)),
    ];
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = case(dir.path());
    for (name, change) in cases {
        let [host, device] = [false, true].map(|on_device| {
            let mut options = options(dir.path(), &data, on_device);
            change(&mut options);
            train::run(&model, &options, onnxruntime(), &mut ()).unwrap()
        });
        assert_eq!((host.steps.len(), device.steps.len()), (50, 50));
        for (host, device) in host.steps.iter().zip(&device.steps) {
            assert!((host.loss - device.loss).abs() < 1e-6, "{name}: {host:?} {device:?}");
            assert!((host.grad_norm - device.grad_norm).abs() < 1e-6, "{name}: {host:?} {device:?}");
            assert_eq!((host.step, host.lr), (device.step, device.lr));
        }
        assert_eq!(host.evals.len(), device.evals.len());
        for (host, device) in host.evals.iter().zip(&device.evals) {
            assert!(host.step == device.step && (host.eval_loss - device.eval_loss).abs() < 1e-6, "{name}");
        }
        let (host, device) = (learned(&host), learned(&device));
        let off = host.iter().zip(&device).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(host.len() == device.len() && host.iter().any(|v| v.abs() > 1e-3), "{name}: nothing was learned");
        assert!(off < 1e-6, "{name}: {off} apart");
    }
}

/// Asks to stop after a number of steps.
struct Until(usize);

impl Progress for Until {
    fn step(&mut self, _report: &StepReport) {
        self.0 = self.0.saturating_sub(1);
    }
    fn stop(&self) -> bool {
        self.0 == 0
    }
}

#[test]
fn a_run_goes_on_from_what_was_read_back_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = case(dir.path());
    let options = |out: &str| TrainOptions {
        out: dir.path().join(out),
        save_steps: Some(6),
        resume: true,
        ..options(dir.path(), &data, true)
    };
    let alone = train::run(&model, &options("alone"), onnxruntime(), &mut ()).unwrap();
    for steps in [4, 1, 13] {
        let summary = train::run(&model, &options("parts"), onnxruntime(), &mut Until(steps)).unwrap();
        assert!(summary.stopped && summary.checkpoint.is_some());
    }
    let parts = train::run(&model, &options("parts"), onnxruntime(), &mut ()).unwrap();
    assert!(!parts.stopped && parts.steps.len() == 50 && parts.evals == alone.evals);
    let without_time = |out: &str| {
        let mut lines = metrics(&dir.path().join(out));
        lines.iter_mut().filter_map(|l| l.as_object_mut()).for_each(|line| drop(line.remove("seconds")));
        lines
    };
    assert_eq!(without_time("alone"), without_time("parts"));
    for name in ["injected.onnx", "adapter/adapter_model.safetensors", "checkpoint-50/training_state.safetensors"] {
        let [a, b] = ["alone", "parts"].map(|out| std::fs::read(dir.path().join(out).join(name)).unwrap());
        assert!(a == b, "{name}");
    }
}

#[test]
fn what_is_not_finite_leaves_the_last_good_values() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = case(dir.path());
    let run = |on_device, steps, lr| {
        let options = TrainOptions {
            steps: Some(steps),
            lr,
            head_lr: None,
            optimizer: Rule::Sgd { momentum: 0.0, nesterov: false },
            weight_decay: 0.0,
            ..options(dir.path(), &data, on_device)
        };
        let outcome = train::run(&model, &options, onnxruntime(), &mut ());
        let adapter = arrays(&options.out.join("adapter/adapter_model.safetensors"));
        (outcome.map(|_| ()).map_err(|e| e.to_string()), adapter, metrics(&options.out).len())
    };
    let [host, device] = [false, true].map(|on_device| run(on_device, 50, 1e18));
    let error = host.0.unwrap_err();
    assert!(error.contains("became NaN or infinite; the last values"), "{error}");
    let there = |error: String| error.replace("/device", "/host");
    assert_eq!((error, host.2), (there(device.0.unwrap_err()), device.2));
    assert!(host.1.values().chain(device.1.values()).all(|t| t.to_f64().iter().all(|v| v.is_finite())));
}

#[test]
fn the_embedded_engine_says_that_it_has_no_device() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = case(dir.path());
    let error = train::run(&model, &options(dir.path(), &data, true), tract(), &mut ()).unwrap_err().to_string();
    assert!(error.contains("tract") && error.contains("ONNX Runtime"), "{error}");
}
