//! Reverse-mode differentiation, ONNX → ONNX.
//!
//! [`gradient`] walks the graph backwards from a result to the parameters that training changes, and only along the
//! nodes between them. Each operator has a row in a table ([`Rules`]): its vector-Jacobian product, the reason why its
//! derivative is zero, or the reason why it is refused. The result is an ordinary model on standard operators; shapes
//! that are not known when it is made are computed in the graph, so a dynamic batch stays dynamic.
//!
//! | file | what lives there |
//! |---|---|
//! | `reverse` | the walk |
//! | `recognise` | functions written as several nodes, seen as one |
//! | `sequences` | sequences of fixed structure, seen as the tensors in them |
//! | `emit` | the builder: names, constants, one node where two would be equal |
//! | `vjp` | what a rule sees |
//! | `lower` | the adjoint of an operator by its definition in simpler ones |
//! | `left_out` | zero times infinity where a `Where` chooses |
//! | `unbroadcast` | the transpose of broadcasting |
//! | `rules` | the table, one file per family of operators |
//!
//! # A rule of your own
//!
//! An operator of a custom domain, or one whose rule here does not suit, gets a row in a table of the caller's
//! ([`Rules::with`]), which [`gradient_with`] takes. A rule is a function from what is known of the node ([`Vjp`]: its
//! inputs, outputs, attributes, shapes and the adjoints of its outputs) to the adjoints of its inputs. It emits nodes
//! by the methods of [`Emitter`], one per operator, so that it reads like its formula; [`Vjp::through`] derives it from
//! a definition of the operator in others. Here y = x·w for a `com.example.Scale` with the shapes of x and y equal and
//! w a scalar, and a `com.example.Bucket` that is a step function:
//!
//! ```
//! use bone_onnx::autodiff::{Request, Rule, Rules, Seed, gradient, gradient_with};
//! use bone_onnx::onnx::proto::OperatorSetIdProto;
//! use bone_onnx::onnx::{DataType, GraphProto, ModelProto, NodeProto, node, value_info};
//!
//! let rules = Rules::standard()
//!     .with("com.example", "Scale", Rule::vjp(|v| {
//!         let (x, w, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
//!         Ok(vec![Some(v.mul(dy, w)), v.wants(1).then(|| v.sum_all(v.mul(dy, x)))])
//!     }))
//!     .with("com.example", "Bucket", Rule::Zero("is a step function"));
//!
//! # let import = |domain: &str, version| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) };
//! let scale = NodeProto { domain: Some("com.example".into()), ..node("Scale", &["x", "w"], &["y"]) };
//! let model = ModelProto {
//!     opset_import: vec![import("", 17), import("com.example", 1)],
//!     graph: Some(GraphProto {
//!         input: vec![value_info("x", DataType::Float, &["n", "8"]), value_info("w", DataType::Float, &[])],
//!         output: vec![value_info("y", DataType::Float, &["n", "8"])],
//!         node: vec![scale],
//!         ..Default::default()
//!     }),
//!     ..Default::default()
//! };
//! let request =
//!     Request { of: vec![("y".into(), Seed::Input)], wrt: vec!["x".into(), "w".into()], ..Default::default() };
//!
//! let refused = gradient(&model, &request).unwrap_err().to_string();
//! assert!(refused.contains("com.example.Scale (there is no rule for it)"));
//! let derived = gradient_with(&model, &request, &rules)?;
//! assert_eq!(derived.gradients, ["x.grad", "w.grad"]);
//! # Ok::<(), bone_onnx::Error>(())
//! ```
//!
//! The engine that runs the result still has to know the custom operator, for the forward pass is in it.

mod emit;
mod left_out;
mod lower;
mod recognise;
mod reverse;
mod rules;
mod sequences;
mod unbroadcast;
mod vjp;

use std::collections::{BTreeMap, HashSet};

pub use emit::Emitter;
pub use rules::{Rule, Rules};
pub use vjp::{Adjoints, Vjp};

use crate::onnx::functions;
use crate::onnx::shape::Shapes;
use crate::onnx::upgrade::upgrade;
use crate::onnx::{DataType, GraphProto, ModelProto, NodeProto, ValueInfoProto, value_info};
use crate::{Error, Result, did_you_mean};
use recognise::recognise;
pub(crate) use reverse::inputs;
use reverse::{Path, Scope};
use vjp::{Constants, known};

/// The operator set that older models are lifted to: the first with all that rules emit and LayerNormalization.
const OPSET: i64 = 17;

