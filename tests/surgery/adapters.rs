//! Several adapters of every variant on random models: what is put in can be reordered, renamed, switched off and taken
//! out without a trace, and what is folded in can be taken back.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::adapter::{Adapter, Bias, BoneConfig, InitWeights, Injection, TargetModules};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, activate, delete, extract, import, inject, rename};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::unload::unload;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::common::{run, worst};
use crate::random_models::{Plan, build, inputs, on_models, write};

/// Every variant, with sizes that fit any width: BAT's and mini's have to divide them, so 1 does.
const VARIANTS: [(InitWeights, Option<usize>); 3] =
    [(InitWeights::Zeros, None), (InitWeights::Mini, None), (InitWeights::Bat, Some(1))];

fn config(plan: &Plan, init_weights: InitWeights, r: Option<usize>) -> BoneConfig {
    let target_modules = Some(TargetModules::Pattern("all-linear".into()));
    BoneConfig { r: r.unwrap_or(plan.r), init_weights, target_modules, ..Default::default() }
}

/// A fresh adapter with its values drawn anew: zeros would prove nothing.
fn put(dir: &Path, name: &str, config: &BoneConfig, seed: u64) -> Adapter {
    let path = dir.join("model.onnx");
    let model = Model::open(&path).expect("a model");
    let options = InjectOptions { adapter_name: name.into(), config: config.clone(), ..Default::default() };
    let scratch = dir.join("scratch.onnx");
    inject(&model, &options).and_then(|i| i.write(&model, &scratch)).expect("an injection");
    let fresh = Model::open(&scratch).expect("a model");
    let mut adapter = extract(&fresh, &Injection::expect(&fresh).expect("a record"), name).expect("an adapter");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for value in adapter.blocks.values_mut().chain(adapter.saved.values_mut()) {
        *value = Tensor::new(value.dims(), (0..value.len()).map(|_| rng.random_range(-0.3f32..0.3)).collect());
    }
    import(&model, adapter.clone(), false, false).and_then(|i| i.write(&model, &path)).expect("an import");
    std::fs::remove_file(scratch).expect("the scratch file");
    adapter
}

fn start(dir: &Path) {
    std::fs::copy(dir.join("base.onnx"), dir.join("model.onnx")).expect("a copy");
}

fn change(dir: &Path, plan: impl FnOnce(&Model) -> bone_onnx::onnx::Patch) {
    let path = dir.join("model.onnx");
    let model = Model::open(&path).expect("a model");
    write(&model, plan(&model), &path);
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

fn folded(dir: &Path, options: FoldOptions) -> std::path::PathBuf {
    let (path, merged) = (dir.join("model.onnx"), dir.join("merged.onnx"));
    let model = Model::open(&path).expect("a model");
    fold(&model, &FoldOptions { safe: true, ..options }).and_then(|f| f.write(&model, &merged)).expect("a fold");
    merged
}

#[test]
fn three_adapters_and_a_deleted_one_unload_to_the_very_bytes() {
    for (variant, r) in VARIANTS {
        on_models(40, |plan, dir| {
            start(dir);
            let config = config(plan, variant, r);
            for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] {
                put(dir, name, &config, seed);
            }
            change(dir, |m| delete(m, "b").expect("a deletion"));
            change(dir, |m| rename(m, "c", "last").expect("a new name"));
            let text = std::fs::read(dir.join("model.onnx")).expect("a file");
            let has = |word: &[u8]| text.windows(word.len()).any(|w| w == word);
            assert!(has(b"miss_block.last") && !has(b"miss_block.b") && !has(b"miss_block.c"), "no trace is left");
            change(dir, |m| unload(m).expect("unload"));
            assert_eq!(std::fs::read(dir.join("model.onnx")).expect("a file"), build(plan));
        });
    }
}

#[test]
fn the_last_adapter_can_go_and_the_base_is_back() {
    on_models(20, |plan, dir| {
        start(dir);
        put(dir, "only", &config(plan, InitWeights::Zeros, None), 1);
        change(dir, |m| delete(m, "only").expect("a deletion"));
        assert_eq!(std::fs::read(dir.join("model.onnx")).expect("a file"), build(plan));
    });
}

