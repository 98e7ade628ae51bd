//! What a caller sees of a run: while it goes on, and when it is over.

use std::path::PathBuf;

use super::data::{Batch, Packed};
use super::options::TrainOptions;
use super::plan::MemoryPlan;
use super::prefix::CachePlan;
use super::record::metrics::{EvalReport, StepReport};

/// Watches a run. The library itself prints nothing.
pub trait Progress {
    /// What memory the run would take, where nothing but that was asked for.
    fn planned(&mut self, _memory: &MemoryPlan) {}
    /// What is frozen is computed once and kept: of so many rows, so many are done.
    fn caching(&mut self, _done: usize, _of: usize) {}
    /// Everything was checked and loaded; the first step comes next.
    fn started(&mut self, _plan: &Plan) {}
    /// A step begins, with so much data.
    fn begun(&mut self, _amount: Amount) {}
    fn step(&mut self, _report: &StepReport) {}
    fn evaluated(&mut self, _report: &EvalReport) {}
    /// Something to know that does not end the run.
    fn warned(&mut self, _what: &str) {}
    /// Asked before every step: true ends the run early, with everything saved, a checkpoint included.
    fn stop(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

/// How much data steps take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    pub samples: usize,
    /// Those that count, of models that read tokens.
    pub tokens: Option<usize>,
}

impl Amount {
    pub(super) fn of(batches: &[Batch]) -> Self {
        let amounts = batches.iter().map(|b| Self { samples: b.samples, tokens: b.tokens });
        amounts.fold(Self::default(), Self::and)
    }

    /// Both together; tokens are known where they are of both.
    pub fn and(self, more: Self) -> Self {
        if self.samples == 0 {
            return more;
        }
        let tokens = self.tokens.zip(more.tokens).map(|(a, b)| a.saturating_add(b));
        Self { samples: self.samples.saturating_add(more.samples), tokens }
    }
}

/// What a run is going to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub rows: usize,
    pub eval_rows: Option<usize>,
    /// How these rows came of texts, where those were packed.
    pub packed: Option<Packed>,
    pub eval_packed: Option<Packed>,
    /// Samples per step, those of all its batches together.
    pub batch_size: usize,
    pub steps: usize,
    pub steps_per_epoch: usize,
    /// Steps that a checkpoint has spared.
    pub steps_taken: usize,
    /// The output that the loss looks at.
    pub output: String,
    /// Numbers that are trained.
    pub trainable: usize,
    /// Parameters that lie before the node where the gradients end, and stay as they are.
    pub frozen: Vec<String>,
    /// What is computed once and kept.
    pub cache: CachePlan,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// All of them, those before a checkpoint included.
    pub steps: Vec<StepReport>,
    /// How many of them were taken before the checkpoint that the run went on from.
    pub steps_before: usize,
    pub evals: Vec<EvalReport>,
    /// The best of them, by [`TrainOptions::metric_for_best_model`].
    pub best: Option<EvalReport>,
    /// Whether the saved values are those of the best evaluation, not the last ones.
    pub best_kept: bool,
    /// True where [`Progress::stop`] ended it.
    pub stopped: bool,
    /// True where it ended because evaluations became no better.
    pub stopped_early: bool,
    /// Of the steps after `steps_before`, evaluations and saving included.
    pub seconds: f64,
    /// Training samples in the steps after `steps_before`, by the time of these steps alone.
    pub samples_per_second: f64,
    /// The same of the tokens that count, of models that read tokens.
    pub tokens_per_second: Option<f64>,
    /// The most memory that the process ever held, where the system tells.
    pub peak_memory: Option<u64>,
    /// Of the files with the adapters' values.
    pub adapter_bytes: u64,
    /// Numbers that are trained.
    pub trainable: usize,
    /// Class names in order of their ids, where labels were given as names.
    pub label_names: Option<Vec<String>>,
    pub injected: PathBuf,
    pub adapter: PathBuf,
    /// The newest one in the run's directory.
    pub checkpoint: Option<PathBuf>,
}

impl Summary {
    /// Of a run that was only planned.
    pub(super) fn planned(options: &TrainOptions) -> Self {
        Self {
            steps: Vec::new(),
            steps_before: 0,
            evals: Vec::new(),
            best: None,
            best_kept: false,
            stopped: false,
            stopped_early: false,
            seconds: 0.0,
            samples_per_second: 0.0,
            tokens_per_second: None,
            peak_memory: None,
            adapter_bytes: 0,
            trainable: 0,
            label_names: None,
            injected: options.out.join("injected.onnx"),
            adapter: options.out.join("adapter"),
            checkpoint: None,
        }
    }
}
