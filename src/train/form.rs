//! The form in which an adapted layer is trained: `W' = W + tile(B)` once a step and one product, instead of the side
//! branch's passes over the tokens.
//!
//! Backward, `dx = dy·W'ᵀ` as for any layer, and `dB = S(x)ᵀ·dy` (the rows of `xᵀ·dy` summed by i mod r, without making
//! `xᵀ·dy`; it is r/in of that work). For this the product and its block have to be seen together, so while the
//! gradient is derived they are one node, `org.bone-onnx.TiledMatMul` (or `TiledGemm`), with a rule of its own;
//! afterwards [`lower`] makes it the standard operator that it is.

use std::collections::{HashMap, HashSet};

use crate::Result;
use crate::adapter::Injection;
use crate::autodiff::{Adjoints, Rule, Rules, Vjp};
use crate::onnx::{AttributeProto, GraphProto, ModelProto, Names, NodeProto, constant_i64, node};

const DOMAIN: &str = "org.bone-onnx";
const TILED_MATMUL: &str = "TiledMatMul";
const TILED_GEMM: &str = "TiledGemm";
/// Inputs of the tiled operators: x, the merged weight, the bias (or nothing), the block, the shard selection.
const BIAS: usize = 2;
const BLOCK: usize = 3;
const SELECTION: usize = 4;

/// One adapted node, and what it is adapted with.
struct Call<'a> {
    output: &'a str,
    base_output: &'a str,
    branch: HashSet<&'a str>,
    block: &'a str,
    sizes: Sizes,
}

#[derive(Clone, Copy)]
struct Sizes {
    inputs: usize,
    outputs: usize,
    r: usize,
}

/// Rewrites the adapted layers of `model` (an injected model in memory) for training. Layers that carry two adapters,
/// and Gemm with `alpha` or `transA`, keep their side branches and train through them. Returns the rules that
/// differentiate the result.
pub fn training_form(model: &mut ModelProto, injection: &Injection) -> Rules {
    let mut calls = Vec::new();
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for adapter in &injection.adapters {
        for target in &adapter.targets {
            for call in &target.calls {
                *seen.entry(&call.output).or_default() += 1;
                *seen.entry(&call.base_output).or_default() += 1;
                calls.push(Call {
                    output: &call.output,
                    base_output: &call.base_output,
                    branch: call.nodes.iter().map(String::as_str).collect(),
                    block: &target.parameter,
                    sizes: Sizes { inputs: target.in_features, outputs: target.out_features, r: adapter.config.r },
                });
            }
        }
    }
    // The second adapter of a layer begins where the first one's renamed output is.
    calls.retain(|call| seen[call.output] == 1 && seen[call.base_output] == 1);
    let mut names = Names::of(model);
    if let Some(graph) = &mut model.graph {
        rewrite(graph, &calls, &mut names);
    }
    Rules::standard().with(DOMAIN, TILED_MATMUL, Rule::vjp(tiled)).with(DOMAIN, TILED_GEMM, Rule::vjp(tiled))
}

/// Turns the tiled operators into the standard ones they compute.
pub fn lower(graph: &mut GraphProto) {
    for node in &mut graph.node {
        if node.domain() == DOMAIN {
            node.domain = None;
            let gemm = node.op_type() == TILED_GEMM;
            node.input.truncate(if gemm && node.input_at(BIAS).is_some() { 3 } else { 2 });
            node.op_type = Some(if gemm { "Gemm" } else { "MatMul" }.into());
        }
        node.attribute.iter_mut().filter_map(|a| a.g.as_mut()).for_each(lower);
    }
}

/// One graph and, through its nodes, those below it.
fn rewrite(graph: &mut GraphProto, calls: &[Call], names: &mut Names) {
    let mut gone: HashSet<&str> = HashSet::new();
    let mut merged: HashMap<(String, &str, bool), String> = HashMap::new();
    let nodes = std::mem::take(&mut graph.node);
    let branches: HashMap<String, NodeProto> = nodes.iter().map(|n| (n.name().to_string(), n.clone())).collect();
    let mut rewritten = Vec::with_capacity(nodes.len());
    for mut node in nodes {
        node.attribute.iter_mut().filter_map(|a| a.g.as_mut()).for_each(|g| rewrite(g, calls, names));
        let call = node.output.first().and_then(|o| calls.iter().find(|c| c.base_output == o));
        let tiled = call.and_then(|call| {
            let weight = node.input_at(1)?.to_string();
            let trans_b = node.attr_i("transB", 0) != 0;
            let plain = node.is("MatMul")
                || node.is("Gemm") && node.attr_i("transA", 0) == 0 && node.attr_f("alpha", 1.0) == 1.0;
            let selection = selection(call, &branches).filter(|_| plain)?;
            let weight = merged.entry((weight.clone(), call.block, trans_b)).or_insert_with(|| {
                let mut merge = Merge { graph, nodes: &mut rewritten, names, sizes: call.sizes };
                merge.weight(&weight, call.block, trans_b)
            });
            gone.extend(&call.branch);
            let mut tiled = node.clone();
            tiled.domain = Some(DOMAIN.into());
            tiled.op_type = Some(if node.is("Gemm") { TILED_GEMM } else { TILED_MATMUL }.into());
            let bias = node.input_at(BIAS).unwrap_or_default().to_string();
            tiled.input = vec![node.input[0].clone(), weight.clone(), bias, call.block.into(), selection];
            tiled.output[0] = call.output.into();
            Some(tiled)
        });
        rewritten.push(tiled.unwrap_or(node));
    }
    rewritten.retain(|n| !gone.contains(n.name()));
    graph.node = rewritten;
}

