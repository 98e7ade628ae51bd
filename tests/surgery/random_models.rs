//! Random models: chains of linear layers in every form that injection takes: MatMul and Gemm with each flag, weights
//! in initializers, Constant nodes, behind Transpose and Identity, one weight for several layers, one as a graph
//! output; with fields that no schema knows strewn into the file.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::onnx::proto::{OperatorSetIdProto, StringStringEntryProto};
use bone_onnx::onnx::{
    AttributeProto, DataType, GraphProto, Model, ModelProto, NodeProto, Patch, Tensor, node, value_info,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use prost::Message;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Where a layer's matrix comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Source {
    Initializer,
    Constant,
    Transpose,
    Identity,
    /// The first layer's initializer, where the sizes allow it.
    Tied,
}

#[derive(Debug, Clone)]
pub struct Layer {
    pub gemm: bool,
    pub trans_a: bool,
    pub trans_b: bool,
    pub alpha: f32,
    pub beta: f32,
    pub bias: bool,
    pub width: usize,
    pub source: Source,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub layers: Vec<Layer>,
    pub inputs: usize,
    pub rows: usize,
    pub r: usize,
    pub weight_is_output: bool,
    pub unknown_fields: bool,
    pub seed: u64,
}

fn layer() -> impl Strategy<Value = Layer> {
    let source = prop_oneof![
        3 => Just(Source::Initializer),
        1 => Just(Source::Constant),
        1 => Just(Source::Transpose),
        1 => Just(Source::Identity),
        2 => Just(Source::Tied)
    ];
    let scale = prop_oneof![3 => Just(1.0f32), 1 => Just(0.5f32), 1 => Just(-2.0f32)];
    (any::<bool>(), any::<bool>(), any::<bool>(), scale.clone(), scale, any::<bool>(), 1usize..9, source).prop_map(
        |(gemm, trans_a, trans_b, alpha, beta, bias, width, source)| Layer {
            gemm,
            trans_a,
            trans_b,
            alpha,
            beta,
            bias,
            width,
            source,
        },
    )
}

fn plan() -> impl Strategy<Value = Plan> {
    (prop::collection::vec(layer(), 1..5), 1usize..9, 1usize..4, 1usize..7, any::<bool>(), any::<bool>(), any::<u64>())
        .prop_map(|(layers, inputs, rows, r, weight_is_output, unknown_fields, seed)| Plan {
            layers,
            inputs,
            rows,
            r,
            weight_is_output,
            unknown_fields,
            seed,
        })
}

