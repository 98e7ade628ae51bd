//! Injected → merged: each adapted weight takes its blocks in, the side branches go, and what remains is a plain ONNX
//! model of the base's shape. Weights are made one at a time, while the file is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use ndarray::Array2;
use serde::Serialize;

use crate::adapter::{AdapterRecord, Injection, bone};
use crate::onnx::external::{self, Place};
use crate::onnx::{
    AttributeProto, Due, Durability, Model, Names, NewPlace, NewTensor, NodeProto, Patch, Rope, RopeError, Scope,
    Tensor, TensorProto, copy_external, write_atomic,
};
use crate::select::{self, Linear, Source};
use crate::unload::strip;
use crate::{Error, Result, did_you_mean};

/// How to fold.
#[derive(Debug, Clone, Default)]
pub struct FoldOptions {
    /// Refuse a merged weight with a value that is not finite, before anything appears under the final name.
    pub safe: bool,
    /// The adapters to merge, in this order; `None`: all, in the order they were injected.
    pub adapters: Option<Vec<String>>,
    /// Whether to wait until the merged model is on the disk.
    pub durability: Durability,
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
    pub head: Option<String>,
}

/// One adapted layer: its nodes as the injected file has them, and the blocks it takes.
struct Layer<'a> {
    module: &'a str,
    calls: Vec<&'a Linear>,
    blocks: Vec<Block>,
}

#[derive(Clone)]
struct Block {
    adapter: String,
    /// `[r, out]`
    values: Arc<Array2<f32>>,
}

/// External weights of the merged model start at multiples of this (ONNX `docs/ExternalData.md`).
const ALIGNMENT: u64 = 4096;

/// Elements that are merged at a time: they stay in the processor's cache from the map to the file.
const CHUNK: usize = 1 << 16;

/// Plans the fold. Blocks are read, weights are not.
pub fn fold(model: &Model, options: &FoldOptions, out: &Path) -> Result<Folded> {
    let record = Injection::expect(model)?;
    let adapters = chosen(&record, options)?;
    let mut patch = strip(model, &record, true)?;
    let linears = select::linears(model);
    let layers = layers(model, &record, &adapters, &linears)?;

    // How many of a stored weight's readers are adapted.
    let mut ours: HashMap<&Source, usize> = HashMap::new();
    for linear in layers.iter().flat_map(|l| &l.calls) {
        *ours.entry(&linear.weight.source).or_default() += 1;
    }
    let mut names = Names::of(&model.proto);
    let mut summary = FoldSummary {
        adapters: adapters.iter().map(|a| a.name.clone()).collect(),
        head: record.head.as_ref().map(|h| h.name.clone()),
        ..FoldSummary::default()
    };
    let location = data_location(model, out);
    let mut merge = Merge { model, safe: options.safe, patch: &mut patch, external: Vec::new(), location, end: 0 };

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

fn chosen<'a>(record: &'a Injection, options: &FoldOptions) -> Result<Vec<&'a AdapterRecord>> {
    let Some(wanted) = &options.adapters else { return Ok(record.adapters.iter().collect()) };
    wanted
        .iter()
        .map(|name| {
            record.adapters.iter().find(|a| &a.name == name).ok_or_else(|| {
                let known: Vec<&str> = record.adapters.iter().map(|a| a.name.as_str()).collect();
                Error::config(format!(
                    "there is no adapter {name:?}; the model has {}.{}",
                    known.join(", "),
                    did_you_mean(name, known.iter().copied())
                ))
            })
        })
        .collect()
}

