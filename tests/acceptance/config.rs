//! Rows 25, 26 and 28: configs, target matching, the LoRA form; and safe merges of adapters with values that are not
//! finite.

use bone_onnx::adapter::{Adapter, BoneConfig, TargetModules, TaskType};
use bone_onnx::export::as_lora;
use bone_onnx::fold::FoldOptions;
use bone_onnx::inject::{InjectOptions, InjectSummary, inject};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::peft::{self, ReadOptions, WriteOptions, lora};
use ndarray::Array2;
use serde_json::json;

use crate::common::{Bench, VARIANTS, bytes, each, everywhere, files, fold_to, mlps, shared};

#[test]
fn row_25_unknown_keys_warn_and_the_minimal_ones_are_required() {
    let mut warnings = Vec::new();
    let config = BoneConfig::from_json(&json!({"peft_type": "MISS", "foobar": 1}), &mut warnings).expect("a config");
    assert_eq!(config, BoneConfig::default());
    assert!(warnings.len() == 1 && warnings[0].contains("unknown key foobar"), "{warnings:?}");

    let bench = Bench::new();
    let subject = &mlps()[0];
    let adapter = subject.adapter("default", VARIANTS[0].config(subject.first), 25);
    peft::write(bench.dir(), &adapter, &WriteOptions::default()).expect("a directory");
    let read = |json: &str| {
        std::fs::write(bench.dir().join("adapter_config.json"), json).expect("a file");
        peft::read(bench.dir(), "default", &ReadOptions::default(), &mut Vec::new())
    };
    assert!(read(r#"{"peft_type": "BONE", "r": 4}"#).is_ok());
    for (json, words) in [
        (r#"{"r": 4}"#, "peft_type is missing"),
        (r#"{"peft_type": "BOFT", "r": 4}"#, "peft_type is \"BOFT\"; allowed are MISS, BONE"),
        (r#"{"peft_type": "MISS", "r": 4, "init_weights": "pissa"}"#, "init_weights is \"pissa\""),
    ] {
        let text = read(json).expect_err("an error").to_string();
        assert!(text.contains(words) && text.contains("adapter_config.json"), "{text}");
    }
}

fn selected(file: &str, config: BoneConfig) -> Result<InjectSummary, String> {
    let model = Model::open(shared(file)).expect("a model");
    let options = InjectOptions { config: BoneConfig { r: 4, ..config }, ..Default::default() };
    inject(&model, &options).map(|i| i.summary).map_err(|e| e.to_string())
}

#[test]
fn row_26_target_matching() {
    let list = |names: &[&str]| Some(TargetModules::List(names.iter().map(|n| n.to_string()).collect()));
    let all = || Some(TargetModules::Pattern("all-linear".into()));
    let to = |target_modules| BoneConfig { target_modules, ..Default::default() };
    let bert = "models/bert.ts17.onnx";
    let modules = |s: &InjectSummary| s.targets.iter().map(|t| t.module.clone()).collect::<Vec<_>>();

    let text = selected(bert, to(list(&["nope"]))).expect_err("nothing matches");
    assert!(text.contains("Target modules nope not found in the base model"), "{text}");
    let excluded = BoneConfig { exclude_modules: Some(TargetModules::Pattern(".*".into())), ..to(list(&["query"])) };
    assert!(selected(bert, excluded).expect_err("all excluded").contains("All modules were excluded"));
    let excluded = BoneConfig { exclude_modules: list(&["query"]), ..to(list(&["query"])) };
    assert!(selected(bert, excluded).expect_err("a mix").contains("No modules were targeted for adaptation"));

    let llama = selected("models/llama.ts17.onnx", to(all())).expect("a decoder");
    assert!(llama.targets.len() == 14 && !modules(&llama).iter().any(|m| m.contains("lm_head")));
    let plain = selected(bert, to(all())).expect("a classifier without a task");
    assert!(modules(&plain).contains(&"classifier".to_string()));
    let task = BoneConfig { task_type: Some(TaskType::SeqCls), ..to(all()) };
    let kept_out = selected(bert, task).expect("a classifier");
    assert_eq!(kept_out.targets.len(), plain.targets.len() - 1);
    assert_eq!(kept_out.saved, ["classifier.bias", "classifier.weight"]);

    // A second adapter on all layers stands on the same ones, not on the first one's products.
    let bench = Bench::new();
    let one = bench.inject(&shared(bert), "one", BoneConfig { r: 4, ..to(all()) });
    let model = Model::open(&one).expect("a model");
    let config = BoneConfig { r: 4, ..to(all()) };
    let two = inject(&model, &InjectOptions { adapter_name: "two".into(), config, ..Default::default() });
    assert_eq!(modules(&two.expect("a second one").summary), modules(&plain));

    // PEFT's table by architecture, where nothing is said.
    let told = selected(bert, to(None)).expect("a known architecture");
    assert!(told.targets.len() == 4 && told.default_targets.expect("a choice").starts_with("query, value"));
    let text = selected("models/mlp2d.ts17.onnx", to(None)).expect_err("an unknown one");
    assert!(text.contains("Please specify target_modules"), "{text}");
}

/// What the adapter does to a layer's weight, `[out, in]`: the difference of the folded and the base weight.
fn change(subject: &crate::common::Subject, adapter: &Adapter, bench: &Bench) -> Array2<f64> {
    let merged = bench.merge(&bench.import(&subject.path, adapter));
    let name = "lin0.weight";
    let value = |path| match &crate::common::initializers(path)[name] {
        Tensor::F32(a) => a.mapv(f64::from).into_dimensionality::<ndarray::Ix2>().expect("a matrix"),
        other => panic!("{other:?}"),
    };
    value(&merged) - value(&subject.path)
}

#[test]
fn row_28_as_lora_exact_for_all_but_bat() {
    let subject = &mlps()[0];
    for variant in VARIANTS {
        let (what, bench) = (variant.name, Bench::new());
        let adapter = subject.adapter("default", variant.config(&["lin0"]), 28);
        let model = Model::open(&subject.path).expect("a model");
        let lora = as_lora(&model, &adapter, None).expect("a LoRA");
        assert_eq!(lora.pairs.keys().collect::<Vec<_>>(), adapter.blocks.keys().collect::<Vec<_>>());
        let pair = &lora.pairs["lin0"];
        let product = pair.b.mapv(f64::from).dot(&pair.a.mapv(f64::from));
        let delta = change(subject, &adapter, &bench);
        let mse = (&product - &delta).mapv(|d| d * d).mean().expect("values");
        match lora.errors.get("lin0") {
            None => assert!(mse < 1e-12, "{what}: {mse:e}"),
            Some(error) => {
                let norm = |m: &Array2<f64>| m.mapv(|v| v * v).sum().sqrt();
                let measured = norm(&(&product - &delta)) / norm(&delta);
                assert!((measured - error).abs() < 1e-5 && *error > 0.0 && mse < 0.1, "{what}: {measured} {error}");
                // With every rank there is, nothing is lost.
                let whole = as_lora(&model, &adapter, Some(12)).expect("a LoRA");
                assert!(whole.errors["lin0"] < 1e-5, "{}", whole.errors["lin0"]);
            }
        }
        let dir = bench.dir().join("lora");
        lora::write_lora(&dir, "default", &lora.pairs, &adapter.saved, &adapter.config, None).expect("a directory");
        assert_eq!(files(&dir), ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
        let tensors = std::fs::read(dir.join("adapter_model.safetensors")).expect("the tensors");
        let file = safetensors::SafeTensors::deserialize(&tensors).expect("safetensors");
        let mut keys = file.names();
        keys.sort_unstable();
        assert_eq!(keys, ["base_model.model.lin0.lora_A.weight", "base_model.model.lin0.lora_B.weight"]);
    }
}

#[test]
fn gap_safe_merge_refuses_nan_and_infinity_of_every_kind_and_writes_nothing() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let whole = subject.adapter("default", variant.config(subject.first), 8);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut adapter = whole.clone();
            let (module, block) = adapter.blocks.iter_mut().next_back().expect("a block");
            let module = module.clone();
            let mut values = block.values::<f32>().expect("float32").to_vec();
            // The first row of a block is used whatever the padding.
            values[0] = bad;
            *block = Tensor::new(block.dims(), values);
            let injected = bench.import(&subject.path, &adapter);
            let (before, out) = (bytes(&injected), bench.next());
            std::fs::write(&out, b"precious").expect("a file");
            let stood = files(bench.dir());
            let safe = FoldOptions { safe: true, ..Default::default() };
            let text = fold_to(&injected, &safe, &out).expect_err("a refusal").to_string();
            for word in [&format!("module {module}"), "adapter default", "element", "nothing was written"] {
                assert!(text.contains(word), "{what}: {text}");
            }
            assert_eq!(bytes(&out), b"precious", "{what}");
            assert!(bytes(&injected) == before && files(bench.dir()) == stood, "{what}");
            // A plain merge lets it through, as PEFT's does.
            let plain = bench.merge(&injected);
            assert!(crate::common::initializers(&plain).values().any(|v| v.to_f64().iter().any(|v| !v.is_finite())));
        }
    });
}

#[test]
fn gap_merging_with_padding_with_r_above_in_and_of_3_d_inputs_has_its_way_back() {
    each(&mlps(), &VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let adapter = subject.adapter("default", variant.config(&["lin0", "lin1"]), 9);
        let injected = bench.import(&subject.path, &adapter);
        let merged = bench.merge(&injected);
        crate::common::assert_close(&subject.run(&merged), &subject.run(&injected), 1e-5, what);
        let back = bench.unmerge(&merged, &[&adapter]);
        let (back, base) = (crate::common::initializers(&back), crate::common::initializers(&subject.path));
        for (name, value) in &base {
            let off = crate::common::off(std::slice::from_ref(&back[name]), std::slice::from_ref(value));
            assert!(off <= 1e-6, "{what}: {name} is off by {off}");
        }
    });
}
