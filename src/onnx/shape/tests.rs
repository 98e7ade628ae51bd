//! Against what ONNX Runtime computed: `fixtures/shapes/*.json`, made by `fixtures/shapes/make.py`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::*;
use crate::onnx::{Model, node, value_info};

const RUNS: usize = 3;

fn models() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models");
    if beside.is_dir() { beside } else { "/work/shared/models".into() }
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
            check(&shapes, model.graph(), values, &mut truth.clone(), &mut seen);
            continue;
        };
        let node = model.graph().node.iter().find(|n| n.output[0] == output).expect("the If");
        let branch = node.attr(attribute).and_then(|a| a.g.as_ref()).expect("a branch");
        let inner = shapes.subgraph(branch, model.proto.opset());
        check(&inner, branch, values, &mut truth.clone(), &mut seen);
    }
    eprintln!("{name}: {seen:?}");
    seen
}

/// Every rank is known, and every dimension is a number or follows from the inputs' dimensions.
fn covered_whole(name: &str) {
    let seen = covered(name);
    assert!(seen.values > 10, "{name}: {seen:?}");
    assert_eq!(seen.ranks, seen.values, "{name}: {seen:?}");
    assert_eq!(seen.bound, seen.dims, "{name}: {seen:?}");
}

#[test]
fn what_is_claimed_of_the_shared_models_is_so() {
    for name in [
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
        "llama.genai_int4",
        "llama.ts17",
        "mlp2d.dyn23",
        "mlp2d.ts17",
        "mlp3d.dyn18",
        "qwen2_tied_nofold.ts17",
        "seqnest.ts17",
        "t5_decoder_merged.optimum18",
        "vit.ts17",
    ] {
        covered_whole(name);
    }
}
