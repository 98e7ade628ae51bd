//! From a value back to the constant it is made of, through the few operators that exporters and quantizers put
//! between a stored matrix and the product.

use super::chain::{Chain, Link, turned};
use super::linears::FLOATS;
use super::values::{Definition, Reader, ValueId, Values};
use crate::onnx::{DataType, NodeProto, Scope, TensorProto};

/// Where the stored matrix stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// An initializer of the graph at `scope`.
    Initializer { scope: Scope, index: usize },
    /// The `value` of a `Constant` node of the graph at `scope`.
    ConstantNode { scope: Scope, node: usize },
}

/// A node between the stored matrix and the product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub scope: Scope,
    pub node: usize,
    pub op: String,
}

/// A value that is a constant.
pub struct Constant<'a> {
    pub root: ValueId<'a>,
    pub source: Source,
    pub tensor: &'a TensorProto,
    /// From the root on.
    pub via: Vec<Step>,
    /// What they do to it, in that order.
    pub chain: Chain,
    /// Net effect of the `Transpose`s on a matrix; false where its elements are moved in another way.
    pub transposed: bool,
    /// True where the elements lie in another order than row after row, or column after column, of what is stored.
    pub moved: bool,
    /// Shape at the end of the chain.
    pub dims: Vec<usize>,
    /// Element type there.
    pub element: DataType,
    /// True where the stored tensor has another shape; its elements lie in the same order.
    pub reshaped: bool,
    /// What is done to the stored tensor that no [`Link`] says.
    pub changed: Option<&'static str>,
}

impl Constant<'_> {
    /// Whether its elements are those that are stored, in rows or in columns.
    pub fn is_as_stored(&self) -> bool {
        self.changed.is_none() && !self.moved && self.chain.iter().all(Link::moves)
    }
}

/// Nodes looked at for one value; real chains have at most four. It also ends cycles, which only a broken model has.
const BUDGET: usize = 32;

/// The constant behind `name` as the nodes of `graph` see it; `None` where its content depends on an input or on an
/// operator that is not looked through.
pub fn trace<'a>(values: &Values<'a>, graph: usize, name: &'a str) -> Option<Constant<'a>> {
    trace_within(values, graph, name, &mut { BUDGET })
}

fn trace_within<'a>(values: &Values<'a>, graph: usize, name: &'a str, budget: &mut usize) -> Option<Constant<'a>> {
    *budget = budget.checked_sub(1)?;
    let (root, definition) = values.lookup(graph, name)?;
    let scope = &values.graphs.get(root.0)?.scope;
    let start = |source, tensor: &'a TensorProto| {
        let dims = tensor.dims.iter().map(|d| usize::try_from(*d).ok()).collect::<Option<_>>()?;
        Some(Constant {
            root,
            source,
            tensor,
            via: Vec::new(),
            chain: Chain::new(),
            transposed: false,
            moved: false,
            dims,
            element: DataType::try_from(tensor.data_type()).unwrap_or(DataType::Undefined),
            reshaped: false,
            changed: None,
        })
    };
    match definition {
        Definition::Input => None,
        Definition::Initializer(index) => {
            let source = Source::Initializer { scope: scope.clone(), index };
            start(source, values.initializer(root.0, index)?)
        }
        Definition::Node(n) => {
            let node = values.node(root.0, n)?;
            if node.is("Constant") {
                let source = Source::ConstantNode { scope: scope.clone(), node: n };
                return start(source, node.attr("value")?.t.as_ref()?);
            }
            // Only a first output is a matrix in all these operators.
            node.output_at(0).filter(|output| *output == name)?;
            let mut constant = pass(values, root.0, node, budget)?;
            constant.via.push(Step { scope: scope.clone(), node: n, op: node.op_type().to_string() });
            Some(constant)
        }
    }
}

