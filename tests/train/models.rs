//! Every model in `../shared/models`: ten steps with adapters on all linear layers lower the loss.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::engine::LoadOptions;
use bone_onnx::fold::{FoldOptions, QuantizedFold, fold};
use bone_onnx::onnx::{DataType, Model, Tensor, TensorProto, ValueInfoProto};
use bone_onnx::train::{self, Loss, TrainOptions};
use bone_onnx::verify::random_inputs;
use serde_json::Value;

use crate::common::{injected, onnxruntime, shared, write_arrays};

/// The inputs that the model was exported with, where they are kept; else random ones of one row.
fn inputs(entry: &Value, model: &Model) -> BTreeMap<String, Tensor> {
    let Some(refs) = entry["refs"].as_str() else {
        return random_inputs(model, 1, 5, 1).expect("inputs");
    };
    let files = std::fs::read_dir(shared(&format!("models/{refs}"))).expect("references");
    let mut inputs = BTreeMap::new();
    for path in files.map(|e| e.expect("an entry").path()) {
        let file = path.file_name().expect("a name").to_string_lossy().into_owned();
        if let Some(name) = file.strip_prefix("in.").and_then(|n| n.strip_suffix(".pb")) {
            let bytes = std::fs::read(&path).expect("a tensor");
            let proto = <TensorProto as prost::Message>::decode(bytes.as_slice()).expect("a tensor");
            inputs.insert(name.to_string(), Tensor::from_proto(&proto).expect("a value"));
        }
    }
    inputs
}

/// The first output, and what the base computes for it.
fn first_output(model: &Model, inputs: &BTreeMap<String, Tensor>, options: &TrainOptions) -> (String, Tensor) {
    let mut session = onnxruntime().load(&model.to_inline().expect("tensors"), &options.load).expect("a session");
    let output = model.graph().output.first().map(ValueInfoProto::name).expect("an output").to_string();
    let names: Vec<String> = session.inputs().to_vec();
    let given: Vec<(&str, &Tensor)> = names.iter().map(|n| (n.as_str(), &inputs[n])).collect();
    let value = session.run(&given, &[&output]).expect("a run").remove(0);
    (output, value)
}

