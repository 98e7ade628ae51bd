//! Composite operators by their definition: the forward pass written in standard operators, and reverse mode through it.
//!
//! Of the definition only what the adjoints read stays in the graph (for attention the scores and their softmax, as
//! flash attention recomputes them); the rest is dropped with everything else that nobody uses.

use super::reverse::{Path, Scope, add_constants};
use super::vjp::{Adjoints, Vjp};
use crate::Result;
use crate::onnx::GraphProto;

impl Vjp<'_> {
    /// The adjoints of the node by way of `forward`, which emits what its outputs are and names them in their order
    /// (`None` for one that is not defined here).
    ///
    /// # Errors
    /// Where an output is used that `forward` does not define, or the definition itself has no derivative.
    pub fn through(&self, forward: impl FnOnce(&Self) -> Result<Vec<Option<String>>>) -> Result<Adjoints> {
        let (outputs, graph) = self.emitter.record(|| forward(self));
        self.lowered(outputs?, graph)
    }

    /// [`Vjp::through`] for a definition that ends in an ordinary operator: a rule that reads its result reads the node's
    /// own, which is there, instead of computing it again.
    ///
    /// # Errors
    /// As [`Vjp::through`].
    pub(super) fn through_own(&self, forward: impl FnOnce(&Self) -> Result<Vec<Option<String>>>) -> Result<Adjoints> {
        let (outputs, mut graph) = self.emitter.record(|| forward(self));
        let mut outputs = outputs?;
        for (output, own) in outputs.iter_mut().flatten().zip(&self.node.output) {
            let names = graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output));
            names.filter(|name| *name == output).for_each(|name| name.clone_from(own));
            output.clone_from(own);
        }
        self.lowered(outputs, graph)
    }

    fn lowered(&self, outputs: Vec<Option<String>>, graph: GraphProto) -> Result<Adjoints> {
        let shapes = self.shapes.subgraph(&graph, self.opset);
        let mut constants = self.constants.clone();
        add_constants(&mut constants, &graph, &Default::default());
        let (nodes, rules) = (&graph.node, self.rules);
        let scope = Scope { nodes, shapes: &shapes, constants: &constants, rules, opset: self.opset };

        let mut seeds = Vec::new();
        for (i, adjoint) in self.adjoints.iter().enumerate() {
            match (adjoint, outputs.get(i).cloned().flatten()) {
                (Some(adjoint), Some(value)) => seeds.push((value, adjoint.clone())),
                (Some(_), None) => return Err(self.error(format!("output {i} is used, which has no derivative here"))),
                (None, _) => {}
            }
        }
        // A value that is several inputs at once gets one adjoint, given at the first of them.
        let mut wrt: Vec<String> = Vec::new();
        for x in (0..self.inputs.len()).filter(|i| self.wants(*i)).map(|i| &self.inputs[i]) {
            if !wrt.contains(x) {
                wrt.push(x.clone());
            }
        }
        let of: Vec<String> = seeds.iter().map(|(value, _)| value.clone()).collect();
        let path = Path::find(scope, &of, &wrt)?;
        if let Some((op, why)) = path.obstacles.keys().next() {
            return Err(self.error(format!("it is computed by {op}, which {why}")));
        }
        let adjoints = path.reverse(scope, self.emitter, seeds, &wrt)?;
        self.emitter.amend_emitted();
        let mut of_value: Vec<(String, Option<String>)> = wrt.into_iter().zip(adjoints).collect();
        let take = |x: &String| of_value.iter_mut().find(|(value, _)| value == x).and_then(|(_, a)| a.take());
        Ok(self.inputs.iter().map(take).collect())
    }

    /// Dimension `axis` of an emitted value, a 1-D int64 value of one element.
    pub(super) fn size_of(&self, x: &str, axis: usize) -> String {
        use crate::onnx::AttributeProto;
        let at = axis as i64;
        self.op("Shape", &[x], vec![AttributeProto::int("start", at), AttributeProto::int("end", at + 1)])
    }

    /// `x` reshaped by a specification in which 0 copies a dimension and -1 follows from the rest.
    pub(super) fn respec(&self, x: &str, spec: &[i64]) -> String {
        self.op("Reshape", &[x, &self.ints(spec)], vec![])
    }
}
