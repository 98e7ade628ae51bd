//! The builder of gradient nodes: fresh deterministic names, shared constants, and one node where two would be the same.
//!
//! Methods take `&self` so that a rule reads like its formula: `v.mul(dy, v.neg(v.sin(x)))`.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};

use half::{bf16, f16};
use prost::Message;

use crate::onnx::{AttributeProto, DataType, GraphProto, ModelProto, Names, NodeProto, Tensor, TensorProto};

/// Collects the nodes and constants of a gradient.
#[derive(Debug)]
pub struct Emitter {
    /// Version of the default operator set of the model that the nodes go into.
    pub opset: i64,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    names: Names,
    /// What the nodes being emitted are for: the stem of their names.
    stem: String,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    /// Values of the 1-D int64 constants of one element.
    single: HashMap<String, i64>,
    /// Encoded (operator, inputs, attributes) to the outputs of the node that computes it.
    known: HashMap<Vec<u8>, Vec<String>>,
    /// Input and permutation of the Transposes emitted, by output.
    transposed: HashMap<String, (String, Vec<i64>)>,
    /// The same of the model's own Transposes.
    forward_transposed: HashMap<String, (String, Vec<i64>)>,
    /// Optional outputs that rules asked of forward nodes, by the node's first output.
    amended: BTreeMap<String, BTreeMap<usize, String>>,
    /// Loops that rules gave further outputs to, by one of the node's outputs.
    replaced: BTreeMap<String, NodeProto>,
}

/// What tells a node with `outputs` outputs from others: not its names.
fn key(node: &NodeProto, outputs: usize) -> Vec<u8> {
    let mut key = node.encode_to_vec();
    key.extend(outputs.to_le_bytes());
    key
}

/// The nodes of the main graph that may be used again: with one output, the same for the same inputs, and with inputs
/// that no subgraph hides by its own.
fn known_of(graph: &GraphProto) -> HashMap<Vec<u8>, Vec<String>> {
    fn inner<'a>(nodes: &'a [NodeProto], names: &mut HashSet<&'a str>) {
        for graph in nodes.iter().flat_map(|n| &n.attribute).flat_map(|a| a.g.iter().chain(&a.graphs)) {
            names.extend(graph.input.iter().map(|v| v.name()));
            names.extend(graph.initializer.iter().map(|t| t.name()));
            names.extend(graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str)));
            inner(&graph.node, names);
        }
    }
    let mut hidden = HashSet::new();
    inner(&graph.node, &mut hidden);
    let mut known = HashMap::new();
    for node in &graph.node {
        let [output] = &node.output[..] else { continue };
        let random = node.op_type().starts_with("Random") || matches!(node.op_type(), "Bernoulli" | "Multinomial");
        let subgraphs = node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
        let hides = |name: &String| hidden.contains(name.as_str());
        if random || subgraphs || node.input.is_empty() || node.input.iter().chain([output]).any(hides) {
            continue;
        }
        let bare = NodeProto {
            op_type: node.op_type.clone(),
            domain: node.domain.clone().filter(|domain| !matches!(domain.as_str(), "" | "ai.onnx")),
            input: node.input.clone(),
            attribute: node.attribute.clone(),
            ..Default::default()
        };
        known.entry(key(&bare, 1)).or_insert_with(|| vec![output.clone()]);
    }
    known
}

impl Emitter {
    pub(super) fn new(model: &ModelProto) -> Self {
        let mut forward_transposed = HashMap::new();
        for node in model.graph.iter().flat_map(|g| &g.node).filter(|n| n.is("Transpose")) {
            if let (Some(x), Some(y), Some(perm)) = (node.input_at(0), node.output_at(0), node.attr_ints("perm")) {
                forward_transposed.insert(y.to_string(), (x.to_string(), perm.to_vec()));
            }
        }
        let known = model.graph.as_ref().map(known_of).unwrap_or_default();
        let state = State { names: Names::of(model), known, forward_transposed, ..State::default() };
        Self { opset: model.opset(), state: RefCell::new(state) }
    }

    /// A name beside all others of the model.
    pub fn fresh(&self, wanted: &str) -> String {
        self.state.borrow_mut().names.fresh(wanted)
    }

