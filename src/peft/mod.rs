//! Adapters in the forms that other programs read and write: PEFT's directories, LoRA, ONNX Runtime's `.onnx_adapter`.
//! Nothing here knows about graphs.

mod card;
mod config_json;
mod directory;
mod keys;
pub mod lora;
pub mod onnx_adapter;

use std::fs;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;

use crate::onnx::{Durability, Rope, external, write_atomic};
use crate::{Error, Result};

pub use directory::{ReadOptions, WriteOptions, read, write};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const CARD: &str = "README.md";

/// The directory of the adapter called `name` below `dir`: `default` is in `dir` itself, any other one in a directory
/// of its name, as PEFT has it.
///
/// # Errors
/// A name that would lead anywhere else (it may come from a stranger's file).
pub fn place(dir: &Path, name: &str) -> Result<PathBuf> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        _ if name == "default" => Ok(dir.to_path_buf()),
        (Some(Component::Normal(part)), None) if part == name => Ok(dir.join(name)),
        _ => Err(Error::model(format!("adapter name {name:?} cannot be the name of a directory; rename the adapter"))),
    }
}

/// The content of a regular file; a pipe or a device would never end.
fn content(path: &Path) -> Result<Bytes> {
    let meta = fs::metadata(path).map_err(Error::io("read", path))?;
    if !meta.is_file() {
        return Err(Error::file(path, "this is not a regular file"));
    }
    external::map_file(path).map_err(Error::io("read", path))
}

/// Writes a file, whole or not at all.
fn put(path: &Path, bytes: impl Into<Bytes>) -> Result<()> {
    let mut rope = Rope::default();
    rope.push(bytes);
    write_atomic(path, rope, &[], Durability::OnDisk)
}

#[cfg(test)]
mod tests;
