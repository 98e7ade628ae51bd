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

/// Where a setting stands in the choice that was made; `None` where that has no such setting.
macro_rules! place {
    ($choice:ident, $($made:path)|+, $field:ident) => {
        match &mut $choice {
            $($made { $field: place, .. })|+ => Some(place),
            _ => None,
        }
    };
}

/// Puts what was `given` for a flag in its place, and leaves the default where nothing was; fails where there is no such
/// place: the flag is for other `choices`.
fn put<T>(given: Option<T>, flag: &str, choices: &str, place: Option<&mut T>) -> Result<()> {
    match (given, place) {
        (None, _) => Ok(()),
        (Some(value), Some(place)) => {
            *place = value;
            Ok(())
        }
        (Some(_), None) => only_for(true, flag, choices),
    }
}

impl Arguments {
    /// The loss with its settings: a line for each, with the losses that have it.
    fn loss(&self) -> Result<Loss> {
        use Loss::{CausalLm, CrossEntropy, Ctc, Huber, KlDiv, MultipleNegativesRanking, Triplet};
        let mut loss = match (self.loss, &self.loss_model) {
            (Some(loss), _) => loss,
            (None, Some(_)) => Loss::Own,
            (None, None) => return Err(Error::config("give --loss, or --loss-model with a loss of your own")),
        };
        // With a teacher it is the teacher's.
        let temperature = self.temperature.filter(|_| self.teacher.is_none());
        let [zero_infinity, symmetric] = [self.zero_infinity, self.symmetric].map(|on| on.then_some(true));
        let (classes, ranking) = ("--loss cross-entropy and causal-lm", "--loss multiple-negatives-ranking");
        let smoothing = place!(loss, CrossEntropy | CausalLm, label_smoothing);
        put(self.label_smoothing, "label-smoothing", classes, smoothing)?;
        put(self.huber_delta, "huber-delta", "--loss huber", place!(loss, Huber, delta))?;
        put(temperature, "temperature", "--loss kl-div and --teacher", place!(loss, KlDiv, temperature))?;
        put(self.blank, "blank", "--loss ctc", place!(loss, Ctc, blank))?;
        put(zero_infinity, "zero-infinity", "--loss ctc", place!(loss, Ctc, zero_infinity))?;
        put(self.scale, "scale", ranking, place!(loss, MultipleNegativesRanking, scale))?;
        put(symmetric, "symmetric", ranking, place!(loss, MultipleNegativesRanking, symmetric))?;
        put(self.margin, "margin", "--loss triplet", place!(loss, Triplet, margin))?;
        put(self.distance, "distance", "--loss triplet", place!(loss, Triplet, distance))?;
        Ok(loss)
    }

    fn pooling(&self) -> Result<Pooling> {
        only_for(self.pool_mask.is_some() && self.pool != "mean", "pool-mask", "--pool mean")?;
        Ok(Pooling { pool: pool(&self.pool), mask: self.pool_mask.clone() })
    }

    fn taught(&self) -> Option<Teacher> {
        Some(Teacher {
            model: self.teacher.clone()?,
            output: self.teacher_output.clone(),
            temperature: self.temperature.unwrap_or(2.0),
            alpha: self.alpha.unwrap_or(0.5),
        })
    }

    /// The optimizer with its settings, in the same way.
    fn rule(&self) -> Result<Rule> {
        use Rule::{Adam, AdamW, Lion, Sgd};
        let (betas, eps) = ((0.9, 0.999), 1e-8);
        let mut rule = match self.optimizer.as_str() {
            "sgd" => Sgd { momentum: 0.0, nesterov: false },
            "adam" => Adam { betas, eps },
            "lion" => Lion { betas: (0.9, 0.99) },
            _ => AdamW { betas, eps },
        };
        let betas = match self.betas.as_deref() {
            None => None,
            Some(&[first, second]) => Some((first, second)),
            Some(_) => return Err(Error::config("betas has to be two numbers, as in 0.9,0.999")),
        };
        put(self.momentum, "momentum", "--optimizer sgd", place!(rule, Sgd, momentum))?;
        put(self.nesterov.then_some(true), "nesterov", "--optimizer sgd", place!(rule, Sgd, nesterov))?;
        put(betas, "betas", "--optimizer adamw, adam and lion", place!(rule, AdamW | Adam | Lion, betas))?;
        put(self.eps, "eps", "--optimizer adamw and adam", place!(rule, AdamW | Adam, eps))?;
        Ok(rule)
    }

