//! The form in which an adapted layer is trained: `W' = W + tile(D)` once a step and one product, instead of the side
//! branch's passes over the tokens.
//!
//! Backward, `dx = dy·W'ᵀ` as for any layer, and `dD = S(x)ᵀ·dy` (the rows of `xᵀ·dy` summed by i mod r, without making
//! `xᵀ·dy`; it is r/in of that work). For this the product and its blocks have to be seen together, so while the
//! gradient is derived they are one node, `org.bone-onnx.TiledMatMul` (or `TiledGemm`), with a rule of its own;
//! afterwards [`lower`] makes it the standard operator that it is. BAT needs no rule: its W' is made of standard
//! operators, and `dW' = xᵀ·dy` goes back through them.
//!
//! Every W' stays in memory until the way back has used it. Where the weights are large, the side branch it is, which
//! leaves them where they are.

use super::Learners;
use crate::Result;
use crate::autodiff::{Adjoints, Rule, Rules, Vjp};
use crate::base::Base;
use crate::engine::LARGE_WEIGHTS;
use crate::inject::emission::{DOMAIN, Form, TILED_GEMM, TILED_MATMUL};
use crate::inject::emit::emit;
use crate::onnx::{GraphProto, ModelProto, Names};

/// Inputs of the tiled operators: x, the merged weight, the bias (or nothing), then a block and its shard selection for
/// each adapter of the layer.
const BIAS: usize = 2;
const BLOCKS: usize = 3;

/// Puts the active adapters into `model` (the base in memory, and the parameters of the adapters) in the form to train
/// in, and returns the rules that differentiate the result. `beside`: blocks stay beside their layers, where they are not
/// rounded to what the weights are.
pub fn training_form(model: &mut ModelProto, learners: &Learners, beside: bool) -> Result<Rules> {
    let initializers = model.graph.iter().flat_map(|g| &g.initializer);
    let weights: usize = initializers.filter_map(|t| t.raw_data.as_ref()).map(|raw| raw.len()).sum();
    // Only the merged form drops inputs out.
    let merged = (weights < LARGE_WEIGHTS && !beside) || learners.dropout.is_some();
    in_form(model, learners, merged)
}

fn in_form(model: &mut ModelProto, learners: &Learners, merged: bool) -> Result<Rules> {
    let mut names = Names::of(model);
    let form = match merged {
        true => Form::Trained { trained: learners.trained, dropout: learners.dropout },
        false => Form::Served,
    };
    let emission = emit(&Base::within(model, learners.injection), learners.injection, &mut names, form)?;
    emission.apply(model);
    Ok(Rules::straight_through().with(DOMAIN, TILED_MATMUL, Rule::vjp(tiled)).with(
        DOMAIN,
        TILED_GEMM,
        Rule::vjp(tiled),
    ))
}

/// Turns the tiled operators into the standard ones they compute.
pub fn lower(graph: &mut GraphProto) {
    for node in &mut graph.node {
        if node.domain() == DOMAIN {
            node.domain = None;
            let gemm = node.op_type() == TILED_GEMM;
            node.input.truncate(if gemm && node.input_at(BIAS).is_some() { 3 } else { 2 });
            node.op_type = Some(if gemm { "Gemm" } else { "MatMul" }.into());
        }
        node.attribute.iter_mut().filter_map(|a| a.g.as_mut()).for_each(lower);
    }
}

