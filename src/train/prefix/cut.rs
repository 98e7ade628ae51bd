//! Where a model is cut: which values hold all that is to be kept of what is frozen.
//!
//! Frozen is what follows from the data alone: no parameter, nothing drawn at random. What something that learns reads
//! of it is to be kept, with two savings. What is quickly computed once more (masks, shapes, a norm of a value that is
//! kept) is left to every step. And what has no row for each row of the data cannot be kept, so it is computed from what
//! can.

use std::collections::{HashMap, HashSet};

use super::sizes::Sizes;
use super::work::Work;
use crate::autodiff;
use crate::onnx::{DataType, ModelProto, NodeProto};
use crate::train::data::Feed;

/// Share of the frozen part's products that may be left to every step.
const AGAIN: f64 = 0.05;
/// A gradient is about twice the work of what it is of.
const STEP: f64 = 3.0;

/// A value that is kept.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub name: String,
    pub element: DataType,
    /// Where its rows stand.
    pub axis: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Cut {
    pub values: Vec<Kept>,
    /// The work of a step ([`work`]), and how much of it is spared by it.
    pub step: f64,
    pub spared: f64,
}

/// Finds the cut of `model` for rows of `feed`; `added` are the inputs that are not in the data.
///
/// # Errors
/// Says why there is none.
pub(super) fn find(model: &ModelProto, added: &HashSet<&str>, feed: &Feed, sizes: &Sizes) -> Result<Cut, String> {
    let graph = model.graph.as_ref().ok_or("the model holds no graph")?;
    let parts = Parts::of(&graph.node, added, feed, sizes);
    let needed = parts.needed(graph.output.iter().map(|o| o.name().to_string()).collect());
    let sum = |kind: Kind| -> f64 {
        let nodes = needed.iter().filter(|at| parts.kinds[**at] == kind);
        nodes.map(|at| parts.work[*at].all()).sum()
    };
    let (frozen, learning) = (sum(Kind::Frozen), sum(Kind::Learning));
    let products = needed.iter().filter(|at| parts.kinds[**at] == Kind::Frozen).map(|at| parts.work[*at].product);
    let products: f64 = products.sum();
    if let Some(output) = graph.output.iter().find(|o| parts.frozen(o.name()).is_some()) {
        return Err(format!("nothing behind {} learns", output.name()));
    }
    let readers = needed.iter().filter(|at| parts.kinds[**at] == Kind::Learning);
    let read: HashSet<&str> = readers.flat_map(|at| &parts.inputs[*at]).map(String::as_str).collect();
    let mut open: Vec<&str> = read.into_iter().filter(|value| parts.frozen(value).is_some()).collect();
    if open.is_empty() {
        return Err("nothing that is computed before the first layer that learns is frozen".into());
    }
    open.sort_unstable_by_key(|value| (parts.frozen(value), *value));

    let mut again = Again { parts: &parts, nodes: HashSet::new(), left: AGAIN * products };
    let (mut held, mut seen) = (Vec::new(), HashSet::new());
    while let Some(value) = open.pop() {
        let Some(maker) = parts.frozen(value).filter(|_| seen.insert(value)) else { continue };
        if again.take(value, &HashSet::new()) {
            continue;
        }
        if sizes.axis(value).is_some() && sizes.shapes.element(value).is_some() {
            held.push((maker, value));
        } else if again.take_node(maker) {
            open.extend(parts.inputs[maker].iter().map(String::as_str));
        } else {
            return Err(format!("it cannot be told which part of {value} belongs to which row of the data"));
        }
    }
    // From the last to the first: what follows from others that are kept need not be.
    held.sort_unstable();
    for (_, value) in held.clone().into_iter().rev() {
        let others: HashSet<&str> = held.iter().map(|(_, other)| *other).filter(|other| *other != value).collect();
        if again.take(value, &others) {
            held.retain(|(_, other)| *other != value);
        }
    }
    if held.is_empty() {
        return Err("what is frozen before the first layer that learns is quickly computed".into());
    }
    let spent: f64 = again.nodes.iter().map(|at| parts.work[*at].all()).sum();
    let kept = held.into_iter().filter_map(|(_, name)| {
        Some(Kept { name: name.into(), element: sizes.shapes.element(name)?, axis: sizes.axis(name)? })
    });
    Ok(Cut { values: kept.collect(), step: frozen + STEP * learning, spared: frozen - spent })
}

