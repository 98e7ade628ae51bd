//! What a run says when it cannot go on, and that it leaves nothing half done.

use std::path::Path;

use bone_onnx::adapter::Injection;
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::{self, Loss, TrainOptions};

use crate::common::{arrays, files, injected, metrics, mlp, onnxruntime, shared, write_arrays};

struct Case {
    dir: tempfile::TempDir,
    model: Model,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
        Self { dir, model }
    }

    fn out(&self) -> std::path::PathBuf {
        self.dir.path().join("out")
    }

    /// Options over a file with these arrays.
    fn options(&self, loss: Loss, arrays: &[(&str, &Tensor)]) -> TrainOptions {
        let data = self.dir.path().join("data.safetensors");
        write_arrays(&data, arrays);
        TrainOptions { batch_size: Some(16), steps: Some(4), ..TrainOptions::new(self.out(), data, loss) }
    }

    fn complaint(&self, options: &TrainOptions) -> String {
        train::run(&self.model, options, onnxruntime(), &mut ()).expect_err("it should fail").to_string()
    }

    /// The complaint about something that is known before the first step: it names all of `words`, and no file appears.
    fn refused(&self, options: &TrainOptions, words: &[&str]) {
        let complaint = self.complaint(options);
        for word in words {
            assert!(complaint.contains(word), "{word:?} is missing in {complaint:?}");
        }
        assert!(!self.out().exists(), "{complaint}");
    }
}

fn x() -> Tensor {
    arrays(&shared("goldens/mlp/base.safetensors"))["x"].clone()
}

fn y() -> Tensor {
    arrays(&shared("goldens/mlp/base.safetensors"))["y"].clone()
}

fn ids(values: impl Iterator<Item = i64>) -> Tensor {
    let values: Vec<i64> = values.collect();
    Tensor::new(&[values.len()], values)
}

#[test]
fn a_model_without_adapters() {
    let case = Case::new();
    let options = case.options(Loss::Mse, &[("x", &x()), ("labels", &y())]);
    let base = Model::open(mlp("base_gemm.onnx")).unwrap();
    let complaint = train::run(&base, &options, onnxruntime(), &mut ()).unwrap_err().to_string();
    assert!(complaint.contains("base_gemm.onnx") && complaint.contains("inject"), "{complaint}");
    assert!(!case.out().exists());
}

#[test]
fn labels_out_of_range() {
    let case = Case::new();
    let labels = ids((0..16).map(|i| if i == 9 { 4 } else { i % 4 }));
    let options = case.options(Loss::cross_entropy(), &[("x", &x()), ("labels", &labels)]);
    case.refused(&options, &["data.safetensors", "row 9", "label 4", "4 classes"]);
}

#[test]
fn arrays_of_the_wrong_shape_type_or_name() {
    let case = Case::new();
    let good = ids((0..16).map(|i| i % 4));
    let wide = Tensor::new(&[16, 6], vec![0f32; 96]);
    let refused = |loss, arrays: &[(&str, &Tensor)], words: &[&str]| case.refused(&case.options(loss, arrays), words);
    refused(
        Loss::cross_entropy(),
        &[("x", &wide), ("labels", &good)],
        &["data.safetensors", "array x", "[16, 6]", "[n, 12]"],
    );
    refused(Loss::cross_entropy(), &[("x", &good), ("labels", &good)], &["array x", "int64", "float32"]);
    refused(Loss::cross_entropy(), &[("X", &x()), ("labels", &good)], &["array X", "inputs are x"]);
    refused(Loss::cross_entropy(), &[("x", &x())], &["labels", "--labels"]);
    refused(Loss::cross_entropy(), &[("x", &x()), ("labels", &y())], &["labels", "float32", "int64"]);
    refused(Loss::Mse, &[("x", &x()), ("labels", &x())], &["labels", "[16, 12]", "[n, 4]"]);
}

#[test]
fn empty_data() {
    let case = Case::new();
    let options = case
        .options(Loss::cross_entropy(), &[("x", &Tensor::new(&[0, 12], Vec::<f32>::new())), ("labels", &ids(0..0))]);
    case.refused(&options, &["data.safetensors", "no rows"]);
}

