//! Injected (or base and adapter) → merged: each adapted weight takes its blocks in, what trained in full replaces what
//! it was copied from, the adapters' nodes go, and what remains is a plain ONNX model of the base's shape. Weights are
//! made one at a time, while the file is written. The same way back: a merged model gives its adapters up again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use serde::Serialize;

use crate::adapter::{Adapter, Injection, Layout, Merge};
use crate::base::Base;
use crate::inject::place::{self, Site, turned};
use crate::inject::{extract, fit};
use crate::onnx::external::{self, Place};
use crate::onnx::{
    AttributeProto, DataType, Due, Durability, Model, Names, NewPlace, NewTensor, NodeProto, Patch, Rope, RopeError,
    Scope, Tensor, TensorProto, copy_external, write_atomic,
};
use crate::select::{self, Linear, Parameter, Source};
use crate::unload::strip;
use crate::{Error, Result, did_you_mean};

/// Called with the name of each module or parameter whose merged value is being written.
pub type Progress = Arc<dyn Fn(&str) + Send + Sync>;

/// How to fold.
#[derive(Clone, Default)]
pub struct FoldOptions {
    /// Refuse a merged weight with a value that is not finite, before anything appears under the final name.
    pub safe: bool,
    /// The adapters to merge, in this order; `None`: the active ones in theirs, then `extra`.
    pub adapters: Option<Vec<String>>,
    /// Adapters from outside the model (PEFT directories).
    pub extra: Vec<Adapter>,
    /// Take adapters that were merged into this model out of its weights again, in the reverse order.
    pub undo: bool,
    /// Go on with what of the `extra` adapters fits the model.
    pub allow_partial: bool,
    /// Whether to wait until the merged model is on the disk.
    pub durability: Durability,
    pub progress: Option<Progress>,
}

/// A finished fold, not yet written.
pub struct Folded {
    patch: Patch,
    /// Weights of the external file that the merged model gets, if it gets one.
    external: Vec<Due>,
    durability: Durability,
    pub summary: FoldSummary,
}

/// What a fold did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct FoldSummary {
    pub adapters: Vec<String>,
    /// Modules whose stored weight was changed.
    pub merged: Vec<String>,
    /// Modules that got a weight of their own, because others read the stored one.
    pub copied: Vec<String>,
    /// Parameters that were trained in full and replaced the base's.
    pub replaced: Vec<String>,
    pub head: Option<String>,
    pub warnings: Vec<String>,
}

/// One adapted layer: its nodes in the base, and what its weight takes in, in order.
struct Layer<'a> {
    module: &'a str,
    calls: Vec<&'a Linear>,
    stack: Vec<&'a Adapter>,
}

/// External weights of the merged model start at multiples of this (ONNX `docs/ExternalData.md`).
const ALIGNMENT: u64 = 4096;

/// Elements that are merged at a time: they stay in the processor's cache from the map to the file.
const CHUNK: usize = 1 << 16;

/// Plans the fold. Adapters are read, weights are not.
///
/// # Errors
/// No adapter, an unknown one, or one that does not fit; layers where adapters of two kinds meet; a merge that has no
/// way back.
pub fn fold(model: &Model, options: &FoldOptions, out: &Path) -> Result<Folded> {
    let record = match Injection::read(model)? {
        None if options.extra.is_empty() => Some(Injection::expect(model)?),
        record => record,
    };
    let mut summary = FoldSummary::default();
    let base = Base::of(model, record.as_ref())?;
    let linears = base.linears();
    let site = Site { model, base: &base, linears: &linears };
    let adapters = chosen(&site, record.as_ref(), options, &mut summary.warnings)?;
    let mut patch = match &record {
        Some(record) => strip(model, record, &HashSet::new())?,
        None => Patch::default(),
    };
    let layers = layers(&adapters, &linears)?;

    // How many of a stored weight's readers are adapted.
    let mut ours: HashMap<&Source, usize> = HashMap::new();
    for linear in layers.iter().flat_map(|l| &l.calls) {
        *ours.entry(&linear.weight.source).or_default() += 1;
    }
    let mut names = Names::of(&model.proto);
    summary.adapters = adapters.iter().map(|a| a.name.clone()).collect();
    summary.head = record.as_ref().and_then(|r| r.head.as_ref()).map(|h| h.name.clone());
    let location = data_location(model, out);
    let mut merge = Merger { model, base: &base, options, patch: &mut patch, external: Vec::new(), location, end: 0 };

    // Weights whose every reader is adapted can change in place, once: for the first module that reads them.
    let mut taken: HashSet<&Source> = HashSet::new();
    for layer in &layers {
        let first = layer.calls[0];
        let root = &first.weight.source;
        let alone = ours.get(root) == Some(&first.weight.uses)
            && layer.calls.iter().all(|c| c.is_stored_out_in() == first.is_stored_out_in() && c.alpha == first.alpha);
        if alone && taken.insert(root) {
            merge.in_place(layer)?;
            summary.merged.push(layer.module.to_string());
        } else {
            merge.as_copy(layer, &mut names)?;
            summary.copied.push(layer.module.to_string());
        }
    }
    if adapters.iter().any(|a| !a.saved.is_empty()) {
        let parameters = select::parameters(base.graph(), &linears);
        for (path, value) in saved(&adapters, &layers)? {
            if options.undo {
                let what = format!("{path} was replaced by the merge, and its value before is not known");
                if !options.allow_partial {
                    return Err(Error::model(format!(
                        "{what}; --allow-partial takes only the adapted layers back and leaves such parameters"
                    )));
                }
                summary.warnings.push(what);
                continue;
            }
            let parameter = parameters
                .iter()
                .find(|p| p.path == path)
                .ok_or_else(|| Error::model(format!("the model has no parameter {path}")))?;
            merge.replace(parameter, value, &mut names)?;
            summary.replaced.push(path.to_string());
        }
    }
    let external = merge.external;
    Ok(Folded { patch, external, durability: options.durability, summary })
}

