//! What exporters and tools leave behind: each model of `fixtures/exported` has the layers that PyTorch has, under their
//! names, and computes what PyTorch computes, plain, adapted and folded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bone_onnx::adapter::{Adapter, BoneConfig, InitWeights, TargetModules};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, import, inject};
use bone_onnx::inline::Layers;
use bone_onnx::onnx::{DataType, Model, Tensor};
use bone_onnx::select::{Linear, Source};
use bone_onnx::unload::unload;
use safetensors::{Dtype, SafeTensors};

use crate::common::{run, worst};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exported")
}

/// PyTorch's truth about one model.
#[derive(Default)]
struct Truth {
    inputs: BTreeMap<String, Tensor>,
    /// The outputs, and those of the model with the blocks in it.
    outputs: Vec<Tensor>,
    adapted: Vec<Tensor>,
    /// Those with the sums in the type that the file stores weights in, where that is less than float32.
    merged: Vec<Tensor>,
    /// Weight `[out, in]` and block of the modules that are adapted, by path.
    weights: BTreeMap<String, Tensor>,
    blocks: BTreeMap<String, Tensor>,
    /// What has to be said of a model whose graph does not tell where its packed layer is cut.
    packed_sizes: &'static [(&'static str, usize)],
}

const GROUPS: (&str, &[(&str, usize)]) = ("packed_groups.ts17.onnx", &[("q_proj", 8), ("k_proj", 4), ("v_proj", 4)]);

fn truths() -> BTreeMap<String, Truth> {
    let bytes = std::fs::read(folder().join("truth.safetensors")).expect("the truth");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut truths: BTreeMap<String, Truth> = BTreeMap::new();
    let mut names: Vec<&str> = file.names().into_iter().collect();
    names.sort_unstable();
    for name in names {
        let view = file.tensor(name).expect("a tensor");
        let data_type = match view.dtype() {
            Dtype::F32 => DataType::Float,
            Dtype::I64 => DataType::Int64,
            other => panic!("{name} holds {other:?}"),
        };
        let value = Tensor::from_bytes(data_type, view.shape(), view.data()).expect("a value");
        let (model, what) = name.split_once('/').expect("a model");
        let truth = truths.entry(model.into()).or_default();
        match what.split_once('.').expect("a kind") {
            ("in", input) => drop(truth.inputs.insert(input.into(), value)),
            ("out", _) => truth.outputs.push(value),
            ("adapted", _) => truth.adapted.push(value),
            ("merged", _) => truth.merged.push(value),
            ("W", path) => drop(truth.weights.insert(path.into(), value)),
            ("B", path) => drop(truth.blocks.insert(path.into(), value)),
            (other, _) => panic!("{other}"),
        }
    }
    truths.get_mut(GROUPS.0).expect("this model").packed_sizes = GROUPS.1;
    truths
}

impl Truth {
    /// The inputs by the names that the exporter gave them.
    fn inputs_of(&self, model: &Model) -> BTreeMap<String, Tensor> {
        let names = model.graph().input.iter().map(|i| i.name().to_string());
        let only = self.inputs.values().next().expect("an input");
        names.map(|name| (name.clone(), self.inputs.get(&name).unwrap_or(only).clone())).collect()
    }

    fn adapter(&self, r: usize) -> Adapter {
        let target_modules = Some(TargetModules::List(self.blocks.keys().cloned().collect()));
        let packed_sizes = self.packed_sizes.iter().map(|(name, size)| (name.to_string(), *size)).collect();
        let config = BoneConfig { r, target_modules, packed_sizes, ..Default::default() };
        Adapter { name: "default".into(), config, blocks: self.blocks.clone(), saved: BTreeMap::new() }
    }
}

fn assert_close(got: &[Tensor], wanted: &[Tensor], what: &str) {
    assert_within(got, wanted, 1e-5, what);
}

