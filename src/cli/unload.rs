//! `unload`: the base back.

use std::path::PathBuf;

use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::onnx::{Durability, Model, write_beside};
use crate::unload::unload;

/// Take the adapters out again: the base file, byte for byte
#[derive(clap::Args)]
pub struct Args {
    /// The injected model
    model: PathBuf,

    /// The base model to write
    #[arg(short, long)]
    output: PathBuf,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let patch = unload(&model)?;
    write_beside(&model, patch, &args.output, Durability::OnDisk)?;
    printer.result(&json!({"output": args.output}), |_| {});
    printer.say(format!("wrote {}", args.output.display()));
    Ok(())
}