impl Folded {
    /// Writes the merged model to `out` (which may be the injected model's own path).
    pub fn write(self, model: &Model, out: &Path) -> Result<FoldSummary> {
        let rope = model.patched(self.patch)?;
        copy_external(model, &external::locations(model)?, out, self.durability)?;
        if !self.external.is_empty()
            && let Some(location) = data_location(model, out)
        {
            let mut data = Rope::default();
            for value in self.external {
                data.push(vec![0; (aligned(data.len() as u64) - data.len() as u64) as usize]);
                data.push_due(value);
            }
            write_atomic(&out.with_file_name(location), data, None, self.durability)?;
        }
        model.write_as(rope, out, self.durability)?;
        Ok(self.summary)
    }
}

fn aligned(offset: u64) -> u64 {
    offset.next_multiple_of(ALIGNMENT)
}

/// Where a merged model keeps the weights that the base keeps in external files: a new file named after the output, so
/// that the base's own data stays as it is.
fn data_location(model: &Model, out: &Path) -> Option<String> {
    let taken = external::locations(model).ok()?;
    let name = out.file_name()?.to_string_lossy().into_owned();
    let candidates = [format!("{name}.data"), format!("{name}.merged.data")];
    candidates.into_iter().find(|c| !taken.contains(c))
}

/// The adapters to merge, with their values.
fn chosen(
    site: &Site,
    record: Option<&Injection>,
    options: &FoldOptions,
    warnings: &mut Vec<String>,
) -> Result<Vec<Adapter>> {
    let mut extra = Vec::new();
    for adapter in &options.extra {
        let mut adapter = adapter.clone();
        fit(site, &mut adapter, options.allow_partial, warnings)?;
        extra.push(adapter);
    }
    let active: &[String] = record.map_or(&[], |r| &r.active);
    let all = || active.iter().chain(extra.iter().map(|a| &a.name)).cloned().collect();
    let wanted: Vec<String> = options.adapters.clone().unwrap_or_else(all);
    if wanted.is_empty() {
        return Err(Error::config("no adapter of this model is active; name those to merge with --adapter-names"));
    }
    let mut adapters: Vec<Adapter> = Vec::new();
    for name in &wanted {
        if adapters.iter().any(|a| a.name == *name) {
            return Err(Error::config(format!("adapter {name} is named twice")));
        }
        adapters.push(match (extra.iter().find(|a| a.name == *name), record) {
            (Some(adapter), _) => adapter.clone(),
            (None, Some(record)) => extract(site.model, record, name)?,
            (None, None) => {
                let known: Vec<&str> = extra.iter().map(|a| a.name.as_str()).collect();
                return Err(Error::config(format!(
                    "Adapter {name} does not exist; there is {}.{}",
                    known.join(", "),
                    did_you_mean(name, known.iter().copied())
                )));
            }
        });
    }
    Ok(adapters)
}

