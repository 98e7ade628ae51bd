//! Against what ONNX Runtime computed: `fixtures/shapes/*.json`, made by `fixtures/shapes/make.py`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::*;
use crate::onnx::{Model, node, value_info};

const RUNS: usize = 3;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models")
}

fn open(name: &str) -> Model {
    Model::open(models().join(format!("{name}.onnx"))).expect("a model of the shared folder")
}

fn fixture(name: &str) -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/shapes/{name}.json"));
    serde_json::from_slice(&std::fs::read(path).expect("a fixture")).expect("JSON")
}

/// Sizes of a dimension in each run.
fn runs(dim: &Json) -> [i64; RUNS] {
    match dim.as_i64() {
        Some(n) => [n; RUNS],
        None => std::array::from_fn(|i| dim[i].as_i64().expect("a size")),
    }
}

/// Of all values and dimensions of a model: how many are there, and of how many is how much known.
#[derive(Debug, Default)]
struct Coverage {
    values: usize,
    ranks: usize,
    dims: usize,
    bound: usize,
}

/// Holds every claim about the values of `graph` against the runs. `truth` says what each symbol was.
fn check(
    shapes: &Shapes,
    graph: &GraphProto,
    actual: &[Json],
    truth: &mut HashMap<Dim, ([i64; RUNS], String)>,
    seen: &mut Coverage,
) {
    let names: Vec<&String> = graph.node.iter().flat_map(|n| &n.output).filter(|o| !o.is_empty()).collect();
    assert_eq!(names.len(), actual.len(), "the fixture is of another model");
    for (name, actual) in names.into_iter().zip(actual) {
        let Some([element, sizes @ ..]) = actual.as_array().map(Vec::as_slice) else { continue };
        seen.values += 1;
        seen.dims += sizes.len();
        if let Some(claimed) = shapes.element(name) {
            assert_eq!(Some(claimed as i64), element.as_i64(), "element type of {name}");
        }
        let Some(dims) = shapes.dims(name) else { continue };
        seen.ranks += 1;
        assert_eq!(dims.len(), sizes.len(), "rank of {name}");
        for (dim, size) in dims.iter().zip(sizes) {
            let size = runs(size);
            match dim {
                Dim::Known(n) => assert_eq!([*n; RUNS], size, "{name}"),
                Dim::Symbol(_) => {
                    let (first, at) = truth.entry(*dim).or_insert((size, name.clone()));
                    assert_eq!(*first, size, "{} of {name} is not that of {at}", shapes.show(*dim));
                }
            }
            seen.bound += usize::from(shapes.is_bound(*dim));
        }
    }
}

fn covered(name: &str) -> Coverage {
    let (model, fixture) = (open(name), fixture(name));
    let shapes = Shapes::infer(&model.proto, &BTreeMap::new());
    let mut truth = HashMap::new();
    for (input, sizes) in fixture["inputs"].as_object().expect("inputs") {
        for (dim, size) in shapes.dims(input).expect("a declared input").iter().zip(sizes.as_array().expect("dims")) {
            truth.insert(*dim, (runs(size), input.clone()));
        }
    }
    let mut seen = Coverage::default();
    for (place, values) in fixture["graphs"].as_object().expect("graphs") {
        let values = values.as_array().expect("values");
        let Some((output, attribute)) = place.split_once('/') else {
            check(&shapes, model.graph(), values, &mut truth, &mut seen);
            continue;
        };
        let node = model.graph().node.iter().find(|n| n.output[0] == output).expect("the If");
        let branch = node.attr(attribute).and_then(|a| a.g.as_ref()).expect("a branch");
        let inner = shapes.subgraph(branch, model.proto.opset());
        check(&inner, branch, values, &mut truth.clone(), &mut seen);
    }
    seen
}

