//! The walk: which nodes lie on a way from the parameters to the result, what stands in the way, and the adjoints in
//! reverse order. The same walk serves the main graph and, through the rules of `If`, `Scan` and `Loop`, what is in them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::emit::Emitter;
use super::left_out::left_out;
use super::rules::{Rule, Rules};
use super::vjp::{Constants, Vjp, describe, is_float};
use crate::onnx::shape::Shapes;
use crate::onnx::{GraphProto, NodeProto, Tensor, TensorProto};
use crate::{Error, Result};

/// A graph to differentiate and what is known of its values.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub nodes: &'a [NodeProto],
    pub shapes: &'a Shapes,
    pub constants: &'a Constants,
    pub rules: &'a Rules,
    pub opset: i64,
}

/// What lies between parameters and result.
#[derive(Debug, Default)]
pub(super) struct Path {
    /// Nodes on the way, in the graph's order, each with its inputs (captured outer values included).
    nodes: Vec<(usize, Vec<String>)>,
    /// Values that depend on a parameter.
    active: HashSet<String>,
    /// Operators on the way that cannot be passed: (operator, why) to the nodes.
    pub obstacles: BTreeMap<(String, String), Vec<String>>,
    /// Parameters whose way leads through an obstacle.
    pub blocked: BTreeSet<String>,
}

/// Inputs of `node`, then the outer values that its subgraphs use, each once.
pub(crate) fn inputs(node: &NodeProto) -> Vec<String> {
    let mut inputs = node.input.clone();
    for graph in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
        for name in captures(graph) {
            if !inputs.contains(&name) {
                inputs.push(name);
            }
        }
    }
    inputs
}

/// Values of enclosing graphs that `graph` uses, in order of first use.
pub(super) fn captures(graph: &GraphProto) -> Vec<String> {
    let mut own: HashSet<&str> = graph.input.iter().map(|v| v.name()).collect();
    own.extend(graph.initializer.iter().map(|t| t.name()));
    own.extend(graph.sparse_initializer.iter().filter_map(|t| t.values.as_ref()).map(|t| t.name()));
    own.extend(graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str)));
    let mut seen = HashSet::new();
    let used = graph.node.iter().flat_map(inputs).chain(graph.output.iter().map(|v| v.name().to_string()));
    used.filter(|name| !name.is_empty() && !own.contains(name.as_str()) && seen.insert(name.clone())).collect()
}

/// Adds the small constants of `graph` (not those in `open`, which may change between runs).
pub(super) fn add_constants(constants: &mut Constants, graph: &GraphProto, open: &HashSet<&str>) {
    const SMALL: i64 = 4096;
    let small = |t: &&TensorProto| {
        t.dims.iter().try_fold(1i64, |n, d| n.checked_mul(*d)).is_some_and(|n| n <= SMALL) && t.external_data.is_empty()
    };
    for tensor in graph.initializer.iter().filter(small).filter(|t| !open.contains(t.name())) {
        if let Ok(value) = Tensor::from_proto(tensor) {
            constants.insert(tensor.name().to_string(), value);
        }
    }
    for node in graph.node.iter().filter(|n| n.is("Constant")) {
        let (Some(output), Some(attribute)) = (node.output_at(0), node.attribute.first()) else { continue };
        let value = match attribute.name() {
            "value" => attribute.t.as_ref().filter(small).and_then(|t| Tensor::from_proto(t).ok()),
            "value_int" => attribute.i.map(Tensor::scalar),
            "value_float" => attribute.f.map(Tensor::scalar),
            "value_ints" => Some(Tensor::new(&[attribute.ints.len()], attribute.ints.clone())),
            "value_floats" => Some(Tensor::new(&[attribute.floats.len()], attribute.floats.clone())),
            _ => None,
        };
        constants.extend(value.map(|value| (output.to_string(), value)));
    }
}

/// Whether `value` can carry a gradient as far as its element type is known.
fn differentiable(scope: Scope, value: &str) -> bool {
    scope.shapes.element(value).is_none_or(|element| scope.rules.carries(element))
}

/// The outputs of a node with a rule that move with its inputs: the scale and zero point of a dynamic quantiser, where
/// it is passed straight through, count as constants.
fn moving(node: &NodeProto) -> &[String] {
    let all = node.output.len();
    &node.output[..if node.is("DynamicQuantizeLinear") { all.min(1) } else { all }]
}

