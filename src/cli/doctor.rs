//! `doctor`: which engines there are, and whether they compute; where the nodes of a gradient graph run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::engine::EngineArgs;
use super::printer::Printer;
use crate::engine::{self, Device, EngineKind, NodeRun, doctor};
use crate::onnx::{Model, Tensor};
use crate::train::{Precision, probe};
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
pub struct Args {
    /// Run the gradient graph of this injected model on made-up inputs, and show on which execution provider each of its
    /// nodes runs
    #[arg(long, value_name = "MODEL")]
    graph: Option<PathBuf>,

    /// With --graph: the output to differentiate [default: the head, or the only output]
    #[arg(long, value_name = "NAME", requires = "graph")]
    output: Option<String>,

    /// With --graph: rows of the inputs
    #[arg(long, default_value_t = 2, requires = "graph")]
    batch_size: usize,

    /// With --graph: length of inputs that may have any
    #[arg(long, default_value_t = 16, requires = "graph")]
    length: usize,

    /// With --graph: what products are computed in, as for train
    #[arg(long, default_value = "f32", requires = "graph")]
    precision: Precision,

    #[command(flatten)]
    engine: EngineArgs,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    match &args.graph {
        Some(path) => graph(&args, path, printer),
        None => engines(printer),
    }
}

/// Where the nodes of the gradient graph run.
fn graph(args: &Args, path: &Path, printer: &Printer) -> Result<()> {
    let model = Model::open(path)?;
    let engine = args.engine.open(printer)?;
    let options = args.engine.load_options();
    let sizes = (args.batch_size.max(1), args.length.max(1));
    let probe = probe(&model, engine.as_ref(), &options, args.output.as_deref(), sizes, args.precision)?;
    let inputs: Vec<(&str, &Tensor)> = probe.inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let nodes = engine.profile(&probe.model, &inputs, &options)?;

    let on_device = args.engine.device != Device::Cpu;
    let fallen: Vec<&NodeRun> = nodes.iter().filter(|n| on_device && n.fell_to_cpu()).collect();
    let mut providers: BTreeMap<(&str, bool), (usize, f64)> = BTreeMap::new();
    let mut ops: BTreeMap<(&str, &str), (usize, f64)> = BTreeMap::new();
    for node in &nodes {
        let provider = providers.entry((&node.provider, node.shape_arithmetic)).or_default();
        let op = ops.entry((&node.op, &node.provider)).or_default();
        for (count, seconds) in [provider, op] {
            *count += 1;
            *seconds += node.seconds;
        }
    }
    let copies = nodes.iter().filter(|n| n.op.starts_with("Memcpy")).count();
    let value = json!({
        "model": path,
        "engine": engine.describe(),
        "nodes": nodes.len(),
        "copies": copies,
        "providers": providers.iter().map(|((provider, shape), (nodes, seconds))| {
            json!({"provider": provider, "shape_arithmetic": shape, "nodes": nodes, "seconds": seconds})
        }).collect::<Value>(),
        "ops": ops.iter().map(|((op, provider), (nodes, seconds))| {
            json!({"op": op, "provider": provider, "nodes": nodes, "seconds": seconds})
        }).collect::<Value>(),
        "fell_to_cpu": fallen,
    });
    printer.result(&value, |p| {
        let milliseconds = |s: &f64| format!("{:.2}", s * 1e3);
        let rows = providers.iter().map(|((provider, shape), (nodes, seconds))| {
            let what = if *shape { "shape arithmetic" } else { "data" };
            vec![provider.to_string(), what.into(), nodes.to_string(), milliseconds(seconds)]
        });
        p.table(&["provider", "", "nodes", "ms"], rows.collect());
        p.line("");
        let mut by_time: Vec<_> = ops.iter().collect();
        by_time.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        let rows = by_time.into_iter().map(|((op, provider), (nodes, seconds))| {
            vec![op.to_string(), provider.to_string(), nodes.to_string(), milliseconds(seconds)]
        });
        p.table(&["operator", "provider", "nodes", "ms"], rows.collect());
        if copies > 0 {
            p.line(&format!("{copies} copies between the CPU and the device"));
        }
        for node in &fallen {
            p.line(&format!("on the CPU: {} {}", node.op, node.name));
        }
    });
    match fallen.len() {
        0 => Ok(()),
        n => Err(Error::Check(format!(
            "{n} nodes of the gradient graph run on the CPU instead of {}",
            args.engine.device
        ))),
    }
}

fn engines(printer: &Printer) -> Result<()> {
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
