//! What engines this machine has, and whether they compute.

use std::path::Path;

use serde::Serialize;

use super::{Device, Engine, EngineKind, Library, LoadOptions, OnnxRuntime, Places, Tract, discover, tract};
use crate::Result;
use crate::onnx::{DataType, GraphProto, ModelProto, Tensor, node, proto::OperatorSetIdProto, value_info};

/// The state of the engines. Made by [`doctor`].
#[derive(Debug, Clone, Serialize)]
pub struct Doctor {
    /// Every libonnxruntime found, in the order of the search.
    pub libraries: Vec<Library>,
    /// What [`EngineKind::Auto`] takes (see [`Engine::describe`]).
    pub auto: Option<String>,
    /// Why it can take none.
    pub problem: Option<String>,
    /// Execution providers compiled into the library in use; empty without one.
    pub providers: Vec<String>,
    /// Version of the built-in tract.
    pub tract: &'static str,
    /// Signs of an NVIDIA GPU: its device file, its driver.
    pub gpu: Vec<String>,
    /// A small model, really run.
    pub checks: Vec<Check>,
}

/// One engine's result on a model whose answer is known.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub engine: &'static str,
    /// Largest absolute difference from the value computed in f64.
    pub difference: Option<f64>,
    /// Why there is none.
    pub problem: Option<String>,
    /// Whether the difference is one of rounding.
    pub passed: bool,
}

/// f32 rounding of a softmax over two numbers, with room to spare.
const ROUNDING: f64 = 1e-6;

/// Looks at everything, and runs a small model on each engine. Loads ONNX Runtime into this process.
pub fn doctor() -> Doctor {
    let places = Places::from_env();
    let mut providers = Vec::new();
    let mut checks = Vec::new();
    let onnxruntime = match discover::pick(&places, Device::Cpu) {
        Ok(library) => library.map(|l| OnnxRuntime::open(&l.path, Device::Cpu)),
        Err(e) => Some(Err(e)),
    };
    match onnxruntime {
        None => {}
        Some(Ok(engine)) => {
            providers = engine.providers();
            checks.push(check(&engine));
        }
        Some(Err(e)) => {
            let problem = Some(e.to_string());
            checks.push(Check { engine: "onnxruntime", difference: None, problem, passed: false });
        }
    }
    checks.push(check(&Tract));
    let (auto, problem) = match super::open_in(&places, EngineKind::Auto, Device::Cpu, super::Arena::default()) {
        Ok(engine) => (Some(engine.describe()), None),
        Err(e) => (None, Some(e.to_string())),
    };
    Doctor { libraries: places.libraries(), auto, problem, providers, tract: tract::VERSION, gpu: gpu(), checks }
}

fn gpu() -> Vec<String> {
    let mut signs = Vec::new();
    if Path::new("/dev/nvidia0").exists() {
        signs.push("/dev/nvidia0".to_string());
    }
    let driver = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
    // SAFETY: the NVIDIA driver's own library.
    if unsafe { libloading::Library::new(driver) }.is_ok() {
        signs.push(driver.to_string());
    }
    signs
}

fn check(engine: &dyn Engine) -> Check {
    let (difference, problem) = match tiny_difference(engine) {
        Ok(difference) => (Some(difference), None),
        Err(e) => (None, Some(e.to_string())),
    };
    Check { engine: engine.name(), difference, problem, passed: difference.is_some_and(|d| d <= ROUNDING) }
}

/// Runs [`tiny_model`] and gives the largest difference from its value in f64 (infinite for a NaN or a wrong shape).
fn tiny_difference(engine: &dyn Engine) -> Result<f64> {
    let x: Vec<f32> = vec![0.5, -1.0, 2.0, 1.5, 0.25, -0.75];
    let w: Vec<f32> = vec![1.0, -0.5, 0.25, 2.0, -1.5, 0.125];
    let mut session = engine.load(&tiny_model(), &LoadOptions { threads: Some(1), optimize: true })?;
    let inputs = [Tensor::new(&[2, 3], x.clone()), Tensor::new(&[3, 2], w.clone())];
    let outputs = session.run(&[("x", &inputs[0]), ("w", &inputs[1])], &["y"])?;
    let wanted = x.chunks(3).flat_map(|row| {
        let z = [0, 1].map(|j| row.iter().zip(w.iter().skip(j).step_by(2)).map(|(a, b)| f64::from(a * b)).sum::<f64>());
        let sum = z[0].exp() + z[1].exp();
        z.map(|z| z.exp() / sum)
    });
    let got = outputs.first().filter(|y| y.dims() == [2, 2]).map(Tensor::to_f64).unwrap_or_default();
    let differences = wanted.enumerate().map(|(i, want)| got.get(i).map_or(f64::INFINITY, |got| (got - want).abs()));
    Ok(differences.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst }))
}

/// `Softmax(x · w)` for `x` of `[n, 3]` and `w` of `[3, 2]`.
pub(super) fn tiny_model() -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(GraphProto {
            name: Some("tiny".into()),
            node: vec![node("MatMul", &["x", "w"], &["z"]), node("Softmax", &["z"], &["y"])],
            input: vec![value_info("x", DataType::Float, &["n", "3"]), value_info("w", DataType::Float, &["3", "2"])],
            output: vec![value_info("y", DataType::Float, &["n", "2"])],
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_engines_pass_and_the_report_is_json() {
        let report = doctor();
        let engines: Vec<&str> = report.checks.iter().filter(|c| c.passed).map(|c| c.engine).collect();
        assert_eq!(engines, ["onnxruntime", "tract"], "{report:?}");
        assert!(report.providers.iter().any(|p| p == "CPUExecutionProvider"), "{report:?}");
        assert!(report.auto.as_ref().is_some_and(|a| a.starts_with("ONNX Runtime 1.")), "{report:?}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["tract"], tract::VERSION);
        assert!(json["libraries"].as_array().is_some_and(|l| !l.is_empty()));
    }

    /// The self-check must notice wrong numbers.
    #[test]
    fn a_wrong_engine_does_not_pass() {
        struct Wrong;
        impl Engine for Wrong {
            fn name(&self) -> &'static str {
                "wrong"
            }
            fn describe(&self) -> String {
                String::new()
            }
            fn load(&self, model: &ModelProto, options: &LoadOptions) -> Result<Box<dyn super::super::Session>> {
                let mut model = model.clone();
                if let Some(node) = model.graph.as_mut().and_then(|g| g.node.last_mut()) {
                    node.op_type = Some("LogSoftmax".into());
                }
                Tract.load(&model, options)
            }
        }
        assert!(!check(&Wrong).passed);
    }
}
