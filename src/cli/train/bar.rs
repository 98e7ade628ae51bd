//! How far a run is, on stderr.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::ProgressBar;

use super::print::{eval_text, rates};
use crate::cli::printer::Printer;
use crate::train::data::Packed;
use crate::train::{Amount, CachePlan, EvalReport, MemoryPlan, Plan, Progress, StepReport, size};

/// A run's progress on stderr: steps, loss, time left.
pub struct Bar<'a> {
    printer: &'a Printer,
    /// Print a line for every evaluation.
    evaluations: bool,
    bar: ProgressBar,
    /// Steps that were begun, and what they took.
    begun: usize,
    taken: Amount,
    interrupted: Arc<AtomicBool>,
}

impl<'a> Bar<'a> {
    pub fn new(printer: &'a Printer, evaluations: bool) -> Self {
        let (bar, interrupted) = (ProgressBar::hidden(), Arc::default());
        Self { printer, evaluations, bar, begun: 0, taken: Amount::default(), interrupted }
    }
}

impl Bar<'_> {
    /// From now on the first Ctrl-C ends the run after the step at hand, with everything saved; the second one ends
    /// the process.
    pub fn stop_on_interrupt(&self) {
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
    fn planned(&mut self, memory: &MemoryPlan) {
        self.printer.result(memory, |p| {
            let rows = [
                ("engine", memory.engine),
                ("weights", memory.weights),
                ("activations and gradients, at most", memory.activations),
                ("of these, kept for the backward pass", memory.kept),
                ("parameters and moments", memory.state),
                ("peak", memory.peak),
            ];
            let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
            p.table(&["", "memory"], rows.map(|(what, bytes)| vec![what.into(), mebibytes(bytes)]).into());
            if let Some(saves) = memory.recompute_saves {
                p.line(&format!("with --recompute {} less", mebibytes(saves)));
            }
            if memory.unknown > 0 {
                p.line(&format!("{} values whose size is not known beforehand count for nothing", memory.unknown));
            }
            p.line(&match &memory.cache.why_not {
                Some(why) => format!("frozen part: not kept; {why}"),
                None => format!("frozen part: {}", kept(&memory.cache)),
            });
        });
    }

    fn caching(&mut self, done: usize, of: usize) {
        if done == 0 {
            self.bar = self.printer.bar(of as u64);
            self.bar.set_message("rows of the frozen part");
        }
        self.bar.set_position(done as u64);
    }

    fn started(&mut self, plan: &Plan) {
        self.bar.finish_and_clear();
        let packed = [("training data", plan.packed), ("evaluation data", plan.eval_packed)];
        for (data, Packed { texts, rows, length, left_out }) in
            packed.into_iter().filter_map(|(data, packed)| Some((data, packed?)))
        {
            self.printer.say(format!(
                "{data}: {texts} texts packed into {rows} rows of {length} tokens, {left_out} tokens left out"
            ));
        }
        self.printer.say(format!(
            "{} samples, {} steps of {}, {} trainable parameters, loss on {}",
            plan.rows, plan.steps, plan.batch_size, plan.trainable, plan.output
        ));
        if !plan.frozen.is_empty() {
            self.printer.say(format!("{} frozen: {}", plan.frozen.len(), plan.frozen.join(", ")));
        }
        if plan.cache.why_not.is_none() {
            self.printer.say(format!("frozen part: {}", kept(&plan.cache)));
        }
        if plan.steps_taken > 0 {
            self.printer.say(format!("going on after step {}", plan.steps_taken));
        }
        self.bar = self.printer.bar(plan.steps as u64).with_position(plan.steps_taken as u64);
        self.bar.reset_eta();
    }

    fn warned(&mut self, what: &str) {
        self.printer.warn(what);
    }

    fn begun(&mut self, amount: Amount) {
        self.begun += 1;
        self.taken = self.taken.and(amount);
    }

    fn step(&mut self, report: &StepReport) {
        self.bar.set_position(report.step as u64);
        let rate = |count: usize| self.bar.per_sec() * count as f64 / self.begun.max(1) as f64;
        let rates = rates(rate(self.taken.samples), self.taken.tokens.map(rate));
        self.bar.set_message(format!("loss {:.4}  lr {:.2e}  {rates}", report.loss, report.lr));
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

/// What is computed once.
fn kept(cache: &CachePlan) -> String {
    let (bytes, spares) = (size(cache.bytes), cache.spares_percent);
    format!("computed once for each row, {bytes} on disk; spares about {spares} % of the work")
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
