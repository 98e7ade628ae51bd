//! Whole models: the gradient of ⟨seed, first output⟩ by every weight, against differences.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bone_onnx::autodiff::{Request, Rule, Rules, Seed, gradient_with};
use bone_onnx::onnx::proto::type_proto::Value;
use bone_onnx::onnx::{
    AttributeProto, DataType, GraphProto, Model, ModelProto, NodeProto, Tensor, TensorProto, node, value_info,
};
use prost::Message;

use super::harness::{Random, Tolerance, compare};

fn shared() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared"))
}

/// The reference inputs of a model.
fn reference_inputs(refs: &str) -> BTreeMap<String, Tensor> {
    let mut feeds = BTreeMap::new();
    for entry in std::fs::read_dir(shared().join("models/refs").join(refs)).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if let Some(name) = name.strip_prefix("in.").and_then(|n| n.strip_suffix(".pb")) {
            let proto = TensorProto::decode(std::fs::read(&path).unwrap().as_slice()).unwrap();
            feeds.insert(name.to_string(), Tensor::from_proto(&proto).unwrap());
        }
    }
    feeds
}

/// Made-up inputs of the merged T5 decoder.
fn t5_inputs(model: &ModelProto, use_cache: bool) -> BTreeMap<String, Tensor> {
    let mut random = Random(21);
    let mut ids = |dims: &[usize]| {
        let n = dims.iter().product();
        Tensor::new(dims, (0..n).map(|_| (random.bits() % 90) as i64).collect())
    };
    let mut feeds = BTreeMap::new();
    let (batch, encoder, past) = (2, 3, 2);
    for input in &model.graph.as_ref().unwrap().input {
        let name = input.name();
        let tensor = match name {
            "encoder_attention_mask" => Tensor::new(&[batch, encoder], vec![1i64, 1, 1, 1, 1, 0]),
            "input_ids" => ids(&[batch, if use_cache { 1 } else { 4 }]),
            "encoder_hidden_states" => {
                let values = Random(5).values(batch * encoder * 32, -1.0, 1.0);
                Tensor::new(&[batch, encoder, 32], values.iter().map(|v| *v as f32).collect())
            }
            "use_cache_branch" => Tensor::Bool(ndarray::ArrayD::from_elem(ndarray::IxDyn(&[1]), use_cache)),
            _ if name.starts_with("past_key_values") => {
                let length = if name.contains("encoder") { encoder } else { past };
                let values = Random(name.len() as u64).values(batch * 4 * length * 8, -1.0, 1.0);
                Tensor::new(&[batch, 4, length, 8], values.iter().map(|v| *v as f32).collect())
            }
            _ => continue,
        };
        feeds.insert(name.to_string(), tensor);
    }
    feeds
}

/// What ONNX Runtime computes in single precision only.
const SINGLE: &[&str] =
    &["AveragePool", "Conv", "ConvTranspose", "GRU", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "LSTM"];

/// The model in double precision: differences of a deep f32 model drown in rounding. What has no kernel in double
/// precision stays in single precision between casts.
pub fn widen(model: &mut ModelProto) {
    fn tensor(t: &mut TensorProto) {
        if t.data_type() == DataType::Float as i32 {
            let wide = Tensor::from_proto(t).unwrap();
            *t = Tensor::new(wide.dims(), wide.to_f64()).to_proto(t.name());
        }
    }
    fn cast(from: &str, to: &str, element: DataType) -> NodeProto {
        NodeProto { attribute: vec![AttributeProto::int("to", element as i64)], ..node("Cast", &[from], &[to]) }
    }
    fn graph(g: &mut GraphProto) {
        g.initializer.iter_mut().for_each(tensor);
        g.value_info.clear();
        for info in g.input.iter_mut().chain(&mut g.output) {
            if let Some(Value::TensorType(t)) = info.r#type.as_mut().and_then(|t| t.value.as_mut())
                && t.elem_type() == DataType::Float as i32
            {
                t.elem_type = Some(DataType::Double as i32);
            }
        }
        for mut inner in std::mem::take(&mut g.node) {
            if SINGLE.iter().any(|op| inner.is(op)) {
                let (mut before, mut after) = (Vec::new(), Vec::new());
                let stem = inner.output.iter().find(|y| !y.is_empty()).cloned().unwrap_or_default();
                // The fifth input of the recurrent ones holds lengths.
                for (i, input) in inner.input.iter_mut().enumerate().filter(|(i, x)| *i != 4 && !x.is_empty()) {
                    let narrow = format!("{stem}.{i}.narrow");
                    before.push(cast(input, &narrow, DataType::Float));
                    *input = narrow;
                }
                for output in inner.output.iter_mut().filter(|y| !y.is_empty()) {
                    let narrow = format!("{output}.narrow");
                    after.push(cast(&narrow, output, DataType::Double));
                    *output = narrow;
                }
                g.node.extend(before.into_iter().chain([inner]).chain(after));
                continue;
            }
            // ONNX Runtime has no Erf in double precision; in its place any function that bends as much will do.
            if inner.is("Erf") {
                inner.op_type = Some("Tanh".into());
            }
            let is_cast = inner.is("Cast");
            for attribute in &mut inner.attribute {
                attribute.t.iter_mut().for_each(tensor);
                attribute.g.iter_mut().for_each(graph);
                if is_cast && attribute.name() == "to" && attribute.i == Some(DataType::Float as i64) {
                    attribute.i = Some(DataType::Double as i64);
                }
            }
            g.node.push(inner);
        }
    }
    graph(model.graph.as_mut().unwrap());
}

