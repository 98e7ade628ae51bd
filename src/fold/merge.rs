//! Merged values on their way into the file: in place of what is stored, or as a weight of one's own where others read
//! that; made a few rows at a time while they are written.

use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::chain::{Chained, to_bytes};
use super::dead::Cut;
use super::part::Partly;
use super::values::{least_common_multiple, narrowed, transposed, widened};
use super::{FoldOptions, Layer, Stacked};
use crate::adapter::{Adapter, Dims, Layout, Merge};
use crate::base::Base;
use crate::inject::place::{self, turned};
use crate::onnx::external;
use crate::onnx::{DataType, Due, Model, Names, NewValues, Patch, RopeError, Slot, Tensor, TensorProto};
use crate::select::{Linear, Parameter, Source, Values};
use crate::{Error, Result};

/// Elements that are merged at a time: they stay in the processor's cache from the map to the file.
const CHUNK: usize = 1 << 16;

/// What an adapter does to a weight. The numbers for it are made ready when the weight is written, and dropped again.
pub(super) struct Change {
    adapter: Arc<Adapter>,
    module: String,
    dims: Dims,
    /// Those of the weight's outputs that change; `None`: all.
    outputs: Option<Range<usize>>,
    layout: Layout,
    undo: bool,
}

impl Change {
    pub(super) fn adapter(&self) -> &str {
        &self.adapter.name
    }

    pub(super) fn merger(&self) -> Result<Box<dyn Merge>> {
        let failed = |what: String| failed(&self.module, &self.adapter.name, &what);
        let Some(Tensor::F32(block)) = self.adapter.blocks.get(&self.module) else {
            return Err(failed("it has no block for this module".into()));
        };
        let variant = self.adapter.config.init_weights.variant();
        let merger = variant.merger(&self.dims, self.layout, block.view(), self.undo).map_err(failed)?;
        Ok(match &self.outputs {
            None => merger,
            Some(outputs) => Box::new(Partly { merger, outputs: outputs.clone(), out_in: self.layout.out_in }),
        })
    }
}

fn failed(module: &str, adapter: &str, what: &str) -> Error {
    Error::Check(format!("module {module}, adapter {adapter}: {what}"))
}

/// The merged weights on their way into the file.
pub(super) struct Merger<'a> {
    pub(super) model: &'a Model,
    pub(super) base: &'a Base<'a>,
    pub(super) options: &'a FoldOptions,
    pub(super) patch: &'a mut Patch,
    pub(super) values: NewValues,
    /// Who reads what in the base.
    pub(super) index: &'a Values<'a>,
    pub(super) names: Names,
    /// What the merged model does not read any longer.
    pub(super) cut: Cut,
}

