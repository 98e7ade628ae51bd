//! PEFT's truth for one layer: all f32 Bone cases of `goldens/layer_bone` as MatMul and as Gemm.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::adapter::{BoneConfig, Injection, TargetModules};
use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::engine::LoadOptions;
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{InjectOptions, inject};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor, node, value_info};
use prost::Message;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::common::{engine, run, shared, worst};

fn array(file: &SafeTensors, name: &str) -> Option<Tensor> {
    let view = file.tensor(name).ok()?;
    (view.dtype() == safetensors::Dtype::F32)
        .then(|| Tensor::from_bytes(DataType::Float, view.shape(), view.data()).expect("a tensor"))
}

/// The layer as ONNX: Gemm over the rows with W as torch has it, or MatMul with Wᵀ and an Add.
fn layer(gemm: bool, w: &Tensor, b: Option<&Tensor>, x: &Tensor) -> ModelProto {
    let (out, inp) = (w.dims()[0], w.dims()[1]);
    let mut graph = GraphProto { name: Some("layer".into()), ..Default::default() };
    let leading: Vec<String> = x.dims()[..x.dims().len() - 1].iter().map(usize::to_string).collect();
    let shape = |last: usize| leading.iter().cloned().chain([last.to_string()]).collect::<Vec<_>>();
    let (sx, sy) = (shape(inp), shape(out));
    let info =
        |name: &str, s: &[String]| value_info(name, DataType::Float, &s.iter().map(String::as_str).collect::<Vec<_>>());
    graph.input.push(info("x", &sx));
    graph.output.push(info("y", &sy));
    if let Some(b) = b {
        graph.initializer.push(b.to_proto("fc.bias"));
    }
    if gemm {
        graph.initializer.push(w.to_proto("fc.weight"));
        let inputs: &[&str] = if b.is_some() { &["x", "fc.weight", "fc.bias"] } else { &["x", "fc.weight"] };
        let mut gemm = node("Gemm", inputs, &["y"]);
        gemm.attribute = vec![AttributeProto::int("transB", 1)];
        gemm.name = Some("/fc/Gemm".into());
        graph.node.push(gemm);
    } else {
        let Tensor::F32(array) = w else { panic!("f32") };
        graph.initializer.push(Tensor::F32(array.t().as_standard_layout().into_owned()).to_proto("onnx::MatMul_1"));
        let product = if b.is_some() { "p" } else { "y" };
        let mut multiply = node("MatMul", &["x", "onnx::MatMul_1"], &[product]);
        multiply.name = Some("/fc/MatMul".into());
        graph.node.push(multiply);
        if b.is_some() {
            graph.node.push(node("Add", &["fc.bias", "p"], &["y"]));
        }
    }
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
        graph: Some(graph),
        ..Default::default()
    }
}

fn set(path: &Path, values: &BTreeMap<String, Tensor>) {
    let mut proto = ModelProto::decode(std::fs::read(path).expect("a file").as_slice()).expect("a model");
    for tensor in &mut proto.graph.as_mut().expect("a graph").initializer {
        if let Some(value) = values.get(tensor.name()) {
            *tensor = value.to_proto(tensor.name());
        }
    }
    std::fs::write(path, proto.encode_to_vec()).expect("a file");
}

