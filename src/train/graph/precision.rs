//! Mixed precision: a float32 model that computes in halves where that is safe, by the rules of torch's autocast.
//!
//! Products are computed in the half type, and what passes their values on or combines them element by element stays in
//! it. Everything else (norms, softmax, sums, powers, the loss) is float32, and so are the adapters, which are cast where
//! they are used: their gradients come back through that cast in float32. Frozen weights of products are halves in the
//! graph that trains; the file keeps its own. Constants out of the range of halves become the largest ones. A node with
//! subgraphs (a branch, a loop) is float32 with all that is in it: what it reads by name from outside is there in float32.

use std::collections::{HashMap, HashSet};

use half::{bf16, f16};

use crate::autodiff::inputs;
use crate::inject::emission::{TILED_GEMM, TILED_MATMUL};
use crate::onnx::shape::Shapes;
use crate::onnx::{AttributeProto, DataType, ModelProto, Names, NodeProto, Tensor, TensorProto, node};
use crate::words::words;
use crate::{Error, Result};

/// What a float32 model computes in while it trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// What the file has.
    #[default]
    F32,
    F16,
    Bf16,
}

// The names of torch and of transformers' flags are understood, too.
words!(Precision, "precision" {
    F32 = "f32" | "float32" | "fp32",
    F16 = "f16" | "float16" | "fp16",
    Bf16 = "bf16" | "bfloat16",
});

impl Precision {
    fn half(self) -> Option<DataType> {
        match self {
            Self::F32 => None,
            Self::F16 => Some(DataType::Float16),
            Self::Bf16 => Some(DataType::Bfloat16),
        }
    }

    /// What is said where an engine does not load a graph in this precision.
    pub(in crate::train) fn explain(self, error: Error, engine: &str) -> Error {
        match (self, error) {
            (Self::F32, error) => error,
            (half, Error::Engine { engine: name, what }) => Error::Engine {
                engine: name,
                what: format!(
                    "{what}. With precision {half} the model needs operators that {engine} may lack: a CPU has few \
                     in float16 and hardly any in bfloat16; use --device cuda, or --precision f32"
                ),
            },
            (_, error) => error,
        }
    }
}

/// Computed in halves whatever comes in.
const PRODUCTS: &[&str] = &["MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", TILED_MATMUL, TILED_GEMM];

/// In halves where all that comes in is, constants aside.
const PASSED_ON: &[&str] = &[
    "Add",
    "Concat",
    "Div",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Mul",
    "Neg",
    "Pad",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Sub",
    "Tanh",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Where",
];

/// Of these, those that ONNX Runtime's CUDA provider has in float16 but not in bfloat16, themselves or in what their
/// gradients are made of (`cuda_execution_provider.cc`: a Slice's gradient is a Pad).
const NOT_IN_BFLOAT16: &[&str] =
    &["Conv", "ConvTranspose", "Einsum", "Gather", "Neg", "Pad", "Slice", "Sub", "Tile", "Where"];

/// Tables of fewer bytes are not worth a second type.
const LARGE_TABLE: usize = 1 << 16;

