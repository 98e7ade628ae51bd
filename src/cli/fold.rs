//! `fold`: adapters into the weights they adapt.

use std::path::PathBuf;

use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::fold::{FoldOptions, fold};
use crate::onnx::{Durability, Model};

/// Fold adapters into the weights: a plain ONNX file again
#[derive(clap::Args)]
pub struct Args {
    /// The injected model
    model: PathBuf,

    /// The merged model to write
    #[arg(short, long)]
    output: PathBuf,

    /// Refuse weights that are not finite; nothing is written then
    #[arg(long)]
    safe_merge: bool,

    /// Do not wait until the file is on the disk (as cp does not): quicker, but a power cut may lose it
    #[arg(long)]
    no_sync: bool,

    /// Merge only these adapters, in this order (comma-separated)
    #[arg(long, value_delimiter = ',')]
    adapter_names: Option<Vec<String>>,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let durability = if args.no_sync { Durability::Buffered } else { Durability::OnDisk };
    let options = FoldOptions { safe: args.safe_merge, adapters: args.adapter_names, durability };
    let summary = fold(&model, &options, &args.output)?.write(&model, &args.output)?;
    printer.result(&json!({"output": args.output, "summary": summary}), |p| {
        p.line(&format!("{} layers merged", summary.merged.len() + summary.copied.len()));
        for module in &summary.copied {
            p.line(&format!("{module}: others read its weight, so it got one of its own"));
        }
    });
    printer.say(format!("wrote {}", args.output.display()));
    Ok(())
}
