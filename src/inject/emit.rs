//! Writes the nodes of a model's active adapters around each adapted node of the base.

use std::collections::HashMap;
use std::ops::Range;

use super::emission::{Edit, Emission, Form, TILED_GEMM, TILED_MATMUL};
use super::product;
use crate::adapter::{
    AdapterRecord, BoneConfig, Constants, Dims, Injection, Layout, Renamed, SavedRecord, Variant, Writer, tile,
};
use crate::base::Base;
use crate::onnx::{AttributeProto, DataType, Names, NodeProto, Scope};
use crate::select::{self, Linear};
use crate::{Error, Result};

/// An adapted weight, and the blocks D that it took in (additive variants).
struct Adapted {
    weight: String,
    blocks: Vec<String>,
}

/// One node that computes an adapted layer, and the adapters on it.
struct Call<'a> {
    path: &'a str,
    linear: &'a Linear,
    node: &'a NodeProto,
    stack: &'a [Stacked<'a>],
}

/// An adapter on a layer, or on a part of one.
struct Stacked<'a> {
    module: &'a str,
    adapter: &'a str,
    config: &'a BoneConfig,
    parameter: &'a str,
    /// Sizes of the module, which may be a part.
    dims: Dims,
    /// The layer's outputs that are the part.
    part: Option<Range<usize>>,
}

impl Stacked<'_> {
    fn variant(&self) -> &'static dyn Variant {
        self.config.init_weights.variant()
    }

    /// Sizes of what an additive adapter adds to a layer of `outputs`.
    fn whole(&self, outputs: usize) -> Dims {
        Dims { outputs, ..self.dims }
    }

    /// The nodes of the block of such an adapter, of all the layer's columns.
    fn write_block(&self, outputs: usize, writer: &mut Writer) -> String {
        writer.prefix = format!("{}.bone.{}", self.module, self.adapter);
        let block = self.variant().write_block(&self.dims, self.parameter, writer);
        product::widened(block, self.dims.r, self.part.as_ref(), outputs, writer)
    }
}

/// Plans the nodes of `record`'s active adapters on `base`.
///
/// # Errors
/// A layer that is not there (any more), or one that two kinds of adapters stand on.
pub(crate) fn emit(base: &Base, record: &Injection, names: &mut Names, form: Form) -> Result<Emission> {
    let linears = base.linears();
    let mut emitter = Emitter { base, names, form, shared: Constants::default(), emission: Emission::default() };
    emitter.saved(record, &linears)?;
    for (path, stack) in stacks(record, &linears)? {
        let in_full = record.active().find(|a| a.saved.iter().any(|s| s.path.strip_suffix(".weight") == Some(path)));
        if let Some(other) = in_full {
            return Err(Error::config(format!(
                "module {path} is adapted by {} and trained in full by {}: only one of them can be active at a time",
                stack[0].adapter, other.name
            )));
        }
        let variant = stack[0].variant();
        let mut made = HashMap::new();
        for linear in linears.iter().filter(|l| l.path == path) {
            let node = &base.graph_at(&linear.scope)?.node[linear.node];
            emitter.call(&Call { path, linear, node, stack: &stack }, variant, &mut made)?;
        }
    }
    let Emitter { shared, mut emission, .. } = emitter;
    emission.written.constants = shared.tensors.iter().map(|t| t.name().to_string()).collect();
    emission.constants = shared.tensors;
    Ok(emission)
}

