//! The bias of a linear layer, and who adds it.

use super::constant::{Constant, Source, trace};
use super::values::{Reader, Values};
use crate::onnx::{NodeProto, Scope};

/// Where the bias of a [`Linear`](super::Linear) is added: by the node itself, or by the Add (or fused operator) that
/// follows.
#[derive(Debug, Clone, PartialEq)]
pub struct BiasUse {
    /// The initializer, or the output of the Constant node. What is added may be an Identity of it: exporters merge
    /// equal biases.
    pub name: String,
    pub source: Source,
    /// The graph of the node that adds it.
    pub scope: Scope,
    /// Its index there.
    pub node: usize,
    /// Which of its inputs.
    pub input: usize,
    /// As [`Weight::uses`](super::Weight::uses), of the bias.
    pub uses: usize,
}

/// Operators that follow a product and add a bias: (operator, domain, index of the bias).
const ADDERS: [(&str, &str, usize); 5] = [
    ("BiasGelu", "com.microsoft", 1),
    ("FastGelu", "com.microsoft", 1),
    ("SkipLayerNormalization", "com.microsoft", 4),
    ("SkipSimplifiedLayerNormalization", "com.microsoft", 3),
    ("QLinearAdd", "com.microsoft", 3),
];

/// Nodes a product's value passes on its way to the bias: quantizers put them there.
pub const BETWEEN: [&str; 4] = ["Cast", "Mul", "QuantizeLinear", "DequantizeLinear"];

/// A bias, and the node input that reads it.
pub struct Added<'a> {
    pub constant: Constant<'a>,
    graph: usize,
    node: usize,
    input: usize,
}

impl<'a> Added<'a> {
    pub fn by(&self, values: &Values<'a>) -> Option<&'a NodeProto> {
        values.node(self.graph, self.node)
    }

    pub fn describe(&self, values: &Values) -> Option<BiasUse> {
        Some(BiasUse {
            name: self.constant.root.1.to_string(),
            source: self.constant.source.clone(),
            scope: values.graphs.get(self.graph)?.scope.clone(),
            node: self.node,
            input: self.input,
            uses: 0,
        })
    }
}

/// The bias of the product that `node` is: a one-dimensional constant (a residual sum is none), at the product's
/// input `own` or added by a later node.
pub fn added_bias<'a>(
    values: &Values<'a>,
    graph: usize,
    node: usize,
    own: Option<usize>,
    is_quantized: bool,
    out_features: usize,
    follows: bool,
) -> Option<Added<'a>> {
    let bias = |graph: usize, node: usize, input: usize| {
        let constant = trace(values, graph, values.node(graph, node)?.input_at(input)?)?;
        (constant.dims == [out_features]).then_some(Added { constant, graph, node, input })
    };
    if let Some(own) = own.and_then(|i| bias(graph, node, i)) {
        return Some(own);
    }
    if !follows {
        return None;
    }
    let (mut graph, mut node) = (graph, node);
    for _ in 0..=BETWEEN.len() {
        let (value, _) = values.lookup(graph, values.node(graph, node)?.output_at(0)?)?;
        let [Reader::Node { graph: at, node: n, input }] = values.readers(value) else { return None };
        let next = values.node(*at, *n)?;
        if next.is("Add") {
            return bias(*at, *n, 1usize.checked_sub(*input)?);
        }
        if let Some((.., i)) = ADDERS.iter().find(|(op, domain, _)| *op == next.op_type() && *domain == next.domain()) {
            return bias(*at, *n, *i);
        }
        let passes = BETWEEN.contains(&next.op_type()) && (next.op_type() != "Mul" || is_quantized);
        if !passes {
            return None;
        }
        (graph, node) = (*at, *n);
    }
    None
}
