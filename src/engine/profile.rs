//! Which execution provider each node ran on, from the profile that ONNX Runtime writes of a session.

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// A node as it was run, with all its runs in a loop together.
#[derive(Debug, Clone, Serialize)]
pub struct NodeRun {
    pub name: String,
    pub op: String,
    /// As ONNX Runtime calls it: `CPUExecutionProvider`, `CUDAExecutionProvider`.
    pub provider: String,
    pub seconds: f64,
    pub runs: usize,
    /// Whether all it computes is a few integers: sizes, shapes, axes. ONNX Runtime runs those on the CPU, where they are
    /// needed.
    pub shape_arithmetic: bool,
}

impl NodeRun {
    /// Whether it runs on the CPU although it computes on data.
    pub fn fell_to_cpu(&self) -> bool {
        self.provider == "CPUExecutionProvider" && !self.shape_arithmetic
    }
}

/// Elements up to which integers are taken for sizes.
const A_FEW: u64 = 64;

/// The nodes of the last of `runs` runs that a profile holds.
///
/// # Errors
/// What is no profile of ONNX Runtime.
pub(super) fn read(text: &str, runs: usize) -> Result<Vec<NodeRun>> {
    let broken = |what: &str| Error::Engine { engine: "onnxruntime", what: format!("its profile {what}") };
    let events: Vec<Value> = serde_json::from_str(text).map_err(|e| broken(&format!("cannot be read: {e}")))?;
    let name = |event: &Value| event["name"].as_str().unwrap_or_default().to_string();
    // A run's nodes come before the event that tells how long all of it took.
    let ends: Vec<usize> = (0..events.len()).filter(|i| name(&events[*i]) == "model_run").collect();
    let last = match ends.len() {
        n if n < runs || n == 0 => return Err(broken("holds no run")),
        1 => 0..ends[0],
        n => ends[n - 2] + 1..ends[n - 1],
    };
    let mut nodes: Vec<NodeRun> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for event in events.get(last).unwrap_or_default() {
        let (name, args) = (name(event), &event["args"]);
        let (Some(name), Some(op)) = (name.strip_suffix("_kernel_time"), args["op_name"].as_str()) else { continue };
        let seconds = event["dur"].as_f64().unwrap_or(0.0) / 1e6;
        let index = args["node_index"].as_str().unwrap_or_default();
        let at = *places.entry((name.to_string(), index.to_string())).or_insert_with(|| {
            nodes.push(NodeRun {
                name: name.into(),
                op: op.into(),
                provider: args["provider"].as_str().unwrap_or("unknown").into(),
                seconds: 0.0,
                runs: 0,
                shape_arithmetic: is_shape_arithmetic(&args["output_type_shape"]),
            });
            nodes.len() - 1
        });
        nodes[at].seconds += seconds;
        nodes[at].runs += 1;
    }
    Ok(nodes)
}

/// Whether all `outputs` (`[{"int64": [2]}, …]`) are a few integers or booleans on at most one axis.
fn is_shape_arithmetic(outputs: &Value) -> bool {
    let few = |dims: &Value| match dims.as_array().map(Vec::as_slice) {
        Some([]) => true,
        Some([n]) => n.as_u64().is_some_and(|n| n <= A_FEW),
        _ => false,
    };
    let outputs = outputs.as_array().map(Vec::as_slice).unwrap_or_default();
    let entries: Vec<(&String, &Value)> = outputs.iter().filter_map(Value::as_object).flatten().collect();
    let is_whole = |kind: &str| kind.starts_with("int") || kind.starts_with("uint") || kind == "bool";
    !entries.is_empty() && entries.iter().all(|(kind, dims)| is_whole(kind) && few(dims))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(name: &str, provider: &str, outputs: Value, dur: u64) -> Value {
        json!({"cat": "Node", "name": format!("{name}_kernel_time"), "dur": dur,
               "args": {"op_name": name, "provider": provider, "node_index": "1", "output_type_shape": outputs}})
    }

    #[test]
    fn nodes_on_the_cpu_are_told_from_the_arithmetic_of_shapes() {
        let (cpu, cuda) = ("CPUExecutionProvider", "CUDAExecutionProvider");
        let run = |dur| {
            vec![
                event("MatMul", cuda, json!([{"float": [2, 3]}]), dur),
                event("Gather", cpu, json!([{"int64": []}]), dur),
                event("Concat", cpu, json!([{"int64": [3]}]), dur),
                event("Cast", cpu, json!([{"int64": [2, 8]}]), dur),
                event("Det", cpu, json!([{"float": []}]), dur),
                event("Det", cpu, json!([{"float": []}]), dur),
                json!({"cat": "Session", "name": "model_run", "dur": 9}),
            ]
        };
        let events: Vec<Value> = run(1_000_000).into_iter().chain(run(2_000)).collect();
        let nodes = read(&Value::from(events).to_string(), 2).unwrap();
        let fallen: Vec<&str> = nodes.iter().filter(|n| n.fell_to_cpu()).map(|n| n.op.as_str()).collect();
        assert_eq!(fallen, ["Cast", "Det"]);
        let det = nodes.last().unwrap();
        assert!((det.runs, det.seconds) == (2, 0.004) && nodes.len() == 5, "{det:?}");
        assert!(read("[]", 1).is_err() && read("{", 1).is_err());
    }
}