/// Brings the main graph of `model` to `precision`; its inputs and outputs keep their types, and so do its subgraphs.
///
/// # Errors
/// A constant that cannot be read.
pub(in crate::train) fn lower(model: &mut ModelProto, precision: Precision) -> Result<()> {
    let Some(half) = precision.half() else { return Ok(()) };
    let shapes = Shapes::infer(model, &Default::default());
    let names = Names::of(model);
    let graph = model.graph.as_mut().ok_or_else(|| Error::model("the model holds no graph"))?;
    let is_float = |name: &str| shapes.element(name) == Some(DataType::Float);
    let constants: HashMap<String, usize> =
        graph.initializer.iter().enumerate().map(|(i, t)| (t.name().to_string(), i)).collect();
    let outputs: HashSet<String> = graph.output.iter().map(|o| o.name().to_string()).collect();
    // What is read by its name, as float32.
    let with_graphs = graph.node.iter().filter(|n| n.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty()));
    let named: HashSet<String> = with_graphs.flat_map(inputs).chain(outputs.iter().cloned()).collect();
    let mut pass = Pass {
        half,
        names,
        halves: HashSet::new(),
        both: HashSet::new(),
        casts: HashMap::new(),
        made: Vec::new(),
        nodes: Vec::new(),
    };
    for mut node in std::mem::take(&mut graph.node) {
        if node.is("Constant") {
            pass.nodes.push(node);
            continue;
        }
        let floats: Vec<usize> = (0..node.input.len()).filter(|i| is_float(&node.input[*i])).collect();
        let constant = |name: &String| constants.get(name).map(|i| &graph.initializer[*i]);
        let in_halves = match node.op_type() {
            "Gather" if floats.contains(&0) && constant(&node.input[0]).is_some() => {
                constant(&node.input[0]).is_some_and(|t| t.raw_data.as_ref().is_some_and(|r| r.len() >= LARGE_TABLE))
            }
            op if half == DataType::Bfloat16 && NOT_IN_BFLOAT16.contains(&op) => false,
            op if PRODUCTS.contains(&op) => !floats.is_empty(),
            op if PASSED_ON.contains(&op) && matches!(node.domain(), "" | "ai.onnx") => {
                let mut computed =
                    floats.iter().map(|i| &node.input[*i]).filter(|name| constant(name).is_none()).peekable();
                computed.peek().is_some() && computed.all(|name| pass.halves.contains(name) || pass.both.contains(name))
            }
            _ => false,
        };
        for i in floats {
            let name = node.input[i].clone();
            node.input[i] = match constant(&name) {
                Some(tensor) if in_halves => pass.constant(tensor)?,
                Some(_) => name,
                None => pass.cast(&name, in_halves),
            };
        }
        let mut after = Vec::new();
        for output in node.output.iter_mut().filter(|name| in_halves && is_float(name)) {
            if named.contains(output.as_str()) {
                let inner = pass.names.fresh(&format!("{output}.half"));
                after.push(cast(&inner, output, DataType::Float));
                pass.halves.insert(inner.clone());
                pass.both.insert(output.clone());
                pass.casts.insert(output.clone(), inner.clone());
                *output = inner;
            } else {
                pass.halves.insert(output.clone());
            }
        }
        pass.nodes.push(node);
        pass.nodes.extend(after);
    }
    let Pass { halves, made, nodes, .. } = pass;
    graph.node = nodes;
    graph.initializer.extend(made);
    // What nobody reads any longer in float32 need not be there.
    let read: HashSet<String> = graph.node.iter().flat_map(inputs).collect();
    graph.initializer.retain(|t| read.contains(t.name()) || outputs.contains(t.name()));
    graph.value_info.retain(|v| !halves.contains(v.name()));
    Ok(())
}

struct Pass {
    half: DataType,
    names: Names,
    /// Values that are computed in halves.
    halves: HashSet<String>,
    /// Values that were computed in halves and are there in float32, too, under their own names.
    both: HashSet<String>,
    /// Values in the other type than they are computed in, and constants in halves.
    casts: HashMap<String, String>,
    made: Vec<TensorProto>,
    nodes: Vec<NodeProto>,
}

impl Pass {
    /// The value in the type that is wanted.
    fn cast(&mut self, name: &str, in_halves: bool) -> String {
        if self.halves.contains(name) == in_halves {
            return name.into();
        }
        if let Some(made) = self.casts.get(name) {
            return made.clone();
        }
        let (to, kind) = if in_halves { (self.half, "half") } else { (DataType::Float, "float") };
        let made = self.names.fresh(&format!("{name}.{kind}"));
        self.nodes.push(cast(name, &made, to));
        self.casts.insert(name.into(), made.clone());
        made
    }

    /// A constant in halves.
    fn constant(&mut self, tensor: &TensorProto) -> Result<String> {
        if let Some(made) = self.casts.get(tensor.name()) {
            return Ok(made.clone());
        }
        let value = Tensor::from_proto(tensor)?;
        let floats = value.values::<f32>().unwrap_or_default();
        let made = self.names.fresh(&format!("{}.half", tensor.name()));
        let dims = value.dims();
        let halves = match self.half {
            DataType::Float16 => Tensor::new(dims, floats.iter().map(|v| to_f16(*v)).collect()),
            _ => Tensor::new(dims, floats.iter().map(|v| to_bf16(*v)).collect()),
        };
        self.made.push(halves.to_proto(&made));
        self.casts.insert(tensor.name().into(), made.clone());
        Ok(made)
    }
}

fn cast(from: &str, to: &str, data_type: DataType) -> NodeProto {
    let mut node = node("Cast", &[from], &[to]);
    node.attribute = vec![AttributeProto::int("to", data_type as i64)];
    node
}

/// Rounded to nearest; finite numbers stay finite.
fn to_f16(value: f32) -> f16 {
    if value.is_finite() { f16::from_f32(value.clamp(-65504.0, 65504.0)) } else { f16::from_f32(value) }
}