/// What to differentiate.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Values to differentiate, each with its seed.
    pub of: Vec<(String, Seed)>,
    /// Graph inputs, initializers or other values of the main graph to differentiate by.
    pub wrt: Vec<String>,
    /// Concrete shapes of graph inputs, where the caller knows them: the gradient graph gets smaller by it.
    pub input_dims: BTreeMap<String, Vec<i64>>,
}

/// The adjoint that differentiation starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seed {
    /// Ones (for a scalar loss).
    One,
    /// A new graph input `<value>.seed` of the value's type and shape.
    Input,
}

/// A model that computes what the original did and the gradients asked for.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// Original inputs (and seeds); original outputs first, then the gradients.
    pub model: ModelProto,
    /// Output name of the gradient for each name in [`Request::wrt`], in that order.
    pub gradients: Vec<String>,
    /// How many of the model's nodes lie on the way and were differentiated.
    pub differentiated: usize,
}

/// Extends `model` (tensors may be external) by the gradient of `request.of` with respect to `request.wrt`, with the
/// standard rules. The operator set is lifted to 17 where it is older.
///
/// # Errors
/// Names every operator on the way that has no rule, with its nodes, before any work is done.
pub fn gradient(model: &ModelProto, request: &Request) -> Result<Gradient> {
    gradient_with(model, request, &Rules::standard())
}

/// [`gradient`] with a table of rules of the caller's.
///
/// # Errors
/// As [`gradient`].
pub fn gradient_with(model: &ModelProto, request: &Request, rules: &Rules) -> Result<Gradient> {
    let mut model = model.clone();
    functions::write_out(&mut model)?;
    upgrade(&mut model, OPSET)?;
    let shapes = Shapes::infer(&model, &request.input_dims);
    let emitter = Emitter::new(&model);
    let graph = model.graph.as_mut().ok_or_else(|| Error::model("the model holds no graph"))?;
    check_names(graph, request)?;

    let mut constants = Constants::new();
    let open: HashSet<&str> =
        graph.input.iter().map(|v| v.name()).chain(request.wrt.iter().map(String::as_str)).collect();
    reverse::add_constants(&mut constants, graph, &open);
    let mut visible: HashSet<String> = graph.output.iter().map(|v| v.name().to_string()).collect();
    visible.extend(request.of.iter().map(|(value, _)| value).chain(&request.wrt).cloned());
    let nodes = recognise(&graph.node, &constants, &visible);
    let nodes = sequences::unpack(nodes, &shapes, &constants, &emitter);
    let scope = Scope { nodes: &nodes, shapes: &shapes, constants: &constants, rules, opset: emitter.opset };
    let of: Vec<String> = request.of.iter().map(|(value, _)| value.clone()).collect();
    let path = Path::find(scope, &of, &request.wrt)?;
    if !path.obstacles.is_empty() {
        return Err(refusal(&path, request));
    }

    let mut new_inputs = Vec::new();
    let mut seeds = Vec::new();
    for (value, seed) in &request.of {
        seeds.push((value.clone(), plant(value, *seed, &shapes, &emitter, &mut new_inputs)?));
    }
    let adjoints = path.reverse(scope, &emitter, seeds, &request.wrt)?;

    let mut gradients = Vec::new();
    let mut new_outputs = Vec::new();
    for (wrt, adjoint) in request.wrt.iter().zip(adjoints) {
        let name = emitter.fresh(&format!("{wrt}.grad"));
        let element = element_of(wrt, graph, &shapes).unwrap_or(DataType::Float);
        let adjoint = match adjoint {
            Some(adjoint) => adjoint,
            None => {
                let zero = emitter
                    .float(0.0, element)
                    .ok_or_else(|| Error::model(format!("{wrt} is no floating-point tensor, so it has no gradient")))?;
                emitter.expand(zero, emitter.shape(wrt))
            }
        };
        emitter.named("Identity", &adjoint, &name);
        new_outputs.push(declare(&name, element, wrt, &shapes));
        gradients.push(name);
    }

    emitter.amend(&mut graph.node);
    let (nodes, constants) = emitter.finish();
    let live = new_outputs.iter().map(|v| v.name().to_string()).collect();
    graph.node.extend(used(nodes, live));
    let needed: HashSet<&str> = used_names(&graph.node);
    graph.initializer.extend(constants.into_iter().filter(|t| needed.contains(t.name())));
    graph.input.extend(new_inputs);
    graph.output.extend(new_outputs);
    Ok(Gradient { model, gradients, differentiated: path.len() })
}

