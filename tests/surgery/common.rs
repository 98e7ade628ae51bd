//! What the tests share: where data lies, an engine, temporary files, reading vectors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bone_onnx::adapter::{BoneConfig, InitWeights, TargetModules};
use bone_onnx::engine::{self, Device, Engine, EngineKind, LoadOptions};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::{Model, Tensor, TensorProto};

/// A file of `../shared`, beside the checkout.
pub fn shared(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// ONNX Runtime; the test command sees to it that there is one.
pub fn engine() -> &'static dyn Engine {
    static ENGINE: OnceLock<Box<dyn Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| engine::open(EngineKind::OnnxRuntime, Device::Cpu).expect("ONNX Runtime")).as_ref()
}

/// All outputs of the model at `path`, in its order.
pub fn run(path: &Path, inputs: &BTreeMap<String, Tensor>) -> Vec<Tensor> {
    let model = Model::open(path).expect("a model");
    let options = LoadOptions { threads: Some(1), optimize: true };
    let mut session = engine().load(&model.to_inline().expect("tensors"), &options).expect("a session");
    let outputs: Vec<String> = session.outputs().to_vec();
    let names: Vec<String> = session.inputs().to_vec();
    let given: Vec<(&str, &Tensor)> = names.iter().map(|n| (n.as_str(), &inputs[n])).collect();
    session.run(&given, &outputs.iter().map(String::as_str).collect::<Vec<_>>()).expect("a run")
}

/// Largest absolute difference over all elements; infinite where shapes differ.
pub fn worst(a: &Tensor, b: &Tensor) -> f64 {
    if a.dims() != b.dims() {
        return f64::INFINITY;
    }
    a.to_f64()
        .iter()
        .zip(b.to_f64())
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}

/// A `TensorProto` in a file of its own (how the ONNX backend tests keep inputs and outputs).
pub fn tensor_file(path: &Path) -> Tensor {
    let bytes = std::fs::read(path).expect("a tensor file");
    Tensor::from_proto(&<TensorProto as prost::Message>::decode(bytes.as_slice()).expect("a tensor")).expect("a value")
}

/// Names of what stands in `dir`, sorted.
pub fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("a directory")
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into())
        .collect();
    names.sort();
    names
}

/// Injects adapters with random blocks into all linear layers of `base` and folds them: the directory to keep alive,
/// the adapted nodes (sorted), the injected model and the merged one. `None` where nothing can be adapted.
pub fn inject_and_fold(base: &Path) -> Option<(tempfile::TempDir, Vec<String>, PathBuf, PathBuf)> {
    let dir = tempfile::tempdir().expect("a directory");
    let (injected, merged) = (dir.path().join("injected.onnx"), dir.path().join("merged.onnx"));
    let target_modules = Some(TargetModules::Pattern("all-linear".into()));
    let config = BoneConfig { r: 4, init_weights: InitWeights::Random, target_modules, ..Default::default() };
    let model = Model::open(base).expect("a model");
    let injection = inject(&model, &InjectOptions { config, ..Default::default() }).ok()?;
    let summary = injection.write(&model, &injected).expect("a file");
    let model = Model::open(&injected).expect("a model");
    fold(&model, &FoldOptions::default()).and_then(|f| f.write(&model, &merged)).expect("a fold");
    let mut targets: Vec<String> = summary.targets.into_iter().flat_map(|t| t.nodes).collect();
    targets.sort();
    Some((dir, targets, injected, merged))
}