/// The adapted layers, each with the adapters on it in their order.
fn layers<'a>(adapters: &'a [Adapter], linears: &'a [Linear]) -> Result<Vec<Layer<'a>>> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut at: HashMap<&str, usize> = HashMap::new();
    for linear in linears {
        match at.get(linear.path.as_str()) {
            Some(index) => layers[*index].calls.push(linear),
            None => {
                let stack: Vec<&Adapter> = adapters.iter().filter(|a| a.blocks.contains_key(&linear.path)).collect();
                let Some(first) = stack.first() else { continue };
                let kind = |a: &Adapter| a.config.init_weights.variant().name();
                if let Some(other) = stack.iter().find(|a| kind(a) != kind(first)) {
                    return Err(Error::config(format!(
                        "module {}: adapter {} is {}, but {} is {}; only adapters of one kind are merged into a layer \
                         together. Choose with --adapter-names",
                        linear.path,
                        first.name,
                        kind(first),
                        other.name,
                        kind(other)
                    )));
                }
                at.insert(&linear.path, layers.len());
                layers.push(Layer { module: &linear.path, calls: vec![linear], stack });
            }
        }
    }
    Ok(layers)
}

/// What the adapters replace, by path.
fn saved<'a>(adapters: &'a [Adapter], layers: &[Layer]) -> Result<BTreeMap<&'a str, &'a Tensor>> {
    let mut saved: BTreeMap<&str, (&str, &Tensor)> = BTreeMap::new();
    for adapter in adapters {
        for (path, value) in &adapter.saved {
            let clash = match saved.insert(path, (&adapter.name, value)) {
                Some((other, _)) => Some(format!("trained in full by {other}")),
                None => layers
                    .iter()
                    .find(|l| path.strip_suffix(".weight") == Some(l.module))
                    .map(|l| format!("adapted by {}", l.stack[0].name)),
            };
            if let Some(clash) = clash {
                return Err(Error::config(format!(
                    "{path} is trained in full by {} and {clash}: they cannot be merged together. Choose with \
                     --adapter-names",
                    adapter.name
                )));
            }
        }
    }
    Ok(saved.into_iter().map(|(path, (_, value))| (path, value)).collect())
}

/// The merged weights on their way into the patch.
struct Merger<'a> {
    model: &'a Model,
    base: &'a Base<'a>,
    options: &'a FoldOptions,
    patch: &'a mut Patch,
    external: Vec<Due>,
    location: Option<String>,
    end: u64,
}