/// What a node's results follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Constant,
    /// The data, and constants.
    Frozen,
    /// Parameters, labels or chance.
    Learning,
}

/// The nodes of a graph, with what is to be known of them.
struct Parts<'a> {
    inputs: Vec<Vec<String>>,
    kinds: Vec<Kind>,
    work: Vec<Work>,
    /// Whether a node has graphs of its own.
    inner: Vec<bool>,
    makers: HashMap<&'a str, usize>,
}

impl<'a> Parts<'a> {
    fn of(nodes: &'a [NodeProto], added: &HashSet<&'a str>, feed: &Feed, sizes: &Sizes) -> Self {
        let inputs: Vec<Vec<String>> = nodes.iter().map(autodiff::inputs).collect();
        let data: HashSet<&str> = feed.input_names().collect();
        let mut makers: HashMap<&str, usize> = HashMap::new();
        let mut kinds: Vec<Kind> = Vec::with_capacity(nodes.len());
        for (at, node) in nodes.iter().enumerate() {
            let kind_of = |x: &String| match makers.get(x.as_str()) {
                Some(maker) => kinds[*maker],
                None if added.contains(x.as_str()) => Kind::Learning,
                None if data.contains(x.as_str()) => Kind::Frozen,
                None => Kind::Constant,
            };
            let among = |kind| inputs[at].iter().any(|x| kind_of(x) == kind);
            let kind = match () {
                () if draws(node) || among(Kind::Learning) => Kind::Learning,
                () if among(Kind::Frozen) => Kind::Frozen,
                () => Kind::Constant,
            };
            kinds.push(kind);
            makers.extend(node.output.iter().filter(|y| !y.is_empty()).map(|y| (y.as_str(), at)));
        }
        let work = nodes.iter().map(|node| Work::of(node, &sizes.shapes)).collect();
        let inner =
            nodes.iter().map(|node| node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty())).collect();
        Self { inputs, kinds, work, inner, makers }
    }

    /// The node that makes `value`, where that is frozen.
    fn frozen(&self, value: &str) -> Option<usize> {
        self.makers.get(value).copied().filter(|at| self.kinds[*at] == Kind::Frozen)
    }

    /// What it counts for to compute a node in every step: its products. What is made without them is computed again and not
    /// kept; masks, above all, would be wrong where they are padded with zeros.
    fn again(&self, at: usize) -> f64 {
        if self.inner[at] { f64::INFINITY } else { self.work[at].product }
    }

    /// All nodes that go into `values`.
    fn needed(&self, mut values: Vec<String>) -> HashSet<usize> {
        let mut needed = HashSet::new();
        while let Some(value) = values.pop() {
            if let Some(at) = self.makers.get(value.as_str())
                && needed.insert(*at)
            {
                values.extend(self.inputs[*at].iter().cloned());
            }
        }
        needed
    }
}

/// Frozen nodes that every step computes again.
struct Again<'a> {
    parts: &'a Parts<'a>,
    nodes: HashSet<usize>,
    /// Work that more of them may be.
    left: f64,
}

impl Again<'_> {
    /// Has `value` computed again from the data and the values `held`; false where that is too much work.
    fn take(&mut self, value: &str, held: &HashSet<&str>) -> bool {
        let (mut open, mut more, mut work) = (vec![value], HashSet::new(), 0.0);
        while let Some(value) = open.pop() {
            let Some(at) = self.parts.frozen(value).filter(|at| !held.contains(value) && !self.nodes.contains(at))
            else {
                continue;
            };
            if more.insert(at) {
                work += self.parts.again(at);
                if work > self.left {
                    return false;
                }
                open.extend(self.parts.inputs[at].iter().map(String::as_str));
            }
        }
        self.left -= work;
        self.nodes.extend(more);
        true
    }

    /// The same for one node, without what goes into it.
    fn take_node(&mut self, at: usize) -> bool {
        let work = self.parts.again(at);
        let fits = work <= self.left;
        if fits && self.nodes.insert(at) {
            self.left -= work;
        }
        fits
    }
}

/// Whether a node's results differ from run to run.
fn draws(node: &NodeProto) -> bool {
    match node.op_type() {
        "Dropout" => node.input_at(2).is_some(),
        "Bernoulli" | "Multinomial" => true,
        op => op.starts_with("Random"),
    }
}
