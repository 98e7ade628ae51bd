//! Layers in forms of their own learn: convolutions, Einsum, parts of packed layers, layers in functions, in branches and
//! in loops, and the product inside of Attention.

use std::path::Path;

use bone_onnx::adapter::{BoneConfig, InitWeights, TargetModules};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::{self, Loss, Precision, TrainOptions};

use crate::common::{arrays, onnxruntime, write_arrays};

/// The loss of the first step and of the last.
fn steps(file: &str, options: InjectOptions) -> (f64, f64) {
    let losses = losses(file, options, |_| ());
    (losses[0], losses[7])
}

/// The losses of eight steps; the goal is PyTorch's own output, moved.
fn losses(file: &str, options: InjectOptions, change: impl Fn(&mut TrainOptions)) -> Vec<f64> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exported");
    let mut inputs: Vec<(String, Tensor)> = Vec::new();
    let mut goal = None;
    for (name, value) in arrays(&folder.join("truth.safetensors")) {
        match name.strip_prefix(&format!("{file}/")) {
            Some("out.0") => {
                let moved = value.to_f64().iter().enumerate().map(|(i, v)| *v as f32 + [0.3, -0.2][i % 2]).collect();
                goal = Some(Tensor::new::<f32>(value.dims(), moved));
            }
            Some(rest) => inputs.extend(rest.strip_prefix("in.").map(|n| (n.to_string(), value))),
            None => {}
        }
    }
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data.safetensors");
    let goal = goal.expect("an output");
    let mut columns: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    columns.push(("goal", &goal));
    write_arrays(&data, &columns);
    let base = Model::open(folder.join(file)).expect("a model");
    let path = dir.path().join("injected.onnx");
    inject(&base, &options).expect("an injection").write(&base, &path).expect("a file");
    let injected = Model::open(&path).expect("a model");
    let output = injected.graph().output[0].name().to_string();
    let mut options = TrainOptions {
        labels: "goal".into(),
        output: Some(output),
        steps: Some(8),
        lr: 1e-2,
        ..TrainOptions::new(dir.path().join("out"), &data, Loss::Mse)
    };
    change(&mut options);
    let summary = train::run(&injected, &options, onnxruntime(), &mut ()).unwrap_or_else(|e| panic!("{file}: {e}"));
    summary.steps.iter().map(|step| step.loss).collect()
}

fn on(targets: &str, init_weights: InitWeights) -> InjectOptions {
    let target_modules = Some(TargetModules::parse(targets));
    let config = BoneConfig { r: 2, init_weights, target_modules, ..Default::default() };
    InjectOptions { config, ..Default::default() }
}

#[test]
fn every_form_of_a_layer_learns() {
    let einsum = InjectOptions {
        config: BoneConfig { r: 2, ..Default::default() },
        target_nodes: Some(TargetModules::parse("/Einsum,/Einsum_2,/Einsum_3")),
        ..Default::default()
    };
    let mut groups = on("q_proj,v_proj", InitWeights::Zeros);
    groups.config.packed_sizes = [("q_proj", 8), ("k_proj", 4), ("v_proj", 4)].map(|(n, s)| (n.to_string(), s)).into();
    let cases = [
        ("conv2d.ts17.onnx", on("proj_in,proj_out,to_q", InitWeights::Zeros)),
        ("conv2d.ts17.onnx", on("proj_in,proj_out", InitWeights::Bat)),
        ("conv1d.dyn18.onnx", on("conv_q,conv_k", InitWeights::Zeros)),
        ("einsum.ts17.onnx", einsum),
        ("packed_split.ts17.onnx", on("q_proj,v_proj", InitWeights::Zeros)),
        ("packed_slices.dyn18.onnx", on("q_proj,v_proj", InitWeights::Bat)),
        ("functions.onnx", on("all-linear", InitWeights::Zeros)),
        ("attention.ort.onnx", on("all-linear", InitWeights::Zeros)),
        ("f12_if_yes.ts17.onnx", on("all-linear", InitWeights::Zeros)),
        // Its number of steps is an input without axes: one number for all rows.
        ("loop.ts17.onnx", on("all-linear", InitWeights::Zeros)),
        // Weights that are converted, scaled or moved before they are read.
        ("weights_f16.dyn18.onnx", on("all-linear", InitWeights::Zeros)),
        ("weights_bf16.ts17.onnx", on("all-linear", InitWeights::Zeros)),
        ("scaled.ts17.onnx", on("all-linear", InitWeights::Zeros)),
        ("moved.dyn18.onnx", on("all-linear", InitWeights::Bat)),
        ("moved.ts17.onnx", on("all-linear", InitWeights::Zeros)),
        ("packed_groups.ts17.onnx", groups),
    ];
    for (file, options) in cases {
        let what = format!("{file}, {:?}", options.config.init_weights);
        let (first, last) = steps(file, options);
        assert!((first - 0.065).abs() < 1e-4 && last < first - 1e-3, "{what}: the loss went from {first} to {last}");
    }
}

#[test]
fn branches_and_loops_learn_the_same_in_halves_and_with_activations_made_twice() {
    for file in ["f12_if_yes.ts17.onnx", "f13_cond.dyn18.onnx", "loop.ts17.onnx"] {
        let run = |change: fn(&mut TrainOptions)| losses(file, on("all-linear", InitWeights::Zeros), change);
        let plain = run(|_| ());
        let again = run(|o| o.recompute = true);
        let half = run(|o| o.precision = Precision::F16);
        let both = run(|o| (o.precision, o.recompute) = (Precision::F16, true));
        let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
        assert!(apart(&plain, &again) <= 1e-6, "{file}: {plain:?} {again:?}");
        // Ten bits of what is computed in halves.
        let rounding = apart(&plain, &half);
        assert!(rounding > 0.0 && rounding < 5e-3, "{file}: {plain:?} {half:?}");
        // The engine leaves out other casts among the copies.
        assert!(apart(&half, &both) <= 1e-4, "{file}: {half:?} {both:?}");
        assert!(plain[7] < 0.98 * plain[0], "{file}: {plain:?}");
    }
}
