//! The table of rules as a whole: no row without a case, and every "zero" is zero.

use std::collections::BTreeSet;

use bone_onnx::autodiff::{Request, Rule, Rules, Seed, gradient};
use bone_onnx::onnx::{AttributeProto, DataType, Tensor, node, value_info};

use super::cases;
use super::harness::{Arg, Case, Random, case, load};

/// Rules with a test of their own in another file.
const ELSEWHERE: &[&str] = &["If", "Loop", "Optional", "OptionalGetElement", "Scan"];

/// Rows that say "zero" of operators that take no floats.
const NO_FLOATS: &[&str] = &[
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseNot",
    "BitwiseOr",
    "BitwiseXor",
    "BlackmanWindow",
    "CategoryMapper",
    "Constant",
    "ConstantOfShape",
    "HammingWindow",
    "HannWindow",
    "ImageDecoder",
    "Not",
    "OptionalHasElement",
    "Or",
    "RandomNormal",
    "RandomUniform",
    "RegexFullMatch",
    "SequenceEmpty",
    "SequenceLength",
    "StringConcat",
    "StringNormalizer",
    "StringSplit",
    "TfIdfVectorizer",
    "Xor",
];

/// Rows that say "zero" because the output is random: two runs differ for that reason alone.
const RANDOM: &[&str] = &["Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike"];

#[test]
fn no_rule_lacks_a_case() {
    let cases: BTreeSet<(&str, &str)> = cases::all().iter().map(|c| (c.domain, c.op)).collect();
    let zeros: BTreeSet<&str> = zeros().iter().map(|c| c.op).collect();
    let rules = Rules::standard();
    let missing: Vec<String> = rules
        .iter()
        .filter(|(domain, op, rule)| match rule {
            Rule::Vjp(_) => !cases.contains(&(*domain, *op)) && !ELSEWHERE.contains(op),
            Rule::Zero(_) => !zeros.contains(op) && !NO_FLOATS.contains(op) && !RANDOM.contains(op),
            Rule::Refused(_) => false,
        })
        .map(|(domain, op, _)| format!("{domain}.{op}"))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Each operator that says "zero" and takes floats, at points in general position.
fn zeros() -> Vec<Case> {
    let x = || Arg::By(vec![2, 6], Random(11).values(12, -2.5, 2.5));
    let y = || Arg::By(vec![6], Random(12).values(6, -2.5, 2.5));
    let mut zeros: Vec<Case> =
        ["ArgMax", "ArgMin", "Ceil", "Floor", "Hardmax", "IsNaN", "NonZero", "Round", "Shape", "Sign", "Size"]
            .into_iter()
            .map(|op| case(op, vec![x()]))
            .collect();
    zeros.extend(["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"].map(|op| case(op, vec![x(), y()])));
    zeros.push(case("IsInf", vec![x()]));
    zeros.push(case("EyeLike", vec![x()]).int("dtype", 1));
    let boxes = vec![0.0, 0.0, 1.0, 1.0, 0.1, 0.1, 1.1, 1.1, 2.0, 2.0, 3.0, 3.0];
    let limit = Arg::Const(Tensor::new(&[1], vec![2i64]));
    let boxes = Arg::By(vec![1, 3, 4], boxes);
    zeros.push(case("NonMaxSuppression", vec![boxes, Arg::By(vec![1, 1, 3], vec![0.9, 0.8, 0.7]), limit]));
    let (number, edge) = (|n: i64| Arg::Const(Tensor::scalar(n)), |hertz: f64| Arg::By(vec![], vec![hertz]));
    let mel = vec![number(8), number(64), number(16000), edge(310.0), edge(7100.0)];
    zeros.push(case("MelWeightMatrix", mel));
    zeros.extend(ml_zeros(x));
    zeros
}

fn ml_zeros(x: impl Fn() -> Arg) -> Vec<Case> {
    let ml = |op: &'static str| case(op, vec![x()]).domain("ai.onnx.ml");
    // One tree of one question: is the first feature at most 0.5?
    let tree = |op: &'static str| {
        let nodes = ml(op).ints("nodes_treeids", &[0; 3]).ints("nodes_nodeids", &[0, 1, 2]);
        let nodes = nodes.ints("nodes_featureids", &[0; 3]).floats("nodes_values", &[0.5, 0.0, 0.0]);
        let nodes = nodes.strings("nodes_modes", &["BRANCH_LEQ", "LEAF", "LEAF"]);
        nodes.ints("nodes_truenodeids", &[1, 0, 0]).ints("nodes_falsenodeids", &[2, 0, 0])
    };
    let leaves = |case: Case, what: &str| {
        let case = case.ints(&format!("{what}_treeids"), &[0; 2]).ints(&format!("{what}_nodeids"), &[1, 2]);
        case.ints(&format!("{what}_ids"), &[0, 0]).floats(&format!("{what}_weights"), &[1.0, 2.0])
    };
    let tensor = |name: &str, value: Tensor| AttributeProto::tensor(name, value.to_proto(""));
    let newest = ml("TreeEnsemble").int("n_targets", 1).ints("tree_roots", &[0]).ints("nodes_featureids", &[0]);
    let newest = newest.attr(tensor("nodes_modes", Tensor::new(&[1], vec![0u8])));
    let newest = newest.attr(tensor("nodes_splits", Tensor::new(&[1], vec![0.5f32])));
    let newest = newest.ints("nodes_truenodeids", &[0]).ints("nodes_trueleafs", &[1]);
    let newest = newest.ints("nodes_falsenodeids", &[1]).ints("nodes_falseleafs", &[1]);
    let newest = newest.ints("leaf_targetids", &[0, 0]).int("post_transform", 0).int("aggregate_function", 1);
    vec![
        ml("Binarizer").float("threshold", 0.3),
        ml("LabelEncoder").floats("keys_floats", &[7.0]).floats("values_floats", &[9.0]).float("default_float", 1.0),
        ml("OneHotEncoder").ints("cats_int64s", &[0, 1, 2]).int("zeros", 1),
        newest.attr(tensor("leaf_weights", Tensor::new(&[2], vec![1.0f32, 2.0]))),
        leaves(tree("TreeEnsembleRegressor"), "target").int("n_targets", 1),
        leaves(tree("TreeEnsembleClassifier"), "class").ints("classlabels_int64s", &[0, 1]).outputs(&[true, true]),
    ]
}

