//! Several batches for one update, where memory holds no larger one.

use crate::onnx::Tensor;
use crate::train::data::Batch;
use crate::train::graph::{GradientSession, Parameter};
use crate::train::loss::Loss;
use crate::{Error, Result};

/// Loss and gradients of `micro` as if they were one batch: means over all labels that count in any of them. Batches
/// of as many labels each have the same share, as in PyTorch where every loss is divided by their number.
pub(in crate::train) fn gradients(
    session: &mut GradientSession,
    parameters: &[Parameter],
    micro: &[Batch],
    loss: Loss,
) -> Result<(f64, Vec<Tensor>)> {
    if let [only] = micro {
        return session.run(parameters, only);
    }
    let mut mean = 0.0;
    let mut sums: Vec<Tensor> = Vec::new();
    for (batch, share) in micro.iter().zip(shares(micro, loss)) {
        let (loss, gradients) = session.run(parameters, batch)?;
        mean += share * loss;
        let share = share as f32;
        if sums.is_empty() {
            sums = gradients;
            for sum in &mut sums {
                values(sum)?.iter_mut().for_each(|s| *s *= share);
            }
        } else {
            for (sum, gradient) in sums.iter_mut().zip(&gradients) {
                let gradient = gradient.values::<f32>().unwrap_or_default();
                values(sum)?.iter_mut().zip(gradient).for_each(|(s, g)| *s += share * g);
            }
        }
    }
    Ok((mean, sums))
}

/// What each of `micro` counts for in their mean; a single one for all of it.
pub(in crate::train) fn shares(micro: &[Batch], loss: Loss) -> Vec<f64> {
    if micro.len() == 1 {
        return vec![1.0];
    }
    let counts: Vec<f64> = micro.iter().map(|batch| loss.count(batch) as f64).collect();
    let all = counts.iter().sum::<f64>().max(1.0);
    counts.iter().map(|count| count / all).collect()
}

fn values(gradient: &mut Tensor) -> Result<&mut [f32]> {
    match gradient {
        Tensor::F32(array) => array.as_slice_mut(),
        _ => None,
    }
    .ok_or_else(|| Error::model("a gradient is no float32 array in one piece"))
}
