//! How much memory a run will take, before it starts: the gradient graph is walked with the sizes of a real batch, and
//! what is alive at each node is added up.

use std::collections::HashMap;

use serde::Serialize;

use super::data::Batch;
use super::graph::{LossModel, Parameter};
use super::prefix::CachePlan;
use super::update::optimizer::Rule;
use crate::Result;
use crate::autodiff::inputs as read_by;
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{DataType, GraphProto, ModelProto, Tensor};

/// Bytes, by what they are for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The engine itself.
    pub engine: u64,
    /// Frozen tensors.
    pub weights: u64,
    /// What the graph has computed and still needs, at the node where that is most; gradients among it.
    pub activations: u64,
    /// The node where it is most.
    pub at: String,
    /// What the forward pass leaves for the backward pass.
    pub kept: u64,
    /// Parameters, the copy to go back to, and the optimizer's moments.
    pub state: u64,
    /// All of it.
    pub peak: u64,
    /// How much less it is with activations computed again on the way back (`--recompute`), where they are not already.
    pub recompute_saves: Option<u64>,
    /// Values whose size is not known before the run, which count for nothing here.
    pub unknown: usize,
    /// What is computed once and kept. The memory is that of a step without it, which a run takes to check it.
    pub cache: CachePlan,
}

/// What ONNX Runtime and this program take of a process's memory before any tensor (measured).
const ENGINE: u64 = 60 << 20;

/// What training `loss` takes with batches like `batch`.
pub(super) fn plan(loss: &mut LossModel, parameters: &[Parameter], batch: Batch, rule: Rule) -> Result<MemoryPlan> {
    let moments = u64::from(rule.moments().0) + u64::from(rule.moments().1);
    let (model, others) = loss.whole_gradient(batch.targets.clone())?;
    let inputs: Vec<(String, Tensor)> = batch.inputs.into_iter().chain(others).collect();
    let numbers: u64 = parameters.iter().map(|p| p.value.byte_len() as u64).sum();
    // The values, those to go back to, and the moments.
    let state = numbers * (2 + moments);
    let mut plan = alive(&model, &inputs, state);
    if !std::mem::replace(&mut loss.recompute, true)
        && let Ok((model, _)) = loss.whole_gradient(batch.targets)
    {
        loss.recompute = false;
        plan.recompute_saves = Some(plan.peak.saturating_sub(alive(&model, &inputs, state).peak));
    }
    Ok(plan)
}

/// Walks the graph of `model` with the sizes of `inputs`.
fn alive(model: &ModelProto, inputs: &[(String, Tensor)], state: u64) -> MemoryPlan {
    let empty = GraphProto::default();
    let graph = model.graph.as_ref().unwrap_or(&empty);
    let dims = |value: &Tensor| value.dims().iter().map(|d| *d as i64).collect();
    let shapes = Shapes::infer(model, &inputs.iter().map(|(name, value)| (name.clone(), dims(value))).collect());
    let weights = graph.initializer.iter().filter_map(|t| t.raw_data.as_ref()).map(|raw| raw.len() as u64).sum();
    let mut plan = MemoryPlan { engine: ENGINE, weights, state, ..Default::default() };

    // When a value is read for the last time, by a node or its subgraphs; outputs stay.
    let reads: Vec<Vec<String>> = graph.node.iter().map(read_by).collect();
    let mut last: HashMap<&str, usize> = HashMap::new();
    for (at, read) in reads.iter().enumerate() {
        last.extend(read.iter().map(|name| (name.as_str(), at)));
    }
    last.extend(graph.output.iter().map(|o| (o.name(), usize::MAX)));
    let mut dying: HashMap<usize, Vec<&str>> = HashMap::new();
    for (name, at) in &last {
        dying.entry(*at).or_default().push(name);
    }
    let loss =
        graph.output.first().and_then(|o| graph.node.iter().position(|n| n.output.iter().any(|y| y == o.name())));

    let mut alive: HashMap<&str, u64> = HashMap::new();
    let mut total = inputs.iter().map(|(_, value)| value.byte_len() as u64).sum::<u64>();
    for (at, node) in graph.node.iter().enumerate() {
        for output in node.output.iter().filter(|name| last.contains_key(name.as_str())) {
            // These give their input another shape, and its memory.
            let same = ["Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten"].contains(&node.op_type());
            let shared = same && node.input_at(0).is_some_and(|x| alive.contains_key(x));
            let bytes = match size(&shapes, output) {
                _ if shared => hand_over(&mut alive, node.input_at(0), last[output.as_str()], &last),
                Some(bytes) => bytes,
                None => {
                    plan.unknown += 1;
                    0
                }
            };
            total += if shared { 0 } else { bytes };
            alive.insert(output, bytes);
        }
        if total > plan.activations {
            plan.activations = total;
            plan.at = node.name().to_string();
        }
        if Some(at) == loss {
            plan.kept = total;
        }
        for name in dying.get(&at).into_iter().flatten() {
            total -= alive.remove(name).unwrap_or(0).min(total);
        }
    }
    plan.peak = plan.engine + plan.weights + plan.activations + plan.state;
    plan
}

/// Moves the bytes of `from` to the value that shares its memory, where that one lives longer.
fn hand_over(alive: &mut HashMap<&str, u64>, from: Option<&str>, until: usize, last: &HashMap<&str, usize>) -> u64 {
    let Some(from) = from else { return 0 };
    match last.get(from) {
        Some(end) if *end >= until => 0,
        _ => alive.get_mut(from).map(std::mem::take).unwrap_or(0),
    }
}

fn size(shapes: &Shapes, name: &str) -> Option<u64> {
    let element = match shapes.element(name)? {
        DataType::Double | DataType::Int64 | DataType::Uint64 => 8,
        DataType::Float | DataType::Int32 | DataType::Uint32 => 4,
        DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => 2,
        _ => 1,
    };
    shapes.dims(name)?.iter().try_fold(element, |n: u64, dim| match dim {
        Dim::Known(d) => n.checked_mul(u64::try_from(*d).ok()?),
        Dim::Symbol(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::OperatorSetIdProto;
    use crate::onnx::{AttributeProto, node, value_info};

    #[test]
    fn what_a_branch_reads_from_outside_is_kept_for_it() {
        let branch = |op| GraphProto {
            node: vec![node(op, &["h"], &["r"])],
            output: vec![value_info("r", DataType::Float, &["100"])],
            ..Default::default()
        };
        let mut choice = node("If", &["c"], &["y"]);
        choice.attribute = vec![
            AttributeProto::graph("then_branch", branch("Relu")),
            AttributeProto::graph("else_branch", branch("Neg")),
        ];
        let small = value_info("s", DataType::Float, &[]);
        let model = ModelProto {
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
            graph: Some(GraphProto {
                node: vec![
                    node("Tanh", &["x"], &["h"]),
                    node("Exp", &["x"], &["k"]),
                    node("ReduceMax", &["k"], &["s"]),
                    choice,
                ],
                input: vec![value_info("x", DataType::Float, &["100"]), value_info("c", DataType::Bool, &[])],
                output: vec![small, value_info("y", DataType::Float, &["100"])],
                ..Default::default()
            }),
            ..Default::default()
        };
        let inputs = [("x".to_string(), Tensor::new(&[100], vec![0f32; 100]))];
        // The input, h for the branch, k beside it, and the largest of k.
        assert_eq!(alive(&model, &inputs, 0).activations, 3 * 400 + 4);
    }
}
