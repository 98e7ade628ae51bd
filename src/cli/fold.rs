//! `fold`: adapters into the weights they adapt.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::fold::{FoldOptions, fold};
use crate::onnx::{Durability, Model};
use crate::peft::{self, ReadOptions};

/// Fold adapters into the weights: a plain ONNX file again
#[derive(clap::Args)]
pub struct Args {
    /// The injected model, or a plain one with --adapter
    model: PathBuf,

    /// The merged model to write
    #[arg(short, long)]
    output: PathBuf,

    /// Merge this PEFT directory (BONE or MISS), too; no injection is needed. May be given several times
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,

    /// Merge only these adapters, in this order (comma-separated) [default: the active ones]. A directory given with
    /// --adapter is called as its last path segment
    #[arg(long, value_delimiter = ',')]
    adapter_names: Option<Vec<String>>,

    /// Refuse weights that are not finite; nothing is written then
    #[arg(long)]
    safe_merge: bool,

    /// Take the adapters out of a merged model again
    #[arg(long)]
    unmerge: bool,

    /// Go on with what of an adapter fits the model
    #[arg(long)]
    allow_partial: bool,

    /// Do not wait until the file is on the disk (as cp does not): quicker, but a power cut may lose it
    #[arg(long)]
    no_sync: bool,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let durability = if args.no_sync { Durability::Buffered } else { Durability::OnDisk };
    let mut warnings = Vec::new();
    let mut extra = Vec::new();
    for dir in &args.adapter {
        let name = dir.file_name().map_or("adapter".into(), |n| n.to_string_lossy().into_owned());
        let read = ReadOptions { allow_partial: args.allow_partial };
        extra.push(peft::read(dir, &name, &read, &mut warnings)?);
    }
    let bar = printer.bar(0);
    let (ticks, shown) = (bar.clone(), bar.clone());
    let options = FoldOptions {
        safe: args.safe_merge,
        adapters: args.adapter_names,
        extra,
        undo: args.unmerge,
        allow_partial: args.allow_partial,
        durability,
        progress: Some(Arc::new(move |module: &str| {
            ticks.set_message(module.to_string());
            ticks.inc(1);
        })),
    };
    let folded = fold(&model, &options, &args.output)?;
    let summary = &folded.summary;
    shown.set_length((summary.merged.len() + summary.copied.len() + summary.replaced.len()) as u64);
    warnings.iter().chain(&summary.warnings).for_each(|w| printer.warn(w));
    let summary = folded.write(&model, &args.output);
    bar.finish_and_clear();
    let summary = summary?;
    printer.result(&json!({"output": args.output, "summary": summary}), |p| {
        let done = if args.unmerge { "unmerged" } else { "merged" };
        p.line(&format!("{} layers {done}", summary.merged.len() + summary.copied.len()));
        for module in &summary.copied {
            p.line(&format!("{module}: others read its weight, so it got one of its own"));
        }
        if !summary.replaced.is_empty() {
            p.line(&format!("trained in full: {}", summary.replaced.join(", ")));
        }
    });
    printer.say(format!("wrote {}", args.output.display()));
    Ok(())
}
