//! Layers whose weight is quantised: the adapter stays beside them as plain nodes, or goes into integers that are fitted
//! anew, or the weight becomes one of floats.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::sync::Arc;

use serde::Serialize;

use super::grid::Grid;
use super::merge::{Merger, broken};
use super::values::{narrowed, transposed};
use super::{FoldSummary, Layer};
use crate::adapter::{Adapter, FOLDED_KEY, Folded, Injection};
use crate::inject::emission::{Form, add_initializer};
use crate::inject::emit::emit;
use crate::inject::place::{self, Site};
use crate::onnx::{Due, Names, NodeProto, TensorProto, node};
use crate::select::{Linear, Source, Values};
use crate::{Error, Result};

/// What folding does to layers whose weight is quantised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QuantizedFold {
    /// The adapter stays beside the layer, as plain nodes.
    #[default]
    Keep,
    /// The merged weight is quantised again, in the same form.
    Requantize,
    /// The merged weight is stored in floating point, and an ordinary product reads it.
    Dequantize,
}

/// A layer that was quantised again.
#[derive(Debug, Clone, Serialize)]
pub struct RequantizedLayer {
    pub module: String,
    pub scheme: String,
    /// Root mean square of what rounding took from the merged weight, over that of the weight.
    pub error: f64,
    /// The same for the base's own grid, whose rounding is taken to be even over a step.
    pub base_error: f64,
}

/// Folds the quantised `layers`; those that cannot go the way of `mode` keep their adapters beside them, with a warning.
pub(super) fn fold(
    merge: &mut Merger,
    layers: &[&Layer],
    adapters: &[Arc<Adapter>],
    ours: &HashMap<&Source, usize>,
    summary: &mut FoldSummary,
) -> Result<()> {
    let mode = merge.options.quantized;
    let mut kept: BTreeSet<String> = BTreeSet::new();
    for layer in layers {
        let refused = match mode {
            QuantizedFold::Keep => {
                kept.extend(layer.changed());
                continue;
            }
            QuantizedFold::Requantize => obstacle(layer, ours),
            QuantizedFold::Dequantize => {
                layer.calls.iter().find_map(|c| cannot_be_plain(c, merge.index, layer.module, adapters))
            }
        };
        match refused {
            Some(why) => {
                summary.warnings.push(format!("{}: its adapter stays beside it: {why}", layer.module));
                kept.extend(layer.changed());
            }
            None if mode == QuantizedFold::Requantize => {
                summary.requantized.push(merge.requantized(layer)?);
            }
            None => {
                merge.dequantized(layer)?;
                summary.dequantized.push(layer.module.to_string());
            }
        }
    }
    if !kept.is_empty() {
        keep(merge, adapters, &kept)?;
        summary.kept = kept.into_iter().collect();
    }
    Ok(())
}

/// Why the layer's integers cannot be made anew where they stand, if so.
fn obstacle(layer: &Layer, ours: &HashMap<&Source, usize>) -> Option<String> {
    let first = layer.calls[0];
    if let Some(Err(why)) = first.quantized.as_ref().map(|q| &q.scheme) {
        return Some(why.clone());
    }
    let weight = &first.weight;
    let alone =
        ours.get(&weight.source) == Some(&weight.uses) && weight.uses == layer.calls.len() && layer.reads_one_weight();
    (!alone).then(|| format!("its stored integers, {}, serve others as well", weight.name))
}

/// Why a call of a module cannot be an ordinary product, if so.
fn cannot_be_plain(linear: &Linear, values: &Values, module: &str, adapters: &[Arc<Adapter>]) -> Option<String> {
    if let Some(Err(why)) = linear.quantized.as_ref().map(|q| &q.scheme) {
        return Some(why.clone());
    }
    if linear.beside.quantize.is_some() {
        return Some("its result goes on as integers".into());
    }
    let own_bias = linear.bias.as_ref().is_some_and(|b| b.scope == linear.scope && b.node == linear.node);
    let trained = || adapters.iter().any(|a| a.saved.contains_key(&format!("{module}.bias")));
    match linear.op.as_str() {
        "MatMul" | "Gemm" | "FusedMatMul" => None,
        "QGemm" => Some("its bias is one of integers".into()),
        _ if own_bias && trained() => Some("its bias is trained, too".into()),
        "QLinearMatMul" => {
            let graph = values.graphs.iter().position(|view| view.scope == linear.scope)?;
            let output = |n: usize| values.node(graph, n).and_then(|node| node.output_at(0));
            let exit = values.node(graph, linear.beside.exit)?.input_at(0);
            let sum = linear.bias.as_ref().filter(|b| b.scope == linear.scope).map(|b| b.node);
            let straight = exit == output(linear.node) || sum.is_some_and(|n| exit == output(n));
            (!straight).then(|| "what is added to it is no bias".into())
        }
        _ => None,
    }
}

