//! `adapter activate`, `delete`, `rename`: what changes the adapters of a model and reads no values.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::super::printer::Printer;
use crate::Result;
use crate::adapter::Injection;
use crate::inject;
use crate::onnx::{Model, Patch};

/// Choose the adapters that a model computes with
#[derive(clap::Args)]
pub struct Activate {
    /// The injected model
    model: PathBuf,

    /// The active adapters, in the order they apply (comma-separated); an empty list gives the base's results
    #[arg(long, value_delimiter = ',', required = true)]
    adapters: Vec<String>,

    /// The model to write (may be the same file)
    #[arg(short, long)]
    output: PathBuf,
}

/// Delete an adapter without a trace
#[derive(clap::Args)]
pub struct Delete {
    /// The injected model
    model: PathBuf,

    /// The adapter
    name: String,

    /// The model to write (may be the same file)
    #[arg(short, long)]
    output: PathBuf,
}

/// Give an adapter another name
#[derive(clap::Args)]
pub struct Rename {
    /// The injected model
    model: PathBuf,

    /// Its name now
    from: String,

    /// Its new name
    to: String,

    /// The model to write (may be the same file)
    #[arg(short, long)]
    output: PathBuf,
}

pub fn activate(args: Activate, printer: &Printer) -> Result<()> {
    let names: Vec<String> = args.adapters.into_iter().filter(|name| !name.is_empty()).collect();
    change(&args.model, &args.output, printer, |model| inject::activate(model, &names))
}

pub fn delete(args: Delete, printer: &Printer) -> Result<()> {
    change(&args.model, &args.output, printer, |model| inject::delete(model, &args.name))
}

pub fn rename(args: Rename, printer: &Printer) -> Result<()> {
    change(&args.model, &args.output, printer, |model| inject::rename(model, &args.from, &args.to))
}

fn change(path: &Path, output: &Path, printer: &Printer, plan: impl FnOnce(&Model) -> Result<Patch>) -> Result<()> {
    let model = Model::open(path)?;
    inject::write(&model, plan(&model)?, output)?;
    let record = Injection::read(&Model::open(output)?)?.unwrap_or_default();
    let adapters: Vec<&str> = record.adapters.iter().map(|a| a.name.as_str()).collect();
    printer.result(&json!({"output": output, "adapters": adapters, "active": record.active}), |p| {
        let list = |names: &[&str]| if names.is_empty() { "none".to_string() } else { names.join(", ") };
        let active: Vec<&str> = record.active.iter().map(String::as_str).collect();
        p.line(&format!("adapters: {}; active: {}", list(&adapters), list(&active)));
    });
    printer.say(format!("wrote {}", output.display()));
    Ok(())
}
