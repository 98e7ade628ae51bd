//! Losses as ONNX nodes behind a model's output. Only operators that both engines run and that have a derivative rule;
//! the training-only loss operators are neither.

use std::str::FromStr;

use super::data::{Axis, Field, LabelKind};
use crate::onnx::{AttributeProto, DataType, ModelProto, Names, Tensor, constant_i64, node, value_info};
use crate::{Error, Result};

/// What is made small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// −log softmax at the label, mean over the labels that are not −100 (`torch.nn.functional.cross_entropy`; classes
    /// on the last axis, whatever the rank). A batch of −100 alone has loss 0 here and NaN there.
    CrossEntropy,
    /// Squared difference, mean over all elements (`torch.nn.functional.mse_loss`).
    Mse,
}

impl FromStr for Loss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cross-entropy" => Ok(Self::CrossEntropy),
            "mse" => Ok(Self::Mse),
            _ => Err(format!("loss is {text:?}; use cross-entropy or mse")),
        }
    }
}

impl Loss {
    pub fn label_kind(self) -> LabelKind {
        match self {
            Self::CrossEntropy => LabelKind::Class,
            Self::Mse => LabelKind::Number,
        }
    }
}

/// Names that [`append`] added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LossNames {
    /// New graph input.
    pub labels: String,
    /// New graph output, a scalar.
    pub loss: String,
}

/// Adds `loss` behind `output`: a graph input for the labels (of rank `label_rank`) and a scalar output.
///
/// # Errors
/// For classes, the last axis of `output` must have a known size; the operator set must be 13 or newer.
pub fn append(model: &mut ModelProto, loss: Loss, output: &Field, label_rank: usize) -> Result<LossNames> {
    if model.opset() < 13 {
        return Err(Error::model(format!(
            "the model uses operator set {}; training needs 13 or newer (re-export it, or convert its version)",
            model.opset()
        )));
    }
    let classes = output.classes();
    let mut names = Names::of(model);
    let graph = model.graph.get_or_insert_default();
    let labels = names.fresh("labels");
    let scalar = names.fresh("loss");
    let mut name = |part: &str| names.fresh(&format!("{scalar}/{part}"));

    let element = match loss {
        Loss::CrossEntropy => DataType::Int64,
        Loss::Mse => DataType::Float,
    };
    // Axes that the output names are the labels' too, so that shape inference sees they are equal.
    let axes: Vec<String> = (0..label_rank)
        .map(|i| match output.dims.as_ref().and_then(|d| d.get(i)) {
            Some(Axis::Known(n)) => n.to_string(),
            Some(Axis::Named(name)) => name.clone(),
            _ => String::new(),
        })
        .collect();
    let axes: Vec<&str> = axes.iter().map(String::as_str).collect();
    graph.input.push(value_info(&labels, element, &axes));

    // Whatever the model computes in, the loss is float32.
    let scores = match output.data_type {
        None | Some(DataType::Float) => output.name.clone(),
        Some(_) => {
            let wide = name("scores");
            let to = AttributeProto::int("to", DataType::Float as i64);
            graph.node.push(with(node("Cast", &[&output.name], &[&wide]), to));
            wide
        }
    };
    let add_last_axis = |graph: &mut crate::onnx::GraphProto, axis: &str, column: &str| {
        constant_i64(graph, axis, &[-1]);
        graph.node.push(node("Unsqueeze", &[&labels, axis], &[column]));
    };
    match loss {
        Loss::CrossEntropy => {
            let classes = classes.ok_or_else(|| {
                Error::model(format!(
                    "the last axis of output {} has no fixed size in the model, so the number of classes cannot be told",
                    output.name
                ))
            })?;
            let [axis, column, ids, hot, log, zero, picked, sum, counted, count, one, at_least_one, mean] = [
                "axis",
                "column",
                "classes",
                "hot",
                "log_softmax",
                "zero",
                "picked",
                "sum",
                "counted",
                "count",
                "one",
                "at_least_one",
                "mean",
            ]
            .map(&mut name);
            add_last_axis(graph, &axis, &column);
            constant_i64(graph, &ids, &(0..classes as i64).collect::<Vec<_>>());
            graph.initializer.push(Tensor::scalar(0f32).to_proto(&zero));
            graph.initializer.push(Tensor::scalar(1f32).to_proto(&one));
            // An ignored label equals no class, so it falls out of both sums.
            graph.node.push(node("Equal", &[&column, &ids], &[&hot]));
            graph.node.push(with(node("LogSoftmax", &[&scores], &[&log]), AttributeProto::int("axis", -1)));
            graph.node.push(node("Where", &[&hot, &log, &zero], &[&picked]));
            graph.node.push(all(node("ReduceSum", &[&picked], &[&sum])));
            graph
                .node
                .push(with(node("Cast", &[&hot], &[&counted]), AttributeProto::int("to", DataType::Float as i64)));
            graph.node.push(all(node("ReduceSum", &[&counted], &[&count])));
            graph.node.push(node("Max", &[&count, &one], &[&at_least_one]));
            graph.node.push(node("Div", &[&sum, &at_least_one], &[&mean]));
            graph.node.push(node("Neg", &[&mean], &[&scalar]));
        }
        Loss::Mse => {
            let [axis, column, difference, square] = ["axis", "column", "difference", "square"].map(&mut name);
            let short = output.dims.as_ref().is_some_and(|d| d.len() == label_rank + 1);
            let target = if short {
                add_last_axis(graph, &axis, &column);
                &column
            } else {
                &labels
            };
            graph.node.push(node("Sub", &[&scores, target], &[&difference]));
            graph.node.push(node("Mul", &[&difference, &difference], &[&square]));
            graph.node.push(all(node("ReduceMean", &[&square], &[&scalar])));
        }
    }
    graph.output.push(value_info(&scalar, DataType::Float, &[]));
    Ok(LossNames { labels, loss: scalar })
}

