//! What the rows share: base models with their inputs, the variants, adapters with values, and a bench on which each
//! step of the tool makes one file from another.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bone_onnx::adapter::{Adapter, BoneConfig, InitWeights, Injection, TargetModules};
use bone_onnx::engine::{self, Device, Engine, EngineKind, LoadOptions};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{self, InjectOptions};
use bone_onnx::onnx::{Durability, Model, Patch, Store, Tensor, TensorProto, write_beside};
use bone_onnx::unload::unload;
use bone_onnx::verify::random_inputs;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

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

/// A base model, what to run it on, and two different sets of its linear layers.
pub struct Subject {
    pub name: &'static str,
    pub path: PathBuf,
    pub inputs: BTreeMap<String, Tensor>,
    pub first: &'static [&'static str],
    pub second: &'static [&'static str],
    base: OnceLock<Vec<Tensor>>,
}

/// The MLP 12 → 20 → 4 as Gemm over rows and as MatMul over `[4, 4, 12]`.
pub fn mlps() -> Vec<Subject> {
    let bytes = std::fs::read(shared("goldens/mlp/base.safetensors")).expect("the data");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let x: Vec<f32> =
        file.tensor("x").expect("x").data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let forms: [(&str, &[usize]); 2] = [("base_gemm", &[16, 12]), ("base_matmul", &[4, 4, 12])];
    forms
        .into_iter()
        .map(|(name, dims)| Subject {
            name,
            path: shared(&format!("goldens/mlp/{name}.onnx")),
            inputs: BTreeMap::from([("x".to_string(), Tensor::new(dims, x.clone()))]),
            first: &["lin0"],
            second: &["lin1"],
            base: OnceLock::new(),
        })
        .collect()
}

/// Transformers of every sort: encoder, decoder, Conv1D (GPT-2), layers in the branches of an `If` (T5), a tied head.
pub fn transformers() -> Vec<Subject> {
    let table: [(&str, &str, &[&str], &[&str]); 6] = [
        ("goldens/bert/base", "", &["query", "value"], &["attention.output.dense"]),
        ("models/bert.ts17", "bert", &["query", "value"], &["attention.output.dense"]),
        ("models/llama.ts17", "llama", &["q_proj", "v_proj"], &["down_proj"]),
        ("models/gpt2.ts17", "gpt2", &["c_attn"], &["c_proj"]),
        ("models/t5_decoder_merged.optimum18", "", &["q", "v"], &["wo"]),
        ("models/qwen2_tied_nofold.ts17", "qwen2_tied", &["v_proj"], &["lm_head"]),
    ];
    table
        .into_iter()
        .map(|(name, refs, first, second)| {
            let path = shared(&format!("{name}.onnx"));
            let inputs = match refs {
                "" => small(random_inputs(&Model::open(&path).expect(name), 2, 5, 1).expect(name)),
                refs => references(&shared(&format!("models/refs/{refs}"))),
            };
            Subject { name, path, inputs, first, second, base: OnceLock::new() }
        })
        .collect()
}

/// A model from elsewhere.
pub fn models_of(
    name: &'static str,
    path: PathBuf,
    inputs: BTreeMap<String, Tensor>,
    first: &'static [&'static str],
    second: &'static [&'static str],
) -> Subject {
    Subject { name, path, inputs, first, second, base: OnceLock::new() }
}

/// Fractions as small as a model's own hidden states are, so that 1e-6 is more than a few steps of float32.
fn small(inputs: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let scaled = |tensor: Tensor| match tensor.values::<f32>() {
        Some(values) => Tensor::new(tensor.dims(), values.iter().map(|v| v * 0.2).collect()),
        None => tensor,
    };
    inputs.into_iter().map(|(name, tensor)| (name, scaled(tensor))).collect()
}

/// The inputs that a model was exported with.
pub fn references(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut inputs = BTreeMap::new();
    for path in std::fs::read_dir(dir).expect("references").map(|e| e.expect("an entry").path()) {
        let file = path.file_name().expect("a name").to_string_lossy().into_owned();
        if let Some(name) = file.strip_prefix("in.").and_then(|n| n.strip_suffix(".pb")) {
            let bytes = std::fs::read(&path).expect("a tensor");
            let proto = <TensorProto as prost::Message>::decode(bytes.as_slice()).expect("a tensor");
            inputs.insert(name.to_string(), Tensor::from_proto(&proto).expect("a value"));
        }
    }
    inputs
}

/// An adapter's kind and sizes.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    pub name: &'static str,
    pub init: InitWeights,
    pub r: usize,
    pub mini_r: usize,
}

