//! A PEFT adapter directory: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.
//!
//! Written against files of PEFT 0.16.0 and 0.18.1 (`BONE`) and 0.21.2 (`MISS`); the two differ in the word that
//! parameters end in and in three keys of the config, so either is read under either name.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::card::{self, Card};
use super::keys::{self, Key};
use super::{TENSORS, config_json, content, put};
use crate::adapter::{Adapter, Bias, BoneConfig, Dims, PeftType};
use crate::onnx::Tensor;
use crate::{Error, Result};

/// How strictly a directory is read.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOptions {
    /// Leave tensors out that do not fit the config, each with a warning, instead of refusing the adapter.
    pub allow_partial: bool,
}

/// What a directory is written for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WriteOptions {
    /// The name that readers know the adapter by; PEFT before 0.17 reads only `BONE`, PEFT from 0.19 only `MISS`.
    pub peft_type: PeftType,
    /// What the adapter was trained on, as PEFT's `base_model_name_or_path`: a hub id or a path.
    pub base_model: Option<String>,
}

/// Reads the adapter in `dir`, calling it `name`. Values become float32, whichever of float16, bfloat16 and float32
/// they are stored in; blocks are found by `.miss_block` and `.bone_block` alike, and blocks of other adapters that
/// PEFT let slip into the file are passed over.
///
/// # Errors
/// A missing or broken file; a config of another kind of adapter; tensors that do not fit the config, all of them in
/// one message; a file without any block.
pub fn read(dir: &Path, name: &str, options: &ReadOptions, warnings: &mut Vec<String>) -> Result<Adapter> {
    let config = config_json::read(dir, warnings)?;
    let path = tensors_file(dir)?;
    let bytes = content(&path)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::file(&path, format!("not a whole safetensors file: {e}")))?;
    let mut tensors = file.tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));

    let (mut blocks, mut saved, mut complaints) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for (key, view) in tensors {
        let (kind, values, place) = match Key::parse(&key) {
            Key::Block(module) => ("block", &mut blocks, module),
            Key::Saved(path) => ("parameter", &mut saved, path),
            Key::OfAnother => continue,
        };
        let misfit = if kind == "block" { misfit(&config, view.shape()) } else { None };
        match (misfit, widened(&view)) {
            _ if values.contains_key(&place) => complaints.push(format!("{key}: {place} has a {kind} already")),
            (Some(what), _) | (None, Err(what)) => complaints.push(format!("{key}: {what}")),
            (None, Ok(tensor)) => {
                values.insert(place, tensor);
            }
        }
    }
    if !complaints.is_empty() && !options.allow_partial {
        let list = complaints.join("\n  ");
        let what = format!("this does not go with {}:\n  {list}", super::CONFIG);
        return Err(Error::file(&path, what));
    }
    if blocks.is_empty() {
        let list: String = complaints.iter().map(|c| format!("\n  {c}")).collect();
        let what = format!("there is no usable tensor whose name ends in .miss_block or .bone_block{list}");
        return Err(Error::file(&path, what));
    }
    warnings.extend(complaints.into_iter().map(|c| format!("{}: left out: {c}", path.display())));
    let adapter = Adapter { name: name.into(), config, blocks, saved };
    if lost_biases(&adapter) {
        warnings.push(format!(
            "{}: the config says bias = {}, but there is no bias in the file (PEFT before 0.21 does not save them): \
             what they learned is lost, and the base's are used",
            path.display(),
            adapter.config.bias
        ));
    }
    Ok(adapter)
}

/// True where biases trained, but no file says to what.
fn lost_biases(adapter: &Adapter) -> bool {
    adapter.config.bias != Bias::None && !adapter.saved.keys().any(|path| path.ends_with("bias"))
}

