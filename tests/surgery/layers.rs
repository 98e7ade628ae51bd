//! PEFT's truth for one layer: every case of `goldens/layer_bone` and `goldens/layer_miss` (all variants, stacks in both
//! orders, float32, float16 and bfloat16), as Gemm and as MatMul: output, gradients, merged and unmerged weight.

use std::collections::BTreeMap;
use std::path::Path;

use bone_onnx::adapter::{Adapter, BoneConfig, Injection, PeftType, TargetModules};
use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::engine::LoadOptions;
use bone_onnx::fold::{FoldOptions, fold};
use bone_onnx::inject::{activate, import, write};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor, node, value_info};
use prost::Message;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::common::{engine, run, shared, worst};

fn array(file: &SafeTensors, name: &str) -> Option<Tensor> {
    let view = file.tensor(name).ok()?;
    let data_type = match view.dtype() {
        Dtype::F32 => DataType::Float,
        Dtype::F16 => DataType::Float16,
        Dtype::BF16 => DataType::Bfloat16,
        other => panic!("{name} holds {other:?}"),
    };
    Some(Tensor::from_bytes(data_type, view.shape(), view.data()).expect("a tensor"))
}

/// As float32.
fn wide(tensor: &Tensor) -> Tensor {
    Tensor::new(tensor.dims(), tensor.to_f64().into_iter().map(|v| v as f32).collect())
}

fn turned(tensor: &Tensor) -> Tensor {
    match tensor {
        Tensor::F32(a) => Tensor::F32(a.t().as_standard_layout().into_owned()),
        Tensor::F16(a) => Tensor::F16(a.t().as_standard_layout().into_owned()),
        Tensor::Bf16(a) => Tensor::Bf16(a.t().as_standard_layout().into_owned()),
        _ => panic!("a float matrix"),
    }
}

/// The layer as ONNX: Gemm over the rows with W as torch has it, or MatMul with Wᵀ and an Add.
fn layer(gemm: bool, w: &Tensor, b: Option<&Tensor>, x: &Tensor) -> ModelProto {
    let (out, inp) = (w.dims()[0], w.dims()[1]);
    let mut graph = GraphProto { name: Some("layer".into()), ..Default::default() };
    let leading: Vec<String> = x.dims()[..x.dims().len() - 1].iter().map(usize::to_string).collect();
    let info = |name: &str, last: usize| {
        let dims: Vec<String> = leading.iter().cloned().chain([last.to_string()]).collect();
        value_info(name, w.data_type(), &dims.iter().map(String::as_str).collect::<Vec<_>>())
    };
    graph.input.push(info("x", inp));
    graph.output.push(info("y", out));
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
        graph.initializer.push(turned(w).to_proto("onnx::MatMul_1"));
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

/// A case: what PEFT was given and what it gave.
struct Case<'a> {
    name: &'a str,
    about: &'a Value,
    file: &'a SafeTensors<'a>,
    peft_type: PeftType,
}

impl Case<'_> {
    fn get(&self, what: &str) -> Option<Tensor> {
        array(self.file, &format!("{}/{what}", self.name))
    }

    /// The orders that PEFT was asked for, such as `default` or `alpha+gamma`.
    fn orders(&self) -> Vec<String> {
        let prefix = format!("{}/y.", self.name);
        self.file.names().into_iter().filter_map(|n| n.strip_prefix(&prefix).map(str::to_string)).collect()
    }

    fn config(&self, r: u64) -> BoneConfig {
        let mut fields = json!({"r": r, "init_weights": self.about["init_weights"]});
        for key in ["mini_r", "miss_dropout"] {
            fields[key] = self.about[key].clone();
        }
        let mut config = BoneConfig::from_json(&fields, &mut Vec::new()).expect("a config");
        config.peft_type = self.peft_type;
        config.target_modules = Some(TargetModules::List(vec!["fc".into()]));
        config
    }

    /// The adapters, with the values that PEFT had.
    fn adapters(&self) -> Vec<Adapter> {
        let list = self.about["adapters"].as_array().expect("adapters");
        list.iter()
            .map(|about| {
                let name = about["name"].as_str().expect("a name");
                let block = wide(&self.get(&format!("B.{name}")).expect("B"));
                Adapter {
                    name: name.into(),
                    config: self.config(about["r"].as_u64().expect("r")),
                    blocks: BTreeMap::from([("fc".to_string(), block)]),
                    saved: BTreeMap::new(),
                }
            })
            .collect()
    }
}