const fn variant(name: &'static str, init: InitWeights, r: usize, mini_r: usize) -> Variant {
    Variant { name, init, r, mini_r }
}

/// No layer of the subjects has an input that 7 divides, and none has 150 inputs.
pub const VARIANTS: [Variant; 8] = [
    variant("Bone", InitWeights::Zeros, 4, 1),
    variant("Bone, random start", InitWeights::Random, 4, 1),
    variant("Bone, padded", InitWeights::Zeros, 7, 1),
    variant("Bone, r > in", InitWeights::Zeros, 150, 1),
    variant("BAT", InitWeights::Bat, 4, 1),
    variant("mini", InitWeights::Mini, 4, 2),
    variant("mini, padded", InitWeights::Mini, 7, 4),
    variant("mini, r > in", InitWeights::Mini, 150, 1),
];

/// One of each arithmetic: padded Bone, BAT, padded mini.
pub const KINDS: [Variant; 3] = [VARIANTS[2], VARIANTS[4], VARIANTS[6]];

/// Those that start as zeros.
pub fn zero_starts() -> Vec<Variant> {
    VARIANTS.into_iter().filter(|v| v.init != InitWeights::Random).collect()
}

impl Variant {
    pub fn config(&self, targets: &[&str]) -> BoneConfig {
        BoneConfig {
            r: self.r,
            mini_r: self.mini_r,
            init_weights: self.init,
            target_modules: Some(TargetModules::List(targets.iter().map(|t| t.to_string()).collect())),
            ..Default::default()
        }
    }
}

/// Runs `check` on the MLPs with every variant and on the transformers with one of each arithmetic.
pub fn everywhere(check: impl Fn(&Subject, &Variant, &str)) {
    each(&mlps(), &VARIANTS, &check);
    each(&transformers(), &KINDS, &check);
}

/// Runs `check` on these subjects with these variants.
pub fn each(subjects: &[Subject], variants: &[Variant], check: impl Fn(&Subject, &Variant, &str)) {
    for subject in subjects {
        for variant in variants {
            check(subject, variant, &format!("{} with {}", subject.name, variant.name));
        }
    }
}

impl Subject {
    /// An adapter that fits and whose every value is something: blocks drawn from ±0.3, and what trains in full moved.
    pub fn adapter(&self, name: &str, config: BoneConfig, seed: u64) -> Adapter {
        let bench = Bench::new();
        let fresh = bench.inject(&self.path, name, config);
        let mut adapter = extracted(&fresh, name);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for value in adapter.blocks.values_mut() {
            let values = (0..value.len()).map(|_| rng.random_range(-0.3f32..0.3)).collect();
            *value = Tensor::new(value.dims(), values);
        }
        for value in adapter.saved.values_mut() {
            let values = value.to_f64().iter().map(|v| *v as f32 + rng.random_range(-0.3f32..0.3)).collect();
            *value = Tensor::new(value.dims(), values);
        }
        adapter
    }

    /// All outputs of the model at `path`, in its order.
    pub fn run(&self, path: &Path) -> Vec<Tensor> {
        let model = Model::open(path).expect("a model");
        let options = LoadOptions { threads: Some(1), optimize: true };
        let mut session = engine().load(&model.to_inline().expect("tensors"), &options).expect("a session");
        let outputs: Vec<String> = session.outputs().to_vec();
        let names: Vec<String> = session.inputs().to_vec();
        let given: Vec<(&str, &Tensor)> = names.iter().map(|n| (n.as_str(), &self.inputs[n])).collect();
        session.run(&given, &outputs.iter().map(String::as_str).collect::<Vec<_>>()).expect("a run")
    }

    /// What the base computes.
    pub fn base(&self) -> &[Tensor] {
        self.base.get_or_init(|| self.run(&self.path))
    }
}

pub fn record(path: &Path) -> Injection {
    Injection::expect(&Model::open(path).expect("a model")).expect("a record")
}

/// The values of an adapter in the injected model at `path`.
pub fn extracted(path: &Path, name: &str) -> Adapter {
    let model = Model::open(path).expect("a model");
    inject::extract(&model, &Injection::expect(&model).expect("a record"), name).expect("an adapter")
}

/// The initializers of the main graph by name.
pub fn initializers(path: &Path) -> BTreeMap<String, Tensor> {
    let model = Model::open(path).expect("a model");
    let tensors = model.graph().initializer.iter();
    tensors.map(|t| (t.name().to_string(), model.tensor(t).expect("a value"))).collect()
}

pub fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("a file")
}

/// Names of what stands in `dir`, sorted.
pub fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let mut names: Vec<String> = entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into()).collect();
    names.sort();
    names
}

