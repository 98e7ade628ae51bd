//! Lifts a model to a newer operator set in memory (for training; never in a merged file).
//!
//! Most operators only gained types and defaults between versions; those whose spelling or meaning changed are in
//! `RULES`, after the changelog of the specification (`docs/Changelog.md`) and its version converter.

use std::collections::{BTreeMap, HashSet};

use half::{bf16, f16};
use ndarray::Array1;

use super::proto::OperatorSetIdProto;
use super::proto::type_proto::Value;
use super::shape::{Dim, Shapes};
use super::{
    AttributeProto, DataType, GraphProto, ModelProto, Names, NodeProto, Tensor, ValueInfoProto, node, walk_graphs,
};
use crate::{Error, Result};

/// The oldest operator set that can be lifted: before it, elementwise operators broadcast by attributes.
const OLDEST: i64 = 7;
/// What training needs (LayerNormalization came with 17).
const LEAST_TARGET: i64 = 17;
/// The newest operator set that [`RULES`] lead to.
const NEWEST: i64 = 18;
/// The file format version that goes with operator set 17 (`docs/Versioning.md`).
const IR_VERSION: i64 = 8;
/// From this file format version on, initializers need not be inputs as well.
const IR_FREE_INITIALIZERS: i64 = 4;

/// Rewrites the nodes of the default domain, in all subgraphs, for operator set `target` (at least 17, which the
/// gradient graph needs). A model that is as new or newer stays as it is. New constants are initializers with names of their own.
///
/// # Errors
/// [`Error::Config`] for a target above 18; [`Error::Model`] for a model older than operator set 7, or with a node
/// that the newer set cannot express (the message names it).
pub fn upgrade(model: &mut ModelProto, target: i64) -> Result<()> {
    let (from, target) = (model.opset(), target.max(LEAST_TARGET));
    // Without the default domain there is nothing to lift.
    if from == 0 || from >= target {
        return Ok(());
    }
    if target > NEWEST {
        return Err(Error::config(format!(
            "cannot lift a model to operator set {target}; {NEWEST} is the newest known"
        )));
    }
    if from < OLDEST {
        return Err(Error::model(format!(
            "the model uses operator set {from}; the oldest that can be lifted to {target} is {OLDEST}. Export it anew, \
             or convert it with onnx.version_converter"
        )));
    }
    let shapes = Shapes::infer(model, &BTreeMap::new());
    let mut names = Names::of(model);
    let Some(graph) = &mut model.graph else { return Ok(()) };
    let mut used = HashSet::new();
    walk_graphs(graph, &mut |_, graph| {
        used.extend(graph.node.iter().flat_map(|n| &n.input).cloned());
        used.extend(graph.output.iter().map(|o| o.name().to_string()));
    });
    if model.ir_version.unwrap_or(0) < IR_FREE_INITIALIZERS {
        // There every initializer had to be an input, and was a constant all the same.
        let constants: HashSet<String> = graph.initializer.iter().map(|t| t.name().to_string()).collect();
        graph.input.retain(|input| !constants.contains(input.name()));
    }
    lift_graph(graph, &shapes, &mut Versions { from, target, names: &mut names, used: &used })?;
    model.ir_version = Some(model.ir_version.unwrap_or(0).max(IR_VERSION));
    model.opset_import.retain(|o| !matches!(o.domain(), "" | "ai.onnx"));
    model.opset_import.insert(0, OperatorSetIdProto { domain: Some(String::new()), version: Some(target) });
    Ok(())
}

struct Versions<'a> {
    from: i64,
    target: i64,
    names: &'a mut Names,
    /// Values that some node or graph reads.
    used: &'a HashSet<String>,
}

