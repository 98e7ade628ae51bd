//! Products and convolutions with an activation in one operator, as ONNX Runtime's optimizer writes them
//! (`ContribOperators.md`).

use super::{MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.insert(MICROSOFT, "FusedGemm", Rule::vjp(|v| v.through_own(gemm)));
    rules.insert(MICROSOFT, "FusedConv", Rule::vjp(|v| v.through_own(conv)));
}

/// Y = activation(α·op(A)·op(B) + β·C).
fn gemm(v: &Vjp) -> Result<Vec<Option<String>>> {
    let sum = plain(v, "Gemm", 3)?;
    let parameter = |_, name: &str| v.node.attr(&format!("activation_{name}"))?.f;
    Ok(vec![Some(activated(v, sum, parameter))])
}

/// Y = activation(conv(X, W) + B + Z).
fn conv(v: &Vjp) -> Result<Vec<Option<String>>> {
    let mut sum = plain(v, "Conv", 3)?;
    if let Some(z) = v.node.input_at(3) {
        sum = v.add(sum, z);
    }
    let parameter = |i: usize, _: &str| v.node.attr("activation_params")?.floats.get(i).copied();
    Ok(vec![Some(activated(v, sum, parameter))])
}

/// The operator without its activation, of the first `inputs` inputs.
fn plain(v: &Vjp, op: &str, inputs: usize) -> Result<String> {
    let mut given = vec![v.x(0)?, v.x(1)?];
    given.extend((2..inputs).filter_map(|i| v.node.input_at(i)));
    let attributes = v.node.attribute.iter().filter(|a| !a.name().starts_with("activation"));
    Ok(v.op(op, &given, attributes.cloned().collect()))
}

/// The activation that the node names; `parameter` gives the first, second … of its parameters, where it is set.
fn activated(v: &Vjp, x: String, parameter: impl Fn(usize, &str) -> Option<f32>) -> String {
    match v.node.attr_s("activation").unwrap_or_default() {
        "" => x,
        "Clip" => {
            let bound = |i, name, default: f32| v.c(f64::from(parameter(i, name).unwrap_or(default)));
            v.op("Clip", &[&x, &bound(0, "min", f32::MIN), &bound(1, "max", f32::MAX)], vec![])
        }
        op => {
            let second = if op == "Selu" { "gamma" } else { "beta" };
            let names = ["alpha", second].into_iter().enumerate();
            let set = names.filter_map(|(i, name)| Some(AttributeProto::float(name, parameter(i, name)?)));
            v.op(op, &[&x], set.collect())
        }
    }
}
