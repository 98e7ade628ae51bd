//! `grad`: a model that computes its own gradient.

use std::path::PathBuf;

use serde_json::json;

use super::printer::Printer;
use crate::Result;
use crate::grad::grad;
use crate::onnx::Model;

/// Add a model's gradient to it: a seed input per output, a gradient output per tensor
#[derive(clap::Args)]
pub struct Args {
    /// The ONNX file
    model: PathBuf,

    /// The model to write: the original inputs and outputs, `<output>.seed` inputs, `<name>.grad` outputs
    #[arg(short, long)]
    output: PathBuf,

    /// Outputs to differentiate [default: all floating-point ones]
    #[arg(long, value_name = "OUTPUT", num_args = 1..)]
    of: Vec<String>,

    /// Graph inputs or initializers to differentiate by [default: all floating-point graph inputs]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    wrt: Vec<String>,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let model = Model::open(&args.model)?;
    let summary = grad(&model, &args.of, &args.wrt, &args.output)?;
    printer.result(&json!({"output": args.output, "summary": summary}), |p| {
        for (output, seed) in &summary.seeds {
            p.line(&format!("seed      {seed} (for {output})"));
        }
        for (name, gradient) in &summary.gradients {
            p.line(&format!("gradient  {gradient} (by {name})"));
        }
        p.line(&format!(
            "{} operators differentiated, {} nodes added, {:.3} s",
            summary.differentiated, summary.nodes_added, summary.seconds
        ));
    });
    printer.say(format!("wrote {}", args.output.display()));
    Ok(())
}
