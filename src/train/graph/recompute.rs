//! Activations computed again on the way back instead of kept from the way there (Chen et al. 2016, "Training deep nets
//! with sublinear memory cost"): every so many blocks one value is kept, and what lies between is made a second time
//! when its gradients are due.
//!
//! A block ends where a single value that depends on the parameters goes on. The second computation must not begin early
//! and must not be taken for the first by an engine that looks for equal nodes: what it starts from is a view of the
//! kept value, whose shape takes in the number of elements of an adjoint that has to be there first.
//!
//! A node with subgraphs (a branch, a loop) is one node here: it reads what they take from outside, too, and is made
//! again as a whole.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::autodiff::inputs;
use crate::onnx::shape::Shapes;
use crate::onnx::{DataType, ModelProto, Names, NodeProto, node};
use crate::{Error, Result};

/// Rewrites the gradient graph `model` of the output `loss` by `parameters`. Returns how many segments are computed
/// twice.
///
/// # Errors
/// A model without a graph.
pub(in crate::train) fn recompute(model: &mut ModelProto, loss: &str, parameters: &[String]) -> Result<usize> {
    let shapes = Shapes::infer(model, &BTreeMap::new());
    let mut names = Names::of(model);
    let graph = model.graph.as_mut().ok_or_else(|| Error::model("the model holds no graph"))?;
    let Some(end) = graph.node.iter().position(|n| n.output.iter().any(|y| y == loss)) else { return Ok(0) };
    let (forward, backward) = graph.node.split_at(end + 1);
    let reads: Vec<Vec<String>> = graph.node.iter().map(inputs).collect();
    let (forward_reads, backward_reads) = reads.split_at(end + 1);
    let constants: HashSet<&str> =
        graph.initializer.iter().map(|t| t.name()).chain(parameters.iter().map(String::as_str)).collect();
    let data: HashSet<&str> = graph.input.iter().map(|i| i.name()).filter(|name| !constants.contains(name)).collect();
    let by_data = depending(forward, forward_reads, &data);
    let trained = depending(forward, forward_reads, &parameters.iter().map(String::as_str).collect());
    let is_float = |name: &str| {
        use DataType::*;
        matches!(shapes.element(name), Some(Float | Double | Float16 | Bfloat16))
    };

    let ends = ends(forward, forward_reads, |name| trained.contains(name) && is_float(name));
    let mut inserted: BTreeMap<usize, Vec<NodeProto>> = BTreeMap::new();
    let mut renamed: Vec<HashMap<String, String>> = vec![HashMap::new(); backward.len()];
    let mut segments = 0;
    let mut start = 0;
    for end in ends {
        let (segment, segment_reads) = (&forward[start..=end], &forward_reads[start..=end]);
        start = end + 1;
        let later: HashSet<&str> = forward_reads[start..].iter().flatten().map(String::as_str).collect();
        // What can be made again: numbers that depend on the data, which nothing after the segment reads. A node's other
        // outputs (indices, a loop's turns) are small and stay.
        let again = |node: &NodeProto| {
            let fits = |y: &String| by_data.contains(y.as_str()) && !later.contains(y.as_str());
            let mut floats = node.output.iter().filter(|y| is_float(y)).peekable();
            !is_random(node) && floats.peek().is_some() && floats.all(fits)
        };
        let nodes_again = segment.iter().filter(|n| again(n));
        let made: HashSet<&str> =
            nodes_again.flat_map(|n| &n.output).map(String::as_str).filter(|y| is_float(y)).collect();
        let mut wanted: HashSet<&str> = HashSet::new();
        let mut first = None;
        for (at, read) in backward_reads.iter().enumerate() {
            for x in read.iter().map(String::as_str).filter(|x| made.contains(x)) {
                first.get_or_insert(at);
                wanted.insert(x);
            }
        }
        let Some(first) = first else { continue };
        let gate = backward[..first].iter().rev().flat_map(|n| &n.output).find(|y| is_float(y));
        let Some(gate) = gate else { continue };
        let mut chosen: Vec<(&NodeProto, &[String])> = Vec::new();
        for (node, read) in segment.iter().zip(segment_reads).rev().filter(|(n, _)| again(n)) {
            if node.output.iter().any(|y| wanted.contains(y.as_str())) {
                wanted.extend(read.iter().map(String::as_str).filter(|x| made.contains(x)));
                chosen.push((node, read.as_slice()));
            }
        }
        chosen.reverse();

        let nodes = inserted.entry(first).or_default();
        let sizes: Vec<String> = ["size", "none"].iter().map(|kind| names.fresh(&format!("{gate}.{kind}"))).collect();
        nodes.push(node("Size", &[gate], &[&sizes[0]]));
        nodes.push(node("Sub", &[&sizes[0], &sizes[0]], &[&sizes[1]]));
        let mut values: HashMap<String, String> = HashMap::new();
        for (original, read) in chosen {
            let mut copy = original.clone();
            copy.name = Some(names.fresh(&format!("{}.again", original.name())));
            for x in read.iter().filter(|x| !x.is_empty() && !constants.contains(x.as_str())) {
                if !values.contains_key(x.as_str())
                    && (data.contains(x.as_str()) || (by_data.contains(x.as_str()) && is_float(x)))
                {
                    let parts = ["shape", "late", "view"].map(|kind| names.fresh(&format!("{x}.{kind}")));
                    nodes.push(node("Shape", &[x], &[&parts[0]]));
                    nodes.push(node("Add", &[&parts[0], &sizes[1]], &[&parts[1]]));
                    nodes.push(node("Reshape", &[x, &parts[1]], &[&parts[2]]));
                    values.insert(x.clone(), parts[2].clone());
                }
            }
            read_from(&mut copy, &values);
            for y in copy.output.iter_mut().filter(|y| !y.is_empty()) {
                let fresh = names.fresh(&format!("{y}.again"));
                let original = std::mem::replace(y, fresh.clone());
                if is_float(&original) {
                    values.insert(original, fresh);
                }
            }
            nodes.push(copy);
        }
        for (read, renamed) in backward_reads.iter().zip(&mut renamed) {
            for x in read.iter().filter(|x| made.contains(x.as_str())) {
                if let Some(value) = values.get(x) {
                    renamed.insert(x.clone(), value.clone());
                }
            }
        }
        segments += 1;
    }

    let mut nodes = forward.to_vec();
    for (at, reader) in backward.iter().enumerate() {
        nodes.extend(inserted.remove(&at).unwrap_or_default());
        let mut reader = reader.clone();
        read_from(&mut reader, &renamed[at]);
        nodes.push(reader);
    }
    graph.node = nodes;
    Ok(segments)
}