fn to_bf16(value: f32) -> bf16 {
    let largest = bf16::MAX.to_f32();
    if value.is_finite() { bf16::from_f32(value.clamp(-largest, largest)) } else { bf16::from_f32(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::OperatorSetIdProto;
    use crate::onnx::{GraphProto, value_info};

    fn bytes_of(graph: &GraphProto, data_type: DataType) -> usize {
        let of_type = graph.initializer.iter().filter(|t| t.data_type() == data_type as i32);
        of_type.filter_map(|t| t.raw_data.as_ref()).map(|raw| raw.len()).sum()
    }

    /// x → MatMul → Add(bias) → Softmax → MatMul → y, a table of numbers too large for float16 among it.
    fn model() -> ModelProto {
        let numbers = |dims: &[usize], by: f32| {
            Tensor::new(dims, (0..dims.iter().product()).map(|i: usize| (i % 7) as f32 * by).collect())
        };
        let mut softmax = node("Softmax", &["b"], &["s"]);
        softmax.attribute = vec![AttributeProto::int("axis", -1)];
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![OperatorSetIdProto { domain: None, version: Some(17) }],
            graph: Some(GraphProto {
                name: Some("g".into()),
                node: vec![
                    node("MatMul", &["x", "w"], &["a"]),
                    node("Add", &["a", "bias"], &["b"]),
                    softmax,
                    node("MatMul", &["s", "block"], &["y"]),
                ],
                input: vec![
                    value_info("x", DataType::Float, &["n", "4"]),
                    value_info("block", DataType::Float, &["4", "3"]),
                ],
                output: vec![value_info("y", DataType::Float, &["n", "3"])],
                initializer: vec![numbers(&[4, 4], 0.1).to_proto("w"), numbers(&[4], -1e30).to_proto("bias")],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn products_are_in_halves_and_a_softmax_is_not() {
        let mut model = model();
        lower(&mut model, Precision::F16).unwrap();
        let shapes = Shapes::infer(&model, &Default::default());
        let graph = model.graph.unwrap();
        assert_eq!(["a", "b"].map(|v| shapes.element(v).unwrap()), [DataType::Float16; 2]);
        assert_eq!(["s", "y", "x", "block"].map(|v| shapes.element(v).unwrap()), [DataType::Float; 4]);
        assert_eq!((bytes_of(&graph, DataType::Float), bytes_of(&graph, DataType::Float16)), (0, 2 * (16 + 4)));
        let casts = graph.node.iter().filter(|n| n.is("Cast")).count();
        // x, the softmax's input and output, the block, the output.
        assert_eq!(casts, 5);
        let bias = graph.initializer.iter().find(|t| t.name() == "bias.half").unwrap();
        assert!(Tensor::from_proto(bias).unwrap().to_f64().iter().all(|v| v.is_finite()));
    }

    #[test]
    fn branches_are_float32_and_find_what_they_read_from_outside() {
        let mut model = model();
        let graph = model.graph.as_mut().unwrap();
        // y = If(c) { b × w } else { b }, a product of b beside it, and one of y behind it.
        let branch = |node| GraphProto {
            name: Some("branch".into()),
            node: vec![node],
            output: vec![value_info("r", DataType::Float, &["n", "4"])],
            ..Default::default()
        };
        let mut choice = node("If", &["c"], &["chosen"]);
        choice.attribute = vec![
            AttributeProto::graph("then_branch", branch(node("MatMul", &["b", "w"], &["r"]))),
            AttributeProto::graph("else_branch", branch(node("Identity", &["b"], &["r"]))),
        ];
        graph.node.splice(
            2..,
            [
                choice,
                node("Relu", &["b"], &["beside"]),
                node("Add", &["beside", "chosen"], &["sum"]),
                node("MatMul", &["sum", "block"], &["y"]),
            ],
        );
        graph.input.push(value_info("c", DataType::Bool, &[]));
        lower(&mut model, Precision::F16).unwrap();
        let shapes = Shapes::infer(&model, &Default::default());
        assert_eq!(["b.half", "beside"].map(|v| shapes.element(v).unwrap()), [DataType::Float16; 2]);
        assert_eq!(["b", "chosen", "sum", "y"].map(|v| shapes.element(v).unwrap()), [DataType::Float; 4]);
        // The weight is there in both types: a product of the main graph reads it, and one in the branch.
        let graph = model.graph.unwrap();
        assert_eq!(["w", "w.half"].map(|w| graph.initializer.iter().any(|t| t.name() == w)), [true; 2]);
        let choice = graph.node.iter().find(|n| n.is("If")).unwrap();
        assert_eq!(inputs(choice), ["c", "b", "w"]);
        // x, b for the branches, beside for the sum, which is cast, and the block; then y.
        assert_eq!(graph.node.iter().filter(|n| n.is("Cast")).count(), 6);
    }
}
