//! Against directories that PEFT wrote, and damaged ones.

use std::path::{Path, PathBuf};
use std::{fs, str};

use safetensors::SafeTensors;
use serde_json::Value;

use super::*;
use crate::adapter::{Adapter, PeftType};

/// A file of the reference data, which lies beside the repository or some way above it.
fn shared(name: &str) -> PathBuf {
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let found = above.map(|dir| dir.join("shared").join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("shared/{name} is missing"))
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
    assert!(warnings.is_empty(), "{warnings:?}");
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
