//! Which evaluation was the best, and when there is no use in going on: transformers' `load_best_model_at_end` and
//! `EarlyStoppingCallback` (4.57).

use super::graph::Parameter;
use super::record::metrics::EvalReport;
use crate::words::words;

/// What evaluations are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Metric {
    /// Lower is better.
    #[default]
    EvalLoss,
    /// Higher is better; for losses over classes.
    EvalAccuracy,
}

// The names in `metrics.jsonl`.
words!(Metric, "metric-for-best-model" {
    EvalLoss = "eval_loss" | "eval-loss" | "loss",
    EvalAccuracy = "eval_accuracy" | "eval-accuracy" | "accuracy",
});

impl Metric {
    /// Its value in a report; NaN where it has none.
    pub fn of(self, report: &EvalReport) -> f64 {
        match self {
            Self::EvalLoss => report.eval_loss,
            Self::EvalAccuracy => report.eval_accuracy.unwrap_or(f64::NAN),
        }
    }

    /// By how much `now` is better than `before`.
    fn gain(self, before: f64, now: f64) -> f64 {
        match self {
            Self::EvalLoss => before - now,
            Self::EvalAccuracy => now - before,
        }
    }
}

/// The best evaluation of a run so far.
#[derive(Debug, Clone)]
pub(super) struct Best {
    metric: Metric,
    /// Evaluations without a gain after which the run ends.
    patience: Option<usize>,
    /// What is no more than this is no gain.
    threshold: f64,
    found: Option<EvalReport>,
    /// Evaluations since the last gain.
    waited: usize,
    /// The parameters at the best evaluation, where they are kept.
    pub kept: Vec<Parameter>,
}

impl Best {
    pub fn new(metric: Metric, patience: Option<usize>, threshold: f64) -> Self {
        Self { metric, patience, threshold, found: None, waited: 0, kept: Vec::new() }
    }

    /// Takes note of an evaluation; true where none before it was as good.
    pub fn see(&mut self, report: &EvalReport) -> bool {
        let now = self.metric.of(report);
        // What is not a number is no gain and never the best.
        let gain = match &self.found {
            None if now.is_nan() => f64::NAN,
            None => f64::INFINITY,
            Some(best) => self.metric.gain(self.metric.of(best), now),
        };
        self.waited = if gain > self.threshold { 0 } else { self.waited + 1 };
        // A gain within the threshold makes it the best all the same.
        let best = gain > 0.0;
        if best {
            self.found = Some(*report);
        }
        best
    }

    /// Whether as many evaluations as there is patience for have gained nothing.
    pub fn enough(&self) -> bool {
        self.patience.is_some_and(|patience| self.waited >= patience)
    }

    pub fn found(&self) -> Option<EvalReport> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps that were the best when they were seen, and the one after which the run ends.
    fn follow(metric: Metric, patience: usize, threshold: f64, values: &[f64]) -> (Vec<usize>, Option<usize>) {
        let mut best = Best::new(metric, Some(patience), threshold);
        let mut seen = Vec::new();
        for (step, value) in values.iter().enumerate() {
            if best.see(&EvalReport { step, eval_loss: *value, eval_accuracy: Some(*value) }) {
                seen.push(step);
            }
            if best.enough() {
                return (seen, Some(step));
            }
        }
        (seen, None)
    }

    #[test]
    fn the_run_ends_once_nothing_was_gained_often_enough() {
        let losses = [3.0, 2.0, 2.0, 1.9, 2.5, f64::NAN, 1.0];
        assert_eq!(follow(Metric::EvalLoss, 1, 0.0, &losses), (vec![0, 1], Some(2)));
        assert_eq!(follow(Metric::EvalLoss, 2, 0.0, &losses), (vec![0, 1, 3], Some(5)));
        assert_eq!(follow(Metric::EvalLoss, 3, 0.0, &losses), (vec![0, 1, 3, 6], None));
        // 1.9 is the best, but too little of a gain to wait any longer.
        assert_eq!(follow(Metric::EvalLoss, 3, 0.5, &losses), (vec![0, 1, 3], Some(4)));
    }

    #[test]
    fn accuracy_is_the_better_the_higher_and_what_is_no_number_never_the_best() {
        assert_eq!(
            follow(Metric::EvalAccuracy, 2, 0.0, &[f64::NAN, 0.5, 0.25, 0.75, 0.75, 0.5]),
            (vec![1, 3], Some(5))
        );
        assert_eq!(follow(Metric::EvalAccuracy, 2, 0.0, &[f64::NAN, f64::NAN, 1.0]), (vec![], Some(1)));
    }
}