/// How far outputs move where the weights of `file` are stored anew, in the type that they have there.
fn rounding(file: &str) -> f64 {
    match file.split('.').next() {
        Some("weights_f16" | "chains") => 8.0 * f64::powi(2.0, -11),
        Some("weights_bf16") => 8.0 * f64::powi(2.0, -8),
        _ => 1e-5,
    }
}

fn assert_within(got: &[Tensor], wanted: &[Tensor], limit: f64, what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (got, wanted) in got.iter().zip(wanted) {
        // An exporter adds or drops axes of one here and there.
        let flat = |t: &Tensor| Tensor::new::<f32>(&[t.len()], t.to_f64().iter().map(|v| *v as f32).collect());
        let off = worst(&flat(got), &flat(wanted));
        assert!(off <= limit, "{what}: off by {off}");
    }
}

fn written(model: &Model, injected: bone_onnx::inject::Injected, path: &Path) -> Model {
    injected.write(model, path).expect("a file");
    Model::open(path).expect("a model")
}

#[test]
fn every_model_computes_what_pytorch_computes_plain_adapted_and_folded() {
    let truths = truths();
    assert_eq!(truths.len(), 52);
    for (file, mut truth) in truths {
        if file.starts_with("weight_out") {
            // A weight that leaves the graph as an output is a result of the base, not of the adapter.
            truth.adapted.splice(1.., truth.outputs[1..].iter().cloned());
        }
        let base = Model::open(folder().join(&file)).expect("a model");
        let inputs = truth.inputs_of(&base);
        assert_close(&run(&base.path, &inputs), &truth.outputs, &file);
        let dir = tempfile::tempdir().expect("a directory");
        let (path, merged, back) =
            (dir.path().join("injected.onnx"), dir.path().join("merged.onnx"), dir.path().join("back.onnx"));
        let injection = import(&base, truth.adapter(3), false, false).unwrap_or_else(|e| panic!("{file}: {e}"));
        let injected = written(&base, injection, &path);
        assert_close(&run(&path, &inputs), &truth.adapted, &format!("{file}, adapted"));
        fold(&injected, &FoldOptions { safe: true, ..FoldOptions::default() })
            .and_then(|f| f.write(&injected, &merged))
            .unwrap_or_else(|e| panic!("{file}: {e}"));
        let stored = if truth.merged.is_empty() { &truth.adapted } else { &truth.merged };
        assert_close(&run(&merged, &inputs), stored, &format!("{file}, folded"));
        injected.write(injected.patched(unload(&injected).expect("unload")).expect("a patch"), &back).expect("a file");
        assert!(std::fs::read(&back).expect("a file") == base.source, "{file}: unload gives other bytes");
    }
}

/// The name of a layer is the module's whose weight it has.
#[test]
fn every_name_is_that_of_the_module_with_this_weight() {
    let mut checked = 0;
    for (file, truth) in truths() {
        let base = Model::open(folder().join(&file)).expect("a model");
        let found = Layers::of(&base).expect("layers");
        for (path, weight) in &truth.weights {
            let linear = found.linears.iter().find(|l| l.path == *path);
            let linear = linear.unwrap_or_else(|| panic!("{file} has no {path}"));
            if file == GROUPS.0 {
                assert!(linear.adaptable.clone().unwrap_err().contains("--packed-sizes q_proj=…,k_proj=…,v_proj=…"));
                continue;
            }
            if !linear.weight.is_matrix() {
                continue;
            }
            let stored = stored(found.model(&base), linear);
            assert_eq!(stored, weight.to_f64(), "{file}: {path}");
            checked += 1;
        }
    }
    assert!(checked > 80, "{checked}");
}

