//! Sequences and optionals that are put together and taken apart in the same graph, seen as the tensors in them.
//!
//! Exporters split a tensor, pick or reorder the parts, and join them again. Where the number of parts and each place
//! are known, the walk sees Split, Identity and Concat on the parts as well; what depends on a run is left to the
//! operators on the sequences themselves, which are refused. The forward graph stays as it is: a part that an adjoint
//! reads is taken from its sequence.

use std::collections::HashMap;

use super::emit::Emitter;
use super::vjp::{Constants, known};
use crate::onnx::shape::Shapes;
use crate::onnx::{AttributeProto, NodeProto, Tensor, node};

/// More parts than that are no structure that an exporter wrote.
const MOST_PARTS: i64 = 1024;

/// `nodes` with the operators on sequences as operators on their parts, where these are known.
pub(super) fn unpack(
    nodes: Vec<NodeProto>,
    shapes: &Shapes,
    constants: &Constants,
    emitter: &Emitter,
) -> Vec<NodeProto> {
    if !nodes.iter().any(|n| OPS.iter().any(|op| n.is(op))) {
        return nodes;
    }
    let mut view = View { shapes, constants, emitter, parts: HashMap::new(), nodes: Vec::with_capacity(nodes.len()) };
    for node in nodes {
        if view.unpack(&node) != Some(Seen::Instead) {
            view.nodes.push(node);
        }
    }
    view.nodes
}

const OPS: &[&str] = &["SequenceConstruct", "SequenceEmpty", "SplitToSequence", "Optional", "OptionalGetElement"];

/// What the walk sees of a node's tensors: beside the node, which gives a sequence that others may read, or instead.
#[derive(PartialEq)]
enum Seen {
    Beside,
    Instead,
}

struct View<'a> {
    shapes: &'a Shapes,
    constants: &'a Constants,
    emitter: &'a Emitter,
    /// The tensors in each sequence.
    parts: HashMap<String, Vec<String>>,
    nodes: Vec<NodeProto>,
}

impl View<'_> {
    /// Adds what stands for `node`; `None` where it has to stay.
    fn unpack(&mut self, node: &NodeProto) -> Option<Seen> {
        if !matches!(node.domain(), "" | "ai.onnx") {
            return None;
        }
        let output = node.output_at(0)?.to_string();
        match node.op_type() {
            "SequenceEmpty" => drop(self.parts.insert(output, vec![])),
            "SequenceConstruct" => drop(self.parts.insert(output, node.input.clone())),
            "SplitToSequence" => {
                let parts = self.split(node)?;
                self.parts.insert(output, parts);
            }
            "SequenceInsert" => {
                let mut parts = self.of(node)?;
                let at = match node.input_at(2) {
                    Some(_) => self.place(node, 2, parts.len() + 1)?,
                    None => parts.len(),
                };
                parts.insert(at, node.input_at(1)?.to_string());
                self.parts.insert(output, parts);
            }
            "SequenceErase" => {
                let mut parts = self.of(node)?;
                let at = match node.input_at(1) {
                    Some(_) => self.place(node, 1, parts.len())?,
                    None => parts.len().checked_sub(1)?,
                };
                parts.remove(at);
                self.parts.insert(output, parts);
            }
            "SequenceAt" => {
                let parts = self.of(node)?;
                let part = parts.get(self.place(node, 1, parts.len())?)?;
                let picked = crate::onnx::node("Identity", &[part], &[&output]);
                self.nodes.push(NodeProto { name: node.name.clone(), ..picked });
                return Some(Seen::Instead);
            }
            "ConcatFromSequence" => {
                self.concat(node, &output)?;
                return Some(Seen::Instead);
            }
            // An optional of a sequence is that sequence; of a tensor, the tensor by its rule.
            "Optional" | "OptionalGetElement" | "Identity" => {
                let parts = self.of(node)?;
                self.parts.insert(output, parts);
            }
            _ => return None,
        }
        Some(Seen::Beside)
    }

    /// The parts of input 0.
    fn of(&self, node: &NodeProto) -> Option<Vec<String>> {
        self.parts.get(node.input_at(0)?).cloned()
    }

    /// Input `i` as a place among `count`.
    fn place(&self, node: &NodeProto, i: usize, count: usize) -> Option<usize> {
        let at = self.ints(node.input_at(i)?)?.first().copied()?;
        let at = if at < 0 { at.checked_add(count as i64)? } else { at };
        usize::try_from(at).ok().filter(|at| *at < count)
    }

    fn ints(&self, name: &str) -> Option<Vec<i64>> {
        match self.constants.get(name) {
            Some(Tensor::I64(a)) => Some(a.iter().copied().collect()),
            Some(Tensor::I32(a)) => Some(a.iter().map(|v| i64::from(*v)).collect()),
            _ => self.shapes.elements(name)?.iter().map(known).collect(),
        }
    }

    /// Names of the parts that `split` gives, from a Split of the same sizes.
    fn split(&mut self, split: &NodeProto) -> Option<Vec<String>> {
        let x = split.input_at(0)?;
        let axis = split.attr_i("axis", 0);
        let size = || {
            let dims = self.shapes.dims(x)?;
            let front = if axis < 0 { axis.checked_add(dims.len() as i64)? } else { axis };
            known(dims.get(usize::try_from(front).ok()?)?)
        };
        let (count, keep) = match split.input_at(1) {
            None => (size()?, split.attr_i("keepdims", 1) != 0),
            Some(sizes) => match (self.shapes.rank(sizes), self.ints(sizes)?.as_slice()) {
                // Equal parts, of which the last may be shorter.
                (Some(0), &[part]) if part > 0 => ((size()?.checked_add(part - 1)?) / part, true),
                (Some(1), sizes) => (sizes.len() as i64, true),
                _ => return None,
            },
        };
        let count = usize::try_from(count).ok().filter(|n| (1..=MOST_PARTS as usize).contains(n))?;
        let sequence = split.output_at(0)?;
        let part = |i: usize| self.emitter.op("SequenceAt", &[sequence, &self.emitter.int(i as i64)], vec![]);
        let parts: Vec<String> = (0..count).map(part).collect();
        let along = vec![AttributeProto::int("axis", axis)];
        if keep {
            let names: Vec<&str> = parts.iter().map(String::as_str).collect();
            self.nodes.push(NodeProto { attribute: along, name: split.name.clone(), ..node("Split", &[x], &names) });
        } else {
            for (i, part) in parts.iter().enumerate() {
                let picked = node("Gather", &[x, &self.emitter.int(i as i64)], &[part]);
                self.nodes.push(NodeProto { attribute: along.clone(), name: split.name.clone(), ..picked });
            }
        }
        Some(parts)
    }

    fn concat(&mut self, join: &NodeProto, output: &str) -> Option<()> {
        let axis = join.attr_i("axis", 0);
        let mut parts = self.of(join).filter(|parts| !parts.is_empty())?;
        if join.attr_i("new_axis", 0) != 0 {
            for part in &mut parts {
                let wide = self.emitter.unsqueeze(&*part, self.emitter.ints(&[axis]));
                self.nodes.push(node("Unsqueeze", &[part.as_str(), &self.emitter.ints(&[axis])], &[&wide]));
                *part = wide;
            }
        }
        let names: Vec<&str> = parts.iter().map(String::as_str).collect();
        let along = vec![AttributeProto::int("axis", axis)];
        self.nodes.push(NodeProto { attribute: along, name: join.name.clone(), ..node("Concat", &names, &[output]) });
        Some(())
    }
}
