//! Several batches for one update are one large batch.

use std::path::Path;

use bone_onnx::engine::Engine;
use bone_onnx::onnx::Tensor;
use bone_onnx::train::{self, Loss, Summary, TrainOptions};

use crate::common::{arrays, injected, mlp, onnxruntime, tract, write_arrays};

/// `rows` rows of numbers and class ids; of the labels, those at `ignored` are.
fn data(dir: &Path, rows: usize, ignored: &[usize]) -> std::path::PathBuf {
    let x: Vec<f32> = (0..rows * 12).map(|i| (i as f32 * 0.7).sin()).collect();
    let label = |row: usize| if ignored.contains(&row) { -100 } else { (row * 7 % 4) as i64 };
    let path = dir.join(format!("data{rows}_{}.safetensors", ignored.len()));
    let labels = Tensor::new(&[rows], (0..rows).map(label).collect::<Vec<i64>>());
    write_arrays(&path, &[("x", &Tensor::new(&[rows, 12], x)), ("labels", &labels)]);
    path
}

/// A run of three epochs with batches of `size`, `accumulated` of them a step; the adapters it leaves.
fn run(dir: &Path, data: &Path, engine: &dyn Engine, size: usize, accumulated: usize) -> (Summary, Vec<f64>) {
    let model = injected(&mlp("base_gemm.onnx"), dir, 4, "all-linear", None);
    let options = TrainOptions {
        lr: 1e-2,
        batch_size: Some(size),
        gradient_accumulation_steps: accumulated,
        shuffle: false,
        ..TrainOptions::new(dir.join("run"), data, Loss::cross_entropy())
    };
    let summary = train::run(&model, &options, engine, &mut ()).unwrap();
    let adapter = arrays(&dir.join("run/adapter/adapter_model.safetensors"));
    let mut names: Vec<&String> = adapter.keys().collect();
    names.sort();
    (summary, names.iter().flat_map(|n| adapter[*n].to_f64()).collect())
}

/// That `accumulated` batches of `size` are one batch of `large`, in each step's loss and norm and in what is learned.
fn same(data: &Path, dir: &Path, engine: &dyn Engine, (size, accumulated): (usize, usize), large: usize) {
    let (one, whole) = run(dir, data, engine, large, 1);
    let (many, parts) = run(dir, data, engine, size, accumulated);
    assert_eq!(one.steps.len(), many.steps.len());
    for (one, many) in one.steps.iter().zip(&many.steps) {
        assert!((one.loss - many.loss).abs() < 1e-6, "step {}: loss {} and {}", one.step, one.loss, many.loss);
        assert!((one.grad_norm - many.grad_norm).abs() < 1e-6, "step {}: {one:?} and {many:?}", one.step);
    }
    assert!(whole.iter().any(|v| v.abs() > 1e-3), "nothing was learned");
    let off = whole.iter().zip(&parts).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // AdamW divides by the root of squares, so noise of 1e-8 in a gradient near 0 is more than that here.
    assert!(off < 1e-5, "adapters are {off} apart");
}

#[test]
fn four_batches_of_8_are_one_of_32() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path(), 64, &[]);
    for engine in [onnxruntime(), tract()] {
        same(&data, dir.path(), engine, (8, 4), 32);
    }
}

#[test]
fn batches_weigh_as_many_labels_as_they_hold() {
    let dir = tempfile::tempdir().unwrap();
    // Of the first batch only one label counts, of the third none does; the epoch ends in a batch of 3.
    let ignored: Vec<usize> = (1..8).chain(16..24).chain([33]).collect();
    let data = data(dir.path(), 43, &ignored);
    same(&data, dir.path(), onnxruntime(), (8, 4), 32);
}

#[test]
fn an_epochs_last_step_takes_the_batches_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path(), 43, &[]);
    // 6 batches, 4 a step: two steps an epoch.
    let (summary, _) = run(dir.path(), &data, onnxruntime(), 8, 4);
    assert_eq!(summary.steps.len(), 6);
}
