//! Losses as ONNX nodes behind a model's output. Only operators that both engines run and that have a derivative rule;
//! the training-only loss operators are neither.
//!
//! Each is a mean, and [`Loss::count`] says over how many: so means of batches can be put together.

mod classes;
mod ctc;
mod elements;
pub(super) mod nodes;
mod own;
mod pairs;
mod pool;
mod rows;

use std::borrow::Cow;
use std::str::FromStr;

use super::data::{Batch, Field, IGNORE, LabelKind, Roles, Target};
use crate::onnx::{DataType, ModelProto, Names, Tensor, node, value_info};
use crate::words::unknown;
use crate::{Error, Result};
use nodes::Nodes;
pub(super) use own::OwnLoss;
pub use pairs::Distance;
pub use pool::Pooling;

/// What is made small. The functions named are those of `torch.nn.functional`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// −log softmax at the label, mean over the labels that are not −100 (`cross_entropy`; classes on the last axis,
    /// whatever the rank). `label_smoothing`, from 0 to 1, is the part of the target that is spread evenly over all
    /// classes. A batch of −100 alone has loss 0 here and NaN there.
    CrossEntropy { label_smoothing: f64 },
    /// Cross-entropy of each token's scores with the label of the token after it, as transformers' causal language
    /// models have it: labels are the tokens themselves, −100 where one is not to be learned.
    CausalLm { label_smoothing: f64 },
    /// Cross-entropy of yes or no with a probability from 0 to 1 for each score, mean over all elements
    /// (`binary_cross_entropy_with_logits`).
    BceWithLogits,
    /// Squared difference, mean over all elements (`mse_loss`).
    Mse,
    /// Absolute difference, mean over all elements (`l1_loss`).
    Mae,
    /// Half the squared difference up to `delta`, a line beyond it; mean over all elements (`huber_loss`).
    Huber { delta: f64 },
    /// Distillation: the divergence of softmax(output / `temperature`) from the probabilities that are the labels,
    /// times `temperature`², mean over all rows of the last axis (`kl_div` with `batchmean`; Hinton et al. 2015).
    KlDiv { temperature: f64 },
    /// 1 − cosine of the output and the vector that is its label, mean over all rows of the last axis
    /// (`cosine_embedding_loss` of pairs that belong together).
    CosineEmbedding,
    /// Each anchor is to be nearer to its own positive than to all other positives of the batch, and to all negatives
    /// where there are some: cross-entropy of the cosines times `scale`; `symmetric`: the mean of it and of the positives'
    /// among the anchors. Mean over all anchors (`MultipleNegativesRankingLoss` of sentence-transformers; InfoNCE with a
    /// temperature of 1/`scale`, Oord et al. 2018).
    MultipleNegativesRanking { scale: f64, symmetric: bool },
    /// What is missing for an anchor to be nearer to its positive than to its negative by `margin`; mean over all anchors
    /// (`triplet_margin_loss`; `TripletLoss` of sentence-transformers).
    Triplet { margin: f64, distance: Distance },
    /// −log of the probability of a row's labels over all ways to place them on its frames, divided by their number;
    /// mean over the rows (`ctc_loss`). The columns `input_lengths` and `target_lengths` say how many frames and labels of
    /// each row count. A row whose labels do not fit into its frames has an infinite loss, or 0 with `zero_infinity`.
    Ctc { blank: usize, zero_infinity: bool },
    /// That of [`TrainOptions::loss_model`](super::TrainOptions::loss_model).
    Own,
}

/// A [`Loss`] by its name, with PyTorch's defaults, and sentence-transformers' for ranking.
const NAMES: [(&str, Loss); 11] = [
    ("cross-entropy", Loss::CrossEntropy { label_smoothing: 0.0 }),
    ("causal-lm", Loss::CausalLm { label_smoothing: 0.0 }),
    ("bce-with-logits", Loss::BceWithLogits),
    ("mse", Loss::Mse),
    ("mae", Loss::Mae),
    ("huber", Loss::Huber { delta: 1.0 }),
    ("kl-div", Loss::KlDiv { temperature: 1.0 }),
    ("cosine-embedding", Loss::CosineEmbedding),
    ("multiple-negatives-ranking", Loss::MultipleNegativesRanking { scale: 20.0, symmetric: false }),
    ("triplet", Loss::Triplet { margin: 1.0, distance: Distance::Euclidean }),
    ("ctc", Loss::Ctc { blank: 0, zero_infinity: false }),
];

