//! Scan and Loop: the adjoint of a loop is a loop that goes through its steps from the last to the first.
//!
//! A step computes (sₜ₊₁, yₜ) = f(sₜ, xₜ, w) with states s, inputs x and captured values w. Backwards, with s̄ that of the
//! last state to begin with, s̄ₜ, x̄ₜ and step t's part of w̄ are the vector-Jacobian product of f at (s̄ₜ₊₁, ȳₜ). The
//! step is computed again from sₜ, which the forward node gives as a further output; so is the number of steps that a
//! Loop took, as the length of those.

use std::collections::HashMap;

use super::super::declare;
use super::super::recognise::recognise;
use super::super::reverse::{Path, Scope, active_inside, add_constants, captures, states};
use super::super::vjp::is_float;
use super::control::renamed;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::shape::Shapes;
use crate::onnx::{AttributeProto, DataType, GraphProto, NodeProto, ValueInfoProto, node, value_info};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Scan", steps);
    rules.vjp("Loop", steps);
}

/// How a node's inputs and outputs belong to those of its body.
struct Layout {
    /// Body inputs and outputs before the states: the turn and the condition of a Loop.
    first_in: usize,
    first_out: usize,
    states: usize,
}

/// The inputs and outputs of the Scan in the making.
#[derive(Default)]
struct Sweep {
    /// What goes in, and the body's name of it: states, then values of the steps with axis and direction.
    initial: Vec<(String, ValueInfoProto)>,
    scanned: Vec<(String, ValueInfoProto, i64, i64)>,
    /// What comes out: states as they are at the end, then values of the steps with axis and direction.
    kept: Vec<ValueInfoProto>,
    stacked: Vec<(ValueInfoProto, i64, i64)>,
}

