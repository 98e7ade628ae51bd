//! Classical models (`ai.onnx.ml`): what scikit-learn's pipelines export, by their definition in standard operators.
//! They take numbers of any type and compute in float.

use super::{Adjoints, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType, Tensor};

/// Domain of the operators of classical machine learning.
pub(super) const ML: &str = "ai.onnx.ml";

pub(super) fn add(rules: &mut Rules) {
    let mut by_definition = |op: &str, definition: fn(&Vjp) -> Result<Vec<Option<String>>>| {
        rules.insert(ML, op, Rule::vjp(move |v| v.through(definition)));
    };
    by_definition("ArrayFeatureExtractor", |v| Ok(vec![Some(extract(v)?)]));
    by_definition("FeatureVectorizer", |v| Ok(vec![Some(vectorize(v)?)]));
    by_definition("LinearClassifier", |v| Ok(vec![None, Some(classify(v)?)]));
    by_definition("LinearRegressor", |v| Ok(vec![Some(regress(v)?)]));
    by_definition("Normalizer", |v| Ok(vec![Some(normalize(v)?)]));
    by_definition("SVMRegressor", |v| Ok(vec![Some(support_vectors(v)?)]));
    // (x - offset)·scale, for each feature or for all.
    by_definition("Scaler", |v| {
        let all = |name: &str| v.node.attr(name).map(|a| a.floats.clone()).filter(|values| !values.is_empty());
        let mut y = single(v, v.x(0)?);
        if let Some(offset) = all("offset") {
            y = v.sub(y, table(v, &[offset.len()], offset));
        }
        if let Some(scale) = all("scale") {
            y = v.mul(y, table(v, &[scale.len()], scale));
        }
        Ok(vec![Some(y)])
    });
    rules.insert(ML, "Imputer", Rule::vjp(impute));
}

/// Numbers in float.
fn single(v: &Vjp, x: &str) -> String {
    match v.shapes.element(x) {
        Some(DataType::Float) => x.to_string(),
        _ => v.cast(x, DataType::Float),
    }
}

fn number(v: &Vjp, value: f32) -> String {
    v.float(f64::from(value), DataType::Float).unwrap_or_default()
}

/// A constant of the node's attributes.
fn table(v: &Vjp, dims: &[usize], values: Vec<f32>) -> String {
    v.op("Constant", &[], vec![AttributeProto::tensor("value", Tensor::new(dims, values).to_proto(""))])
}

fn floats(v: &Vjp, name: &str) -> Vec<f32> {
    v.node.attr(name).map(|a| a.floats.clone()).unwrap_or_default()
}

/// X[…, Y]: columns by their numbers.
fn extract(v: &Vjp) -> Result<String> {
    let (x, columns) = (v.x(0)?, v.respec(v.x(1)?, &[-1]));
    let picked = v.op("Gather", &[x, &columns], vec![AttributeProto::int("axis", -1)]);
    Ok(if v.rank(x)? == 1 { v.unsqueeze(picked, v.ints(&[0])) } else { picked })
}

/// Columns side by side, each input cut or filled with zeros to its `inputdimensions`.
fn vectorize(v: &Vjp) -> Result<String> {
    let widths = v.node.attr_ints("inputdimensions").filter(|widths| widths.len() == v.node.input.len());
    let widths = widths.ok_or_else(|| v.error("it must have one of inputdimensions for each input"))?;
    let mut parts = Vec::new();
    for (i, width) in widths.iter().enumerate() {
        let x = v.x(i)?;
        if v.rank(x)? != 2 {
            return Err(v.error("its inputs must have 2 axes"));
        }
        let rest = v.minus(&v.ints(&[*width]), &v.dim_of(x, 1));
        let part = single(v, x);
        parts.push(match v.constant_value(&rest) {
            Some(0) => part,
            _ => {
                let none = v.ints(&[0]);
                v.op("Pad", &[&part, &v.join(&[none.clone(), none.clone(), none, rest]), &number(v, 0.0)], vec![])
            }
        });
    }
    Ok(v.concat(&parts, 1))
}

/// x·Wᵀ + b, W being `[targets, features]`.
fn linear(v: &Vjp, targets: usize) -> Result<String> {
    let (weights, bias) = (floats(v, "coefficients"), floats(v, "intercepts"));
    let features = weights.len().checked_div(targets).filter(|n| *n > 0 && n * targets == weights.len());
    let features = features.ok_or_else(|| v.error("its coefficients do not fit its targets"))?;
    let turned = (0..features).flat_map(|i| (0..targets).map(move |k| (i, k))).map(|(i, k)| weights[k * features + i]);
    let rows = v.respec(&single(v, v.x(0)?), &[-1, features as i64]);
    let y = v.matmul(rows, table(v, &[features, targets], turned.collect()));
    match bias.len() {
        0 => Ok(y),
        n if n == targets => Ok(v.add(y, table(v, &[targets], bias))),
        _ => Err(v.error("its intercepts do not fit its targets")),
    }
}

