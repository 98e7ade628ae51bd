//! The models of `../shared/models` and `../shared/goldens`, against their manifests.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

use super::*;
use crate::onnx::{AttributeProto, DataType, GraphProto, Model, NodeProto, Tensor, node, value_info};

pub(super) fn shared(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")).join(path)
}

pub(super) fn linears_in(path: &str) -> Vec<Linear> {
    linears(&Model::open(shared(path)).unwrap())
}

fn manifest() -> Vec<serde_json::Value> {
    serde_json::from_slice(&std::fs::read(shared("models/manifest.json")).unwrap()).unwrap()
}

/// Calls of one module share one stored matrix and its layout; different modules never share a path.
fn assert_paths_are_consistent(linears: &[Linear]) {
    let mut weights = HashMap::new();
    for l in linears {
        let weight = (l.weight.source.clone(), l.is_stored_out_in(), l.in_features, l.out_features);
        assert_eq!(weights.entry(&l.path).or_insert(weight.clone()), &weight, "{}", l.path);
    }
}

#[test]
fn every_target_of_the_manifest_is_found_and_named() {
    let mut named = 0;
    for entry in manifest() {
        let file = entry["file"].as_str().unwrap();
        let mut found = linears_in(&format!("models/{file}"));
        assert_paths_are_consistent(&found);
        // The manifest knows whole layers.
        found.retain(|l| l.part.is_none());
        for target in entry["targets"].as_array().unwrap() {
            let node = target["node"].as_str().unwrap();
            let context = format!("{file}: {node}");
            let shape: Vec<usize> = serde_json::from_value(target["shape"].clone()).unwrap();
            if shape.len() == 4 {
                // The manifest's maker looked names up flat (F12): in the branch that uses it, this name is an
                // activation. It must not be found.
                assert!(!found.iter().any(|l| l.node_name == node), "{context}");
                continue;
            }
            let at = found.iter().position(|l| l.node_name == node).unwrap_or_else(|| panic!("{context} not found"));
            let l = found.remove(at);
            assert_eq!(l.op, target["op"], "{context}");
            assert_eq!(l.weight.name, target["weight"], "{context}");
            assert_eq!(i64::from(l.trans_b), target["transB"].as_i64().unwrap(), "{context}");
            if l.op != "MatMulNBits" {
                let dims = if l.trans_b { [l.out_features, l.in_features] } else { [l.in_features, l.out_features] };
                assert_eq!(dims, shape.as_slice(), "{context}");
            }
            assert_eq!(crate::onnx::data_type_name(l.data_type), target["dtype"], "{context}");
            // F1: the exporter merged all zero biases; this one is an Identity of the tensor that was kept.
            let merged = file == "bert_zero.ts17.onnx" && node == "/bert/pooler/dense/Gemm";
            if merged {
                let bias = l.bias.as_ref().unwrap();
                assert_eq!((bias.name.as_str(), bias.input), ("bert.embeddings.LayerNorm.bias", 2), "{context}");
            } else if let Some(bias) = target["bias"].as_str() {
                let stored = l.bias.as_ref().map(|b| b.name.strip_suffix("_quantized").unwrap_or(&b.name));
                assert_eq!(stored, Some(bias), "{context}");
            }
            let rule = match target["rule"].as_str() {
                Some("meta") => NameRule::Metadata,
                Some("W") => NameRule::Weight,
                Some("bias~name") => NameRule::BiasAndNode,
                Some("name") => NameRule::Node,
                Some("name+alias") => NameRule::Call,
                None => NameRule::None,
                Some(other) => panic!("{context}: rule {other}"),
            };
            // The manifest's maker did not look through Q/DQ for a bias; both ways give one path.
            if !file.contains("qdq") {
                assert_eq!(l.rule, rule, "{context}");
            }
            assert_eq!(l.module.as_deref(), target["recovered"].as_str(), "{context}");
            if let (Some(truth), Some(module)) = (target["truth"].as_array(), &l.module) {
                assert!(truth.iter().any(|t| t == module), "{context}: {truth:?}");
                named += 1;
            }
            assert_eq!(l.adaptable, Ok(()), "{context}");
            let plain = [DataType::Float, DataType::Float16].contains(&l.data_type);
            assert_eq!(l.quantized.is_none(), plain, "{context}: {:?}", l.quantized);
            assert!(l.quantized.as_ref().is_none_or(|q| q.scheme.is_ok()), "{context}: {:?}", l.quantized);
        }
        let extra: Vec<_> = found.iter().map(|l| &l.node_name).collect();
        assert!(extra.is_empty(), "{file}: {extra:?}");
    }
    assert_eq!(named, 186, "targets whose truth is known");
}