/// Every name in the request is a value of the main graph.
fn check_names(graph: &GraphProto, request: &Request) -> Result<()> {
    let mut values: Vec<&str> = graph.input.iter().map(|v| v.name()).collect();
    values.extend(graph.initializer.iter().map(|t| t.name()));
    values.extend(graph.node.iter().flat_map(|n| n.output.iter().map(String::as_str)));
    let all: HashSet<&str> = values.iter().copied().filter(|v| !v.is_empty()).collect();
    for name in request.of.iter().map(|(value, _)| value).chain(&request.wrt) {
        if !all.contains(name.as_str()) {
            let near = did_you_mean(name, values);
            return Err(Error::config(format!("the model's main graph has no value {name:?}.{near}")));
        }
    }
    Ok(())
}

/// The adjoint that the walk starts from at `value`.
fn plant(
    value: &str,
    seed: Seed,
    shapes: &Shapes,
    emitter: &Emitter,
    inputs: &mut Vec<ValueInfoProto>,
) -> Result<String> {
    let element = shapes.element(value).unwrap_or(DataType::Float);
    match seed {
        Seed::Input => {
            let name = emitter.fresh(&format!("{value}.seed"));
            inputs.push(declare(&name, element, value, shapes));
            Ok(name)
        }
        Seed::One => {
            let one = emitter.float(1.0, element).ok_or_else(|| {
                Error::model(format!("{value} is no floating-point tensor, so it cannot be differentiated"))
            })?;
            Ok(match shapes.rank(value) {
                Some(0) => one,
                _ => emitter.expand(one, emitter.shape(value)),
            })
        }
    }
}

/// Declares `name` with the shape of `like`, as far as it is known.
fn declare(name: &str, element: DataType, like: &str, shapes: &Shapes) -> ValueInfoProto {
    match shapes.dims(like) {
        Some(dims) => {
            let dims: Vec<String> = dims.iter().map(|d| known(d).map(|n| n.to_string()).unwrap_or_default()).collect();
            value_info(name, element, &dims.iter().map(String::as_str).collect::<Vec<_>>())
        }
        None => {
            let mut info = value_info(name, element, &[]);
            if let Some(crate::onnx::proto::type_proto::Value::TensorType(tensor)) =
                info.r#type.as_mut().and_then(|t| t.value.as_mut())
            {
                tensor.shape = None;
            }
            info
        }
    }
}

/// Element type of a value, from what was inferred or from the initializer itself.
fn element_of(value: &str, graph: &GraphProto, shapes: &Shapes) -> Option<DataType> {
    let stored = || graph.initializer.iter().find(|t| t.name() == value).map(|t| t.data_type());
    shapes.element(value).or_else(|| DataType::try_from(stored()?).ok())
}

/// The nodes that `live` values need, in order.
pub(crate) fn used(nodes: Vec<NodeProto>, mut live: HashSet<String>) -> Vec<NodeProto> {
    let mut kept: Vec<NodeProto> = Vec::with_capacity(nodes.len());
    for node in nodes.into_iter().rev() {
        if node.output.iter().any(|y| live.contains(y)) {
            live.extend(reverse::inputs(&node));
            kept.push(node);
        }
    }
    kept.reverse();
    kept
}

/// Names that `nodes` or their subgraphs mention as inputs.
fn used_names(nodes: &[NodeProto]) -> HashSet<&str> {
    let mut names: HashSet<&str> = HashSet::new();
    for node in nodes {
        names.extend(node.input.iter().map(String::as_str));
        for graph in node.attribute.iter().filter_map(|a| a.g.as_ref()) {
            names.extend(used_names(&graph.node));
            names.extend(graph.output.iter().map(|v| v.name()));
        }
    }
    names
}

/// The error that names everything in the way at once.
fn refusal(path: &Path, request: &Request) -> Error {
    const SHOWN: usize = 5;
    let list = |names: &[String]| match names.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!("{} and {more} more", names[..SHOWN].join(", ")),
        _ => names.join(", "),
    };
    let mut text = format!("{} operators on the way to the trained tensors have no derivative:", path.obstacles.len());
    if path.obstacles.len() == 1 {
        text = "an operator on the way to the trained tensors has no derivative:".into();
    }
    for ((op, why), nodes) in &path.obstacles {
        text += &format!("\n  {op} ({why}) at {}", list(nodes));
    }
    let blocked: Vec<String> = path.blocked.iter().cloned().collect();
    let free = request.wrt.iter().filter(|w| !path.blocked.contains(*w)).count();
    text += &match free {
        0 => "\nEvery tensor to train lies before one of them; train tensors that come after them instead.".to_string(),
        _ => format!("\nFreezing these {} avoids them ({free} stay trainable): {}", blocked.len(), list(&blocked)),
    };
    Error::model(text)
}
