//! What a rewrite changes in a model, in terms of the elements as they stand in the file. Everything not named is
//! copied from the source as it is.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;

use super::external::Place;
use super::proto::StringStringEntryProto;
use super::rope::{Due, Rope};
use super::wire::{self, Record};
use super::{NodeProto, TensorProto, ValueInfoProto};
use crate::Result;

/// The way from the main graph to a subgraph: (index of the node, index of its attribute) at each level.
pub type Scope = Vec<(usize, usize)>;

// Field numbers of onnx-ml.proto.
pub(super) const MODEL_GRAPH: u32 = 7;
const MODEL_METADATA: u32 = 14;
pub(super) const GRAPH_NODE: u32 = 1;
const GRAPH_INITIALIZER: u32 = 5;
const GRAPH_INPUT: u32 = 11;
const GRAPH_OUTPUT: u32 = 12;
const NODE_INPUT: u32 = 1;
const NODE_OUTPUT: u32 = 2;
pub(super) const NODE_ATTRIBUTE: u32 = 5;
pub(super) const ATTRIBUTE_GRAPH: u32 = 6;
const TENSOR_RAW_DATA: u32 = 9;
/// Fields of TensorProto that hold a value: float/int32/string/int64 data, raw data, double/uint64 data, external.
const TENSOR_VALUES: [u32; 9] = [4, 5, 6, 7, 9, 10, 11, 13, 14];

/// Changes to one model.
#[derive(Default)]
pub struct Patch {
    pub graphs: BTreeMap<Scope, GraphPatch>,
    pub set_metadata: Vec<(String, String)>,
    pub drop_metadata: BTreeSet<String>,
}

/// Changes to one graph. Indices are those of the elements in the file.
#[derive(Default)]
pub struct GraphPatch {
    /// New bytes of a node.
    pub replace_nodes: BTreeMap<usize, Bytes>,
    /// New names of inputs and outputs of a node, whose other bytes stay as they are.
    renames: BTreeMap<usize, Vec<(u32, usize, String)>>,
    pub drop_nodes: BTreeSet<usize>,
    /// New nodes right before the one with this index.
    pub insert_before: BTreeMap<usize, Vec<NodeProto>>,
    /// New nodes right after the one with this index.
    pub insert_after: BTreeMap<usize, Vec<NodeProto>>,
    /// New nodes at the end.
    pub append_nodes: Vec<NodeProto>,
    /// A new value for an initializer (its name, shape, type and documentation stay).
    pub replace_values: BTreeMap<usize, NewPlace>,
    pub drop_initializers: BTreeSet<usize>,
    pub add_initializers: Vec<NewTensor>,
    pub drop_inputs: BTreeSet<usize>,
    pub add_inputs: Vec<ValueInfoProto>,
    pub drop_outputs: BTreeSet<usize>,
    pub add_outputs: Vec<ValueInfoProto>,
}

/// Where an initializer's new value stands.
pub enum NewPlace {
    /// In the model itself, as raw data.
    Inline(Due),
    /// In an external file (which the caller writes).
    External(Place),
}

/// A tensor to be added: everything but its value, and the value.
pub struct NewTensor {
    pub header: TensorProto,
    /// `None` where the header already says where the value is.
    pub value: Option<Due>,
}

impl From<TensorProto> for NewTensor {
    /// A tensor whose value is at hand.
    fn from(header: TensorProto) -> Self {
        Self { header, value: None }
    }
}

impl GraphPatch {
    /// Node `node` reads `name` as its input `nth`.
    pub fn rename_input(&mut self, node: usize, nth: usize, name: &str) {
        self.renames.entry(node).or_default().push((NODE_INPUT, nth, name.into()));
    }

    /// Node `node` becomes `bytes`, whatever else was to change in it or around it.
    pub(crate) fn put_back(&mut self, node: usize, bytes: Bytes) {
        self.renames.remove(&node);
        self.insert_before.remove(&node);
        self.insert_after.remove(&node);
        self.replace_nodes.insert(node, bytes);
    }

    /// Output `nth` of node `node` is called `name`.
    pub fn rename_output(&mut self, node: usize, nth: usize, name: &str) {
        self.renames.entry(node).or_default().push((NODE_OUTPUT, nth, name.into()));
    }
}

impl NewTensor {
    fn into_rope(self) -> Rope {
        let mut rope = Rope::default();
        rope.push(self.header.encode_to_vec());
        if let Some(value) = self.value {
            push_raw_data(&mut rope, value);
        }
        rope
    }
}

fn push_raw_data(rope: &mut Rope, value: Due) {
    rope.push(wire::header(TENSOR_RAW_DATA, value.len));
    rope.push_due(value);
}

impl Patch {
    pub fn graph(&mut self, scope: &Scope) -> &mut GraphPatch {
        self.graphs.entry(scope.clone()).or_default()
    }

    /// The changed file, as slices of `source` and new bytes. Fails only where `source` is no model.
    pub(super) fn apply(mut self, source: &Bytes) -> Result<Rope, String> {
        let mut rope = Rope::default();
        for record in wire::records(source)? {
            match record.field {
                MODEL_GRAPH => rope.append(self.graph_rope(&mut Scope::new(), &record.body)?.into_field(MODEL_GRAPH)),
                MODEL_METADATA => {
                    let entry = StringStringEntryProto::decode(record.body.clone()).map_err(|e| e.to_string())?;
                    let replaced = self.set_metadata.iter().any(|(key, _)| key == entry.key());
                    if !replaced && !self.drop_metadata.contains(entry.key()) {
                        rope.push(record.raw);
                    }
                }
                _ => rope.push(record.raw),
            }
        }
        for (key, value) in std::mem::take(&mut self.set_metadata) {
            let entry = StringStringEntryProto { key: Some(key), value: Some(value) };
            rope.append(wire::field(MODEL_METADATA, &entry));
        }
        match self.graphs.pop_first() {
            Some((scope, _)) => Err(format!("a change is meant for a graph at {scope:?}, which is not there")),
            None => Ok(rope),
        }
    }