    pub(super) fn set_stem(&self, stem: &str) -> String {
        std::mem::replace(&mut self.state.borrow_mut().stem, stem.to_string())
    }

    /// Nodes and constants emitted.
    pub(super) fn finish(self) -> (Vec<NodeProto>, Vec<TensorProto>) {
        let state = self.state.into_inner();
        (state.nodes, state.constants)
    }

    /// Runs `body` with the nodes going into a list of their own (a branch), which sees what was emitted before but is
    /// not seen from outside.
    pub(super) fn branch<T>(&self, body: impl FnOnce() -> T) -> (T, Vec<NodeProto>) {
        let (nodes, known, transposed) = {
            let mut state = self.state.borrow_mut();
            (std::mem::take(&mut state.nodes), state.known.clone(), state.transposed.clone())
        };
        let result = body();
        let mut state = self.state.borrow_mut();
        state.known = known;
        state.transposed = transposed;
        (result, std::mem::replace(&mut state.nodes, nodes))
    }

    /// Runs `body` and gives the nodes and constants it emitted as a graph of its own. Nothing emitted before is used
    /// again in it, so every way from an input to a result is a way through these nodes.
    pub(super) fn record<T>(&self, body: impl FnOnce() -> T) -> (T, GraphProto) {
        let (start, known, transposed, forward_transposed) = {
            let mut state = self.state.borrow_mut();
            let known = std::mem::take(&mut state.known);
            // Constants are known by their names, nodes by their encoding.
            state.known =
                known.iter().filter(|(k, _)| k.starts_with(b"grad/")).map(|(k, v)| (k.clone(), v.clone())).collect();
            let (transposed, forward) =
                (std::mem::take(&mut state.transposed), std::mem::take(&mut state.forward_transposed));
            (state.nodes.len(), known, transposed, forward)
        };
        let result = body();
        let mut state = self.state.borrow_mut();
        known.into_iter().for_each(|(key, outputs)| {
            state.known.entry(key).or_insert(outputs);
        });
        transposed.into_iter().for_each(|(key, origin)| {
            state.transposed.entry(key).or_insert(origin);
        });
        state.forward_transposed = forward_transposed;
        let node: Vec<NodeProto> = state.nodes[start..].to_vec();
        let used = |t: &&TensorProto| node.iter().any(|n| n.input.iter().any(|x| x == t.name()));
        let initializer = state.constants.iter().filter(used).cloned().collect();
        (result, GraphProto { node, initializer, ..Default::default() })
    }

    /// [`Emitter::amend`] for the nodes emitted themselves.
    pub(super) fn amend_emitted(&self) {
        let mut nodes = std::mem::take(&mut self.state.borrow_mut().nodes);
        self.amend(&mut nodes);
        self.state.borrow_mut().nodes = nodes;
    }

    /// Name of the optional output `index` of the forward node `node`, which is given one where it has none.
    pub fn forward_output(&self, node: &NodeProto, index: usize) -> String {
        if let Some(name) = node.output_at(index) {
            return name.to_string();
        }
        let key = node.output.first().cloned().unwrap_or_default();
        if let Some(name) = self.state.borrow().amended.get(&key).and_then(|outputs| outputs.get(&index)) {
            return name.clone();
        }
        let name = self.fresh(&format!("{key}.output{index}"));
        self.state.borrow_mut().amended.entry(key).or_default().insert(index, name.clone());
        name
    }

    /// Puts `node`, which has all outputs of the forward node that gives `output` and more, in its place.
    pub(super) fn replace(&self, output: &str, node: NodeProto) {
        self.state.borrow_mut().replaced.insert(output.to_string(), node);
    }

    /// Gives forward nodes the outputs asked for by [`Emitter::forward_output`] and [`Emitter::replace`].
    pub(super) fn amend(&self, nodes: &mut [NodeProto]) {
        let mut state = self.state.borrow_mut();
        for node in nodes {
            if let Some(more) = node.output.iter().find_map(|y| state.replaced.remove(y)) {
                *node = more;
            }
            for (index, name) in node.output.first().and_then(|key| state.amended.remove(key)).into_iter().flatten() {
                if node.output.len() <= index {
                    node.output.resize(index + 1, String::new());
                }
                node.output[index] = name;
            }
        }
    }