/// The constant that the branch of `call` sums shards with.
fn selection(call: &Call, nodes: &HashMap<String, NodeProto>) -> Option<String> {
    let products = call.branch.iter().filter_map(|name| nodes.get(*name)).filter(|n| n.is("MatMul"));
    products.filter_map(|n| n.input_at(1)).find(|input| *input != call.block).map(str::to_string)
}

/// Emits `W + tile(B)`.
struct Merge<'a> {
    graph: &'a mut GraphProto,
    nodes: &'a mut Vec<NodeProto>,
    names: &'a mut Names,
    sizes: Sizes,
}

impl Merge<'_> {
    /// The merged weight in the layout of `weight`: `[in, out]`, or `[out, in]` for `trans_b`.
    fn weight(&mut self, weight: &str, block: &str, trans_b: bool) -> String {
        let Sizes { inputs, outputs, r } = self.sizes;
        let (n, r, inputs, outputs) = (inputs.div_ceil(r) as i64, r as i64, inputs as i64, outputs as i64);
        let block = if trans_b {
            self.op("Transpose", "turned", &[block], vec![AttributeProto::ints("perm", &[1, 0])])
        } else {
            block.to_string()
        };
        if n * r == inputs {
            // Whole shards: the block broadcasts over them.
            let [shards, flat, one] = match trans_b {
                true => [vec![outputs, n, r], vec![outputs, inputs], vec![outputs, 1, r]],
                false => [vec![n, r, outputs], vec![inputs, outputs], vec![1, r, outputs]],
            };
            let (shards, flat) = (self.ints("shards", &shards), self.ints("flat", &flat));
            let one = self.ints("one", &one);
            let weight = self.op("Reshape", "sharded", &[weight, &shards], Vec::new());
            let block = self.op("Reshape", "block", &[&block, &one], Vec::new());
            let sum = self.op("Add", "sum", &[&weight, &block], Vec::new());
            return self.op("Reshape", "merged", &[&sum, &flat], Vec::new());
        }
        let axis = i64::from(trans_b);
        let copies = vec![block.as_str(); n as usize];
        let tiled = self.op("Concat", "tiled", &copies, vec![AttributeProto::int("axis", axis)]);
        let (start, end, axes) = (self.ints("start", &[0]), self.ints("end", &[inputs]), self.ints("axis", &[axis]));
        let cut = self.op("Slice", "cut", &[&tiled, &start, &end, &axes], Vec::new());
        self.op("Add", "merged", &[weight, &cut], Vec::new())
    }

    fn op(&mut self, op: &str, what: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = self.names.fresh(&format!("bone.{what}"));
        let mut node = node(op, inputs, &[&output]);
        node.attribute = attributes;
        self.nodes.push(node);
        output
    }

    fn ints(&mut self, what: &str, values: &[i64]) -> String {
        let name = self.names.fresh(&format!("bone.{what}"));
        constant_i64(self.graph, &name, values);
        name
    }
}

/// `dx = dy·W'ᵀ`, `dB = S(x)ᵀ·dy`.
fn tiled(v: &Vjp) -> Result<Adjoints> {
    let (x, weight, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let (block, selection) = (v.x(BLOCK)?, v.x(SELECTION)?);
    let trans_b = v.node.attr_i("transB", 0) != 0;
    let dx =
        v.wants(0).then(|| if trans_b { v.matmul(dy, weight) } else { v.matmul(dy, v.transpose(weight, &[1, 0])) });
    let mut db = None;
    if v.wants(BLOCK) {
        let sizes = (v.static_dims(selection), v.static_dims(block));
        let (Some([inputs, _]), Some([_, outputs])) = (sizes.0.as_deref(), sizes.1.as_deref()) else {
            return Err(v.error("the block and its shard selection have no fixed shape"));
        };
        // The same x (and the same dy) of several layers is flattened, and its shards are summed, once.
        let rows = |value: &str, width: i64| match v.rank(value) {
            Ok(2) => value.to_string(),
            _ => v.op("Reshape", &[value, &v.ints(&[-1, width])], Vec::new()),
        };
        let shards = v.matmul(rows(x, *inputs), selection);
        db = Some(v.matmul(v.transpose(shards, &[1, 0]), rows(dy, *outputs)));
    }
    if v.wants(BIAS) {
        return Err(v.error("the bias of an adapted layer does not train"));
    }
    Ok(vec![dx, None, None, db, None])
}