fn steps(v: &Vjp) -> Result<Adjoints> {
    let original = v.node.attr("body").and_then(|a| a.g.as_ref()).ok_or_else(|| v.error("it has no body"))?;
    let count = states(v.node, original).len();
    let layout = match v.node.is("Loop") {
        true => Layout { first_in: 2, first_out: 1, states: count },
        false => Layout { first_in: 0, first_out: 0, states: count },
    };
    let listed = |i: usize| v.node.input_at(i).is_some() || i < layout.first_in;
    if original.input.len() != v.node.input.len()
        || original.output.len() < layout.first_out + count
        || !(0..original.input.len()).all(listed)
    {
        return Err(v.error("its body has other inputs and outputs than itself"));
    }

    let body = &renamed(v, original, &HashMap::new());
    let shapes = v.shapes.body(v.node, body, v.opset);
    let mut constants = v.constants.clone();
    add_constants(&mut constants, body, &Default::default());
    let results: Vec<String> = body.output.iter().map(|o| o.name().to_string()).collect();
    let nodes = recognise(&body.node, &constants, &results.iter().cloned().collect());
    let scope = Scope { nodes: &nodes, shapes: &shapes, constants: &constants, rules: v.rules, opset: v.opset };
    let wanted: Vec<String> = (0..v.inputs.len()).filter(|i| v.wants(*i)).map(|i| v.inputs[i].clone()).collect();
    let active = active_inside(scope, v.node, body, &wanted);
    let path = Path::find(scope, &results, &active)?;
    let last = layout.first_in + layout.states;
    let states: Vec<usize> = (layout.first_in..last).filter(|i| active.contains(&name(&body.input[*i]))).collect();
    let inputs: Vec<usize> =
        (last..body.input.len()).filter(|i| v.wants(*i) && active.contains(&name(&body.input[*i]))).collect();
    let captured: Vec<String> = captures(body).into_iter().filter(|c| active.contains(c)).collect();

    // What comes into each step: adjoints of the states after it and of what it gives, and the sums so far.
    let mut sweep = Sweep::default();
    let mut seeds = Vec::new();
    for i in &states {
        let element = element(v, &shapes, body.input[*i].name())?;
        let k = i - layout.first_in;
        let start = match v.adjoint(k) {
            Some(adjoint) => adjoint.to_string(),
            // States keep their shape, for their values are stacked.
            None => zeros(v, element, &v.node.input[*i])?,
        };
        let inner = declare(&v.fresh("after"), element, body.input[*i].name(), &shapes);
        seeds.push((results[layout.first_out + k].clone(), name(&inner)));
        sweep.initial.push((start, inner));
    }
    for w in &captured {
        let element = element(v, v.shapes, w)?;
        sweep.initial.push((zeros(v, element, w)?, declare(&v.fresh("sum"), element, w, v.shapes)));
    }
    for k in layout.states..results.len() - layout.first_out {
        if let Some(adjoint) = v.adjoint(k) {
            let result = &results[layout.first_out + k];
            let inner = declare(&v.fresh("seed"), element(v, &shapes, result)?, result, &shapes);
            seeds.push((result.clone(), name(&inner)));
            let (axis, direction) = place(v, "scan_output", k - layout.states);
            sweep.scanned.push((adjoint.to_string(), inner, axis, 1 - direction));
        }
    }

    let (emitted, mut inner_nodes) = v.emitter.branch(|| -> Result<()> {
        let adjoints = path.reverse(scope, v.emitter, seeds, &active)?;
        let adjoint = |name: &str| active.iter().position(|a| a == name).and_then(|i| adjoints[i].clone());
        for i in &states {
            let state = body.input[*i].name();
            let element = element(v, &shapes, state)?;
            let before = match adjoint(state) {
                Some(adjoint) => adjoint,
                None => zeros_of(v, &shapes, element, state)?,
            };
            sweep.kept.push(output(v, &before, declare("", element, state, &shapes)));
        }
        for (w, (_, sum)) in captured.iter().zip(&sweep.initial[states.len()..]) {
            let total = v.emitter.total([Some(name(sum)), adjoint(w)].into_iter().flatten().collect());
            let info = declare("", element(v, v.shapes, w)?, w, v.shapes);
            sweep.kept.push(output(v, &total.unwrap_or_default(), info));
        }
        for i in &inputs {
            let x = body.input[*i].name();
            let element = element(v, &shapes, x)?;
            let adjoint = match adjoint(x) {
                Some(adjoint) => adjoint,
                None => zeros_of(v, &shapes, element, x)?,
            };
            let (axis, direction) = place(v, "scan_input", i - last);
            sweep.stacked.push((output(v, &adjoint, declare("", element, x, &shapes)), axis, 1 - direction));
        }
        Ok(())
    });
    emitted?;
    let mut nodes = body.node.clone();
    v.emitter.amend(&mut nodes);
    nodes.append(&mut inner_nodes);
    let outputs: Vec<ValueInfoProto> =
        sweep.kept.iter().chain(sweep.stacked.iter().map(|(info, ..)| info)).cloned().collect();
    let nodes = super::super::used(nodes, outputs.iter().map(name).collect());
    let needed = super::super::used_names(&nodes);

    let typed = |info: &ValueInfoProto| match shapes.element(info.name()) {
        Some(element) => declare(info.name(), element, info.name(), &shapes),
        None => info.clone(),
    };
    // What each step was given: inputs are there, states are kept by the forward node.
    let mut stored = Vec::new();
    for (i, info) in body.input.iter().enumerate() {
        let counts = v.node.is("Loop") && i == 0 && sweep.scanned.is_empty();
        if !needed.contains(info.name()) && !counts {
            continue;
        }
        if i >= last {
            let (axis, direction) = place(v, "scan_input", i - last);
            sweep.scanned.push((v.node.input[i].clone(), typed(info), axis, 1 - direction));
        } else if info.r#type.is_some() && info.tensor().is_none() {
            return Err(v.error(format!(
                "its state {} is a sequence; only tensors can be kept for the way back",
                original.input[i].name()
            )));
        } else {
            stored.push((i, typed(info)));
        }
    }
    let kept = keep(v, original, &stored);
    sweep.scanned.extend(kept.into_iter().zip(stored).map(|(value, (_, info))| (value, info, 0, 1)));
    if sweep.scanned.is_empty() {
        let (axis, direction) = place(v, "scan_input", 0);
        sweep.scanned.push((v.x(last)?.to_string(), typed(&body.input[last]), axis, 1 - direction));
    }

    let initializer = body.initializer.iter().filter(|t| needed.contains(t.name())).cloned().collect();
    let graph = GraphProto {
        name: Some(format!("{}_backward", v.node.op_type().to_lowercase())),
        input: sweep.initial.iter().map(|(_, i)| i).chain(sweep.scanned.iter().map(|s| &s.1)).cloned().collect(),
        output: outputs,
        initializer,
        node: nodes,
        ..Default::default()
    };
    let mut results = match v.node.is("Loop") {
        true => sweep.run_loop(v, graph),
        false => sweep.run(v, graph),
    }
    .into_iter();
    let mut adjoints: Adjoints = vec![None; v.inputs.len()];
    for i in states.iter().copied() {
        adjoints[i] = results.next().filter(|_| v.wants(i));
    }
    for w in &captured {
        if let Some(at) = v.inputs.iter().position(|x| x == w) {
            adjoints[at] = v.emitter.total(adjoints[at].take().into_iter().chain(results.next()).collect());
        }
    }
    for i in inputs {
        adjoints[i] = results.next();
    }
    Ok(adjoints)
}

impl Sweep {
    /// Outputs of the Scan with this body.
    fn run(&self, v: &Vjp, graph: GraphProto) -> Vec<String> {
        let mut attributes = vec![
            AttributeProto::int("num_scan_inputs", self.scanned.len() as i64),
            AttributeProto::ints("scan_input_axes", &self.scanned.iter().map(|s| s.2).collect::<Vec<_>>()),
            AttributeProto::ints("scan_input_directions", &self.scanned.iter().map(|s| s.3).collect::<Vec<_>>()),
        ];
        if !self.stacked.is_empty() {
            let (axes, directions): (Vec<i64>, Vec<i64>) = self.stacked.iter().map(|s| (s.1, s.2)).unzip();
            attributes.push(AttributeProto::ints("scan_output_axes", &axes));
            attributes.push(AttributeProto::ints("scan_output_directions", &directions));
        }
        let inputs: Vec<&str> =
            self.initial.iter().map(|s| s.0.as_str()).chain(self.scanned.iter().map(|s| s.0.as_str())).collect();
        let count = graph.output.len();
        attributes.push(AttributeProto::graph("body", graph));
        v.node("", "Scan", &inputs, attributes, count)
    }

