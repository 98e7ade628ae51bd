//! What a run is asked to do.

use std::path::PathBuf;

use super::best::Metric;
use super::data::{ImageOptions, TextOptions};
use super::graph::precision::Precision;
use super::graph::teacher::Teacher;
use super::loss::{Loss, Pooling};
use super::prefix::CacheFrozen;
use super::update::optimizer::Rule;
use super::update::schedule::Shape;
use crate::engine::LoadOptions;
use crate::{Error, Result};

/// When the evaluation data is looked at. It is always looked at after the last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvalStrategy {
    /// After every epoch.
    Epoch,
    /// After every so many steps.
    Steps(usize),
    /// Only after the last step.
    End,
}

/// Settings of a run; the field names are the command line's flags.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    /// Directory for everything the run leaves behind.
    pub out: PathBuf,
    /// Files, globs, folders that `datasets` saved, or folders of images; all of one kind.
    pub data: Vec<PathBuf>,
    /// As `data`; empty for none.
    pub eval_data: Vec<PathBuf>,
    pub eval_strategy: EvalStrategy,
    /// What evaluations are compared by.
    pub metric_for_best_model: Metric,
    /// Save the values of the best evaluation in the end, not the last ones.
    pub load_best_model_at_end: bool,
    /// End the run once so many evaluations in a row have brought no gain.
    pub early_stopping_patience: Option<usize>,
    /// What is no more than this is no gain.
    pub early_stopping_threshold: f64,
    /// [`Loss::Own`] with a `loss_model`, and only with one.
    pub loss: Loss,
    /// An ONNX file that computes the loss: its inputs have the names of outputs and inputs of the model and of columns of the
    /// data, its one output is a float scalar. Several batches of a step count by their samples.
    pub loss_model: Option<PathBuf>,
    /// Whose scores are soft targets beside the labels.
    pub teacher: Option<Teacher>,
    /// Everything before the outputs of the node of this name is constant, and learns nothing.
    pub freeze_until: Option<String>,
    /// Those of the active adapters that learn, the others staying as they are; `None`: all.
    pub adapter_names: Option<Vec<String>>,
    /// The output that is trained; `None`: the head's, or the model's only one.
    pub output: Option<String>,
    /// How that output becomes one vector for each row before the loss.
    pub pooling: Pooling,
    /// Name of the array with the labels.
    pub labels: String,
    /// For files of records, the columns that make up an input or the labels; several are joined.
    pub map: Vec<(String, Vec<String>)>,
    pub text: TextOptions,
    pub image: ImageOptions,
    /// Bytes of rows that may stay in memory once they are read; where they are more, they lie in files without a name
    /// beside `out`.
    pub data_memory: u64,
    pub optimizer: Rule,
    /// Peak learning rate.
    pub lr: f64,
    /// Peak learning rate of layers trained in full; `None`: as `lr`.
    pub head_lr: Option<f64>,
    pub weight_decay: f64,
    /// Weight decay on biases and norms, too (as torch's AdamW over all parameters; transformers leaves them alone).
    pub decay_all: bool,
    pub schedule: Shape,
    pub warmup_steps: usize,
    /// Share of the run that is warm-up, where no `warmup_steps` are given.
    pub warmup_ratio: f64,
    /// Gradients are clipped to this global norm.
    pub max_grad_norm: Option<f64>,
    /// Parameters and moments stay on the engine's device, and its graph updates them; `None`: where that is not the CPU.
    pub optimizer_on_device: Option<bool>,
    /// What the model's products are computed in; parameters, moments and the loss are float32 in any case.
    pub precision: Precision,
    /// Compute activations a second time on the way back instead of keeping them.
    pub recompute: bool,
    /// Compute once for each row what is computed before the first layer that learns, and keep it on disk.
    pub cache_frozen: CacheFrozen,
    /// Bytes on disk that are not exceeded by it.
    pub cache_limit: u64,
    /// Only say how much memory the run would take ([`super::Progress::planned`]).
    pub plan: bool,
    /// `None`: what the model is exported for, else 8 (transformers' default).
    pub batch_size: Option<usize>,
    /// Batches whose gradients make up one update.
    pub gradient_accumulation_steps: usize,
    /// Length of the run; with neither, 3 epochs (transformers' default).
    pub steps: Option<usize>,
    pub epochs: Option<usize>,
    /// Another order in every epoch; false: the file's.
    pub shuffle: bool,
    /// Batches of rows of like lengths, so that little is padded; only where `shuffle` is set.
    pub group_by_length: bool,
    pub seed: u64,
    /// A checkpoint after every so many steps and after the last; `None`: only where the run is stopped.
    pub save_steps: Option<usize>,
    /// Checkpoints that are kept, the newest ones; `None`: all.
    pub save_total_limit: Option<usize>,
    /// Go on from the last whole checkpoint in `out`; from the start where there is none yet.
    pub resume: bool,
    pub load: LoadOptions,
    /// The same as the text of a settings file: saved as `train.toml` and shown in the report, where it is given.
    pub settings: String,
}

