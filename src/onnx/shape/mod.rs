//! Shape inference: element types, ranks and dimensions of values, with names for what is not known.
//!
//! One forward pass in node order. Beside shapes it follows the *values* of small integer tensors, because exporters
//! compute shapes in the graph (`Shape → Gather → Unsqueeze → Concat → Reshape`); both are made of [`Dim`]s, whose
//! arithmetic (`symbols.rs`) has one canonical form per expression. The rules are those of the operators'
//! specification (`onnx/defs/**`, opset 7 to 24) and of ONNX Runtime's `docs/ContribOperators.md`, in tables by
//! operator name, one file per family. What has no rule, or attributes that make no sense, is unknown, not an error.
//!
//! What is claimed holds for every run the model accepts. Dimensions may be 0 in such a run, except where 0 changes an
//! operator's meaning (Reshape's "copy", a slice `-n:`).

mod contrib;
mod control;
mod elementwise;
mod indexing;
mod layout;
mod matmul;
mod nn;
mod op;
mod ranks;
mod reduce;
mod sequence;
mod signal;
mod symbols;
mod value;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::proto::tensor_shape_proto::dimension::Value as DimValue;
use super::{DataType, GraphProto, ModelProto, NodeProto, Tensor, TensorProto, ValueInfoProto};
use ndarray::ArrayD;
use op::Op;
use symbols::Symbols;

/// One dimension. Two dimensions that are the same symbol are equal in every run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dim {
    Known(i64),
    Symbol(u32),
}

/// What is known of a value. `dims: None` where not even the rank is known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ValueShape {
    pub element: Option<DataType>,
    pub dims: Option<Vec<Dim>>,
}

/// The elements of a small tensor of integers (or of bools, as 0 and 1, or of floats that are whole numbers).
type Value = ArrayD<Dim>;

/// Tensors with more elements are shapes only.
const MAX_VALUE: usize = 256;

/// What is known of each value of a graph (names of enclosing graphs included).
#[derive(Debug, Clone, Default)]
pub struct Shapes {
    values: HashMap<String, ValueShape>,
    /// Elements of small integer tensors.
    integers: HashMap<String, Value>,
    /// Elements of small float constants (scales of Resize and the like).
    floats: HashMap<String, Vec<f64>>,
    symbols: Symbols,
    /// Dimensions that the graph's inputs name.
    named: HashSet<String>,
    /// Whether a call may replace initializers that are inputs too (since file format version 4).
    overridable: bool,
}

impl Shapes {
    /// Infers forward through the main graph, and through subgraphs with [`Shapes::subgraph`].
    /// `input_dims` overrides what the graph's inputs declare.
    pub fn infer(model: &ModelProto, input_dims: &BTreeMap<String, Vec<i64>>) -> Self {
        let mut shapes = Self { overridable: model.ir_version() >= 4, ..Self::default() };
        let Some(graph) = &model.graph else { return shapes };
        // Only names that a call binds are trusted in declarations of inner values.
        shapes.named = graph.input.iter().flat_map(declared_names).map(String::from).collect();
        for input in &graph.input {
            let mut shape = shapes.declared(input);
            if let Some(dims) = input_dims.get(input.name()) {
                shape.dims = Some(shapes.sizes(dims));
            }
            shapes.values.insert(input.name().into(), shape);
        }
        shapes.graph(graph, model.opset());
        shapes
    }

    /// Shapes inside a subgraph whose outer scope is `self`.
    pub fn subgraph(&self, graph: &GraphProto, opset: i64) -> Self {
        let mut inner = self.clone();
        for input in &graph.input {
            inner.forget(input.name());
            let shape = inner.declared(input);
            inner.values.insert(input.name().into(), shape);
        }
        inner.graph(graph, opset);
        inner
    }

    /// Shapes inside `graph`, a subgraph of `node`: a branch, or the body of a loop.
    pub fn inside(&self, node: &NodeProto, graph: &GraphProto, opset: i64) -> Self {
        match node.op_type() {
            "Scan" | "Loop" => self.body(node, graph, opset),
            _ => self.subgraph(graph, opset),
        }
    }