    /// The schedule with its settings, in the same way.
    fn shape(&self) -> Result<Shape> {
        use Shape::{CosineWithRestarts, Polynomial};
        let mut shape = self.schedule;
        let restarts = "--schedule cosine-with-restarts";
        put(self.num_cycles, "num-cycles", restarts, place!(shape, CosineWithRestarts, cycles))?;
        put(self.power, "power", "--schedule polynomial", place!(shape, Polynomial, power))?;
        put(self.lr_end, "lr-end", "--schedule polynomial", place!(shape, Polynomial, lr_end))?;
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
            pooling: self.pooling()?,
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
            cache_frozen: self.cache_frozen,
            cache_limit: self.cache_limit.saturating_mul(1 << 20),
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

#[cfg(test)]
mod tests {
    use clap::{Args, Command, FromArgMatches};

    use super::*;
    use crate::train::Distance;

    fn options(words: &str) -> Result<TrainOptions> {
        let words = format!("train model.onnx -o run --data data.npz {words}");
        let command = super::super::config::optional(Arguments::augment_args(Command::new("train")));
        let matches = command.try_get_matches_from(words.split_whitespace()).expect("known flags");
        Arguments::from_arg_matches(&matches).expect("values").options()
    }

    #[test]
    fn settings_go_into_the_choice_that_has_them() {
        let losses = [
            ("cross-entropy --label-smoothing 0.1", Loss::CrossEntropy { label_smoothing: 0.1 }),
            ("causal-lm --label-smoothing 0.2", Loss::CausalLm { label_smoothing: 0.2 }),
            ("huber --huber-delta 2", Loss::Huber { delta: 2.0 }),
            ("kl-div --temperature 3", Loss::KlDiv { temperature: 3.0 }),
            ("kl-div --temperature 3 --teacher t.onnx", Loss::KlDiv { temperature: 1.0 }),
            ("ctc --blank 5", Loss::Ctc { blank: 5, zero_infinity: false }),
            ("ctc --zero-infinity", Loss::Ctc { blank: 0, zero_infinity: true }),
            (
                "multiple-negatives-ranking --symmetric --scale 7",
                Loss::MultipleNegativesRanking { scale: 7.0, symmetric: true },
            ),
            ("triplet --margin 0.5 --distance cosine", Loss::Triplet { margin: 0.5, distance: Distance::Cosine }),
        ];
        for (words, loss) in losses {
            assert_eq!(options(&format!("--loss {words}")).unwrap().loss, loss, "{words}");
        }
        let rules = [
            ("adamw --betas 0.8 0.9 --eps 0.1", Rule::AdamW { betas: (0.8, 0.9), eps: 0.1 }),
            ("adam --eps 0.1", Rule::Adam { betas: (0.9, 0.999), eps: 0.1 }),
            ("lion", Rule::Lion { betas: (0.9, 0.99) }),
            ("sgd --momentum 0.5 --nesterov", Rule::Sgd { momentum: 0.5, nesterov: true }),
        ];
        for (words, rule) in rules {
            assert_eq!(options(&format!("--loss mse --optimizer {words}")).unwrap().optimizer, rule, "{words}");
        }
        let shapes = [
            ("cosine-with-restarts --num-cycles 3", Shape::CosineWithRestarts { cycles: 3 }),
            ("polynomial --power 2 --lr-end 0.5", Shape::Polynomial { power: 2.0, lr_end: 0.5 }),
        ];
        for (words, shape) in shapes {
            assert_eq!(options(&format!("--loss mse --schedule {words}")).unwrap().schedule, shape, "{words}");
        }
    }

    #[test]
    fn settings_of_other_choices_are_refused() {
        let cases = [
            ("--label-smoothing 0.1", "label-smoothing is for --loss cross-entropy and causal-lm; leave it out here"),
            ("--huber-delta 2", "huber-delta is for --loss huber; leave it out here"),
            ("--temperature 3", "temperature is for --loss kl-div and --teacher; leave it out here"),
            ("--blank 5", "blank is for --loss ctc; leave it out here"),
            ("--zero-infinity", "zero-infinity is for --loss ctc; leave it out here"),
            ("--scale 7", "scale is for --loss multiple-negatives-ranking; leave it out here"),
            ("--symmetric", "symmetric is for --loss multiple-negatives-ranking; leave it out here"),
            ("--margin 0.5", "margin is for --loss triplet; leave it out here"),
            ("--distance cosine", "distance is for --loss triplet; leave it out here"),
            ("--pool-mask mask", "pool-mask is for --pool mean; leave it out here"),
            ("--momentum 0.5", "momentum is for --optimizer sgd; leave it out here"),
            ("--nesterov", "nesterov is for --optimizer sgd; leave it out here"),
            ("--optimizer sgd --betas 0.1 0.2", "betas is for --optimizer adamw, adam and lion; leave it out here"),
            ("--optimizer lion --eps 1", "eps is for --optimizer adamw and adam; leave it out here"),
            ("--betas 0.1", "betas has to be two numbers"),
            ("--num-cycles 3", "num-cycles is for --schedule cosine-with-restarts; leave it out here"),
            ("--power 2", "power is for --schedule polynomial; leave it out here"),
            ("--lr-end 1", "lr-end is for --schedule polynomial; leave it out here"),
        ];
        for (words, what) in cases {
            let complaint = options(&format!("--loss mse {words}")).unwrap_err().to_string();
            assert!(complaint.contains(what), "{words}: {complaint}");
        }
        assert!(options("--loss mse --teacher t.onnx --temperature 3").is_ok());
    }
}
