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

    /// With class ids (-100 is left out): cross-entropy, causal-lm (each token against the next one's label); with
    /// numbers: bce-with-logits, mse, mae, huber; with rows: kl-div (soft targets), cosine-embedding
    #[arg(long)]
    loss: Loss,

    /// Part of a class label that is spread over all classes, for cross-entropy and causal-lm [default: 0]
    #[arg(long, visible_alias = "label-smoothing-factor")]
    label_smoothing: Option<f64>,

    /// Where huber goes from a square to a line [default: 1]
    #[arg(long)]
    huber_delta: Option<f64>,

    /// What kl-div divides the scores by before their softmax [default: 1]
    #[arg(long)]
    temperature: Option<f64>,

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

    /// adamw, adam (weight decay as an L2 term), sgd or lion
    #[arg(long, visible_alias = "optim", default_value = "adamw", value_parser = ["adamw", "adam", "sgd", "lion"])]
    optimizer: String,

    /// Momentum of sgd [default: 0]
    #[arg(long)]
    momentum: Option<f64>,

    /// Nesterov's momentum for sgd
    #[arg(long)]
    nesterov: bool,

    /// Learning rate
    #[arg(long, visible_alias = "learning-rate", default_value_t = 1e-3)]
    lr: f64,

    /// Learning rate of layers trained in full (the head) [default: --lr]
    #[arg(long)]
    head_lr: Option<f64>,

    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,

    /// Weight decay on biases and norms, too
    #[arg(long)]
    decay_all: bool,

    /// Decay rates of the moments [default: 0.9,0.999; lion: 0.9,0.99]
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    betas: Option<Vec<f64>>,

    /// What is added to the root in adamw and adam [default: 1e-8]
    #[arg(long, visible_alias = "adam-epsilon")]
    eps: Option<f64>,

    /// constant, linear, cosine, cosine-with-restarts or polynomial
    #[arg(long, visible_alias = "lr-scheduler-type", default_value = "constant")]
    schedule: Shape,

    /// Cosines that cosine-with-restarts goes through [default: 1]
    #[arg(long)]
    num_cycles: Option<usize>,

    /// Power of the polynomial schedule [default: 1]
    #[arg(long)]
    power: Option<f64>,

    /// Learning rate at the end of the polynomial schedule [default: 1e-7]
    #[arg(long)]
    lr_end: Option<f64>,

    /// Steps over which the learning rate rises from zero
    #[arg(long, default_value_t = 0)]
    warmup_steps: usize,

    /// Share of the run over which the learning rate rises from zero
    #[arg(long, default_value_t = 0.0, conflicts_with = "warmup_steps")]
    warmup_ratio: f64,

    /// Clip the gradients to this norm
    #[arg(long)]
    max_grad_norm: Option<f64>,

    /// Samples per batch [default: 8, or what the model is made for]
    #[arg(long, visible_alias = "per-device-train-batch-size")]
    batch_size: Option<usize>,

    /// Batches per step: their gradients make one update, as those of one large batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    gradient_accumulation_steps: usize,

    /// Steps to train
    #[arg(long, visible_alias = "max-steps", conflicts_with = "epochs")]
    steps: Option<usize>,

    /// Passes over the data to train [default: 3]
    #[arg(long, visible_alias = "num-train-epochs")]
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

/// Fails where a flag was `given` that is for other choices than the one made.
fn only_for(given: bool, flag: &str, choices: &str) -> Result<()> {
    if given { Err(Error::config(format!("{flag} is for {choices}; leave it out here"))) } else { Ok(()) }
}

impl Args {
    fn loss(&self) -> Result<Loss> {
        let mut loss = self.loss;
        let given = (self.label_smoothing.is_some(), self.huber_delta.is_some(), self.temperature.is_some());
        let by_class = matches!(loss, Loss::CrossEntropy { .. } | Loss::CausalLm { .. });
        only_for(given.0 && !by_class, "label-smoothing", "--loss cross-entropy and causal-lm")?;
        only_for(given.1 && !matches!(loss, Loss::Huber { .. }), "huber-delta", "--loss huber")?;
        only_for(given.2 && !matches!(loss, Loss::KlDiv { .. }), "temperature", "--loss kl-div")?;
        match &mut loss {
            Loss::CrossEntropy { label_smoothing: value } | Loss::CausalLm { label_smoothing: value } => {
                *value = self.label_smoothing.unwrap_or(*value);
            }
            Loss::Huber { delta: value } => *value = self.huber_delta.unwrap_or(*value),
            Loss::KlDiv { temperature: value } => *value = self.temperature.unwrap_or(*value),
            _ => {}
        }
        Ok(loss)
    }

    fn rule(&self) -> Result<Rule> {
        let name = self.optimizer.as_str();
        only_for(self.momentum.is_some() && name != "sgd", "momentum", "--optimizer sgd")?;
        only_for(self.nesterov && name != "sgd", "nesterov", "--optimizer sgd")?;
        only_for(self.betas.is_some() && name == "sgd", "betas", "--optimizer adamw, adam and lion")?;
        only_for(self.eps.is_some() && matches!(name, "sgd" | "lion"), "eps", "--optimizer adamw and adam")?;
        let betas = match self.betas.as_deref() {
            None => (0.9, if name == "lion" { 0.99 } else { 0.999 }),
            Some(&[first, second]) => (first, second),
            Some(_) => return Err(Error::config("betas has to be two numbers, as in 0.9,0.999")),
        };
        let eps = self.eps.unwrap_or(1e-8);
        Ok(match name {
            "sgd" => Rule::Sgd { momentum: self.momentum.unwrap_or(0.0), nesterov: self.nesterov },
            "adam" => Rule::Adam { betas, eps },
            "lion" => Rule::Lion { betas },
            _ => Rule::AdamW { betas, eps },
        })
    }

    fn shape(&self) -> Result<Shape> {
        let mut shape = self.schedule;
        let restarts = matches!(shape, Shape::CosineWithRestarts { .. });
        let polynomial = matches!(shape, Shape::Polynomial { .. });
        only_for(self.num_cycles.is_some() && !restarts, "num-cycles", "--schedule cosine-with-restarts")?;
        only_for(self.power.is_some() && !polynomial, "power", "--schedule polynomial")?;
        only_for(self.lr_end.is_some() && !polynomial, "lr-end", "--schedule polynomial")?;
        match &mut shape {
            Shape::CosineWithRestarts { cycles } => *cycles = self.num_cycles.unwrap_or(*cycles),
            Shape::Polynomial { power, lr_end } => {
                *power = self.power.unwrap_or(*power);
                *lr_end = self.lr_end.unwrap_or(*lr_end);
            }
            _ => {}
        }
        Ok(shape)
    }

    fn options(&self) -> Result<TrainOptions> {
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
            optimizer: self.rule()?,
            lr: self.lr,
            head_lr: self.head_lr,
            weight_decay: self.weight_decay,
            decay_all: self.decay_all,
            schedule: self.shape()?,
            warmup_steps: self.warmup_steps,
            warmup_ratio: self.warmup_ratio,
            max_grad_norm: self.max_grad_norm,
            batch_size: self.batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            steps: self.steps,
            epochs: self.epochs,
            shuffle: !self.no_shuffle,
            seed: self.seed,
            save_steps: self.save_steps,
            save_total_limit: self.save_total_limit,
            resume: self.resume,
            load: self.engine.load_options(),
            ..TrainOptions::new(&self.output_dir, &self.data, self.loss()?)
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