    pub fn get(&self, value: &str) -> Option<&ValueShape> {
        self.values.get(value)
    }

    pub fn dims(&self, value: &str) -> Option<&[Dim]> {
        self.values.get(value)?.dims.as_deref()
    }

    pub fn rank(&self, value: &str) -> Option<usize> {
        self.dims(value).map(<[Dim]>::len)
    }

    pub fn element(&self, value: &str) -> Option<DataType> {
        self.values.get(value)?.element
    }

    /// The elements of a small integer tensor, row-major, where they are known or follow from dimensions.
    pub fn elements(&self, value: &str) -> Option<Vec<Dim>> {
        self.integers.get(value).map(|v| v.iter().copied().collect())
    }

    /// The elements of a small float constant, row-major.
    pub fn floats(&self, value: &str) -> Option<&[f64]> {
        self.floats.get(value).map(Vec::as_slice)
    }

    /// Dimension in the model's own names: `12`, `batch`, `2*batch*seq`; `?7` is one that nothing is known of.
    pub fn show(&self, dim: Dim) -> String {
        self.symbols.show(dim)
    }

    /// True for numbers and for expressions of the dimensions that the graph's inputs name.
    pub fn is_bound(&self, dim: Dim) -> bool {
        self.symbols.is_bound(dim)
    }

    /// Infers through `graph`, whose inputs are known.
    fn graph(&mut self, graph: &GraphProto, opset: i64) {
        for tensor in &graph.initializer {
            let overridable = self.overridable && graph.input.iter().any(|i| i.name() == tensor.name());
            self.constant(tensor.name(), tensor, overridable);
        }
        for tensor in &graph.sparse_initializer {
            if let Some(values) = &tensor.values {
                let element = DataType::try_from(values.data_type()).ok();
                let dims = Some(self.sizes(&tensor.dims));
                self.values.insert(values.name().into(), ValueShape { element, dims });
            }
        }
        let declared: HashMap<&str, &ValueInfoProto> =
            graph.value_info.iter().chain(&graph.output).map(|v| (v.name(), v)).collect();
        self.nodes(graph, opset, &declared, &HashMap::new());
        let required = ranks::required(self, graph);
        if !required.is_empty() {
            self.nodes(graph, opset, &declared, &required);
        }
    }

    /// `required`: ranks of values that have to be taken from what uses them.
    fn nodes(
        &mut self,
        graph: &GraphProto,
        opset: i64,
        declared: &HashMap<&str, &ValueInfoProto>,
        required: &HashMap<String, usize>,
    ) {
        for node in &graph.node {
            self.node(node, opset);
            for output in node.output.iter().filter(|o| !o.is_empty()) {
                if let Some(info) = declared.get(output.as_str()) {
                    self.refine(output, info);
                }
                if let Some(rank) = required.get(output).filter(|_| self.rank(output).is_none()) {
                    let dims = (0..*rank).map(|_| self.symbols.fresh()).collect();
                    self.values.entry(output.clone()).or_default().dims = Some(dims);
                }
            }
        }
    }

    fn node(&mut self, node: &NodeProto, opset: i64) {
        for output in &node.output {
            self.forget(output);
        }
        let Some(rule) = op::rule(node) else { return };
        // A rule that gives up half-way has set what it is sure of.
        let _ = rule(&mut Op::new(node, opset, self));
    }

    /// A tensor that is there in the file. `overridable`: a call may give another value, of the same shape.
    fn constant(&mut self, name: &str, tensor: &TensorProto, overridable: bool) {
        self.forget(name);
        let element = DataType::try_from(tensor.data_type()).ok();
        let dims = self.sizes(&tensor.dims);
        self.values.insert(name.into(), ValueShape { element, dims: Some(dims) });
        let count = tensor.dims.iter().try_fold(1i64, |n, d| n.checked_mul(*d));
        let small = count.is_some_and(|n| (0..=MAX_VALUE as i64).contains(&n));
        // External tensors have no bytes here; the rest of the check is `from_proto`'s.
        if overridable || !small || super::external::is_external(tensor) {
            return;
        }
        let Ok(tensor) = Tensor::from_proto(tensor) else { return };
        self.constant_tensor(name, &tensor);
    }

