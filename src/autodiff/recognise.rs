//! Functions that exporters write as several nodes, seen as one where that makes a shorter derivative.
//!
//! The forward graph stays as it is (so an engine still finds its own fusions in it); only the walk sees the one node.

use std::collections::{HashMap, HashSet};
use std::f64::consts::SQRT_2;

use super::vjp::Constants;
use crate::onnx::{NodeProto, Tensor};

/// `nodes` with every recognised group as one node, at the place of its last. Nodes that only hold constants are left
/// out. `visible`: values that have to stay, for they are asked for by name.
pub(super) fn recognise(nodes: &[NodeProto], constants: &Constants, visible: &HashSet<String>) -> Vec<NodeProto> {
    let group = Group::new(nodes, constants, visible);
    let mut whole: HashMap<usize, NodeProto> = HashMap::new();
    let mut inside: HashSet<usize> = HashSet::new();
    for erf in (0..nodes.len()).filter(|i| nodes[*i].is("Erf")) {
        if let Some((members, gelu)) = group.gelu(erf) {
            whole.extend(members.last().map(|last| (*last, gelu)));
            inside.extend(members);
        }
    }
    let kept = nodes.iter().enumerate().filter(|(_, node)| !node.is("Constant"));
    kept.filter_map(|(i, node)| match whole.remove(&i) {
        Some(gelu) => Some(gelu),
        None => (!inside.contains(&i)).then(|| node.clone()),
    })
    .collect()
}

struct Group<'a> {
    nodes: &'a [NodeProto],
    constants: &'a Constants,
    visible: &'a HashSet<String>,
    producers: HashMap<&'a str, usize>,
    users: HashMap<String, Vec<usize>>,
}

impl<'a> Group<'a> {
    fn new(nodes: &'a [NodeProto], constants: &'a Constants, visible: &'a HashSet<String>) -> Self {
        let mut users: HashMap<String, Vec<usize>> = HashMap::new();
        for (i, node) in nodes.iter().enumerate() {
            for x in super::reverse::inputs(node) {
                users.entry(x).or_default().push(i);
            }
        }
        let outputs = |(i, n): (usize, &'a NodeProto)| n.output.iter().map(move |y| (y.as_str(), i));
        let producers = nodes.iter().enumerate().flat_map(outputs).collect();
        Self { nodes, constants, visible, producers, users }
    }

    /// ½·x·(1 + erf(x/√2)), with the factors in any order.
    fn gelu(&self, erf: usize) -> Option<(Vec<usize>, NodeProto)> {
        let u = self.producer(self.nodes[erf].input_at(0)?)?;
        let x = match self.nodes[u].op_type() {
            "Div" if self.is(self.nodes[u].input_at(1)?, SQRT_2) => self.nodes[u].input_at(0)?,
            "Mul" => self.other(u, |c| self.is(c, 1.0 / SQRT_2))?,
            _ => return None,
        };
        let one = self.next(erf, "Add")?;
        self.other(one, |c| self.is(c, 1.0))?;
        let first = self.next(one, "Mul")?;
        let factor = self.other(first, |v| self.nodes[one].output.iter().any(|y| y == v))?;
        let mut members = vec![u, erf, one, first];
        let half = self.producer(factor).filter(|i| self.nodes[*i].is("Mul"));
        if let Some(half) = half.filter(|i| self.other(*i, |c| self.is(c, 0.5)) == Some(x)) {
            // (½x)·(1 + erf)
            self.only_user(half)?;
            members.insert(0, half);
        } else {
            // x·(1 + erf), then ½; or ½·(1 + erf), then x.
            let last = self.next(first, "Mul")?;
            let rest = self.other(last, |v| self.nodes[first].output.iter().any(|y| y == v))?;
            let fits = (factor == x && self.is(rest, 0.5)) || (self.is(factor, 0.5) && rest == x);
            members.push(fits.then_some(last)?);
        }
        // Beside the members, nobody uses what is inside.
        self.only_user(u)?;
        let last = *members.last()?;
        let mut gelu = crate::onnx::node("Gelu", &[x], &[self.nodes[last].output_at(0)?]);
        gelu.name = self.nodes[last].name.clone();
        Some((members, gelu))
    }

    fn producer(&self, value: &str) -> Option<usize> {
        self.producers.get(value).copied()
    }

    /// The one node that uses what `i` computes, where nobody else does.
    fn only_user(&self, i: usize) -> Option<usize> {
        let y = self.nodes[i].output_at(0).filter(|y| !self.visible.contains(*y))?;
        match self.users.get(y)?.as_slice() {
            [user] => Some(*user),
            _ => None,
        }
    }

    fn next(&self, i: usize, op: &str) -> Option<usize> {
        self.only_user(i).filter(|user| self.nodes[*user].is(op))
    }

    /// The other operand of the two of node `i`, one of which satisfies `which`.
    fn other(&self, i: usize, which: impl Fn(&str) -> bool) -> Option<&'a str> {
        let (a, b) = (self.nodes[i].input_at(0)?, self.nodes[i].input_at(1)?);
        match (which(a), which(b)) {
            (true, _) => Some(b),
            (_, true) => Some(a),
            _ => None,
        }
    }

    /// Whether `value` is a constant of one element that is `number` up to its own rounding.
    fn is(&self, value: &str, number: f64) -> bool {
        let Some(tensor) = self.constants.get(value) else { return false };
        let rounding = if matches!(tensor, Tensor::F16(_) | Tensor::Bf16(_)) { 4e-3 } else { 1e-6 };
        tensor.dims().len() <= 1 && tensor.as_f64().is_some_and(|v| (v - number).abs() <= rounding * number)
    }
}