/// What is merged into weights of half precision under a model in single differs from the injected model by their
/// rounding: to 11 bits (float16) or 8 (bfloat16), summed over the three layers.
#[test]
fn weights_in_half_precision_round_what_is_merged_into_them() {
    for file in ["weights_f16.ts17.onnx", "weights_bf16.ts17.onnx"] {
        let truth = &truths()[file];
        let base = Model::open(folder().join(file)).expect("a model");
        let inputs = truth.inputs_of(&base);
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let injection = import(&base, truth.adapter(3), false, false).expect("an injection");
        let injected = written(&base, injection, &at("injected.onnx"));
        let folded = fold(&injected, &FoldOptions::default()).expect("a fold");
        assert_eq!((folded.summary.merged.len(), folded.summary.copied.len()), (3, 0));
        folded.write(&injected, &at("merged.onnx")).expect("a file");
        let off = worst(&run(&at("injected.onnx"), &inputs)[0], &run(&at("merged.onnx"), &inputs)[0]);
        let limit = rounding(file);
        assert!(off > limit / 500.0 && off < limit, "{file}: off by {off} of {limit}");
        // The weights are where they were, in their type.
        let tensors = |path: &Path| -> Vec<(String, i32, Vec<i64>)> {
            let model = Model::open(path).expect("a model");
            model.graph().initializer.iter().map(|t| (t.name().into(), t.data_type(), t.dims.clone())).collect()
        };
        assert_eq!(tensors(&at("merged.onnx")), tensors(&base.path));
    }
}

/// A weight that something else reads as well, or that a scale of 0 hides, is left, and a new one made.
#[test]
fn a_weight_behind_nodes_is_copied_where_it_cannot_change() {
    let fold_of = |modules: &[&str]| {
        let base = Model::open(folder().join("two_ways.ts17.onnx")).expect("a model");
        let mut truth = truths().remove("two_ways.ts17.onnx").expect("the truth");
        truth.blocks.retain(|path, _| modules.contains(&path.as_str()));
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        let injection = import(&base, truth.adapter(3), false, false).expect("an injection");
        let injected = written(&base, injection, &at("injected.onnx"));
        let folded = fold(&injected, &FoldOptions::default()).expect("a fold");
        let summary = folded.write(&injected, &at("merged.onnx")).expect("a file");
        let inputs = truth.inputs_of(&base);
        assert_close(&run(&at("injected.onnx"), &inputs), &run(&at("merged.onnx"), &inputs), "folded");
        let value = |model: &Model, name: &str| {
            let found = model.graph().initializer.iter().find(|t| t.name() == name);
            found.map(|t| model.tensor(t).expect("a value"))
        };
        let merged = Model::open(at("merged.onnx")).expect("a model");
        let same = |name: &str| value(&base, name) == value(&merged, name);
        let ops: Vec<String> = merged.graph().node.iter().map(|n| n.op_type().to_string()).collect();
        (summary, same("shared"), value(&merged, "masked").is_some(), ops)
    };
    let (summary, same, ..) = fold_of(&["MatMul_1"]);
    assert_eq!((summary.copied, same), (vec!["MatMul_1".to_string()], true));
    let (summary, same, ..) = fold_of(&["MatMul"]);
    assert_eq!((summary.copied, same), (vec!["MatMul".to_string()], true));
    // Both read it, in two ways: it changes for the first.
    let (summary, same, ..) = fold_of(&["MatMul", "MatMul_1"]);
    assert_eq!((summary.merged, summary.copied, same), (vec!["MatMul".into()], vec!["MatMul_1".to_string()], false));
    // What nobody reads any longer goes.
    let (summary, _, masked, ops) = fold_of(&["MatMul_2"]);
    assert_eq!((&summary.copied[..], masked), (&["MatMul_2".to_string()][..], false));
    assert_eq!(ops.iter().filter(|op| *op == "Mul").count(), 1);
    assert!(
        summary.warnings[0].contains("MatMul_2: it gets a weight of its own: masked is scaled by 0"),
        "{summary:?}"
    );
}

