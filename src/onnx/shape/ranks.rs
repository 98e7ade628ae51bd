//! Ranks that follow from the use of a value: where inference finds none (an If that squeezes an axis or does not), a
//! Conv or a recurrent operator further on says what it has to be in every run that gets there.

use std::collections::HashMap;

use super::{Dim, GraphProto, NodeProto, Shapes};

/// Operators whose output has the shape of their first input.
const ALIKE: &[&str] =
    &["Cast", "Clip", "Dropout", "Elu", "Identity", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Softmax", "Tanh"];

/// Ranks of the values that nodes of `graph` give, where `shapes` has none and other nodes of it need one.
pub(super) fn required(shapes: &Shapes, graph: &GraphProto) -> HashMap<String, usize> {
    let mut found: HashMap<String, usize> = HashMap::new();
    for node in graph.node.iter().rev() {
        let inputs: Vec<(usize, usize)> = needs(shapes, &found, node).unwrap_or_default();
        for (i, rank) in inputs {
            if let Some(name) = node.input_at(i).filter(|name| shapes.rank(name).is_none()) {
                found.entry(name.to_string()).or_insert(rank);
            }
        }
    }
    found.retain(|name, _| graph.node.iter().any(|node| node.output.contains(name)));
    found
}

/// Ranks that inputs of `node` must have.
fn needs(shapes: &Shapes, found: &HashMap<String, usize>, node: &NodeProto) -> Option<Vec<(usize, usize)>> {
    let rank = |name: Option<&str>| name.and_then(|name| shapes.rank(name).or_else(|| found.get(name).copied()));
    let axes = || match (node.attr_ints("axes"), shapes.dims(node.input_at(1)?)) {
        (Some(axes), _) => Some(axes.len()),
        (None, Some([Dim::Known(count)])) => usize::try_from(*count).ok(),
        _ => None,
    };
    let output = || rank(node.output_at(0));
    Some(match node.op_type() {
        _ if !matches!(node.domain(), "" | "ai.onnx") => return None,
        "Conv" | "ConvTranspose" => vec![(0, rank(node.input_at(1))?)],
        "GRU" | "LSTM" | "RNN" => vec![(0, 3), (5, 3), (6, 3)],
        "Gemm" => vec![(0, 2), (1, 2)],
        "Unsqueeze" => vec![(0, output()?.checked_sub(axes()?)?)],
        "Squeeze" => vec![(0, output()? + axes()?)],
        "Transpose" => vec![(0, node.attr_ints("perm")?.len())],
        // A matrix broadcasts to a batch of them, so the batch is the other operand's.
        "MatMul" => match (rank(node.input_at(0)), rank(node.input_at(1)), output()?) {
            (None, Some(b @ 2..), all) if b < all => vec![(0, all)],
            (Some(a @ 2..), None, all) if a < all => vec![(1, all)],
            _ => return None,
        },
        "Concat" => {
            let one = node.input.iter().find_map(|x| rank(Some(x))).or_else(output)?;
            (0..node.input.len()).map(|i| (i, one)).collect()
        }
        op if ALIKE.contains(&op) => vec![(0, output()?)],
        _ => return None,
    })
}