    /// A node of `domain` with `outputs` outputs; an equal one of the model's or emitted before is used again.
    pub fn node(
        &self,
        domain: &str,
        op: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
        outputs: usize,
    ) -> Vec<String> {
        let mut node = NodeProto {
            op_type: Some(op.into()),
            domain: (!domain.is_empty()).then(|| domain.to_string()),
            input: inputs.iter().map(|s| s.to_string()).collect(),
            attribute: attributes,
            ..Default::default()
        };
        let key = key(&node, outputs);
        let mut state = self.state.borrow_mut();
        if let Some(outputs) = state.known.get(&key) {
            return outputs.clone();
        }
        let stem = format!("{}/{op}", state.stem);
        node.output = (0..outputs).map(|_| state.names.fresh(&stem)).collect();
        node.name = node.output.first().cloned();
        state.known.insert(key, node.output.clone());
        state.nodes.push(node.clone());
        node.output
    }

    /// A node of the default domain with one output.
    pub fn op(&self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        self.node("", op, inputs, attributes, 1).remove(0)
    }

    /// A node under a given output name, never shared (for graph and branch outputs).
    pub(super) fn named(&self, op: &str, input: &str, output: &str) {
        let node = crate::onnx::node(op, &[input], &[output]);
        self.state.borrow_mut().nodes.push(node);
    }

    fn constant(&self, name: &str, tensor: Tensor) -> String {
        let key = name.as_bytes().to_vec();
        if let Some(outputs) = self.state.borrow().known.get(&key) {
            return outputs.concat();
        }
        let mut state = self.state.borrow_mut();
        let fresh = state.names.fresh(name);
        state.constants.push(tensor.to_proto(&fresh));
        state.known.insert(key, vec![fresh.clone()]);
        fresh
    }

    /// A 1-D int64 constant.
    pub fn ints(&self, values: &[i64]) -> String {
        let text: Vec<String> = values.iter().map(i64::to_string).collect();
        let name =
            self.constant(&format!("grad/ints[{}]", text.join(",")), Tensor::new(&[values.len()], values.to_vec()));
        if let [one] = values {
            self.state.borrow_mut().single.insert(name.clone(), *one);
        }
        name
    }

    /// Value of a constant of one element made by [`Emitter::ints`].
    pub(super) fn emitted_int(&self, name: &str) -> Option<i64> {
        self.state.borrow().single.get(name).copied()
    }

    /// A scalar int64 constant.
    pub fn int(&self, value: i64) -> String {
        self.constant(&format!("grad/int({value})"), Tensor::scalar(value))
    }

    /// A scalar constant of `element`, or `None` where that is no floating-point type.
    pub fn float(&self, value: f64, element: DataType) -> Option<String> {
        let tensor = match element {
            DataType::Float => Tensor::scalar(value as f32),
            DataType::Double => Tensor::scalar(value),
            DataType::Float16 => Tensor::scalar(f16::from_f64(value)),
            DataType::Bfloat16 => Tensor::scalar(bf16::from_f64(value)),
            _ => return None,
        };
        Some(self.constant(&format!("grad/{}({value})", crate::onnx::data_type_name(element)), tensor))
    }

    /// Sum of any number of values of the same shape; `None` for none.
    pub fn total(&self, mut values: Vec<String>) -> Option<String> {
        match values.as_slice() {
            [] | [_] => values.pop(),
            [a, b] => Some(self.add(a, b)),
            _ => Some(self.op("Sum", &values.iter().map(String::as_str).collect::<Vec<_>>(), vec![])),
        }
    }