const ALL: [&str; 19] = [
    "bert.dyn18",
    "bert.ts11",
    "bert.ts17",
    "bert.ts17.qdq",
    "bert_ext.dyn18",
    "bert_fp16.dyn18",
    "bert_nofold.ts17",
    "bert_zero.ts17",
    "gpt2.ts17",
    "llama.dyn18",
    "llama.dyn18.ort_ext",
    "llama.ts17",
    "mlp2d.dyn23",
    "mlp2d.ts17",
    "mlp3d.dyn18",
    "qwen2_tied_nofold.ts17",
    "seqnest.ts17",
    "t5_decoder_merged.optimum18",
    "vit.ts17",
];

/// Every rank is known, and every dimension is a number or follows from the inputs' dimensions.
#[test]
fn what_is_claimed_of_the_shared_models_is_so() {
    for name in ALL {
        let seen = covered(name);
        // The branches of T5's If give keys and values of different lengths.
        let open = if name.starts_with("t5") { 4 } else { 0 };
        assert!(seen.values > 10, "{name}: {seen:?}");
        assert_eq!(seen.ranks, seen.values, "{name}: {seen:?}");
        assert_eq!(seen.bound, seen.dims - open, "{name}: {seen:?}");
    }
}

/// Batch and length are one symbol each from the embedding to the head.
#[test]
fn the_residual_stream_keeps_its_symbols() {
    for name in ALL.into_iter().filter(|n| ["bert", "gpt2", "llama", "qwen2"].iter().any(|m| n.starts_with(m))) {
        let model = open(name);
        let shapes = Shapes::infer(&model.proto, &BTreeMap::new());
        let ids = shapes.dims("input_ids").expect("an input").to_vec();
        let mut seen = 0;
        for node in model.graph().node.iter().filter(|n| n.is("Add") || n.is("MatMul")) {
            let [batch, length, Dim::Known(_)] = shapes.dims(&node.output[0]).expect("known ranks")[..] else {
                continue;
            };
            // Tables of positions are made beside the stream, for all sequences of a batch at once.
            if batch != Dim::Known(1) {
                assert_eq!([batch, length], ids[..], "{name}: {}", node.output[0]);
                seen += 1;
            }
        }
        assert!(seen > 4, "{name}: {seen} values");
    }
}

/// Inputs that a call fixes make numbers of everything.
#[test]
fn input_dims_override_what_is_declared() {
    let model = open("bert.ts17");
    let fixed = BTreeMap::from([("input_ids".into(), vec![2, 5]), ("attention_mask".into(), vec![2, 5])]);
    let shapes = Shapes::infer(&model.proto, &fixed);
    for node in &model.graph().node {
        for output in &node.output {
            let dims = shapes.dims(output).expect("a rank");
            assert!(dims.iter().all(|d| matches!(d, Dim::Known(_))), "{output}: {dims:?}");
        }
    }
    assert_eq!(shapes.dims("out"), Some(&[Dim::Known(2), Dim::Known(3)][..]));
}

/// ONNX Runtime cannot run this one (its heads are too small), so only what the file itself declares is compared.
#[test]
fn contrib_operators_of_a_generator_model() {
    let model = open("llama.genai_int4");
    let shapes = Shapes::infer(&model.proto, &BTreeMap::new());
    for node in &model.graph().node {
        assert!(node.output.iter().all(|o| o.is_empty() || shapes.rank(o).is_some()), "{}", node.op_type());
    }
    let ids = shapes.dims("input_ids").expect("an input");
    assert_eq!(shapes.dims("logits"), Some(&[ids[0], ids[1], Dim::Known(96)][..]));
}

