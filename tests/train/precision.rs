//! Mixed precision: a float32 model whose products are computed in halves learns what it learns in float32.

use std::path::{Path, PathBuf};

use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::{self, Loss, Precision, Summary, TrainOptions};
use bone_onnx::verify::random_inputs;

use crate::common::{injected, onnxruntime, shared, write_arrays};

/// A small encoder with adapters on all of its linear layers, and data for it: its first output, moved.
fn case(dir: &Path) -> (Model, PathBuf, String) {
    let base = shared("models/bert.dyn18.onnx");
    let model = Model::open(&base).unwrap();
    let inputs = random_inputs(&model, 8, 6, 1).unwrap();
    let output = model.graph().output[0].name().to_string();
    let load = TrainOptions::new("", "", Loss::Mse).load;
    let mut session = onnxruntime().load(&model.to_inline().unwrap(), &load).unwrap();
    let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let value = session.run(&given, &[&output]).unwrap().remove(0);
    let moved = value.to_f64().into_iter().enumerate().map(|(i, v)| v as f32 + if i % 2 == 0 { 0.3 } else { -0.2 });
    let goal = Tensor::new(value.dims(), moved.collect());
    let data = dir.join("data.safetensors");
    write_arrays(&data, &given.into_iter().chain([("goal", &goal)]).collect::<Vec<_>>());
    (injected(&base, dir, 4, "all-linear", None), data, output)
}

fn run(dir: &Path, precision: Precision, on_device: bool) -> Result<Summary, String> {
    let (model, data, output) = case(dir);
    let options = TrainOptions {
        labels: "goal".into(),
        output: Some(output),
        steps: Some(20),
        batch_size: Some(4),
        lr: 3e-3,
        precision,
        optimizer_on_device: Some(on_device),
        ..TrainOptions::new(dir.join(format!("{precision:?} {on_device}")), data, Loss::Mse)
    };
    train::run(&model, &options, onnxruntime(), &mut ()).map_err(|e| e.to_string())
}

#[test]
fn float16_follows_float32_within_its_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let whole = run(dir.path(), Precision::F32, false).unwrap();
    let half = run(dir.path(), Precision::F16, false).unwrap();
    let mut apart = 0.0f64;
    for (whole, half) in whole.steps.iter().zip(&half.steps) {
        // Ten bits are kept: 5e-4, and a few of them add up.
        apart = apart.max((whole.loss - half.loss).abs() / whole.loss);
        assert!(apart < 5e-3, "{whole:?} {half:?}");
    }
    assert!(apart > 1e-7, "nothing was computed in halves");
    assert!(half.steps[19].loss < 0.9 * half.steps[0].loss);
    // What comes out is float32, and the base is what it was: only the adapters' values changed.
    let trained = Model::open(&half.injected).unwrap();
    let start = Model::open(dir.path().join("start.onnx")).unwrap();
    for (a, b) in start.graph().initializer.iter().zip(&trained.graph().initializer) {
        let same = a.raw_data == b.raw_data && a.data_type == b.data_type;
        assert!(same || a.name().contains("bone_block") || a.name().contains("miss_block"), "{}", a.name());
    }
    // On the device, with the scaled loss, the same.
    let device = run(dir.path(), Precision::F16, true).unwrap();
    for (host, device) in half.steps.iter().zip(&device.steps) {
        assert!((host.loss - device.loss).abs() < 1e-6 * host.loss.max(1.0), "{host:?} {device:?}");
    }
}

#[test]
fn an_engine_that_lacks_the_operators_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let error = run(dir.path(), Precision::Bf16, false).unwrap_err();
    assert!(
        error.contains("precision bf16") && error.contains("--device cuda") && error.contains("--precision f32"),
        "{error}"
    );
}
