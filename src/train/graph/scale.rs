//! What the loss of a model that computes in halves is multiplied by before it is differentiated, and its gradients are
//! divided by after it: adjoints in float16 are as small as the loss is, and vanish below 6e-8 (Micikevicius et al. 2018,
//! "Mixed precision training").
//!
//! It changes as torch's `GradScaler` has it: gradients that overflow halve it, and it doubles after a long enough row of
//! steps without that. The step that overflowed is not left out, but made once more with the smaller scale.

/// Where it starts.
const START: f32 = 65536.0;
/// It does not grow beyond this, as in Apex: adjoints that are larger by so much more no longer vanish.
const LARGEST: f32 = 16_777_216.0;
/// Steps in a row without an overflow after which it doubles.
const GROWTH_INTERVAL: u32 = 2000;

/// The scale, and what its next change depends on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    /// A power of two, so that nothing is rounded by it.
    pub value: f32,
    /// Steps since its last change.
    pub finite_steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { value: START, finite_steps: 0 }
    }
}

impl LossScale {
    /// After gradients that overflowed. False where it cannot be smaller: a loss that is not made larger at all.
    pub fn halve(&mut self) -> bool {
        let smaller = self.value > 1.0;
        if smaller {
            *self = Self { value: self.value / 2.0, finite_steps: 0 };
        }
        smaller
    }

    /// After a step whose gradients are finite.
    pub fn count_step(&mut self) {
        self.count(GROWTH_INTERVAL);
    }

    fn count(&mut self, interval: u32) {
        self.finite_steps = self.finite_steps.saturating_add(1);
        if self.finite_steps >= interval {
            *self = Self { value: (self.value * 2.0).min(LARGEST.max(self.value)), finite_steps: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_at_once_and_doubles_after_a_row_of_steps() {
        let mut scale = LossScale { value: 4.0, finite_steps: 0 };
        let mut after = |overflows: bool| {
            if overflows {
                scale.halve();
            }
            scale.count(3);
            scale.value
        };
        // GradScaler(init_scale=4, growth_interval=3); a step that it leaves out is made again here.
        let steps = [false, false, true, false, false, false, false, true, false, false];
        assert_eq!(steps.map(&mut after), [4.0, 4.0, 2.0, 2.0, 4.0, 4.0, 4.0, 2.0, 2.0, 4.0]);
    }

    #[test]
    fn it_stays_within_its_bounds() {
        let mut scale = LossScale::default();
        (0..40).for_each(|_| scale.count(1));
        assert_eq!(scale, LossScale { value: LARGEST, finite_steps: 0 });
        let halved = (0..60).filter(|_| scale.halve()).count();
        assert_eq!((halved, scale.value, LARGEST), (24, 1.0, 24f32.exp2()));
    }
}