fn each_case(check: impl Fn(&Case)) -> usize {
    let mut seen = 0;
    for (stem, peft_type) in [("layer_bone", PeftType::Bone), ("layer_miss", PeftType::Miss)] {
        let bytes = std::fs::read(shared(&format!("goldens/{stem}.safetensors"))).expect("the vectors");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let json = std::fs::read(shared(&format!("goldens/{stem}.json"))).expect("the cases");
        let json: Value = serde_json::from_slice(&json).expect("json");
        for (name, about) in json["cases"].as_object().expect("cases") {
            check(&Case { name, about, file: &file, peft_type });
            seen += 1;
        }
    }
    seen
}

/// How far a result may be off: in float32 the reference's 1e-5; a half type is as fine as its own steps, and PEFT's
/// values have been rounded to it as ours have.
fn tolerance(data_type: DataType, theirs: &Tensor) -> f64 {
    let largest = theirs.to_f64().iter().fold(1.0f64, |m, v| m.max(v.abs()));
    let step = |bits: i32| 2f64.powi(largest.log2().floor() as i32 - bits);
    match data_type {
        DataType::Float16 => 2.0 * step(10),
        DataType::Bfloat16 => 2.0 * step(7),
        _ => 1e-5,
    }
}

#[test]
fn every_layer_computes_and_learns_as_pefts() {
    let seen = each_case(|case| {
        // Its output is that of one dropout mask: `train/graph/form.rs` takes this one.
        if case.about["miss_dropout"].as_f64().unwrap_or(0.0) > 0.0 {
            return;
        }
        // No engine here multiplies bfloat16 matrices on a CPU; the layer is then computed in float32.
        let widen = case.about["base_dtype"] == "torch.bfloat16";
        let load = |what: &str| case.get(what).map(|t| if widen { wide(&t) } else { t });
        let x = load("x").expect("x");
        for order in case.orders() {
            for gemm in [true, false] {
                if gemm && x.dims().len() != 2 {
                    continue;
                }
                let what = format!("{} {order} {}", case.name, if gemm { "Gemm" } else { "MatMul" });
                let dir = tempfile::tempdir().expect("a directory");
                let proto = layer(gemm, &load("W").expect("W"), load("b").as_ref(), &x);
                let path = injected(case, &order, &proto, dir.path());
                let close = |name: String, ours: &Tensor, data_type: DataType| {
                    let theirs = case.get(&name).unwrap_or_else(|| panic!("{what}: no {name}"));
                    let (off, allowed) = (worst(&wide(ours), &wide(&theirs)), tolerance(data_type, &theirs));
                    assert!(off <= allowed, "{what}: {name} is off by {off}, allowed is {allowed}");
                };
                let base_type = case.get("x").expect("x").data_type();
                let inputs = BTreeMap::from([("x".to_string(), x.clone())]);
                close(format!("y.{order}"), &run(&path, &inputs)[0], base_type);
                // PEFT cannot merge r > in; the folded layer then has the injected one's output to give.
                let merged = folded(&path, dir.path());
                let y = run(&merged, &inputs);
                close(format!("y.{order}"), &y[0], base_type);
                if case.get(&format!("y_merged.{order}")).is_some() {
                    close(format!("y_merged.{order}"), &y[0], base_type);
                }
                for (name, ours) in gradients(&path, &x, &load("gy").expect("gy"), &order) {
                    close(name, &ours, base_type);
                }
            }
        }
    });
    assert_eq!(seen, 25);
}

/// The layer with all of a case's adapters, those of `order` active in that order.
fn injected(case: &Case, order: &str, proto: &ModelProto, dir: &Path) -> std::path::PathBuf {
    let path = dir.join("model.onnx");
    std::fs::write(&path, proto.encode_to_vec()).expect("a file");
    for adapter in case.adapters() {
        let model = Model::open(&path).expect("a model");
        import(&model, adapter, false, false).and_then(|i| i.write(&model, &path)).expect("an import");
    }
    let model = Model::open(&path).expect("a model");
    let names: Vec<String> = order.split('+').map(str::to_string).collect();
    write(&model, activate(&model, &names).expect("the order"), &path).expect("a file");
    path
}