#[test]
fn the_goldens_are_named_as_peft_names_them() {
    let modules = |path| linears_in(path).into_iter().map(|l| l.module.unwrap()).collect::<Vec<_>>();
    assert_eq!(modules("goldens/mlp/base_gemm.onnx"), ["lin0", "lin1"]);
    assert_eq!(modules("goldens/mlp/base_matmul.onnx"), ["lin0", "lin1"]);
    let bert: BTreeSet<_> = modules("goldens/bert/base.onnx").into_iter().collect();
    let adapter = std::fs::read(shared("goldens/bert/bone_all_linear_r5_pad/adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&adapter).unwrap();
    let mut peft: BTreeSet<String> = tensors
        .names()
        .into_iter()
        .filter_map(|n| Some(n.strip_prefix("base_model.model.")?.strip_suffix(".bone_block")?.to_string()))
        .collect();
    // That run had task_type SEQ_CLS, under which PEFT trains the classifier in full.
    peft.insert("classifier".into());
    assert_eq!(bert, peft);
}

/// A graph over inputs `x`, with a 3×4 initializer `w` and a 4×3 initializer `wt`.
fn graph(nodes: Vec<NodeProto>) -> GraphProto {
    let matrix = |name, dims: &[usize]| Tensor::new(dims, vec![0.5f32; 12]).to_proto(name);
    GraphProto {
        node: nodes,
        initializer: vec![matrix("w", &[3, 4]), matrix("wt", &[4, 3])],
        input: vec![value_info("x", DataType::Float, &["n", "3"])],
        ..Default::default()
    }
}

fn named(mut node: NodeProto, name: &str) -> NodeProto {
    node.name = Some(name.into());
    node
}

#[test]
fn a_layer_has_one_constant_matrix_on_the_right() {
    let found = linears_of(&graph(vec![
        node("MatMul", &["x", "w"], &["y"]),
        node("MatMul", &["w", "x"], &["left"]),
        node("MatMul", &["w", "wt"], &["both"]),
        node("MatMul", &["x", "y"], &["neither"]),
        NodeProto { domain: Some("someone.else".into()), ..node("MatMul", &["x", "w"], &["custom"]) },
    ]));
    let names: Vec<_> = found.iter().map(|l| l.node_name.as_str()).collect();
    assert_eq!(names, ["y"]);
    assert_eq!((found[0].in_features, found[0].out_features, found[0].weight.uses), (3, 4, 4));
}

#[test]
fn the_stored_layout_is_known_through_transposes() {
    let transpose = |from, to| node("Transpose", &[from], &[to]);
    let gemm = |w, y| {
        let mut gemm = node("Gemm", &["x", w], &[y]);
        gemm.attribute = vec![AttributeProto::int("transB", 1), AttributeProto::float("alpha", 0.5)];
        gemm
    };
    let mut identity = transpose("w", "same");
    identity.attribute = vec![AttributeProto::ints("perm", &[0, 1])];
    let constant = NodeProto {
        attribute: vec![AttributeProto::tensor("value", Tensor::new(&[4, 3], vec![1f32; 12]).to_proto(""))],
        ..node("Constant", &[], &["c"])
    };
    let found = linears_of(&graph(vec![
        transpose("wt", "t"),
        transpose("w", "u"),
        transpose("u", "v"),
        identity,
        constant,
        transpose("c", "ct"),
        node("MatMul", &["x", "t"], &["y0"]),
        gemm("wt", "y1"),
        gemm("u", "y2"),
        node("MatMul", &["x", "v"], &["y3"]),
        node("MatMul", &["x", "same"], &["y4"]),
        node("MatMul", &["x", "ct"], &["y5"]),
    ]));
    let facts: Vec<_> = found
        .iter()
        .map(|l| (l.node_name.as_str(), l.is_stored_out_in(), l.weight.name.as_str(), l.weight.uses, l.alpha))
        .collect();
    assert_eq!(
        facts,
        [
            ("y0", true, "wt", 2, 1.0),
            ("y1", true, "wt", 2, 0.5),
            ("y2", false, "w", 3, 0.5),
            ("y3", false, "w", 3, 1.0),
            ("y4", false, "w", 3, 1.0),
            ("y5", true, "c", 1, 1.0),
        ]
    );
    assert!(found.iter().all(|l| (l.in_features, l.out_features) == (3, 4) && l.adaptable.is_ok()));
    assert_eq!(found[5].weight.source, Source::ConstantNode { scope: vec![], node: 4 });
    assert_eq!(found[3].weight.via.iter().map(|s| s.node).collect::<Vec<_>>(), [1, 2]);
}

/// F12: in one branch `v` is an activation, in the other a constant.
#[test]
fn names_are_looked_up_per_branch() {
    let branch = |nodes, constant: bool| GraphProto {
        node: nodes,
        initializer: if constant { vec![Tensor::new(&[3, 4], vec![1f32; 12]).to_proto("v")] } else { vec![] },
        ..Default::default()
    };
    let product = || node("MatMul", &["x", "v"], &["y"]);
    let then = branch(vec![node("Relu", &["x"], &["v"]), product(), node("MatMul", &["x", "w"], &["z"])], false);
    let mut choice = node("If", &["condition"], &["out"]);
    choice.attribute = vec![
        AttributeProto::graph("then_branch", then),
        AttributeProto::graph("else_branch", branch(vec![product()], true)),
    ];
    let found = linears_of(&graph(vec![choice]));
    let facts: Vec<_> = found.iter().map(|l| (l.scope.clone(), l.node, l.weight.source.clone())).collect();
    assert_eq!(
        facts,
        [
            (vec![(0, 0)], 2, Source::Initializer { scope: vec![], index: 0 }),
            (vec![(0, 1)], 0, Source::Initializer { scope: vec![(0, 1)], index: 0 }),
        ]
    );
}

/// F1, F2: one weight, two modules, or one module called twice.
#[test]
fn one_weight_may_be_two_modules_or_two_calls() {
    let layer = |name, y| named(node("MatMul", &["x", "w"], &[y]), name);
    let found = linears_of(&graph(vec![
        layer("/layers.0/linear1/MatMul", "a"),
        layer("/layers.1/linear1/MatMul", "b"),
        layer("/layers.1_1/linear1/MatMul", "c"),
        layer("/layers.1_1_1/linear1/MatMul", "d"),
    ]));
    let facts: Vec<_> = found.iter().map(|l| (l.path.as_str(), l.rule)).collect();
    assert_eq!(
        facts,
        [
            ("layers.0.linear1", NameRule::Node),
            ("layers.1.linear1", NameRule::Node),
            ("layers.1.linear1", NameRule::Call),
            ("layers.1.linear1", NameRule::Call),
        ]
    );
}

#[test]
fn parameter_paths_tell_weights_apart_and_are_plain() {
    let layer = |name, w, y| named(node("MatMul", &["x", w], &[y]), name);
    let mut twice = graph(vec![
        layer("/m/MatMul", "w", "a"),
        layer("/m/MatMul_1", "v", "b"),
        layer("a b:0", "w", "c"),
        layer("a b/0", "v", "d"),
        layer("a b_0", "v", "e"),
        layer("", "v", "out:1"),
    ]);
    twice.initializer.push(Tensor::new(&[3, 4], vec![0f32; 12]).to_proto("v"));
    let found = linears_of(&twice);
    assert_paths_are_consistent(&found);
    let paths: Vec<_> = found.iter().map(|l| l.path.as_str()).collect();
    assert_eq!(paths, ["m.MatMul", "m.MatMul_1", "a_b_0", "a_b.0", "a_b_0_2", "out_1"]);
    assert_eq!(found[1].module.as_deref(), Some("m"));
}

#[test]
fn int8_weights_written_as_plain_operators_are_reported() {
    let mut cast = node("Cast", &["q"], &["f"]);
    cast.attribute = vec![AttributeProto::int("to", DataType::Float as i64)];
    let mut quantized = graph(vec![
        cast,
        node("Mul", &["scale", "f"], &["d"]),
        node("MatMul", &["x", "d"], &["y"]),
        node("Add", &["y", "bias"], &["z"]),
    ]);
    quantized.initializer.push(Tensor::new(&[3, 4], vec![1i8; 12]).to_proto("q"));
    quantized.initializer.push(Tensor::new(&[1, 4], vec![1f32; 4]).to_proto("scale"));
    quantized.initializer.push(Tensor::new(&[4], vec![1f32; 4]).to_proto("bias"));
    let found = linears_of(&quantized);
    assert_eq!(found[0].weight.name, "q");
    assert_eq!(found[0].data_type, DataType::Int8);
    let bias = found[0].bias.as_ref().unwrap();
    assert_eq!((bias.name.as_str(), bias.node, bias.input, bias.uses), ("bias", 3, 1, 1));
    assert_eq!(bias.source, Source::Initializer { scope: vec![], index: 4 });
    assert_eq!((found[0].element, &found[0].adaptable), (DataType::Float, &Ok(())));
    let quantized = found[0].quantized.as_ref().unwrap();
    assert_eq!(quantized.describe(), "int8, per channel (Cast and Mul)");
    // Scaled twice: an adapter may stand beside it, but what the integers stand for is not looked into.
    let mut twice = quantized.clone();
    twice.scheme = Err(String::new());
    assert_eq!(twice.describe(), "int8 (Cast and Mul)");
}

#[test]
fn weights_of_any_floating_type_take_an_adapter_and_integers_do_not() {
    for (data_type, takes) in
        [(DataType::Float16, true), (DataType::Bfloat16, true), (DataType::Double, true), (DataType::Int32, false)]
    {
        let mut stored = graph(vec![node("MatMul", &["x", "v"], &["y"])]);
        stored.initializer.push(Tensor::zeros(data_type, &[3, 4]).unwrap().to_proto("v"));
        let [layer] = linears_of(&stored).try_into().unwrap();
        assert_eq!(layer.adaptable.is_ok(), takes, "{data_type:?}: {:?}", layer.adaptable);
        assert!(takes || layer.adaptable.unwrap_err().contains("is int32, and only float32"));
    }
}

#[test]
fn a_residual_sum_is_no_bias() {
    let mut sums = graph(vec![
        node("MatMul", &["x", "w"], &["y"]),
        node("Add", &["row", "y"], &["z"]),
        node("MatMul", &["x", "w"], &["y2"]),
        node("Add", &["y2", "z"], &["z2"]),
    ]);
    sums.initializer.push(Tensor::new(&[1, 4], vec![1f32; 4]).to_proto("row"));
    assert!(linears_of(&sums).iter().all(|l| l.bias.is_none()));
}

#[test]
fn broken_graphs_do_no_harm() {
    let shape = |name: &str, dims: &[i64]| crate::onnx::TensorProto {
        name: Some(name.into()),
        dims: dims.to_vec(),
        data_type: Some(1),
        ..Default::default()
    };
    let mut n_bits =
        NodeProto { domain: Some("com.microsoft".into()), ..node("MatMulNBits", &["x", "hugeint", "huge"], &["q"]) };
    n_bits.attribute = ["K", "N", "block_size"].map(|name| AttributeProto::int(name, i64::MAX)).to_vec();
    let mut broken = graph(vec![
        node("MatMul", &[], &[]),
        node("MatMul", &["x"], &["a"]),
        node("Gemm", &["x", ""], &["b"]),
        node("MatMul", &["x", "nowhere"], &["c"]),
        node("Identity", &["loop2"], &["loop1"]),
        node("Identity", &["loop1"], &["loop2"]),
        node("MatMul", &["x", "loop1"], &["d"]),
        node("Transpose", &[], &["t"]),
        node("MatMul", &["x", "t"], &["e"]),
        node("Constant", &[], &["k"]),
        node("MatMul", &["x", "k"], &["f"]),
        node("MatMul", &["x", "negative"], &["g"]),
        node("MatMul", &["x", "vector"], &["h"]),
        node("MatMul", &["x", "huge"], &["i"]),
        node("MatMul", &["x", "empty"], &["j"]),
        node("MatMul", &["x", "batched"], &["l"]),
        node("Reshape", &["huge", "w"], &["r"]),
        node("MatMul", &["x", "r"], &["m"]),
        node("MatMulInteger", &["x", "hugeint"], &["n"]),
        node("QLinearMatMul", &["x", "s", "z", "hugeint", "huge", "huge"], &["o"]),
        node("DequantizeLinear", &["hugeint", "huge"], &["dq"]),
        node("MatMul", &["x", "dq"], &["p"]),
        n_bits,
    ]);
    broken.initializer.extend([
        shape("negative", &[-3, 4]),
        shape("vector", &[3]),
        shape("huge", &[i64::MAX, i64::MAX]),
        shape("empty", &[0, 4]),
        shape("batched", &[2, 3, 4]),
        crate::onnx::TensorProto { data_type: Some(DataType::Int8 as i32), ..shape("hugeint", &[i64::MAX, i64::MAX]) },
    ]);
    let found = linears_of(&broken);
    let facts: Vec<_> = found.iter().map(|l| (l.node_name.as_str(), l.adaptable.is_ok())).collect();
    assert_eq!(facts, ["i", "j", "l", "n", "o", "p", "q"].map(|name| (name, false)));
}

/// A hundred thousand nodes on one weight, or of one name, take no quadratic time.
#[test]
fn many_alike_are_quick() {
    let layer =
        |i: usize| named(node("MatMul", &["x", "w"], &[&format!("y{i}")]), &format!("/l_{}/MatMul", i + 100_000));
    let started = std::time::Instant::now();
    let found = linears_of(&graph((0..100_000).map(layer).collect()));
    assert_eq!(found.len(), 100_000);
    let constant = |i: usize| NodeProto {
        attribute: vec![AttributeProto::tensor("value", Tensor::new(&[3, 4], vec![1f32; 12]).to_proto(""))],
        ..node("Constant", &[], &[&format!("c{i}")])
    };
    let layer = |i: usize| named(node("MatMul", &["x", &format!("c{i}")], &[&format!("y{i}")]), "alike");
    let found = linears_of(&graph((0..50_000).flat_map(|i| [constant(i), layer(i)]).collect()));
    assert_eq!(found.iter().map(|l| &l.path).collect::<BTreeSet<_>>().len(), 50_000);
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}