fn with(mut node: crate::onnx::NodeProto, attribute: AttributeProto) -> crate::onnx::NodeProto {
    node.attribute.push(attribute);
    node
}

/// A reduction over all axes, to a scalar.
fn all(node: crate::onnx::NodeProto) -> crate::onnx::NodeProto {
    with(node, AttributeProto::int("keepdims", 0))
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
        let names = append(&mut model, loss, &output, labels.dims().len()).unwrap();
        let engine = engine::open(EngineKind::Auto, Device::Cpu).unwrap();
        let mut session = engine.load(&model, &LoadOptions { threads: Some(1), optimize: true }).unwrap();
        let out = session.run(&[("x", &logits), (&names.labels, &labels)], &[&names.loss]).unwrap();
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
        let got = loss(Loss::CrossEntropy, &["n", "3"], logits, Tensor::new(&[3], vec![0i64, 1, -100]));
        close(got, (nll(&[1.0, 2.0, 3.0], 0) + nll(&[0.5, -0.5, 0.0], 1)) / 2.0);
    }

    #[test]
    fn cross_entropy_per_token_has_classes_on_the_last_axis() {
        let logits = Tensor::new(&[1, 2, 2], vec![0.0f32, 1.0, 2.0, -1.0]);
        let got = loss(Loss::CrossEntropy, &["n", "t", "2"], logits, Tensor::new(&[1, 2], vec![1i64, 1]));
        close(got, (nll(&[0.0, 1.0], 1) + nll(&[2.0, -1.0], 1)) / 2.0);
    }

    #[test]
    fn cross_entropy_stays_finite_far_out() {
        let logits = Tensor::new(&[1, 3], vec![1000.0f32, 0.0, f32::NEG_INFINITY]);
        close(loss(Loss::CrossEntropy, &["n", "3"], logits.clone(), Tensor::new(&[1], vec![1i64])), 1000.0);
        close(loss(Loss::CrossEntropy, &["n", "3"], logits, Tensor::new(&[1], vec![-100i64])), 0.0);
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
        let mut model = ModelProto {
            opset_import: vec![OperatorSetIdProto { version: Some(17), ..Default::default() }],
            graph: Some(GraphProto::default()),
            ..Default::default()
        };
        assert!(append(&mut model, Loss::CrossEntropy, &field, 1).unwrap_err().to_string().contains("output y"));
        model.opset_import[0].version = Some(11);
        assert!(append(&mut model, Loss::Mse, &field, 2).unwrap_err().to_string().contains("operator set 11"));
    }
}
