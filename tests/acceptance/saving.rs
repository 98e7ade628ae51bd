//! Rows about names and directories: what an adapter is called, what `save_pretrained` leaves, what is read again.

use std::path::Path;

use bone_onnx::adapter::{Adapter, InitWeights, PeftType, TargetModules};
use bone_onnx::inject::{self, InjectOptions};
use bone_onnx::onnx::Model;
use bone_onnx::peft::{self, ReadOptions, WriteOptions};

use crate::common::shared;
use crate::common::{Bench, VARIANTS, each, everywhere, extracted, files, initializers, mlps, record};

const FILES: [&str; 3] = ["README.md", "adapter_config.json", "adapter_model.safetensors"];

fn write(dir: &Path, adapter: &Adapter, peft_type: PeftType) {
    peft::write(dir, adapter, &WriteOptions { peft_type, base_model: None }).expect("a directory");
}

/// Reads without any warning.
fn read(dir: &Path, name: &str) -> Adapter {
    let mut warnings = Vec::new();
    let adapter = peft::read(dir, name, &ReadOptions::default(), &mut warnings).expect("an adapter");
    assert!(warnings.is_empty(), "{warnings:?}");
    adapter
}

#[test]
fn row_01_adapter_name_appears_in_parameter_names() {
    everywhere(|subject, variant, what| {
        for name in ["default", "custom-adapter"] {
            for peft_type in [PeftType::Bone, PeftType::Miss] {
                let mut config = variant.config(subject.first);
                config.modules_to_save = Some(vec![subject.second[0].into()]);
                config.peft_type = peft_type;
                if config.validate().is_err() {
                    assert_eq!((variant.init, peft_type), (InitWeights::Mini, PeftType::Bone));
                    continue;
                }
                let bench = Bench::new();
                let injected = bench.inject(&subject.path, name, config);
                let (names, record) = (initializers(&injected), record(&injected));
                let adapter = record.named(name).expect("the adapter");
                assert!(!adapter.targets.is_empty() && !adapter.saved.is_empty(), "{what}");
                for target in &adapter.targets {
                    assert_eq!(target.parameter, format!("{}.{}.{name}", target.module, peft_type.block()), "{what}");
                }
                for saved in &adapter.saved {
                    assert_eq!(saved.parameter, format!("{}.{name}", saved.path), "{what}");
                }
                assert!(adapter.parameters().all(|p| names.contains_key(p)), "{what}");
            }
        }
    });
}

#[test]
fn row_02_save_and_load_give_the_same_tensors_files_and_results() {
    everywhere(|subject, variant, what| {
        let mut config = variant.config(subject.first);
        config.modules_to_save = Some(vec![subject.second[0].into()]);
        let adapter = subject.adapter("default", config, 2);
        let bench = Bench::new();
        let injected = bench.import(&subject.path, &adapter);
        for peft_type in [PeftType::Miss, PeftType::Bone] {
            let dir = bench.dir().join(peft_type.to_string());
            if variant.init == InitWeights::Mini && peft_type == PeftType::Bone {
                let options = WriteOptions { peft_type, base_model: None };
                assert!(peft::write(&dir, &adapter, &options).is_err() && !dir.exists(), "{what}");
                continue;
            }
            write(&dir, &extracted(&injected, "default"), peft_type);
            assert_eq!(files(&dir), FILES, "{what}");
            let again = read(&dir, "default");
            assert_eq!((&again.blocks, &again.saved), (&adapter.blocks, &adapter.saved), "{what}");
            let loaded = bench.import(&subject.path, &again);
            assert_eq!(subject.run(&loaded), subject.run(&injected), "{what}");
        }
    });

    // Pickle is the other form that PEFT writes; reading it would run what stands in it.
    let dir = tempfile::tempdir().expect("a directory");
    let config = shared("goldens/mlp/bone_r4/adapter_config.json");
    std::fs::copy(config, dir.path().join("adapter_config.json")).expect("a copy");
    std::fs::write(dir.path().join("adapter_model.bin"), b"\x80\x02.").expect("a file");
    let refusal = peft::read(dir.path(), "default", &ReadOptions::default(), &mut Vec::new()).expect_err("a refusal");
    assert!(refusal.to_string().contains("safe_serialization=True"), "{refusal}");
}