    /// Transposition by `perm`; two in a row become one, and one that moves nothing becomes none.
    pub fn transpose(&self, x: impl AsRef<str>, perm: &[i64]) -> String {
        let x = x.as_ref();
        let composed = |first: &[i64]| -> Option<Vec<i64>> {
            perm.iter().map(|p| first.get(usize::try_from(*p).ok()?).copied()).collect()
        };
        let before = self.state.borrow().transposed.get(x).cloned();
        if let Some((origin, both)) = before.and_then(|(origin, first)| Some((origin, composed(&first)?))) {
            return self.transpose(origin, &both);
        }
        // A transposition of the forward pass is only undone; otherwise its result, which is there, is the cheaper start.
        let before = self.state.borrow().forward_transposed.get(x).cloned();
        if let Some((origin, both)) = before.and_then(|(origin, first)| Some((origin, composed(&first)?)))
            && both.iter().enumerate().all(|(i, p)| *p == i as i64)
        {
            return origin;
        }
        if perm.iter().enumerate().all(|(i, p)| *p == i as i64) {
            return x.to_string();
        }
        let y = self.op("Transpose", &[x], vec![AttributeProto::ints("perm", perm)]);
        self.state.borrow_mut().transposed.insert(y.clone(), (x.to_string(), perm.to_vec()));
        y
    }

    /// Exchanges the last two of `rank` axes.
    pub fn swap(&self, x: impl AsRef<str>, rank: usize) -> String {
        let mut perm: Vec<i64> = (0..rank as i64).collect();
        if rank >= 2 {
            perm.swap(rank - 1, rank - 2);
        }
        self.transpose(x, &perm)
    }

    /// Sum over `axes` (a 1-D int64 value); with no axes it returns `x` itself.
    pub fn reduce_sum(&self, x: impl AsRef<str>, axes: impl AsRef<str>, keepdims: bool) -> String {
        let attributes =
            vec![AttributeProto::int("keepdims", keepdims as i64), AttributeProto::int("noop_with_empty_axes", 1)];
        self.op("ReduceSum", &[x.as_ref(), axes.as_ref()], attributes)
    }

    /// Sum of all elements, a scalar.
    pub fn sum_all(&self, x: impl AsRef<str>) -> String {
        self.op("ReduceSum", &[x.as_ref()], vec![AttributeProto::int("keepdims", 0)])
    }

    /// `x` in `shape` (a 1-D int64 value that means what it says: a 0 is a dimension of size 0).
    pub fn reshape(&self, x: impl AsRef<str>, shape: impl AsRef<str>) -> String {
        self.op("Reshape", &[x.as_ref(), shape.as_ref()], vec![AttributeProto::int("allowzero", 1)])
    }

    pub fn concat(&self, parts: &[String], axis: i64) -> String {
        match parts {
            [one] => one.clone(),
            _ => {
                let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                self.op("Concat", &parts, vec![AttributeProto::int("axis", axis)])
            }
        }
    }

    pub fn cast(&self, x: impl AsRef<str>, to: DataType) -> String {
        self.op("Cast", &[x.as_ref()], vec![AttributeProto::int("to", i64::from(to as i32))])
    }
}

macro_rules! ops {
    ($($method:ident($($arg:ident),*) = $op:literal;)*) => {
        /// One operator each.
        impl Emitter {
            $(pub fn $method(&self, $($arg: impl AsRef<str>),*) -> String {
                self.op($op, &[$($arg.as_ref()),*], vec![])
            })*
        }
    };
}

ops! {
    abs(x) = "Abs";
    add(a, b) = "Add";
    and(a, b) = "And";
    cast_like(x, like) = "CastLike";
    cos(x) = "Cos";
    cosh(x) = "Cosh";
    div(a, b) = "Div";
    equal(a, b) = "Equal";
    erf(x) = "Erf";
    exp(x) = "Exp";
    expand(x, shape) = "Expand";
    greater(a, b) = "Greater";
    greater_or_equal(a, b) = "GreaterOrEqual";
    less(a, b) = "Less";
    less_or_equal(a, b) = "LessOrEqual";
    log(x) = "Log";
    matmul(a, b) = "MatMul";
    mul(a, b) = "Mul";
    neg(x) = "Neg";
    not(x) = "Not";
    pow(a, b) = "Pow";
    reciprocal(x) = "Reciprocal";
    shape(x) = "Shape";
    sigmoid(x) = "Sigmoid";
    sign(x) = "Sign";
    sin(x) = "Sin";
    sinh(x) = "Sinh";
    size(x) = "Size";
    sqrt(x) = "Sqrt";
    squeeze(x, axes) = "Squeeze";
    sub(a, b) = "Sub";
    tanh(x) = "Tanh";
    unsqueeze(x, axes) = "Unsqueeze";
    select(condition, a, b) = "Where";
}
