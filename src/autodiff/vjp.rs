//! What a rule sees: one node, the adjoints of its outputs, which inputs want one, and what is known of shapes.

use std::collections::{HashMap, HashSet};
use std::ops::Deref;

use super::emit::Emitter;
use super::rules::Rules;
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{AttributeProto, DataType, NodeProto, Tensor};
use crate::{Error, Result};

/// Values of small constants (initializers that nobody can override, Constant nodes), by name.
pub(super) type Constants = HashMap<String, Tensor>;

/// The adjoints a rule returns: one per input, `None` where there is none to give.
pub type Adjoints = Vec<Option<String>>;

/// The vector-Jacobian product of one node in the making. Derefs to the [`Emitter`].
pub struct Vjp<'a> {
    pub node: &'a NodeProto,
    pub shapes: &'a Shapes,
    pub rules: &'a Rules,
    pub(super) emitter: &'a Emitter,
    pub(super) constants: &'a Constants,
    pub(super) producers: &'a HashMap<&'a str, &'a NodeProto>,
    /// Values that a `Where` may leave out.
    pub(super) left_out: &'a HashSet<&'a str>,
    /// The node's inputs, followed by the outer values that its subgraphs use.
    pub(super) inputs: &'a [String],
    /// Adjoint of each output, `None` where nothing depends on it.
    pub(super) adjoints: &'a [Option<String>],
    /// Whether each of `inputs` needs an adjoint.
    pub(super) wanted: &'a [bool],
}

impl Deref for Vjp<'_> {
    type Target = Emitter;
    fn deref(&self) -> &Emitter {
        self.emitter
    }
}

/// "Gemm node encoder.0" (or by its first output, where it has no name).
pub(super) fn describe(node: &NodeProto) -> String {
    let name = if node.name().is_empty() { node.output.first().map_or("?", String::as_str) } else { node.name() };
    let domain = if matches!(node.domain(), "" | "ai.onnx") { String::new() } else { format!("{}.", node.domain()) };
    format!("{domain}{} node {name}", node.op_type())
}

impl<'a> Vjp<'a> {
    pub fn error(&self, what: impl AsRef<str>) -> Error {
        Error::model(format!("{}: {}", describe(self.node), what.as_ref()))
    }