impl Merger<'_> {
    /// The stored weight takes the blocks.
    pub(super) fn in_place(&mut self, layer: &Layer) -> Result<()> {
        let linear = layer.calls[0];
        let value = if linear.weight.is_matrix() {
            let tensor = place::source(self.base, &linear.weight.source)?;
            self.value(layer, linear, tensor)?
        } else {
            self.behind_chain(layer, linear, true)?
        };
        self.put(&linear.weight.source, value)
    }

    /// Gives a stored tensor another value.
    pub(super) fn put(&mut self, source: &Source, value: Due) -> Result<()> {
        let slot = match source {
            Source::Initializer { scope, index } => {
                Slot::Initializer { scope: self.base.scope(scope), index: self.base.initializer(scope, *index) }
            }
            Source::ConstantNode { scope, node } => {
                let attributes = &self.base.graph_at(scope)?.node[*node].attribute;
                let attribute = attributes.iter().position(|a| a.t.is_some());
                let attribute = attribute.ok_or_else(|| Error::model("a Constant node lost its tensor"))?;
                Slot::Attribute { scope: self.base.scope(scope), node: self.base.node(scope, *node), attribute }
            }
        };
        self.values.replaced.insert(slot, value);
        Ok(())
    }

    /// The module gets a weight of its own, as its nodes read it; the stored one stays as it is.
    pub(super) fn as_copy(&mut self, layer: &Layer) -> Result<()> {
        for (linear, name) in self.own_weights(layer, Self::add_copy)? {
            self.read_instead(linear, &name);
        }
        Ok(())
    }

    /// A new weight for each way in which the layer's nodes read theirs, made by `add`; its name for each of the nodes.
    pub(super) fn own_weights<'l>(
        &mut self,
        layer: &Layer<'l>,
        add: impl Fn(&mut Self, &Layer, &Linear, &str) -> Result<()>,
    ) -> Result<Vec<(&'l Linear, String)>> {
        let mut made: Vec<(&Linear, String)> = Vec::new();
        for linear in &layer.calls {
            let way = |l: &Linear| {
                let shape = l.form.shape(l.in_features, l.out_features, l.trans_b);
                let chain = (!l.weight.is_matrix()).then(|| l.weight.chain.clone());
                (l.trans_b, l.alpha.to_bits(), l.element, shape, chain)
            };
            let known = made.iter().find(|(known, _)| way(known) == way(linear));
            let name = match known {
                Some((_, name)) => name.clone(),
                None => {
                    let name = self.names.fresh(&format!("{}.weight.merged", layer.module));
                    add(self, layer, linear, &name)?;
                    name
                }
            };
            made.push((linear, name));
        }
        Ok(made)
    }

    /// The node of `linear` reads the initializer `name` as its matrix.
    pub(super) fn read_instead(&mut self, linear: &Linear, name: &str) {
        let node = self.base.node(&linear.scope, linear.node);
        self.patch.graph(&self.base.scope(&linear.scope)).rename_input(node, linear.matrix, name);
        let graph = self.index.graphs.iter().position(|view| view.scope == linear.scope);
        self.cut.inputs.extend(graph.map(|graph| (graph, linear.node, linear.matrix)));
    }

    fn add_copy(&mut self, layer: &Layer, linear: &Linear, name: &str) -> Result<()> {
        let tensor = place::source(self.base, &linear.weight.source)?.clone();
        let (inputs, outputs) = (linear.in_features, linear.out_features);
        let dims = if linear.trans_b { [outputs, inputs] } else { [inputs, outputs] };
        let shaped = linear.form.shape(inputs, outputs, linear.trans_b);
        let dims = shaped.as_deref().unwrap_or(&dims);
        if linear.data_type != linear.element || !linear.weight.is_matrix() {
            let value = self.behind_chain(layer, linear, false)?;
            let like = TensorProto { data_type: Some(linear.element as i32), ..tensor };
            self.add(name, dims, &like, value);
            return Ok(());
        }
        let mut value = self.value(layer, linear, &tensor)?;
        if linear.is_stored_out_in() != linear.trans_b {
            let (rows, columns) = if linear.is_stored_out_in() { (outputs, inputs) } else { (inputs, outputs) };
            let (write, size) = (value.write, value.len / (rows * columns).max(1));
            value.write = Box::new(move |out: &mut dyn Write| {
                let mut bytes = Vec::new();
                write(&mut bytes)?;
                Ok(out.write_all(&transposed(&bytes, rows, columns, size))?)
            });
        }
        self.add(name, dims, &tensor, value);
        Ok(())
    }

    /// A new initializer of the main graph, kept where `like` is.
    pub(super) fn add(&mut self, name: &str, dims: &[usize], like: &TensorProto, value: Due) {
        let header = TensorProto {
            name: Some(name.into()),
            dims: dims.iter().map(|d| *d as i64).collect(),
            data_type: like.data_type,
            ..Default::default()
        };
        self.values.added.push((header, value, external::is_external(like)));
    }

    /// A parameter that was trained in full takes the place of the base's; `value` is float32, as torch has it.
    pub(super) fn replace(&mut self, parameter: &Parameter, value: &Tensor) -> Result<()> {
        let tensor = place::source(self.base, &parameter.source)?.clone();
        let as_read = |transposed: bool| if transposed { turned(value.clone()) } else { value.clone() };
        let stored = as_read(if parameter.exclusive { parameter.stored_transposed } else { parameter.transposed });
        let dims = stored.dims().to_vec();
        let mut wanted = parameter.dims.clone();
        if parameter.exclusive && parameter.stored_transposed != parameter.transposed {
            wanted.reverse();
        }
        if dims != wanted {
            return Err(Error::model(format!(
                "{}: the adapter's value has shape {dims:?}, but the model's is {wanted:?}",
                parameter.path
            )));
        }
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
            return self.put(&parameter.source, value);
        }
        let name = self.names.fresh(&format!("{}.merged", parameter.path));
        self.add(&name, &dims, &tensor, value);
        for used in &parameter.uses {
            let node = self.base.node(&used.scope, used.node);
            self.patch.graph(&self.base.scope(&used.scope)).rename_input(node, used.input, &name);
        }
        Ok(())
    }

    /// What the layer's adapters do to the weight of `linear`, which lies `[out, in]` or not, in the order to do it.
    pub(super) fn changes(&self, layer: &Layer, linear: &Linear, out_in: bool) -> Result<Vec<Change>> {
        let layout = Layout { out_in, alpha: linear.alpha };
        let mut changes = Vec::new();
        for Stacked { adapter, on } in &layer.stack {
            let dims = adapter.config.dims(on.in_features, on.out_features);
            changes.push(Change {
                adapter: Arc::clone(adapter),
                dims: dims.map_err(|what| failed(&on.path, &adapter.name, &what))?,
                module: on.path.clone(),
                outputs: on.part.as_ref().map(|part| part.start..part.start + on.out_features),
                layout,
                undo: self.options.undo,
            });
        }
        if self.options.undo {
            changes.reverse();
        }
        Ok(changes)
    }

    /// The merged value of `tensor` as `linear` multiplies by it, to be made when it is written, a few rows at a time.
    fn value(&self, layer: &Layer, linear: &Linear, tensor: &TensorProto) -> Result<Due> {
        let row_len = if linear.is_stored_out_in() { linear.in_features } else { linear.out_features };
        let weight: Bytes = self.model.tensor_bytes(tensor)?;
        let len = weight.len();
        let changes = self.changes(layer, linear, linear.is_stored_out_in())?;
        let (safe, module, data_type) = (self.options.safe, layer.module.to_string(), linear.data_type);
        let progress = self.options.progress.clone();
        let additive = layer.is_additive();
        let size = match data_type {
            DataType::Double => 8,
            DataType::Float => 4,
            _ => 2,
        };
        let write = move |out: &mut dyn Write| -> Result<(), RopeError> {
            progress.iter().for_each(|p| p(&module));
            let mergers = changes.iter().map(|c| Ok((c.adapter(), c.merger()?))).collect::<Result<Vec<_>>>()?;
            // Chunks hold whole groups of the rows that each merger needs together.
            let together = mergers.iter().fold(1, |all, (_, m)| least_common_multiple(all, m.rows_together()));
            let rows = (CHUNK / row_len.max(1)).max(1).next_multiple_of(together);
            let mut values = Vec::new();
            for (chunk, bytes) in weight.chunks((rows * row_len * size).max(size)).enumerate() {
                if data_type != DataType::Double {
                    widened(bytes, data_type, &mut values);
                }
                let broken = |adapter: &str, at: usize, value: f32| {
                    RopeError::from(broken(&module, adapter, chunk * rows * row_len + at, value))
                };
                if data_type == DataType::Double {
                    let mut doubles = vec![0f64; bytes.len() / 8];
                    bytemuck::cast_slice_mut(&mut doubles).copy_from_slice(bytes);
                    for (adapter, merger) in &mergers {
                        merge_doubles(merger.as_ref(), additive, &mut doubles, row_len, chunk * rows);
                        if safe && let Some(at) = doubles.iter().position(|v| !v.is_finite()) {
                            return Err(broken(adapter, at, doubles[at] as f32));
                        }
                    }
                    out.write_all(bytemuck::cast_slice(&doubles))?;
                    continue;
                }
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

    /// The merged weight where nodes scale or move what is stored, or convert it: as `linear` reads it, or as it is to be
    /// `stored`. It is made in one piece when it is written.
    fn behind_chain(&self, layer: &Layer, linear: &Linear, stored: bool) -> Result<Due> {
        let weight = Chained::of(self.model, self.base, linear)?;
        let changes = self.changes(layer, linear, linear.trans_b)?;
        let row_len = if linear.trans_b { linear.in_features } else { linear.out_features };
        let (safe, module, element) = (self.options.safe, layer.module.to_string(), linear.element);
        let additive = layer.is_additive();
        let progress = self.options.progress.clone();
        let len = match stored {
            true => weight.byte_len(),
            false => to_bytes(&[0.0], element).len() * linear.in_features * linear.out_features,
        };
        let write = move |out: &mut dyn Write| -> Result<(), RopeError> {
            progress.iter().for_each(|p| p(&module));
            let before = weight.as_read()?;
            let mut values: Vec<f64> = before.iter().copied().collect();
            for change in &changes {
                let merger = change.merger()?;
                if element == DataType::Double {
                    merge_doubles(merger.as_ref(), additive, &mut values, row_len, 0);
                } else {
                    let mut floats: Vec<f32> = values.iter().map(|v| *v as f32).collect();
                    merger.apply(&mut floats, row_len, 0);
                    values = floats.into_iter().map(f64::from).collect();
                }
                if safe && let Some(at) = values.iter().position(|v| !v.is_finite()) {
                    return Err(broken(&module, change.adapter(), at, values[at] as f32).into());
                }
            }
            let bytes = match stored {
                true => weight.to_store(&before, values)?,
                false => to_bytes(&values, element),
            };
            Ok(out.write_all(&bytes)?)
        };
        Ok(Due { len, write: Box::new(write) })
    }
}

/// `merger` on a weight of float64, which it knows in float32 only: what an additive adapter adds is known without the
/// weight, another one sees it rounded.
fn merge_doubles(merger: &dyn Merge, additive: bool, doubles: &mut [f64], row_len: usize, first: usize) {
    let start: Vec<f32> = doubles.iter().map(|w| if additive { 0.0 } else { *w as f32 }).collect();
    let mut values = start.clone();
    merger.apply(&mut values, row_len, first);
    let changes = values.iter().zip(&start);
    doubles.iter_mut().zip(changes).for_each(|(w, (v, s))| *w += f64::from(*v) - f64::from(*s));
}

/// What is said of a merged weight with a `value` that is not finite.
pub(super) fn broken(module: &str, adapter: &str, at: usize, value: f32) -> Error {
    Error::Check(format!(
        "module {module}: merging adapter {adapter} gives {value} at element {at} of the weight; the adapter seems to be \
         broken, nothing was written"
    ))
}