/// Writes `adapter` into `dir` (see [`super::place`]), which is made where it is missing. Each file appears whole, the
/// config last; a `README.md` that somebody else wrote stays as it is. Read again, the adapter is the same bit for bit,
/// but for what PEFT resolves before it saves: `all-linear` and missing target modules have become the list of modules,
/// and the output layers of the task type stand in `modules_to_save`.
///
/// # Errors
/// What only MiSS has (`mini`, dropout) written as `BONE`; an adapter without blocks, or with values other than
/// float32; anything the file system refuses.
pub fn write(dir: &Path, adapter: &Adapter, options: &WriteOptions) -> Result<()> {
    let mut config = BoneConfig { peft_type: options.peft_type, ..adapter.config.clone() };
    config.validate()?;
    if options.peft_type == PeftType::Miss && lost_biases(adapter) {
        // MiSS would look for what Bone never saved.
        config.bias = Bias::None;
    }
    if adapter.blocks.is_empty() {
        return Err(Error::model(format!("adapter {} has no layer, so there is nothing to write", adapter.name)));
    }
    let blocks = adapter.blocks.iter().map(|(module, value)| (keys::block(module, options.peft_type), value));
    let saved = adapter.saved.iter().map(|(path, value)| (keys::saved(path, &adapter.blocks), value));
    write_tensors(dir, blocks.chain(saved).map(|(key, value)| (key, Cow::Borrowed(value))))?;
    let base_model = options.base_model.as_deref();
    card::write(dir, &Card::of_bone(adapter, options.peft_type, base_model))?;
    config_json::write(dir, &config_json::bone(&config, options.peft_type, adapter.blocks.keys(), base_model))
}

/// Makes `dir` and writes `adapter_model.safetensors` as PEFT does, all values float32.
pub(super) fn write_tensors<'a>(dir: &Path, tensors: impl Iterator<Item = (String, Cow<'a, Tensor>)>) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let path = dir.join(TENSORS);
    let mut values = Vec::new();
    for (key, tensor) in tensors {
        if !matches!(*tensor, Tensor::F32(_)) {
            return Err(Error::file(&path, format!("{key} has to be float32 to be written")));
        }
        values.push((key, tensor.dims().to_vec(), tensor.to_bytes()));
    }
    let views = values.iter().map(|(key, dims, bytes)| Ok((key, TensorView::new(Dtype::F32, dims.clone(), bytes)?)));
    let views: Result<Vec<_>, safetensors::SafeTensorError> = views.collect();
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
    put(&path, bytes)
}

fn tensors_file(dir: &Path) -> Result<PathBuf> {
    let path = dir.join(TENSORS);
    if path.exists() {
        return Ok(path);
    }
    let pickle = dir.join("adapter_model.bin").exists();
    let what = if pickle {
        "there is no such file, only adapter_model.bin: a pickle can run code, so it is not read. Load the adapter \
         with PEFT and save it with save_pretrained(…, safe_serialization=True)"
    } else {
        "there is no such file; copy it here from where adapter_config.json came from"
    };
    Err(Error::file(path, what))
}

/// What is wrong with a block of this shape under the config, as far as that can be known without the layer's sizes.
fn misfit(config: &BoneConfig, shape: &[usize]) -> Option<String> {
    let outputs = match *shape {
        [_, outputs] => outputs,
        [blocks, side, _] => blocks.saturating_mul(side),
        _ => 1,
    };
    let variant = config.init_weights.variant();
    let wanted = variant.shape(&Dims { inputs: config.r, outputs, r: config.r, mini_r: config.mini_r });
    if shape == wanted && !shape.contains(&0) {
        return None;
    }
    let form = match shape.len() {
        2 if wanted.len() == 3 => "; one with two dimensions is Bone's, not BAT's (init_weights)",
        3 if wanted.len() == 2 => "; one with three dimensions is BAT's (init_weights \"bat\")",
        _ => "",
    };
    Some(format!("the shape is {shape:?}, but {} with r = {} has {wanted:?}{form}", variant.name(), config.r))
}

/// The values in float32.
fn widened(view: &TensorView) -> Result<Tensor, String> {
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect::<Vec<_>>().to_f32_vec(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(format!("its values are {other}; adapters are F32, F16 or BF16")),
    };
    let array = ArrayD::from_shape_vec(IxDyn(view.shape()), values).map_err(|e| e.to_string())?;
    Ok(Tensor::F32(array))
}