/// Attributes and inputs that make no sense leave things unknown.
#[test]
fn hostile_nodes_do_not_panic() {
    const STRANGE: [i64; 7] = [i64::MIN, -7, -1, 0, 1, 3, i64::MAX];
    const ATTRIBUTES: &str = "axis axes perm split starts ends pads strides dilations kernel_shape blocksize start end \
        batch_dims N num_heads kv_num_heads q_num_heads group hidden_size to dtype k shape output_shape equation scales \
        qkv_hidden_sizes output_padding stash_type output_dtype value_ints value_int";
    const INPUTS: [&[&str]; 6] =
        [&[], &["x"], &["x", "v"], &["x", "v", "v", "v", "x"], &["v", "x", "x", "x", "v"], &["x", "x", "x", "x"]];
    for name in op::names() {
        for (k, value) in STRANGE.into_iter().enumerate() {
            for (inputs, bare) in INPUTS.into_iter().flat_map(|i| [(i, true), (i, false)]) {
                let (domain, op) = name.split_once(':').unwrap_or(("", name));
                let mut node = node(op, inputs, &["a", "b", "", "c"]);
                node.domain = Some(domain.into());
                for name in ATTRIBUTES.split_whitespace().filter(|_| !bare) {
                    let mut attribute = crate::onnx::AttributeProto::ints(name, &STRANGE[..k]);
                    attribute.i = Some(value);
                    attribute.s = Some("a...b,->...".into());
                    attribute.floats = vec![f32::NAN, f32::MAX, -1.0];
                    node.attribute.push(attribute);
                }
                let mut graph = GraphProto { node: vec![node], ..Default::default() };
                crate::onnx::constant_i64(&mut graph, "v", &STRANGE);
                for (opset, input) in [1, 9, 11, 13, 18, 23].into_iter().flat_map(|o| [(o, None), (o, Some("x"))]) {
                    let mut shapes = Shapes::default();
                    if let Some(input) = input {
                        let declared = shapes.declared(&value_info(input, DataType::Float, &["2", "", "4"]));
                        shapes.values.insert(input.into(), declared);
                    }
                    shapes.graph(&graph, opset);
                    for dims in ["a", "b", "c"].iter().filter_map(|o| shapes.dims(o)) {
                        assert!(dims.iter().all(|d| !matches!(d, Dim::Known(n) if *n < 0)), "{name}: {dims:?}");
                    }
                }
            }
        }
    }
}

/// Shapes of the outputs that the ONNX backend tests expect, operator by operator (`make_nodes.py`).
#[test]
fn operators_agree_with_the_backend_tests() {
    use base64::Engine as _;
    let cases = fixture("nodes");
    let (mut open, mut blank) = (BTreeSet::new(), BTreeSet::new());
    for case in cases.as_array().expect("cases") {
        let name = case[0].as_str().expect("a name");
        let bytes = base64::prelude::BASE64_STANDARD.decode(case[1].as_str().expect("a model")).expect("base64");
        let model = Model::from_bytes(name, bytes.into()).expect("a model");
        let shapes = Shapes::infer(&model.proto, &BTreeMap::new());
        let op = model.graph().node[0].op_type().to_string();
        for (output, wanted) in model.graph().output.iter().zip(case[2].as_array().expect("outputs")) {
            let Some([element, sizes @ ..]) = wanted.as_array().map(Vec::as_slice) else { continue };
            if let Some(claimed) = shapes.element(output.name()) {
                assert_eq!(Some(claimed as i64), element.as_i64(), "{name}: element type of {}", output.name());
            }
            let Some(dims) = shapes.dims(output.name()) else {
                blank.insert(op.clone());
                continue;
            };
            assert_eq!(dims.len(), sizes.len(), "{name}: rank of {}", output.name());
            for (dim, size) in dims.iter().zip(sizes) {
                assert!(
                    matches!(dim, Dim::Symbol(_)) || *dim == Dim::Known(runs(size)[0]),
                    "{name}: {dims:?} {sizes:?}"
                );
            }
            if dims.iter().any(|d| matches!(d, Dim::Symbol(_))) {
                open.insert(op.clone());
            }
        }
    }
    // Sizes that depend on data: what is counted or found, or a shape that is an input of the graph. Of MaxUnpool and
    // STFT the rank is enough.
    let data = "CenterCropPad Compress ConstantOfShape MaxUnpool NonMaxSuppression NonZero Range STFT Unique";
    let data: Vec<&str> = data.split_whitespace().collect();
    assert_eq!(open.iter().map(String::as_str).collect::<Vec<_>>(), data);
    const NO_RULE: &str = "AffineGrid BitCast CausalConvWithState LinearAttention OptionalGetElement OptionalHasElement \
        RegexFullMatch StringConcat StringSplit SwiGLU";
    assert_eq!(blank.iter().map(String::as_str).collect::<Vec<_>>(), NO_RULE.split_whitespace().collect::<Vec<_>>());
}

