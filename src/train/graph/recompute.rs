//! Activations computed again on the way back instead of kept from the way there (Chen et al. 2016, "Training deep nets
//! with sublinear memory cost"): every so many blocks one value is kept, and what lies between is made a second time
//! when its gradients are due.
//!
//! A block ends where a single value that depends on the parameters goes on. The second computation must not begin early
//! and must not be taken for the first by an engine that looks for equal nodes: what it starts from is a view of the
//! kept value, whose shape takes in the number of elements of an adjoint that has to be there first.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::onnx::shape::Shapes;
use crate::onnx::{DataType, ModelProto, Names, NodeProto, node};
use crate::{Error, Result};

/// Rewrites the gradient graph `model` of the output `loss` by `parameters`. Returns how many segments are computed
/// twice.
///
/// # Errors
/// A graph with subgraphs, which see values by their names.
pub(in crate::train) fn recompute(model: &mut ModelProto, loss: &str, parameters: &[String]) -> Result<usize> {
    let shapes = Shapes::infer(model, &BTreeMap::new());
    let mut names = Names::of(model);
    let graph = model.graph.as_mut().ok_or_else(|| Error::model("the model holds no graph"))?;
    if let Some(node) = graph.node.iter().find(|n| n.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty())) {
        return Err(Error::config(format!(
            "--recompute: node {} ({}) has subgraphs, whose values cannot be computed twice; leave the flag out",
            node.name(),
            node.op_type()
        )));
    }
    let Some(end) = graph.node.iter().position(|n| n.output.iter().any(|y| y == loss)) else { return Ok(0) };
    let (forward, backward) = graph.node.split_at(end + 1);
    let constants: HashSet<&str> =
        graph.initializer.iter().map(|t| t.name()).chain(parameters.iter().map(String::as_str)).collect();
    let data: HashSet<&str> = graph.input.iter().map(|i| i.name()).filter(|name| !constants.contains(name)).collect();
    let by_data = depending(forward, &data);
    let trained = depending(forward, &parameters.iter().map(String::as_str).collect());
    let is_float = |name: &str| {
        use DataType::*;
        matches!(shapes.element(name), Some(Float | Double | Float16 | Bfloat16))
    };

    let ends = ends(forward, |name| trained.contains(name) && is_float(name));
    let mut inserted: BTreeMap<usize, Vec<NodeProto>> = BTreeMap::new();
    let mut renamed: HashMap<(usize, String), String> = HashMap::new();
    let mut segments = 0;
    let mut start = 0;
    for end in ends {
        let segment = &forward[start..=end];
        start = end + 1;
        let later: HashSet<&str> = forward[start..].iter().flat_map(|n| &n.input).map(String::as_str).collect();
        // What can be made again: numbers that depend on the data, which nothing after the segment reads.
        let again = |node: &NodeProto| {
            !node.op_type().starts_with("Random")
                && node
                    .output
                    .iter()
                    .all(|y| is_float(y) && by_data.contains(y.as_str()) && !later.contains(y.as_str()))
        };
        let mut wanted: HashSet<&str> = HashSet::new();
        let mut first = None;
        for (at, reader) in backward.iter().enumerate() {
            for x in segment.iter().filter(|n| again(n)).flat_map(|n| &n.output).filter(|y| reader.input.contains(y)) {
                first.get_or_insert(at);
                wanted.insert(x);
            }
        }
        let Some(first) = first else { continue };
        let gate = backward[..first].iter().rev().flat_map(|n| &n.output).find(|y| is_float(y));
        let Some(gate) = gate else { continue };
        let made: HashSet<&str> =
            segment.iter().filter(|n| again(n)).flat_map(|n| &n.output).map(String::as_str).collect();
        let mut chosen: Vec<&NodeProto> = Vec::new();
        for node in segment.iter().rev().filter(|n| again(n)) {
            if node.output.iter().any(|y| wanted.contains(y.as_str())) {
                wanted.extend(node.input.iter().map(String::as_str).filter(|x| made.contains(x)));
                chosen.push(node);
            }
        }
        chosen.reverse();

        let nodes = inserted.entry(first).or_default();
        let sizes: Vec<String> = ["size", "none"].iter().map(|kind| names.fresh(&format!("{gate}.{kind}"))).collect();
        nodes.push(node("Size", &[gate], &[&sizes[0]]));
        nodes.push(node("Sub", &[&sizes[0], &sizes[0]], &[&sizes[1]]));
        let mut values: HashMap<String, String> = HashMap::new();
        for original in chosen {
            let mut copy = original.clone();
            copy.name = Some(names.fresh(&format!("{}.again", original.name())));
            for x in copy.input.iter_mut().filter(|x| !x.is_empty() && !constants.contains(x.as_str())) {
                if !values.contains_key(x.as_str())
                    && (data.contains(x.as_str()) || (by_data.contains(x.as_str()) && is_float(x)))
                {
                    let parts = ["shape", "late", "view"].map(|kind| names.fresh(&format!("{x}.{kind}")));
                    nodes.push(node("Shape", &[x], &[&parts[0]]));
                    nodes.push(node("Add", &[&parts[0], &sizes[1]], &[&parts[1]]));
                    nodes.push(node("Reshape", &[x, &parts[1]], &[&parts[2]]));
                    values.insert(x.clone(), parts[2].clone());
                }
                if let Some(value) = values.get(x.as_str()) {
                    x.clone_from(value);
                }
            }
            for y in copy.output.iter_mut().filter(|y| !y.is_empty()) {
                let fresh = names.fresh(&format!("{y}.again"));
                values.insert(std::mem::replace(y, fresh.clone()), fresh);
            }
            nodes.push(copy);
        }
        for (at, reader) in backward.iter().enumerate() {
            for x in reader.input.iter().filter(|x| made.contains(x.as_str())) {
                if let Some(value) = values.get(x) {
                    renamed.insert((at, x.clone()), value.clone());
                }
            }
        }
        segments += 1;
    }

    let mut nodes = forward.to_vec();
    for (at, reader) in backward.iter().enumerate() {
        nodes.extend(inserted.remove(&at).unwrap_or_default());
        let mut reader = reader.clone();
        for x in &mut reader.input {
            if let Some(value) = renamed.get(&(at, x.clone())) {
                x.clone_from(value);
            }
        }
        nodes.push(reader);
    }
    graph.node = nodes;
    Ok(segments)
}