/// The active adapters of each layer, those of its parts among them, in the order they apply.
fn stacks<'a>(record: &'a Injection, linears: &'a [Linear]) -> Result<Vec<(&'a str, Vec<Stacked<'a>>)>> {
    let mut stacks: Vec<(&str, Vec<Stacked>)> = Vec::new();
    let mut at: HashMap<&str, usize> = HashMap::new();
    let mut by_path: HashMap<&str, &Linear> = HashMap::new();
    for linear in linears {
        by_path.entry(&linear.path).or_insert(linear);
    }
    for adapter in record.active() {
        for target in &adapter.targets {
            let module = target.module.as_str();
            let Some(linear) = by_path.get(module) else {
                return Err(Error::model(format!("module {module} is no linear layer of this model any more")));
            };
            let config = &adapter.config;
            let dims = config.dims(linear.in_features, linear.out_features);
            let stacked = Stacked {
                module,
                adapter: &adapter.name,
                config,
                parameter: &target.parameter,
                dims: dims.map_err(|what| Error::config(format!("module {module}: {what}")))?,
                part: linear.part.as_ref().map(|p| p.start..p.start + linear.out_features),
            };
            let whole = linear.whole();
            let index = *at.entry(whole).or_insert(stacks.len());
            if index == stacks.len() {
                stacks.push((whole, Vec::new()));
            }
            let stack = &mut stacks[index].1;
            if let Some(below) = stack.first() {
                let kinds = [below, &stacked].map(|s| s.variant().name());
                if kinds[0] != kinds[1] {
                    return Err(Error::config(format!(
                        "module {module}: adapter {} is {}, but {} is {}; only adapters of one kind work together on a layer \
                         (PEFT fails on others, or computes something else). To choose: `bone-onnx adapter activate --adapters {}`",
                        below.adapter, kinds[0], stacked.adapter, kinds[1], stacked.adapter
                    )));
                }
            }
            stack.push(stacked);
        }
    }
    Ok(stacks)
}

struct Emitter<'a> {
    base: &'a Base<'a>,
    names: &'a mut Names,
    form: Form<'a>,
    shared: Constants,
    emission: Emission,
}

