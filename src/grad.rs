//! A model and its gradient in one file: the original inputs and outputs, a seed for each output that is
//! differentiated, a gradient for each tensor it is differentiated by.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::Instant;

use prost::Message;
use serde::Serialize;

use crate::autodiff::{Request, Seed, gradient};
use crate::onnx::shape::Shapes;
use crate::onnx::{DataType, Durability, Model, Rope, ValueInfoProto, copy_external, external};
use crate::{Error, Result, did_you_mean};

/// What was derived.
#[derive(Debug, Clone, Serialize)]
pub struct GradSummary {
    /// The seed input of each differentiated output.
    pub seeds: BTreeMap<String, String>,
    /// The output that holds the gradient, by graph input or initializer.
    pub gradients: BTreeMap<String, String>,
    /// Nodes between the two.
    pub differentiated: usize,
    pub nodes_added: usize,
    /// Time to derive the gradient, without reading and writing.
    pub seconds: f64,
}

/// Writes `model` and the gradient of `of` (outputs; empty: all floating-point ones) by `wrt` (graph inputs or
/// initializers, which stay initializers; empty: all floating-point graph inputs) to `out`. Each output gets an input
/// `<output>.seed` of its type and shape, each of `wrt` an output `<name>.grad`. External data is copied beside `out`.
///
/// # Errors
/// Unknown names, names of tensors that are not floating-point, operators without a derivative (all of them), I/O.
pub fn grad(model: &Model, of: &[String], wrt: &[String], out: &Path) -> Result<GradSummary> {
    let started = Instant::now();
    let graph = model.graph();
    let shapes = Shapes::infer(&model.proto, &BTreeMap::new());
    let stored: HashSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
    let element = |name: &str| {
        let tensor = graph.initializer.iter().find(|t| t.name() == name);
        shapes.element(name).or_else(|| DataType::try_from(tensor?.data_type()).ok())
    };
    let float = |name: &str| {
        use DataType::*;
        matches!(element(name), Some(Float | Double | Float16 | Bfloat16))
    };
    let names = |values: &[ValueInfoProto]| values.iter().map(|v| v.name().to_string()).collect::<Vec<_>>();
    let outputs = names(&graph.output);
    let mut inputs = names(&graph.input);
    inputs.retain(|name| !stored.contains(name.as_str()));
    let sources: Vec<String> = inputs.iter().cloned().chain(stored.iter().map(|s| s.to_string())).collect();
    let chosen = |wanted: &[String], all: &[String], default: &[String], flag: &str, kind: &str| {
        if wanted.is_empty() {
            let found: Vec<String> = default.iter().filter(|name| float(name)).cloned().collect();
            return match found.is_empty() {
                true => Err(Error::config(format!("the model has no floating-point {kind}; name others with {flag}"))),
                false => Ok(found),
            };
        }
        let mut found: Vec<String> = Vec::new();
        for name in wanted {
            if !all.contains(name) {
                let near = did_you_mean(name, all.iter().map(String::as_str));
                return Err(Error::config(format!("{flag}: the model has no {kind} {name:?}.{near}")));
            }
            if !float(name) {
                return Err(Error::config(format!(
                    "{flag}: {name} is no floating-point tensor, so it has no gradient"
                )));
            }
            if !found.contains(name) {
                found.push(name.clone());
            }
        }
        Ok(found)
    };
    let of = chosen(of, &outputs, &outputs, "--of", "output")?;
    let wrt = chosen(wrt, &sources, &inputs, "--wrt", "input or initializer")?;

    let request =
        Request { of: of.iter().map(|y| (y.clone(), Seed::Input)).collect(), wrt: wrt.clone(), ..Default::default() };
    let derived = gradient(&model.proto, &request)?;
    let graph_after = derived.model.graph.as_ref();
    let seeds = graph_after.map_or(&[][..], |g| &g.input[graph.input.len()..]).iter().map(|v| v.name().to_string());
    let summary = GradSummary {
        seeds: of.into_iter().zip(seeds).collect(),
        gradients: wrt.into_iter().zip(derived.gradients).collect(),
        differentiated: derived.differentiated,
        nodes_added: graph_after.map_or(0, |g| g.node.len()).saturating_sub(graph.node.len()),
        seconds: started.elapsed().as_secs_f64(),
    };
    copy_external(model, &external::locations(model)?, out, Durability::OnDisk)?;
    let mut rope = Rope::default();
    rope.push(derived.model.encode_to_vec());
    model.write(rope, out)?;
    Ok(summary)
}