    fn constant_tensor(&mut self, name: &str, tensor: &Tensor) {
        match tensor {
            Tensor::I64(a) => drop(self.integers.insert(name.into(), a.mapv(Dim::Known))),
            Tensor::I32(a) => drop(self.integers.insert(name.into(), a.mapv(|v| Dim::Known(v.into())))),
            Tensor::Bool(a) => drop(self.integers.insert(name.into(), a.mapv(|v| Dim::Known(v.into())))),
            Tensor::F32(_) | Tensor::F64(_) if tensor.len() <= 16 => {
                let values = tensor.to_f64();
                // Below 2⁵³ every whole number is a double.
                if values.iter().all(|v| v.fract() == 0.0 && v.abs() < 9e15) {
                    let whole = values.iter().map(|v| Dim::Known(*v as i64)).collect();
                    if let Ok(whole) = Value::from_shape_vec(tensor.dims().to_vec(), whole) {
                        self.integers.insert(name.into(), whole);
                    }
                }
                self.floats.insert(name.into(), values);
            }
            _ => {}
        }
    }

    /// Dimensions given as numbers; a negative one stands for any size.
    fn sizes(&mut self, dims: &[i64]) -> Vec<Dim> {
        dims.iter().map(|n| if *n < 0 { self.symbols.fresh() } else { Dim::Known(*n) }).collect()
    }

    fn forget(&mut self, name: &str) {
        self.values.remove(name);
        self.integers.remove(name);
        self.floats.remove(name);
    }

    /// Shape of a declaration; each dimension without size or name becomes a symbol of its own.
    fn declared(&mut self, info: &ValueInfoProto) -> ValueShape {
        let Some(tensor) = info.tensor() else { return ValueShape::default() };
        let element = DataType::try_from(tensor.elem_type()).ok().filter(|t| *t != DataType::Undefined);
        let dims = tensor.shape.as_ref().map(|shape| {
            shape
                .dim
                .iter()
                .map(|dim| match &dim.value {
                    Some(DimValue::DimValue(n)) if *n >= 0 => Dim::Known(*n),
                    Some(DimValue::DimParam(name)) if !name.is_empty() => self.symbols.named(name),
                    _ => self.symbols.fresh(),
                })
                .collect()
        });
        ValueShape { element, dims }
    }

    /// Fills in what inference left open from what the file declares. Where both speak, inference stands.
    fn refine(&mut self, name: &str, info: &ValueInfoProto) {
        let mut declared = self.declared(info);
        for dim in declared.dims.iter_mut().flatten() {
            // A name that no input binds may be any exporter's guess, and says nothing that inference can use.
            if !matches!(dim, Dim::Known(_)) && !self.named.contains(&self.symbols.show(*dim)) {
                *dim = self.symbols.fresh();
            }
        }
        let shape = self.values.entry(name.into()).or_default();
        shape.element = shape.element.or(declared.element);
        match (&mut shape.dims, declared.dims) {
            (dims @ None, declared) => *dims = declared,
            (Some(dims), Some(declared)) if dims.len() == declared.len() => {
                for (dim, declared) in dims.iter_mut().zip(declared) {
                    if self.symbols.is_open(*dim) && !self.symbols.is_open(declared) {
                        *dim = declared;
                    }
                }
            }
            _ => {}
        }
    }
}

fn declared_names(info: &ValueInfoProto) -> impl Iterator<Item = &str> {
    let shape = info.tensor().and_then(|t| t.shape.as_ref());
    shape.into_iter().flat_map(|s| &s.dim).filter_map(|d| match &d.value {
        Some(DimValue::DimParam(name)) => Some(name.as_str()),
        _ => None,
    })
}
