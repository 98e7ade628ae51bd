//! Quantised models learn, and the gradient that passes straight through their rounding is that of the same model in
//! floating point.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bone_onnx::adapter::{BoneConfig, TargetModules};
use bone_onnx::autodiff::{Request, Rules, Seed, gradient, gradient_with};
use bone_onnx::engine::LoadOptions;
use bone_onnx::fold::{FoldOptions, QuantizedFold, fold};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::{DataType, Model, ModelProto, Tensor, value_info};
use bone_onnx::train::{self, Loss, TrainOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::common::{injected, onnxruntime, write_arrays};

/// The quantised models of `fixtures/quantized`.
const FIXTURES: [&str; 17] = [
    "cast_mul",
    "cast_sub_mul",
    "dynamic",
    "dynamic_optimized",
    "dynamic_u8",
    "dynamic_u8_optimized",
    "int4",
    "integer_to_float",
    "nbits4",
    "nbits4_zero",
    "nbits8",
    "qdq",
    "qdq_optimized",
    "qdq_u8",
    "qgemm",
    "qoperator",
    "uint4",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantized").join(format!("{name}.onnx"))
}

fn random(dims: &[usize], seed: u64, scale: f32) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Tensor::new(dims, (0..dims.iter().product()).map(|_| scale * rng.random_range(-1.0f32..1.0)).collect())
}