fn lift_graph(graph: &mut GraphProto, shapes: &Shapes, versions: &mut Versions) -> Result<()> {
    let mut lifted = Vec::with_capacity(graph.node.len());
    for mut node in std::mem::take(&mut graph.node) {
        for attribute in &mut node.attribute {
            for inner in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                let shapes = shapes.subgraph(inner, versions.from);
                lift_graph(inner, &shapes, versions)?;
            }
        }
        let mut nodes = vec![node];
        for (since, ops, rewrite) in RULES {
            if versions.from >= *since || versions.target < *since {
                continue;
            }
            for node in std::mem::take(&mut nodes) {
                if !ops.iter().any(|op| node.is(op)) {
                    nodes.push(node);
                    continue;
                }
                let mut lift = Lift { graph, shapes, names: versions.names, used: versions.used, nodes: &mut nodes };
                rewrite(&mut lift, node)?;
            }
        }
        lifted.extend(nodes);
    }
    graph.node = lifted;
    Ok(())
}

/// Where the rewritten node's new constants and nodes go.
struct Lift<'a> {
    graph: &'a mut GraphProto,
    shapes: &'a Shapes,
    names: &'a mut Names,
    used: &'a HashSet<String>,
    nodes: &'a mut Vec<NodeProto>,
}

/// Pushes what replaces the node.
type Rewrite = fn(&mut Lift, NodeProto) -> Result<()>;

/// Version of the operator set that changed the operators, ascending.
const RULES: &[(i64, &[&str], Rewrite)] = &[
    (9, &["BatchNormalization"], batch_normalization_spatial),
    (9, &["Scan"], scan),
    (9, &["Upsample"], upsample_scales),
    (10, &["Upsample"], upsample),
    (10, &["Slice"], slice),
    (10, &["TopK"], top_k),
    (11, &["Resize"], resize),
    (11, &["Clip"], clip),
    (11, &["Pad"], pad),
    (11, &["Scatter"], scatter),
    (12, &["Dropout"], dropout),
    (13, &["Squeeze", "Unsqueeze", "ReduceSum"], axes),
    (13, &["Split"], split),
    (13, &["Softmax", "LogSoftmax", "Hardmax"], softmax),
    (14, &["BatchNormalization"], batch_normalization_training),
    (16, &["RoiAlign"], roi_align),
    (
        18,
        &[
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ],
        axes,
    ),
    (18, &["Split"], split_count),
];

impl Lift<'_> {
    fn fresh(&mut self, node: &NodeProto, what: &str) -> String {
        let of = node.output_at(0).unwrap_or(node.op_type());
        self.names.fresh(&format!("{of}.{what}"))
    }

    /// A new initializer; gives its name.
    fn constant(&mut self, node: &NodeProto, what: &str, value: impl Into<Tensor>) -> String {
        let name = self.fresh(node, what);
        self.graph.initializer.push(value.into().to_proto(&name));
        name
    }

    /// The elements of a float constant, be it the model's or one of ours; empty where it is none.
    fn floats(&self, name: &str) -> Vec<f64> {
        let ours = || self.graph.initializer.iter().find(|t| t.name() == name).and_then(|t| Tensor::from_proto(t).ok());
        match self.shapes.floats(name) {
            Some(values) => values.to_vec(),
            None => ours().map(|t| t.to_f64()).unwrap_or_default(),
        }
    }

    /// Moves the list attribute `name`, where it is given, to input `i` as an int64 list.
    fn ints_to_input(&mut self, node: &mut NodeProto, name: &str, i: usize) {
        if let Some(attribute) = take(node, name)
            && !attribute.ints.is_empty()
        {
            let value = self.constant(node, name, Array1::from(attribute.ints).into_dyn());
            set_input(node, i, value);
        }
    }

    /// Moves the number attribute `name`, where it is given, to input `i` as a scalar of input 0's element type.
    fn float_to_input(&mut self, node: &mut NodeProto, name: &str, i: usize) {
        let Some(value) = take(node, name).and_then(|a| a.f) else { return };
        let value = match node.input_at(0).and_then(|x| self.shapes.element(x)) {
            Some(DataType::Float16) => Tensor::scalar(f16::from_f32(value)),
            Some(DataType::Bfloat16) => Tensor::scalar(bf16::from_f32(value)),
            Some(DataType::Double) => Tensor::scalar(f64::from(value)),
            _ => Tensor::scalar(value),
        };
        let value = self.constant(node, name, value);
        set_input(node, i, value);
    }
}