/// Whether `node`, or one in its subgraphs, draws numbers: others the second time.
fn is_random(node: &NodeProto) -> bool {
    let draws = match node.op_type() {
        "Bernoulli" | "Multinomial" => true,
        // Outside of training it passes on what comes.
        "Dropout" => node.input_at(2).is_some(),
        op => op.starts_with("Random"),
    };
    draws || node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)).flat_map(|g| &g.node).any(is_random)
}

/// Has `node` and its subgraphs read the values of `renamed` under their new names.
fn read_from(node: &mut NodeProto, renamed: &HashMap<String, String>) {
    let rename = |name: &mut String, names: &HashMap<String, String>| {
        if let Some(new) = names.get(name.as_str()) {
            name.clone_from(new);
        }
    };
    node.input.iter_mut().for_each(|x| rename(x, renamed));
    for graph in node.attribute.iter_mut().flat_map(|a| a.g.iter_mut().chain(&mut a.graphs)) {
        // What a graph has by itself hides what is outside.
        let own = graph.input.iter().map(|i| i.name()).chain(graph.initializer.iter().map(|t| t.name()));
        let own: HashSet<&str> = own.chain(graph.node.iter().flat_map(|n| &n.output).map(String::as_str)).collect();
        let outer = renamed.iter().filter(|(name, _)| !own.contains(name.as_str()));
        let outer: HashMap<String, String> = outer.map(|(name, new)| (name.clone(), new.clone())).collect();
        graph.node.iter_mut().for_each(|node| read_from(node, &outer));
        graph.output.iter_mut().filter_map(|o| o.name.as_mut()).for_each(|name| rename(name, &outer));
    }
}

/// Values of `nodes` that depend on `sources`; `reads`: what each of them reads.
fn depending<'a>(nodes: &'a [NodeProto], reads: &[Vec<String>], sources: &HashSet<&'a str>) -> HashSet<&'a str> {
    let mut found = HashSet::new();
    for (node, read) in nodes.iter().zip(reads) {
        if read.iter().any(|x| found.contains(x.as_str()) || sources.contains(x.as_str())) {
            found.extend(node.output.iter().map(String::as_str));
        }
    }
    found
}