fn run(model: &ModelProto, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Vec<Tensor> {
    let options = LoadOptions { threads: Some(1), optimize: true };
    onnxruntime().load(model, &options).expect("a session").run(inputs, wanted).expect("a run")
}

/// Rows of x: the model takes them in two dimensions or in three.
fn rows(model: &Model, n: usize, seed: u64) -> Tensor {
    let rank = model.graph().input[0].tensor().and_then(|t| t.shape.as_ref()).expect("a shape").dim.len();
    let dims = if rank == 3 { vec![n, 1, 40] } else { vec![n, 40] };
    random(&dims, seed, 1.5)
}

/// The network moved: another bias and a few weights changed.
fn goal(model: &Model, x: &Tensor) -> Tensor {
    let y = run(&model.proto, &[("x", x)], &["y"]).remove(0);
    let moved = y.to_f64().into_iter().enumerate().map(|(i, v)| (v as f32) * 0.8 + if i % 2 == 0 { 0.2 } else { -0.1 });
    Tensor::new(y.dims(), moved.collect())
}

/// Trains `steps` steps on the fixture; the losses, and the injected model with what it learned.
fn trained(name: &str, dir: &Path, steps: usize) -> (Vec<f64>, PathBuf) {
    let base = Model::open(fixture(name)).expect("a model");
    let x = rows(&base, 32, 1);
    let data = dir.join("data.safetensors");
    write_arrays(&data, &[("x", &x), ("goal", &goal(&base, &x))]);
    let model = injected(&fixture(name), dir, 4, "all-linear", None);
    let options = TrainOptions {
        labels: "goal".into(),
        steps: Some(steps),
        lr: 3e-3,
        batch_size: Some(32),
        ..TrainOptions::new(dir.join("out"), &data, Loss::Mse)
    };
    let summary = train::run(&model, &options, onnxruntime(), &mut ()).expect(name);
    (summary.steps.iter().map(|s| s.loss).collect(), summary.injected)
}

#[test]
fn every_scheme_learns() {
    for name in FIXTURES {
        let dir = tempfile::tempdir().expect("a directory");
        let (losses, _) = trained(name, dir.path(), 12);
        println!("{name}: {losses:?}");
        assert!(losses[11] < 0.8 * losses[0], "{name}: {losses:?}");
    }
}

/// The fixture with its weights in floating point: what it computes but for the rounding of activations.
fn in_floats(name: &str, dir: &Path) -> Option<Model> {
    let base = Model::open(fixture(name)).expect("a model");
    let target_modules = Some(TargetModules::parse("all-linear"));
    let config = BoneConfig { r: 2, target_modules, ..Default::default() };
    let (injected, floats) = (dir.join("injected.onnx"), dir.join("floats.onnx"));
    inject(&base, &InjectOptions { config, ..Default::default() }).expect(name).write(&base, &injected).expect(name);
    let model = Model::open(&injected).expect("a model");
    let options = FoldOptions { quantized: QuantizedFold::Dequantize, ..FoldOptions::default() };
    let folded = fold(&model, &options).expect(name);
    if !folded.summary.kept.is_empty() {
        return None;
    }
    folded.write(&model, &floats).expect(name);
    Some(Model::open(&floats).expect("a model"))
}

/// Of the values before the network's kink (what the first layer gives, after its bias).
fn before_the_kink(float: &ModelProto, x: &Tensor) -> Tensor {
    let mut model = float.clone();
    let graph = model.graph.as_mut().expect("a graph");
    let relu = graph.node.iter().find(|n| n.is("Relu")).expect("a Relu").input[0].clone();
    graph.output.push(value_info(&relu, DataType::Float, &["n", "t", "48"]));
    run(&model, &[("x", x)], &[&relu]).remove(0)
}

/// d(y·seed)/dx.
fn gradient_by_x(model: &ModelProto, rules: Option<&Rules>, x: &Tensor, seed: &Tensor) -> Tensor {
    let request = Request { of: vec![("y".into(), Seed::Input)], wrt: vec!["x".into()], ..Default::default() };
    let gradient = match rules {
        Some(rules) => gradient_with(model, &request, rules),
        None => gradient(model, &request),
    }
    .expect("a gradient");
    run(&gradient.model, &[("x", x), ("y.seed", seed)], &[&gradient.gradients[0]]).remove(0)
}

#[test]
fn straight_through_is_the_gradient_of_the_model_in_floats() {
    let float = Model::open(fixture("float")).expect("a model");
    let (mut compared, mut failures) = (Vec::new(), Vec::new());
    for name in FIXTURES.into_iter().filter(|name| !name.starts_with("qgemm")) {
        let dir = tempfile::tempdir().expect("a directory");
        let base = Model::open(fixture(name)).expect("a model");
        let Some(floats) = in_floats(name, dir.path()) else { continue };
        // The network as it was exported, with the weights that the integers stand for.
        let mut twin = float.proto.clone();
        for (i, weight) in matrices(&floats).into_iter().enumerate() {
            let graph = twin.graph.as_mut().expect("a graph");
            let name = format!("lin{i}.weight");
            let stored = graph.initializer.iter_mut().find(|t| t.name() == name).expect("a weight");
            let dims = [stored.dims[0] as usize, stored.dims[1] as usize];
            *stored = Tensor::new(&dims, weight.into_iter().map(|w| w as f32).collect()).to_proto(&name);
        }
        // Rows that rounding brings over no kink: all values before it are far from zero, and in the quantisers' range.
        let x = rows(&base, 512, 7);
        let far: Vec<usize> = before_the_kink(&twin, &x)
            .to_f64()
            .chunks(48)
            .enumerate()
            .filter(|(_, row)| row.iter().all(|v| v.abs() > 0.08 && v.abs() < 2.2))
            .map(|(i, _)| i)
            .collect();
        assert!(far.len() >= 2, "{name}: {far:?}");
        let all = x.values::<f32>().expect("floats");
        let picked: Vec<f32> = far.iter().flat_map(|i| all[i * 40..(i + 1) * 40].to_vec()).collect();
        let x = Tensor::new(&[far.len(), 1, 40], picked);
        let seed = random(&[far.len(), 1, 6], 3, 1.0);
        let ours = gradient_by_x(&base.proto, Some(&Rules::straight_through()), &x, &seed);
        let theirs = gradient_by_x(&twin, None, &x, &seed);
        let size = theirs.to_f64().iter().fold(0f64, |m, v| m.max(v.abs()));
        let off = ours.to_f64().iter().zip(theirs.to_f64()).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
        if !(size > 0.1 && off <= 1e-5 * size) {
            failures.push(format!("{name}: off by {off} of {size}"));
        }
        compared.push(name);
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(compared.len() >= 14, "{compared:?}");
}

/// The gradient by x of a quantised activation is zero where it is out of range, and dy within.
#[test]
fn nothing_passes_where_a_quantiser_cuts() {
    use bone_onnx::onnx::proto::OperatorSetIdProto;
    use bone_onnx::onnx::{GraphProto, node};
    let mut graph = GraphProto { name: Some("g".into()), ..Default::default() };
    graph.input.push(value_info("x", DataType::Float, &["6"]));
    graph.output.push(value_info("y", DataType::Float, &["6"]));
    graph.initializer = vec![Tensor::scalar(0.5f32).to_proto("s"), Tensor::scalar(10u8).to_proto("z")];
    graph.node =
        vec![node("QuantizeLinear", &["x", "s", "z"], &["q"]), node("DequantizeLinear", &["q", "s", "z"], &["y"])];
    let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
    let model = ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() };
    // The grid goes from -5 to 122.5, and half a step farther rounds to its ends.
    let x = Tensor::new(&[6], vec![-5.3f32, -5.2, 0.1, 122.7, 122.8, 1e6]);
    let seed = Tensor::new(&[6], vec![1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let got = gradient_by_x(&model, Some(&Rules::straight_through()), &x, &seed);
    assert_eq!(got.to_f64(), [0.0, 2.0, 3.0, 4.0, 0.0, 0.0]);
    // The standard table refuses, and says why.
    let request = Request { of: vec![("y".into(), Seed::Input)], wrt: vec!["x".into()], ..Default::default() };
    let refusal = gradient(&model, &request).expect_err("a refusal").to_string();
    assert!(refusal.contains("QuantizeLinear"), "{refusal}");
}

/// The share of a weight that quantisation took, over all elements of both layers.
fn lost(exact: &[Vec<f64>], got: &[Vec<f64>]) -> f64 {
    let pairs = || exact.iter().zip(got).flat_map(|(e, g)| e.iter().zip(g));
    (pairs().map(|(e, g)| (e - g).powi(2)).sum::<f64>() / pairs().map(|(e, _)| e * e).sum::<f64>()).sqrt()
}

/// Both matrices of a model in floats, [in, out].
fn matrices(model: &Model) -> Vec<Vec<f64>> {
    let products = model.graph().node.iter().filter(|n| n.is("MatMul"));
    let weights = products.map(|n| {
        let tensor = model.graph().initializer.iter().find(|t| t.name() == n.input[1]).expect("a weight");
        model.tensor(tensor).expect("a weight").to_f64()
    });
    weights.collect()
}

/// An adapter that was trained costs a quantised weight no more than 1.5 times what quantisation cost the base.
#[test]
fn quantising_again_costs_little_more_than_the_first_time() {
    let float = matrices(&Model::open(fixture("float")).expect("a model"));
    let mut shown = BTreeMap::new();
    for name in ["int4", "uint4", "nbits4", "nbits4_zero", "nbits8", "cast_mul", "cast_sub_mul", "dynamic", "qdq"] {
        let dir = tempfile::tempdir().expect("a directory");
        let (_, path) = trained(name, dir.path(), 30);
        let model = Model::open(&path).expect("a model");
        let folded = |mode, model: &Model, file: &str| {
            let options = FoldOptions { quantized: mode, safe: true, ..FoldOptions::default() };
            let out = dir.path().join(file);
            let summary = fold(model, &options).and_then(|f| f.write(model, &out)).expect(name);
            (summary, Model::open(&out).expect("a model"))
        };
        // What quantisation cost the base.
        let base = matrices(&in_floats(name, dir.path()).expect("a model in floats"));
        let first = lost(&float, &base);
        // What it costs the merged weight: exact, and quantised again.
        let (_, exact) = folded(QuantizedFold::Dequantize, &model, "exact.onnx");
        let (summary, again) = folded(QuantizedFold::Requantize, &model, "again.onnx");
        assert_eq!(summary.requantized.len(), 2, "{name}: {:?}", summary.warnings);
        let again_path = dir.path().join("again.onnx");
        let twin = dir.path().join("twin");
        std::fs::create_dir(&twin).expect("a directory");
        let again = floats_of(&again, &again_path, &twin);
        let second = lost(&matrices(&exact), &matrices(&again));
        assert!(second <= 1.5 * first, "{name}: {second} after {first}");
        // What the summary says is what it is.
        let said = summary.requantized.iter().map(|l| l.error).fold(0.0, f64::max);
        assert!(said >= 0.5 * second && said <= 2.0 * second, "{name}: {said} said, {second} measured");
        shown.insert(name, (first, second));
    }
    println!("{shown:?}");
}

/// A quantised model with its weights in floating point.
fn floats_of(model: &Model, path: &Path, dir: &Path) -> Model {
    let config = BoneConfig { r: 2, target_modules: Some(TargetModules::parse("all-linear")), ..Default::default() };
    let injected = dir.join("injected.onnx");
    inject(model, &InjectOptions { config, ..Default::default() })
        .expect("an injection")
        .write(model, &injected)
        .expect("a file");
    let model = Model::open(&injected).expect("a model");
    let out = dir.join(path.file_name().expect("a name"));
    let options = FoldOptions { quantized: QuantizedFold::Dequantize, ..FoldOptions::default() };
    fold(&model, &options).and_then(|f| f.write(&model, &out)).expect("a fold");
    Model::open(&out).expect("a model")
}