fn take(node: &mut NodeProto, name: &str) -> Option<AttributeProto> {
    let i = node.attribute.iter().position(|a| a.name() == name)?;
    Some(node.attribute.remove(i))
}

fn set(node: &mut NodeProto, attribute: AttributeProto) {
    take(node, attribute.name());
    node.attribute.push(attribute);
}

fn set_input(node: &mut NodeProto, i: usize, value: String) {
    if node.input.len() <= i {
        node.input.resize(i + 1, String::new());
    }
    node.input[i] = value;
}

fn cannot(node: &NodeProto, why: &str) -> Error {
    let of = node.output_at(0).unwrap_or_default();
    Error::model(format!("node {:?} ({}, which gives {of:?}) cannot be lifted: {why}", node.name(), node.op_type()))
}

fn batch_normalization_spatial(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if take(&mut node, "spatial").is_some_and(|a| a.i() == 0) {
        return Err(cannot(&node, "operator set 9 dropped spatial = 0 (one statistic per activation)"));
    }
    lift.nodes.push(node);
    Ok(())
}

/// Scan of set 8 ran over a batch: each state and input has the batch as its first axis. A Scan over the batch, without
/// states, now holds the Scan over the steps, which follow next.
fn scan(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if node.input.is_empty() {
        return Err(cannot(&node, "it lacks an input"));
    }
    if node.input_at(0).is_some() {
        return Err(cannot(&node, "operator set 9 dropped the sequence_lens of Scan"));
    }
    let Some(body) = take(&mut node, "body").and_then(|a| a.g) else { return Err(cannot(&node, "it has no body")) };
    let directions = take(&mut node, "directions");
    let mut names = |of: &[ValueInfoProto], what: &str| -> Vec<ValueInfoProto> {
        let own = |info: &ValueInfoProto| {
            let mut own = ValueInfoProto { name: Some(lift.fresh(&node, what)), ..info.clone() };
            if let Some(Value::TensorType(tensor)) = own.r#type.as_mut().and_then(|t| t.value.as_mut()) {
                tensor.shape = None;
            }
            own
        };
        of.iter().map(own).collect()
    };
    let (input, output) = (names(&body.input, "row"), names(&body.output, "row_result"));
    let called = |infos: &[ValueInfoProto]| infos.iter().map(|i| i.name().to_string()).collect();
    let mut steps = NodeProto { input: called(&input), output: called(&output), ..node.clone() };
    let count = input.len() as i64;
    steps.attribute.push(AttributeProto::graph("body", body));
    steps.attribute.extend(directions.map(|a| AttributeProto::ints("scan_input_directions", &a.ints)));
    let name = Some(lift.fresh(&node, "rows"));
    let rows = GraphProto { name, input, output, node: vec![steps], ..Default::default() };
    node.input.remove(0);
    node.attribute = vec![AttributeProto::graph("body", rows), AttributeProto::int("num_scan_inputs", count)];
    lift.nodes.push(node);
    Ok(())
}

fn upsample_scales(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if let Some(scales) = take(&mut node, "scales") {
        let scales = lift.constant(&node, "scales", Array1::from(scales.floats).into_dyn());
        set_input(&mut node, 1, scales);
    }
    lift.nodes.push(node);
    Ok(())
}

fn upsample(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    node.op_type = Some("Resize".into());
    lift.nodes.push(node);
    Ok(())
}

/// Resize (X, scales) of set 10 maps coordinates as `x / scale`. Which neighbour is nearest it left open; ONNX Runtime
/// takes the one below to enlarge and the one above to shrink (`upsamplebase.h`, `NearestMode::SIMPLE`).
fn resize(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if node.attr_s("mode").unwrap_or("nearest") == "nearest" {
        let scales = node.input_at(1).map(|name| lift.floats(name)).unwrap_or_default();
        let (shrinks, grows) = (scales.iter().any(|s| *s < 1.0), scales.iter().any(|s| *s > 1.0));
        if shrinks && grows {
            return Err(cannot(&node, "it shrinks some dimensions and enlarges others by the nearest element"));
        }
        set(&mut node, AttributeProto::string("nearest_mode", if shrinks { "ceil" } else { "floor" }));
    }
    // Input 1 is now the region of interest, which only one coordinate mode reads.
    node.input.insert(node.input.len().min(1), String::new());
    set(&mut node, AttributeProto::string("coordinate_transformation_mode", "asymmetric"));
    lift.nodes.push(node);
    Ok(())
}

