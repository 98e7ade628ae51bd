//! Conditionals: the adjoint of an `If` is an `If` on the same condition.

use std::collections::HashMap;

use super::super::declare;
use super::super::recognise::recognise;
use super::super::reverse::{Path, Scope, add_constants};
use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType, GraphProto, NodeProto, ValueInfoProto};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("If", conditional);
}

/// Each branch of the new `If` computes its old branch again, under new names, and runs reverse mode on it; its outputs
/// are the adjoints of the outer values that the branches use, zeros where a branch does not use one.
fn conditional(v: &Vjp) -> Result<Adjoints> {
    let wanted: Vec<String> = (1..v.inputs.len()).filter(|i| v.wants(*i)).map(|i| v.inputs[i].clone()).collect();
    let condition = v.shapes.elements(v.x(0)?).and_then(|c| known(c.first()?));
    let mut attributes = Vec::new();
    for (name, when) in [("then_branch", true), ("else_branch", false)] {
        let graph = v.node.attr(name).and_then(|a| a.g.as_ref()).ok_or_else(|| v.error(format!("it has no {name}")))?;
        let taken = condition.is_none_or(|condition| (condition != 0) == when);
        attributes.push(AttributeProto::graph(name, branch(v, graph, taken, &wanted)?));
    }
    let mut outputs = v.node("", "If", &[v.x(0)?], attributes, wanted.len()).into_iter();
    Ok((0..v.inputs.len()).map(|i| if i > 0 && v.wants(i) { outputs.next() } else { None }).collect())
}

/// `graph` with new names for the values that it and the graphs below it define.
pub(super) fn renamed(v: &Vjp, graph: &GraphProto, outer: &HashMap<String, String>) -> GraphProto {
    let mut graph = graph.clone();
    let mut names = outer.clone();
    let defined = graph.input.iter().map(|i| i.name()).chain(graph.initializer.iter().map(|t| t.name()));
    for name in defined.chain(graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str))) {
        if !name.is_empty() {
            names.insert(name.to_string(), v.fresh(name));
        }
    }
    let rename = |name: &mut String| {
        if let Some(new) = names.get(name) {
            name.clone_from(new);
        }
    };
    graph.value_info.clear();
    graph.input.iter_mut().chain(&mut graph.output).filter_map(|i| i.name.as_mut()).for_each(rename);
    graph.initializer.iter_mut().filter_map(|t| t.name.as_mut()).for_each(rename);
    for node in &mut graph.node {
        node.input.iter_mut().chain(&mut node.output).for_each(rename);
        for inner in node.attribute.iter_mut().flat_map(|a| a.g.iter_mut().chain(&mut a.graphs)) {
            *inner = renamed(v, inner, &names);
        }
    }
    graph
}

/// The adjoints of one branch: zeros where it is never `taken`, for there its ranks need not make sense.
fn branch(v: &Vjp, graph: &GraphProto, taken: bool, wanted: &[String]) -> Result<GraphProto> {
    let graph = &renamed(v, graph, &HashMap::new());
    let shapes = v.shapes.subgraph(graph, v.opset);
    let mut constants = v.constants.clone();
    add_constants(&mut constants, graph, &Default::default());
    let visible = graph.output.iter().map(|o| o.name().to_string()).collect();
    let nodes = recognise(&graph.node, &constants, &visible);
    let scope = Scope { nodes: &nodes, shapes: &shapes, constants: &constants, rules: v.rules, opset: v.opset };
    let results: Vec<String> = graph.output.iter().map(|o| o.name().to_string()).collect();
    let path = Path::find(scope, &results, wanted)?;
    let seed = |(i, y)| Some((y, v.adjoint(i).filter(|_| taken)?.to_string()));
    let seeds: Vec<(String, String)> = results.into_iter().enumerate().filter_map(seed).collect();

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
            outputs.push(declare(&name, element, value, v.shapes));
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
