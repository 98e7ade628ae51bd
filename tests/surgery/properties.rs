//! DESIGN section 3: invariants 1, 2, 3, 9 and 10 on random models.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::adapter::{BoneConfig, InitWeights, TargetModules};
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor, node, value_info};
use bone_onnx::unload::unload;
use prost::Message;

use crate::common::{files, run, worst};
use crate::random_models::{Plan, build, inputs, on_models, write};

fn options(r: usize, init: InitWeights) -> InjectOptions {
    let target_modules = Some(TargetModules::Pattern("all-linear".into()));
    InjectOptions {
        config: BoneConfig { r, init_weights: init, target_modules, ..Default::default() },
        seed: 3,
        ..Default::default()
    }
}

fn inject_to(dir: &Path, plan: &Plan, init: InitWeights) -> Model {
    let base = Model::open(dir.join("base.onnx")).expect("the base");
    let injected = inject(&base, &options(plan.r, init)).expect("an injection");
    assert_eq!(injected.summary.left_out.len(), 0);
    write(&base, injected.patch, &dir.join("injected.onnx"));
    Model::open(dir.join("injected.onnx")).expect("the injected model")
}

#[test]
fn invariant_1_unload_gives_back_the_very_bytes() {
    on_models(200, |plan, dir| {
        let injected = inject_to(dir, plan, InitWeights::Random);
        write(&injected, unload(&injected).expect("unload"), &dir.join("back.onnx"));
        let read = |name: &str| std::fs::read(dir.join(name)).expect("a file");
        assert_ne!(read("injected.onnx"), read("base.onnx"));
        assert_eq!(read("back.onnx"), read("base.onnx"));
    });
}

#[test]
fn invariant_1_holds_for_two_adapters() {
    on_models(60, |plan, dir| {
        let first = inject_to(dir, plan, InitWeights::Random);
        let more = InjectOptions { adapter_name: "second".into(), ..options(plan.r, InitWeights::Random) };
        let again = inject(&first, &more).expect("a second adapter");
        write(&first, again.patch, &dir.join("both.onnx"));
        let both = Model::open(dir.join("both.onnx")).expect("a model");
        write(&both, unload(&both).expect("unload"), &dir.join("back.onnx"));
        assert_eq!(std::fs::read(dir.join("back.onnx")).expect("a file"), build(plan));
    });
}

#[test]
fn invariant_2_a_zero_adapter_changes_nothing() {
    on_models(40, |plan, dir| {
        inject_to(dir, plan, InitWeights::Zeros);
        let inputs = inputs(plan);
        let (base, injected) = (run(&dir.join("base.onnx"), &inputs), run(&dir.join("injected.onnx"), &inputs));
        for (a, b) in base.iter().zip(&injected) {
            assert!(worst(a, b) <= 1e-6, "off by {}", worst(a, b));
        }
    });
}

#[test]
fn invariant_3_folding_keeps_what_the_injected_model_computes() {
    on_models(80, |plan, dir| {
        let first = inject_to(dir, plan, InitWeights::Random);
        let more = InjectOptions { adapter_name: "second".into(), ..options(plan.r + 1, InitWeights::Random) };
        write(&first, inject(&first, &more).expect("a second adapter").patch, &dir.join("injected.onnx"));
        let injected = Model::open(dir.join("injected.onnx")).expect("a model");
        let merged = dir.join("merged.onnx");
        let summary = fold(&injected, &FoldOptions { safe: true, ..FoldOptions::default() })
            .and_then(|f| f.write(&injected, &merged))
            .expect("a fold");
        assert_eq!(summary.merged.len() + summary.copied.len(), plan.layers.len());
        let inputs = inputs(plan);
        let (a, b) = (run(&dir.join("injected.onnx"), &inputs), run(&merged, &inputs));
        assert!(worst(&a[0], &b[0]) <= 1e-5, "off by {}", worst(&a[0], &b[0]));
        // A weight that leaves the graph as an output is a result of the base, not of the adapter.
        for (a, b) in a.iter().zip(&b).skip(1) {
            assert_eq!(a, b);
        }
        let merged = Model::open(&merged).expect("a model");
        assert!(bone_onnx::adapter::Injection::read(&merged).expect("metadata").is_none());
        assert!(!merged.graph().initializer.iter().any(|t| t.name().contains("bone")));
    });
}

#[test]
fn folding_one_of_two_adapters_is_injecting_that_one_alone() {
    on_models(30, |plan, dir| {
        let base = Model::open(dir.join("base.onnx")).expect("the base");
        let named = |name: &str, seed| InjectOptions {
            adapter_name: name.into(),
            seed,
            ..options(plan.r, InitWeights::Random)
        };
        let both = dir.join("both.onnx");
        write(&base, inject(&base, &named("first", 1)).expect("an adapter").patch, &both);
        let model = Model::open(&both).expect("a model");
        write(&model, inject(&model, &named("second", 2)).expect("an adapter").patch, &both);
        let model = Model::open(&both).expect("a model");
        for (name, seed) in [("first", 1), ("second", 2)] {
            let (alone, merged) = (dir.join("alone.onnx"), dir.join("merged.onnx"));
            write(&base, inject(&base, &named(name, seed)).expect("an adapter").patch, &alone);
            let chosen = FoldOptions { safe: true, adapters: Some(vec![name.into()]), ..FoldOptions::default() };
            fold(&model, &chosen).and_then(|f| f.write(&model, &merged)).expect("a fold");
            let inputs = inputs(plan);
            let (a, b) = (run(&alone, &inputs), run(&merged, &inputs));
            assert!(worst(&a[0], &b[0]) <= 1e-5, "{name}: off by {}", worst(&a[0], &b[0]));
        }
    });
}

