//! Do two models compute the same? Both are run on the same inputs; the worst difference of each output is reported.

use std::collections::BTreeMap;

use rand::distr::{Distribution, StandardUniform, Uniform};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::autodiff::{Request, Seed, gradient};
use crate::engine::{Engine, LoadOptions};
use crate::onnx::proto::{OperatorSetIdProto, tensor_shape_proto::dimension::Value as DimValue};
use crate::onnx::{
    AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor, ValueInfoProto, data_type_name, node, value_info,
};
use crate::{Error, Result};

/// How close is close enough: `|a − b| ≤ atol + rtol·|b|` for every element, as NumPy's `allclose`.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    pub atol: f64,
    pub rtol: f64,
}

/// The comparison of one output.
#[derive(Debug, Clone, Serialize)]
pub struct OutputDifference {
    pub output: String,
    pub shape: Vec<usize>,
    pub max_abs: f64,
    /// Largest `|a − b| / |b|` over elements where `b` is not zero.
    pub max_rel: f64,
    pub within: bool,
}

/// The comparison of two models.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub engine: String,
    pub outputs: Vec<OutputDifference>,
    /// Outputs that only one of the two has.
    pub unmatched: Vec<String>,
}

impl Comparison {
    pub fn within(&self) -> bool {
        !self.outputs.is_empty() && self.outputs.iter().all(|o| o.within)
    }
}

/// Runs `a` and `b` on `inputs` and compares the outputs that both have.
pub fn compare(
    a: &Model,
    b: &Model,
    inputs: &BTreeMap<String, Tensor>,
    engine: &dyn Engine,
    options: &LoadOptions,
    tolerance: Tolerance,
) -> Result<Comparison> {
    let names = |model: &Model| -> Vec<String> { model.graph().output.iter().map(|o| o.name().to_string()).collect() };
    let (names_a, names_b) = (names(a), names(b));
    let common: Vec<&str> = names_a.iter().filter(|n| names_b.contains(n)).map(String::as_str).collect();
    if common.is_empty() {
        return Err(Error::model(format!(
            "the two models have no output in common: {} has {}, {} has {}",
            a.path.display(),
            names_a.join(", "),
            b.path.display(),
            names_b.join(", ")
        )));
    }
    let mut unmatched: Vec<String> = names_a.iter().filter(|n| !names_b.contains(n)).cloned().collect();
    unmatched.extend(names_b.iter().filter(|n| !names_a.contains(n)).cloned());
    let (ran_a, ran_b) = (run(a, inputs, &common, engine, options)?, run(b, inputs, &common, engine, options)?);
    let outputs =
        common.iter().zip(ran_a.iter().zip(&ran_b)).map(|(name, (a, b))| difference(name, a, b, tolerance)).collect();
    Ok(Comparison { engine: engine.name().into(), outputs, unmatched })
}

fn run(
    model: &Model,
    inputs: &BTreeMap<String, Tensor>,
    wanted: &[&str],
    engine: &dyn Engine,
    options: &LoadOptions,
) -> Result<Vec<Tensor>> {
    let mut session = engine.load(&model.to_inline()?, options)?;
    let given: Vec<(&str, &Tensor)> = session
        .inputs()
        .iter()
        .map(|name| {
            inputs
                .get_key_value(name)
                .map(|(k, v)| (k.as_str(), v))
                .ok_or_else(|| Error::data(format!("{}: there is no data for input {name:?}", model.path.display())))
        })
        .collect::<Result<_>>()?;
    session.run(&given, wanted)
}

