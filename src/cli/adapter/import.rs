//! `adapter import`: a PEFT directory into a model.

use std::path::PathBuf;

use serde_json::json;

use super::super::{inject, printer::Printer};
use crate::Result;
use crate::inject::import;
use crate::onnx::Model;
use crate::peft::{self, ReadOptions};

/// Put an adapter trained elsewhere (a PEFT directory, BONE or MISS) into a model
#[derive(clap::Args)]
pub struct Args {
    /// The model, plain or injected
    model: PathBuf,

    /// Directory with adapter_config.json and adapter_model.safetensors
    adapter: PathBuf,

    /// The model to write
    #[arg(short, long)]
    output: PathBuf,

    /// Name the adapter gets
    #[arg(long, default_value = "default")]
    adapter_name: String,

    /// Take what fits where not everything does
    #[arg(long)]
    allow_partial: bool,

    /// Make the parameters inputs of the graph, too, for ONNX Runtime's .onnx_adapter files
    #[arg(long)]
    overridable: bool,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let mut warnings = Vec::new();
    let options = ReadOptions { allow_partial: args.allow_partial };
    let adapter = peft::read(&args.adapter, &args.adapter_name, &options, &mut warnings)?;
    let injected = import(&model, adapter, args.allow_partial, args.overridable)?;
    warnings.iter().chain(&injected.summary.warnings).for_each(|w| printer.warn(w));
    let summary = injected.write(&model, &args.output)?;
    printer.result(&json!({"output": args.output, "summary": summary}), |p| inject::print(&summary, p));
    printer.say(format!("wrote {}", args.output.display()));
    Ok(())
}