/// The weight of a layer as `[out, in]`.
fn stored(model: &Model, linear: &Linear) -> Vec<f64> {
    let graph = |scope| model.graph_at(scope).expect("a graph");
    let tensor = match &linear.weight.source {
        Source::Initializer { scope, index } => &graph(scope).initializer[*index],
        Source::ConstantNode { scope, node } => {
            graph(scope).node[*node].attr("value").and_then(|a| a.t.as_ref()).expect("a tensor")
        }
    };
    let values = model.tensor(tensor).expect("a value").to_f64();
    let (inputs, start) = (linear.in_features, linear.part.as_ref().map_or(0, |p| p.start));
    let all = values.len() / inputs;
    let at = |o: usize, i: usize| if linear.is_stored_out_in() { o * inputs + i } else { i * all + o };
    (0..linear.out_features)
        .flat_map(|o| (0..inputs).map(move |i| (o, i)))
        .map(|(o, i)| values[at(start + o, i)])
        .collect()
}

/// Each layer of a model: its module (or node) and the clue that named it.
fn names(file: &str) -> Vec<String> {
    let model = Model::open(folder().join(file)).expect("a model");
    let found = Layers::of(&model).expect("layers");
    found.linears.iter().map(|l| format!("{} ({})", l.key(), l.rule.clue())).collect()
}

#[test]
fn the_failure_cases_of_naming() {
    let cases: &[(&str, &[&str])] = &[
        // F2: the second call is lin_1 by its node, and lin by its weight.
        ("f2_twice.ts17.onnx", &["lin (node)", "lin (repeated call)", "lin_1 (bias and node)"]),
        ("f2_twice.dyn18.onnx", &["lin (metadata)", "lin (metadata)", "lin_1 (metadata)"]),
        // F3: only the bias still tells the ModuleDict.
        ("f3_dict.ts17.onnx", &["dct.a (bias and node)", "dct.b (bias and node)"]),
        ("f3_dict_nobias.ts17.onnx", &["a (node)", "b (node)"]),
        // F5 and F15: no module has these matrices.
        ("f5_bare.ts17.onnx", &["/MatMul (-)", "lin (bias and node)", "/MatMul_1 (-)"]),
        ("f5_bare.dyn18.onnx", &["node_matmul (-)", "lin (metadata)", "node_matmul_1 (-)"]),
        // F6: the packed projection bears its module's name, and out_proj its own.
        ("f6_mha.ts17.onnx", &["self_attn (node)", "self_attn.out_proj (weight)", "head (bias and node)"]),
        ("f6_mha.dyn18.onnx", &["self_attn (metadata)", "self_attn.out_proj (metadata)", "head (metadata)"]),
        // F7: nothing is left.
        ("f7_stripped.dyn18.ort.onnx", &["node_linear (-)", "node_linear_1 (-)"]),
        // F9: the residual sums name nothing.
        ("f9_residual.ts17.onnx", &["lin (node)", "out (node)"]),
        // F11: the layer of a constant is not there.
        ("f11_constant.dyn18.onnx", &["lin (metadata)"]),
        // F12: the branches are told apart; a class that is exported again has lost its scopes.
        (
            "f12_if_yes.ts17.onnx",
            &["outer (node)", "yes (bias and node)", "no (bias and node)", "outer (repeated call)"],
        ),
        ("f12_if_no.ts17.onnx", &["/MatMul (-)", "yes (bias)", "no (bias)", "/MatMul_3 (-)"]),
        // F13: within torch.cond only the biases tell.
        ("f13_cond.dyn18.onnx", &["outer (metadata)", "yes (bias)", "no (bias)"]),
        ("functions.onnx", &["first (weight)", "second (weight)", "n3/n1 (-)"]),
        ("constants.ts17.onnx", &["/MatMul (-)", "/MatMul_1 (-)"]),
    ];
    for (file, wanted) in cases {
        assert_eq!(&names(file), wanted, "{file}");
    }
}