    /// Input `i`, which must be there.
    pub fn x(&self, i: usize) -> Result<&'a str> {
        self.node.input_at(i).ok_or_else(|| self.error(format!("input {i} is missing")))
    }

    /// Output `i`, which must be there.
    pub fn y(&self, i: usize) -> Result<&'a str> {
        self.node.output_at(i).ok_or_else(|| self.error(format!("output {i} is missing")))
    }

    /// Adjoint of the first output.
    pub fn dy(&self) -> Result<&'a str> {
        self.adjoint(0).ok_or_else(|| self.error("only its optional outputs are used, whose derivative is not known"))
    }

    /// Adjoint of output `i`, where something depends on it.
    pub fn adjoint(&self, i: usize) -> Option<&'a str> {
        self.adjoints.get(i)?.as_deref()
    }

    /// Whether input `i` needs an adjoint.
    pub fn wants(&self, i: usize) -> bool {
        self.wanted.get(i).copied().unwrap_or(false)
    }

    /// One adjoint: that of input 0.
    pub fn first(&self, adjoint: String) -> Result<Adjoints> {
        Ok(vec![Some(adjoint)])
    }

    /// The node of this graph that computes `value`.
    pub fn producer(&self, value: &str) -> Option<&'a NodeProto> {
        self.producers.get(value).copied()
    }

    /// Value of `name` where it is a small constant.
    pub fn constant(&self, name: &str) -> Option<&'a Tensor> {
        self.constants.get(name)
    }

    /// Value of a small 1-D int64 constant, of the model's or emitted.
    pub fn constant_value(&self, name: &str) -> Option<i64> {
        match self.constant(name) {
            Some(Tensor::I64(a)) if a.len() == 1 => a.first().copied(),
            _ => self.emitted_int(name),
        }
    }

    /// Value of input `i` where it is a small integer constant, or follows from dimensions that are known.
    pub fn constant_ints(&self, i: usize) -> Option<Vec<i64>> {
        let name = self.node.input_at(i)?;
        match self.constant(name) {
            Some(Tensor::I64(a)) => Some(a.iter().copied().collect()),
            Some(Tensor::I32(a)) => Some(a.iter().map(|v| i64::from(*v)).collect()),
            _ => self.shapes.elements(name)?.iter().map(known).collect(),
        }
    }

    /// Element type that the node computes in, where known.
    pub fn element(&self) -> Option<DataType> {
        let values = self.node.output.iter().take(1).chain(self.node.input.first());
        values.filter_map(|v| self.shapes.element(v)).find(|e| is_float(*e))
    }

    /// The scalar `value` in the node's element type.
    pub fn c(&self, value: f64) -> String {
        match self.element().and_then(|element| self.float(value, element)) {
            Some(constant) => constant,
            None => {
                let wide = self.float(value, DataType::Double).unwrap_or_default();
                let like = self.adjoints.iter().flatten().next().or(self.node.input.first());
                self.cast_like(wide, like.map_or("", String::as_str))
            }
        }
    }

    /// 1 where `condition` holds, 0 elsewhere, in the node's element type.
    pub fn mask(&self, condition: impl AsRef<str>) -> String {
        match self.element() {
            Some(element) => self.cast(condition, element),
            None => self.select(condition, self.c(1.0), self.c(0.0)),
        }
    }

    pub fn rank(&self, value: &str) -> Result<usize> {
        self.shapes.rank(value).ok_or_else(|| self.error(format!("the rank of {value} is not known")))
    }

    pub fn dims(&self, value: &str) -> Option<&'a [Dim]> {
        self.shapes.dims(value)
    }

    /// `axis` of a value of `rank`, counted from the front.
    pub fn axis(&self, axis: i64, rank: usize) -> Result<usize> {
        let at = if axis < 0 { axis.saturating_add(rank as i64) } else { axis };
        usize::try_from(at)
            .ok()
            .filter(|at| *at < rank)
            .ok_or_else(|| self.error(format!("axis {axis} does not exist in {rank} dimensions")))
    }

    /// Shape of `value` as numbers, where all of it is known.
    pub fn static_dims(&self, value: &str) -> Option<Vec<i64>> {
        self.dims(value)?.iter().map(known).collect()
    }

    /// Shape of `value` as a 1-D int64 value, a constant where known.
    pub fn shape_of(&self, value: &str) -> String {
        match self.static_dims(value) {
            Some(dims) => self.ints(&dims),
            None => self.shape(value),
        }
    }

    /// Dimension `axis` of `value` as a 1-D int64 value of one element.
    pub fn dim_of(&self, value: &str, axis: usize) -> String {
        match self.dims(value).and_then(|d| known(d.get(axis)?)) {
            Some(dim) => self.ints(&[dim]),
            None => {
                let at = axis as i64;
                let attributes = vec![AttributeProto::int("start", at), AttributeProto::int("end", at + 1)];
                self.op("Shape", &[value], attributes)
            }
        }
    }

    /// Zeros in the shape of `value`.
    pub fn zeros_like(&self, value: &str) -> String {
        self.expand(self.c(0.0), self.shape_of(value))
    }

    /// `x`, broadcast to the shape of `value`.
    pub fn expand_like(&self, x: impl AsRef<str>, value: &str) -> String {
        match self.dims(value) {
            // ONNX Runtime's optimizer takes an Expand to a size of 0 for one that changes nothing.
            Some(dims) if dims.contains(&Dim::Known(0)) => self.zeros_like(value),
            Some(dims) if dims.iter().all(|d| *d == Dim::Known(1)) => self.reshape(x, self.shape_of(value)),
            _ => self.expand(x, self.shape_of(value)),
        }
    }

    /// `g`, whose dimensions are `from` where known, in the shape of `value`, which has as many elements.
    pub fn reshape_like(&self, g: impl AsRef<str>, from: Option<&[Dim]>, value: &str) -> String {
        match self.dims(value) {
            Some(to) if from == Some(to) => g.as_ref().to_string(),
            Some(to) => match reshape_spec(from.unwrap_or(&[]), to) {
                Some(spec) => self.op("Reshape", &[g.as_ref(), &self.ints(&spec)], vec![]),
                None => self.reshape(g, self.shape_of(value)),
            },
            None => self.reshape(g, self.shape(value)),
        }
    }

    /// Number of elements of `x` for each element of `y`, as a scalar in the node's element type; any number where y is
    /// empty, for then nothing is counted.
    pub fn ratio(&self, x: &str, y: impl AsRef<str>, static_ratio: Option<i64>) -> String {
        match static_ratio {
            Some(n) => self.c(n as f64),
            None => {
                let some = self.op("Max", &[&self.size(y), &self.int(1)], vec![]);
                let n = self.op("Div", &[&self.size(x), &some], vec![]);
                match self.element() {
                    Some(element) => self.cast(n, element),
                    None => self.cast_like(n, x),
                }
            }
        }
    }
}

pub(super) fn is_float(element: DataType) -> bool {
    use DataType::*;
    matches!(element, Float | Double | Float16 | Bfloat16)
}

pub(super) fn known(dim: &Dim) -> Option<i64> {
    match dim {
        Dim::Known(n) => Some(*n),
        Dim::Symbol(_) => None,
    }
}

/// A Reshape specification from `from` to `to` in constants alone: 0 copies an equal dimension at the same place, and
/// one dimension may be left to follow from the rest.
fn reshape_spec(from: &[Dim], to: &[Dim]) -> Option<Vec<i64>> {
    let mut spec = Vec::new();
    let mut open = 0;
    for (i, dim) in to.iter().enumerate() {
        spec.push(match dim {
            Dim::Known(0) => return None,
            Dim::Known(n) => *n,
            Dim::Symbol(_) if from.get(i) == Some(dim) => 0,
            Dim::Symbol(_) => {
                open += 1;
                -1
            }
        });
    }
    (open <= 1).then_some(spec)
}