#[test]
fn ten_steps_lower_the_loss_of_every_model() {
    let manifest: Vec<Value> =
        serde_json::from_slice(&std::fs::read(shared("models/manifest.json")).expect("the manifest")).expect("json");
    let (mut trained, mut losses) = (0, BTreeMap::new());
    let mut failures = Vec::new();
    // The one that ONNX Runtime does not run: it has heads of 8, and GroupQueryAttention wants multiples of 16.
    for entry in manifest.iter().filter(|m| m["kind"] != "genai") {
        let name = entry["file"].as_str().expect("a file");
        match ten_steps(entry, &shared(&format!("models/{name}"))) {
            Ok((first, last)) if last < first => {
                trained += 1;
                losses.insert(name, (first, last));
            }
            Ok((first, last)) => failures.push(format!("{name}: the loss went from {first} to {last}")),
            Err(e) => failures.push(format!("{name}: {e}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(trained, 19);
    // The same model in float16 learns what it learns in float32.
    let (half, whole) = (losses["bert_fp16.dyn18.onnx"], losses["bert.dyn18.onnx"]);
    let share = |(first, last): (f64, f64)| last / first;
    assert!((share(half) - share(whole)).abs() <= 0.01, "{half:?} {whole:?}");
}

/// Loss of the first and of the tenth step. The goal is the base's own output with every other number moved.
fn ten_steps(entry: &Value, base: &Path) -> Result<(f64, f64), String> {
    let dir = tempfile::tempdir().expect("a directory");
    let model = Model::open(base).expect("a model");
    let inputs = inputs(entry, &model);
    let data = dir.path().join("data.safetensors");
    let options = TrainOptions::new(dir.path().join("out"), &data, Loss::Mse);
    let (output, value) = first_output(&model, &inputs, &options);
    assert!(matches!(value.data_type(), DataType::Float | DataType::Float16));
    let moved =
        value.to_f64().iter().enumerate().map(|(i, v)| *v as f32 + if i % 2 == 0 { 0.3 } else { -0.2 }).collect();
    let goal = Tensor::new(value.dims(), moved);
    let mut arrays: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    arrays.push(("goal", &goal));
    write_arrays(&data, &arrays);

    let injected = injected(base, dir.path(), 8, "all-linear", None);
    let options = TrainOptions { labels: "goal".into(), output: Some(output), steps: Some(10), lr: 3e-3, ..options };
    let summary = train::run(&injected, &options, onnxruntime(), &mut ()).map_err(|e| e.to_string())?;
    folds(&summary.injected, &inputs, &options.load);
    Ok((summary.steps[0].loss, summary.steps[9].loss))
}

/// What was learned folds, in each way that there is, to a model with the same outputs.
fn folds(injected: &Path, inputs: &BTreeMap<String, Tensor>, load: &LoadOptions) {
    let model = Model::open(injected).expect("a model");
    let merged = injected.with_file_name("merged.onnx");
    let outputs = |model: &Model| {
        let mut session = onnxruntime().load(&model.to_inline().expect("tensors"), load).expect("a session");
        let names: Vec<String> = session.inputs().to_vec();
        let given: Vec<(&str, &Tensor)> = names.iter().map(|n| (n.as_str(), &inputs[n])).collect();
        let output = model.graph().output[0].name().to_string();
        session.run(&given, &[&output]).expect("a run").remove(0)
    };
    let want = outputs(&model);
    for quantized in [QuantizedFold::Keep, QuantizedFold::Dequantize, QuantizedFold::Requantize] {
        let options = FoldOptions { safe: true, quantized, ..FoldOptions::default() };
        let summary = fold(&model, &options).and_then(|f| f.write(&model, &merged)).expect("a fold");
        assert_eq!(summary.warnings, Vec::<String>::new());
        let got = outputs(&Model::open(&merged).expect("a model"));
        let off = got.to_f64().iter().zip(want.to_f64()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        // float32 rounds at 6e-8, float16 at 5e-4; integers of 8 bits, of weights and on the way, at a few hundredths.
        let changes = summary.dequantized.len() + summary.requantized.len();
        let bound = match want.data_type() {
            DataType::Float16 => 1e-2,
            _ if changes > 0 => 5e-2,
            _ => 2e-5,
        };
        assert!(got.dims() == want.dims() && off <= bound, "{}, {quantized:?}: off by {off}", injected.display());
        if summary.kept.is_empty() && changes == 0 {
            return;
        }
    }
}

/// float64: the same network in both types learns the same.
#[test]
fn a_model_of_doubles_learns_as_one_of_floats() {
    use bone_onnx::onnx::proto::OperatorSetIdProto;
    use bone_onnx::onnx::{GraphProto, ModelProto, node, value_info};
    use prost::Message;
    let numbers = |n: usize, seed: usize| (0..n).map(move |i| ((i * 7919 + seed * 31) % 199) as f32 / 99.5 - 1.0);
    let tensor = |dims: &[usize], seed, double: bool| {
        let values = numbers(dims.iter().product(), seed);
        if double {
            Tensor::new(dims, values.map(f64::from).collect())
        } else {
            Tensor::new(dims, values.collect::<Vec<f32>>())
        }
    };
    let losses = [false, true].map(|double| {
        let element = if double { DataType::Double } else { DataType::Float };
        let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
        graph.input.push(value_info("x", element, &["n", "6"]));
        graph.output.push(value_info("y", element, &["n", "3"]));
        graph.initializer =
            vec![tensor(&[6, 8], 1, double).to_proto("a.weight"), tensor(&[8, 3], 2, double).to_proto("b.weight")];
        graph.node = vec![
            node("MatMul", &["x", "a.weight"], &["h"]),
            node("Tanh", &["h"], &["t"]),
            node("MatMul", &["t", "b.weight"], &["y"]),
        ];
        let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
        let model = ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() };
        let dir = tempfile::tempdir().expect("a directory");
        let base = dir.path().join("base.onnx");
        std::fs::write(&base, model.encode_to_vec()).expect("a file");
        let data = dir.path().join("data.safetensors");
        write_arrays(&data, &[("x", &tensor(&[16, 6], 3, double)), ("goal", &tensor(&[16, 3], 4, false))]);
        let injected = injected(&base, dir.path(), 2, "all-linear", None);
        let options = TrainOptions::new(dir.path().join("out"), &data, Loss::Mse);
        let options =
            TrainOptions { labels: "goal".into(), steps: Some(10), lr: 1e-2, batch_size: Some(16), ..options };
        let summary = train::run(&injected, &options, onnxruntime(), &mut ()).expect("a run");
        summary.steps.iter().map(|s| s.loss).collect::<Vec<f64>>()
    });
    assert!(losses[1][9] < 0.9 * losses[1][0], "{:?}", losses[1]);
    for (float, double) in losses[0].iter().zip(&losses[1]) {
        assert!((float - double).abs() <= 1e-5 * double, "{losses:?}");
    }
}
