//! `doctor`: which engines there are, and whether they compute.

use super::printer::Printer;
use crate::engine::doctor;
use crate::{Error, Result};

/// Show which libonnxruntime was found, which engine is taken, and try them
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, printer: &Printer) -> Result<()> {
    let report = doctor();
    printer.result(&report, |p| {
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
        p.table(&["", "", ""], rows);
    });
    match report.problem {
        Some(problem) => Err(Error::Check(problem)),
        None if report.checks.iter().any(|c| !c.passed) => Err(Error::Check("an engine does not compute right".into())),
        None => Ok(()),
    }
}
