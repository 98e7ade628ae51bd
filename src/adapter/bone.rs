//! Bone, which PEFT calls MiSS today: one block B `[r, out]` per layer, tiled over the input dimension.
//!
//! With W in torch's layout `[out, in]`: `W'[o, i] = W[o, i] + B[i mod r, o]`, hence `y = x·Wᵀ + b + S(x)·B` with
//! `S(x)[j] = Σ x[i]` over all i with `i mod r = j`. Where r does not divide `in`, the last shard is short and uses only
//! the first rows of B. Source: PEFT 0.18.1 `peft/tuners/bone/layer.py`, read and measured.

use ndarray::{Array2, ArrayD, ArrayViewD, Ix2};
use rand::distr::{Distribution, Uniform};
use rand_chacha::ChaCha8Rng;

use super::variant::{Dims, Variant};

/// The variant; `random` (`init_weights: false`) starts it uniform in ±1/√out, which is what torch's Kaiming
/// initialisation with a = √5 gives: its fan-in is the block's second dimension.
pub struct Bone {
    pub random: bool,
}

impl Variant for Bone {
    fn name(&self) -> &'static str {
        "Bone (MiSS)"
    }

    fn shape(&self, dims: &Dims) -> Vec<usize> {
        vec![dims.r, dims.outputs]
    }

    fn init(&self, dims: &Dims, rng: &mut ChaCha8Rng) -> ArrayD<f32> {
        let bound = 1.0 / (dims.outputs.max(1) as f32).sqrt();
        match Uniform::new(-bound, bound) {
            Ok(uniform) if self.random => ArrayD::from_shape_simple_fn(self.shape(dims), || uniform.sample(rng)),
            _ => ArrayD::zeros(self.shape(dims)),
        }
    }

    fn block(&self, _: &Dims, parameter: ArrayViewD<f32>) -> Option<Array2<f32>> {
        parameter.to_owned().into_dimensionality::<Ix2>().ok()
    }
}