fn difference(name: &str, a: &Tensor, b: &Tensor, tolerance: Tolerance) -> OutputDifference {
    let mut result = OutputDifference {
        output: name.into(),
        shape: a.dims().to_vec(),
        max_abs: 0.0,
        max_rel: 0.0,
        within: a.dims() == b.dims(),
    };
    for (x, y) in a.to_f64().into_iter().zip(b.to_f64()) {
        if x == y || (x.is_nan() && y.is_nan()) {
            continue;
        }
        let off = (x - y).abs();
        let off = if off.is_nan() { f64::INFINITY } else { off };
        result.max_abs = result.max_abs.max(off);
        if y != 0.0 {
            result.max_rel = result.max_rel.max(off / y.abs());
        }
        result.within &= off <= tolerance.atol + tolerance.rtol * y.abs();
    }
    result
}

/// Made-up inputs have no more elements than this.
const MAX_ELEMENTS: usize = 1 << 30;

/// Made-up inputs for `model`: normal-ish floats, ones for masks, small ids that index every table they reach.
/// A dimension that is not fixed becomes `batch` where it comes first, `length` elsewhere.
pub fn random_inputs(model: &Model, batch: usize, length: usize, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let graph = model.graph();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
    let mut inputs = BTreeMap::new();
    for info in &graph.input {
        if graph.initializer.iter().any(|t| t.name() == info.name()) {
            continue;
        }
        let Some((data_type, dims)) = declared(info) else {
            return Err(Error::model(format!(
                "input {:?} is not a tensor of a known type; give data with --data",
                info.name()
            )));
        };
        let shape: Vec<usize> = dims
            .iter()
            .enumerate()
            .map(|(axis, dim)| {
                let free = if axis == 0 { batch } else { length };
                match dim {
                    Some(DimValue::DimValue(n)) if *n > 0 => *n as usize,
                    Some(DimValue::DimParam(name)) => *sizes.entry(name.clone()).or_insert(free),
                    _ => free,
                }
            })
            .collect();
        if shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).is_none_or(|n| n > MAX_ELEMENTS) {
            return Err(Error::model(format!("input {:?} of shape {shape:?} is too large to make up", info.name())));
        }
        let tensor = random(model, info.name(), data_type, &shape, &mut rng)?;
        inputs.insert(info.name().to_string(), tensor);
    }
    Ok(inputs)
}

fn random(model: &Model, name: &str, data_type: DataType, shape: &[usize], rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let len: usize = shape.iter().product();
    // The sum of uniforms is close enough to a normal variable of unit variance, and has no tail.
    let mut normal = || (0..12).map(|_| -> f64 { StandardUniform.sample(rng) }).sum::<f64>() - 6.0;
    let tensor = match data_type {
        DataType::Float => Tensor::new(shape, (0..len).map(|_| normal() as f32).collect()),
        DataType::Double => Tensor::new(shape, (0..len).map(|_| normal()).collect()),
        DataType::Float16 => Tensor::new(shape, (0..len).map(|_| half::f16::from_f64(normal())).collect()),
        DataType::Bool => Tensor::Bool(ndarray::ArrayD::from_shape_simple_fn(shape, || rng.random())),
        DataType::Int64 | DataType::Int32 => {
            let ids = integers(model, name, len, rng)?;
            if data_type == DataType::Int64 {
                Tensor::new(shape, ids)
            } else {
                Tensor::new(shape, ids.into_iter().map(|i| i as i32).collect())
            }
        }
        other => {
            return Err(Error::model(format!(
                "input {name:?} is {}, for which no values can be made up; give data with --data",
                data_type_name(other)
            )));
        }
    };
    Ok(tensor)
}

/// Ones for a mask, else ids below the number of rows of every table that this input indexes.
fn integers(model: &Model, name: &str, len: usize, rng: &mut ChaCha8Rng) -> Result<Vec<i64>> {
    if name.contains("mask") {
        return Ok(vec![1; len]);
    }
    let graph = model.graph();
    let rows = |table: &str| {
        graph.initializer.iter().find(|t| t.name() == table).and_then(|t| t.dims.first().copied()).filter(|n| *n > 0)
    };
    let indexed = graph.node.iter().filter(|n| n.is("Gather") && n.input_at(1) == Some(name));
    let bound = indexed.filter_map(|n| n.input_at(0).and_then(rows)).min().unwrap_or(2);
    let uniform = Uniform::new(0, bound).map_err(|e| Error::model(format!("input {name:?}: {e}")))?;
    Ok(uniform.sample_iter(rng).take(len).collect())
}