impl FromStr for Loss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(name, _)| *name == text);
        found.map(|(_, loss)| *loss).ok_or_else(|| unknown("loss", text, &NAMES.map(|(name, _)| name)))
    }
}

impl Loss {
    /// Cross-entropy without smoothing.
    pub const fn cross_entropy() -> Self {
        Self::CrossEntropy { label_smoothing: 0.0 }
    }

    /// What the labels are; `None` where it has none.
    pub fn label_kind(self) -> Option<LabelKind> {
        match self {
            Self::CrossEntropy { .. } | Self::CausalLm { .. } | Self::Ctc { .. } => Some(LabelKind::Class),
            Self::MultipleNegativesRanking { .. } | Self::Triplet { .. } | Self::Own => None,
            _ => Some(LabelKind::Number),
        }
    }

    /// The parts of a sample.
    pub fn roles(self) -> Roles {
        match self {
            Self::MultipleNegativesRanking { .. } => Roles::Pair,
            Self::Triplet { .. } => Roles::Triple,
            _ => Roles::One,
        }
    }

    /// Whether the output has the scores of one class for each label.
    pub fn scores_classes(self) -> bool {
        matches!(self, Self::CrossEntropy { .. } | Self::CausalLm { .. })
    }

    /// Whether a teacher's scores can be soft targets beside the labels.
    pub fn takes_teacher(self) -> bool {
        self.label_kind().is_some() && !matches!(self, Self::Ctc { .. })
    }

    /// The columns that it reads beside `output`; the labels first, in the column `labels`.
    pub(super) fn columns(self, labels: &str, output: &Field) -> Vec<Target> {
        match self {
            Self::Ctc { .. } => ctc::columns(labels, output),
            _ => self.label_kind().iter().map(|kind| Target::labels(labels, *kind, output)).collect(),
        }
    }

    /// What each row of the output is held against: the labels, moved to the token before in a causal model.
    pub(super) fn targets(self, labels: &Tensor) -> Cow<'_, Tensor> {
        let (Self::CausalLm { .. }, Some(values), Some(length)) =
            (self, labels.values::<i64>(), labels.dims().last().filter(|n| **n > 0))
        else {
            return Cow::Borrowed(labels);
        };
        let next = |row: &[i64]| row.iter().skip(1).copied().chain([IGNORE]).collect::<Vec<_>>();
        Cow::Owned(Tensor::new(labels.dims(), values.chunks(*length).flat_map(next).collect()))
    }

    /// How many terms the loss of a batch is the mean of.
    pub(super) fn count(self, batch: &Batch) -> usize {
        let Some(labels) = batch.targets.first() else { return batch.samples };
        match self {
            Self::CrossEntropy { .. } | Self::CausalLm { .. } => {
                let targets = self.targets(labels);
                targets.values::<i64>().unwrap_or_default().iter().filter(|label| **label != IGNORE).count()
            }
            Self::KlDiv { .. } | Self::CosineEmbedding => {
                labels.len() / labels.dims().last().copied().unwrap_or(1).max(1)
            }
            Self::BceWithLogits | Self::Mse | Self::Mae | Self::Huber { .. } => labels.len(),
            Self::MultipleNegativesRanking { .. } | Self::Triplet { .. } | Self::Ctc { .. } | Self::Own => {
                batch.samples
            }
        }
    }
}

/// Names that [`append`] added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LossNames {
    /// New graph inputs, one for each column that the loss reads.
    pub targets: Vec<String>,
    /// New graph output, a scalar.
    pub loss: String,
}

/// What a teacher adds to a loss.
#[derive(Debug)]
pub struct Distilled {
    /// The teacher's scores, in the shape of the output.
    pub scores: Field,
    pub temperature: f64,
    /// The part of the labels' loss.
    pub alpha: f64,
}