impl Merger<'_> {
    /// The stored weight takes the blocks.
    fn in_place(&mut self, layer: &Layer) -> Result<()> {
        let linear = layer.calls[0];
        let tensor = place::source(self.base, &linear.weight.source)?.clone();
        let value = self.value(layer, linear, &tensor)?;
        self.put(&linear.weight.source, &tensor, value)
    }

    /// Gives a stored tensor another value, where it stands.
    fn put(&mut self, source: &Source, tensor: &TensorProto, value: Due) -> Result<()> {
        match source {
            Source::Initializer { scope, index } => {
                let place = if external::is_external(tensor) { self.external(value)? } else { NewPlace::Inline(value) };
                let index = self.base.initializer(scope, *index);
                self.patch.graph(&self.base.scope(scope)).replace_values.insert(index, place);
            }
            Source::ConstantNode { scope, node } => {
                let mut constant: NodeProto = self.base.graph_at(scope)?.node[*node].clone();
                let tensor = constant.attribute.iter_mut().find_map(|a: &mut AttributeProto| a.t.as_mut());
                let tensor = tensor.ok_or_else(|| Error::model("a Constant node lost its tensor"))?;
                let mut bytes = Vec::with_capacity(value.len);
                (value.write)(&mut bytes).map_err(|e| e.at(&self.model.path))?;
                tensor.raw_data = Some(bytes.into());
                tensor.float_data.clear();
                tensor.int32_data.clear();
                let bytes = prost::Message::encode_to_vec(&constant);
                let index = self.base.node(scope, *node);
                self.patch.graph(&self.base.scope(scope)).replace_nodes.insert(index, bytes.into());
            }
        }
        Ok(())
    }

    /// The module gets a weight of its own, in the layout its nodes multiply by; the stored one stays as it is.
    fn as_copy(&mut self, layer: &Layer, names: &mut Names) -> Result<()> {
        let mut by_layout: BTreeMap<(bool, u32), String> = BTreeMap::new();
        for linear in &layer.calls {
            let key = (linear.trans_b, linear.alpha.to_bits());
            let name = match by_layout.get(&key) {
                Some(name) => name.clone(),
                None => {
                    let name = names.fresh(&format!("{}.weight.merged", layer.module));
                    self.add_copy(layer, linear, &name)?;
                    by_layout.insert(key, name.clone());
                    name
                }
            };
            let node = self.base.node(&linear.scope, linear.node);
            self.patch.graph(&self.base.scope(&linear.scope)).rename_input(node, 1, &name);
        }
        Ok(())
    }

    fn add_copy(&mut self, layer: &Layer, linear: &Linear, name: &str) -> Result<()> {
        let tensor = place::source(self.base, &linear.weight.source)?.clone();
        let mut value = self.value(layer, linear, &tensor)?;
        let (rows, columns) = match linear.is_stored_out_in() {
            true => (linear.out_features, linear.in_features),
            false => (linear.in_features, linear.out_features),
        };
        let dims = if linear.is_stored_out_in() == linear.trans_b {
            [rows, columns]
        } else {
            let (write, size) = (value.write, value.len / (rows * columns).max(1));
            value.write = Box::new(move |out: &mut dyn Write| {
                let mut bytes = Vec::new();
                write(&mut bytes)?;
                Ok(out.write_all(&transposed(&bytes, rows, columns, size))?)
            });
            [columns, rows]
        };
        self.add(name, &dims, &tensor, value)
    }

    /// A new initializer of the main graph, kept where `like` is.
    fn add(&mut self, name: &str, dims: &[usize], like: &TensorProto, value: Due) -> Result<()> {
        let mut header = TensorProto {
            name: Some(name.into()),
            dims: dims.iter().map(|d| *d as i64).collect(),
            data_type: like.data_type,
            ..Default::default()
        };
        let tensor = if external::is_external(like) {
            if let NewPlace::External(place) = self.external(value)? {
                let entries = place.entries();
                header.external_data = entries.external_data;
                header.data_location = entries.data_location;
            }
            header.into()
        } else {
            NewTensor { header, value: Some(value) }
        };
        self.patch.graph(&Scope::new()).add_initializers.push(tensor);
        Ok(())
    }

    /// A parameter that was trained in full takes the place of the base's; `value` is float32, as torch has it.
    fn replace(&mut self, parameter: &Parameter, value: &Tensor, names: &mut Names) -> Result<()> {
        let tensor = place::source(self.base, &parameter.source)?.clone();
        let as_read = |transposed: bool| if transposed { turned(value.clone()) } else { value.clone() };
        let stored = as_read(if parameter.exclusive { parameter.stored_transposed } else { parameter.transposed });
        let dims = stored.dims().to_vec();
        if self.options.safe && !stored.to_f64().iter().all(|v| v.is_finite()) {
            return Err(Error::Check(format!(
                "{}: its trained values are not all finite; the adapter seems to be broken, nothing was written",
                parameter.path
            )));
        }
        let bytes = narrowed(stored.values::<f32>().unwrap_or_default(), parameter.data_type);
        let (progress, path) = (self.options.progress.clone(), parameter.path.clone());
        let value = Due {
            len: bytes.len(),
            write: Box::new(move |out| {
                progress.iter().for_each(|p| p(&path));
                Ok(out.write_all(&bytes)?)
            }),
        };
        if parameter.exclusive {
            return self.put(&parameter.source, &tensor, value);
        }
        let name = names.fresh(&format!("{}.merged", parameter.path));
        self.add(&name, &dims, &tensor, value)?;
        for used in &parameter.uses {
            let node = self.base.node(&used.scope, used.node);
            self.patch.graph(&self.base.scope(&used.scope)).rename_input(node, used.input, &name);
        }
        Ok(())
    }

    /// What the layer's adapters do to the weight as `linear` multiplies by it, in the order to do it.
    fn mergers(&self, layer: &Layer, linear: &Linear) -> Result<Vec<(String, Box<dyn Merge>)>> {
        let layout = Layout { out_in: linear.is_stored_out_in(), alpha: linear.alpha };
        let mut mergers = Vec::new();
        for adapter in &layer.stack {
            let failed = |what: String| {
                let text = format!("module {}, adapter {}: {what}", layer.module, adapter.name);
                Error::Check(text)
            };
            let dims = adapter.config.dims(linear.in_features, linear.out_features).map_err(failed)?;
            let Some(Tensor::F32(block)) = adapter.blocks.get(layer.module) else { continue };
            let variant = adapter.config.init_weights.variant();
            let merger = variant.merger(&dims, layout, block.view(), self.options.undo).map_err(failed)?;
            mergers.push((adapter.name.clone(), merger));
        }
        if self.options.undo {
            mergers.reverse();
        }
        Ok(mergers)
    }

    /// The merged value of `tensor` as `linear` multiplies by it, to be made when it is written, a few rows at a time.
    fn value(&self, layer: &Layer, linear: &Linear, tensor: &TensorProto) -> Result<Due> {
        let row_len = if linear.is_stored_out_in() { linear.in_features } else { linear.out_features };
        let weight: Bytes = self.model.tensor_bytes(tensor)?;
        let len = weight.len();
        let mergers = self.mergers(layer, linear)?;
        let (safe, module, data_type) = (self.options.safe, layer.module.to_string(), linear.data_type);
        let progress = self.options.progress.clone();
        let size = if data_type == DataType::Float { 4 } else { 2 };
        // Chunks hold whole groups of the rows that each merger needs together.
        let together = mergers.iter().fold(1, |all, (_, m)| least_common_multiple(all, m.rows_together()));
        let rows = (CHUNK / row_len.max(1)).max(1).next_multiple_of(together);
        let write = move |out: &mut dyn Write| -> Result<(), RopeError> {
            progress.iter().for_each(|p| p(&module));
            let mut values = Vec::new();
            for (chunk, bytes) in weight.chunks((rows * row_len * size).max(size)).enumerate() {
                widened(bytes, data_type, &mut values);
                let broken = |adapter: &str, at: usize, value: f32| {
                    RopeError::from(Error::Check(format!(
                        "module {module}: merging adapter {adapter} gives {value} at element {} of the weight; the \
                         adapter seems to be broken, nothing was written",
                        chunk * rows * row_len + at
                    )))
                };
                for (adapter, merger) in &mergers {
                    merger.apply(&mut values, row_len, chunk * rows);
                    if safe && let Some(at) = values.iter().position(|v| !v.is_finite()) {
                        return Err(broken(adapter, at, values[at]));
                    }
                }
                if data_type == DataType::Float {
                    out.write_all(bytemuck::cast_slice(&values))?;
                    continue;
                }
                let bytes = narrowed(&values, data_type);
                if safe {
                    // What is finite in float32 can be too large for the stored type.
                    widened(&bytes, data_type, &mut values);
                    if let (Some(at), Some((adapter, _))) = (values.iter().position(|v| !v.is_finite()), mergers.last())
                    {
                        return Err(broken(adapter, at, values[at]));
                    }
                }
                out.write_all(&bytes)?;
            }
            Ok(())
        };
        Ok(Due { len, write: Box::new(write) })
    }

    /// Puts `value` into the merged model's external file.
    fn external(&mut self, value: Due) -> Result<NewPlace> {
        let location = self.location.clone().ok_or_else(|| Error::config("the output path names no file"))?;
        let offset = aligned(self.end);
        self.end = offset + value.len as u64;
        let place = Place { location, offset, length: Some(value.len as u64) };
        self.external.push(value);
        Ok(NewPlace::External(place))
    }
}