/// The adapted layers, each with the blocks of all adapters that sit on it, in the adapters' order.
fn layers<'a>(
    model: &Model,
    record: &'a Injection,
    adapters: &[&'a AdapterRecord],
    linears: &'a [Linear],
) -> Result<Vec<Layer<'a>>> {
    let graph = model.graph();
    let mut layers: Vec<Layer> = Vec::new();
    for adapter in adapters {
        for target in &adapter.targets {
            let gone = |what: &str| {
                Error::file(
                    &model.path,
                    format!("another tool has changed this model since it was injected: {what}; inject the base again"),
                )
            };
            let block = graph
                .initializer
                .iter()
                .find(|t| t.name() == target.parameter)
                .ok_or_else(|| gone(&format!("parameter {} is gone", target.parameter)))?;
            let values = match model.tensor(block)? {
                Tensor::F32(a) if a.ndim() == 2 && a.shape()[1] == target.out_features => {
                    a.into_dimensionality().map_err(|e| Error::model(e.to_string()))?
                }
                other => {
                    return Err(gone(&format!(
                        "parameter {} has shape {:?} where [r, {}] of float32 belongs",
                        target.parameter,
                        other.dims(),
                        target.out_features
                    )));
                }
            };
            let block = Block { adapter: adapter.name.clone(), values: Arc::new(values) };
            // The adapted node is the one at the start of the chain of renamed outputs.
            let base_outputs = chain_starts(record, target.calls.iter().map(|c| c.base_output.as_str()));
            let calls: Vec<&Linear> = linears
                .iter()
                .filter(|l| {
                    let node = model.graph_at(&l.scope).and_then(|g| g.node.get(l.node));
                    node.and_then(|n| n.output_at(0)).is_some_and(|o| base_outputs.contains(&o))
                })
                .collect();
            let sized = |l: &&Linear| (l.in_features, l.out_features) == (target.in_features, target.out_features);
            if calls.len() != target.calls.len() || !calls.iter().all(sized) {
                return Err(gone(&format!(
                    "a node of module {} is no linear layer with a constant weight any more",
                    target.module
                )));
            }
            let place = |l: &Linear| (l.scope.clone(), l.node);
            match layers.iter_mut().find(|layer| place(layer.calls[0]) == place(calls[0])) {
                Some(layer) => layer.blocks.push(block),
                None => layers.push(Layer { module: &target.module, calls, blocks: vec![block] }),
            }
        }
    }
    Ok(layers)
}

/// The outputs of the base nodes behind `outputs`: where a later adapter (to be merged or not) renamed the same node
/// again, its last name.
fn chain_starts<'a>(record: &'a Injection, outputs: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let calls: Vec<_> = record.adapters.iter().flat_map(|a| &a.targets).flat_map(|t| &t.calls).collect();
    outputs
        .map(|mut name| {
            while let Some(later) = calls.iter().find(|c| c.output == name) {
                name = &later.base_output;
            }
            name
        })
        .collect()
}

/// The merged weights on their way into the patch.
struct Merge<'a> {
    model: &'a Model,
    safe: bool,
    patch: &'a mut Patch,
    external: Vec<Due>,
    location: Option<String>,
    end: u64,
}