    /// Outputs of a Loop with this body: unlike a Scan it may take no turn at all. It reads what was stacked from the
    /// end to the front.
    fn run_loop(&self, v: &Vjp, mut graph: GraphProto) -> Vec<String> {
        let turns = v.dim_of(&self.scanned[0].0, 0);
        let last = v.sub(&turns, v.ints(&[1]));
        let (turn, go, at, go_on) = (v.fresh("turn"), v.fresh("go"), v.fresh("at"), v.fresh("go_on"));
        let mut nodes =
            vec![node("Identity", &[&go], &[&go_on]), node("Sub", &[&v.squeeze(last, v.ints(&[0])), &turn], &[&at])];
        nodes.extend(self.scanned.iter().map(|(value, inner, ..)| node("Gather", &[value, &at], &[inner.name()])));
        nodes.append(&mut graph.node);
        let states = self.initial.iter().map(|(_, info)| info.clone());
        let start = [value_info(&turn, DataType::Int64, &[]), value_info(&go, DataType::Bool, &[])];
        graph.input = start.into_iter().chain(states).collect();
        graph.output.insert(0, value_info(&go_on, DataType::Bool, &[]));
        graph.node = nodes;
        let turns = v.squeeze(turns, v.ints(&[0]));
        let inputs: Vec<&str> =
            [turns.as_str(), ""].into_iter().chain(self.initial.iter().map(|s| s.0.as_str())).collect();
        let count = graph.output.len() - 1;
        v.node("", "Loop", &inputs, vec![AttributeProto::graph("body", graph)], count)
    }
}

/// Names of the values that the body inputs `stored` had at each step, stacked: new outputs of the forward node.
fn keep(v: &Vjp, original: &GraphProto, stored: &[(usize, ValueInfoProto)]) -> Vec<String> {
    if stored.is_empty() {
        return vec![];
    }
    let mut forward: NodeProto = v.node.clone();
    let skipped = usize::from(forward.is("Loop"));
    forward.output.resize_with(original.output.len() - skipped, String::new);
    for output in forward.output.iter_mut().filter(|o| o.is_empty()) {
        *output = v.fresh("unused");
    }
    let mut graph = original.clone();
    let mut names = Vec::new();
    for (i, info) in stored {
        let inner = v.fresh(&format!("{}.kept", original.input[*i].name()));
        graph.node.push(node("Identity", &[original.input[*i].name()], &[&inner]));
        graph.output.push(ValueInfoProto {
            name: Some(inner.clone()),
            r#type: info.r#type.clone(),
            ..Default::default()
        });
        let outer = v.fresh(&format!("{}.steps", original.input[*i].name()));
        forward.output.push(outer.clone());
        names.push(outer);
    }
    for attribute in &mut forward.attribute {
        match attribute.name() {
            "body" => attribute.g = Some(graph.clone()),
            // Axes and directions are given for all outputs or none; new ones are stacked as they come.
            "scan_output_axes" | "scan_output_directions" => attribute.ints.extend(vec![0; stored.len()]),
            _ => {}
        }
    }
    if let Some(output) = v.node.output.iter().find(|o| !o.is_empty()) {
        v.emitter.replace(output, forward);
    }
    names
}

fn name(info: &ValueInfoProto) -> String {
    info.name().to_string()
}

/// A new output of the body, equal to `value` and otherwise as declared.
fn output(v: &Vjp, value: &str, info: ValueInfoProto) -> ValueInfoProto {
    let name = v.fresh("before");
    v.emitter.named("Identity", value, &name);
    ValueInfoProto { name: Some(name), ..info }
}

/// Axis and direction of scan input or output `i`.
fn place(v: &Vjp, what: &str, i: usize) -> (i64, i64) {
    let at = |which: &str| v.node.attr_ints(&format!("{what}_{which}")).and_then(|a| a.get(i)).copied().unwrap_or(0);
    (at("axes"), at("directions"))
}

fn element(v: &Vjp, shapes: &Shapes, value: &str) -> Result<DataType> {
    let element = shapes.element(value).filter(|e| is_float(*e)).or_else(|| v.element());
    element.ok_or_else(|| v.error(format!("the element type of {value} is not known")))
}

fn zeros(v: &Vjp, element: DataType, like: &str) -> Result<String> {
    zeros_of(v, v.shapes, element, like)
}

fn zeros_of(v: &Vjp, shapes: &Shapes, element: DataType, like: &str) -> Result<String> {
    let zero = v.float(0.0, element).ok_or_else(|| v.error(format!("{like} is no floating-point tensor")))?;
    let dims: Option<Vec<i64>> = shapes.dims(like).and_then(|d| d.iter().map(super::super::vjp::known).collect());
    Ok(v.expand(zero, dims.map_or_else(|| v.shape(like), |d| v.ints(&d))))
}