impl Emitter<'_> {
    /// One node that computes an adapted layer. `made`: adapted weights by what they are made of, for the other
    /// calls of the same module.
    fn call(
        &mut self,
        call: &Call,
        variant: &dyn Variant,
        made: &mut HashMap<(Scope, String, bool), Adapted>,
    ) -> Result<()> {
        let Call { linear, node, stack, .. } = *call;
        let dropout = |s: &Stacked| match self.form {
            Form::Trained { trained, dropout: Some(seed) }
                if trained.iter().any(|t| t == s.adapter) && s.config.miss_dropout > 0.0 =>
            {
                Some((s.config.miss_dropout, seed))
            }
            _ => None,
        };
        let dropouts: Vec<Option<(f64, u64)>> = stack.iter().map(dropout).collect();
        let is_plain = linear.alpha == 1.0 && !linear.trans_a && (node.is("MatMul") || node.is("Gemm"));
        let tiles = matches!(self.form, Form::Trained { .. })
            && linear.quantized.is_none()
            && linear.element == DataType::Float
            && is_plain
            && dropouts.iter().all(Option::is_none);
        if linear.form == select::Form::Within && dropouts.iter().any(Option::is_some) {
            return Err(Error::config(format!(
                "miss_dropout: module {} is a part of what {} does, so its inputs cannot drop out for the adapter alone; \
                 set it to 0",
                call.path, linear.op
            )));
        }
        match variant.is_additive() {
            true if !tiles && linear.form != select::Form::Within => self.branch(call, &dropouts),
            _ => self.weight(call, tiles && variant.is_additive(), made),
        }
    }

    fn writer(&mut self, path: &str, adapter: &str) -> Writer<'_> {
        Writer {
            names: self.names,
            constants: &mut self.shared,
            prefix: format!("{path}.bone.{adapter}"),
            nodes: Vec::new(),
        }
    }

    fn edit(&mut self, linear: &Linear) -> &mut Edit {
        self.emission.edits.entry((linear.scope.clone(), linear.node)).or_default()
    }

    fn note(&mut self, nodes: &[NodeProto]) {
        self.emission.written.nodes.extend(nodes.iter().map(|n| n.name().to_string()));
    }

    /// `y = base(x) + S(x)·D₁ + S(x)·D₂ …`, in float32 where the base computes in less, as PEFT does.
    fn branch(&mut self, call: &Call, dropouts: &[Option<(f64, u64)>]) -> Result<()> {
        let Call { path, linear, stack, .. } = *call;
        let exit = &self.base.graph_at(&linear.scope)?.node[linear.beside.exit];
        let Some(output) = exit.output_at(0) else { return Ok(()) };
        let (half, double) = (is_half(linear.element), linear.element == DataType::Double);
        let base_output = self.names.fresh(&format!("{output}.base"));
        let mut writer = self.writer(path, stack[0].adapter);
        let mut x = linear.beside.input.clone();
        if let Some(of_data) = &linear.beside.dequantize {
            x = writer.op("DequantizeLinear", "real", &with_grid(&x, of_data), Vec::new());
        }
        if linear.trans_a {
            x = writer.op("Transpose", "rows", &[&x], vec![AttributeProto::ints("perm", &[1, 0])]);
        }
        let mut sum = base_output.clone();
        let integers = linear.beside.quantize.as_ref();
        if let Some(of_result) = integers {
            sum = writer.op("DequantizeLinear", "base", &with_grid(&sum, of_result), Vec::new());
        }
        if half {
            x = writer.cast(&x, "x", DataType::Float);
            sum = writer.cast(&sum, "wide", DataType::Float);
        }
        for (i, stacked) in stack.iter().enumerate() {
            writer.prefix = format!("{}.bone.{}", stacked.module, stacked.adapter);
            let seen = match dropouts[i] {
                Some((p, seed)) => dropped(&mut writer, &x, p, seed),
                None => x.clone(),
            };
            let mut block = stacked.write_block(linear.out_features, &mut writer);
            if double {
                block = writer.cast(&block, "block", DataType::Double);
            }
            let dims = stacked.whole(linear.out_features);
            let delta = product::write_branch(&linear.form, &dims, (&seen, &block), linear.element, &mut writer);
            let is_last = i + 1 == stack.len();
            if is_last && !half && integers.is_none() {
                writer.op_to("Add", &[&sum, &delta], output, Vec::new());
            } else {
                sum = writer.op("Add", "sum", &[&sum, &delta], Vec::new());
            }
        }
        if half {
            let to = vec![AttributeProto::int("to", linear.element as i64)];
            writer.op_to("Cast", &[&sum], output, to);
        } else if let Some(of_result) = integers {
            writer.op_to("QuantizeLinear", &with_grid(&sum, of_result), output, Vec::new());
        }
        let nodes = writer.nodes;
        self.note(&nodes);
        self.emission.written.outputs.push(Renamed { base: output.into(), now: base_output.clone() });
        let edit = self.emission.edits.entry((linear.scope.clone(), linear.beside.exit)).or_default();
        edit.output = Some(base_output);
        edit.after.extend(nodes);
        Ok(())
    }

    /// The node reads W' in place of W. With `tiles` it gets the blocks, too, for its derivative rule.
    fn weight(&mut self, call: &Call, tiles: bool, made: &mut HashMap<(Scope, String, bool), Adapted>) -> Result<()> {
        let Call { path, linear, node, stack } = *call;
        let Some(weight) = node.input_at(linear.matrix) else { return Ok(()) };
        let key = (linear.scope.clone(), weight.to_string(), linear.trans_b);
        if !made.contains_key(&key) {
            let adapted = self.adapted(call, weight);
            self.emission.written.inputs.push(Renamed { base: weight.into(), now: adapted.weight.clone() });
            made.insert(key.clone(), adapted);
        }
        let adapted = &made[&key];
        let mut blocks = Vec::new();
        for (block, stacked) in adapted.blocks.iter().zip(stack) {
            blocks.push(block.clone());
            blocks.push(self.writer(path, stack[0].adapter).selection(stacked.dims.inputs, stacked.dims.r));
        }
        let op = if node.is("Gemm") { TILED_GEMM } else { TILED_MATMUL };
        let edit = self.edit(linear);
        edit.inputs.push((linear.matrix, adapted.weight.clone()));
        edit.tiled = tiles.then_some((op, blocks));
        Ok(())
    }

    /// Writes W' before the node.
    fn adapted(&mut self, call: &Call, weight: &str) -> Adapted {
        let Call { path, linear, stack, .. } = *call;
        let mut blocks = Vec::new();
        let layout = Layout { out_in: linear.trans_b, alpha: linear.alpha };
        // In float32 whatever the base computes in, as PEFT does.
        let converts = linear.element != DataType::Float;
        let (inputs, outputs) = (linear.in_features, linear.out_features);
        let shape = linear.form.shape(inputs, outputs, linear.trans_b);
        let mut writer = self.writer(path, stack[0].adapter);
        let mut weight = weight.to_string();
        if converts {
            weight = writer.cast(&weight, "float32", DataType::Float);
        }
        if shape.is_some() {
            let matrix = if linear.trans_b { [outputs, inputs] } else { [inputs, outputs] };
            weight = writer.reshaped(&weight, "matrix", &matrix);
        }
        for stacked in stack {
            writer.prefix = format!("{}.bone.{}", stacked.module, stacked.adapter);
            weight = if stacked.variant().is_additive() {
                let block = stacked.write_block(outputs, &mut writer);
                let adapted = tile::write_weight(&stacked.whole(outputs), layout, &weight, &block, &mut writer);
                blocks.push(block);
                adapted
            } else {
                let (sizes, part) = ((&stacked.dims, layout), (stacked.part.as_ref(), outputs));
                product::write_weight(stacked.variant(), sizes, &weight, stacked.parameter, part, &mut writer)
            };
        }
        if let Some(shape) = shape {
            weight = writer.reshaped(&weight, "shaped", &shape);
        }
        if converts {
            weight = writer.cast(&weight, "weight", linear.element);
        }
        let nodes = writer.nodes;
        self.note(&nodes);
        self.edit(linear).before.extend(nodes);
        Adapted { weight, blocks }
    }

    /// The nodes of a saved module read the active adapter's copies.
    fn saved(&mut self, record: &Injection, linears: &[Linear]) -> Result<()> {
        let mut taken: HashMap<&str, &str> = HashMap::new();
        if record.active().all(|a| a.saved.is_empty()) {
            return Ok(());
        }
        let parameters = select::parameters(self.base.graph(), linears);
        for (adapter, saved) in record.active().flat_map(|a| a.saved.iter().map(move |s| (a, s))) {
            if let Some(other) = taken.insert(&saved.path, &adapter.name) {
                return Err(Error::config(format!(
                    "{} is trained in full by both {other} and {}: only one of them can be active at a time",
                    saved.path, adapter.name
                )));
            }
            let parameter = parameters.iter().find(|p| p.path == saved.path).ok_or_else(|| {
                Error::model(format!("{} of adapter {} is not in this model any more", saved.path, adapter.name))
            })?;
            self.copy(adapter, saved, parameter)?;
        }
        Ok(())
    }

    fn copy(&mut self, adapter: &AdapterRecord, saved: &SavedRecord, parameter: &select::Parameter) -> Result<()> {
        // By the name that stood there: each has one of its own, so that it can be put back.
        let mut names: HashMap<(Scope, String), String> = HashMap::new();
        let mut direct: Option<String> = None;
        for used in &parameter.uses {
            let node = &self.base.graph_at(&used.scope)?.node[used.node];
            let Some(original) = node.input_at(used.input) else { continue };
            let half = parameter.data_type != DataType::Float;
            let key = (used.scope.clone(), original.to_string());
            let is_direct = !half && direct.as_deref().is_none_or(|name| name == original);
            let now = if is_direct {
                if direct.is_none() {
                    let base = original.to_string();
                    self.emission.written.inputs.push(Renamed { base, now: saved.parameter.clone() });
                    direct = Some(original.to_string());
                }
                saved.parameter.clone()
            } else if let Some(name) = names.get(&key) {
                name.clone()
            } else {
                let mut writer = self.writer(&saved.path, &adapter.name);
                let name = match half {
                    true => writer.cast(&saved.parameter, "narrow", parameter.data_type),
                    false => writer.op("Identity", "same", &[&saved.parameter], Vec::new()),
                };
                let nodes = writer.nodes;
                self.note(&nodes);
                self.emission.edits.entry((used.scope.clone(), used.node)).or_default().before.extend(nodes);
                self.emission.written.inputs.push(Renamed { base: original.into(), now: name.clone() });
                names.insert(key, name.clone());
                name
            };
            let edit = self.emission.edits.entry((used.scope.clone(), used.node)).or_default();
            edit.inputs.push((used.input, now));
        }
        Ok(())
    }
}

/// Inputs of a (de)quantiser: a value, its scale and its zero point.
fn with_grid<'v>(value: &'v str, (scale, zero): &'v (String, Option<String>)) -> Vec<&'v str> {
    [value, scale].into_iter().chain(zero.as_deref()).collect()
}

fn is_half(element: DataType) -> bool {
    matches!(element, DataType::Float16 | DataType::Bfloat16)
}

/// `x` with a share `p` of its elements at zero and the others scaled up, other ones in every run.
fn dropped(writer: &mut Writer, x: &str, p: f64, seed: u64) -> String {
    let ratio = writer.scalar(p as f32);
    let on = writer.flag(true);
    let name = writer.op("Dropout", "dropped", &[x, &ratio, &on], Vec::new());
    // Each layer drops others: its name is part of the seed.
    let own = name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    if let Some(node) = writer.nodes.last_mut() {
        node.attribute.push(AttributeProto::int("seed", (own >> 1) as i64));
    }
    name
}
