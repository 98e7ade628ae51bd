//! Losses that compare outputs: anchors, positives and negatives go through the model together.

use std::path::Path;

use bone_onnx::adapter::Pool;
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::{self, Distance, Loss, Pooling, Summary, TrainOptions};
use bone_onnx::verify::random_inputs;

use crate::common::{injected, mlp, onnxruntime, shared, tract, write_arrays};

const RANKING: Loss = Loss::MultipleNegativesRanking { scale: 20.0, symmetric: false };

/// Samples of these roles: the inputs of `base` at random, other ones for each.
fn data(base: &Path, path: &Path, roles: &[&str], rows: usize) {
    let model = Model::open(base).unwrap();
    let arrays: Vec<(String, Tensor)> = roles
        .iter()
        .zip(1..)
        .flat_map(|(role, seed)| {
            let inputs = random_inputs(&model, rows, 5, seed).unwrap().into_iter();
            inputs.map(move |(name, value)| (format!("{role}.{name}"), value))
        })
        .collect();
    write_arrays(path, &arrays.iter().map(|(name, value)| (name.as_str(), value)).collect::<Vec<_>>());
}

struct Case {
    dir: tempfile::TempDir,
    model: Model,
    options: TrainOptions,
}

impl Case {
    fn new(base: &Path, loss: Loss, roles: &[&str], rows: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.safetensors");
        data(base, &path, roles, rows);
        let model = injected(base, dir.path(), 4, "all-linear", None);
        let out = dir.path().join("out");
        let options = TrainOptions { lr: 1e-2, shuffle: false, ..TrainOptions::new(out, path, loss) };
        Self { dir, model, options }
    }

    fn run(&self) -> Result<Summary, String> {
        train::run(&self.model, &self.options, onnxruntime(), &mut ()).map_err(|e| e.to_string())
    }
}

#[test]
fn pairs_and_triples_learn_with_and_without_pooling() {
    let triplet = |distance| Loss::Triplet { margin: 1.0, distance };
    let pair = ["anchor", "positive"];
    let triple = ["anchor", "positive", "negative"];
    let tokens = shared("models/mlp3d.dyn18.onnx");
    let rows = mlp("base_gemm.onnx");
    for (loss, base, pool, roles) in [
        (RANKING, &rows, Pool::None, pair.as_slice()),
        (RANKING, &rows, Pool::None, &triple),
        (Loss::MultipleNegativesRanking { scale: 5.0, symmetric: true }, &tokens, Pool::Mean, &pair),
        (triplet(Distance::Euclidean), &rows, Pool::None, &triple),
        (triplet(Distance::Cosine), &tokens, Pool::Cls, &triple),
    ] {
        let mut case = Case::new(base, loss, roles, 8);
        (case.options.steps, case.options.pooling.pool) = (Some(20), pool);
        let summary = case.run().unwrap();
        let (first, last) = (summary.steps[0].loss, summary.steps[19].loss);
        assert!(last < 0.9 * first, "{loss:?}: {first} → {last}");
    }
}

#[test]
fn batches_put_together_are_the_mean_over_their_anchors_on_both_engines() {
    let mut case = Case::new(&mlp("base_gemm.onnx"), RANKING, &["anchor", "positive"], 6);
    (case.options.eval_data, case.options.batch_size) = (case.options.data.clone(), Some(4));
    (case.options.epochs, case.options.gradient_accumulation_steps, case.options.lr) = (Some(1), 2, 1e-12);
    let summary = case.run().unwrap();
    assert_eq!(summary.steps.len(), 1);
    // Batches of four and two anchors, here and in the evaluation.
    let (loss, eval) = (summary.steps[0].loss, summary.evals[0]);
    assert!((loss - eval.eval_loss).abs() < 1e-6 * loss, "{loss} is not {}", eval.eval_loss);
    assert_eq!(eval.eval_accuracy, None);

    case.options.out = case.dir.path().join("again");
    let other = train::run(&case.model, &case.options, tract(), &mut ()).unwrap();
    assert!((loss - other.steps[0].loss).abs() < 1e-5 * loss);
}

#[test]
fn what_does_not_fit_is_refused_before_the_first_step() {
    let (pair, triple) = (["anchor", "positive"], ["anchor", "positive", "negative"]);
    let rows = mlp("base_gemm.onnx");
    let triplet = Loss::Triplet { margin: 1.0, distance: Distance::Euclidean };
    type Change = fn(&mut Case);
    let unchanged: Change = |_| ();
    let pool: Change = |case| case.options.pooling = Pooling { pool: Pool::Mean, mask: Some("maks".into()) };
    let eval: Change = |case| {
        let path = case.dir.path().join("eval.safetensors");
        data(&mlp("base_gemm.onnx"), &path, &["anchor", "positive", "negative"], 2);
        case.options.eval_data = vec![path];
    };
    let tokens = shared("models/mlp3d.dyn18.onnx");
    for (base, loss, roles, change, words) in [
        (&tokens, RANKING, pair.as_slice(), unchanged, ["--pool mean", "each token"].as_slice()),
        (&tokens, RANKING, &pair, pool, &["pool-mask", "\"maks\"", "x"]),
        (&rows, RANKING, &pair, pool, &["pooling reads", "--pool"]),
        (&rows, RANKING, &["anchor"], unchanged, &["data.safetensors", "anchor.x", "no positive.x"]),
        (&rows, RANKING, &["anchor", "positiv"], unchanged, &["positiv.x", "positive.INPUT"]),
        (&rows, triplet, &pair, unchanged, &["data.safetensors", "wants a negative"]),
        (&rows, Loss::Mse, &triple, unchanged, &["labels", "--labels"]),
        (&rows, RANKING, &pair, eval, &["has no negatives", "eval.safetensors has negatives"]),
    ] {
        let mut case = Case::new(base, loss, roles, 4);
        change(&mut case);
        let complaint = case.run().unwrap_err();
        for word in words {
            assert!(complaint.contains(word), "{word:?} is missing in {complaint:?}");
        }
        assert!(!case.options.out.exists(), "{complaint}");
    }
}