fn declared(info: &ValueInfoProto) -> Option<(DataType, Vec<Option<DimValue>>)> {
    let tensor = info.tensor()?;
    let dims = tensor.shape.as_ref().map(|s| s.dim.iter().map(|d| d.value.clone()).collect()).unwrap_or_default();
    Some((DataType::try_from(tensor.elem_type()).ok()?, dims))
}

/// Does `engine` compute a gradient graph right? The gradient of a small network (product, tanh, softmax) by its weight,
/// with the engine's optimizations on and off, against central differences of its own forward pass. Returns the largest
/// absolute difference; rounding in f32 leaves about 1e-4. (ONNX Runtime before 1.19 miscompiled such graphs silently.)
///
/// # Errors
/// Where the engine does not run them.
pub fn check_gradient(engine: &dyn Engine) -> Result<f64> {
    const STEP: f32 = 1e-2;
    let values = |n: usize, scale: f32| (0..n).map(|i| ((i * 37 % 19) as f32 - 9.0) * scale).collect::<Vec<f32>>();
    let (x, w) = (Tensor::new(&[2, 3], values(6, 0.1)), values(12, 0.07));
    let mut graph = GraphProto { name: Some("check".into()), ..Default::default() };
    graph.input = vec![value_info("x", DataType::Float, &["2", "3"]), value_info("w", DataType::Float, &["3", "4"])];
    graph.initializer = vec![Tensor::new(&[2, 4], values(8, 0.3)).to_proto("c")];
    let mut sum = node("ReduceSum", &["p"], &["loss"]);
    sum.attribute = vec![AttributeProto::int("keepdims", 0)];
    graph.node = vec![
        node("MatMul", &["x", "w"], &["h"]),
        node("Tanh", &["h"], &["t"]),
        node("Softmax", &["t"], &["s"]),
        node("Mul", &["s", "c"], &["p"]),
        sum,
    ];
    graph.output = vec![value_info("loss", DataType::Float, &[])];
    let opset_import = vec![OperatorSetIdProto { domain: None, version: Some(17) }];
    let model = ModelProto { ir_version: Some(8), opset_import, graph: Some(graph), ..Default::default() };
    let request = Request { of: vec![("loss".into(), Seed::One)], wrt: vec!["w".into()], ..Default::default() };
    let gradient = gradient(&model, &request)?;

    let mut forward = engine.load(&model, &LoadOptions { threads: Some(1), optimize: false })?;
    let mut loss = |w: Vec<f32>| -> Result<f64> {
        let out = forward.run(&[("x", &x), ("w", &Tensor::new(&[3, 4], w))], &["loss"])?;
        Ok(out.first().and_then(Tensor::as_f64).unwrap_or(f64::NAN))
    };
    let mut expected = Vec::new();
    for i in 0..w.len() {
        let moved = |by: f32| {
            let mut w = w.clone();
            w[i] += by;
            w
        };
        expected.push((loss(moved(STEP))? - loss(moved(-STEP))?) / f64::from(2.0 * STEP));
    }
    let mut worst = 0f64;
    for optimize in [true, false] {
        let mut session = engine.load(&gradient.model, &LoadOptions { threads: Some(1), optimize })?;
        let wanted: Vec<&str> = gradient.gradients.iter().map(String::as_str).collect();
        let got = session.run(&[("x", &x), ("w", &Tensor::new(&[3, 4], w.clone()))], &wanted)?;
        for (ours, theirs) in got.first().map(Tensor::to_f64).unwrap_or_default().iter().zip(&expected) {
            let off = (ours - theirs).abs();
            worst = if off.is_nan() { f64::INFINITY } else { worst.max(off) };
        }
    }
    Ok(worst)
}