impl Merge<'_> {
    /// The stored weight takes the blocks.
    fn in_place(&mut self, layer: &Layer) -> Result<()> {
        let linear = layer.calls[0];
        match &linear.weight.source {
            Source::Initializer { scope, index } => {
                let tensor = &self.graph(scope)?.initializer[*index];
                let value = self.value(layer, linear, tensor)?;
                let place = if external::is_external(tensor) { self.external(value)? } else { NewPlace::Inline(value) };
                self.patch.graph(scope).replace_values.insert(*index, place);
            }
            Source::ConstantNode { scope, node } => {
                let mut constant: NodeProto = self.graph(scope)?.node[*node].clone();
                let tensor = constant.attribute.iter_mut().find_map(|a: &mut AttributeProto| a.t.as_mut());
                let tensor = tensor.ok_or_else(|| Error::model("a Constant node lost its tensor"))?;
                let value = self.value(layer, linear, tensor)?;
                let mut bytes = Vec::with_capacity(value.len);
                (value.write)(&mut bytes).map_err(|e| e.at(&self.model.path))?;
                tensor.raw_data = Some(bytes.into());
                tensor.float_data.clear();
                let bytes = prost::Message::encode_to_vec(&constant);
                self.patch.graph(scope).replace_nodes.insert(*node, bytes.into());
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
            self.patch.graph(&linear.scope).rename_input(linear.node, 1, &name);
        }
        Ok(())
    }

    fn add_copy(&mut self, layer: &Layer, linear: &Linear, name: &str) -> Result<()> {
        let tensor = match &linear.weight.source {
            Source::Initializer { scope, index } => self.graph(scope)?.initializer[*index].clone(),
            Source::ConstantNode { scope, node } => {
                let constant = &self.graph(scope)?.node[*node];
                let tensor = constant.attribute.iter().find_map(|a| a.t.clone());
                tensor.ok_or_else(|| Error::model("a Constant node lost its tensor"))?
            }
        };
        let mut value = self.value(layer, linear, &tensor)?;
        let (rows, columns) = if linear.is_stored_out_in() {
            (linear.out_features, linear.in_features)
        } else {
            (linear.in_features, linear.out_features)
        };
        let dims = if linear.is_stored_out_in() == linear.trans_b {
            [rows, columns]
        } else {
            let write = value.write;
            value.write = Box::new(move |out: &mut dyn Write| {
                let mut bytes = Vec::new();
                write(&mut bytes)?;
                Ok(out.write_all(&transposed(&bytes, rows, columns))?)
            });
            [columns, rows]
        };
        let mut header = TensorProto {
            name: Some(name.into()),
            dims: dims.iter().map(|d| *d as i64).collect(),
            data_type: tensor.data_type,
            ..Default::default()
        };
        let main = Scope::new();
        if external::is_external(&tensor) {
            if let NewPlace::External(place) = self.external(value)? {
                let entries = place.entries();
                header.external_data = entries.external_data;
                header.data_location = entries.data_location;
            }
            self.patch.graph(&main).add_initializers.push(header.into());
        } else {
            self.patch.graph(&main).add_initializers.push(NewTensor { header, value: Some(value) });
        }
        Ok(())
    }

    fn graph(&self, scope: &Scope) -> Result<&crate::onnx::GraphProto> {
        self.model.graph_at(scope).ok_or_else(|| Error::model("a subgraph is gone"))
    }

    /// The merged value of `tensor` as `linear` multiplies by it, to be made when it is written, a few rows at a time.
    fn value(&self, layer: &Layer, linear: &Linear, tensor: &TensorProto) -> Result<Due> {
        let stored_out_in = linear.is_stored_out_in();
        let row_len = if stored_out_in { linear.in_features } else { linear.out_features };
        let weight: Bytes = self.model.tensor_bytes(tensor)?;
        let len = weight.len();
        let mergers: Vec<(String, bone::Merger)> = layer
            .blocks
            .iter()
            .map(|b| (b.adapter.clone(), bone::Merger::new(b.values.view(), stored_out_in, linear.alpha)))
            .collect();
        let (safe, module) = (self.safe, layer.module.to_string());
        let write = move |out: &mut dyn Write| -> Result<(), RopeError> {
            let rows = (CHUNK / row_len.max(1)).max(1);
            let mut values = vec![0f32; rows * row_len];
            for (chunk, bytes) in weight.chunks(rows * row_len * size_of::<f32>()).enumerate() {
                let values = &mut values[..bytes.len() / size_of::<f32>()];
                bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
                for (adapter, merger) in &mergers {
                    merger.merge(values, row_len, chunk * rows);
                    if safe && let Some(at) = values.iter().position(|v| !v.is_finite()) {
                        return Err(Error::Check(format!(
                            "module {module}: merging adapter {adapter} gives {} at element {} of the weight; the \
                             adapter seems to be broken, nothing was written",
                            values[at],
                            chunk * rows * row_len + at
                        ))
                        .into());
                    }
                }
                out.write_all(bytemuck::cast_slice(values))?;
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

/// A row-major f32 matrix of `rows` × `columns`, turned.
fn transposed(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    for (row, line) in bytes.chunks_exact((columns * 4).max(1)).enumerate() {
        for (column, value) in line.chunks_exact(4).enumerate() {
            let at = (column * rows + row) * 4;
            out[at..at + 4].copy_from_slice(value);
        }
    }
    out
}
