//! What a `Where` leaves out: its adjoint is zero, but the operator it came from may be infinitely steep or undefined
//! there (a softmax over nothing, a logarithm of 0), and 0·∞ is no number. Rules of such operators ask here.

use std::collections::HashSet;

use super::vjp::Vjp;
use crate::onnx::NodeProto;

/// Operators that work element by element: what is left out of their result is left out of their operands.
const ELEMENTWISE: &[&str] =
    &["Add", "Cast", "CastLike", "Div", "Exp", "Identity", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"];

/// The values of a graph that a `Where` chooses from, directly or behind operators that work element by element.
pub(super) fn left_out(nodes: &[NodeProto]) -> HashSet<&str> {
    let mut values: HashSet<&str> = HashSet::new();
    for node in nodes.iter().rev() {
        let passes = || node.output_at(0).is_some_and(|y| values.contains(y));
        if node.is("Where") {
            values.extend(node.input.iter().skip(1).map(String::as_str));
        } else if ELEMENTWISE.iter().any(|op| node.is(op)) && passes() {
            values.extend(node.input.iter().map(String::as_str));
        }
    }
    values
}

impl Vjp<'_> {
    /// `g` with zeros for what is no number, where a `Where` may leave out the node's result: what is left out pulls on
    /// nothing, however steep the operator is there.
    pub(super) fn settled(&self, g: String) -> String {
        match self.node.output_at(0).is_some_and(|y| self.left_out.contains(y)) {
            true => self.select(self.op("IsNaN", &[&g], vec![]), self.c(0.0), g),
            false => g,
        }
    }
}
