//! PyTorch's gradients: every case of `fixtures/torch` (`make.py` there says how they were made), through ONNX Runtime
//! as the graph stands and optimised.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::{DataType, ModelProto, Tensor};
use prost::Message;
use safetensors::{Dtype, SafeTensors};

use super::harness::load;

/// Of the largest element of a gradient; of a hundredth of the case's largest where that is more, since a gradient that
/// is zero (by the bias of keys under a softmax) has no scale of its own.
const RELATIVE: f64 = 1e-5;

/// A model with inputs, cotangents of its outputs, and the gradients that PyTorch has for them.
pub struct Golden {
    pub name: String,
    pub model: ModelProto,
    pub inputs: BTreeMap<String, Tensor>,
    pub seeds: BTreeMap<String, Tensor>,
    pub gradients: BTreeMap<String, Tensor>,
}

/// The cases whose name, `<family>/<case>`, holds `word`.
pub fn goldens(word: &str) -> Vec<Golden> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/torch"));
    let mut found: BTreeMap<String, Golden> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let family = path.file_stem().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(&path).unwrap();
        for (key, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let (case, part) = key.split_once('/').unwrap();
            let name = format!("{family}/{case}");
            if !name.contains(word) {
                continue;
            }
            let golden = found.entry(name.clone()).or_insert_with(|| Golden {
                name,
                model: ModelProto::default(),
                inputs: BTreeMap::new(),
                seeds: BTreeMap::new(),
                gradients: BTreeMap::new(),
            });
            let element = match view.dtype() {
                Dtype::U8 => {
                    golden.model = ModelProto::decode(view.data()).unwrap();
                    continue;
                }
                Dtype::F32 => DataType::Float,
                Dtype::I64 => DataType::Int64,
                Dtype::BOOL => DataType::Bool,
                other => panic!("{key} holds {other:?}"),
            };
            let tensor = Tensor::from_bytes(element, view.shape(), view.data()).unwrap();
            let (kind, value) = part.split_once('/').unwrap();
            let kind = match kind {
                "in" => &mut golden.inputs,
                "seed" => &mut golden.seeds,
                "grad" => &mut golden.gradients,
                other => panic!("{key}: {other}"),
            };
            kind.insert(value.to_string(), tensor);
        }
    }
    found.into_values().collect()
}

impl Golden {
    /// The gradients that our graph gives, by name.
    pub fn run(&self, optimize: bool) -> Result<BTreeMap<String, Tensor>, String> {
        let derived = gradient(&self.model, &self.request()).map_err(|e| e.to_string())?;
        let before = self.model.graph.as_ref().unwrap().input.len();
        let seeds = derived.model.graph.as_ref().unwrap().input[before..].iter().map(|v| v.name());
        let mut feeds: Vec<(&str, &Tensor)> = self.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        feeds.extend(seeds.zip(self.seeds.values()));
        let names: Vec<&str> = derived.gradients.iter().map(String::as_str).collect();
        let results = load(&derived.model, optimize)?.run(&feeds, &names).map_err(|e| e.to_string())?;
        Ok(self.gradients.keys().cloned().zip(results).collect())
    }

    fn request(&self) -> Request {
        Request {
            of: self.seeds.keys().map(|y| (y.clone(), Seed::Input)).collect(),
            wrt: self.gradients.keys().cloned().collect(),
            ..Default::default()
        }
    }

    /// Where `found` differs from PyTorch.
    pub fn differences(&self, found: &BTreeMap<String, Tensor>) -> Vec<String> {
        let largest = |t: &Tensor| t.to_f64().iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let floor = self.gradients.values().map(largest).fold(0.0, f64::max) / 100.0;
        let mut differences = Vec::new();
        for (name, golden) in &self.gradients {
            let ours = &found[name];
            if ours.dims() != golden.dims() || ours.data_type() != golden.data_type() {
                differences.push(format!("{name} has shape {:?} for {:?}", ours.dims(), golden.dims()));
                continue;
            }
            let pairs = ours.to_f64().into_iter().zip(golden.to_f64());
            let worst = pairs.map(|(a, b)| if a.is_nan() { f64::INFINITY } else { (a - b).abs() }).fold(0.0, f64::max);
            let scale = largest(golden).max(floor);
            if worst > RELATIVE * scale {
                let (a, b) = (ours.to_f64(), golden.to_f64());
                let shown = |v: &[f64]| format!("{:?}", &v[..v.len().min(8)]);
                differences.push(format!(
                    "{name} is off by {worst:.1e} of {scale:.1e}: {} for {}",
                    shown(&a),
                    shown(&b)
                ));
            }
        }
        differences
    }
}

