//! Quantised models in each scheme: found, injected, unloaded, folded in each way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bone_onnx::adapter::{BoneConfig, FOLDED_KEY, InitWeights, Injection, TargetModules};
use bone_onnx::base::Base;
use bone_onnx::engine::LoadOptions;
use bone_onnx::fold::{FoldOptions, FoldSummary, QuantizedFold, fold};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::select::linears;
use bone_onnx::unload::unload;

use crate::common::{engine, run, worst};

/// A model of `fixtures/quantized`: how its layers are described, and how far folding may move its outputs.
struct Scheme {
    name: &'static str,
    how: &'static str,
    /// The adapter in the weight against the adapter beside it, in floating point. Where activations are quantised, the
    /// base rounds what goes into the product (a step of 0.012 to 0.03 here), and the branch does not. So does ONNX
    /// Runtime where it makes a MatMulNBits of a DequantizeLinear of 4 bits and a MatMul.
    dequantized: f64,
    /// The layers that fold to floating point, and those that are quantised again.
    layers: (usize, usize),
}

const SCHEMES: [Scheme; 17] = [
    Scheme { name: "cast_mul", how: "int8, per channel (Cast and Mul)", dequantized: 1e-5, layers: (2, 2) },
    Scheme {
        name: "cast_sub_mul",
        how: "uint8, per channel (Cast and Sub and Mul)",
        dequantized: 1e-5,
        layers: (2, 2),
    },
    Scheme { name: "dynamic", how: "int8, per channel (MatMulInteger)", dequantized: 0.1, layers: (2, 2) },
    Scheme {
        name: "dynamic_optimized",
        how: "int8, per channel (DynamicQuantizeMatMul)",
        dequantized: 0.1,
        layers: (2, 2),
    },
    Scheme { name: "dynamic_u8", how: "uint8, per tensor (MatMulInteger)", dequantized: 0.1, layers: (2, 2) },
    Scheme {
        name: "dynamic_u8_optimized",
        how: "uint8, per tensor (DynamicQuantizeMatMul)",
        dequantized: 0.1,
        layers: (2, 2),
    },
    Scheme { name: "int4", how: "int4, in blocks of 16 (DequantizeLinear)", dequantized: 0.05, layers: (2, 2) },
    Scheme {
        name: "integer_to_float",
        how: "int8, per channel (MatMulIntegerToFloat)",
        dequantized: 0.1,
        layers: (2, 2),
    },
    Scheme { name: "nbits4", how: "uint4, in blocks of 32 (MatMulNBits)", dequantized: 1e-5, layers: (2, 2) },
    Scheme { name: "nbits4_zero", how: "uint4, in blocks of 16 (MatMulNBits)", dequantized: 1e-5, layers: (2, 2) },
    Scheme { name: "nbits8", how: "uint8, in blocks of 32 (MatMulNBits)", dequantized: 1e-5, layers: (2, 2) },
    Scheme { name: "qdq", how: "int8, per channel (DequantizeLinear)", dequantized: 0.1, layers: (2, 2) },
    Scheme { name: "qdq_optimized", how: "int8, per channel (QLinearMatMul)", dequantized: 0.1, layers: (2, 2) },
    Scheme { name: "qdq_u8", how: "uint8, per tensor (DequantizeLinear)", dequantized: 0.1, layers: (2, 2) },
    Scheme { name: "qgemm", how: "int8, per tensor (QGemm)", dequantized: 0.1, layers: (0, 2) },
    Scheme { name: "qoperator", how: "int8, per tensor (QLinearMatMul)", dequantized: 0.1, layers: (1, 2) },
    Scheme { name: "uint4", how: "uint4, in blocks of 16 (DequantizeLinear)", dequantized: 0.05, layers: (2, 2) },
];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantized").join(format!("{name}.onnx"))
}

fn options(init: InitWeights, r: usize) -> InjectOptions {
    let target_modules = Some(TargetModules::Pattern("all-linear".into()));
    InjectOptions {
        config: BoneConfig { r, init_weights: init, target_modules, ..Default::default() },
        ..Default::default()
    }
}

fn injected(name: &str, dir: &Path, init: InitWeights) -> Model {
    let base = Model::open(path(name)).expect("a model");
    let out = dir.join("injected.onnx");
    let summary = inject(&base, &options(init, 7)).expect(name).write(&base, &out).expect(name);
    assert_eq!(summary.targets.len(), 2, "{name}: {:?}", summary.left_out);
    Model::open(out).expect("a model")
}

/// Numbers of the quantisers' range, like those they were calibrated with.
fn inputs(name: &str) -> BTreeMap<String, Tensor> {
    let dims: &[usize] = if name.starts_with("qgemm") { &[6, 40] } else { &[2, 3, 40] };
    let x = (0..240).map(|i| ((i * 7919 % 241) as f32 / 120.0 - 1.0) * 0.75).collect();
    BTreeMap::from([("x".to_string(), Tensor::new(dims, x))])
}