fn folded(path: &Path, dir: &Path) -> std::path::PathBuf {
    let merged = dir.join("merged.onnx");
    let model = Model::open(path).expect("a model");
    let options = FoldOptions { safe: true, ..FoldOptions::default() };
    fold(&model, &options).and_then(|f| f.write(&model, &merged)).expect("a fold");
    merged
}

/// Gradients by our own reverse mode, at both optimization levels, under the goldens' names.
fn gradients(path: &Path, x: &Tensor, gy: &Tensor, order: &str) -> Vec<(String, Tensor)> {
    let model = Model::open(path).expect("a model");
    let record = Injection::expect(&model).expect("a record");
    let mut wrt = vec!["x".to_string()];
    let mut names = vec![format!("gx.{order}")];
    for name in order.split('+') {
        wrt.push(record.named(name).expect("an adapter").targets[0].parameter.clone());
        names.push(format!("gB.{order}.{name}"));
    }
    let request = Request { of: vec![("y".into(), Seed::Input)], wrt, ..Default::default() };
    let grad = gradient(&model.proto, &request).expect("a gradient");
    let wanted: Vec<&str> = grad.gradients.iter().map(String::as_str).collect();
    let mut results = Vec::new();
    for optimize in [true, false] {
        let mut session = engine().load(&grad.model, &LoadOptions { threads: Some(1), optimize }).expect("a session");
        let got = session.run(&[("x", x), ("y.seed", gy)], &wanted).expect("gradients");
        results.extend(names.iter().cloned().zip(got));
    }
    results
}

/// The weight in torch's layout.
fn weight(path: &Path, gemm: bool) -> Tensor {
    let model = Model::open(path).expect("a model");
    let name = if gemm { "fc.weight" } else { "onnx::MatMul_1" };
    let tensor = model.graph().initializer.iter().find(|t| t.name() == name).expect("the weight");
    let value = model.tensor(tensor).expect("a value");
    if gemm { value } else { turned(&value) }
}

#[test]
fn every_merge_is_pefts_and_has_its_way_back() {
    let mut merged_cases = 0;
    let counter = std::cell::Cell::new(0);
    each_case(|case| {
        for order in case.orders() {
            for gemm in [true, false] {
                let what = format!("{} {order} {}", case.name, if gemm { "Gemm" } else { "MatMul" });
                let dir = tempfile::tempdir().expect("a directory");
                let (w, x) = (case.get("W").expect("W"), case.get("x").expect("x"));
                let path = injected(case, &order, &layer(gemm, &w, case.get("b").as_ref(), &x), dir.path());
                let merged = folded(&path, dir.path());
                let ours = weight(&merged, gemm);
                assert_eq!(ours.data_type(), w.data_type(), "{what}");
                let is_bat = case.about["init_weights"] == "bat";
                let single = !order.contains('+');
                if let Some(theirs) = case.get(&format!("W_merged.{order}")) {
                    let off = worst(&wide(&ours), &wide(&theirs));
                    if single && !is_bat {
                        assert_eq!(ours, theirs, "{what}: W_merged, bit for bit");
                    } else if w.data_type() == DataType::Float {
                        assert!(off <= 1e-6, "{what}: W_merged is off by {off}");
                    } else {
                        assert!(off <= tolerance(w.data_type(), &theirs), "{what}: W_merged is off by {off}");
                    }
                }
                // And back, by the adapters alone.
                let model = Model::open(&merged).expect("a model");
                let extra: Vec<Adapter> =
                    order.split('+').map(|n| case.adapters().into_iter().find(|a| a.name == n).expect("it")).collect();
                let back = dir.path().join("back.onnx");
                let options = FoldOptions { extra, undo: true, safe: true, ..FoldOptions::default() };
                fold(&model, &options).and_then(|f| f.write(&model, &back)).expect("an unmerge");
                let off = worst(&wide(&weight(&back, gemm)), &wide(&w));
                let allowed =
                    if w.data_type() == DataType::Float { 1e-6 } else { 2.0 * tolerance(w.data_type(), &ours) };
                assert!(off <= allowed, "{what}: unmerged is off by {off}");
                counter.set(counter.get() + 1);
            }
        }
    });
    merged_cases += counter.get();
    assert_eq!(merged_cases, 2 * (23 - 1 + 3 * 4));
}