/// Operators that older operator sets had and that `upgrade` writes in today's.
const LIFTED: &[&str] = &["Scatter", "Upsample"];

/// What ONNX Runtime's optimizer writes into the default domain.
const OPTIMIZED: &[&str] = &["SimplifiedLayerNormalization"];

/// The newest operator set that ONNX Runtime 1.31 runs.
const NEWEST: i64 = 26;

/// Every operator of the specification has a row, and every row of its domains is one of its operators. One that takes
/// and gives floats and is refused is of the few that are listed here.
#[test]
fn no_operator_lacks_a_row() {
    const REFUSED: &[&str] = &[
        "BitCast",
        "ConcatFromSequence",
        "DynamicQuantizeLinear",
        "QuantizeLinear",
        "SVMClassifier",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceErase",
        "SequenceInsert",
        "SequenceMap",
        "SplitToSequence",
    ];
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/operators/operators.tsv");
    let text = std::fs::read_to_string(path).unwrap();
    let rules = Rules::standard();
    let table: std::collections::BTreeMap<(&str, &str), &Rule> =
        rules.iter().map(|(domain, op, rule)| ((domain, op), rule)).collect();
    let (mut known, mut wrong) = (BTreeSet::new(), Vec::new());
    for line in text.lines() {
        let columns: Vec<&str> = line.split('\t').collect();
        let [domain, op, since, _, floats] = columns[..] else { panic!("{line}") };
        let domain = if domain == "ai.onnx" { "" } else { domain };
        known.insert((domain, op));
        if LIFTED.contains(&op) {
            continue;
        }
        let first: i64 = since.split(',').next().unwrap().parse().unwrap();
        match table.get(&(domain, op)) {
            None => wrong.push(format!("{domain}.{op} has no row")),
            Some(Rule::Refused(_)) if first <= NEWEST && floats == "float" && !REFUSED.contains(&op) => {
                wrong.push(format!("{domain}.{op} is refused"));
            }
            _ => {}
        }
    }
    assert!(known.len() > 200);
    for (domain, op) in table.keys().filter(|(domain, _)| matches!(*domain, "" | "ai.onnx.ml")) {
        if !known.contains(&(*domain, *op)) && !OPTIMIZED.contains(op) {
            wrong.push(format!("{domain}.{op} is no operator"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn zeros_do_not_move() {
    for case in zeros() {
        let mut case = case.single();
        let wrt = case.wrt();
        let mut model = case.model(false, 17);
        let graph = model.graph.as_mut().unwrap();
        graph.output.clear();
        graph.node.push(bone_onnx::onnx::NodeProto {
            attribute: vec![AttributeProto::int("to", DataType::Float as i64)],
            ..node("Cast", &["y0"], &["as_float"])
        });
        graph.node.push(node("ReduceSum", &["as_float"], &["total"]));
        graph.output.push(value_info("as_float", DataType::Float, &[]));
        strip_shape(&mut graph.output[0]);
        let request =
            Request { of: vec![("total".into(), Seed::One)], wrt: wrt.clone(), input_dims: Default::default() };
        let gradient = gradient(&model, &request).unwrap();
        let feeds = case.feeds();
        let lent: Vec<(&str, &Tensor)> = feeds.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let names: Vec<&str> = gradient.gradients.iter().map(String::as_str).collect();
        for (name, g) in wrt.iter().zip(load(&gradient.model, true).unwrap().run(&lent, &names).unwrap()) {
            assert_eq!(g.dims(), feeds[name].dims(), "{}", case.op);
            assert!(g.to_f64().iter().all(|v| *v == 0.0), "{}", case.op);
        }
        let mut session = load(&model, true).unwrap();
        let before = session.run(&lent, &["as_float"]).unwrap();
        let mut random = Random(3);
        for arg in &mut case.args {
            if let Arg::By(_, values) = arg {
                values.iter_mut().for_each(|v| *v += random.uniform(-1e-4, 1e-4));
            }
        }
        let moved = case.feeds();
        assert_ne!(moved, feeds);
        let lent: Vec<(&str, &Tensor)> = moved.iter().map(|(n, t)| (n.as_str(), t)).collect();
        assert_eq!(session.run(&lent, &["as_float"]).unwrap(), before, "{}", case.op);
    }
}

fn strip_shape(info: &mut bone_onnx::onnx::ValueInfoProto) {
    use bone_onnx::onnx::proto::type_proto::Value;
    if let Some(Value::TensorType(tensor)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        tensor.shape = None;
    }
}

/// Nodes with too few inputs and outputs, ranks that make no sense and attributes of the wrong length: an error or a
/// graph, never a panic.
#[test]
fn malformed_nodes_do_not_panic() {
    let attributes = || {
        let mut list: Vec<AttributeProto> =
            ["axis", "batch_dims", "keepdims", "transA"].map(|n| AttributeProto::int(n, i64::MIN)).into();
        list.extend(["axes", "perm", "pads", "strides"].map(|n| AttributeProto::ints(n, &[7, -9, i64::MAX])));
        list
    };
    let mut refused = 0;
    for (domain, op, _) in Rules::standard().iter() {
        for (inputs, outputs, dims, odd) in (0..6).flat_map(|i| {
            [0, 1, 4].into_iter().flat_map(move |o| {
                [&[][..], &["n"], &["2", "0", "n"]]
                    .into_iter()
                    .flat_map(move |d| [false, true].map(|odd| (i, o, d, odd)))
            })
        }) {
            let names: Vec<String> = (0..outputs).map(|k| format!("y{k}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut bad = node(op, &vec!["x"; inputs], &names);
            bad.domain = Some(domain.into());
            bad.attribute = if odd { attributes() } else { vec![] };
            let graph = bone_onnx::onnx::GraphProto {
                input: vec![value_info("x", DataType::Float, dims)],
                output: vec![value_info("x", DataType::Float, dims)],
                node: vec![bad],
                ..Default::default()
            };
            let opset = bone_onnx::onnx::proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
            let model =
                bone_onnx::onnx::ModelProto { graph: Some(graph), opset_import: vec![opset], ..Default::default() };
            let of = if outputs > 0 { "y0" } else { "x" };
            let request = Request { of: vec![(of.into(), Seed::One)], wrt: vec!["x".into()], ..Default::default() };
            refused += usize::from(gradient(&model, &request).is_err());
        }
    }
    assert!(refused > 0);
}
