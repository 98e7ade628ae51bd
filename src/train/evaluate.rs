//! One pass over the evaluation data.

use super::data::{Batches, Feed, IGNORE, ahead};
use super::graph::{ForwardSession, Parameter};
use super::loss::Loss;
use super::record::metrics::EvalReport;
use crate::onnx::Tensor;
use crate::{Error, Result};

/// Loss (mean over everything that counts in all of `feed`) and, for classes, accuracy after `step` steps.
pub(super) fn evaluate(
    session: &mut ForwardSession,
    parameters: &[Parameter],
    feed: &Feed,
    loss: Loss,
    batch_size: usize,
    step: usize,
) -> Result<EvalReport> {
    let by_class = loss.scores_classes();
    let batches = Batches::new(feed.rows(), batch_size, None);
    let all = batches.per_epoch();
    let (mut sum, mut counted, mut right) = (0.0, 0, 0);
    ahead(feed, batches, 1, all, |mut portions| {
        for _ in 0..all {
            for batch in portions.take()?.batches {
                let (mean, output) = session.run(parameters, &batch)?;
                if let Some(labels) = batch.targets.first().filter(|_| by_class) {
                    right += hits(&output, &loss.targets(labels))?.0;
                }
                let count = loss.count(&batch);
                sum += mean * count as f64;
                counted += count;
            }
        }
        Ok(())
    })?;
    let share = |n: f64| if counted == 0 { 0.0 } else { n / counted as f64 };
    let eval_accuracy = by_class.then(|| share(right as f64));
    Ok(EvalReport { step, eval_loss: share(sum), eval_accuracy })
}

/// How many labels have the highest score (the first one where several are equal), and how many count at all.
pub(crate) fn hits(scores: &Tensor, labels: &Tensor) -> Result<(usize, usize)> {
    let (Some(scores_of_all), Some(labels)) = (scores.values::<f32>(), labels.values::<i64>()) else {
        return Err(Error::model("accuracy needs float32 scores in one piece"));
    };
    let classes = scores.dims().last().copied().unwrap_or(1).max(1);
    if labels.len() * classes != scores_of_all.len() {
        return Err(Error::model(format!(
            "the output has shape {:?}, which gives no {classes} scores to each of {} labels",
            scores.dims(),
            labels.len()
        )));
    }
    let mut hits = 0;
    let mut counted = 0;
    for (scores, label) in scores_of_all.chunks_exact(classes).zip(labels).filter(|(_, label)| **label != IGNORE) {
        let best = scores.iter().enumerate().fold(0, |best, (i, s)| if *s > scores[best] { i } else { best });
        hits += usize::from(best as i64 == *label);
        counted += 1;
    }
    Ok((hits, counted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_leave_out_what_is_ignored() {
        let scores = Tensor::new(&[2, 2, 2], vec![1.0f32, 2.0, 2.0, 1.0, 0.0, 0.0, 5.0, 9.0]);
        assert_eq!(hits(&scores, &Tensor::new(&[2, 2], vec![1i64, 1, 0, -100])).unwrap(), (2, 3));
        assert!(hits(&scores, &Tensor::new(&[3], vec![0i64; 3])).is_err());
    }
}