/// The constant that comes out of `node`, when one goes in and the operator is looked through.
fn pass<'a>(values: &Values<'a>, graph: usize, node: &'a NodeProto, budget: &mut usize) -> Option<Constant<'a>> {
    if SCALERS.contains(&node.op_type()) && node.is(node.op_type()) {
        let a = trace_within(values, graph, node.input_at(0)?, budget)?;
        let b = trace_within(values, graph, node.input_at(1)?, budget)?;
        // Times a scale on either side, divided by one, or integers less their zero point. The larger one is the weight,
        // and must keep its shape.
        let (mut weight, by) = if node.is("Mul") && a.elements() < b.elements() { (b, a) } else { (a, b) };
        let fits = by.dims.len() <= weight.dims.len()
            && by.dims.iter().rev().zip(weight.dims.iter().rev()).all(|(s, w)| s == w || *s == 1);
        if !fits {
            return None;
        }
        match Link::scale(node, by).filter(|_| FLOATS.contains(&weight.element)) {
            Some(link) => weight.chain.push(link),
            None if node.is("Sub") => weight.changed = Some("is shifted by a Sub"),
            None => weight.changed = Some("is scaled in a way that is not looked into"),
        }
        return Some(weight);
    }
    if !is_chain(node) {
        return None;
    }
    let mut constant = trace_within(values, graph, node.input_at(0)?, budget)?;
    match node.op_type() {
        "Transpose" => constant.transpose(node.attr_ints("perm"))?,
        "Reshape" => {
            let dims = reshaped(&constant.dims, &ints(values, graph, node.input_at(1)?)?)?;
            if dims != constant.dims {
                constant.moved |= constant.transposed;
                constant.transposed &= !constant.moved;
                constant.reshaped = true;
                constant.chain.push(Link::Reshape(dims.clone()));
                constant.dims = dims;
            }
        }
        "Cast" => {
            let to = DataType::try_from(node.attr_i("to", 0) as i32).unwrap_or(DataType::Undefined);
            if to != constant.element {
                if FLOATS.contains(&to) && FLOATS.contains(&constant.element) {
                    constant.chain.push(Link::Cast(to));
                } else {
                    constant.changed = Some("is converted by a Cast");
                }
                constant.element = to;
            }
        }
        "DequantizeLinear" => {
            constant.changed = Some("is dequantized by a DequantizeLinear");
            constant.element = DataType::Float;
        }
        _ => {}
    }
    Some(constant)
}

impl Constant<'_> {
    fn elements(&self) -> usize {
        self.dims.iter().fold(1usize, |n, d| n.saturating_mul(*d))
    }

    /// What a `Transpose` with this `perm` makes of it; `None` where it makes nothing.
    fn transpose(&mut self, perm: Option<&[i64]>) -> Option<()> {
        let rank = self.dims.len();
        let perm: Vec<usize> = match perm {
            Some(perm) => perm.iter().map(|p| usize::try_from(*p).ok()).collect::<Option<_>>()?,
            None => (0..rank).rev().collect(),
        };
        let mut sorted = perm.clone();
        sorted.sort_unstable();
        if sorted != (0..rank).collect::<Vec<_>>() {
            return None;
        }
        if sorted == perm {
            return Some(());
        }
        self.moved |= rank != 2;
        self.transposed = rank == 2 && !self.moved && !self.transposed;
        self.dims = turned(&self.dims, &perm);
        self.chain.push(Link::Transpose(perm));
        Some(())
    }
}

/// Operators of a constant and another one that is broadcast to it.
const SCALERS: [&str; 3] = ["Mul", "Div", "Sub"];

/// Operators whose first input is looked through.
fn is_chain(node: &NodeProto) -> bool {
    ["Identity", "Transpose", "Cast", "Reshape", "DequantizeLinear"].iter().any(|op| node.is(op))
        || (node.op_type() == "DequantizeLinear" && node.domain() == "com.microsoft")
}

/// The target shape of a `Reshape`, where it is a constant.
pub(super) fn shape_of<'a>(values: &Values<'a>, graph: usize, node: &'a NodeProto) -> Option<Vec<i64>> {
    ints(values, graph, node.input_at(1)?)
}