/// Checks `file`: gradients by each float initializer of `min_rank` axes or more whose way is free.
fn check(file: &str, feeds: impl Fn(&ModelProto) -> BTreeMap<String, Tensor>, of: &str) -> Vec<String> {
    let mut model = Model::open(shared().join("models").join(file)).unwrap().to_inline().unwrap();
    let mut feeds = feeds(&model);
    let single = model.opset_import.iter().any(|o| o.domain() == "com.microsoft");
    if !single {
        widen(&mut model);
        for tensor in feeds.values_mut().filter(|t| t.data_type() == DataType::Float) {
            *tensor = Tensor::new(tensor.dims(), tensor.to_f64());
        }
    }
    let (element, tolerance) = match single {
        true => (DataType::Float, Tolerance::MODEL_SINGLE),
        false => (DataType::Double, Tolerance::MODEL_DOUBLE),
    };
    let graph = model.graph.as_mut().unwrap();
    let mut wrt = Vec::new();
    let narrowed: Vec<String> = graph
        .node
        .iter()
        .filter(|n| n.output[0].ends_with(".narrow") && n.is("Cast"))
        .flat_map(|n| n.input.clone())
        .collect();
    for tensor in graph.initializer.iter().filter(|t| !narrowed.iter().any(|n| n == t.name())) {
        if tensor.data_type() == element as i32 && !tensor.dims.is_empty() {
            let dims: Vec<String> = tensor.dims.iter().map(i64::to_string).collect();
            let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
            if !graph.input.iter().any(|i| i.name() == tensor.name()) {
                graph.input.push(value_info(tensor.name(), element, &dims));
            }
            feeds.insert(tensor.name().to_string(), Tensor::from_proto(tensor).unwrap());
            wrt.push(tensor.name().to_string());
        }
    }
    let mut failures = Vec::new();
    for optimize in [false, true] {
        if let Err(e) = compare(&model, &[of.to_string()], &wrt, &feeds, optimize, tolerance) {
            failures.push(format!("{file} [optimize {optimize}]: {e}"));
        }
    }
    failures
}

#[test]
fn whole_models_agree_with_differences() {
    let models = [
        ("mlp2d.ts17.onnx", "mlp2d"),
        ("mlp2d.dyn23.onnx", "mlp2d"),
        ("mlp3d.dyn18.onnx", "mlp3d"),
        ("bert.ts17.onnx", "bert"),
        ("bert.ts11.onnx", "bert"),
        ("bert.dyn18.onnx", "bert"),
        ("bert_ext.dyn18.onnx", "bert"),
        ("bert_nofold.ts17.onnx", "bert"),
        ("bert_zero.ts17.onnx", "bert_zero"),
        ("gpt2.ts17.onnx", "gpt2"),
        ("llama.ts17.onnx", "llama"),
        ("llama.dyn18.onnx", "llama"),
        ("llama.dyn18.ort_ext.onnx", "llama"),
        ("qwen2_tied_nofold.ts17.onnx", "qwen2_tied"),
        ("vit.ts17.onnx", "vit"),
    ];
    let filter = std::env::var("MODEL").unwrap_or_default();
    let mut failures = Vec::new();
    for (file, refs) in models.iter().filter(|(file, _)| file.contains(&filter)) {
        let model = Model::open(shared().join("models").join(file)).unwrap();
        let of = model.graph().output[0].name().to_string();
        failures.extend(check(file, |_| reference_inputs(refs), &of));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn conditionals_agree_with_differences() {
    let mut failures = Vec::new();
    for use_cache in [false, true] {
        failures.extend(check("t5_decoder_merged.optimum18.onnx", |m| t5_inputs(m, use_cache), "logits"));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Two operators without a rule: the message names both with their nodes and what to freeze, and freezing that helps.
#[test]
fn refusals_name_everything_in_the_way() {
    let model = Model::open(shared().join("models/bert.ts17.onnx")).unwrap();
    let rules =
        Rules::standard().with("", "Softmax", Rule::Refused("is on trial")).with("", "Tanh", Rule::Refused("too"));
    let of = vec![(model.graph().output[0].name().to_string(), Seed::Input)];
    let graph = model.graph();
    let wrt: Vec<String> =
        graph.initializer.iter().filter(|t| t.dims.len() == 2).map(|t| t.name().to_string()).collect();
    let request = |wrt: &[String]| Request { of: of.clone(), wrt: wrt.to_vec(), input_dims: BTreeMap::new() };
    let error = gradient_with(&model.proto, &request(&wrt), &rules).unwrap_err().to_string();
    for layer in 0..2 {
        let softmax = format!("/bert/encoder/layer.{layer}/attention/self/Softmax");
        assert!(error.contains(&softmax), "{error}");
    }
    assert!(error.contains("Softmax (is on trial)") && error.contains("Tanh (too)"), "{error}");
    assert!(error.contains("Freezing these"), "{error}");
    let after: Vec<String> = wrt.iter().filter(|w| w.starts_with("classifier")).cloned().collect();
    assert!(!after.is_empty());
    gradient_with(&model.proto, &request(&after), &rules).unwrap();
}

/// Rounding on the way is an error, not a gradient of zero.
#[test]
fn quantization_is_refused() {
    let model = Model::open(shared().join("models/bert.ts17.qdq.onnx")).unwrap();
    let of = vec![(model.graph().output[0].name().to_string(), Seed::Input)];
    let floats = model.graph().initializer.iter().filter(|t| t.data_type() == DataType::Float as i32);
    let wrt = floats.map(|t| t.name().to_string()).collect();
    let error =
        gradient_with(&model.proto, &Request { of, wrt, ..Default::default() }, &Rules::standard()).unwrap_err();
    assert!(error.to_string().contains("\n  QuantizeLinear (rounds to a grid"), "{error}");
}
