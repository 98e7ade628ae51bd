//! float64 models: adapters beside their layers compute in float64, and folding keeps it.

use std::collections::BTreeMap;

use bone_onnx::adapter::{BoneConfig, InitWeights, TargetModules};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor, node, value_info};
use bone_onnx::unload::unload;
use prost::Message;

use crate::common::{run, worst};

fn doubles(dims: &[usize], seed: usize) -> Tensor {
    let len: usize = dims.iter().product();
    Tensor::new(dims, (0..len).map(|i| ((i * 7919 + seed * 104_729) % 997) as f64 / 498.5 - 1.0).collect())
}

/// x → Gemm (transposed, scaled, with a bias) → Tanh → MatMul → y.
fn network() -> Vec<u8> {
    let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
    graph.input.push(value_info("x", DataType::Double, &["n", "6"]));
    graph.output.push(value_info("y", DataType::Double, &["n", "4"]));
    graph.initializer = vec![
        doubles(&[8, 6], 1).to_proto("lin0.weight"),
        doubles(&[8], 2).to_proto("lin0.bias"),
        doubles(&[8, 4], 3).to_proto("onnx::MatMul_9"),
    ];
    let mut gemm = node("Gemm", &["x", "lin0.weight", "lin0.bias"], &["h"]);
    gemm.attribute = vec![AttributeProto::int("transB", 1), AttributeProto::float("alpha", 0.5)];
    gemm.name = Some("/lin0/Gemm".into());
    let mut product = node("MatMul", &["a", "onnx::MatMul_9"], &["y"]);
    product.name = Some("/lin1/MatMul".into());
    graph.node = vec![gemm, node("Tanh", &["h"], &["a"]), product];
    let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
    ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() }.encode_to_vec()
}

#[test]
fn adapters_beside_and_in_the_weights_agree_to_the_last_digits() {
    // An additive adapter adds its float32 numbers exactly. BAT multiplies in float32, in the graph and in the fold.
    for (init, bound) in [(InitWeights::Random, 1e-14), (InitWeights::Mini, 1e-14), (InitWeights::Bat, 1e-6)] {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("base.onnx"), network()).expect("a file");
        let base = Model::open(at("base.onnx")).expect("a model");
        let config = BoneConfig {
            r: 2,
            mini_r: 2,
            init_weights: init,
            target_modules: Some(TargetModules::parse("all-linear")),
            ..Default::default()
        };
        let injection = inject(&base, &InjectOptions { config, ..Default::default() }).expect("an injection");
        assert_eq!(injection.summary.targets.len(), 2);
        injection.write(&base, &at("injected.onnx")).expect("a file");
        // Blocks that start at zero are given numbers.
        let mut proto =
            ModelProto::decode(std::fs::read(at("injected.onnx")).expect("a file").as_slice()).expect("a model");
        for block in &mut proto.graph.as_mut().expect("a graph").initializer {
            if block.name().contains("_block.") {
                let values = (0..block.raw_data().len() / 4).flat_map(|i| ((i % 7) as f32 / 20.0 - 0.1).to_le_bytes());
                block.raw_data = Some(values.collect::<Vec<u8>>().into());
            }
        }
        std::fs::write(at("injected.onnx"), proto.encode_to_vec()).expect("a file");
        let model = Model::open(at("injected.onnx")).expect("a model");
        let merged = at("merged.onnx");
        let summary = fold(&model, &FoldOptions { safe: true, ..FoldOptions::default() })
            .and_then(|f| f.write(&model, &merged))
            .expect("a fold");
        assert_eq!(summary.merged.len(), 2);
        model
            .write(model.patched(unload(&model).expect("unload")).expect("a patch"), &at("back.onnx"))
            .expect("a file");
        assert_eq!(std::fs::read(at("back.onnx")).expect("a file"), network());
        let inputs = BTreeMap::from([("x".to_string(), doubles(&[3, 6], 4))]);
        let [base, injected, merged] =
            ["base.onnx", "injected.onnx", "merged.onnx"].map(|f| run(&at(f), &inputs).remove(0));
        assert_eq!(merged.data_type(), DataType::Double);
        assert!(worst(&base, &injected) > 1e-2, "{init:?}");
        assert!(worst(&injected, &merged) <= bound, "{init:?}: off by {}", worst(&injected, &merged));
    }
}
