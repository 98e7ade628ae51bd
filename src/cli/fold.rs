//! `fold`: adapters into the weights they adapt.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::engine::{self, Device, EngineKind, LoadOptions};
use crate::fold::{FoldOptions, QuantizedFold, fold};
use crate::onnx::{Durability, Layout, Model, Store};
use crate::peft::{self, ReadOptions};
use crate::verify::{Comparison, Tolerance, compare, random_inputs};

/// Fold adapters into the weights: a plain ONNX file again
#[derive(clap::Args)]
pub struct Args {
    /// The injected model, or a plain one with --adapter
    model: PathBuf,

    /// The merged model to write
    #[arg(short, long, required_unless_present = "in_place")]
    output: Option<PathBuf>,

    /// Write over the model itself: whenever it ends, the file is the old one or the new one
    #[arg(long, conflicts_with = "output")]
    in_place: bool,

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

    /// Quantise merged weights again where the base's are quantised, in the same form with scales fitted anew [default: the
    /// adapter stays beside such a layer, as plain nodes]
    #[arg(long, conflicts_with = "dequantize")]
    requantize: bool,

    /// Store merged weights in floating point where the base's are quantised
    #[arg(long)]
    dequantize: bool,

    /// Go on with what of an adapter fits the model
    #[arg(long)]
    allow_partial: bool,

    /// Keep all weights in a file of this name beside the merged model, a .safetensors one where it ends so [default: where
    /// the model has them]
    #[arg(long, value_name = "NAME", conflicts_with = "inline")]
    external_data_location: Option<String>,

    /// With --external-data-location: begin another file where one would be larger than this (500MB, 2GB, …)
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "external_data_location")]
    shard_size: Option<u64>,

    /// Keep all weights in the merged model itself
    #[arg(long)]
    inline: bool,

    /// Do not wait until the file is on the disk (as cp does not): quicker, but a power cut may lose it
    #[arg(long)]
    no_sync: bool,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let output = args.output.as_ref().unwrap_or(&args.model);
    let layout = match args.external_data_location {
        Some(name) => Layout::File { name, shard: args.shard_size },
        None if args.inline => Layout::Inline,
        None => Layout::AsRead,
    };
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
        quantized: match (args.requantize, args.dequantize) {
            (true, _) => QuantizedFold::Requantize,
            (_, true) => QuantizedFold::Dequantize,
            _ => QuantizedFold::Keep,
        },
        store: Store { layout, durability },
        progress: Some(Arc::new(move |module: &str| {
            ticks.set_message(module.to_string());
            ticks.inc(1);
        })),
    };
    let folded = fold(&model, &options)?;
    let summary = &folded.summary;
    shown.set_length((summary.merged.len() + summary.copied.len() + summary.replaced.len()) as u64);
    warnings.iter().chain(&summary.warnings).for_each(|w| printer.warn(w));
    let summary = folded.write(&model, output);
    bar.finish_and_clear();
    let summary = summary?;
    // What quantising again did to the outputs. Adapters from outside are in no model that could be run.
    let outputs = match summary.requantized.is_empty() || !args.adapter.is_empty() {
        true => None,
        false => output_error(&model, output)
            .map_err(|e| printer.warn(format!("the error of the outputs was not measured: {e}")))
            .ok(),
    };
    let errors = outputs.as_ref().map(|c| &c.outputs);
    printer.result(&json!({"output": output, "summary": summary, "output_errors": errors}), |p| {
        let done = if args.unmerge { "unmerged" } else { "merged" };
        p.line(&format!("{} layers {done}", summary.merged.len() + summary.copied.len()));
        if !summary.kept.is_empty() {
            p.line(&format!(
                "{} quantized layers keep their adapter beside them, as plain nodes; --requantize or --dequantize puts \
                 it into the weights",
                summary.kept.len()
            ));
        }
        if !summary.dequantized.is_empty() {
            p.line(&format!("{} quantized layers have a weight of floats now", summary.dequantized.len()));
        }
        if !summary.requantized.is_empty() {
            p.line(&format!("{} layers quantized again", summary.requantized.len()));
            let rows = summary.requantized.iter().map(|l| {
                let percent = |share: f64| format!("{:.3} %", 100.0 * share);
                vec![l.module.clone(), l.scheme.clone(), percent(l.error), percent(l.base_error)]
            });
            p.table(&["module", "quantized", "error", "of the base"], rows.collect());
        }
        for output in errors.into_iter().flatten() {
            p.line(&format!(
                "output {}: off by up to {:.3e} from the injected model, on made-up inputs",
                output.output, output.max_abs
            ));
        }
        for module in &summary.copied {
            p.line(&format!("{module}: others read its weight, so it got one of its own"));
        }
        if !summary.replaced.is_empty() {
            p.line(&format!("trained in full: {}", summary.replaced.join(", ")));
        }
    });
    printer.say(format!("wrote {}", output.display()));
    let list = |paths: &[PathBuf]| paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
    for (paths, what) in [
        (&summary.data.written, "with its data in"),
        (&summary.data.removed, "removed"),
        (&summary.data.kept, "left, because another model uses it:"),
    ] {
        if !paths.is_empty() {
            printer.say(format!("{what} {}", list(paths)));
        }
    }
    summary.data.note.iter().for_each(|note| printer.say(note));
    Ok(())
}

/// The differences between the injected model and the merged one on made-up inputs.
fn output_error(injected: &Model, merged: &Path) -> Result<Comparison> {
    let engine = engine::open(EngineKind::Auto, Device::Cpu)?;
    let merged = Model::open(merged)?;
    let inputs = random_inputs(injected, 2, 8, 0)?;
    let options = LoadOptions { threads: None, optimize: true };
    let tolerance = Tolerance { atol: f64::INFINITY, rtol: 0.0 };
    compare(injected, &merged, &inputs, engine.as_ref(), &options, tolerance)
}

/// A number of bytes: 1000, 500KB, 2GB.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let unit = match text[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        other => return Err(format!("{other:?} is no unit; there are KB, MB and GB")),
    };
    let number: u64 = text[..digits].parse().map_err(|_| "a number is wanted, such as 2GB")?;
    number.checked_mul(unit).filter(|n| *n > 0).ok_or_else(|| "this size makes no sense".into())
}
