//! Conditionals: the adjoint of an `If` is an `If` on the same condition.

use super::super::reverse::{Path, Scope, add_constants};
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType, GraphProto, NodeProto, ValueInfoProto, value_info};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("If", conditional);
}

/// Each branch of the new `If` computes its old branch again and runs reverse mode on it; its outputs are the adjoints
/// of the outer values that the branches use, zeros where a branch does not use one. The names inside stay what they
/// were: the two `If`s are siblings, so their branches do not see each other.
fn conditional(v: &Vjp) -> Result<Adjoints> {
    let wanted: Vec<String> = (1..v.inputs.len()).filter(|i| v.wants(*i)).map(|i| v.inputs[i].clone()).collect();
    let mut attributes = Vec::new();
    for name in ["then_branch", "else_branch"] {
        let graph = v.node.attr(name).and_then(|a| a.g.as_ref()).ok_or_else(|| v.error(format!("it has no {name}")))?;
        attributes.push(AttributeProto::graph(name, branch(v, graph, &wanted)?));
    }
    let mut outputs = v.node("", "If", &[v.x(0)?], attributes, wanted.len()).into_iter();
    Ok((0..v.inputs.len()).map(|i| if i > 0 && v.wants(i) { outputs.next() } else { None }).collect())
}

fn branch(v: &Vjp, graph: &GraphProto, wanted: &[String]) -> Result<GraphProto> {
    let shapes = v.shapes.subgraph(graph, v.opset);
    let mut constants = v.constants.clone();
    add_constants(&mut constants, graph, &Default::default());
    let scope = Scope { nodes: &graph.node, shapes: &shapes, constants: &constants, rules: v.rules, opset: v.opset };
    let results: Vec<String> = graph.output.iter().map(|o| o.name().to_string()).collect();
    let path = Path::find(scope, &results, wanted)?;
    let seeds: Vec<(String, String)> =
        results.into_iter().enumerate().filter_map(|(i, y)| Some((y, v.adjoint(i)?.to_string()))).collect();

    let (outputs, emitted) = v.emitter.branch(|| -> Result<Vec<ValueInfoProto>> {
        let adjoints = path.reverse(scope, v.emitter, seeds, wanted)?;
        let mut outputs = Vec::new();
        for (value, adjoint) in wanted.iter().zip(adjoints) {
            let element = v.shapes.element(value).or(v.element()).unwrap_or(DataType::Float);
            let adjoint = match adjoint.or_else(|| Some(v.expand(v.float(0.0, element)?, v.shape_of(value)))) {
                Some(adjoint) => adjoint,
                None => return Err(v.error(format!("{value} is no floating-point tensor"))),
            };
            let name = v.fresh(&format!("{value}.adjoint"));
            v.emitter.named("Identity", &adjoint, &name);
            let mut info = value_info(&name, element, &[]);
            if let Some(crate::onnx::proto::type_proto::Value::TensorType(tensor)) =
                info.r#type.as_mut().and_then(|t| t.value.as_mut())
            {
                tensor.shape = None;
            }
            outputs.push(info);
        }
        Ok(outputs)
    });
    let outputs = outputs?;
    let mut nodes: Vec<NodeProto> = graph.node.clone();
    v.emitter.amend(&mut nodes);
    nodes.extend(emitted);
    let live = outputs.iter().map(|o| o.name().to_string()).collect();
    let node = super::super::used(nodes, live);
    let needed = super::super::used_names(&node);
    let initializer = graph.initializer.iter().filter(|t| needed.contains(t.name())).cloned().collect();
    Ok(GraphProto { name: graph.name.clone(), initializer, output: outputs, node, ..Default::default() })
}