fn slice(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    for (i, name) in ["starts", "ends", "axes"].into_iter().enumerate() {
        lift.ints_to_input(&mut node, name, i + 1);
    }
    lift.nodes.push(node);
    Ok(())
}

fn top_k(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if let Some(k) = take(&mut node, "k").and_then(|a| a.i) {
        let k = lift.constant(&node, "k", Array1::from(vec![k]).into_dyn());
        set_input(&mut node, 1, k);
    }
    lift.nodes.push(node);
    Ok(())
}

fn clip(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    lift.float_to_input(&mut node, "min", 1);
    lift.float_to_input(&mut node, "max", 2);
    lift.nodes.push(node);
    Ok(())
}

fn pad(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    lift.ints_to_input(&mut node, "pads", 1);
    if node.input_at(1).is_none_or(|p| p.is_empty()) {
        return Err(cannot(&node, "it gives no pads"));
    }
    lift.float_to_input(&mut node, "value", 2);
    lift.nodes.push(node);
    Ok(())
}

fn scatter(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    node.op_type = Some("ScatterElements".into());
    lift.nodes.push(node);
    Ok(())
}

/// Without the input `training_mode`, Dropout passes its input on, as it did before in an inference.
fn dropout(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    lift.float_to_input(&mut node, "ratio", 1);
    lift.nodes.push(node);
    Ok(())
}

fn axes(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    lift.ints_to_input(&mut node, "axes", 1);
    lift.nodes.push(node);
    Ok(())
}

fn split(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    lift.ints_to_input(&mut node, "split", 1);
    lift.nodes.push(node);
    Ok(())
}

fn split_count(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if node.input_at(1).is_none() {
        let count = node.output.len() as i64;
        set(&mut node, AttributeProto::int("num_outputs", count));
    }
    lift.nodes.push(node);
    Ok(())
}

/// Before set 13 the input was taken as a matrix: the axes before `axis`, by those from it on.
fn softmax(lift: &mut Lift, mut soft: NodeProto) -> Result<()> {
    let axis = soft.attr_i("axis", 1);
    let (Some(x), Some(y)) = (soft.input_at(0).map(String::from), soft.output_at(0).map(String::from)) else {
        return Err(cannot(&soft, "it lacks an input or an output"));
    };
    set(&mut soft, AttributeProto::int("axis", -1));
    let last = match lift.shapes.dims(&x) {
        Some(dims) => {
            let front = if axis < 0 { axis.saturating_add(dims.len() as i64) } else { axis };
            // One row per element of the axes before: what follows the first axis must be of size 1 each.
            let inner = usize::try_from(front).ok().and_then(|front| dims.get(front..dims.len().saturating_sub(1)));
            inner.is_some_and(|inner| inner.iter().all(|d| *d == Dim::Known(1)))
        }
        None => axis == -1,
    };
    if last {
        lift.nodes.push(soft);
        return Ok(());
    }
    let [shape, rows, result] = ["shape", "rows", "result"].map(|what| lift.fresh(&soft, what));
    let mut flatten = node("Flatten", &[&x], &[&rows]);
    flatten.attribute.push(AttributeProto::int("axis", axis));
    let mut reshape = node("Reshape", &[&result, &shape], &[&y]);
    reshape.attribute.push(AttributeProto::int("allowzero", 1));
    soft.input = vec![rows];
    soft.output = vec![result];
    lift.nodes.extend([node("Shape", &[&x], &[&shape]), flatten, soft, reshape]);
    Ok(())
}

/// More than one output meant training; now an attribute says so, and the batch's own statistics are no outputs.
fn batch_normalization_training(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    if node.output.iter().skip(1).any(|o| !o.is_empty()) {
        if let Some(lost) = node.output.iter().skip(3).find(|o| lift.used.contains(*o)) {
            return Err(cannot(&node, &format!("operator set 14 has no output for the batch statistic {lost:?}")));
        }
        node.output.truncate(3);
        set(&mut node, AttributeProto::int("training_mode", 1));
    }
    lift.nodes.push(node);
    Ok(())
}

