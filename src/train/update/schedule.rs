//! Learning-rate schedules with warm-up, as transformers' `optimization.py` has them (4.57: constant, linear, cosine,
//! `get_cosine_with_hard_restarts_schedule_with_warmup`, `get_polynomial_decay_schedule_with_warmup`).

use std::f64::consts::PI;
use std::str::FromStr;

use crate::words::unknown;

/// The shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Shape {
    #[default]
    Constant,
    /// Down to zero at the last step.
    Linear,
    /// Half a cosine, down to zero at the last step.
    Cosine,
    /// Half a cosine down to zero, `cycles` times in equal parts of the run.
    CosineWithRestarts { cycles: usize },
    /// Down to the rate `lr_end` with a power of what is left of the run.
    Polynomial { power: f64, lr_end: f64 },
}

/// What they are called.
const SHAPES: [&str; 5] = ["constant", "linear", "cosine", "cosine-with-restarts", "polynomial"];

impl FromStr for Shape {
    type Err = String;

    /// A shape by its name here or in transformers, with transformers' defaults.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "constant" | "constant_with_warmup" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            "cosine-with-restarts" | "cosine_with_restarts" => Ok(Self::CosineWithRestarts { cycles: 1 }),
            "polynomial" => Ok(Self::Polynomial { power: 1.0, lr_end: 1e-7 }),
            _ => Err(unknown("schedule", text, &SHAPES)),
        }
    }
}

/// Steps of warm-up that are `ratio` of `total`, rounded up.
pub fn warmup_of(ratio: f64, total: usize) -> usize {
    (total as f64 * ratio).ceil() as usize
}

/// A multiplier of the learning rate for every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    /// The rate that is multiplied (the adapters', where the head has another).
    pub peak: f64,
    /// Steps over which the rate rises linearly from zero.
    pub warmup: usize,
    /// Steps in all, warm-up included.
    pub total: usize,
}

impl Schedule {
    /// The multiplier of update `step`, counted from 0 (which is 0 for the first step of a warm-up).
    pub fn factor(&self, step: usize) -> f64 {
        let count = |n: usize| n as f64;
        if step < self.warmup {
            return count(step) / count(self.warmup);
        }
        let rest = count(self.total.saturating_sub(self.warmup).max(1));
        let done = count(step - self.warmup) / rest;
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => count(self.total.saturating_sub(step)) / rest,
            Shape::Cosine => half_cosine(done),
            Shape::CosineWithRestarts { .. } if done >= 1.0 => 0.0,
            Shape::CosineWithRestarts { cycles } => half_cosine((count(cycles) * done).fract()),
            Shape::Polynomial { lr_end, .. } if done > 1.0 => lr_end / self.peak,
            Shape::Polynomial { power, lr_end } => {
                ((self.peak - lr_end) * (1.0 - done).powf(power) + lr_end) / self.peak
            }
        }
    }
}

/// From 1 down to 0 while `done` goes from 0 to 1.
fn half_cosine(done: f64) -> f64 {
    0.5 * (1.0 + (PI * done).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape, warmup: usize, total: usize) -> Schedule {
        Schedule { shape, peak: 1e-3, warmup, total }
    }

    fn all(shape: Shape, warmup: usize, total: usize) -> Vec<f64> {
        (0..total).map(|s| schedule(shape, warmup, total).factor(s)).collect()
    }

    #[test]
    fn shapes_are_those_of_transformers() {
        assert_eq!(all(Shape::Constant, 2, 5), [0.0, 0.5, 1.0, 1.0, 1.0]);
        assert_eq!(all(Shape::Linear, 3, 7), [0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 0.75, 0.5, 0.25]);
        let cosine = all(Shape::Cosine, 2, 6);
        for (got, want) in cosine.iter().zip([0.0, 0.5, 1.0, 0.853_553_390_593_273_7, 0.5, 0.146_446_609_406_726_3]) {
            assert!((got - want).abs() < 1e-12, "{cosine:?}");
        }
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_no_division_by_zero() {
        assert_eq!(all(Shape::Cosine, 8, 4), [0.0, 0.125, 0.25, 0.375]);
        assert_eq!(schedule(Shape::Linear, 3, 3).factor(3), 0.0);
        assert_eq!(schedule(Shape::Linear, 0, 0).factor(0), 0.0);
        assert_eq!(schedule(Shape::Polynomial { power: 2.0, lr_end: 1e-4 }, 3, 3).factor(3), 1.0);
        assert_eq!(schedule(Shape::CosineWithRestarts { cycles: 3 }, 0, 0).factor(0), 1.0);
    }

    #[test]
    fn a_ratio_of_the_run_is_rounded_up() {
        assert_eq!([(0.1, 50), (0.1, 51), (0.0, 9), (1.0, 9)].map(|(r, t)| warmup_of(r, t)), [5, 6, 0, 9]);
    }
}
