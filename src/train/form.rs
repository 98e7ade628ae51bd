//! The form in which an adapted layer is trained: `W' = W + tile(D)` once a step and one product, instead of the side
//! branch's passes over the tokens.
//!
//! Backward, `dx = dy·W'ᵀ` as for any layer, and `dD = S(x)ᵀ·dy` (the rows of `xᵀ·dy` summed by i mod r, without making
//! `xᵀ·dy`; it is r/in of that work). For this the product and its blocks have to be seen together, so while the
//! gradient is derived they are one node, `org.bone-onnx.TiledMatMul` (or `TiledGemm`), with a rule of its own;
//! afterwards [`lower`] makes it the standard operator that it is. BAT needs no rule: its W' is made of standard
//! operators, and `dW' = xᵀ·dy` goes back through them.

use super::graph::Learners;
use crate::Result;
use crate::autodiff::{Adjoints, Rule, Rules, Vjp};
use crate::base::Base;
use crate::inject::emission::{DOMAIN, Form, TILED_GEMM, TILED_MATMUL, emit};
use crate::onnx::{GraphProto, ModelProto, Names};

/// Inputs of the tiled operators: x, the merged weight, the bias (or nothing), then a block and its shard selection for
/// each adapter of the layer.
const BIAS: usize = 2;
const BLOCKS: usize = 3;

/// Puts the active adapters into `model` (the base in memory, and the parameters of the adapters) in the form to train
/// in, and returns the rules that differentiate the result.
pub fn training_form(model: &mut ModelProto, learners: &Learners) -> Result<Rules> {
    let mut names = Names::of(model);
    let form = Form::Trained { trained: learners.trained, dropout: learners.dropout };
    let emission = emit(&Base::within(model, learners.injection), learners.injection, &mut names, form)?;
    emission.apply(model);
    Ok(Rules::standard().with(DOMAIN, TILED_MATMUL, Rule::vjp(tiled)).with(DOMAIN, TILED_GEMM, Rule::vjp(tiled)))
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