pub fn build(plan: &Plan) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
    let mut random = |dims: &[usize]| -> Tensor {
        Tensor::new(dims, (0..dims.iter().product()).map(|_| rng.random_range(-1.0f32..1.0)).collect())
    };
    let mut graph = GraphProto { name: Some("chain".into()), doc_string: Some("made up".into()), ..Default::default() };
    graph.input.push(value_info("x", DataType::Float, &["n", &plan.inputs.to_string()]));
    let (mut x, mut width) = ("x".to_string(), plan.inputs);
    let mut first: Option<(String, usize, usize)> = None;
    for (i, layer) in plan.layers.iter().enumerate() {
        let out_in = layer.gemm && layer.trans_b;
        let mut out = layer.width;
        // The matrix as the node reads it: [in, out] or [out, in]; a Transpose in between stores the other one.
        let tied = first
            .as_ref()
            .filter(|(_, a, b)| layer.source == Source::Tied && if out_in { *b == width } else { *a == width });
        let weight = match tied {
            Some((name, a, b)) => {
                out = if out_in { *a } else { *b };
                name.clone()
            }
            None => {
                let name = format!("block.{i}.lin.weight");
                let read = if out_in { [out, width] } else { [width, out] };
                match layer.source {
                    Source::Constant => {
                        let value = random(&read).to_proto(&name);
                        let mut constant = node("Constant", &[], &[&name]);
                        constant.attribute = vec![AttributeProto::tensor("value", value)];
                        graph.node.push(constant);
                        name
                    }
                    Source::Transpose => {
                        graph.initializer.push(random(&[read[1], read[0]]).to_proto(&name));
                        let mut turn = node("Transpose", &[&name], &[&format!("{name}.T")]);
                        turn.attribute = vec![AttributeProto::ints("perm", &[1, 0])];
                        graph.node.push(turn);
                        format!("{name}.T")
                    }
                    Source::Identity => {
                        graph.initializer.push(random(&read).to_proto(&name));
                        graph.node.push(node("Identity", &[&name], &[&format!("{name}.same")]));
                        format!("{name}.same")
                    }
                    Source::Initializer | Source::Tied => {
                        graph.initializer.push(random(&read).to_proto(&name));
                        first.get_or_insert((name.clone(), read[0], read[1]));
                        name
                    }
                }
            }
        };
        let y = format!("y{i}");
        let mut multiply: NodeProto;
        if layer.gemm {
            let mut a = x.clone();
            if layer.trans_a {
                let mut turn = node("Transpose", &[&x], &[&format!("{x}.turned")]);
                turn.attribute = vec![AttributeProto::ints("perm", &[1, 0])];
                graph.node.push(turn);
                a = format!("{x}.turned");
            }
            let mut inputs = vec![a.as_str(), weight.as_str()];
            let bias = format!("block.{i}.lin.bias");
            if layer.bias {
                graph.initializer.push(random(&[out]).to_proto(&bias));
                inputs.push(&bias);
            }
            multiply = node("Gemm", &inputs, &[&y]);
            multiply.attribute = vec![
                AttributeProto::float("alpha", layer.alpha),
                AttributeProto::float("beta", layer.beta),
                AttributeProto::int("transA", i64::from(layer.trans_a)),
                AttributeProto::int("transB", i64::from(layer.trans_b)),
            ];
        } else {
            multiply = node("MatMul", &[&x, &weight], &[&y]);
        }
        multiply.name = Some(format!("/block.{i}/lin/{}", multiply.op_type()));
        multiply.doc_string = Some("a layer".into());
        graph.node.push(multiply);
        let activated = format!("a{i}");
        graph.node.push(node("Tanh", &[&y], &[&activated]));
        (x, width) = (activated, out);
    }
    graph.output.push(value_info(&x, DataType::Float, &["n", &width.to_string()]));
    if plan.weight_is_output
        && let Some((name, a, b)) = &first
    {
        graph.output.push(value_info(name, DataType::Float, &[&a.to_string(), &b.to_string()]));
    }
    let model = ModelProto {
        ir_version: Some(8),
        producer_name: Some("proptest".into()),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        metadata_props: vec![StringStringEntryProto { key: Some("owner".into()), value: Some("somebody".into()) }],
        graph: Some(graph),
        ..Default::default()
    };
    let mut bytes = model.encode_to_vec();
    if plan.unknown_fields {
        // Field 1000 of the model, varint 7: in no version of the schema.
        bytes.extend([0xc0, 0x3e, 7]);
    }
    bytes
}

pub fn write(model: &Model, patch: Patch, path: &Path) {
    model.write(model.patched(patch).expect("a patch"), path).expect("a file");
}

/// Runs `check` on random models, each in a directory of its own as `base.onnx`.
pub fn on_models(cases: u32, check: impl Fn(&Plan, &Path)) {
    let mut runner = TestRunner::new_with_rng(
        Config { cases, failure_persistence: None, ..Config::default() },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    runner
        .run(&plan(), |plan| {
            let dir = tempfile::tempdir().expect("a directory");
            std::fs::write(dir.path().join("base.onnx"), build(&plan)).expect("a file");
            check(&plan, dir.path());
            Ok(())
        })
        .expect("the property");
}

pub fn inputs(plan: &Plan) -> BTreeMap<String, Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(!plan.seed);
    let x = (0..plan.rows * plan.inputs).map(|_| rng.random_range(-1.0f32..1.0)).collect();
    BTreeMap::from([("x".to_string(), Tensor::new(&[plan.rows, plan.inputs], x))])
}