/// Puts the adapters of the modules `kept` into the merged model as nodes and initializers, and notes which they are.
fn keep(merge: &mut Merger, adapters: &[Arc<Adapter>], kept: &BTreeSet<String>) -> Result<()> {
    let linears = merge.base.linears();
    let site = Site { model: merge.model, base: merge.base, linears: &linears };
    let mut record = Injection::default();
    let mut values = Vec::new();
    for adapter in adapters {
        let mut part = Adapter::clone(adapter);
        part.saved.clear();
        part.blocks.retain(|module, _| kept.contains(module));
        if part.blocks.is_empty() {
            continue;
        }
        let (placed, tensors) = site.place(part, &mut merge.names)?;
        record.active.push(placed.name.clone());
        record.adapters.push(placed);
        values.extend(tensors);
    }
    let emission = emit(merge.base, &record, &mut merge.names, Form::Served)?;
    emission.patch(merge.base, merge.patch);
    let constants = values.iter().map(|(name, value)| value.to_proto(name)).chain(emission.constants);
    for tensor in constants {
        add_initializer(&merge.model.proto, merge.patch, tensor, false);
    }
    let mut folded = Folded::read(merge.model);
    folded.beside.extend(kept.iter().cloned());
    folded.nodes.extend(emission.written.nodes);
    let json = serde_json::to_string(&folded).map_err(|e| Error::model(format!("the note cannot be written: {e}")))?;
    merge.patch.set_metadata.push((FOLDED_KEY.into(), json));
    Ok(())
}