#[test]
fn two_calls_of_one_module_with_different_alpha_fold_right() {
    let dir = tempfile::tempdir().expect("a directory");
    let square = |scale: f32| Tensor::new::<f32>(&[3, 3], (0..9).map(|i| (i as f32 - 4.0) * scale).collect());
    let mut graph = GraphProto { name: Some("twice".into()), ..Default::default() };
    graph.input.push(value_info("x", DataType::Float, &["n", "3"]));
    graph.output.push(value_info("z", DataType::Float, &["n", "3"]));
    graph.initializer.push(square(0.1).to_proto("lin.weight"));
    for (x, y, name, alpha) in [("x", "y", "/lin/Gemm", 0.5), ("y", "z", "/lin_1/Gemm_1", 2.0)] {
        let mut gemm = node("Gemm", &[x, "lin.weight"], &[y]);
        gemm.attribute = vec![AttributeProto::float("alpha", alpha)];
        gemm.name = Some(name.into());
        graph.node.push(gemm);
    }
    let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
    let proto = ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() };
    let (base, injected, merged) =
        (dir.path().join("base.onnx"), dir.path().join("injected.onnx"), dir.path().join("merged.onnx"));
    std::fs::write(&base, proto.encode_to_vec()).expect("a file");
    let model = Model::open(&base).expect("the base");
    write(&model, inject(&model, &options(2, InitWeights::Random)).expect("an injection").patch, &injected);
    let model = Model::open(&injected).expect("a model");
    fold(&model, &FoldOptions::default()).and_then(|f| f.write(&model, &merged)).expect("a fold");
    let inputs = BTreeMap::from([("x".to_string(), square(0.3))]);
    let (a, b) = (run(&injected, &inputs), run(&merged, &inputs));
    assert!(worst(&a[0], &b[0]) <= 1e-5, "off by {}", worst(&a[0], &b[0]));
}

#[test]
fn invariant_9_an_output_is_whole_or_not_there_and_may_be_the_input() {
    on_models(30, |plan, dir| {
        let path = dir.join("base.onnx");
        let base = Model::open(&path).expect("the base");
        write(&base, inject(&base, &options(plan.r, InitWeights::Random)).expect("an injection").patch, &path);
        let injected = Model::open(&path).expect("injected in place");
        write(&injected, unload(&injected).expect("unload"), &path);
        assert_eq!(std::fs::read(&path).expect("a file"), build(plan));
        assert_eq!(files(dir), ["base.onnx"]);
    });
}

#[test]
fn invariant_9_a_refused_fold_leaves_everything_as_it_was() {
    on_models(10, |plan, dir| {
        inject_to(dir, plan, InitWeights::Zeros);
        let path = dir.join("injected.onnx");
        // One infinity in one block.
        let mut proto = ModelProto::decode(std::fs::read(&path).expect("a file").as_slice()).expect("a model");
        let graph = proto.graph.as_mut().expect("a graph");
        let block = graph.initializer.iter_mut().find(|t| t.name().contains("miss_block")).expect("a block");
        let mut raw = block.raw_data.take().expect("raw data").to_vec();
        raw[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        block.raw_data = Some(raw.into());
        std::fs::write(&path, proto.encode_to_vec()).expect("a file");
        std::fs::write(dir.join("out.onnx"), b"precious").expect("a file");

        let model = Model::open(&path).expect("a model");
        let out = dir.join("out.onnx");
        let refused =
            fold(&model, &FoldOptions { safe: true, ..FoldOptions::default() }).and_then(|f| f.write(&model, &out));
        let message = refused.expect_err("a refusal").to_string();
        assert!(message.contains("default") && message.contains("block."), "{message}");
        assert_eq!(std::fs::read(&out).expect("a file"), b"precious");
        assert_eq!(files(dir), ["base.onnx", "injected.onnx", "out.onnx"]);
    });
}

#[test]
fn invariant_10_same_input_same_flags_same_bytes() {
    on_models(30, |plan, dir| {
        let bytes = || {
            let injected = inject_to(dir, plan, InitWeights::Random);
            let out = dir.join("merged.onnx");
            fold(&injected, &FoldOptions::default()).and_then(|f| f.write(&injected, &out)).expect("a fold");
            (std::fs::read(dir.join("injected.onnx")).expect("a file"), std::fs::read(out).expect("a file"))
        };
        assert_eq!(bytes(), bytes());
    });
}
