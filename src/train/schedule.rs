//! Learning-rate schedules with warm-up, as transformers' `optimization.py` has them (4.53:
//! `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup`).

use std::f64::consts::PI;
use std::str::FromStr;

/// The shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shape {
    #[default]
    Constant,
    /// Down to zero at the last step.
    Linear,
    /// Half a cosine, down to zero at the last step.
    Cosine,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "constant" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            _ => Err(format!("schedule is {text:?}; use constant, linear or cosine")),
        }
    }
}

/// A multiplier of the learning rate for every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    pub shape: Shape,
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
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => count(self.total.saturating_sub(step)) / rest,
            Shape::Cosine => 0.5 * (1.0 + (PI * count(step - self.warmup) / rest).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(shape: Shape, warmup: usize, total: usize) -> Vec<f64> {
        (0..total).map(|s| Schedule { shape, warmup, total }.factor(s)).collect()
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
        assert_eq!(Schedule { shape: Shape::Linear, warmup: 3, total: 3 }.factor(3), 0.0);
        assert_eq!(Schedule { shape: Shape::Linear, warmup: 0, total: 0 }.factor(0), 0.0);
    }
}