/// Adds `loss` behind `output`: a graph input for each column that it reads and a scalar output. The rows of `output`
/// are those of `roles` parts of each sample, one part below the other.
///
/// # Errors
/// For classes, the last axis of `output` must have a known size; a causal model's output has an axis of tokens before
/// it; one that ranks has a row for each text; a teacher goes with losses against labels; the operator set must be 13 or
/// newer.
pub fn append(
    model: &mut ModelProto,
    loss: Loss,
    output: &Field,
    columns: &[Field],
    roles: usize,
    teacher: Option<&Distilled>,
) -> Result<LossNames> {
    if model.opset() < 13 {
        return Err(Error::model(format!(
            "the model uses operator set {}; training needs 13 or newer (re-export it, or convert its version)",
            model.opset()
        )));
    }
    let (mut names, opset) = (Names::of(model), model.opset());
    let graph = model.graph.get_or_insert_default();
    let targets: Vec<String> = columns.iter().map(|column| names.fresh(&column.name)).collect();
    let scalar = names.fresh("loss");
    for (target, column) in targets.iter().zip(columns) {
        // Axes that the output names are the labels' too, so that shape inference sees they are equal.
        graph.input.push(Field { name: target.clone(), ..column.clone() }.info());
    }
    let (labels, label_rank) = match (targets.first(), columns.first().and_then(|c| c.dims.as_ref())) {
        (Some(name), Some(dims)) => (name.clone(), dims.len()),
        _ => (String::new(), 0),
    };

    let mut nodes = Nodes::new(graph, &mut names, &scalar);
    // Whatever the model computes in, the loss is float32.
    let scores = match output.data_type {
        None | Some(DataType::Float) => output.name.clone(),
        Some(_) => nodes.float(&output.name),
    };
    let rank = output.dims.as_ref().map(Vec::len);
    let mut value = match loss {
        Loss::CrossEntropy { label_smoothing } => {
            classes::cross_entropy(&mut nodes, &scores, &labels, classes::number(output)?, label_smoothing)
        }
        Loss::CausalLm { label_smoothing } => {
            let classes = classes::number(output)?;
            let (scores, labels) = classes::shifted(&mut nodes, &scores, &labels, output, label_rank)?;
            classes::cross_entropy(&mut nodes, &scores, &labels, classes, label_smoothing)
        }
        Loss::KlDiv { temperature } => rows::kl_div(&mut nodes, &scores, &labels, temperature),
        Loss::CosineEmbedding => rows::cosine_embedding(&mut nodes, &scores, &labels),
        Loss::BceWithLogits | Loss::Mse | Loss::Mae | Loss::Huber { .. } => {
            // One number a row may stand without the axis of length one that the output has.
            let target = if rank == Some(label_rank + 1) { nodes.unsqueeze(&labels) } else { labels.clone() };
            elements::mean(&mut nodes, loss, &scores, &target)
        }
        Loss::MultipleNegativesRanking { scale, symmetric } => {
            let parts = pairs::parts(&mut nodes, &scores, output, roles, opset)?;
            pairs::ranking(&mut nodes, &parts, scale, symmetric)
        }
        Loss::Triplet { margin, distance } => {
            let parts = pairs::parts(&mut nodes, &scores, output, roles, opset)?;
            pairs::triplet(&mut nodes, &parts, margin, distance)?
        }
        Loss::Ctc { blank, zero_infinity } => ctc::ctc(&mut nodes, &scores, &targets, output, (blank, zero_infinity))?,
        Loss::Own => return Err(Error::config("a loss of your own comes from loss-model")),
    };
    if let Some(teacher) = teacher {
        let Some(kind) = loss.label_kind().filter(|_| loss.takes_teacher()) else {
            return Err(Error::config("a teacher goes with losses against labels; leave out teacher"));
        };
        let float = !matches!(teacher.scores.data_type, None | Some(DataType::Float));
        let of_teacher = if float { nodes.float(&teacher.scores.name) } else { teacher.scores.name.clone() };
        let counted = (kind == LabelKind::Class).then_some(labels.as_str());
        let divergence = match loss {
            Loss::CausalLm { .. } => {
                let (scores, labels) = classes::shifted(&mut nodes, &scores, &labels, output, label_rank)?;
                let of_teacher = nodes.slice(&of_teacher, -2, 0, -1);
                rows::distilled(&mut nodes, &scores, &of_teacher, Some(&labels), teacher.temperature)
            }
            _ => rows::distilled(&mut nodes, &scores, &of_teacher, counted, teacher.temperature),
        };
        let hard = nodes.times(&value, teacher.alpha);
        let soft = nodes.times(&divergence, 1.0 - teacher.alpha);
        value = nodes.op("Add", &[&hard, &soft]);
    }
    graph.node.push(node("Identity", &[&value], &[&scalar]));
    graph.output.push(value_info(&scalar, DataType::Float, &[]));
    Ok(LossNames { targets, loss: scalar })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{self, Device, EngineKind, LoadOptions};
    use crate::onnx::proto::OperatorSetIdProto;
    use crate::onnx::{GraphProto, Tensor};

    /// The loss of `logits` (a model that only passes them on) against `labels`.
    fn loss(loss: Loss, dims: &[&str], logits: Tensor, labels: Tensor) -> f64 {
        let mut model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { version: Some(17), ..Default::default() }],
            graph: Some(GraphProto {
                name: Some("g".into()),
                node: vec![node("Identity", &["x"], &["labels"])],
                input: vec![value_info("x", DataType::Float, dims)],
                output: vec![value_info("labels", DataType::Float, dims)],
                ..Default::default()
            }),
            ..Default::default()
        };
        let output = Field::of(&value_info("labels", DataType::Float, dims));
        let column = loss.columns("labels", &output)[0].field(labels.dims().len());
        let names = append(&mut model, loss, &output, &[column], 1, None).unwrap();
        let engine = engine::open(EngineKind::Auto, Device::Cpu).unwrap();
        let mut session = engine.load(&model, &LoadOptions { threads: Some(1), optimize: true }).unwrap();
        let out = session.run(&[("x", &logits), (&names.targets[0], &labels)], &[&names.loss]).unwrap();
        assert!(out[0].dims().is_empty());
        out[0].as_f64().unwrap()
    }

    fn close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "{got} is not {want}");
    }

    /// −log softmax, in f64.
    fn nll(logits: &[f64], label: usize) -> f64 {
        logits.iter().map(|v| v.exp()).sum::<f64>().ln() - logits[label]
    }

    #[test]
    fn cross_entropy_is_the_mean_over_labels_that_count() {
        let logits = Tensor::new(&[3, 3], vec![1.0f32, 2.0, 3.0, 0.5, -0.5, 0.0, 9.0, 9.0, 9.0]);
        let got = loss(Loss::cross_entropy(), &["n", "3"], logits, Tensor::new(&[3], vec![0i64, 1, -100]));
        close(got, (nll(&[1.0, 2.0, 3.0], 0) + nll(&[0.5, -0.5, 0.0], 1)) / 2.0);
    }

    #[test]
    fn cross_entropy_per_token_has_classes_on_the_last_axis() {
        let logits = Tensor::new(&[1, 2, 2], vec![0.0f32, 1.0, 2.0, -1.0]);
        let got = loss(Loss::cross_entropy(), &["n", "t", "2"], logits, Tensor::new(&[1, 2], vec![1i64, 1]));
        close(got, (nll(&[0.0, 1.0], 1) + nll(&[2.0, -1.0], 1)) / 2.0);
    }

    #[test]
    fn cross_entropy_stays_finite_far_out() {
        let logits = Tensor::new(&[1, 3], vec![1000.0f32, 0.0, f32::NEG_INFINITY]);
        close(loss(Loss::cross_entropy(), &["n", "3"], logits.clone(), Tensor::new(&[1], vec![1i64])), 1000.0);
        close(loss(Loss::cross_entropy(), &["n", "3"], logits, Tensor::new(&[1], vec![-100i64])), 0.0);
    }

    #[test]
    fn mse_is_the_mean_over_all_elements() {
        let y = Tensor::new(&[2, 2], vec![1.0f32, 2.0, 3.0, 4.0]);
        close(loss(Loss::Mse, &["n", "2"], y, Tensor::new(&[2, 2], vec![1.0f32, 0.0, 3.0, 1.0])), 13.0 / 4.0);
        let y = Tensor::new(&[2, 1], vec![1.0f32, 2.0]);
        close(loss(Loss::Mse, &["n", "1"], y, Tensor::new(&[2], vec![3.0f32, 2.0])), 2.0);
    }

    #[test]
    fn an_old_operator_set_or_an_open_class_axis_is_refused() {
        let field = Field::of(&value_info("y", DataType::Float, &["n", "c"]));
        let labels = [Field::of(&value_info("labels", DataType::Int64, &["n"]))];
        let mut model = ModelProto {
            opset_import: vec![OperatorSetIdProto { version: Some(17), ..Default::default() }],
            graph: Some(GraphProto::default()),
            ..Default::default()
        };
        let mut refused = |loss, field: &Field, opset| {
            model.opset_import[0].version = Some(opset);
            append(&mut model, loss, field, &labels, 2, None).unwrap_err().to_string()
        };
        assert!(refused(Loss::cross_entropy(), &field, 17).contains("output y"));
        assert!(refused(Loss::Mse, &field, 11).contains("operator set 11"));
        let triplet = Loss::Triplet { margin: 1.0, distance: Distance::Cosine };
        assert!(refused(triplet, &field, 17).contains("wants a negative"));
        for (dims, word) in [(["n", "t", "8"].as_slice(), "--pool mean"), (&["n"], "[rows, features]")] {
            let complaint = refused(triplet, &Field::of(&value_info("y", DataType::Float, dims)), 17);
            assert!(complaint.contains(word) && complaint.contains("output y"), "{complaint}");
        }
    }
}