impl Merger<'_> {
    /// The merged weight of a quantised layer, in the order it is stored in.
    fn merged(&self, layer: &Layer, linear: &Linear) -> Result<(Vec<f32>, [usize; 2])> {
        let grid = Grid::read(self.model, self.base, linear)?;
        let matrix =
            linear.quantized.as_ref().and_then(|q| q.scheme.as_ref().ok()).map(|s| s.matrix).unwrap_or_default();
        let mut values = grid.values();
        for change in self.changes(layer, linear, linear.is_stored_out_in())? {
            change.merger()?.apply(&mut values, matrix[1], 0);
            if self.options.safe
                && let Some(at) = values.iter().position(|v| !v.is_finite())
            {
                return Err(broken(layer.module, change.adapter(), at, values[at]));
            }
        }
        Ok((values, matrix))
    }

    fn requantized(&mut self, layer: &Layer) -> Result<RequantizedLayer> {
        let linear = layer.calls[0];
        let (values, _) = self.merged(layer, linear)?;
        let done = Grid::read(self.model, self.base, linear)?.requantized(&values);
        let quantized = linear.quantized.as_ref().ok_or_else(|| Error::model("a layer lost its scheme"))?;
        let scheme = quantized.scheme.as_ref().map_err(|why| Error::model(why.clone()))?;
        let laid = |laid: &Option<crate::select::Laid>| laid.as_ref().map(|l| l.source.clone());
        let parts = [
            (Some(linear.weight.source.clone()), Some(done.integers)),
            (laid(&scheme.scale), done.scales),
            (laid(&scheme.zero), done.zeros),
        ];
        for (source, bytes) in parts {
            if let (Some(source), Some(bytes)) = (source, bytes) {
                self.put(&source, due(bytes))?;
            }
        }
        self.options.progress.iter().for_each(|p| p(layer.module));
        Ok(RequantizedLayer {
            module: layer.module.to_string(),
            scheme: quantized.describe(),
            error: done.error,
            base_error: done.base_error,
        })
    }

    fn dequantized(&mut self, layer: &Layer) -> Result<()> {
        for (linear, weight) in self.own_weights(layer, Self::add_floats)? {
            if linear.reads_floats() {
                self.read_instead(linear, &weight);
            } else {
                self.plain_product(linear, &weight)?;
            }
        }
        Ok(())
    }

    /// An ordinary product takes the place of a quantised one, where its result comes out in floating point.
    fn plain_product(&mut self, linear: &Linear, weight: &str) -> Result<()> {
        let (values, names, cut) = (self.index, &mut self.names, &mut self.cut);
        let gone = || Error::model(format!("module {} is gone", linear.path));
        let graph = values.graphs.iter().position(|view| view.scope == linear.scope).ok_or_else(gone)?;
        let exit = values.node(graph, linear.beside.exit).ok_or_else(gone)?;
        let product = values.node(graph, linear.node).ok_or_else(gone)?;
        let output = exit.output_at(0).ok_or_else(gone)?;
        let mut before: Vec<NodeProto> = Vec::new();
        let mut reads = vec![linear.beside.input.clone()];
        let mut x = linear.beside.input.clone();
        let named = |mut node: NodeProto, names: &mut Names, what: &str| {
            node.name = Some(names.fresh(&format!("{}.{what}", linear.path)));
            node
        };
        if let Some((scale, zero)) = &linear.beside.dequantize {
            let operands: Vec<&str> = [&x, scale].into_iter().chain(zero).map(String::as_str).collect();
            reads.extend(operands.iter().map(|s| s.to_string()));
            let real = names.fresh(&format!("{}.real", linear.path));
            before.push(named(node("DequantizeLinear", &operands, &[&real]), names, "dequantize"));
            x = real;
        }
        let own = linear.bias.as_ref().filter(|b| b.scope == linear.scope && b.node == linear.node);
        let mut last = node("MatMul", &[&x, weight], &[output]);
        if let Some(bias) = own.and_then(|b| product.input_at(b.input)) {
            let sum = names.fresh(&format!("{}.product", linear.path));
            before.push(named(node("MatMul", &[&x, weight], &[&sum]), names, "matmul"));
            last = node("Add", &[&sum, bias], &[output]);
            reads.push(bias.to_string());
        }
        // A bias that a QLinearAdd on the way adds, in floating point.
        let added = linear.bias.as_ref().filter(|b| b.scope == linear.scope && b.node != linear.node);
        if let Some(bias) = added
            && let Some(sum) = values.node(graph, bias.node).filter(|n| n.op_type() == "QLinearAdd")
        {
            let i = bias.input;
            let operands: Vec<&str> = (i..i + 3).filter_map(|i| sum.input_at(i)).collect();
            reads.extend(operands.iter().map(|s| s.to_string()));
            let real = names.fresh(&format!("{}.bias.real", linear.path));
            before.push(named(node("DequantizeLinear", &operands, &[&real]), names, "dequantize"));
            let product = names.fresh(&format!("{}.product", linear.path));
            before.push(named(node("MatMul", &[&x, weight], &[&product]), names, "matmul"));
            last = node("Add", &[&product, &real], &[output]);
        }
        last.name = Some(names.fresh(&format!("{}.{}", linear.path, last.op_type().to_lowercase())));
        last.metadata_props = exit.metadata_props.clone();
        for name in reads {
            if let Some(((at, name), _)) = values.lookup(graph, &name) {
                cut.alive.insert((at, name.to_string()));
            }
        }
        cut.inputs.extend((0..exit.input.len()).map(|i| (graph, linear.beside.exit, i)));
        let index = self.base.node(&linear.scope, linear.beside.exit);
        let patch = self.patch.graph(&self.base.scope(&linear.scope));
        patch.insert_before.entry(index).or_default().extend(before);
        patch.replace_nodes.insert(index, prost::Message::encode_to_vec(&last).into());
        Ok(())
    }

    /// The merged weight in floating point, as the layer's product reads it, as a new initializer.
    fn add_floats(&mut self, layer: &Layer, linear: &Linear, name: &str) -> Result<()> {
        let (values, [rows, columns]) = self.merged(layer, linear)?;
        let element = linear.element;
        let mut bytes = narrowed(&values, element);
        let mut dims = [rows, columns];
        if linear.is_stored_out_in() != linear.trans_b {
            bytes = transposed(&bytes, rows, columns, bytes.len() / (rows * columns).max(1));
            dims.reverse();
        }
        let like = place::source(self.base, &linear.weight.source)?.clone();
        let like = TensorProto { data_type: Some(element as i32), ..like };
        self.add(name, &dims, &like, due(bytes));
        Ok(())
    }
}

fn due(bytes: Vec<u8>) -> Due {
    Due { len: bytes.len(), write: Box::new(move |out: &mut dyn Write| Ok(out.write_all(&bytes)?)) }
}