/// A model of `nodes` on a float input `x` and the constants `axis` = [0], `w` [3, 4, 1] and `go` = 1.
fn made(nodes: Vec<NodeProto>, dims: &[&str]) -> Shapes {
    let mut graph =
        GraphProto { input: vec![value_info("x", DataType::Float, dims)], node: nodes, ..Default::default() };
    graph.initializer.push(Tensor::new(&[1], vec![0i64]).to_proto("axis"));
    graph.initializer.push(Tensor::new(&[3, 4, 1], vec![0f32; 12]).to_proto("w"));
    graph.initializer.push(Tensor::scalar(3i64).to_proto("count"));
    let opset = crate::onnx::proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
    let model = ModelProto { graph: Some(graph), opset_import: vec![opset], ..Default::default() };
    Shapes::infer(&model, &BTreeMap::new())
}

fn with(mut node: NodeProto, attributes: Vec<crate::onnx::AttributeProto>) -> NodeProto {
    node.attribute = attributes;
    node
}

/// Where an If may squeeze an axis, the Conv that follows says which rank it must have.
#[test]
fn ranks_follow_from_use() {
    use crate::onnx::AttributeProto;
    let branch = |op: &str, inputs: &[&str], output: &str| GraphProto {
        output: vec![value_info(output, DataType::Float, &[])]
            .into_iter()
            .map(|i| ValueInfoProto { r#type: None, ..i })
            .collect(),
        node: vec![node(op, inputs, &[output])],
        ..Default::default()
    };
    let choice = with(
        node("If", &["go"], &["y"]),
        vec![
            AttributeProto::graph("then_branch", branch("Squeeze", &["x", "axis"], "a")),
            AttributeProto::graph("else_branch", branch("Identity", &["x"], "b")),
        ],
    );
    let use_of = || vec![node("Relu", &["y"], &["relu"]), node("Conv", &["relu", "w"], &["z"])];
    let flag = || vec![node("ReduceSum", &["x"], &["sum"]), node("Equal", &["sum", "sum"], &["go"])];
    let shapes = made([flag(), vec![choice.clone()], use_of()].concat(), &["1", "n", "m", "k"]);
    assert_eq!((shapes.rank("y"), shapes.rank("relu"), shapes.rank("z")), (Some(3), Some(3), Some(3)));
    assert_eq!(made([flag(), vec![choice]].concat(), &["1", "n", "m", "k"]).rank("y"), None);
}

/// A state keeps the sizes that no turn changes, and none where a turn changes their number.
#[test]
fn loops_keep_what_no_turn_changes() {
    use crate::onnx::AttributeProto;
    let looped = |op: &str, inputs: &[&str], axis: i64| {
        let name = |name: &str| ValueInfoProto { name: Some(name.into()), ..Default::default() };
        let turn = with(node(op, inputs, &["next"]), vec![AttributeProto::int("axis", axis)]);
        let body = GraphProto {
            input: ["i", "go", "v"].map(name).into(),
            output: ["on", "next", "v"].map(name).into(),
            node: vec![node("Identity", &["go"], &["on"]), turn],
            ..Default::default()
        };
        let body = vec![AttributeProto::graph("body", body)];
        made(vec![with(node("Loop", &["count", "", "x"], &["y", "ys"]), body)], &["n", "4"])
    };
    let same = looped("Tanh", &["v"], 0);
    assert_eq!(same.dims("y"), same.dims("x"));
    assert_eq!((same.rank("ys"), same.element("ys")), (Some(3), Some(DataType::Float)));
    let grows = looped("Concat", &["v", "v"], 0);
    assert_ne!(grows.dims("y").unwrap()[0], grows.dims("x").unwrap()[0]);
    assert_eq!(grows.dims("y").unwrap()[1], Dim::Known(4));
    assert_eq!(looped("Unsqueeze", &["v", "axis"], 0).rank("y"), None);
}