/// Stored floats as float32, in `values`.
fn widened(bytes: &[u8], data_type: DataType, values: &mut Vec<f32>) {
    values.resize(bytes.len() / if data_type == DataType::Float { 4 } else { 2 }, 0.0);
    if data_type == DataType::Float {
        bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
        return;
    }
    let mut bits = vec![0u16; values.len()];
    bytemuck::cast_slice_mut(&mut bits).copy_from_slice(bytes);
    match data_type {
        DataType::Float16 => bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(values),
        _ => bits.reinterpret_cast::<half::bf16>().convert_to_f32_slice(values),
    }
}

/// Float32 values in the stored type, rounded to nearest.
fn narrowed(values: &[f32], data_type: DataType) -> Vec<u8> {
    let mut bits = vec![0u16; values.len()];
    match data_type {
        DataType::Float16 => bits.reinterpret_cast_mut::<half::f16>().convert_from_f32_slice(values),
        DataType::Bfloat16 => bits.reinterpret_cast_mut::<half::bf16>().convert_from_f32_slice(values),
        _ => return bytemuck::cast_slice(values).to_vec(),
    }
    bytemuck::cast_slice(&bits).to_vec()
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}

/// A row-major matrix of `rows` × `columns` elements of `size` bytes, turned.
fn transposed(bytes: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    for (row, line) in bytes.chunks_exact((columns * size).max(1)).enumerate() {
        for (column, value) in line.chunks_exact(size).enumerate() {
            let at = (column * rows + row) * size;
            out[at..at + size].copy_from_slice(value);
        }
    }
    out
}