/// F1: every zero bias bears the first one's name, and equal layers share their matrices; each has its own name.
#[test]
fn merged_parameters_name_nobody_else() {
    for file in ["f1_merged.ts17.onnx", "f1_merged.dyn18.onnx"] {
        let names = names(file);
        for layer in ["layers.0", "layers.1"] {
            let modules: Vec<&str> = names.iter().filter_map(|n| n.strip_prefix(layer)?.split(' ').next()).collect();
            assert_eq!(modules, [".self_attn", ".self_attn", ".linear1", ".linear2"], "{file}");
        }
    }
    assert_eq!(names("f10_mlm.ts17.onnx").last().map(String::as_str), Some("cls.predictions.decoder (node)"));
}

#[test]
fn what_is_no_linear_layer_says_why_or_is_none() {
    let why = |file: &str, key: &str| -> Result<(), String> {
        let model = Model::open(folder().join(file)).expect("a model");
        let found = Layers::of(&model).expect("layers");
        found.linears.iter().find(|l| l.key() == key).unwrap_or_else(|| panic!("{file}: {key}")).adaptable.clone()
    };
    assert!(why("einsum.ts17.onnx", "/Einsum_1").unwrap_err().contains("a matrix for each h"));
    assert!(why("packed_heads.ts17.onnx", "query").unwrap_err().contains("does not say which of its 18 outputs"));
    assert!(why("packed_heads.ts17.onnx", "query_key_value").is_ok());
    assert!(why("attention.ort.onnx", "Attention_0").is_ok());
    assert!(why("attention_int8.ort.onnx", "Attention_0_quant").unwrap_err().contains("QAttention"));
    for file in ["conv1d.ts17.onnx", "conv1d.dyn18.onnx"] {
        let names = names(file);
        assert!(!names.iter().any(|n| n.contains("grouped") || n.contains("strided")), "{names:?}");
    }
}

/// Adapters of every kind on all layers that take one, and on all parts of packed ones.
#[test]
fn every_variant_folds_on_every_form() {
    let truths = truths();
    for (init, r, mini_r) in [(InitWeights::Random, 4, 1), (InitWeights::Bat, 1, 1), (InitWeights::Mini, 3, 1)] {
        for (file, truth) in &truths {
            let base = Model::open(folder().join(file)).expect("a model");
            let found = Layers::of(&base).expect("layers");
            for parts in [false, true] {
                let takes = |l: &&Linear| l.adaptable.is_ok() && l.part.is_some() == parts;
                let keys: Vec<String> = found.linears.iter().filter(takes).map(|l| l.key().to_string()).collect();
                if keys.is_empty() {
                    continue;
                }
                let what = format!("{file}, {init}, parts: {parts}");
                let dir = tempfile::tempdir().expect("a directory");
                let at = |name: &str| dir.path().join(name);
                let target_modules = Some(TargetModules::List(keys));
                let config = BoneConfig { r, mini_r, init_weights: init, target_modules, ..Default::default() };
                let injection = inject(&base, &InjectOptions { config, ..Default::default() });
                let injected =
                    written(&base, injection.unwrap_or_else(|e| panic!("{what}: {e}")), &at("injected.onnx"));
                // BAT and mini start from zero: other values.
                let injected = randomized(injected, &at("random.onnx"));
                fold(&injected, &FoldOptions::default())
                    .and_then(|f| f.write(&injected, &at("merged.onnx")))
                    .unwrap_or_else(|e| panic!("{what}: {e}"));
                let inputs = truth.inputs_of(&base);
                let (a, b) = (run(&injected.path, &inputs), run(&at("merged.onnx"), &inputs));
                assert_within(&a, &b, rounding(file), &what);
                assert!(a.iter().zip(&truth.outputs).any(|(a, base)| worst(a, base) > 1e-4), "{what}: nothing changed");
            }
        }
    }
}

/// The injected model with other values in its adapter.
fn randomized(model: Model, path: &Path) -> Model {
    let mut proto = model.proto.clone();
    for (i, tensor) in proto.graph.iter_mut().flat_map(|g| &mut g.initializer).enumerate() {
        if tensor.name().contains("miss_block") {
            let dims: Vec<usize> = tensor.dims.iter().map(|d| *d as usize).collect();
            let value = (0..dims.iter().product()).map(|k| ((k * 7 + i * 3) % 11) as f32 / 20.0 - 0.25).collect();
            *tensor = Tensor::new::<f32>(&dims, value).to_proto(tensor.name());
        }
    }
    std::fs::write(path, prost::Message::encode_to_vec(&proto)).expect("a file");
    Model::open(path).expect("a model")
}

