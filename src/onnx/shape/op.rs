//! What a rule sees of its node, and the table of rules.

use std::collections::HashMap;
use std::sync::OnceLock;

use super::{DataType, Dim, MAX_VALUE, Shapes, Symbols, Value};
use super::{contrib, control, elementwise, indexing, layout, matmul, nn, reduce, sequence, signal, value};
use crate::onnx::NodeProto;

/// Sets what is known of a node's outputs; stops (`None`) where nothing more is.
pub(super) type Rule = fn(&mut Op) -> Option<()>;
/// Operators by name; those of other domains are written `domain:Name`.
pub(super) type Rules = &'static [(&'static [&'static str], Rule)];

/// The rule for a node, by domain and operator.
pub(super) fn rule(node: &NodeProto) -> Option<Rule> {
    let table = table();
    match node.domain() {
        "" | "ai.onnx" => table.get(node.op_type()).copied(),
        domain => table.get(format!("{domain}:{}", node.op_type()).as_str()).copied(),
    }
}

/// Every operator that has a rule.
#[cfg(test)]
pub(super) fn names() -> Vec<&'static str> {
    table().keys().copied().collect()
}

fn table() -> &'static HashMap<&'static str, Rule> {
    static TABLE: OnceLock<HashMap<&'static str, Rule>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let families = [
            contrib::RULES,
            control::RULES,
            elementwise::RULES,
            indexing::RULES,
            layout::RULES,
            matmul::RULES,
            nn::RULES,
            reduce::RULES,
            sequence::RULES,
            signal::RULES,
            value::RULES,
        ];
        families.into_iter().flatten().flat_map(|(ops, rule)| ops.iter().map(|op| (*op, *rule))).collect()
    })
}

/// A node in the scope of what is known so far.
pub(super) struct Op<'a> {
    pub node: &'a NodeProto,
    pub opset: i64,
    pub shapes: &'a mut Shapes,
}

impl<'a> Op<'a> {
    pub fn new(node: &'a NodeProto, opset: i64, shapes: &'a mut Shapes) -> Self {
        Self { node, opset, shapes }
    }

    pub fn has(&self, i: usize) -> bool {
        self.node.input_at(i).is_some()
    }

    pub fn dims(&self, i: usize) -> Option<Vec<Dim>> {
        self.shapes.dims(self.node.input_at(i)?).map(<[Dim]>::to_vec)
    }

    pub fn rank(&self, i: usize) -> Option<usize> {
        self.shapes.rank(self.node.input_at(i)?)
    }

    pub fn element(&self, i: usize) -> Option<DataType> {
        self.shapes.element(self.node.input_at(i)?)
    }

    pub fn value(&self, i: usize) -> Option<&Value> {
        self.shapes.integers.get(self.node.input_at(i)?)
    }

    /// The elements of input `i`, row-major.
    pub fn elements(&self, i: usize) -> Option<Vec<Dim>> {
        self.value(i).map(|v| v.iter().copied().collect())
    }

    /// The elements of input `i`, where all are numbers.
    pub fn ints(&self, i: usize) -> Option<Vec<i64>> {
        self.value(i)?.iter().map(|d| known(*d)).collect()
    }

    pub fn floats(&self, i: usize) -> Option<&[f64]> {
        self.shapes.floats.get(self.node.input_at(i)?).map(Vec::as_slice)
    }

    /// Ints that moved from the attribute `name` to input `i` in a later opset: `Some(None)` where neither is given,
    /// `None` where the input is not known.
    pub fn ints_of(&self, name: &str, i: usize) -> Option<Option<Vec<i64>>> {
        match (self.node.attr_ints(name), self.has(i)) {
            (Some(ints), _) => Some(Some(ints.to_vec())),
            (None, true) => self.ints(i).map(Some),
            (None, false) => Some(None),
        }
    }

    pub fn symbols(&mut self) -> &mut Symbols {
        &mut self.shapes.symbols
    }

    pub fn fresh(&mut self) -> Dim {
        self.shapes.symbols.fresh()
    }

    /// Element type named by the attribute `name`.
    pub fn type_attr(&self, name: &str) -> Option<DataType> {
        let number = self.node.attr(name)?.i?;
        i32::try_from(number).ok().and_then(|n| DataType::try_from(n).ok()).filter(|t| *t != DataType::Undefined)
    }

    /// Attribute `name` as an axis of a tensor of `rank`.
    pub fn axis(&self, name: &str, default: i64, rank: usize) -> Option<usize> {
        axis(self.node.attr_i(name, default), rank)
    }

    /// Sets output `i`; a negative size is nonsense, so unknown.
    pub fn set(&mut self, i: usize, element: Option<DataType>, dims: Option<Vec<Dim>>) {
        let Some(name) = self.node.output_at(i) else { return };
        let mut dims = dims;
        for dim in dims.iter_mut().flatten() {
            if matches!(dim, Dim::Known(n) if *n < 0) {
                *dim = self.shapes.symbols.fresh();
            }
        }
        let shape = self.shapes.values.entry(name.into()).or_default();
        shape.element = element;
        shape.dims = dims;
    }

    /// Sets the elements of output `i`, whose shape is `value`'s.
    pub fn set_value(&mut self, i: usize, value: Value) {
        let Some(name) = self.node.output_at(i) else { return };
        if value.len() <= MAX_VALUE {
            let dims = value.shape().iter().map(|n| Dim::Known(*n as i64)).collect();
            self.shapes.values.entry(name.into()).or_default().dims = Some(dims);
            self.shapes.integers.insert(name.into(), value);
        }
    }

    /// Sets output 0 with the element type of input 0.
    pub fn out(&mut self, dims: Option<Vec<Dim>>) {
        let element = self.element(0);
        self.set(0, element, dims);
    }

    /// `rank` dimensions that are like no other.
    pub fn unknown(&mut self, rank: usize) -> Vec<Dim> {
        (0..rank).map(|_| self.fresh()).collect()
    }

    /// Shapes broadcast together, by NumPy's rule.
    pub fn broadcast(&mut self, a: &[Dim], b: &[Dim]) -> Vec<Dim> {
        let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
        let offset = long.len() - short.len();
        let mut dims = long.to_vec();
        for (dim, other) in dims.iter_mut().skip(offset).zip(short) {
            *dim = self.shapes.symbols.broadcast(*dim, *other);
        }
        dims
    }
}

pub(super) fn known(dim: Dim) -> Option<i64> {
    match dim {
        Dim::Known(n) => Some(n),
        Dim::Symbol(_) => None,
    }
}

/// `axis` counted from the front; `None` where it is out of range.
pub(super) fn axis(axis: i64, rank: usize) -> Option<usize> {
    let rank = i64::try_from(rank).ok()?;
    let front = if axis < 0 { axis.checked_add(rank)? } else { axis };
    (0..rank).contains(&front).then_some(front as usize)
}