#[test]
fn an_unusable_setting_or_output_name() {
    let case = Case::new();
    let options = case.options(Loss::Mse, &[("x", &x()), ("labels", &y())]);
    case.refused(&TrainOptions { lr: -1.0, ..options.clone() }, &["lr"]);
    case.refused(&TrainOptions { output: Some("yy".into()), ..options.clone() }, &["yy", "Did you mean y?"]);
    case.refused(&TrainOptions { data: vec![case.dir.path().join("none.npz")], ..options.clone() }, &["none.npz"]);
    let eval = case.dir.path().join("eval.safetensors");
    write_arrays(&eval, &[("x", &x()), ("labels", &x())]);
    case.refused(&TrainOptions { eval_data: vec![eval], ..options }, &["eval.safetensors", "[16, 12]"]);
}

#[test]
fn operators_without_a_derivative_are_all_named() {
    let case = Case::new();
    // The activation between the two layers, and one more after it, become operators that nobody knows.
    let mut proto = case.model.proto.clone();
    let graph = proto.graph.as_mut().unwrap();
    let at = graph.node.iter().position(|n| n.is("Relu")).unwrap();
    let mut second = graph.node[at].clone();
    let old = second.output[0].clone();
    (second.input, second.name) = (vec!["between".into()], Some("second/strange".into()));
    graph.node[at].output = vec!["between".into()];
    graph.node[at].name = Some("first/odd".into());
    for (node, op) in [(&mut graph.node[at], "Odd"), (&mut second, "Strange")] {
        (node.op_type, node.domain) = (Some(op.into()), Some("com.example".into()));
    }
    assert_eq!(second.output, [old]);
    graph.node.insert(at + 1, second);
    let path = case.dir.path().join("odd.onnx");
    std::fs::write(&path, prost::Message::encode_to_vec(&proto)).unwrap();

    let options = case.options(Loss::Mse, &[("x", &x()), ("labels", &y())]);
    let case = Case { model: Model::open(&path).unwrap(), ..case };
    case.refused(&options, &["Odd", "first/odd", "Strange", "second/strange"]);
}

/// All parameters that `out` holds are finite numbers, in both forms.
fn kept_values(out: &Path) -> Vec<f64> {
    let saved = arrays(&out.join("adapter/adapter_model.safetensors"));
    let model = Model::open(out.join("injected.onnx")).unwrap();
    let mut all = Vec::new();
    for target in &Injection::expect(&model).unwrap().adapters[0].targets {
        let tensor = model.graph().initializer.iter().find(|t| t.name() == target.parameter).unwrap();
        let key = format!("base_model.model.{}.miss_block", target.module);
        assert_eq!(model.tensor(tensor).unwrap(), saved[&key]);
        all.extend(saved[&key].to_f64());
    }
    all
}

#[test]
fn a_loss_that_becomes_infinite_stops_the_run_and_keeps_the_last_good_values() {
    let case = Case::new();
    let options = TrainOptions { lr: 1e30, ..case.options(Loss::Mse, &[("x", &x()), ("labels", &y())]) };
    let complaint = case.complaint(&options);
    assert!(complaint.contains("step 2") && complaint.contains("loss") && complaint.contains("lr"), "{complaint}");
    // The update of step 1 spoiled the values; those that it began with are the last good ones.
    assert!(kept_values(&case.out()).iter().all(|v| *v == 0.0));
    assert_eq!(metrics(&case.out()).len(), 1);
}

#[test]
fn data_that_spoils_a_later_batch_keeps_what_was_trained_before() {
    let case = Case::new();
    let mut spoiled = x().values::<f32>().unwrap().to_vec();
    spoiled[15 * 12] = f32::NAN;
    let arrays = [("x", &Tensor::new(&[16, 12], spoiled)), ("labels", &y())];
    let options = TrainOptions { batch_size: Some(4), shuffle: false, ..case.options(Loss::Mse, &arrays) };
    let complaint = case.complaint(&options);
    assert!(complaint.contains("step 4"), "{complaint}");
    assert_eq!(metrics(&case.out()).len(), 3);
    let kept = kept_values(&case.out());
    assert!(kept.iter().all(|v| v.is_finite()) && kept.iter().any(|v| *v != 0.0));
}

#[test]
fn data_that_spoils_the_first_batch_leaves_no_model() {
    let case = Case::new();
    let arrays = [("x", &Tensor::new(&[16, 12], vec![f32::NAN; 192])), ("labels", &y())];
    let complaint = case.complaint(&case.options(Loss::Mse, &arrays));
    assert!(complaint.contains("step 1") && complaint.contains("data"), "{complaint}");
    assert_eq!(files(&case.out()), ["metrics.jsonl", "tensorboard"]);
}
