//! `fold`: adapters into the weights they adapt.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::engine::{self, Device, EngineKind, LoadOptions};
use crate::fold::{FoldOptions, QuantizedFold, fold};
use crate::onnx::{Durability, Model};
use crate::peft::{self, ReadOptions};
use crate::verify::{Comparison, Tolerance, compare, random_inputs};

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
        quantized: match (args.requantize, args.dequantize) {
            (true, _) => QuantizedFold::Requantize,
            (_, true) => QuantizedFold::Dequantize,
            _ => QuantizedFold::Keep,
        },
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
    // What quantising again did to the outputs. Adapters from outside are in no model that could be run.
    let outputs = match summary.requantized.is_empty() || !args.adapter.is_empty() {
        true => None,
        false => output_error(&model, &args.output)
            .map_err(|e| printer.warn(format!("the error of the outputs was not measured: {e}")))
            .ok(),
    };
    let errors = outputs.as_ref().map(|c| &c.outputs);
    printer.result(&json!({"output": args.output, "summary": summary, "output_errors": errors}), |p| {
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
    printer.say(format!("wrote {}", args.output.display()));
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