/// A directory in which every step writes a new file.
pub struct Bench {
    dir: tempfile::TempDir,
    made: Cell<usize>,
}

impl Bench {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory"), made: Cell::new(0) }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path that nothing stands at.
    pub fn next(&self) -> PathBuf {
        self.made.set(self.made.get() + 1);
        self.dir.path().join(format!("{}.onnx", self.made.get()))
    }

    fn change(&self, model: &Path, patch: impl FnOnce(&Model) -> bone_onnx::Result<Patch>) -> PathBuf {
        let (model, out) = (Model::open(model).expect("a model"), self.next());
        let write = |patch| write_beside(&model, patch, &out, Durability::Buffered);
        patch(&model).and_then(write).unwrap_or_else(|e| panic!("{e}"));
        out
    }

    /// PEFT's `get_peft_model` and `add_adapter`.
    pub fn inject(&self, model: &Path, name: &str, config: BoneConfig) -> PathBuf {
        let options = InjectOptions { adapter_name: name.into(), config, seed: 1, ..Default::default() };
        self.change(model, |model| inject::inject(model, &options).map(|i| i.patch))
    }

    /// `load_adapter`.
    pub fn import(&self, model: &Path, adapter: &Adapter) -> PathBuf {
        self.change(model, |model| inject::import(model, adapter.clone(), false, false).map(|i| i.patch))
    }

    /// `set_adapter`; without names `disable_adapter`.
    pub fn activate(&self, model: &Path, names: &[&str]) -> PathBuf {
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        self.change(model, |model| inject::activate(model, &names))
    }

    /// `delete_adapter`.
    pub fn delete(&self, model: &Path, name: &str) -> PathBuf {
        self.change(model, |model| inject::delete(model, name))
    }

    /// `unload`.
    pub fn unload(&self, model: &Path) -> PathBuf {
        self.change(model, unload)
    }

    pub fn fold(&self, model: &Path, options: FoldOptions) -> PathBuf {
        let (out, options) = (
            self.next(),
            FoldOptions { store: Store { durability: Durability::Buffered, ..Default::default() }, ..options },
        );
        fold_to(model, &options, &out).unwrap_or_else(|e| panic!("{e}"));
        out
    }

    /// `merge_and_unload` of the active adapters.
    pub fn merge(&self, model: &Path) -> PathBuf {
        self.fold(model, FoldOptions::default())
    }

    /// `merge_and_unload(adapter_names=…)`.
    pub fn merge_named(&self, model: &Path, names: &[&str]) -> PathBuf {
        let adapters = Some(names.iter().map(|n| n.to_string()).collect());
        self.fold(model, FoldOptions { adapters, ..Default::default() })
    }

    /// `unmerge_adapter`, of adapters that were merged in this order.
    pub fn unmerge(&self, merged: &Path, adapters: &[&Adapter]) -> PathBuf {
        let extra = adapters.iter().map(|a| (*a).clone()).collect();
        self.fold(merged, FoldOptions { extra, undo: true, ..Default::default() })
    }
}

pub fn fold_to(model: &Path, options: &FoldOptions, out: &Path) -> bone_onnx::Result<()> {
    let model = Model::open(model)?;
    fold(&model, options)?.write(&model, out).map(|_| ())
}

/// Whether all outputs agree to `|a − b| ≤ tolerance·(1 + |b|)`, as `torch.allclose` with `atol = rtol = tolerance`.
pub fn close(a: &[Tensor], b: &[Tensor], tolerance: f64) -> bool {
    allclose(a, b, tolerance, tolerance)
}

pub fn allclose(a: &[Tensor], b: &[Tensor], rtol: f64, atol: f64) -> bool {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).all(|(a, b)| {
        let pairs = || a.to_f64().into_iter().zip(b.to_f64());
        a.dims() == b.dims() && pairs().all(|(a, b)| (a - b).abs() <= atol + rtol * b.abs())
    })
}

/// The largest difference, for messages.
pub fn off(a: &[Tensor], b: &[Tensor]) -> f64 {
    let each = a.iter().zip(b).flat_map(|(a, b)| a.to_f64().into_iter().zip(b.to_f64()));
    each.map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) })
}

#[track_caller]
pub fn assert_close(a: &[Tensor], b: &[Tensor], tolerance: f64, what: &str) {
    assert!(close(a, b, tolerance), "{what}: off by {:e}", off(a, b));
}

/// Some output is further off than the tolerance allows.
#[track_caller]
pub fn assert_differs(a: &[Tensor], b: &[Tensor], tolerance: f64, what: &str) {
    assert!(!close(a, b, tolerance), "{what}: off only by {:e}", off(a, b));
}
