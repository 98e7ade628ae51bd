//! `train`: the adapters (and the head) learn from your data.

mod arguments;
mod bar;
mod config;
mod print;
mod resolve;

use clap::{ArgMatches, Command, FromArgMatches};
use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::onnx::Model;
use crate::train::{self, TrainOptions};
use arguments::Arguments;
pub use bar::Bar;
use print::{print, resume_command};

/// What the command line gives of [`Arguments`]; the rest may be in a settings file.
pub struct Args {
    given: ArgMatches,
}

impl FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self { given: matches.clone() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.given = matches.clone();
        Ok(())
    }
}

impl clap::Args for Args {
    fn augment_args(command: Command) -> Command {
        config::optional(Arguments::augment_args(command))
    }

    fn augment_args_for_update(command: Command) -> Command {
        config::optional(Arguments::augment_args_for_update(command))
    }
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let (args, settings) = config::resolve(&args.given)?;
    let options = TrainOptions { settings, ..args.options()? };
    let model = Model::open(&args.model)?;
    let engine = args.engine.open(printer)?;
    let mut progress = Bar::new(printer, true);
    progress.stop_on_interrupt();
    let summary = train::run(&model, &options, engine.as_ref(), &mut progress)?;
    drop(progress);
    if args.plan {
        return Ok(());
    }
    if summary.stopped {
        printer.say(match &summary.checkpoint {
            None => "interrupted before the first step".into(),
            Some(checkpoint) => format!(
                "interrupted after step {}: what was trained so far is saved; go on from {} with\n  {}",
                summary.steps.len(),
                checkpoint.display(),
                resume_command(std::env::args())
            ),
        });
    }
    let last = summary.evals.last();
    let value = json!({
        "output_dir": args.output_dir,
        "injected": summary.injected,
        "adapter": summary.adapter,
        "steps": summary.steps.len(),
        "steps_before": summary.steps_before,
        "checkpoint": summary.checkpoint,
        "first_loss": summary.steps.first().map(|s| s.loss),
        "last_loss": summary.steps.last().map(|s| s.loss),
        "eval_loss": last.map(|e| e.eval_loss),
        "eval_accuracy": last.and_then(|e| e.eval_accuracy),
        "best": summary.best,
        "best_kept": summary.best_kept,
        "stopped_early": summary.stopped_early,
        "seconds": summary.seconds,
        "samples_per_second": summary.samples_per_second,
        "tokens_per_second": summary.tokens_per_second,
        "peak_memory_bytes": summary.peak_memory,
        "adapter_bytes": summary.adapter_bytes,
    });
    printer.result(&value, |p| print(&summary, p));
    if !summary.steps.is_empty() {
        printer.say(format!("wrote {}: injected.onnx, adapter/, report.html", args.output_dir.display()));
    }
    Ok(())
}