#[test]
fn every_order_of_every_variant_folds_to_what_it_computes_and_has_its_way_back() {
    for (variant, r) in VARIANTS {
        on_models(40, |plan, dir| {
            start(dir);
            let config = config(plan, variant, r);
            let adapters = [put(dir, "a", &config, 1), put(dir, "b", &config, 2)];
            let inputs = inputs(plan);
            let base = run(&dir.join("base.onnx"), &inputs);
            for order in [&["a", "b"][..], &["b", "a"], &["b"], &[]] {
                change(dir, |m| activate(m, &strings(order)).expect("an order"));
                let injected = run(&dir.join("model.onnx"), &inputs);
                if order.is_empty() {
                    assert_eq!(injected[0], base[0], "nothing is active");
                    continue;
                }
                let merged = folded(dir, FoldOptions::default());
                let off = worst(&injected[0], &run(&merged, &inputs)[0]);
                assert!(off <= 1e-5, "{variant} {order:?}: the folded model is off by {off}");

                let extra = order.iter().map(|n| adapters.iter().find(|a| a.name == *n).expect("it").clone()).collect();
                let (model, back) = (Model::open(&merged).expect("a model"), dir.join("back.onnx"));
                let undo = FoldOptions { extra, undo: true, ..FoldOptions::default() };
                fold(&model, &undo).and_then(|f| f.write(&model, &back)).expect("an unmerge");
                let off = weights_off(&back, &dir.join("base.onnx"));
                assert!(off <= 1e-6, "{variant} {order:?}: the way back is off by {off}");
            }
            // Merged from outside, without an injection: the same file as through one.
            change(dir, |m| activate(m, &strings(&["b"])).expect("an order"));
            let through = std::fs::read(folded(dir, FoldOptions::default())).expect("a file");
            start(dir);
            let extra = vec![adapters[1].clone()];
            let direct = std::fs::read(folded(dir, FoldOptions { extra, ..FoldOptions::default() })).expect("a file");
            assert_eq!(direct, through);
        });
    }
}

/// Largest difference of the matrices that two models of one shape store.
fn weights_off(a: &Path, b: &Path) -> f64 {
    let values = |path: &Path| -> BTreeMap<String, Tensor> {
        let model = Model::open(path).expect("a model");
        let stored =
            model.graph().initializer.iter().map(|t| (t.name().to_string(), model.tensor(t).expect("a value")));
        stored.collect()
    };
    let (a, b) = (values(a), values(b));
    b.iter().map(|(name, value)| worst(&a[name], value)).fold(0.0, f64::max)
}

#[test]
fn biases_and_whole_layers_train_beside_the_blocks_and_fold_in() {
    for bias in [Bias::All, Bias::Only] {
        on_models(40, |plan, dir| {
            start(dir);
            let last = format!("block.{}", plan.layers.len() - 1);
            let one_is_left = plan.layers.len() > 1;
            let config = BoneConfig {
                bias,
                modules_to_save: one_is_left.then(|| vec![last]),
                ..config(plan, InitWeights::Zeros, None)
            };
            let adapter = put(dir, "a", &config, 1);
            let inputs = inputs(plan);
            let injected = run(&dir.join("model.onnx"), &inputs);
            let merged = folded(dir, FoldOptions::default());
            let after = run(&merged, &inputs);
            assert!(worst(&injected[0], &after[0]) <= 1e-5, "{}", worst(&injected[0], &after[0]));
            // A weight that leaves the graph as an output is a result of the base.
            assert_eq!(injected.get(1), after.get(1));
            if adapter.saved.is_empty() {
                return;
            }
            // Another adapter without them, and back: they come and go with theirs.
            put(dir, "b", &self::config(plan, InitWeights::Zeros, None), 2);
            change(dir, |m| activate(m, &strings(&["b"])).expect("b alone"));
            change(dir, |m| activate(m, &strings(&["a"])).expect("a alone"));
            assert_eq!(run(&dir.join("model.onnx"), &inputs), injected);
            change(dir, |m| unload(m).expect("unload"));
            assert_eq!(std::fs::read(dir.join("model.onnx")).expect("a file"), build(plan));
        });
    }
}