fn folded(model: &Model, quantized: QuantizedFold, out: &Path) -> FoldSummary {
    let options = FoldOptions { quantized, safe: true, ..FoldOptions::default() };
    fold(model, &options).and_then(|f| f.write(model, out)).expect("a fold")
}

#[test]
fn each_scheme_is_found_and_described() {
    for scheme in SCHEMES {
        let found = linears(&Model::open(path(scheme.name)).expect("a model"));
        assert_eq!(found.len(), 2, "{}", scheme.name);
        for linear in &found {
            assert_eq!(linear.adaptable, Ok(()), "{}", scheme.name);
            let quantized = linear.quantized.as_ref().expect("a quantised layer");
            assert_eq!(quantized.describe(), scheme.how, "{}: {:?}", scheme.name, quantized.scheme);
        }
        let sizes: Vec<_> = found.iter().map(|l| (l.in_features, l.out_features)).collect();
        assert_eq!(sizes, [(40, 48), (48, 6)], "{}", scheme.name);
        let names: Vec<_> = found.iter().map(|l| l.module.as_deref()).collect();
        assert_eq!(names, [Some("lin0"), Some("lin1")], "{}", scheme.name);
    }
}

#[test]
fn unload_gives_back_the_very_bytes() {
    for scheme in SCHEMES {
        let dir = tempfile::tempdir().expect("a directory");
        let model = injected(scheme.name, dir.path(), InitWeights::Random);
        let back = dir.path().join("back.onnx");
        model.write(model.patched(unload(&model).expect(scheme.name)).expect("a patch"), &back).expect("a file");
        let read = |path: &Path| std::fs::read(path).expect("a file");
        assert!(read(&back) == read(&path(scheme.name)), "{}", scheme.name);
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_random_one_does() {
    for scheme in SCHEMES {
        let dir = tempfile::tempdir().expect("a directory");
        let inputs = inputs(scheme.name);
        let base = run(&path(scheme.name), &inputs);
        injected(scheme.name, dir.path(), InitWeights::Zeros);
        let zero = run(&dir.path().join("injected.onnx"), &inputs);
        // A branch keeps ONNX Runtime from fusing the quantiser behind it into the product: one rounding less or more.
        let fused = if scheme.name.starts_with('q') { 0.04 } else { 1e-5 };
        assert!(worst(&base[0], &zero[0]) <= fused, "{}: {}", scheme.name, worst(&base[0], &zero[0]));
        injected(scheme.name, dir.path(), InitWeights::Random);
        let random = run(&dir.path().join("injected.onnx"), &inputs);
        assert!(worst(&base[0], &random[0]) > 0.05, "{}: {}", scheme.name, worst(&base[0], &random[0]));
    }
}

#[test]
fn a_fold_keeps_the_branch_as_plain_nodes() {
    for scheme in SCHEMES {
        let dir = tempfile::tempdir().expect("a directory");
        let model = injected(scheme.name, dir.path(), InitWeights::Random);
        let merged = dir.path().join("merged.onnx");
        let summary = folded(&model, QuantizedFold::Keep, &merged);
        assert_eq!(summary.kept, ["lin0", "lin1"], "{}", scheme.name);
        let inputs = inputs(scheme.name);
        let (a, b) = (run(&dir.path().join("injected.onnx"), &inputs), run(&merged, &inputs));
        assert_eq!(a, b, "{}", scheme.name);
        let merged = Model::open(&merged).expect("a model");
        assert!(Injection::read(&merged).expect("metadata").is_none());
        assert!(merged.metadata(FOLDED_KEY).expect("a note").contains("lin1"));
        // The branch is no layer, and the model takes a new adapter as its base did.
        let base = Base::of(&merged, None).expect("a base");
        assert_eq!(base.linears().len(), 2, "{}", scheme.name);
        let summary = inject(&merged, &options(InitWeights::Zeros, 2)).expect("an injection").summary;
        assert_eq!(summary.targets.len(), 2, "{}", scheme.name);
    }
}

#[test]
fn a_fold_to_floats_computes_what_the_branch_does() {
    for scheme in SCHEMES {
        let dir = tempfile::tempdir().expect("a directory");
        let model = injected(scheme.name, dir.path(), InitWeights::Random);
        let merged = dir.path().join("merged.onnx");
        let summary = folded(&model, QuantizedFold::Dequantize, &merged);
        assert_eq!(summary.dequantized.len(), scheme.layers.0, "{}: {:?}", scheme.name, summary.warnings);
        assert_eq!(summary.kept.len(), 2 - scheme.layers.0, "{}", scheme.name);
        let inputs = inputs(scheme.name);
        let (a, b) = (run(&dir.path().join("injected.onnx"), &inputs), run(&merged, &inputs));
        assert!(worst(&a[0], &b[0]) <= scheme.dequantized, "{}: off by {}", scheme.name, worst(&a[0], &b[0]));
        let merged = Model::open(&merged).expect("a model");
        if summary.kept.is_empty() {
            // What read the integers is gone, and they are.
            let ops: Vec<&str> = merged.graph().node.iter().map(|n| n.op_type()).collect();
            assert_eq!(ops.iter().filter(|op| **op == "MatMul").count(), 2, "{}: {ops:?}", scheme.name);
            let left: Vec<&str> =
                merged.graph().initializer.iter().map(|t| t.name()).filter(|n| n.contains("weight")).collect();
            assert_eq!(left, ["lin0.weight.merged", "lin1.weight.merged"], "{}", scheme.name);
        }
    }
}

#[test]
fn a_fold_that_quantises_again_says_what_it_cost() {
    for scheme in SCHEMES {
        let dir = tempfile::tempdir().expect("a directory");
        let model = injected(scheme.name, dir.path(), InitWeights::Random);
        let merged = dir.path().join("merged.onnx");
        let summary = folded(&model, QuantizedFold::Requantize, &merged);
        assert_eq!(summary.requantized.len(), scheme.layers.1, "{}: {:?}", scheme.name, summary.warnings);
        let again = Model::open(&merged).expect("a model");
        // The same operators on the same names: only values changed.
        let ops = |model: &Model| model.graph().node.iter().map(|n| n.op_type().to_string()).collect::<Vec<_>>();
        assert_eq!(ops(&again), ops(&Model::open(path(scheme.name)).expect("a model")), "{}", scheme.name);
        let inputs = inputs(scheme.name);
        let (a, b) = (run(&dir.path().join("injected.onnx"), &inputs), run(&merged, &inputs));
        let size = a[0].to_f64().iter().fold(0f64, |m, v| m.max(v.abs()));
        let error = summary.requantized.iter().map(|l| l.error).fold(0f64, f64::max);
        // A random adapter is as large as the weight: grids that cannot move lose more.
        let bound = if error > 0.2 { 1.0 } else { 6.0 * error * size + scheme.dequantized };
        assert!(worst(&a[0], &b[0]) <= bound, "{}: off by {} of {size}", scheme.name, worst(&a[0], &b[0]));
    }
}

#[test]
fn bat_works_where_the_weight_is_there_in_floats_and_is_refused_elsewhere() {
    for scheme in SCHEMES {
        let base = Model::open(path(scheme.name)).expect("a model");
        let in_floats = ["cast", "int4", "uint4", "qdq", "qdq_u8"].iter().any(|n| scheme.name.starts_with(n))
            && scheme.name != "qdq_optimized";
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("injected.onnx");
        match inject(&base, &options(InitWeights::Bat, 2)) {
            Ok(injection) => {
                assert!(in_floats, "{}", scheme.name);
                injection.write(&base, &out).expect("a file");
                let (a, b) = (run(&path(scheme.name), &inputs(scheme.name)), run(&out, &inputs(scheme.name)));
                let fused = if scheme.dequantized > 1e-5 { 0.04 } else { 1e-5 };
                assert!(worst(&a[0], &b[0]) <= fused, "{}: {}", scheme.name, worst(&a[0], &b[0]));
            }
            Err(refusal) => {
                assert!(!in_floats, "{}: {refusal}", scheme.name);
                assert!(refusal.to_string().contains("reads it as integers"), "{refusal}");
            }
        }
    }
}

/// What the model computes as it is written: ONNX Runtime's optimizer may make a MatMulNBits of a DequantizeLinear and a
/// MatMul, which rounds its input to 8 bits.
fn unoptimized(path: &Path, inputs: &BTreeMap<String, Tensor>) -> Tensor {
    let model = Model::open(path).expect("a model");
    let options = LoadOptions { threads: Some(1), optimize: false };
    let mut session = engine().load(&model.proto, &options).expect("a session");
    session.run(&[("x", &inputs["x"])], &["y"]).expect("a run").remove(0)
}

/// DequantizeLinear in all the ways that it is written: per tensor, along either axis, in blocks along either axis, with
/// and without zero points, turned behind it or by Gemm.
#[test]
fn every_layout_of_dequantize_linear_is_read_as_onnx_runtime_reads_it() {
    use bone_onnx::onnx::proto::OperatorSetIdProto;
    use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, ModelProto, node, value_info};
    use prost::Message;
    let (inputs, outputs) = (7usize, 5usize);
    let mut cases = 0;
    for stored_out_in in [false, true] {
        for gemm in [false, true] {
            for zero in [false, true] {
                // Axis and block size; no axis: one scale for all.
                for (axis, block) in [(None, 0usize), (Some(0usize), 0), (Some(1), 0), (Some(0), 3), (Some(1), 4)] {
                    let dims = if stored_out_in { [outputs, inputs] } else { [inputs, outputs] };
                    let scales: Vec<usize> = match (axis, block) {
                        (None, _) => vec![],
                        (Some(axis), 0) => vec![dims[axis]],
                        (Some(axis), block) => {
                            let mut scales = dims.to_vec();
                            scales[axis] = dims[axis].div_ceil(block);
                            scales
                        }
                    };
                    let count: usize = scales.iter().product();
                    let bytes = |n: usize, by: usize| (0..n).map(|i| ((i * by) % 251) as u8).collect::<Vec<u8>>();
                    let mut graph = GraphProto { name: Some("layer".into()), ..Default::default() };
                    graph.input.push(value_info("x", DataType::Float, &["n", "7"]));
                    graph.output.push(value_info("y", DataType::Float, &["n", "5"]));
                    graph.initializer = vec![
                        Tensor::new(&dims, bytes(35, 89)).to_proto("w"),
                        Tensor::new(&scales, (0..count).map(|i| 0.004 + 0.001 * i as f32).collect()).to_proto("s"),
                    ];
                    let mut operands = vec!["w", "s"];
                    if zero {
                        graph.initializer.push(Tensor::new(&scales, bytes(count, 37)).to_proto("z"));
                        operands.push("z");
                    }
                    let mut dequantize = node("DequantizeLinear", &operands, &["d"]);
                    if let Some(axis) = axis {
                        dequantize.attribute = vec![AttributeProto::int("axis", axis as i64)];
                        if block > 0 {
                            dequantize.attribute.push(AttributeProto::int("block_size", block as i64));
                        }
                    }
                    graph.node.push(dequantize);
                    // Gemm turns what is stored as torch does; MatMul needs a Transpose for it, and so does Gemm's other way.
                    let mut matrix = "d";
                    if stored_out_in != gemm {
                        graph.node.push(node("Transpose", &["d"], &["t"]));
                        matrix = "t";
                    }
                    let mut product = node(if gemm { "Gemm" } else { "MatMul" }, &["x", matrix], &["y"]);
                    if gemm {
                        product.attribute = vec![AttributeProto::int("transB", 1)];
                    }
                    product.name = Some("/lin/MatMul".into());
                    graph.node.push(product);
                    let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(21) }];
                    let model =
                        ModelProto { ir_version: Some(10), opset_import, graph: Some(graph), ..Default::default() };
                    let what =
                        format!("out_in {stored_out_in}, gemm {gemm}, zero {zero}, axis {axis:?}, block {block}");

                    let dir = tempfile::tempdir().expect("a directory");
                    let at = |name: &str| dir.path().join(name);
                    let bytes = model.encode_to_vec();
                    std::fs::write(at("base.onnx"), &bytes).expect("a file");
                    let base = Model::open(at("base.onnx")).expect("a model");
                    let injection = inject(&base, &options(InitWeights::Random, 3)).expect(&what);
                    injection.write(&base, &at("injected.onnx")).expect("a file");
                    let model = Model::open(at("injected.onnx")).expect("a model");
                    let back = model.patched(unload(&model).expect("unload")).expect("a patch");
                    model.write(back, &at("back.onnx")).expect("a file");
                    assert_eq!(std::fs::read(at("back.onnx")).expect("a file"), bytes, "{what}");
                    let summary = folded(&model, QuantizedFold::Dequantize, &at("floats.onnx"));
                    assert_eq!(summary.dequantized, ["lin"], "{what}: {:?}", summary.warnings);
                    let summary = folded(&model, QuantizedFold::Requantize, &at("again.onnx"));
                    let error = summary.requantized.first().expect(&what).error;
                    let x = (0..21).map(|i| ((i * 29) % 41) as f32 / 20.0 - 1.0).collect();
                    let given = BTreeMap::from([("x".to_string(), Tensor::new(&[3, 7], x))]);
                    let [want, floats, again] =
                        ["injected.onnx", "floats.onnx", "again.onnx"].map(|f| unoptimized(&at(f), &given));
                    let size = want.to_f64().iter().fold(0f64, |m, v| m.max(v.abs()));
                    assert!(worst(&want, &floats) <= 1e-5 * size, "{what}: off by {}", worst(&want, &floats));
                    assert!(worst(&want, &again) <= 4.0 * error * size, "{what}: off by {}", worst(&want, &again));
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 40);
}
