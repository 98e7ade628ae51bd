//! Whether a step with the cache is the step without it. What is kept of a row was computed beside rows of its own
//! length; in a batch it may be padded. A model that heeds its mask computes the same for it, another one does not, and
//! no look at the graph tells them apart.

use super::sizes::sorted;
use crate::engine::Engine;
use crate::onnx::Tensor;
use crate::train::TrainOptions;
use crate::train::data::Feed;
use crate::train::goal::Feeds;
use crate::train::graph::{LossModel, Parameter};
use crate::{Error, Result};

/// By how much, relative to their size, loss and gradients may differ: the rounding of products that are cut into blocks
/// in another way. For models in float32, and in halves.
const TOLERANCE: (f64, f64) = (1e-5, 5e-3);
/// A parameter whose gradient is smaller than this share of all of them counts as one of this share.
const SMALL: f64 = 1e-2;

/// What steps are taken with.
#[derive(Clone, Copy)]
pub(in crate::train) struct Steps<'a> {
    pub parameters: &'a [Parameter],
    pub options: &'a TrainOptions,
    pub engine: &'a dyn Engine,
}

impl Steps<'_> {
    /// Losses and gradients of `model` for `batches`.
    pub(super) fn results(&self, model: &LossModel, feeds: &Feeds, batches: &[Sample]) -> Result<Vec<Step>> {
        let mut session = model.gradient(self.engine, &self.options.load)?;
        let run = |sample: &Sample| {
            let feed = if sample.evaluation { feeds.eval.as_ref() } else { None };
            session.run(self.parameters, &feed.unwrap_or(&feeds.train).batch(&sample.rows)?)
        };
        batches.iter().map(run).collect()
    }
}

/// Loss and gradients of a batch.
pub(super) type Step = (f64, Vec<Tensor>);

/// Rows of a batch.
pub(super) struct Sample {
    pub evaluation: bool,
    pub rows: Vec<usize>,
}

/// Batches that tell: from the shortest to the longest rows of the training data and of the evaluation data, and the first
/// rows as they come.
pub(super) fn samples(feeds: &Feeds) -> Result<Vec<Sample>> {
    let mixed = |feed: &Feed| -> Result<Vec<usize>> {
        let roles = feed.roles();
        let sorted: Vec<usize> =
            sorted(feed)?.into_iter().filter(|(_, row)| row % roles == 0).map(|(_, row)| row / roles).collect();
        let count = feeds.batch_size.min(sorted.len());
        Ok((0..count).map(|at| sorted[at * (sorted.len() - 1) / (count - 1).max(1)]).collect())
    };
    let mut samples = vec![
        Sample { evaluation: false, rows: mixed(&feeds.train)? },
        Sample { evaluation: false, rows: (0..feeds.batch_size.min(feeds.train.rows())).collect() },
    ];
    if let Some(feed) = &feeds.eval {
        samples.push(Sample { evaluation: true, rows: mixed(feed)? });
    }
    Ok(samples)
}

/// # Errors
/// Losses or gradients that differ.
pub(super) fn same(whole: &[Step], cached: &[Step], in_halves: bool) -> Result<()> {
    let tolerance = if in_halves { TOLERANCE.1 } else { TOLERANCE.0 };
    let off = whole.iter().zip(cached).map(|(a, b)| difference(a, b)).fold(0.0, |worst: f64, off| {
        // Not a number, it is the worst.
        if off > worst || off.is_nan() { off } else { worst }
    });
    tracing::debug!("with the frozen part computed once, loss and gradients differ by {off:.1e}");
    match off <= tolerance {
        true => Ok(()),
        false => Err(Error::Check(format!(
            "with what is computed once, loss or gradients of a batch differ by {off:.1e} of their size; padding or the \
             other rows of a batch have an effect in this model (is a mean over tokens taken without a mask?)"
        ))),
    }
}

/// The largest relative difference between two losses, and between the gradients of any parameter.
fn difference((loss, gradients): &Step, (other, others): &Step) -> f64 {
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let norms: Vec<(f64, f64)> = gradients
        .iter()
        .zip(others)
        .map(|(a, b)| {
            let (a, b) = (a.to_f64(), b.to_f64());
            (norm(&mut a.iter().copied()), norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)))
        })
        .collect();
    let all = norm(&mut norms.iter().map(|(size, _)| *size));
    let relative = |off: f64, size: f64| if off == 0.0 { 0.0 } else { off / size };
    let losses = relative((loss - other).abs(), loss.abs());
    norms
        .iter()
        .map(|(size, off)| relative(*off, size.max(SMALL * all)))
        .fold(losses, |worst, off| if off > worst || off.is_nan() { off } else { worst })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_in_the_loss_or_in_one_gradient_is_seen_and_rounding_is_not() {
        let of = |loss: f64, a: f32, b: f32| vec![(loss, vec![Tensor::scalar(a), Tensor::new(&[2], vec![b, 1.0])])];
        let whole = of(2.0, 100.0, 1.0);
        for (other, fine) in [
            (of(2.0, 100.0, 1.0), true),
            (of(2.0 + 1e-5, 100.0 + 5e-4, 1.0), true),
            (of(2.0 + 5e-5, 100.0, 1.0), false),
            (of(2.0, 100.0, 1.0 + 1e-4), false),
            (of(2.0, 100.01, 1.0), false),
            (of(f64::NAN, 100.0, 1.0), false),
            (of(2.0, f32::NAN, 1.0), false),
        ] {
            let told = same(&whole, &other, false);
            assert_eq!(told.is_ok(), fine, "{other:?}: {told:?}");
        }
        assert!(same(&whole, &of(2.0, 100.01, 1.0), true).is_ok());
    }
}
