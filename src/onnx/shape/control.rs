//! Control flow: what an If gives, whichever branch runs, and what a Scan or a Loop gives after any number of steps.

use std::collections::{BTreeSet, HashSet};

use super::op::{Op, Rules, axis, known};
use super::{DataType, Dim, GraphProto, NodeProto, Shapes, ValueShape};

pub(super) const RULES: Rules = &[(&["If"], branch), (&["Scan"], scan), (&["Loop"], carried)];

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

impl Shapes {
    /// Shapes inside `graph`, the body of the Scan or Loop `node`, that hold of every step. What a state keeps from step
    /// to step is found by induction: it is what the first step gets and each step gives again.
    pub fn body(&self, node: &NodeProto, graph: &GraphProto, opset: i64) -> Self {
        let skipped = usize::from(node.is("Loop"));
        let scanned = if node.is("Loop") { 0 } else { node.attr_i("num_scan_inputs", 0).max(0) as usize };
        let states = skipped * 2..graph.input.len().saturating_sub(scanned);
        let mut start = self.clone();
        let mut free: HashSet<Dim> = HashSet::new();
        for (i, info) in graph.input.iter().enumerate() {
            start.forget(info.name());
            let outer = node.input_at(i).and_then(|x| self.get(x)).cloned().unwrap_or_default();
            let shape = match (node.is("Loop"), i) {
                (true, 0) => ValueShape { element: Some(DataType::Int64), dims: Some(vec![]) },
                (true, 1) => ValueShape { element: Some(DataType::Bool), dims: Some(vec![]) },
                _ if states.contains(&i) => outer,
                _ => {
                    let at = attr(node, "scan_input_axes", i.saturating_sub(states.end));
                    let dims = outer.dims.and_then(|mut dims| {
                        dims.remove(axis(at, dims.len())?);
                        Some(dims)
                    });
                    ValueShape { element: outer.element, dims }
                }
            };
            start.values.insert(info.name().into(), shape);
            start.refine(info.name(), info);
        }
        loop {
            let mut inner = start.clone();
            inner.graph(graph, opset);
            let mut stable = true;
            for i in states.clone().filter(|_| node.is("Loop")) {
                let (Some(before), Some(after)) = (graph.input.get(i), graph.output.get(i - 1)) else { continue };
                let Some(old) = start.dims(before.name()).map(<[Dim]>::to_vec) else { continue };
                let new = inner.dims(after.name()).filter(|new| new.len() == old.len());
                let kept = new
                    .map(|new| old.iter().zip(new).map(|(a, b)| (*a, a == b || free.contains(a))).collect::<Vec<_>>());
                if kept.as_ref().is_some_and(|kept| kept.iter().all(|(_, kept)| *kept)) {
                    continue;
                }
                stable = false;
                let dims = kept.map(|kept| {
                    let mut loosen = |(dim, kept)| if kept { dim } else { start.symbols.fresh() };
                    let dims: Vec<Dim> = kept.iter().copied().map(&mut loosen).collect();
                    free.extend(dims.iter().zip(&kept).filter(|(_, (_, kept))| !kept).map(|(dim, _)| *dim));
                    dims
                });
                start.values.entry(before.name().into()).or_default().dims = dims;
            }
            if stable {
                return inner;
            }
        }
    }
}

fn attr(node: &NodeProto, name: &str, i: usize) -> i64 {
    node.attr_ints(name).and_then(|a| a.get(i)).copied().unwrap_or(0)
}

/// Shape of one step's output, with the sizes that only the body knows left open: no step may run.
fn step(op: &mut Op, shape: Option<&ValueShape>) -> (Option<DataType>, Option<Vec<Dim>>) {
    let Some(ValueShape { element, dims }) = shape.cloned() else { return (None, None) };
    let dims = dims.map(|dims| dims.into_iter().map(|d| known(d).map_or_else(|| op.fresh(), Dim::Known)).collect());
    (element, dims)
}

/// States as they began; outputs of the steps stacked along an axis as long as that of the inputs. (Before operator set 9
/// there was a batch as well.)
fn scan(op: &mut Op) -> Option<()> {
    if op.opset < 9 {
        return None;
    }
    let graph = op.node.attr("body")?.g.as_ref()?;
    let states = graph.input.len().checked_sub(usize::try_from(op.node.attr_i("num_scan_inputs", 0)).ok()?)?;
    let inner = op.shapes.body(op.node, graph, op.opset);
    op.shapes.symbols = inner.symbols.clone();
    let length = op.dims(states).and_then(|dims| Some(dims[axis(attr(op.node, "scan_input_axes", 0), dims.len())?]));
    for (i, output) in graph.output.iter().enumerate() {
        if i < states {
            let (element, dims) = (op.element(i), op.dims(i));
            op.set(i, element, dims);
            continue;
        }
        let (element, mut dims) = step(op, inner.get(output.name()));
        let length = length.unwrap_or_else(|| op.fresh());
        if let Some(dims) = &mut dims {
            let at = axis(attr(op.node, "scan_output_axes", i - states), dims.len() + 1)?;
            dims.insert(at, length);
        }
        op.set(i, element, dims);
    }
    Some(())
}

/// A value that a loop carries keeps its element type, and the sizes that no turn changes; outputs of the turns are
/// stacked along a new first axis.
fn carried(op: &mut Op) -> Option<()> {
    // Inputs: trip count, condition, then the carried values; outputs: these first.
    let states = op.node.input.len().checked_sub(2)?;
    let graph = op.node.attr("body")?.g.as_ref()?;
    let inner = op.shapes.body(op.node, graph, op.opset);
    let turns = inner.symbols.clone();
    let before: Vec<ValueShape> =
        graph.input.iter().skip(2).map(|i| inner.get(i.name()).cloned().unwrap_or_default()).collect();
    op.shapes.symbols = turns;
    let length = op.fresh();
    for (i, output) in graph.output.iter().skip(1).enumerate() {
        if i < states {
            let element = op.element(i + 2);
            let initial = op.dims(i + 2);
            let dims = before.get(i).and_then(|b| b.dims.clone()).zip(initial).filter(|(b, a)| a.len() == b.len());
            let pairs = dims.map(|(b, a)| b.into_iter().zip(a).collect::<Vec<_>>());
            let dims = pairs.map(|p| p.into_iter().map(|(b, a)| if a == b { a } else { op.fresh() }).collect());
            op.set(i, element, dims);
        } else {
            let (element, dims) = step(op, inner.get(output.name()));
            let dims = dims.map(|dims| [vec![length], dims].concat());
            op.set(i, element, dims);
        }
    }
    Some(())
}
