//! From options to what a run is asked to do.

use super::arguments::Arguments;
use crate::cli::inject::pool;
use crate::train::optimizer::Rule;
use crate::train::schedule::Shape;
use crate::train::{EvalStrategy, Loss, Pooling, Teacher, TrainOptions};
use crate::{Error, Result};

/// Fails where a flag was `given` that is for other choices than the one made.
fn only_for(given: bool, flag: &str, choices: &str) -> Result<()> {
    if given { Err(Error::config(format!("{flag} is for {choices}; leave it out here"))) } else { Ok(()) }
}

impl Arguments {
    fn loss(&self) -> Result<Loss> {
        let mut loss = match (self.loss, &self.loss_model) {
            (Some(loss), _) => loss,
            (None, Some(_)) => Loss::Own,
            (None, None) => return Err(Error::config("give --loss, or --loss-model with a loss of your own")),
        };
        let given = (self.label_smoothing.is_some(), self.huber_delta.is_some(), self.temperature.is_some());
        let by_class = matches!(loss, Loss::CrossEntropy { .. } | Loss::CausalLm { .. });
        only_for(given.0 && !by_class, "label-smoothing", "--loss cross-entropy and causal-lm")?;
        only_for(given.1 && !matches!(loss, Loss::Huber { .. }), "huber-delta", "--loss huber")?;
        let cools = matches!(loss, Loss::KlDiv { .. }) || self.teacher.is_some();
        only_for(given.2 && !cools, "temperature", "--loss kl-div and --teacher")?;
        let ctc = matches!(loss, Loss::Ctc { .. });
        only_for(self.blank.is_some() && !ctc, "blank", "--loss ctc")?;
        only_for(self.zero_infinity && !ctc, "zero-infinity", "--loss ctc")?;
        let ranks = matches!(loss, Loss::MultipleNegativesRanking { .. });
        only_for(self.scale.is_some() && !ranks, "scale", "--loss multiple-negatives-ranking")?;
        only_for(self.symmetric && !ranks, "symmetric", "--loss multiple-negatives-ranking")?;
        let triplet = matches!(loss, Loss::Triplet { .. });
        only_for(self.margin.is_some() && !triplet, "margin", "--loss triplet")?;
        only_for(self.distance.is_some() && !triplet, "distance", "--loss triplet")?;
        only_for(self.pool_mask.is_some() && self.pool != "mean", "pool-mask", "--pool mean")?;
        match &mut loss {
            Loss::CrossEntropy { label_smoothing: value } | Loss::CausalLm { label_smoothing: value } => {
                *value = self.label_smoothing.unwrap_or(*value);
            }
            Loss::Huber { delta: value } => *value = self.huber_delta.unwrap_or(*value),
            Loss::KlDiv { temperature: value } if self.teacher.is_none() => {
                *value = self.temperature.unwrap_or(*value);
            }
            Loss::MultipleNegativesRanking { scale, symmetric } => {
                *scale = self.scale.unwrap_or(*scale);
                *symmetric = self.symmetric;
            }
            Loss::Ctc { blank, zero_infinity } => {
                *blank = self.blank.unwrap_or(*blank);
                *zero_infinity = self.zero_infinity;
            }
            Loss::Triplet { margin, distance } => {
                *margin = self.margin.unwrap_or(*margin);
                *distance = self.distance.unwrap_or(*distance);
            }
            _ => {}
        }
        Ok(loss)
    }

    fn taught(&self) -> Option<Teacher> {
        Some(Teacher {
            model: self.teacher.clone()?,
            output: self.teacher_output.clone(),
            temperature: self.temperature.unwrap_or(2.0),
            alpha: self.alpha.unwrap_or(0.5),
        })
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

    fn eval_strategy(&self) -> Result<EvalStrategy> {
        let strategy = self.eval_strategy.as_deref();
        let steps = matches!(strategy, Some("steps"));
        only_for(self.eval_steps.is_some() && strategy.is_some() && !steps, "eval-steps", "--eval-strategy steps")?;
        match (strategy, self.eval_steps) {
            (_, Some(every)) => Ok(EvalStrategy::Steps(every)),
            (Some("steps"), None) => Err(Error::config("eval-strategy steps needs eval-steps")),
            (Some("end"), None) => Ok(EvalStrategy::End),
            _ => Ok(EvalStrategy::Epoch),
        }
    }

    /// What the run is asked to do; fails where options do not go together.
    pub fn options(&self) -> Result<TrainOptions> {
        let mut options = TrainOptions {
            eval_strategy: self.eval_strategy()?,
            load_best_model_at_end: self.load_best_model_at_end,
            metric_for_best_model: self.metric_for_best_model,
            early_stopping_patience: self.early_stopping_patience,
            early_stopping_threshold: self.early_stopping_threshold,
            adapter_names: self.adapter_names.clone(),
            output: self.output.clone(),
            loss_model: self.loss_model.clone(),
            teacher: self.taught(),
            freeze_until: self.freeze_until.clone(),
            pooling: Pooling { pool: pool(&self.pool), mask: self.pool_mask.clone() },
            optimizer: self.rule()?,
            lr: self.lr,
            head_lr: self.head_lr,
            weight_decay: self.weight_decay,
            decay_all: self.decay_all,
            schedule: self.shape()?,
            warmup_steps: self.warmup_steps,
            warmup_ratio: self.warmup_ratio,
            max_grad_norm: self.max_grad_norm,
            optimizer_on_device: self.optimizer_on_device,
            precision: self.precision,
            recompute: self.recompute,
            plan: self.plan,
            batch_size: self.batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            steps: self.steps,
            epochs: self.epochs,
            shuffle: !self.no_shuffle,
            group_by_length: self.group_by_length,
            seed: self.seed,
            save_steps: self.save_steps,
            save_total_limit: self.save_total_limit,
            resume: self.resume,
            load: self.engine.load_options(),
            ..TrainOptions::new(&self.output_dir, "", self.loss()?)
        };
        self.data.fill(&mut options);
        Ok(options)
    }
}
