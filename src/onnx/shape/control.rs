//! Control flow: what an If gives, whichever branch runs.

use std::collections::BTreeSet;

use super::op::{Op, Rules, known};
use super::{Dim, GraphProto, Shapes, ValueShape};

pub(super) const RULES: Rules = &[(&["If"], branch), (&["Loop"], carried)];

fn branch(op: &mut Op) -> Option<()> {
    let graph = |name: &str| op.node.attr(name).and_then(|a| a.g.as_ref());
    let (yes, no) = (graph("then_branch")?, graph("else_branch")?);
    let condition = op.elements(0).and_then(|v| v.first().copied()).and_then(known);
    let yes = if condition == Some(0) { None } else { Some(outputs(op.shapes, yes, op.opset)) };
    let no = if condition.is_some_and(|c| c != 0) { None } else { Some(outputs(op.shapes, no, op.opset)) };
    for i in 0..op.node.output.len() {
        let of = |branch: &Option<Vec<ValueShape>>| branch.as_ref().map(|b| b.get(i).cloned().unwrap_or_default());
        let shape = match (of(&yes), of(&no)) {
            (Some(a), Some(b)) => merged(op, a, b),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => ValueShape::default(),
        };
        op.set(i, shape.element, shape.dims);
    }
    Some(())
}

/// Shapes of a subgraph's outputs; its names go out of scope again, its symbols stay.
fn outputs(shapes: &mut Shapes, graph: &GraphProto, opset: i64) -> Vec<ValueShape> {
    let tensors = graph.initializer.iter().map(|t| t.name());
    let names: BTreeSet<&str> = tensors.chain(graph.node.iter().flat_map(|n| &n.output).map(String::as_str)).collect();
    let hidden: Vec<_> = names
        .into_iter()
        .map(|n| (n, shapes.values.remove(n), shapes.integers.remove(n), shapes.floats.remove(n)))
        .collect();
    shapes.graph(graph, opset);
    let outputs = graph.output.iter().map(|o| shapes.get(o.name()).cloned().unwrap_or_default()).collect();
    for (name, shape, integers, floats) in hidden {
        shapes.forget(name);
        shape.map(|v| shapes.values.insert(name.into(), v));
        integers.map(|v| shapes.integers.insert(name.into(), v));
        floats.map(|v| shapes.floats.insert(name.into(), v));
    }
    outputs
}

/// What holds of both.
fn merged(op: &mut Op, a: ValueShape, b: ValueShape) -> ValueShape {
    let element = if a.element == b.element { a.element } else { None };
    let dims = a.dims.zip(b.dims).filter(|(a, b)| a.len() == b.len()).map(|(a, b)| {
        let pairs: Vec<(Dim, Dim)> = a.into_iter().zip(b).collect();
        pairs.into_iter().map(|(a, b)| if a == b { a } else { op.fresh() }).collect()
    });
    ValueShape { element, dims }
}

/// A value that a loop carries keeps its element type; its shape may change from turn to turn.
fn carried(op: &mut Op) -> Option<()> {
    // Inputs: trip count, condition, then the carried values; outputs: these first.
    for i in 0..op.node.input.len().saturating_sub(2).min(op.node.output.len()) {
        let element = op.element(i + 2);
        op.set(i, element, None);
    }
    Some(())
}