fn roi_align(lift: &mut Lift, mut node: NodeProto) -> Result<()> {
    set(&mut node, AttributeProto::string("coordinate_transformation_mode", "output_half_pixel"));
    lift.nodes.push(node);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use prost::Message;

    use super::*;
    use crate::onnx::{Model, constant_i64, value_info};

    fn shared(name: &str) -> ModelProto {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models");
        Model::open(models.join(name)).expect("a model of the shared folder").proto
    }

    /// A model of one node over the float input `x` of shape [2, 3, 4].
    fn single(opset: i64, node: NodeProto) -> ModelProto {
        let mut graph = GraphProto { node: vec![node], ..Default::default() };
        graph.input.push(value_info("x", DataType::Float, &["2", "3", "4"]));
        graph.output.push(value_info("y", DataType::Float, &[]));
        constant_i64(&mut graph, "unused", &[1]);
        let import = OperatorSetIdProto { domain: None, version: Some(opset) };
        ModelProto { ir_version: Some(3), opset_import: vec![import], graph: Some(graph), ..Default::default() }
    }

    fn with(mut node: NodeProto, attributes: &[AttributeProto]) -> NodeProto {
        node.attribute.extend_from_slice(attributes);
        node
    }

    fn lifted(mut model: ModelProto, target: i64) -> GraphProto {
        upgrade(&mut model, target).expect("a model that can be lifted");
        assert_eq!(model.opset(), target);
        model.graph.expect("a graph")
    }

    /// The models of `fixtures/upgrade`, by name.
    fn fixtures() -> Vec<(String, ModelProto)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/upgrade");
        let files = std::fs::read_dir(folder).expect("the fixtures").map(|f| f.expect("a file").path());
        files
            .filter(|f| f.extension().is_some_and(|e| e == "onnx"))
            .map(|f| {
                let name = f.file_stem().expect("a name").to_string_lossy().into_owned();
                (name, Model::open(&f).expect("a model").proto)
            })
            .collect()
    }

    /// Value of the initializer that is input `i` of `node`.
    fn input(graph: &GraphProto, node: &NodeProto, i: usize) -> Tensor {
        let name = node.input_at(i).expect("an input");
        let tensor = graph.initializer.iter().find(|t| t.name() == name).expect("an initializer");
        Tensor::from_proto(tensor).expect("a tensor")
    }

    /// Attributes that operator set 17 no longer knows.
    const GONE: &[(&str, &[&str])] = &[
        ("BatchNormalization", &["spatial"]),
        ("Clip", &["min", "max"]),
        ("Dropout", &["ratio"]),
        ("Pad", &["pads", "value"]),
        ("ReduceSum", &["axes"]),
        ("Resize", &["scales"]),
        ("Slice", &["starts", "ends", "axes"]),
        ("Split", &["split"]),
        ("Squeeze", &["axes"]),
        ("TopK", &["k"]),
        ("Unsqueeze", &["axes"]),
    ];

    /// That the lifted models compute what the old ones did is for a test with an engine; here, how they are written.
    #[test]
    fn old_spellings_are_gone() {
        let mut refused = 0;
        for (name, model) in fixtures() {
            for target in [17, 18] {
                let mut model = model.clone();
                if name.starts_with("refused") {
                    let message = upgrade(&mut model, target).expect_err(&name).to_string();
                    assert!(message.contains("BatchNormalization") || message.contains("operator set 6"), "{message}");
                    refused += 1;
                    continue;
                }
                upgrade(&mut model, target).expect(&name);
                assert_eq!(model.opset(), target);
                assert!(model.ir_version() >= 8);
                let decoded = ModelProto::decode(model.encode_to_vec().as_slice()).expect("a model");
                assert_eq!(decoded, model);
                let mut made = HashSet::new();
                walk_graphs(model.graph.as_ref().expect("a graph"), &mut |_, graph| {
                    for node in &graph.node {
                        assert!(!matches!(node.op_type(), "Upsample" | "Scatter"), "{name}");
                        for (op, attributes) in GONE {
                            let left = attributes.iter().find(|a| node.is(op) && node.attr(a).is_some());
                            assert_eq!(left, None, "{name}: {op}");
                        }
                        let reduces = node.op_type().starts_with("Reduce") && target >= 18;
                        assert!(!(reduces && node.attr("axes").is_some()), "{name}");
                        assert!(node.output.iter().all(|o| made.insert(o.clone())), "{name}: {:?} twice", node.output);
                    }
                });
            }
        }
        assert_eq!(refused, 4);
    }

    #[test]
    fn bert_of_opset_11() {
        let old = shared("bert.ts11.onnx");
        let mut new = old.clone();
        upgrade(&mut new, 17).expect("a model that can be lifted");
        let (old, graph) = (old.graph.expect("a graph"), new.graph.expect("a graph"));
        assert_eq!(old.node.len(), graph.node.len(), "softmax is over the last axis, so nothing is flattened");
        let mut moved = 0;
        for (before, after) in old.node.iter().zip(&graph.node) {
            assert_eq!((before.op_type(), &before.output), (after.op_type(), &after.output));
            if before.is("Unsqueeze") {
                let axes = before.attr_ints("axes").expect("axes");
                assert_eq!(input(&graph, after, 1).values::<i64>(), Some(axes));
                moved += 1;
            } else if before.is("Softmax") {
                assert_eq!(after.attr_i("axis", 1), -1);
            } else {
                assert_eq!(before, after);
            }
        }
        assert_eq!(moved, 32);
        assert_eq!(graph.initializer.len(), old.initializer.len() + moved);
    }

    #[test]
    fn softmax_over_several_axes_is_flattened() {
        let graph = lifted(single(11, with(node("Softmax", &["x"], &["y"]), &[AttributeProto::int("axis", 1)])), 17);
        let ops: Vec<&str> = graph.node.iter().map(|n| n.op_type()).collect();
        assert_eq!(ops, ["Shape", "Flatten", "Softmax", "Reshape"]);
        assert_eq!(graph.node[3].output, ["y"]);
    }

    #[test]
    fn bounds_take_the_type_of_what_they_bound() {
        let mut model = single(8, with(node("Clip", &["x"], &["y"]), &[AttributeProto::float("max", 0.5)]));
        model.graph.as_mut().expect("a graph").input[0] = value_info("x", DataType::Float16, &["2"]);
        let graph = lifted(model, 17);
        assert_eq!(graph.node[0].input[1], "", "no lower bound");
        assert_eq!(input(&graph, &graph.node[0], 2), Tensor::scalar(f16::from_f32(0.5)));
    }

    #[test]
    fn batch_normalization_in_training() {
        let inputs = ["x", "s", "b", "m", "v"];
        let graph = lifted(single(9, node("BatchNormalization", &inputs, &["y", "m2", "v2", "sm", "sv"])), 17);
        assert_eq!(graph.node[0].output, ["y", "m2", "v2"]);
        assert_eq!(graph.node[0].attr_i("training_mode", 0), 1);
        let mut used = single(9, node("BatchNormalization", &inputs, &["z", "m2", "v2", "sm", "sv"]));
        used.graph.as_mut().expect("a graph").node.push(node("Relu", &["sm"], &["y"]));
        let message = upgrade(&mut used, 17).expect_err("a statistic that is gone").to_string();
        assert!(message.contains("BatchNormalization") && message.contains("\"sm\""), "{message}");
    }

    #[test]
    fn what_is_new_enough_stays() {
        let model = single(18, with(node("ReduceMax", &["x"], &["y"]), &[AttributeProto::int("keepdims", 0)]));
        for target in [7, 17, 18] {
            let mut same = model.clone();
            upgrade(&mut same, target).expect("nothing to do");
            assert_eq!(same, model);
        }
        assert!(upgrade(&mut model.clone(), 99).expect_err("too new").to_string().contains("18"));
    }
}
