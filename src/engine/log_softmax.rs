//! LogSoftmax for tract, which takes the logarithm of a softmax: −∞ for scores more than about 100 below the largest.

use std::borrow::Cow;

use crate::onnx::{AttributeProto, GraphProto, ModelProto, Names, NodeProto, Tensor, node, walk_graphs};

/// The model with each LogSoftmax written as it is defined: x − max − log Σ exp(x − max). Before operator set 13 it went over
/// several axes at once; those stay.
pub(super) fn spelled_out(model: &ModelProto) -> Cow<'_, ModelProto> {
    let mut found = false;
    if let Some(graph) = &model.graph {
        walk_graphs(graph, &mut |_, graph| found |= graph.node.iter().any(|n| n.is("LogSoftmax")));
    }
    if !found || model.opset() < 13 {
        return Cow::Borrowed(model);
    }
    let (mut names, opset) = (Names::of(model), model.opset());
    let mut model = model.clone();
    model.graph.iter_mut().for_each(|graph| spell_out(graph, &mut names, opset));
    Cow::Owned(model)
}

fn spell_out(graph: &mut GraphProto, names: &mut Names, opset: i64) {
    for mut old in std::mem::take(&mut graph.node) {
        old.attribute.iter_mut().filter_map(|a| a.g.as_mut()).for_each(|graph| spell_out(graph, names, opset));
        match (old.is("LogSoftmax"), old.input_at(0), old.output_at(0)) {
            (true, Some(x), Some(y)) => {
                let axis = old.attr_i("axis", -1);
                let axes = names.fresh(&format!("{y}/axes"));
                graph.initializer.push(Tensor::new(&[1], vec![axis]).to_proto(&axes));
                graph.node.extend(definition(x, y, (axis, &axes), names, opset));
            }
            _ => graph.node.push(old),
        }
    }
}

fn definition(x: &str, y: &str, (axis, axes): (i64, &str), names: &mut Names, opset: i64) -> [NodeProto; 6] {
    let [max, less, exp, sum, log] =
        ["max", "less", "exp", "sum", "log"].map(|part| names.fresh(&format!("{y}/{part}")));
    // The axes of ReduceMax became an input with operator set 18.
    let reduce_max = match opset {
        18.. => node("ReduceMax", &[x, axes], &[&max]),
        _ => NodeProto { attribute: vec![AttributeProto::ints("axes", &[axis])], ..node("ReduceMax", &[x], &[&max]) },
    };
    [
        reduce_max,
        node("Sub", &[x, &max], &[&less]),
        node("Exp", &[&less], &[&exp]),
        node("ReduceSum", &[&exp, axes], &[&sum]),
        node("Log", &[&sum], &[&log]),
        node("Sub", &[&less, &log], &[y]),
    ]
}
