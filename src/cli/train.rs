//! `train`: the adapters (and the head) learn from your data.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::ProgressBar;
use serde_json::json;

use super::engine::EngineArgs;
use super::printer::Printer;
use crate::onnx::Model;
use crate::train::data::TextOptions;
use crate::train::optimizer::Rule;
use crate::train::schedule::Shape;
use crate::train::{self, EvalReport, EvalStrategy, Loss, Plan, Progress, StepReport, Summary, TrainOptions};
use crate::{Error, Result};

/// Train an injected model's adapters (and head) on your data
#[derive(clap::Args)]
pub struct Args {
    /// The injected model
    model: PathBuf,

    /// Directory for what the run leaves: injected.onnx, adapter/, metrics.jsonl, loss.svg
    #[arg(short, long)]
    output_dir: PathBuf,

    /// Training data: .safetensors or .npz (an array per input, and the labels), or .jsonl (text and label)
    #[arg(long, value_name = "FILE")]
    data: PathBuf,

    /// Data to evaluate on
    #[arg(long, value_name = "FILE")]
    eval_data: Option<PathBuf>,

    /// When to evaluate: after every epoch, or at the end only
    #[arg(long, default_value = "epoch")]
    eval_strategy: EvalStrategy,

    /// cross-entropy (class ids; -100 is left out) or mse
    #[arg(long)]
    loss: Loss,

    /// Train only these adapters (comma-separated); other active ones stay as they are [default: all active]
    #[arg(long, value_delimiter = ',')]
    adapter_names: Option<Vec<String>>,

    /// The output to train on [default: the head, or the only output]
    #[arg(long, value_name = "NAME")]
    output: Option<String>,

    /// Name of the array with the labels
    #[arg(long, value_name = "NAME", default_value = "labels")]
    labels: String,

    /// Tokenizer of .jsonl texts (tokenizer.json)
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// Field of a .jsonl line that holds the text
    #[arg(long, default_value = "text")]
    text_field: String,

    /// Field of a .jsonl line that holds the label
    #[arg(long, default_value = "label")]
    label_field: String,

    /// Tokens of a text that are read
    #[arg(long)]
    max_length: Option<usize>,

    /// adamw or sgd
    #[arg(long, default_value = "adamw", value_parser = ["adamw", "sgd"])]
    optimizer: String,

    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,

    /// Learning rate of layers trained in full (the head) [default: --lr]
    #[arg(long)]
    head_lr: Option<f64>,

    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,

    /// Weight decay on biases and norms, too
    #[arg(long)]
    decay_all: bool,

    /// AdamW's decay rates of the moments
    #[arg(long, value_delimiter = ',', num_args = 1.., default_value = "0.9,0.999")]
    betas: Vec<f64>,

    #[arg(long, default_value_t = 1e-8)]
    eps: f64,

    /// constant, linear or cosine
    #[arg(long, default_value = "constant")]
    schedule: Shape,

    /// Steps over which the learning rate rises from zero
    #[arg(long, default_value_t = 0)]
    warmup_steps: usize,

    /// Clip the gradients to this norm
    #[arg(long)]
    max_grad_norm: Option<f64>,

    /// Samples per step [default: 8, or what the model is made for]
    #[arg(long)]
    batch_size: Option<usize>,

    /// Steps to train
    #[arg(long, conflicts_with = "epochs")]
    steps: Option<usize>,

    /// Passes over the data to train [default: 3]
    #[arg(long)]
    epochs: Option<usize>,

    /// Keep the file's order
    #[arg(long)]
    no_shuffle: bool,

    /// Seed of the shuffling
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Save a checkpoint after every N steps and after the last [default: only on Ctrl-C]
    #[arg(long, value_name = "N")]
    save_steps: Option<usize>,

    /// Keep only the N newest checkpoints [default: all]
    #[arg(long, value_name = "N")]
    save_total_limit: Option<usize>,

    /// Go on from the last whole checkpoint in the output directory, or from the start where there is none yet
    #[arg(long)]
    resume: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let options = args.options()?;
    let model = Model::open(&args.model)?;
    let engine = args.engine.open(printer)?;
    let mut progress = Bar::new(printer, true);
    progress.stop_on_interrupt();
    let summary = train::run(&model, &options, engine.as_ref(), &mut progress)?;
    drop(progress);
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
        "seconds": summary.seconds,
    });
    printer.result(&value, |p| print(&summary, p));
    if !summary.steps.is_empty() {
        printer.say(format!("wrote {}: injected.onnx, adapter/, metrics.jsonl, loss.svg", args.output_dir.display()));
    }
    Ok(())
}

