//! The loop: steps, evaluations and checkpoints, until there is a reason to end.

use std::time::Instant;

use super::best::Best;
use super::data::{Batches, Feed, Portions, ahead};
use super::evaluate;
use super::graph::ForwardSession;
use super::record::checkpoint::Checkpoints;
use super::record::metrics::MetricsFile;
use super::record::tensorboard::EventsFile;
use super::update::schedule::Schedule;
use super::update::step::{Learned, Outcome, Place};
use super::{Amount, EvalReport, EvalStrategy, Progress, StepReport, TrainOptions};
use crate::{Error, Result};

/// Why a run is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// All steps are taken.
    Done,
    /// Evaluations became no better.
    Early,
    /// [`Progress::stop`] asked for it.
    Asked,
}

/// The state of a run between two steps.
pub(super) struct Trainer<'a> {
    pub options: &'a TrainOptions,
    pub schedule: Schedule,
    pub learned: Learned,
    /// Where the data stands after the steps that were begun ([`Batches::position`]), whatever lies ready beyond them.
    pub position: (u64, usize),
    /// Rows of a full batch.
    pub batch_size: usize,
    pub place: Place,
    pub eval: Option<(ForwardSession, &'a Feed<'a>)>,
    pub metrics: MetricsFile,
    pub events: EventsFile,
    pub checkpoints: Checkpoints<'a>,
    pub best: Best,
    pub steps: Vec<StepReport>,
    pub evals: Vec<EvalReport>,
    /// What the steps of this process took.
    pub taken: Amount,
}

impl Trainer<'_> {
    /// Goes on until `total` steps are taken; or there is a reason to end before that. However it ends, `learned` is
    /// what the steps that were reported have made.
    pub fn steps(
        &mut self,
        total: usize,
        feed: &Feed,
        mut batches: Batches,
        progress: &mut dyn Progress,
    ) -> Result<End> {
        let (epoch, row) = self.position;
        batches.go_to(epoch, row);
        let (micro, left) = (self.options.gradient_accumulation_steps, total.saturating_sub(self.steps.len()));
        let outcome = ahead(feed, batches, micro, left, |portions| self.all_steps(total, portions, progress));
        let fetched = self.place.fetch(&mut self.learned);
        outcome.and_then(|end| fetched.map(|()| end))
    }

    fn all_steps(&mut self, total: usize, mut portions: Portions, progress: &mut dyn Progress) -> Result<End> {
        let mut begun = self.steps.len();
        let mut since = Instant::now();
        while begun < total {
            if self.best.enough() {
                return Ok(End::Early);
            }
            if progress.stop() {
                self.finish(begun, &mut since, progress)?;
                self.save(begun)?;
                return Ok(End::Asked);
            }
            let portion = portions.take()?;
            let micro = portion.batches;
            self.position = portion.position;
            let amount = Amount::of(&micro);
            self.taken = self.taken.and(amount);
            progress.begun(amount);
            let (factor, clip) = (self.schedule.factor(begun), self.options.max_grad_norm);
            self.place.begin(&mut self.learned, &micro, self.options.loss, factor, clip)?;
            begun += 1;

            let step = begun;
            let due = match self.options.eval_strategy {
                EvalStrategy::Epoch => portion.ends_epoch,
                EvalStrategy::Steps(every) => step.is_multiple_of(every),
                EvalStrategy::End => false,
            };
            let (evaluates, saves) = (due || step == total, self.checkpoints.due(step, step == total));
            let ahead = if evaluates || saves { 0 } else { self.place.ahead() };
            self.finish(step - ahead.min(step), &mut since, progress)?;
            if evaluates && self.eval.is_some() {
                self.place.fetch(&mut self.learned)?;
            }
            if evaluates && let Some((session, feed)) = &mut self.eval {
                let (loss, size) = (self.options.loss, self.batch_size);
                let report = evaluate::evaluate(session, &self.learned.parameters, feed, loss, size, step)?;
                self.evals.push(report);
                self.metrics.write(&report)?;
                self.events.eval(&report)?;
                progress.evaluated(&report);
                if self.best.see(&report) && self.options.load_best_model_at_end {
                    self.best.kept.clone_from(&self.learned.parameters);
                }
                since = Instant::now();
            }
            if saves || self.best.enough() && self.checkpoints.due(step, true) {
                self.save(step)?;
                since = Instant::now();
            }
        }
        Ok(End::Done)
    }

    /// Waits for the steps up to `last` and reports them.
    fn finish(&mut self, last: usize, since: &mut Instant, progress: &mut dyn Progress) -> Result<()> {
        while self.steps.len() < last {
            let step = self.steps.len() + 1;
            let outcome = self.place.finish()?;
            let Outcome { loss, grad_norm, finite } = outcome;
            if !outcome.is_finite() {
                let what = if loss.is_finite() { "gradient" } else { "loss" };
                return Err(self.not_finite(what, step));
            }
            let seconds = since.elapsed().as_secs_f64();
            *since = Instant::now();
            let report =
                StepReport { step, loss, lr: self.options.lr * self.schedule.factor(step - 1), grad_norm, seconds };
            self.steps.push(report);
            self.metrics.write(&report)?;
            self.events.step(&report)?;
            progress.step(&report);
            if !finite {
                return Err(self.not_finite("updated parameters", step));
            }
        }
        Ok(())
    }

    /// Goes back to the last good values and says what happened.
    fn not_finite(&mut self, what: &str, step: usize) -> Error {
        if let Err(error) = self.place.go_back(&mut self.learned) {
            return error;
        }
        let kept = if self.learned.last_good.is_empty() {
            "before anything was trained, so the data or the model hold values that are not finite or too large".into()
        } else {
            std::mem::swap(&mut self.learned.parameters, &mut self.learned.last_good);
            format!(
                "the last values with a finite loss are saved in {}. Try a lower lr, warm-up steps or a max-grad-norm",
                self.options.out.display()
            )
        };
        Error::Check(format!("training stopped at step {step}: the {what} became NaN or infinite; {kept}"))
    }
}
