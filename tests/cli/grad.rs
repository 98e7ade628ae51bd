//! `grad`: the file it writes, and what it says to names and operators that it cannot do.

use bone_onnx::engine::{Device, EngineKind, LoadOptions, open};
use bone_onnx::onnx::{Model, Tensor};
use prost::Message;
use serde_json::Value;

use super::{done, external, floats, network, refused};

#[test]
fn inputs_outputs_and_values_of_the_gradient_model() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("base.onnx"), network(false).encode_to_vec()).expect("a file");
    let said = done(&["grad", "base.onnx", "-o", "grad.onnx", "--wrt", "pixels", "fc2.bias", "--json"], dir.path());
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(said["summary"]["seeds"]["logits"], "logits.seed");
    assert_eq!(said["summary"]["differentiated"], 4);
    let model = Model::open(dir.path().join("grad.onnx")).expect("a model");
    let names =
        |values: &[bone_onnx::onnx::ValueInfoProto]| values.iter().map(|v| v.name().to_string()).collect::<Vec<_>>();
    assert_eq!(names(&model.graph().input), ["pixels", "logits.seed"]);
    assert_eq!(names(&model.graph().output), ["logits", "pixels.grad", "fc2.bias.grad"]);
    assert!(model.graph().initializer.iter().any(|t| t.name() == "fc2.bias"));

    let engine = open(EngineKind::Tract, Device::Cpu).expect("tract");
    let options = LoadOptions { threads: Some(1), optimize: true };
    let mut session = engine.load(&model.proto, &options).expect("a session");
    let seed = Tensor::new(&[2, 3], vec![1f32, 2.0, 3.0, 10.0, 20.0, 30.0]);
    let wanted = ["fc2.bias.grad", "pixels.grad"];
    let got = session.run(&[("pixels", &floats(&[2, 6])), ("logits.seed", &seed)], &wanted).expect("a run");
    assert_eq!(got[0], Tensor::new(&[3], vec![11f32, 22.0, 33.0]));
    assert_eq!(got[1].dims(), [2, 6]);
    assert!(got[1].to_f64().iter().any(|v| *v != 0.0));
}

#[test]
fn names_that_are_not_there_and_operators_without_a_rule() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("base.onnx"), network(false).encode_to_vec()).expect("a file");
    std::fs::write(dir.path().join("odd.onnx"), network(true).encode_to_vec()).expect("a file");
    let grad = |more: &[&str], parts: &[&str]| {
        let args = [&["grad", "base.onnx", "-o", "out.onnx"], more].concat();
        refused(&args, dir.path(), "out.onnx", parts);
    };
    grad(&["--of", "logit"], &["--of", "\"logit\"", "Did you mean logits?"]);
    grad(&["--wrt", "pixel"], &["--wrt", "\"pixel\"", "Did you mean pixels?"]);
    grad(&["--wrt", "fc1.wieght"], &["Did you mean fc1.weight"]);
    let odd = ["grad", "odd.onnx", "-o", "out.onnx"];
    refused(&odd, dir.path(), "out.onnx", &["org.example.Mystery", "/strange/0", "/strange/1"]);
}

#[test]
fn external_weights_stay_external() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("base.onnx"), external("weights.bin", Some("120")).encode_to_vec()).expect("a file");
    std::fs::write(dir.path().join("weights.bin"), [1; 120]).expect("a file");
    std::fs::create_dir(dir.path().join("sub")).expect("a directory");
    done(&["grad", "base.onnx", "-o", "sub/grad.onnx"], dir.path());
    assert_eq!(std::fs::read(dir.path().join("sub/weights.bin")).expect("the data"), [1; 120]);
    let model = Model::open(dir.path().join("sub/grad.onnx")).expect("a model");
    let weight = model.graph().initializer.iter().find(|t| t.name() == "fc1.weight").expect("the weight");
    assert!(weight.raw_data.is_none());
    assert_eq!(model.tensor(weight).expect("its value").dims(), [5, 6]);
}