/// The 64-bit integers behind `name`, where they are stored in the file, in one piece or in several that a Concat joins.
pub fn ints<'a>(values: &Values<'a>, graph: usize, name: &'a str) -> Option<Vec<i64>> {
    let ((at, _), definition) = values.lookup(graph, name)?;
    match definition {
        Definition::Node(n) if values.node(at, n)?.is("Concat") => {
            let pieces = values.node(at, n)?.input.iter().map(|piece| stored_ints(values, at, piece));
            Some(pieces.collect::<Option<Vec<_>>>()?.concat())
        }
        _ => stored_ints(values, graph, name),
    }
}

fn stored_ints<'a>(values: &Values<'a>, graph: usize, name: &'a str) -> Option<Vec<i64>> {
    let ((at, _), definition) = values.lookup(graph, name)?;
    let tensor = match definition {
        Definition::Initializer(i) => values.initializer(at, i)?,
        Definition::Node(n) => {
            let node = values.node(at, n).filter(|n| n.is("Constant"))?;
            if let Some(ints) = node.attr_ints("value_ints") {
                return Some(ints.to_vec());
            }
            node.attr("value")?.t.as_ref()?
        }
        Definition::Input => return None,
    };
    if tensor.data_type() != DataType::Int64 as i32 {
        return None;
    }
    Some(crate::onnx::Tensor::from_proto(tensor).ok()?.values::<i64>()?.to_vec())
}

/// Shape after a `Reshape` to `target` (0 copies, -1 takes what is left), or `None` where it does not fit.
pub(super) fn reshaped(dims: &[usize], target: &[i64]) -> Option<Vec<usize>> {
    let total = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    let mut out = Vec::with_capacity(target.len());
    for (i, t) in target.iter().enumerate() {
        out.push(match t {
            -1 => None,
            0 => Some(*dims.get(i)?),
            t => Some(usize::try_from(*t).ok()?),
        });
    }
    let known = out.iter().flatten().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    match out.iter().filter(|d| d.is_none()).count() {
        0 if known == total => {}
        1 if known > 0 && total.is_multiple_of(known) => {}
        _ => return None,
    }
    Some(out.into_iter().map(|d| d.unwrap_or_else(|| total / known.max(1))).collect())
}

/// Who sees the value in the end: nodes and graph outputs, chains looked through.
pub fn final_readers<'a>(values: &Values<'a>, value: ValueId<'a>) -> Vec<Reader> {
    let mut found = Vec::new();
    let mut queue = vec![value];
    let mut budget = 10_000usize;
    while let Some(value) = queue.pop() {
        for reader in values.readers(value) {
            budget = budget.saturating_sub(1);
            match chained(values, *reader).filter(|next| budget > 0 && *next != value) {
                Some(next) => queue.push(next),
                None => found.push(*reader),
            }
        }
    }
    found
}

/// [`final_readers`] of what `reader` makes of the value; `reader` itself where it is one of them.
pub fn readers_behind(values: &Values, reader: Reader) -> Vec<Reader> {
    chained(values, reader).map_or_else(|| vec![reader], |next| final_readers(values, next))
}

/// What comes out of `reader`, where that is a node of a chain.
fn chained<'a>(values: &Values<'a>, reader: Reader) -> Option<ValueId<'a>> {
    let Reader::Node { graph, node, input } = reader else { return None };
    let node = values.node(graph, node)?;
    let passes = match SCALERS.contains(&node.op_type()) {
        false => input == 0 && is_chain(node),
        // By a constant, and as the one that is scaled.
        true => {
            let own = trace(values, graph, node.input_at(input)?)?;
            let other = trace(values, graph, node.input_at(1usize.checked_sub(input)?)?)?;
            match input {
                0 => !node.is("Mul") || own.elements() >= other.elements(),
                _ => node.is("Mul") && own.elements() > other.elements(),
            }
        }
    };
    passes.then_some(())?;
    Some(values.lookup(graph, node.output_at(0)?)?.0)
}
