//! Against directories that PEFT wrote, and damaged ones.

use std::collections::BTreeMap;
use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::*;
use crate::adapter::{Adapter, BoneConfig, InitWeights, PeftType, TargetModules, TaskType};
use crate::onnx::Tensor;

fn shared(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// Every adapter directory of the reference data.
fn goldens() -> Vec<PathBuf> {
    let dirs = ["mlp", "bert"].map(|model| fs::read_dir(shared("goldens").join(model)).unwrap());
    let mut dirs: Vec<PathBuf> = dirs.into_iter().flatten().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    assert_eq!(dirs.len(), 14);
    dirs
}

fn read_clean(dir: &Path) -> Adapter {
    let mut warnings = Vec::new();
    let adapter = read(dir, "default", &ReadOptions::default(), &mut warnings).unwrap();
    // PEFT's Bone trains biases and does not save them.
    assert!(!dir.ends_with("bone_r4_bias_all") || warnings.len() == 1);
    assert!(warnings.iter().all(|w| w.contains("bias = all")), "{warnings:?}");
    adapter
}

/// The config with the parts removed that say who wrote it, and sets in order.
fn config(dir: &Path) -> Value {
    let mut json: Value = serde_json::from_slice(&fs::read(dir.join(CONFIG)).unwrap()).unwrap();
    let fields = json.as_object_mut().unwrap();
    for key in ["auto_mapping", "base_model_name_or_path", "peft_version"] {
        fields.remove(key);
    }
    if let Some(Value::Array(targets)) = fields.get_mut("target_modules") {
        targets.sort_by_key(|t| t.to_string());
    }
    json
}

#[test]
fn what_peft_wrote_comes_out_the_same() {
    for golden in goldens() {
        let adapter = read_clean(&golden);
        let dir = tempfile::tempdir().unwrap();
        let options = WriteOptions { peft_type: adapter.config.peft_type, base_model: None };
        write(dir.path(), &adapter, &options).unwrap();
        assert_eq!(read_clean(dir.path()), adapter, "{}", golden.display());
        assert_eq!(config(dir.path()), config(&golden), "{}", golden.display());

        let [ours, theirs] = [dir.path(), &golden].map(|d| fs::read(d.join(TENSORS)).unwrap());
        let [ours, theirs] = [&ours, &theirs].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        assert_eq!(ours.names().len(), theirs.names().len());
        for (key, tensor) in theirs.iter() {
            let own = ours.tensor(key).unwrap();
            assert_eq!(
                (own.dtype(), own.shape(), own.data()),
                (tensor.dtype(), tensor.shape(), tensor.data()),
                "{key}"
            );
        }
    }
}

#[test]
fn keys_stand_in_pefts_order() {
    let golden = shared("goldens/mlp/miss_bat_r4_bias_all");
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &read_clean(&golden), &WriteOptions { base_model: None, peft_type: PeftType::Miss }).unwrap();
    let keys = |dir: &Path| {
        let text = fs::read_to_string(dir.join(CONFIG)).unwrap();
        text.lines()
            .filter(|l| l.starts_with("  \""))
            .map(|l| l.split(':').next().unwrap().to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(keys(dir.path()), keys(&golden));
}

/// A directory with this config and tensors: key, element type, shape; every value is 1.5.
fn directory(config: Value, tensors: &[(&str, Dtype, &[usize])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
    let one = |dtype| match dtype {
        Dtype::F32 => 1.5f32.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(1.5).to_le_bytes().to_vec(),
        Dtype::BF16 => half::bf16::from_f32(1.5).to_le_bytes().to_vec(),
        Dtype::F64 => 1.5f64.to_le_bytes().to_vec(),
        other => panic!("{other}"),
    };
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, d, shape)| one(*d).repeat(shape.iter().product())).collect();
    let views = tensors.iter().zip(&bytes).map(|((key, dtype, shape), bytes)| {
        (format!("base_model.model.{key}"), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    fs::write(dir.path().join(TENSORS), safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

fn reading(dir: &Path, allow_partial: bool) -> (Result<Adapter, String>, Vec<String>) {
    let mut warnings = Vec::new();
    let read = read(dir, "a", &ReadOptions { allow_partial }, &mut warnings);
    (read.map_err(|e| e.to_string()), warnings)
}

#[test]
fn any_float_type_any_suffix_and_no_block_of_another_adapter() {
    let dir = directory(
        json!({"peft_type": "BONE", "r": 2, "target_modules": ["p", "q"]}),
        &[
            ("p.miss_block", Dtype::F16, &[2, 3]),
            ("q.bone_block", Dtype::BF16, &[2, 4]),
            ("q.bone_block.other", Dtype::F32, &[7, 4]),
            ("head.modules_to_save.default.weight", Dtype::F32, &[1]),
            ("p.base_layer.bias", Dtype::F32, &[3]),
        ],
    );
    let adapter = read_clean(dir.path());
    let tensor = |shape: &[usize]| Tensor::new(shape, vec![1.5f32; shape.iter().product()]);
    let named = |list: &[(&str, &[usize])]| list.iter().map(|(n, s)| (n.to_string(), tensor(s))).collect();
    let wanted: BTreeMap<_, _> = named(&[("p", &[2, 3]), ("q", &[2, 4])]);
    assert_eq!(adapter.blocks, wanted);
    let wanted: BTreeMap<_, _> = named(&[("head.weight", &[1]), ("p.bias", &[3])]);
    assert_eq!(adapter.saved, wanted);
}

#[test]
fn all_tensors_that_do_not_fit_are_named_at_once() {
    let tensors: [(&str, Dtype, &[usize]); 7] = [
        ("a.bone_block", Dtype::F32, &[2, 3]),
        ("a.miss_block", Dtype::F32, &[2, 3]),
        ("b.bone_block", Dtype::F32, &[4, 3]),
        ("c.bone_block", Dtype::F32, &[3, 2, 2]),
        ("d.bone_block", Dtype::F64, &[2, 3]),
        ("e.bone_block", Dtype::F32, &[2, 0]),
        ("head.weight", Dtype::F64, &[1]),
    ];
    let dir = directory(json!({"peft_type": "BONE", "r": 2}), &tensors);
    let (read, warnings) = reading(dir.path(), false);
    let error = read.unwrap_err();
    let complaints = [
        "base_model.model.a.miss_block: a has a block already",
        "base_model.model.b.bone_block: the shape is [4, 3], but Bone (MiSS) with r = 2 has [2, 3]",
        "base_model.model.c.bone_block: the shape is [3, 2, 2], but Bone (MiSS) with r = 2 has [2, 6]; one with three",
        "base_model.model.d.bone_block: its values are F64",
        "base_model.model.e.bone_block: the shape is [2, 0]",
        "base_model.model.head.weight: its values are F64",
    ];
    for words in complaints {
        assert!(error.contains(words), "{error}");
    }
    assert!(error.contains(TENSORS) && error.lines().count() == 7 && warnings.is_empty(), "{error}");

    let (read, warnings) = reading(dir.path(), true);
    assert_eq!(read.unwrap().blocks.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(warnings.len(), 6);
    for words in complaints {
        assert!(warnings.iter().any(|w| w.contains(words)), "{warnings:?}");
    }

    for (init, shape, words) in [
        ("bat", &[2, 3][..], "BAT with r = 2 has [1, 2, 2]; one with two"),
        ("bat", &[3, 4, 4], "BAT with r = 2 has [6, 2, 2]"),
        ("mini", &[2, 3], "MiSS mini with r = 2 has [2, 1]"),
    ] {
        let dir = directory(
            json!({"peft_type": "MISS", "r": 2, "init_weights": init}),
            &[("a.miss_block", Dtype::F32, shape)],
        );
        for partial in [false, true] {
            let error = reading(dir.path(), partial).0.unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}

#[test]
fn what_is_no_adapter_of_this_kind_is_refused_by_file_and_reason() {
    let block: &[(&str, Dtype, &[usize])] = &[("a.miss_block", Dtype::F32, &[2, 3])];
    let good = json!({"peft_type": "MISS", "r": 2});
    let without = |file: &'static str| move |dir: &Path| fs::remove_file(dir.join(file)).unwrap();
    let with = |file: &'static str, text: &'static str| move |dir: &Path| fs::write(dir.join(file), text).unwrap();
    type Damage = Box<dyn Fn(&Path)>;
    let cases: Vec<(Damage, &str, &str)> = vec![
        (Box::new(without(CONFIG)), CONFIG, "name the directory of an adapter"),
        (Box::new(without(TENSORS)), TENSORS, "copy it here"),
        (Box::new(with(CONFIG, "{")), CONFIG, "not JSON"),
        (Box::new(with(CONFIG, "[]")), CONFIG, "one JSON object"),
        (Box::new(with(CONFIG, r#"{"r": 2}"#)), CONFIG, "peft_type is missing"),
        (Box::new(with(CONFIG, r#"{"peft_type": "LORA"}"#)), CONFIG, "peft_type is \"LORA\"; allowed are MISS, BONE"),
        (Box::new(with(CONFIG, r#"{"peft_type": "MISS", "r": 0}"#)), CONFIG, "r should be a positive integer"),
        (Box::new(with(TENSORS, "")), TENSORS, "not a whole safetensors file"),
        (Box::new(with(TENSORS, "\u{7}\0\0\0\0\0\0\0{}")), TENSORS, "not a whole safetensors file"),
        (
            Box::new(move |dir| {
                without(TENSORS)(dir);
                with("adapter_model.bin", "")(dir);
            }),
            TENSORS,
            "only adapter_model.bin: a pickle can run code",
        ),
        (
            Box::new(move |dir| {
                without(TENSORS)(dir);
                fs::create_dir(dir.join(TENSORS)).unwrap();
            }),
            TENSORS,
            "not a regular file",
        ),
    ];
    for (damage, file, words) in cases {
        let dir = directory(good.clone(), block);
        damage(dir.path());
        let error = reading(dir.path(), true).0.unwrap_err();
        assert!(error.contains(file) && error.contains(words), "{error}");
    }
    let dir = directory(good, &[("a.lora_A.weight", Dtype::F32, &[2, 3])]);
    assert!(reading(dir.path(), true).0.unwrap_err().contains("no usable tensor"));
}

/// No prefix of a tensor file, and no file with one byte changed, does worse than an error.
#[test]
fn damaged_tensor_files_are_errors() {
    let dir = directory(json!({"peft_type": "MISS", "r": 2}), &[("a.miss_block", Dtype::F32, &[2, 3])]);
    let path = dir.path().join(TENSORS);
    let whole = fs::read(&path).unwrap();
    for end in 0..whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        assert!(reading(dir.path(), true).0.is_err(), "{end}");
    }
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x3f;
        fs::write(&path, &damaged).unwrap();
        let _ = reading(dir.path(), true);
    }
}

fn small(config: BoneConfig) -> Adapter {
    let tensor = |shape: &[usize]| Tensor::new(shape, vec![1.5f32; shape.iter().product()]);
    let blocks = ["b.v", "b.q"].map(|module| (module.to_string(), tensor(&[64, 3])));
    Adapter {
        name: "default".into(),
        config,
        blocks: blocks.into(),
        saved: [("score.weight".to_string(), tensor(&[2]))].into(),
    }
}

#[test]
fn what_peft_resolves_before_it_saves_is_resolved() {
    let linear = Some(TargetModules::Pattern("all-linear".into()));
    for target_modules in [None, linear] {
        let config = BoneConfig { target_modules, task_type: Some(TaskType::SeqCls), ..Default::default() };
        let adapter = small(config);
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("new/one"), &adapter, &WriteOptions::default()).unwrap();
        let read = read_clean(&dir.path().join("new/one"));
        assert_eq!((&read.blocks, &read.saved), (&adapter.blocks, &adapter.saved));
        let resolved = BoneConfig {
            target_modules: Some(TargetModules::List(vec!["b.q".into(), "b.v".into()])),
            modules_to_save: Some(vec!["classifier".into(), "score".into()]),
            ..adapter.config
        };
        assert_eq!(read.config, resolved);
    }
}

#[test]
fn what_only_miss_has_is_not_written_as_bone() {
    let cases = [
        (BoneConfig { init_weights: InitWeights::Mini, ..Default::default() }, "init_weights = mini"),
        (BoneConfig { miss_dropout: 0.1, ..Default::default() }, "miss_dropout"),
    ];
    for (config, words) in cases {
        let dir = tempfile::tempdir().unwrap();
        let options = WriteOptions { peft_type: PeftType::Bone, base_model: None };
        let error = write(dir.path(), &small(config), &options).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("MISS"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
    let half = Tensor::new(&[1], vec![half::f16::ONE]);
    let adapter = Adapter { saved: [("x".to_string(), half)].into(), ..small(BoneConfig::default()) };
    let dir = tempfile::tempdir().unwrap();
    let error = write(dir.path(), &adapter, &WriteOptions::default()).unwrap_err().to_string();
    assert!(error.contains("base_model.model.x has to be float32"), "{error}");
}

#[test]
fn the_card_is_a_hubs_and_someone_elses_stays() {
    let adapter = small(BoneConfig { task_type: Some(TaskType::CausalLm), ..Default::default() });
    let dir = tempfile::tempdir().unwrap();
    let options = WriteOptions { base_model: Some("org/name: \"x\"".into()), ..Default::default() };
    write(dir.path(), &adapter, &options).unwrap();
    let card = fs::read_to_string(dir.path().join(CARD)).unwrap();
    for words in [
        "---\nbase_model: \"org/name: \\\"x\\\"\"\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n",
        "- miss\n",
        "| r | 64 |",
        "- `b.q`\n- `b.v`\n",
        "- `score.weight`\n",
        "PeftModel.from_pretrained",
        "bone-onnx fold BASE.onnx --adapter DIRECTORY",
    ] {
        assert!(card.contains(words), "{words}: {card}");
    }
    write(dir.path(), &adapter, &WriteOptions { peft_type: PeftType::Bone, base_model: None }).unwrap();
    let card = fs::read_to_string(dir.path().join(CARD)).unwrap();
    assert!(card.contains("- bone\n") && !card.contains("base_model:"), "{card}");
    fs::write(dir.path().join(CARD), "mine").unwrap();
    write(dir.path(), &adapter, &options).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join(CARD)).unwrap(), "mine");
}

#[test]
fn a_name_leads_into_the_directory_or_nowhere() {
    let at = |name| place(Path::new("out"), name).map(|p| p.display().to_string()).map_err(|e| e.to_string());
    assert_eq!(at("default"), Ok("out".into()));
    assert_eq!(at("second"), Ok("out/second".into()));
    for name in ["", ".", "..", "a/b", "/etc", "a/", "../a"] {
        assert!(at(name).unwrap_err().contains("cannot be the name of a directory"), "{name}");
    }
}