/// Values of `nodes` that depend on `sources`.
fn depending<'a>(nodes: &'a [NodeProto], sources: &HashSet<&'a str>) -> HashSet<&'a str> {
    let mut found = HashSet::new();
    for node in nodes {
        if node.input.iter().any(|x| found.contains(x.as_str()) || sources.contains(x.as_str())) {
            found.extend(node.output.iter().map(String::as_str));
        }
    }
    found
}

/// The last node of each segment but the last: where a single value that counts goes on, as many of these places as the
/// root of their number, evenly spread.
fn ends(nodes: &[NodeProto], counts: impl Fn(&str) -> bool) -> Vec<usize> {
    let mut last: HashMap<&str, usize> = HashMap::new();
    for (at, node) in nodes.iter().enumerate() {
        last.extend(node.input.iter().map(|x| (x.as_str(), at)));
    }
    let mut going_on: HashSet<&str> = HashSet::new();
    let (mut places, mut single) = (Vec::new(), String::new());
    for (at, node) in nodes.iter().enumerate() {
        going_on.retain(|x| last[x] > at);
        going_on.extend(
            node.output.iter().map(String::as_str).filter(|y| counts(y) && last.get(y).is_some_and(|l| *l > at)),
        );
        let mut values = going_on.iter();
        if let (Some(only), None) = (values.next(), values.next())
            && **only != single
        {
            single = (*only).into();
            places.push(at);
        }
    }
    let step = (places.len() as f64).sqrt().ceil().max(1.0) as usize;
    places.into_iter().skip(step - 1).step_by(step).collect()
}