/// `dx = dy·W'ᵀ`, `dD = S(x)ᵀ·dy` for each block, `db = β·Σ dy`.
fn tiled(v: &Vjp) -> Result<Adjoints> {
    let (x, weight, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let trans_b = v.node.attr_i("transB", 0) != 0;
    let dx =
        v.wants(0).then(|| if trans_b { v.matmul(dy, weight) } else { v.matmul(dy, v.transpose(weight, &[1, 0])) });
    let beta = v.node.attr_f("beta", 1.0);
    let bias = v.to_input(BIAS, || if beta == 1.0 { dy.to_string() } else { v.mul(dy, v.c(f64::from(beta))) });
    let mut adjoints = vec![dx, None, bias];
    for at in (BLOCKS..v.node.input.len()).step_by(2) {
        let mut block = None;
        if v.wants(at) {
            let selection = v.x(at + 1)?;
            let sizes = (v.static_dims(selection), v.static_dims(v.x(at)?));
            let (Some([inputs, _]), Some([_, outputs])) = (sizes.0.as_deref(), sizes.1.as_deref()) else {
                return Err(v.error("the block and its shard selection have no fixed shape"));
            };
            // The same x (and the same dy) of several layers is flattened, and its shards are summed, once.
            let rows = |value: &str, width: i64| match v.rank(value) {
                Ok(2) => value.to_string(),
                _ => v.op("Reshape", &[value, &v.ints(&[-1, width])], Vec::new()),
            };
            let shards = v.matmul(rows(x, *inputs), selection);
            block = Some(v.matmul(v.transpose(shards, &[1, 0]), rows(dy, *outputs)));
        }
        adjoints.extend([block, None]);
    }
    Ok(adjoints)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use prost::Message;
    use safetensors::SafeTensors;

    use super::*;
    use crate::adapter::{Adapter, BoneConfig, Injection, TargetModules};
    use crate::autodiff::{Request, Seed, gradient_with};
    use crate::engine::{self, Device, EngineKind, LoadOptions};
    use crate::inject::{import, write};
    use crate::onnx::proto::OperatorSetIdProto;
    use crate::onnx::{AttributeProto, DataType, Model, NodeProto, Tensor, node, value_info};

    const CASE: &str = "miss_dropout_in10_out6_r5";

    /// PEFT's layer with dropout 0.5, in the form it is trained in; and the vectors.
    fn layer(dropout: Option<u64>, merged: bool) -> (ModelProto, Rules, BTreeMap<String, Tensor>) {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/goldens/layer_miss.safetensors");
        let bytes = std::fs::read(shared).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let case = file.iter().filter_map(|(name, view)| {
            let name = name.strip_prefix(CASE)?.strip_prefix('/')?.to_string();
            Some((name, Tensor::from_bytes(DataType::Float, view.shape(), view.data()).unwrap()))
        });
        let case: BTreeMap<String, Tensor> = case.collect();
        let mut graph = GraphProto { name: Some("layer".into()), ..Default::default() };
        graph.input.push(value_info("x", DataType::Float, &["n", "10"]));
        graph.output.push(value_info("y", DataType::Float, &["n", "6"]));
        graph.initializer = vec![case["W"].to_proto("fc.weight"), case["b"].to_proto("fc.bias")];
        let mut gemm = node("Gemm", &["x", "fc.weight", "fc.bias"], &["y"]);
        gemm.attribute = vec![AttributeProto::int("transB", 1)];
        gemm.name = Some("/fc/Gemm".into());
        graph.node.push(gemm);
        let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
        let proto = ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() };

        let target_modules = Some(TargetModules::List(vec!["fc".into()]));
        let config = BoneConfig { r: 5, miss_dropout: 0.5, target_modules, ..Default::default() };
        let blocks = BTreeMap::from([("fc".to_string(), case["B.default"].clone())]);
        let adapter = Adapter { name: "default".into(), config, blocks, saved: BTreeMap::new() };
        let base = Model::from_bytes("layer.onnx", proto.encode_to_vec().into()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("injected.onnx");
        write(&base, import(&base, adapter, false, false).unwrap().patch, &path).unwrap();
        let injected = Model::open(&path).unwrap();
        let is_dropout = |n: &NodeProto| n.is("Dropout");
        assert!(!injected.graph().node.iter().any(is_dropout), "a served model drops nothing out");

        let injection = Injection::expect(&injected).unwrap();
        let mut proto = Base::of(&injected, Some(&injection)).unwrap().proto.into_owned();
        let block = injected.graph().initializer.iter().find(|t| t.name().contains("miss_block")).unwrap();
        proto.graph.as_mut().unwrap().initializer.push(block.clone());
        let trained = injection.active.clone();
        let learners = Learners { injection: &injection, trained: &trained, dropout };
        let rules = in_form(&mut proto, &learners, merged).unwrap();
        assert_eq!(proto.graph.as_ref().unwrap().node.iter().any(is_dropout), dropout.is_some());
        (proto, rules, case)
    }

    /// y and the gradients of x and of the block.
    fn results(proto: &ModelProto, rules: &Rules, x: &Tensor, gy: &Tensor, extra: &[&str]) -> Vec<Tensor> {
        let engine = engine::open(EngineKind::OnnxRuntime, Device::Cpu).unwrap();
        let wrt = vec!["x".to_string(), "fc.miss_block.default".to_string()];
        let request = Request { of: vec![("y".into(), Seed::Input)], wrt, ..Default::default() };
        let mut gradient = gradient_with(proto, &request, rules).unwrap();
        let graph = gradient.model.graph.as_mut().unwrap();
        lower(graph);
        for name in extra {
            graph.output.push(value_info(name, DataType::Float, &["n", "m"]));
        }
        let mut session = engine.load(&gradient.model, &LoadOptions { threads: Some(1), optimize: true }).unwrap();
        let wanted: Vec<&str> = ["y"]
            .into_iter()
            .chain(gradient.gradients.iter().map(String::as_str))
            .chain(extra.iter().copied())
            .collect();
        session.run(&[("x", x), ("y.seed", gy)], &wanted).unwrap()
    }

    fn close(got: &Tensor, want: &Tensor, what: &str) {
        let off = got.to_f64().iter().zip(want.to_f64()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(got.dims() == want.dims() && off < 1e-5, "{what} is off by {off}");
    }

    #[test]
    fn a_layer_with_dropout_is_pefts_for_the_mask_that_it_drew() {
        let (mut proto, rules, case) = layer(Some(1), true);
        // Its mask in place of ours.
        let (x, dropped) = (case["x"].to_f64(), case["x_after_dropout"].to_f64());
        let mask: Vec<f32> = x.iter().zip(&dropped).map(|(x, d)| (d / x).round() as f32).collect();
        assert!(mask.contains(&0.0) && mask.contains(&2.0));
        let graph = proto.graph.as_mut().unwrap();
        graph.initializer.push(Tensor::new(case["x"].dims(), mask).to_proto("mask"));
        let dropout = graph.node.iter_mut().find(|n| n.is("Dropout")).unwrap();
        let output = dropout.output[0].clone();
        *dropout = node("Mul", &["x", "mask"], &[&output]);
        let got = results(&proto, &rules, &case["x"], &case["gy"], &[]);
        for (got, name) in got.iter().zip(["y.default", "gx.default", "gB.default.default"]) {
            close(got, &case[name], name);
        }
    }

    #[test]
    fn a_share_of_the_inputs_drops_out_other_ones_in_each_run_and_in_no_evaluation() {
        let (proto, rules, case) = layer(Some(1), true);
        let dropped = proto.graph.as_ref().unwrap().node.iter().find(|n| n.is("Dropout")).unwrap().output[0].clone();
        let x = Tensor::new(&[4000, 10], vec![1f32; 40_000]);
        let gy = Tensor::new(&[4000, 6], vec![0.0f32; 24_000]);
        let seen = results(&proto, &rules, &x, &gy, &[&dropped]).pop().unwrap().to_f64();
        assert!(seen.iter().all(|v| *v == 0.0 || *v == 2.0));
        let share = seen.iter().filter(|v| **v == 0.0).count() as f64 / seen.len() as f64;
        assert!((share - 0.5).abs() < 0.02, "{share}");
        let halves = seen.split_at(20_000);
        assert_ne!(halves.0, halves.1);

        // Without it, the layer is the one that is served: y = base + S(x)·B.
        let (proto, rules, _) = layer(None, true);
        let merged = results(&proto, &rules, &case["x"], &case["gy"], &[]);
        close(&merged[0], &case["y_merged.default"], "y without dropout");
        // And so is the side branch, with the same gradients.
        let (proto, rules, _) = layer(None, false);
        let beside = results(&proto, &rules, &case["x"], &case["gy"], &[]);
        for ((beside, merged), what) in beside.iter().zip(&merged).zip(["y", "gx", "gB"]) {
            close(beside, merged, what);
        }
    }
}