/// The command line `args` with `--resume`, for a shell.
fn resume_command(args: impl Iterator<Item = String>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    let quoted = |arg: String| match arg.as_str() {
        "" => "''".into(),
        text if text.chars().all(plain) => arg,
        text => format!("'{}'", text.replace('\'', r"'\''")),
    };
    let mut words: Vec<String> = args.map(quoted).collect();
    if !words.iter().any(|word| word == "--resume") {
        words.push("--resume".into());
    }
    words.join(" ")
}

fn print(summary: &Summary, p: &Printer) {
    if let (Some(first), Some(last)) = (summary.steps.first(), summary.steps.last()) {
        let (steps, seconds) = (summary.steps.len() - summary.steps_before, summary.seconds);
        p.line(&format!("{steps} steps in {seconds:.1} s, loss {:.4} → {:.4}", first.loss, last.loss));
    }
    if let Some(eval) = summary.evals.last() {
        p.line(&eval_text(eval));
    }
}

fn eval_text(eval: &EvalReport) -> String {
    let accuracy = eval.eval_accuracy.map(|a| format!(", accuracy {a:.4}")).unwrap_or_default();
    format!("after step {}: evaluation loss {:.4}{accuracy}", eval.step, eval.eval_loss)
}

impl Args {
    fn options(&self) -> Result<TrainOptions> {
        let optimizer = if self.optimizer == "sgd" {
            Rule::Sgd
        } else {
            let &[first, second] = self.betas.as_slice() else {
                return Err(Error::config("betas has to be two numbers, as in 0.9,0.999"));
            };
            Rule::AdamW { betas: (first, second), eps: self.eps }
        };
        Ok(TrainOptions {
            eval_data: self.eval_data.clone(),
            eval_strategy: self.eval_strategy,
            adapter_names: self.adapter_names.clone(),
            output: self.output.clone(),
            labels: self.labels.clone(),
            text: TextOptions {
                tokenizer: self.tokenizer.clone(),
                text_field: self.text_field.clone(),
                label_field: self.label_field.clone(),
                max_length: self.max_length,
            },
            optimizer,
            lr: self.lr,
            head_lr: self.head_lr,
            weight_decay: self.weight_decay,
            decay_all: self.decay_all,
            schedule: self.schedule,
            warmup_steps: self.warmup_steps,
            max_grad_norm: self.max_grad_norm,
            batch_size: self.batch_size,
            steps: self.steps,
            epochs: self.epochs,
            shuffle: !self.no_shuffle,
            seed: self.seed,
            save_steps: self.save_steps,
            save_total_limit: self.save_total_limit,
            resume: self.resume,
            load: self.engine.load_options(),
            ..TrainOptions::new(&self.output_dir, &self.data, self.loss)
        })
    }
}

/// A run's progress on stderr: steps, loss, time left.
pub struct Bar<'a> {
    printer: &'a Printer,
    /// Print a line for every evaluation.
    evaluations: bool,
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl<'a> Bar<'a> {
    pub fn new(printer: &'a Printer, evaluations: bool) -> Self {
        Self { printer, evaluations, bar: ProgressBar::hidden(), interrupted: Arc::default() }
    }
}

impl Bar<'_> {
    /// From now on the first Ctrl-C ends the run after the step at hand, with everything saved; the second one ends
    /// the process.
    fn stop_on_interrupt(&self) {
        let flag = Arc::clone(&self.interrupted);
        let handler = move || {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        };
        if let Err(e) = ctrlc::set_handler(handler) {
            self.printer.warn(format!("Ctrl-C will end the run without saving: {e}"));
        }
    }
}

impl Progress for Bar<'_> {
    fn started(&mut self, plan: &Plan) {
        self.printer.say(format!(
            "{} samples, {} steps of {}, {} trainable parameters, loss on {}",
            plan.rows, plan.steps, plan.batch_size, plan.trainable, plan.output
        ));
        if plan.steps_taken > 0 {
            self.printer.say(format!("going on after step {}", plan.steps_taken));
        }
        self.bar = self.printer.bar(plan.steps as u64).with_position(plan.steps_taken as u64);
        self.bar.reset_eta();
    }

    fn warned(&mut self, what: &str) {
        self.printer.warn(what);
    }

    fn step(&mut self, report: &StepReport) {
        self.bar.set_position(report.step as u64);
        self.bar.set_message(format!("loss {:.4}  lr {:.2e}", report.loss, report.lr));
    }

    fn stop(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn evaluated(&mut self, report: &EvalReport) {
        if self.evaluations {
            self.bar.suspend(|| self.printer.say(eval_text(report)));
        }
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_quoted_and_resumed_once() {
        let command = |args: &[&str]| resume_command(args.iter().map(|a| a.to_string()));
        assert_eq!(
            command(&["bone-onnx", "train", "my model.onnx", ""]),
            "bone-onnx train 'my model.onnx' '' --resume"
        );
        assert_eq!(command(&["bone-onnx", "--resume", "it's"]), r"bone-onnx --resume 'it'\''s'");
    }
}
