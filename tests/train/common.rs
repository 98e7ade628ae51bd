//! What the tests share: where data lies, engines, injected models, data files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bone_onnx::adapter::{BoneConfig, TargetModules};
use bone_onnx::engine::{self, Device, Engine, EngineKind};
use bone_onnx::inject::{HeadOptions, InjectOptions, inject};
use bone_onnx::onnx::{DataType, Model, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// A file of `../shared`, beside the checkout.
pub fn shared(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// The MLP 12 → 20 → 4 of the goldens: `base_gemm.onnx` or `base_matmul.onnx`.
pub fn mlp(file: &str) -> PathBuf {
    shared("goldens/mlp").join(file)
}

pub fn onnxruntime() -> &'static dyn Engine {
    static ENGINE: OnceLock<Box<dyn Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| engine::open(EngineKind::OnnxRuntime, Device::Cpu).expect("ONNX Runtime")).as_ref()
}

pub fn tract() -> &'static dyn Engine {
    static ENGINE: OnceLock<Box<dyn Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| engine::open(EngineKind::Tract, Device::Cpu).expect("tract")).as_ref()
}

/// Injects a block of `r` rows into `targets` of the model at `base`, and a head, and writes `dir/start.onnx`.
pub fn injected(base: &Path, dir: &Path, r: usize, targets: &str, head: Option<HeadOptions>) -> Model {
    let target_modules = (!targets.is_empty()).then(|| TargetModules::parse(targets));
    let config = BoneConfig { r, target_modules, ..Default::default() };
    let model = Model::open(base).expect("a base model");
    let path = dir.join("start.onnx");
    let options = InjectOptions { config, head, seed: 1, ..Default::default() };
    inject(&model, &options).expect("an injection").write(&model, &path).expect("a file");
    Model::open(path).expect("an injected model")
}

/// The arrays of a `.safetensors` file.
pub fn arrays(path: &Path) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    file.iter()
        .map(|(name, view)| {
            let data_type = match view.dtype() {
                Dtype::F32 => DataType::Float,
                Dtype::I64 => DataType::Int64,
                other => panic!("{name} holds {other:?}"),
            };
            let tensor = Tensor::from_bytes(data_type, view.shape(), view.data()).expect("a tensor");
            (name.to_string(), tensor)
        })
        .collect()
}

/// Writes a `.safetensors` file of these arrays.
pub fn write_arrays(path: &Path, arrays: &[(&str, &Tensor)]) {
    let bytes: Vec<Vec<u8>> = arrays.iter().map(|(_, t)| t.to_bytes()).collect();
    let views = arrays.iter().zip(&bytes).map(|((name, t), bytes)| {
        let dtype = match t.data_type() {
            DataType::Float => Dtype::F32,
            DataType::Double => Dtype::F64,
            DataType::Int64 => Dtype::I64,
            DataType::Bool => Dtype::BOOL,
            other => panic!("{name} holds {other:?}"),
        };
        (*name, TensorView::new(dtype, t.dims().to_vec(), bytes).expect("a view"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("arrays")).expect("a file");
}

/// Names of what stands in `dir`, sorted.
pub fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let mut names: Vec<String> = entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into()).collect();
    names.sort();
    names
}

/// The lines of a `metrics.jsonl`.
pub fn metrics(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    text.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
}