/// Casts to anything but floating point end the way, whatever is known of shapes.
fn casts_to_integer(node: &NodeProto) -> bool {
    node.is("Cast")
        && crate::onnx::DataType::try_from(node.attr_i("to", 1) as i32).is_ok_and(|element| !is_float(element))
}

impl Path {
    /// Number of nodes on the way.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The nodes that `wrt` reaches, wherever they lead.
    fn find_active(scope: Scope, wrt: &[String]) -> Path {
        let mut path = Path { active: wrt.iter().cloned().collect(), ..Path::default() };
        for (i, node) in scope.nodes.iter().enumerate() {
            let inputs = inputs(node);
            let zero = matches!(scope.rules.get(node), Some(Rule::Zero(_))) || casts_to_integer(node);
            if zero || !inputs.iter().any(|x| path.active.contains(x)) {
                continue;
            }
            // What is refused counts as active whatever it gives: a way that it cuts must not pass for a zero.
            let open = !matches!(scope.rules.get(node), Some(Rule::Vjp(_)));
            let outputs = if open { &node.output } else { moving(node) };
            let outputs = outputs.iter().filter(|y| !y.is_empty() && (open || differentiable(scope, y)));
            path.active.extend(outputs.cloned());
            path.nodes.push((i, inputs));
        }
        path
    }

    /// The way from `wrt` to `of`.
    pub fn find(scope: Scope, of: &[String], wrt: &[String]) -> Result<Path> {
        let mut path = Path::find_active(scope, wrt);
        let way = std::mem::take(&mut path.nodes);
        let mut needed: HashSet<&str> = of.iter().map(String::as_str).filter(|v| path.active.contains(*v)).collect();
        let mut blocked: HashSet<&str> = HashSet::new();
        let mut on_way = vec![false; way.len()];
        for (k, (i, inputs)) in way.iter().enumerate().rev() {
            let node = &scope.nodes[*i];
            if !node.output.iter().any(|y| needed.contains(y.as_str())) {
                continue;
            }
            on_way[k] = true;
            let active = || inputs.iter().filter(|x| path.active.contains(*x));
            let obstacles = obstacles(scope, node, &active().cloned().collect::<Vec<_>>())?;
            if !obstacles.is_empty() || node.output.iter().any(|y| blocked.contains(y.as_str())) {
                blocked.extend(active().map(String::as_str));
            }
            for (key, nodes) in obstacles {
                path.obstacles.entry(key).or_default().extend(nodes);
            }
            needed.extend(active().map(String::as_str));
        }
        path.blocked = wrt.iter().filter(|w| blocked.contains(w.as_str())).cloned().collect();
        path.nodes = way.into_iter().zip(on_way).filter(|(_, on)| *on).map(|(entry, _)| entry).collect();
        path.obstacles.values_mut().for_each(|nodes| nodes.reverse());
        Ok(path)
    }

    /// Adjoints of `wrt` (`None`: nothing depends on it) from those of results. Rules that cannot do their node are
    /// all reported, not only the first.
    pub fn reverse(
        &self,
        scope: Scope,
        emitter: &Emitter,
        seeds: Vec<(String, String)>,
        wrt: &[String],
    ) -> Result<Vec<Option<String>>> {
        let mut parts: HashMap<String, Vec<String>> = HashMap::new();
        for (value, adjoint) in seeds {
            parts.entry(value).or_default().push(adjoint);
        }
        let mut failures: Vec<String> = Vec::new();
        let producers: HashMap<&str, &NodeProto> =
            scope.nodes.iter().flat_map(|n| n.output.iter().map(move |y| (y.as_str(), n))).collect();
        let left_out = left_out(scope.nodes);
        for (i, inputs) in self.nodes.iter().rev() {
            let node = &scope.nodes[*i];
            let stem = node.output_at(0).unwrap_or_else(|| node.op_type());
            let outer = emitter.set_stem(&format!("grad/{stem}"));
            let adjoints: Vec<Option<String>> =
                node.output.iter().map(|y| emitter.total(parts.remove(y).unwrap_or_default())).collect();
            if adjoints.iter().any(Option::is_some) {
                let wanted: Vec<bool> = inputs.iter().map(|x| self.active.contains(x)).collect();
                let vjp = Vjp {
                    node,
                    shapes: scope.shapes,
                    rules: scope.rules,
                    emitter,
                    constants: scope.constants,
                    producers: &producers,
                    left_out: &left_out,
                    inputs,
                    adjoints: &adjoints,
                    wanted: &wanted,
                };
                let result = match scope.rules.get(node) {
                    Some(Rule::Vjp(rule)) => rule(&vjp),
                    _ => Err(vjp.error("it has no derivative here")),
                };
                match result {
                    Ok(adjoints) => {
                        for ((x, adjoint), _) in inputs.iter().zip(adjoints).zip(&wanted).filter(|(_, wanted)| **wanted)
                        {
                            parts.entry(x.clone()).or_default().extend(adjoint);
                        }
                    }
                    Err(failure) => failures.push(failure.to_string()),
                }
            }
            emitter.set_stem(&outer);
        }
        if !failures.is_empty() {
            failures.sort();
            failures.dedup();
            return Err(Error::model(failures.join("\n")));
        }
        let outer = emitter.set_stem("grad");
        let adjoints = wrt.iter().map(|w| emitter.total(parts.remove(w).unwrap_or_default())).collect();
        emitter.set_stem(&outer);
        Ok(adjoints)
    }
}