    fn graph_rope(&mut self, scope: &mut Scope, body: &Bytes) -> Result<Rope, String> {
        let mut patch = self.graphs.remove(scope).unwrap_or_default();
        let records = wire::records(body)?;
        // New elements follow the last of their kind; where there is none, the graph's end serves as well.
        let last = |field| records.iter().rposition(|r| r.field == field).unwrap_or(records.len().saturating_sub(1));
        let (last_node, last_initializer) = (last(GRAPH_NODE), last(GRAPH_INITIALIZER));
        let (last_input, last_output) = (last(GRAPH_INPUT), last(GRAPH_OUTPUT));
        let mut rope = Rope::default();
        let (mut nodes, mut initializers, mut inputs, mut outputs) = (0, 0, 0, 0);
        for (at, record) in records.iter().enumerate() {
            match record.field {
                GRAPH_NODE => {
                    self.node(scope, nodes, record, &mut patch, &mut rope)?;
                    nodes += 1;
                }
                GRAPH_INITIALIZER => {
                    if let Some(value) = patch.replace_values.remove(&initializers) {
                        rope.append(with_value(&record.body, value)?.into_field(GRAPH_INITIALIZER));
                    } else if !patch.drop_initializers.contains(&initializers) {
                        rope.push(record.raw.clone());
                    }
                    initializers += 1;
                }
                GRAPH_INPUT => {
                    if !patch.drop_inputs.contains(&inputs) {
                        rope.push(record.raw.clone());
                    }
                    inputs += 1;
                }
                GRAPH_OUTPUT => {
                    if !patch.drop_outputs.contains(&outputs) {
                        rope.push(record.raw.clone());
                    }
                    outputs += 1;
                }
                _ => rope.push(record.raw.clone()),
            }
            if at == last_node {
                patch.append_nodes.drain(..).for_each(|n| rope.append(wire::field(GRAPH_NODE, &n)));
            }
            if at == last_initializer {
                let added = std::mem::take(&mut patch.add_initializers);
                added.into_iter().for_each(|t| rope.append(t.into_rope().into_field(GRAPH_INITIALIZER)));
            }
            if at == last_input {
                patch.add_inputs.drain(..).for_each(|v| rope.append(wire::field(GRAPH_INPUT, &v)));
            }
            if at == last_output {
                patch.add_outputs.drain(..).for_each(|v| rope.append(wire::field(GRAPH_OUTPUT, &v)));
            }
        }
        Ok(rope)
    }

    fn node(
        &mut self,
        scope: &mut Scope,
        index: usize,
        record: &Record,
        patch: &mut GraphPatch,
        rope: &mut Rope,
    ) -> Result<(), String> {
        if patch.drop_nodes.contains(&index) {
            return Ok(());
        }
        for node in patch.insert_before.remove(&index).unwrap_or_default() {
            rope.append(wire::field(GRAPH_NODE, &node));
        }
        let mut body = patch.replace_nodes.remove(&index);
        for (field, nth, name) in patch.renames.remove(&index).unwrap_or_default() {
            body = Some(wire::with_string(body.as_ref().unwrap_or(&record.body), field, nth, &name)?);
        }
        let depth = scope.len();
        let changed_below =
            self.graphs.keys().any(|s| s.len() > depth && s[..depth] == scope[..] && s[depth].0 == index);
        match (body, changed_below) {
            (None, false) => rope.push(record.raw.clone()),
            (body, false) => {
                let mut node = Rope::default();
                node.push(body.unwrap_or_default());
                rope.append(node.into_field(GRAPH_NODE));
            }
            (body, true) => {
                let mut node = Rope::default();
                let mut attributes = 0;
                for record in wire::records(&body.unwrap_or_else(|| record.body.clone()))? {
                    if record.field != NODE_ATTRIBUTE {
                        node.push(record.raw);
                        continue;
                    }
                    scope.push((index, attributes));
                    if self.graphs.keys().any(|s| s.starts_with(scope)) {
                        let mut attribute = Rope::default();
                        for record in wire::records(&record.body)? {
                            if record.field == ATTRIBUTE_GRAPH {
                                attribute.append(self.graph_rope(scope, &record.body)?.into_field(ATTRIBUTE_GRAPH));
                            } else {
                                attribute.push(record.raw);
                            }
                        }
                        node.append(attribute.into_field(NODE_ATTRIBUTE));
                    } else {
                        node.push(record.raw);
                    }
                    scope.pop();
                    attributes += 1;
                }
                rope.append(node.into_field(GRAPH_NODE));
            }
        }
        for node in patch.insert_after.remove(&index).unwrap_or_default() {
            rope.append(wire::field(GRAPH_NODE, &node));
        }
        Ok(())
    }
}

/// The tensor with another value; the other fields as they were.
fn with_value(tensor: &Bytes, value: NewPlace) -> Result<Rope, String> {
    let mut rope = Rope::default();
    for record in wire::records(tensor)? {
        if !TENSOR_VALUES.contains(&record.field) {
            rope.push(record.raw);
        }
    }
    match value {
        NewPlace::Inline(value) => push_raw_data(&mut rope, value),
        NewPlace::External(place) => rope.push(place.entries().encode_to_vec()),
    }
    Ok(rope)
}