impl TrainOptions {
    /// Default learning rate. Each number of a block is a part of in_features / r weights of an output, all of which move
    /// with it: at 1e-3, where Adam's first steps are 1e-3 long, real encoders leave the place they should learn from.
    pub const LR: f64 = 1e-4;

    /// Default of `data_memory`.
    pub const DATA_MEMORY: u64 = 1 << 30;

    /// Default bound of the frozen part's cache.
    pub const CACHE_LIMIT: u64 = 8 << 30;

    /// AdamW's defaults are torch's, but without weight decay.
    pub fn new(out: impl Into<PathBuf>, data: impl Into<PathBuf>, loss: Loss) -> Self {
        Self {
            out: out.into(),
            data: vec![data.into()],
            eval_data: Vec::new(),
            eval_strategy: EvalStrategy::Epoch,
            metric_for_best_model: Metric::EvalLoss,
            load_best_model_at_end: false,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            loss,
            loss_model: None,
            teacher: None,
            freeze_until: None,
            adapter_names: None,
            output: None,
            pooling: Pooling::default(),
            labels: "labels".into(),
            map: Vec::new(),
            text: TextOptions::default(),
            image: ImageOptions::default(),
            data_memory: Self::DATA_MEMORY,
            optimizer: Rule::AdamW { betas: (0.9, 0.999), eps: 1e-8 },
            lr: Self::LR,
            head_lr: None,
            weight_decay: 0.0,
            decay_all: false,
            schedule: Shape::Constant,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            max_grad_norm: None,
            optimizer_on_device: None,
            precision: Precision::F32,
            recompute: false,
            cache_frozen: CacheFrozen::Auto,
            cache_limit: Self::CACHE_LIMIT,
            plan: false,
            batch_size: None,
            gradient_accumulation_steps: 1,
            steps: None,
            epochs: None,
            shuffle: true,
            group_by_length: false,
            seed: 0,
            save_steps: None,
            save_total_limit: None,
            resume: false,
            load: LoadOptions { threads: None, optimize: true },
            settings: String::new(),
        }
    }