/// Sizes of packed modules are taken for what the graph leaves open, stay in the file, and are refused where they fit
/// nothing.
#[test]
fn sizes_of_packed_modules_can_be_given() {
    let base = Model::open(folder().join(GROUPS.0)).expect("a model");
    let options = |sizes: &[(&str, usize)], targets: &str| {
        let packed_sizes = sizes.iter().map(|(name, size)| (name.to_string(), *size)).collect();
        let target_modules = Some(TargetModules::parse(targets));
        InjectOptions {
            config: BoneConfig { r: 2, target_modules, packed_sizes, ..Default::default() },
            adapter_name: targets.into(),
            ..Default::default()
        }
    };
    let dir = tempfile::tempdir().expect("a directory");
    let one = inject(&base, &options(GROUPS.1, "k_proj")).expect("an injection");
    assert_eq!(one.summary.targets[0].out_features, 4);
    let one = written(&base, one, &dir.path().join("one.onnx"));
    // The sizes are known from then on, and may not change.
    let both = inject(&one, &options(&[], "v_proj")).expect("an injection");
    assert_eq!(both.summary.targets[0].out_features, 4);
    let failed = |model: &Model, sizes: &[(&str, usize)]| match inject(model, &options(sizes, "q_proj")) {
        Ok(_) => panic!("{sizes:?}"),
        Err(error) => error.to_string(),
    };
    assert!(failed(&one, &[("q_proj", 4)]).contains("q_proj has 4 outputs, but 8 for another adapter"));
    let text = failed(&base, &[("q_proj", 8), ("k_proj", 4), ("v_proj", 8)]);
    assert!(text.contains("There is qkv_proj (q_proj, k_proj, v_proj) with 16 outputs"), "{text}");
    assert!(failed(&base, &[("query", 8)]).contains("query = 8 fits no packed layer"));
}

/// Calls of functions that hold no adapted layer stay calls.
#[test]
fn only_the_calls_with_an_adapted_layer_are_written_out() {
    let base = Model::open(folder().join("functions.onnx")).expect("a model");
    let dir = tempfile::tempdir().expect("a directory");
    let config =
        BoneConfig { r: 2, target_modules: Some(TargetModules::List(vec!["second".into()])), ..Default::default() };
    let injection = inject(&base, &InjectOptions { config, ..Default::default() }).expect("an injection");
    assert!(
        injection
            .summary
            .warnings
            .iter()
            .any(|w| w == "1 calls of functions are written out, since layers inside are adapted: Affine")
    );
    let injected = written(&base, injection, &dir.path().join("injected.onnx"));
    let ops: Vec<&str> = injected.graph().node.iter().map(|n| n.op_type()).collect();
    assert_eq!(ops.iter().filter(|op| ["Step", "Gate", "Held"].contains(op)).count(), 3, "{ops:?}");
    assert!(!ops.contains(&"Affine"));
    // A second adapter, inside of another function.
    let config =
        BoneConfig { r: 2, target_modules: Some(TargetModules::List(vec!["first".into()])), ..Default::default() };
    let more = InjectOptions { adapter_name: "more".into(), config, ..Default::default() };
    let both = written(&injected, inject(&injected, &more).expect("an injection"), &dir.path().join("both.onnx"));
    assert!(!both.graph().node.iter().any(|n| n.op_type() == "Step"));
    let back = dir.path().join("back.onnx");
    both.write(both.patched(unload(&both).expect("unload")).expect("a patch"), &back).expect("a file");
    assert!(std::fs::read(&back).expect("a file") == base.source, "unload gives other bytes");
}
