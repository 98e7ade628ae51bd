//! The gradient graph itself: the same bytes each time, nothing in it that nobody asked for, nothing twice.

use std::collections::{HashMap, HashSet};

use bone_onnx::autodiff::{Gradient, Request, Seed, gradient};
use bone_onnx::onnx::NodeProto;
use prost::Message;

use super::torch::{Golden, goldens};

fn derive(golden: &Golden, wrt: Vec<String>) -> Gradient {
    let of = golden.seeds.keys().map(|y| (y.clone(), Seed::Input)).collect();
    gradient(&golden.model, &Request { of, wrt, ..Default::default() })
        .unwrap_or_else(|e| panic!("{}: {e}", golden.name))
}

/// The forward nodes of a derived model (an upgraded operator set may have changed them), and those added.
fn parts(golden: &Golden, derived: &Gradient) -> (Vec<NodeProto>, Vec<NodeProto>) {
    let kept = derive(golden, vec![]).model.graph.unwrap().node.len();
    let mut forward = derived.model.graph.clone().unwrap().node;
    let added = forward.split_off(kept);
    (forward, added)
}

fn all(golden: &Golden) -> Vec<String> {
    golden.gradients.keys().cloned().collect()
}

fn count(nodes: &[NodeProto], op: &str) -> usize {
    nodes.iter().filter(|n| n.op_type() == op).count()
}

#[test]
fn the_same_bytes_each_time() {
    for golden in goldens("") {
        let first = derive(&golden, all(&golden)).model.encode_to_vec();
        assert!((0..2).all(|_| derive(&golden, all(&golden)).model.encode_to_vec() == first), "{}", golden.name);
    }
}

/// Every node that was added leads to a gradient, by whichever tensors it was asked.
#[test]
fn no_node_that_nobody_asked_for() {
    for golden in goldens("") {
        let whole = derive(&golden, all(&golden)).model.graph.unwrap().node.len();
        let names = all(&golden);
        let few = names.iter().step_by(names.len().div_ceil(3)).map(|name| vec![name.clone()]);
        for wrt in few.chain([names.clone()]) {
            let derived = derive(&golden, wrt.clone());
            let (_, added) = parts(&golden, &derived);
            let mut live: HashSet<&str> = derived.gradients.iter().map(String::as_str).collect();
            for node in added.iter().rev() {
                let used = node.output.iter().any(|y| live.contains(y.as_str()));
                assert!(used, "{} by {wrt:?}: {} {:?} leads nowhere", golden.name, node.op_type(), node.output);
                live.extend(node.input.iter().map(String::as_str));
                live.extend(node.attribute.iter().filter_map(|a| a.g.as_ref()).flat_map(captured));
            }
            assert!(derived.model.graph.unwrap().node.len() <= whole, "{} by {wrt:?}", golden.name);
        }
    }
}

fn captured(graph: &bone_onnx::onnx::GraphProto) -> Vec<&str> {
    let inside = graph.node.iter().flat_map(|n| n.attribute.iter()).filter_map(|a| a.g.as_ref()).flat_map(captured);
    let inputs = graph.node.iter().flat_map(|n| n.input.iter().map(String::as_str));
    inside.chain(inputs).chain(graph.output.iter().map(|v| v.name())).collect()
}

/// No two nodes compute the same from the same, where one of them was added.
#[test]
fn nothing_is_computed_twice() {
    for golden in goldens("") {
        let (forward, added) = parts(&golden, &derive(&golden, all(&golden)));
        let key = |node: &NodeProto| {
            let attributes: Vec<Vec<u8>> = node.attribute.iter().map(Message::encode_to_vec).collect();
            (node.domain().to_string(), node.op_type().to_string(), node.input.clone(), attributes)
        };
        let mut seen: HashMap<_, _> = forward.iter().map(|n| (key(n), n.output.clone())).collect();
        for node in added.iter().filter(|n| !n.is("Identity")) {
            let twin = seen.insert(key(node), node.output.clone());
            assert!(twin.is_none(), "{}: {} {:?} is {twin:?} again", golden.name, node.op_type(), node.output);
        }
    }
}

/// What the forward pass has is read, not computed again: none of these operators comes back.
#[test]
fn values_of_the_forward_pass_are_kept() {
    let expensive =
        ["Conv", "Erf", "Exp", "GRU", "LSTM", "LayerNormalization", "LogSoftmax", "MaxPool", "RNN", "Sigmoid"];
    let mut reached = 0;
    for golden in goldens("") {
        let (forward, added) = parts(&golden, &derive(&golden, all(&golden)));
        let inputs: HashMap<&str, HashSet<&String>> = expensive
            .into_iter()
            .chain(["Softmax", "Sqrt", "Tanh", "TopK"])
            .map(|op| (op, forward.iter().filter(|n| n.is(op)).flat_map(|n| n.input.first()).collect()))
            .collect();
        for node in &added {
            let Some(known) = inputs.get(node.op_type()) else { continue };
            let again = node.input.first().is_some_and(|x| known.contains(x));
            assert!(!again, "{}: {} of {:?} again", golden.name, node.op_type(), node.input[0]);
        }
        reached += usize::from(inputs.values().any(|known| !known.is_empty()));
    }
    assert!(reached > 50, "{reached}");
}

/// Known graphs, known sizes.
#[test]
fn sizes_of_known_graphs() {
    let one = |word: &str| -> Golden {
        let [golden] = goldens(word).try_into().unwrap_or_else(|_| panic!("one case {word}"));
        golden
    };
    // Gemm, transposed weight: a product by each operand, a sum by the bias, and a name for each.
    let linear = one("products/linear.script");
    let sizes = |golden: &Golden, wrt: Vec<String>| {
        let added = parts(golden, &derive(golden, wrt)).1;
        (count(&added, "Gemm") + count(&added, "MatMul"), count(&added, "ReduceSum"), added.len())
    };
    assert_eq!(sizes(&linear, all(&linear)), (2, 1, 6));
    assert_eq!(sizes(&linear, vec!["bias".into()]), (0, 1, 2));
    // Three layers: the last bias needs no product, the last weight one, the first weight three.
    let mlp = one("smooth/mlp");
    assert_eq!(sizes(&mlp, vec!["4.bias".into()]).0, 0);
    assert_eq!(sizes(&mlp, vec!["4.weight".into()]).0, 1);
    assert_eq!(sizes(&mlp, vec!["0.weight".into()]).0, 3);
    let tanh = one("activations/tanh.script");
    assert_eq!(parts(&tanh, &derive(&tanh, all(&tanh))).1.len(), 4); // 1 - y², times the adjoint, named
}
