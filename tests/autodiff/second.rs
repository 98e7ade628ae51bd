//! Second derivatives: the gradient graph is itself differentiated, and ⟨v, ∇⟩ compared with differences of ∇.

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::{DataType, Tensor, value_info};

use super::harness::{Tolerance, compare};
use super::torch::goldens;
use super::whole::widen;

/// By inputs and parameters of a golden model in double precision.
fn check(word: &str, tolerance: Tolerance) {
    let [golden] = goldens(word).try_into().unwrap_or_else(|_| panic!("one case {word}"));
    let mut model = golden.model;
    widen(&mut model);
    let wide =
        |t: &Tensor| if t.data_type() == DataType::Float { Tensor::new(t.dims(), t.to_f64()) } else { t.clone() };
    let graph = model.graph.as_mut().unwrap();
    let mut feeds = std::collections::BTreeMap::new();
    for tensor in graph.initializer.iter().filter(|t| golden.gradients.contains_key(t.name())) {
        let dims: Vec<String> = tensor.dims.iter().map(i64::to_string).collect();
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        graph.input.push(value_info(tensor.name(), DataType::Double, &dims));
        feeds.insert(tensor.name().to_string(), Tensor::from_proto(tensor).unwrap());
    }
    feeds.extend(golden.inputs.iter().map(|(n, t)| (n.clone(), wide(t))));
    feeds.extend(golden.seeds.iter().map(|(n, t)| (format!("{n}.seed"), wide(t))));
    let wrt: Vec<String> = golden.gradients.keys().cloned().collect();
    let of = golden.seeds.keys().map(|y| (y.clone(), Seed::Input)).collect();
    let first = gradient(&model, &Request { of, wrt: wrt.clone(), ..Default::default() }).unwrap();
    for optimize in [false, true] {
        compare(&first.model, &first.gradients, &wrt, &feeds, optimize, tolerance)
            .unwrap_or_else(|e| panic!("{word} [optimize {optimize}]: {e}"));
    }
}

#[test]
fn mlp_of_tanh_and_gelu() {
    check("smooth/mlp", Tolerance::DOUBLE);
}

#[test]
fn encoder_block_of_layer_norm_and_softmax() {
    check("smooth/encoder_block", Tolerance { step: 1e-3, relative: 1e-6 });
}

/// Convolutions compute in single precision inside, which is all that ONNX Runtime has.
#[test]
fn conv_net() {
    check("smooth/conv", Tolerance { step: 5e-2, relative: 2e-4 });
}
