//! What `train` says when it is done.

use crate::cli::printer::Printer;
use crate::train::{EvalReport, Summary, size};

/// The command line `args` with `--resume`, for a shell.
pub fn resume_command(args: impl Iterator<Item = String>) -> String {
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

pub fn print(summary: &Summary, p: &Printer) {
    if let (Some(first), Some(last)) = (summary.steps.first(), summary.steps.last()) {
        let (steps, seconds) = (summary.steps.len() - summary.steps_before, summary.seconds);
        let rates = rates(summary.samples_per_second, summary.tokens_per_second);
        let (first, last) = (first.loss, last.loss);
        p.line(&format!("{steps} steps in {seconds:.1} s ({rates}), loss {first:.4} → {last:.4}"));
    }
    if summary.stopped_early {
        p.line("stopped early: evaluations became no better");
    }
    if let Some(eval) = summary.evals.last() {
        p.line(&eval_text(eval));
    }
    if let Some(best) = summary.best.filter(|best| summary.evals.last() != Some(best)) {
        p.line(&format!("best {}{}", eval_text(&best), if summary.best_kept { "; its values are saved" } else { "" }));
    }
    let memory = summary.peak_memory.map(|bytes| format!("peak memory {}, ", size(bytes))).unwrap_or_default();
    if !summary.steps.is_empty() {
        p.line(&format!("{memory}adapter {}", size(summary.adapter_bytes)));
    }
}

/// What a second takes of the data.
pub fn rates(samples: f64, tokens: Option<f64>) -> String {
    let tokens = tokens.map(|rate| format!(", {rate:.0} tokens/s")).unwrap_or_default();
    format!("{samples:.1} samples/s{tokens}")
}

pub fn eval_text(eval: &EvalReport) -> String {
    let accuracy = eval.eval_accuracy.map(|a| format!(", accuracy {a:.4}")).unwrap_or_default();
    format!("after step {}: evaluation loss {:.4}{accuracy}", eval.step, eval.eval_loss)
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
