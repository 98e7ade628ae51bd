//! `doctor`: which engines there are, and whether they compute.

use serde_json::{Value, json};

use super::printer::Printer;
use crate::engine::{self, Device, EngineKind, doctor};
use crate::verify::check_gradient;
use crate::{Error, Result};

/// What rounding leaves of a gradient against differences in f32.
const GRADIENT_TOLERANCE: f64 = 1e-3;

/// Engines by their names, and how far each is off in a gradient (or why it cannot be told).
fn gradients() -> Vec<(&'static str, Result<f64>)> {
    [("onnxruntime", EngineKind::OnnxRuntime), ("tract", EngineKind::Tract)]
        .into_iter()
        .filter_map(|(name, kind)| Some((name, engine::open(kind, Device::Cpu).ok()?)))
        .map(|(name, engine)| (name, check_gradient(engine.as_ref())))
        .collect()
}

/// Show which libonnxruntime was found, which engine is taken, and try them
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, printer: &Printer) -> Result<()> {
    let report = doctor();
    let gradients = gradients();
    let passed = |off: &Result<f64>| off.as_ref().is_ok_and(|off| *off <= GRADIENT_TOLERANCE);
    let mut value = serde_json::to_value(&report).map_err(|e| Error::model(e.to_string()))?;
    let checks = gradients.iter().map(|(engine, off)| {
        json!({"engine": engine, "difference": off.as_ref().ok(), "problem": off.as_ref().err().map(|e| e.to_string()),
               "passed": passed(off)})
    });
    value["gradients"] = checks.collect::<Value>();
    printer.result(&value, |p| {
        let mut rows = Vec::new();
        for library in &report.libraries {
            let version = library.version.as_deref().unwrap_or("version unknown");
            let state = library.problem.clone().unwrap_or_else(|| "usable".into());
            rows.push(vec!["libonnxruntime".into(), library.path.display().to_string(), format!("{version}, {state}")]);
        }
        if report.libraries.is_empty() {
            rows.push(vec![
                "libonnxruntime".into(),
                "none found".into(),
                "pip install onnxruntime, or set ORT_DYLIB_PATH".into(),
            ]);
        }
        rows.push(vec!["tract".into(), "built in".into(), report.tract.into()]);
        rows.push(vec!["--engine auto".into(), report.auto.clone().unwrap_or_else(|| "none".into()), String::new()]);
        if !report.providers.is_empty() {
            rows.push(vec!["providers".into(), report.providers.join(", "), String::new()]);
        }
        let gpu = if report.gpu.is_empty() { "none seen".into() } else { report.gpu.join(", ") };
        rows.push(vec!["GPU".into(), gpu, String::new()]);
        for check in &report.checks {
            let result = match (&check.difference, &check.problem) {
                (Some(off), _) => format!("off by {off:.1e}"),
                (None, problem) => problem.clone().unwrap_or_default(),
            };
            let verdict = if check.passed { "passed" } else { "FAILED" };
            rows.push(vec![format!("check {}", check.engine), result, verdict.into()]);
        }
        for (engine, off) in &gradients {
            let result = off.as_ref().map_or_else(|e| e.to_string(), |off| format!("off by {off:.1e}"));
            let verdict = if passed(off) { "passed" } else { "FAILED" };
            rows.push(vec![format!("gradient {engine}"), result, verdict.into()]);
        }
        p.table(&["", "", ""], rows);
    });
    match report.problem {
        Some(problem) => Err(Error::Check(problem)),
        None if report.checks.iter().any(|c| !c.passed) || !gradients.iter().all(|(_, off)| passed(off)) => {
            Err(Error::Check("an engine does not compute right".into()))
        }
        None => Ok(()),
    }
}