/// What keeps `node` from being passed: its own lack of a rule, or that of nodes in its subgraphs.
fn obstacles(scope: Scope, node: &NodeProto, active: &[String]) -> Result<BTreeMap<(String, String), Vec<String>>> {
    let mut found = BTreeMap::new();
    match scope.rules.get(node) {
        Some(Rule::Vjp(_)) => {
            for graph in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
                let outputs: Vec<String> = graph.output.iter().map(|v| v.name().to_string()).collect();
                let shapes = scope.shapes.inside(node, graph, scope.opset);
                let inner = Scope { nodes: &graph.node, shapes: &shapes, ..scope };
                let active = &active_inside(inner, node, graph, active);
                for (key, nodes) in Path::find(inner, &outputs, active)?.obstacles {
                    found.entry(key).or_insert_with(Vec::new).extend(nodes.into_iter().rev());
                }
            }
        }
        refused => {
            let why = match refused {
                Some(Rule::Refused(why)) => *why,
                _ => "there is no rule for it",
            };
            let op = describe(node);
            let op = op.split(" node ").next().unwrap_or_default().to_string();
            let name = node.output.first().filter(|_| node.name().is_empty()).map_or(node.name(), String::as_str);
            found.insert((op, why.to_string()), vec![name.to_string()]);
        }
    }
    Ok(found)
}

/// What is active inside `graph`, a subgraph of `node`, where `active` is among `node`'s inputs and captures: these,
/// the body inputs that stand for them, and the states that depend on them after some step.
pub(super) fn active_inside(scope: Scope, node: &NodeProto, graph: &GraphProto, active: &[String]) -> Vec<String> {
    let mut inside: Vec<String> = captures(graph).into_iter().filter(|name| active.contains(name)).collect();
    let differentiable = |name: &str| differentiable(scope, name);
    for (x, inner) in node.input.iter().zip(&graph.input) {
        if active.contains(x) && differentiable(inner.name()) {
            inside.push(inner.name().to_string());
        }
    }
    let outputs: Vec<String> = graph.output.iter().map(|v| v.name().to_string()).collect();
    loop {
        let path = Path::find_active(scope, &inside);
        let before = inside.len();
        for (y, inner) in outputs.iter().skip(usize::from(node.is("Loop"))).zip(states(node, graph)) {
            if path.active.contains(y) && differentiable(inner) && !inside.iter().any(|name| name == inner) {
                inside.push(inner.to_string());
            }
        }
        if inside.len() == before {
            return inside;
        }
    }
}

/// Names inside the body `graph` of what `node`, a Scan or Loop, carries from step to step.
pub(super) fn states<'a>(node: &NodeProto, graph: &'a GraphProto) -> Vec<&'a str> {
    let (first, scanned) = match node.op_type() {
        "Loop" => (2, 0),
        "Scan" => (0, node.attr_i("num_scan_inputs", 0).max(0) as usize),
        _ => return vec![],
    };
    let end = graph.input.len().saturating_sub(scanned);
    graph.input.iter().take(end).skip(first).map(|i| i.name()).collect()
}