#[test]
fn every_f32_bone_layer_is_pefts() {
    let bytes = std::fs::read(shared("goldens/layer_bone.safetensors")).expect("the vectors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let json: Value =
        serde_json::from_slice(&std::fs::read(shared("goldens/layer_bone.json")).expect("the cases")).expect("json");
    let mut seen = 0;
    for (case, about) in json["cases"].as_object().expect("cases") {
        if !case.starts_with("bone_") || about["base_dtype"] != "torch.float32" {
            continue;
        }
        let get = |name: &str| array(&file, &format!("{case}/{name}"));
        let adapters: Vec<(String, usize)> = about["adapters"]
            .as_array()
            .expect("adapters")
            .iter()
            .map(|a| (a["name"].as_str().expect("a name").to_string(), a["r"].as_u64().expect("r") as usize))
            .collect();
        // The orders that PEFT was asked for, such as "default" or "alpha+gamma".
        let orders: Vec<String> = file
            .names()
            .into_iter()
            .filter_map(|n| n.strip_prefix(&format!("{case}/y.")).map(str::to_string))
            .collect();
        assert!(!orders.is_empty(), "{case}");
        for order in &orders {
            for gemm in [true, false] {
                let x = get("x").expect("x");
                if gemm && x.dims().len() != 2 {
                    continue;
                }
                check(case, order, gemm, &adapters, &get);
                seen += 1;
            }
        }
    }
    assert!(seen >= 14, "only {seen} cases");
}

fn check(case: &str, order: &str, gemm: bool, adapters: &[(String, usize)], get: &dyn Fn(&str) -> Option<Tensor>) {
    let what = format!("{case} {order} {}", if gemm { "Gemm" } else { "MatMul" });
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.onnx");
    let (w, b, x, gy) = (get("W").expect("W"), get("b"), get("x").expect("x"), get("gy").expect("gy"));
    std::fs::write(&path, layer(gemm, &w, b.as_ref(), &x).encode_to_vec()).expect("a file");
    let active: Vec<&(String, usize)> =
        order.split(['+', ',', '_']).filter_map(|name| adapters.iter().find(|a| a.0 == name)).collect();
    assert!(!active.is_empty(), "{what}: no adapter in the order");
    for (name, r) in &active {
        let config =
            BoneConfig { r: *r, target_modules: Some(TargetModules::List(vec!["fc".into()])), ..Default::default() };
        let model = Model::open(&path).expect("a model");
        let options = InjectOptions { adapter_name: name.clone(), config, ..Default::default() };
        inject(&model, &options).and_then(|i| i.write(&model, &path)).expect("an injection");
        set(&path, &BTreeMap::from([(format!("fc.bone_block.{name}"), get(&format!("B.{name}")).expect("B"))]));
    }

    let close = |name: &str, ours: &Tensor| {
        let theirs = get(name).unwrap_or_else(|| panic!("{what}: no {name}"));
        let off = worst(ours, &theirs);
        assert!(off <= 1e-5, "{what}: {name} is off by {off}");
    };
    let inputs = BTreeMap::from([("x".to_string(), x.clone())]);
    close(&format!("y.{order}"), &run(&path, &inputs)[0]);

    // Gradients by our own reverse mode, at both optimization levels.
    let model = Model::open(&path).expect("a model");
    let mut wrt = vec!["x".to_string()];
    wrt.extend(Injection::expect(&model).expect("a record").trainable().into_iter().map(|t| t.name));
    let request = Request { of: vec![("y".into(), Seed::Input)], wrt, ..Default::default() };
    let grad = gradient(&model.proto, &request).expect("a gradient");
    for optimize in [true, false] {
        let mut session = engine().load(&grad.model, &LoadOptions { threads: Some(1), optimize }).expect("a session");
        let wanted: Vec<&str> = grad.gradients.iter().map(String::as_str).collect();
        let got = session.run(&[("x", &x), ("y.seed", &gy)], &wanted).expect("gradients");
        close(&format!("gx.{order}"), &got[0]);
        for ((name, _), ours) in active.iter().zip(&got[1..]) {
            close(&format!("gB.{order}.{name}"), ours);
        }
    }

    // PEFT cannot merge r > in; there the formula is checked against the injected model's output.
    let merged = dir.path().join("merged.onnx");
    fold(&model, &FoldOptions { safe: true, ..FoldOptions::default() }, &merged)
        .and_then(|f| f.write(&model, &merged))
        .expect("a fold");
    let folded = run(&merged, &inputs);
    if let Some(theirs) = get(&format!("y_merged.{order}")) {
        assert!(worst(&folded[0], &theirs) <= 1e-5, "{what}: y_merged");
    }
    assert!(worst(&folded[0], &get(&format!("y.{order}")).expect("y")) <= 1e-5, "{what}: merged y");
    if let Some(Tensor::F32(theirs)) = get(&format!("W_merged.{order}")) {
        let merged = Model::open(&merged).expect("a model");
        let name = if gemm { "fc.weight" } else { "onnx::MatMul_1" };
        let tensor = merged.graph().initializer.iter().find(|t| t.name() == name).expect("the weight");
        let Tensor::F32(ours) = merged.tensor(tensor).expect("a value") else { panic!("f32") };
        let ours = if gemm { ours } else { ours.t().as_standard_layout().into_owned() };
        if active.len() == 1 {
            assert_eq!(ours, theirs, "{what}: W_merged, bit for bit");
        } else {
            close(&format!("W_merged.{order}"), &Tensor::F32(ours));
        }
    }
}