#[test]
fn row_03_of_two_adapters_the_selected_one_is_saved_and_only_that() {
    each(&mlps(), &VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let first = subject.adapter("default", variant.config(subject.first), 3);
        let second = subject.adapter("second", variant.config(subject.second), 4);
        let both = bench.import(&bench.import(&subject.path, &first), &second);
        for (adapter, entries, held) in
            [(&second, vec!["second"], &[] as &[&str]), (&first, [&FILES[..], &["second"]].concat(), &FILES)]
        {
            let out = bench.dir().join("saved");
            let dir = peft::place(&out, &adapter.name).expect("a place");
            write(&dir, &extracted(&both, &adapter.name), PeftType::Miss);
            assert_eq!(files(&out), entries, "{what}");
            assert!(held.iter().all(|f| out.join(f).exists()));
            assert_eq!(files(&dir).iter().filter(|f| *f != "second").count(), FILES.len(), "{what}");
            // Nothing of the other is in the file.
            assert_eq!(read(&dir, &adapter.name).blocks, adapter.blocks, "{what}");
        }
    });
}

#[test]
fn row_04_weights_are_not_read_to_plan_and_a_given_config_is_the_one_that_counts() {
    // `low_cpu_mem_usage`: planned without the weights at hand. Their file is not there at all.
    let dir = tempfile::tempdir().expect("a directory");
    let alone = dir.path().join("alone.onnx");
    std::fs::copy(shared("models/bert_ext.dyn18.onnx"), &alone).expect("a copy");
    let model = Model::open(&alone).expect("a model without its data");
    for variant in VARIANTS {
        let options = InjectOptions { config: variant.config(&["query", "value"]), ..Default::default() };
        let injected = inject::inject(&model, &options).unwrap_or_else(|e| panic!("{}: {e}", variant.name));
        assert_eq!(injected.summary.targets.len(), 4, "{}", variant.name);
    }

    // `from_pretrained(…, config=config)`.
    each(&mlps(), &VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let saved = bench.dir().join("saved");
        write(&saved, &subject.adapter("default", variant.config(subject.first), 5), PeftType::Miss);
        let mut adapter = read(&saved, "default");
        adapter.config.target_modules = Some(TargetModules::Pattern("l.n0".into()));
        let loaded = bench.import(&subject.path, &adapter);
        assert_eq!(record(&loaded).adapters[0].config, adapter.config, "{what}");
        let json = std::fs::read(saved.join("adapter_config.json")).expect("a config");
        let json: serde_json::Value = serde_json::from_slice(&json).expect("json");
        assert_eq!(json["inference_mode"], true, "{what}");
    });
}

#[test]
fn row_05_several_adapters_load_with_no_key_missing() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let mut path = subject.path.clone();
        let mut all = Vec::new();
        for (seed, name) in ["default", "other", "third"].into_iter().enumerate() {
            let adapter = subject.adapter(name, variant.config(subject.first), seed as u64);
            let dir = bench.dir().join(name);
            write(&dir, &adapter, PeftType::Miss);
            let model = Model::open(&path).expect("a model");
            let imported = inject::import(&model, read(&dir, name), false, false).expect("an import");
            assert!(imported.summary.warnings.is_empty(), "{what}: {:?}", imported.summary.warnings);
            path = bench.next();
            imported.write(&model, &path).expect("a file");
            all.push(adapter);
        }
        for adapter in &all {
            assert_eq!(extracted(&path, &adapter.name).blocks, adapter.blocks, "{what}");
        }
    });
}