/// The last node of each segment but the last: where a single value that counts goes on, as many of these places as the
/// root of their number, evenly spread.
fn ends(nodes: &[NodeProto], reads: &[Vec<String>], counts: impl Fn(&str) -> bool) -> Vec<usize> {
    let mut last: HashMap<&str, usize> = HashMap::new();
    for (at, read) in reads.iter().enumerate() {
        last.extend(read.iter().map(|x| (x.as_str(), at)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autodiff::{Request, Seed, gradient};
    use crate::engine::{self, Device, EngineKind, LoadOptions};
    use crate::onnx::proto::OperatorSetIdProto;
    use crate::onnx::{AttributeProto, GraphProto, Tensor, value_info};

    const PARAMETERS: [&str; 3] = ["p", "q", "s"];

    fn with(mut node: NodeProto, attributes: Vec<AttributeProto>) -> NodeProto {
        node.attribute = attributes;
        node
    }

    /// x → If(c) { tanh(x·p) } else { x·q } → tanh(·p) → three turns of v + tanh(v·q) → tanh(·s) → tanh(·s) → the mean of
    /// its squares.
    fn model() -> ModelProto {
        let float = |name: &str| value_info(name, DataType::Float, &["n", "4"]);
        let graph = |nodes: Vec<NodeProto>, output| GraphProto {
            name: Some("branch".into()),
            node: nodes,
            output: vec![float(output)],
            ..Default::default()
        };
        let yes = graph(vec![node("MatMul", &["x", "p"], &["yes.m"]), node("Tanh", &["yes.m"], &["yes"])], "yes");
        let no = graph(vec![node("MatMul", &["x", "q"], &["no"])], "no");
        let turn = vec![
            node("Identity", &["going"], &["goes"]),
            node("MatMul", &["v", "q"], &["v.m"]),
            node("Tanh", &["v.m"], &["v.t"]),
            node("Add", &["v", "v.t"], &["v.next"]),
        ];
        let scalar = |name: &str, data_type| value_info(name, data_type, &[]);
        let body = GraphProto {
            input: vec![scalar("turn", DataType::Int64), scalar("going", DataType::Bool), float("v")],
            output: vec![scalar("goes", DataType::Bool), float("v.next")],
            ..graph(turn, "v.next")
        };
        let branches = vec![AttributeProto::graph("then_branch", yes), AttributeProto::graph("else_branch", no)];
        let node = vec![
            with(node("If", &["c"], &["a"]), branches),
            node("MatMul", &["a", "p"], &["a.m"]),
            node("Tanh", &["a.m"], &["b"]),
            with(node("Loop", &["turns", "", "b"], &["d"]), vec![AttributeProto::graph("body", body)]),
            node("MatMul", &["d", "s"], &["d.m"]),
            node("Tanh", &["d.m"], &["e"]),
            node("MatMul", &["e", "s"], &["e.m"]),
            node("Tanh", &["e.m"], &["f"]),
            node("Mul", &["f", "f"], &["g"]),
            with(node("ReduceMean", &["g"], &["loss"]), vec![AttributeProto::int("keepdims", 0)]),
        ];
        let parameters = PARAMETERS.map(|p| value_info(p, DataType::Float, &["4", "4"]));
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
            graph: Some(GraphProto {
                name: Some("g".into()),
                node,
                input: [float("x"), scalar("c", DataType::Bool)].into_iter().chain(parameters).collect(),
                output: vec![scalar("loss", DataType::Float)],
                initializer: vec![Tensor::scalar(3i64).to_proto("turns")],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn branches_and_loops_are_made_again_as_a_whole() {
        let parameters = PARAMETERS.map(String::from).to_vec();
        let request =
            Request { of: vec![("loss".into(), Seed::One)], wrt: parameters.clone(), input_dims: BTreeMap::new() };
        let gradient = gradient(&model(), &request).unwrap();
        let mut again = gradient.model.clone();
        assert!(recompute(&mut again, "loss", &parameters).unwrap() >= 2);
        let count = |model: &ModelProto, op| model.graph.iter().flat_map(|g| &g.node).filter(|n| n.is(op)).count();
        for op in ["If", "Loop"] {
            assert_eq!(count(&again, op), count(&gradient.model, op) + 1, "{op}");
        }

        let engine = engine::open(EngineKind::OnnxRuntime, Device::Cpu).unwrap();
        let numbers = |dims: &[usize], by: usize| {
            let len = dims.iter().product::<usize>();
            Tensor::new(dims, (0..len).map(|i| ((i * by % 17) as f32 - 8.0) / 12.0).collect())
        };
        let values = [numbers(&[5, 4], 7), numbers(&[4, 4], 5), numbers(&[4, 4], 3), numbers(&[4, 4], 11)];
        for taken in [true, false] {
            let condition = Tensor::from_bytes(DataType::Bool, &[], &[u8::from(taken)]).unwrap();
            let names = ["x", "p", "q", "s"];
            let given = names.into_iter().zip(&values).chain([("c", &condition)]).collect::<Vec<_>>();
            let wanted: Vec<&str> = gradient.gradients.iter().map(String::as_str).collect();
            let [plain, again] = [&gradient.model, &again].map(|model| {
                let mut session = engine.load(model, &LoadOptions { threads: Some(1), optimize: true }).unwrap();
                session.run(&given, &wanted).unwrap()
            });
            for (plain, again) in plain.iter().zip(&again) {
                let pairs = || plain.to_f64().into_iter().zip(again.to_f64());
                assert!(pairs().all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs().max(1e-3)), "{plain:?} {again:?}");
            }
            assert!(plain[0].to_f64().iter().any(|g| g.abs() > 1e-4), "{plain:?}");
        }
    }
}