    /// Fails on a setting that no run can have; the message names the flag.
    pub(super) fn validate(&self) -> Result<()> {
        let positive = |v: f64| v > 0.0 && v.is_finite();
        let not_negative = |v: f64| v >= 0.0 && v.is_finite();
        let (betas, eps) = match self.optimizer {
            Rule::AdamW { betas, eps } | Rule::Adam { betas, eps } => ([betas.0, betas.1], eps),
            Rule::Lion { betas } => ([betas.0, betas.1], 1.0),
            Rule::Sgd { .. } => ([0.0; 2], 1.0),
        };
        let (momentum, nesterov) = match self.optimizer {
            Rule::Sgd { momentum, nesterov } => (momentum, nesterov),
            _ => (0.0, false),
        };
        let (smoothing, delta, temperature) = match self.loss {
            Loss::CrossEntropy { label_smoothing } | Loss::CausalLm { label_smoothing } => (label_smoothing, 1.0, 1.0),
            Loss::Huber { delta } => (0.0, delta, 1.0),
            Loss::KlDiv { temperature } => (0.0, 1.0, temperature),
            _ => (0.0, 1.0, 1.0),
        };
        let (scale, margin) = match self.loss {
            Loss::MultipleNegativesRanking { scale, .. } => (scale, 1.0),
            Loss::Triplet { margin, .. } => (1.0, margin),
            _ => (1.0, 1.0),
        };
        let (taught_at, alpha) = self.teacher.as_ref().map_or((1.0, 0.5), |t| (t.temperature, t.alpha));
        let (cycles, power, lr_end) = match self.schedule {
            Shape::CosineWithRestarts { cycles } => (cycles, 1.0, 0.0),
            Shape::Polynomial { power, lr_end } => (1, power, lr_end),
            _ => (1, 1.0, 0.0),
        };
        let rules = [
            ((0.0..=1.0).contains(&smoothing), "label-smoothing", "a number from 0 to 1"),
            (positive(delta), "huber-delta", "a number above 0"),
            (positive(temperature), "temperature", "a number above 0"),
            (positive(taught_at), "temperature", "a number above 0"),
            ((0.0..=1.0).contains(&alpha), "alpha", "a number from 0 to 1"),
            (positive(scale), "scale", "a number above 0"),
            (positive(margin), "margin", "a number above 0"),
            (positive(self.lr), "lr", "a number above 0"),
            (self.head_lr.is_none_or(positive), "head-lr", "a number above 0"),
            (not_negative(self.weight_decay), "weight-decay", "a number from 0"),
            (betas.iter().all(|b| (0.0..1.0).contains(b)), "betas", "two numbers from 0 to below 1"),
            (positive(eps), "eps", "a number above 0"),
            (not_negative(momentum), "momentum", "a number from 0"),
            (!nesterov || momentum > 0.0, "momentum", "a number above 0 where nesterov is asked for"),
            (cycles > 0, "num-cycles", "at least 1"),
            (positive(power), "power", "a number above 0"),
            (not_negative(lr_end) && lr_end < self.lr, "lr-end", "a number from 0 to below lr"),
            ((0.0..=1.0).contains(&self.warmup_ratio), "warmup-ratio", "a number from 0 to 1"),
            (self.gradient_accumulation_steps > 0, "gradient-accumulation-steps", "at least 1"),
            (self.max_grad_norm.is_none_or(positive), "max-grad-norm", "a number above 0"),
            (self.batch_size != Some(0), "batch-size", "at least 1"),
            (self.steps != Some(0), "steps", "at least 1"),
            (self.epochs != Some(0), "epochs", "at least 1"),
            (self.text.max_length != Some(0), "max-length", "at least 1"),
            (self.load.threads != Some(0), "threads", "at least 1"),
            (self.save_steps != Some(0), "save-steps", "at least 1"),
            (self.eval_strategy != EvalStrategy::Steps(0), "eval-steps", "at least 1"),
            (self.early_stopping_patience != Some(0), "early-stopping-patience", "at least 1"),
            (not_negative(self.early_stopping_threshold), "early-stopping-threshold", "a number from 0"),
            (self.save_total_limit != Some(0), "save-total-limit", "at least 1"),
        ];
        if let Some((_, flag, wanted)) = rules.iter().find(|(holds, ..)| !holds) {
            return Err(Error::config(format!("{flag} has to be {wanted}")));
        }
        if (self.loss == Loss::Own) != self.loss_model.is_some() {
            return Err(Error::config("give loss or loss-model, one of them"));
        }
        if self.teacher.is_some() && !self.loss.takes_teacher() {
            return Err(Error::config("a teacher goes with a loss against labels; leave out teacher here"));
        }
        if self.steps.is_some() && self.epochs.is_some() {
            return Err(Error::config("give steps or epochs, not both"));
        }
        if self.group_by_length && !self.shuffle {
            return Err(Error::config("group-by-length is an order of its own; leave out no-shuffle"));
        }
        if self.text.packing && !matches!(self.loss, Loss::CausalLm { .. }) {
            return Err(Error::config("packing makes rows for loss causal-lm; leave it out here"));
        }
        if self.text.eos_token.is_some() && !self.text.packing {
            return Err(Error::config("eos-token is for packing; leave it out here"));
        }
        if self.warmup_steps > 0 && self.warmup_ratio > 0.0 {
            return Err(Error::config("give warmup-steps or warmup-ratio, not both"));
        }
        let wants_best = if self.early_stopping_patience.is_some() {
            Some("early-stopping-patience")
        } else {
            self.load_best_model_at_end.then_some("load-best-model-at-end")
        };
        if let (Some(flag), true) = (wants_best, self.eval_data.is_empty()) {
            return Err(Error::config(format!("{flag} compares evaluations; give eval-data")));
        }
        if self.metric_for_best_model == Metric::EvalAccuracy && !self.loss.scores_classes() {
            return Err(Error::config("metric-for-best-model eval_accuracy is for losses over classes; use eval_loss"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::loss::Distance;

    fn teacher() -> Teacher {
        Teacher { model: "teacher.onnx".into(), output: None, temperature: 1.0, alpha: 0.5 }
    }

    #[test]
    fn impossible_settings_are_named() {
        let with = |change: fn(&mut TrainOptions)| {
            let mut options = TrainOptions::new("out", "data", Loss::Mse);
            change(&mut options);
            options.validate()
        };
        assert!(with(|_| ()).is_ok());
        type Change = fn(&mut TrainOptions);
        let cases: [(Change, &str); 34] = [
            (|o| o.loss = Loss::CrossEntropy { label_smoothing: 1.5 }, "label-smoothing"),
            (|o| o.loss = Loss::Huber { delta: 0.0 }, "huber-delta"),
            (|o| o.loss = Loss::KlDiv { temperature: -1.0 }, "temperature"),
            (|o| o.loss = Loss::MultipleNegativesRanking { scale: 0.0, symmetric: false }, "scale"),
            (|o| o.loss = Loss::Triplet { margin: -1.0, distance: Distance::Cosine }, "margin"),
            (|o| o.loss = Loss::Own, "loss-model"),
            (|o| o.teacher = Some(Teacher { alpha: 1.5, ..teacher() }), "alpha"),
            (|o| o.teacher = Some(Teacher { temperature: 0.0, ..teacher() }), "temperature"),
            (|o| o.lr = f64::NAN, "lr"),
            (|o| o.head_lr = Some(-1.0), "head-lr"),
            (|o| o.weight_decay = -0.1, "weight-decay"),
            (|o| o.optimizer = Rule::AdamW { betas: (0.9, 1.0), eps: 1e-8 }, "betas"),
            (|o| o.optimizer = Rule::AdamW { betas: (0.9, 0.9), eps: 0.0 }, "eps"),
            (|o| o.optimizer = Rule::Lion { betas: (-0.1, 0.9) }, "betas"),
            (|o| o.optimizer = Rule::Sgd { momentum: f64::NAN, nesterov: false }, "momentum"),
            (|o| o.optimizer = Rule::Sgd { momentum: 0.0, nesterov: true }, "nesterov"),
            (|o| o.schedule = Shape::CosineWithRestarts { cycles: 0 }, "num-cycles"),
            (|o| o.schedule = Shape::Polynomial { power: 1.0, lr_end: 1e-3 }, "lr-end"),
            (|o| o.warmup_ratio = 1.5, "warmup-ratio"),
            (|o| (o.warmup_ratio, o.warmup_steps) = (0.5, 5), "not both"),
            (|o| o.gradient_accumulation_steps = 0, "gradient-accumulation-steps"),
            (|o| o.max_grad_norm = Some(0.0), "max-grad-norm"),
            (|o| o.batch_size = Some(0), "batch-size"),
            (|o| o.steps = Some(0), "steps"),
            (|o| (o.steps, o.epochs) = (Some(1), Some(1)), "not both"),
            (|o| o.eval_strategy = EvalStrategy::Steps(0), "eval-steps"),
            (|o| o.early_stopping_patience = Some(0), "early-stopping-patience"),
            (|o| o.early_stopping_threshold = f64::NAN, "early-stopping-threshold"),
            (|o| (o.shuffle, o.group_by_length) = (false, true), "leave out no-shuffle"),
            (|o| o.text.packing = true, "packing makes rows for loss causal-lm"),
            (|o| o.text.eos_token = Some("</s>".into()), "eos-token is for packing"),
            (|o| o.early_stopping_patience = Some(3), "give eval-data"),
            (|o| o.load_best_model_at_end = true, "give eval-data"),
            (|o| o.metric_for_best_model = Metric::EvalAccuracy, "use eval_loss"),
        ];
        for (change, word) in cases {
            let complaint = with(change).unwrap_err().to_string();
            assert!(complaint.contains(word), "{word}: {complaint}");
        }
    }
}