#[test]
fn every_gradient_is_pytorchs() {
    let cases = goldens(&std::env::var("CASE").unwrap_or_default());
    let mut failures = Vec::new();
    for case in &cases {
        for optimize in [false, true] {
            let complaints = case.run(optimize).map_or_else(|e| vec![e], |found| case.differences(&found));
            failures.extend(complaints.into_iter().map(|c| format!("{} [optimize {optimize}]: {c}", case.name)));
        }
    }
    eprintln!("{} cases of PyTorch's", cases.len());
    assert!(!cases.is_empty());
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}

/// Rows of a batch do not see each other in these models: gradients of single rows add up to those of the batch by
/// parameters, and stand side by side by inputs; of no rows they are zeros and empty.
#[test]
fn rows_of_a_batch_add_up_and_none_give_zeros() {
    let models = [
        ("models/conv_net.script", 0, true),
        ("models/encoder.script", 0, false), // its exporter's Reshape has a -1 that no rows leave open
        ("models/decoder_cache.script", 0, true),
        ("models/gru_tagger.script", 1, false), // ONNX Runtime's own GRU ends the process
        ("models/unet.script", 0, false),       // as in the encoder
    ];
    for (word, axis, runs_empty) in models {
        let [golden] = goldens(word).try_into().unwrap_or_else(|_| panic!("one case {word}"));
        let rows = golden.inputs.values().next().unwrap().dims()[axis];
        let cut = |tensors: &BTreeMap<String, Tensor>, rows: std::ops::Range<usize>| {
            tensors.iter().map(|(n, t)| (n.clone(), slice(t, axis, rows.clone()))).collect()
        };
        let part = |rows: std::ops::Range<usize>| Golden {
            name: golden.name.clone(),
            model: golden.model.clone(),
            inputs: cut(&golden.inputs, rows.clone()),
            seeds: golden
                .seeds
                .iter()
                .map(|(n, t)| (n.clone(), if t.dims().is_empty() { t.clone() } else { slice(t, axis, rows.clone()) }))
                .collect(),
            gradients: golden.gradients.clone(),
        };
        for optimize in [false, true] {
            let singles: Vec<BTreeMap<String, Tensor>> = (0..rows)
                .map(|row| part(row..row + 1).run(optimize).unwrap_or_else(|e| panic!("{word}, row {row}: {e}")))
                .collect();
            let mut whole = BTreeMap::new();
            for name in golden.gradients.keys() {
                let parts: Vec<&Tensor> = singles.iter().map(|s| &s[name]).collect();
                let joined = if golden.inputs.contains_key(name) { stack(&parts, axis) } else { add(&parts) };
                whole.insert(name.clone(), joined);
            }
            let differences = golden.differences(&whole);
            assert!(differences.is_empty(), "{word}: {}", differences.join("\n"));

            if !runs_empty {
                continue;
            }
            let none = part(0..0).run(optimize).unwrap_or_else(|e| panic!("{word}, no rows: {e}"));
            for (name, gradient) in &none {
                match golden.inputs.get(name) {
                    Some(input) => assert_eq!(gradient.dims(), slice(input, axis, 0..0).dims(), "{word} {name}"),
                    None => {
                        assert_eq!(gradient.dims(), golden.gradients[name].dims(), "{word} {name}");
                        assert!(gradient.to_f64().iter().all(|v| *v == 0.0), "{word} {name}: {gradient:?}");
                    }
                }
            }
        }
    }
}

fn slice(tensor: &Tensor, axis: usize, rows: std::ops::Range<usize>) -> Tensor {
    let at = |a: &ndarray::ArrayD<f32>| a.slice_axis(ndarray::Axis(axis), rows.clone().into()).to_owned();
    match tensor {
        Tensor::F32(a) => Tensor::F32(at(a)),
        Tensor::I64(a) => Tensor::I64(a.slice_axis(ndarray::Axis(axis), rows.into()).to_owned()),
        Tensor::Bool(a) => Tensor::Bool(a.slice_axis(ndarray::Axis(axis), rows.into()).to_owned()),
        other => panic!("{other:?}"),
    }
}

fn floats(tensor: &Tensor) -> &ndarray::ArrayD<f32> {
    match tensor {
        Tensor::F32(a) => a,
        other => panic!("{other:?}"),
    }
}

fn stack(parts: &[&Tensor], axis: usize) -> Tensor {
    let views: Vec<_> = parts.iter().map(|t| floats(t).view()).collect();
    Tensor::F32(ndarray::concatenate(ndarray::Axis(axis), &views).unwrap())
}

fn add(parts: &[&Tensor]) -> Tensor {
    let first = floats(parts[0]).clone();
    Tensor::F32(parts[1..].iter().fold(first, |sum, t| sum + floats(t)))
}