fn post_transform(v: &Vjp, y: String) -> Result<String> {
    match v.node.attr_s("post_transform") {
        None | Some("NONE") => Ok(y),
        Some("LOGISTIC") => Ok(v.sigmoid(y)),
        Some("SOFTMAX") => Ok(v.op("Softmax", &[&y], vec![AttributeProto::int("axis", -1)])),
        Some(other) => Err(v.error(format!("post_transform {other} has no derivative here"))),
    }
}

fn regress(v: &Vjp) -> Result<String> {
    let targets = usize::try_from(v.node.attr_i("targets", 1)).unwrap_or(0);
    post_transform(v, linear(v, targets)?)
}

/// The scores; one row of coefficients for two classes scores the second, and the first gets what is left.
fn classify(v: &Vjp) -> Result<String> {
    let labels = v.node.attr("classlabels_ints").map_or(0, |a| a.ints.len());
    let labels = labels.max(v.node.attr("classlabels_strings").map_or(0, |a| a.strings.len()));
    let rows = match floats(v, "intercepts").len() {
        0 => labels,
        rows => rows,
    };
    let scores = linear(v, rows)?;
    if rows == 1 && labels == 2 {
        if v.node.attr_s("post_transform") == Some("SOFTMAX") {
            return Err(v.error("a softmax over one row of coefficients has no derivative here"));
        }
        let second = post_transform(v, scores)?;
        return Ok(v.concat(&[v.sub(number(v, 1.0), &second), second], 1));
    }
    post_transform(v, scores)
}

/// Each row over its maximum, its sum of absolute values or its length; a row of zeros stays.
fn normalize(v: &Vjp) -> Result<String> {
    let x = single(v, v.x(0)?);
    if v.rank(v.x(0)?)? > 2 {
        return Err(v.error("its input must have 1 or 2 axes"));
    }
    let norm = match v.node.attr_s("norm") {
        None | Some("MAX") => super::roi::extreme(v, &x, -1, true),
        Some("L1") => v.reduce_sum(v.abs(&x), v.ints(&[-1]), true),
        Some("L2") => v.sqrt(v.reduce_sum(v.mul(&x, &x), v.ints(&[-1]), true)),
        Some(other) => return Err(v.error(format!("norm {other} is not known"))),
    };
    Ok(v.div(x, v.select(v.equal(&norm, number(v, 0.0)), number(v, 1.0), &norm)))
}

/// Σ coefficient·K(x, support vector) + ρ.
fn support_vectors(v: &Vjp) -> Result<String> {
    if v.node.attr_i("one_class", 0) != 0 {
        return Err(v.error("one_class gives 1 or -1, which has no derivative"));
    }
    let (weights, rho) = (floats(v, "coefficients"), floats(v, "rho"));
    let kernel = floats(v, "kernel_params");
    let [gamma, constant, degree] = [0, 1, 2].map(|i| number(v, kernel.get(i).copied().unwrap_or(0.0)));
    let count = usize::try_from(v.node.attr_i("n_supports", 0)).unwrap_or(0);
    // Without support vectors the coefficients are those of a linear function.
    let (points, weights) = match count {
        0 => (weights, vec![1.0]),
        _ => (floats(v, "support_vectors"), weights),
    };
    let features = points.len() / count.max(1);
    if weights.len() != count.max(1) || features * count.max(1) != points.len() || features == 0 {
        return Err(v.error("its support vectors do not fit their coefficients"));
    }
    let points = table(v, &[count.max(1), features], points);
    let x = v.respec(&single(v, v.x(0)?), &[-1, features as i64]);
    let product = || v.matmul(&x, v.transpose(&points, &[1, 0]));
    let affine = || v.add(v.mul(product(), &gamma), &constant);
    let similar = match v.node.attr_s("kernel_type") {
        None | Some("LINEAR") => product(),
        Some("POLY") => v.pow(affine(), degree),
        Some("SIGMOID") => v.tanh(affine()),
        Some("RBF") => {
            let apart = v.sub(v.unsqueeze(&x, v.ints(&[1])), &points);
            v.exp(v.neg(v.mul(v.reduce_sum(v.mul(&apart, &apart), v.ints(&[2]), false), &gamma)))
        }
        Some(other) => return Err(v.error(format!("kernel_type {other} is not known"))),
    };
    let y = v.matmul(similar, table(v, &[weights.len(), 1], weights.clone()));
    post_transform(v, v.add(y, number(v, rho.first().copied().unwrap_or(0.0))))
}

/// What is replaced does not depend on x.
fn impute(v: &Vjp) -> Result<Adjoints> {
    let (x, dy) = (v.x(0)?, v.dy()?);
    let missing = v.node.attr_f("replaced_value_float", 0.0);
    let replaced = match missing.is_nan() {
        true => v.op("IsNaN", &[x], vec![]),
        false => v.equal(x, v.cast_like(number(v, missing), x)),
    };
    v.first(v.select(replaced, v.c(0.0), dy))
}
