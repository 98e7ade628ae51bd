//! What a rewrite changes in a model, in terms of the elements as they stand in the file. Everything not named is
//! copied from the source as it is.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;

use super::external::Place;
use super::proto::StringStringEntryProto;
use super::proto::tensor_proto::DataLocation;
use super::rope::{Due, Rope};
use super::wire::{self, Record};
use super::{NodeProto, Tensor, TensorProto, ValueInfoProto};
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
const ATTRIBUTE_TENSOR: u32 = 5;
pub(super) const ATTRIBUTE_GRAPH: u32 = 6;
const TENSOR_RAW_DATA: u32 = 9;
const TENSOR_EXTERNAL_DATA: u32 = 13;
const TENSOR_DATA_LOCATION: u32 = 14;
const ENTRY_VALUE: u32 = 2;
/// Fields of TensorProto that hold a value: float/int32/string/int64 data, raw data, double/uint64 data, external.
const TENSOR_VALUES: [u32; 9] = [4, 5, 6, 7, 9, 10, 11, 13, 14];

/// Changes to one model.
#[derive(Default)]
pub struct Patch {
    pub graphs: BTreeMap<Scope, GraphPatch>,
    pub set_metadata: Vec<(String, String)>,
    pub drop_metadata: BTreeSet<String>,
    /// Data files that go by another name, by their `location` in the source.
    pub moved: BTreeMap<String, Moved>,
}

/// What the tensors in a data file say of it now.
#[derive(Debug, Clone)]
pub struct Moved {
    pub location: String,
    /// In place of the `checksum` that a tensor has.
    pub checksum: Option<String>,
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
    /// The same for the tensor in a node's attribute, by the indices of both.
    pub replace_attributes: BTreeMap<(usize, usize), NewPlace>,
    pub drop_initializers: BTreeSet<usize>,
    pub add_initializers: Vec<NewTensor>,
    pub drop_inputs: BTreeSet<usize>,
    pub add_inputs: Vec<ValueInfoProto>,
    pub drop_outputs: BTreeSet<usize>,
    pub add_outputs: Vec<ValueInfoProto>,
}

/// Where a tensor's new value stands.
pub enum NewPlace {
    /// In the model itself, as raw data.
    Inline(Rope),
    /// In an external file (which the caller writes).
    External(Place),
}

/// A tensor to be added: everything but its value, and the value.
pub struct NewTensor {
    pub header: TensorProto,
    /// `None` where the header already says where the value is.
    pub value: Option<Due>,
}

impl NewTensor {
    /// `value` under a name.
    pub fn new(name: &str, value: Tensor) -> Self {
        let header = TensorProto {
            name: Some(name.into()),
            dims: value.dims().iter().map(|d| *d as i64).collect(),
            data_type: Some(value.data_type() as i32),
            ..Default::default()
        };
        Self { header, value: Some(value.into()) }
    }
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
            rope.append(Rope::from(value).into_field(TENSOR_RAW_DATA));
        }
        rope
    }
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
                        match self.moved(&record.body)? {
                            Some(tensor) => rope.append(tensor.into_field(GRAPH_INITIALIZER)),
                            None => rope.push(record.raw.clone()),
                        }
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
        let mut changed = body.is_some();
        let body = body.unwrap_or_else(|| record.body.clone());
        let mut node = Rope::default();
        if self.looks_into(scope, index, patch) {
            let mut attributes = 0;
            for record in wire::records(&body)? {
                if record.field != NODE_ATTRIBUTE {
                    node.push(record.raw);
                    continue;
                }
                scope.push((index, attributes));
                let value = patch.replace_attributes.remove(&(index, attributes));
                match self.attribute(scope, &record.body, value)? {
                    Some(attribute) => {
                        node.append(attribute.into_field(NODE_ATTRIBUTE));
                        changed = true;
                    }
                    None => node.push(record.raw),
                }
                scope.pop();
                attributes += 1;
            }
        } else {
            node.push(body);
        }
        if changed {
            rope.append(node.into_field(GRAPH_NODE));
        } else {
            rope.push(record.raw.clone());
        }
        for node in patch.insert_after.remove(&index).unwrap_or_default() {
            rope.append(wire::field(GRAPH_NODE, &node));
        }
        Ok(())
    }
}

impl Patch {
    /// True where an attribute of node `index` of the graph at `scope` may change.
    fn looks_into(&self, scope: &Scope, index: usize, patch: &GraphPatch) -> bool {
        let depth = scope.len();
        !self.moved.is_empty()
            || patch.replace_attributes.range((index, 0)..=(index, usize::MAX)).next().is_some()
            || self.graphs.keys().any(|s| s.len() > depth && s[..depth] == scope[..] && s[depth].0 == index)
    }

    /// The attribute at the end of `scope` with its graph changed and its tensor replaced or moved; `None` where it
    /// stays as it is.
    fn attribute(
        &mut self,
        scope: &mut Scope,
        body: &Bytes,
        mut value: Option<NewPlace>,
    ) -> Result<Option<Rope>, String> {
        let mut rope = Rope::default();
        let mut changed = false;
        for record in wire::records(body)? {
            let part = match record.field {
                ATTRIBUTE_GRAPH if !self.moved.is_empty() || self.graphs.keys().any(|s| s.starts_with(scope)) => {
                    Some(self.graph_rope(scope, &record.body)?)
                }
                ATTRIBUTE_TENSOR => match value.take() {
                    Some(value) => Some(with_value(&record.body, value)?),
                    None => self.moved(&record.body)?,
                },
                _ => None,
            };
            changed |= part.is_some();
            match part {
                Some(part) => rope.append(part.into_field(record.field)),
                None => rope.push(record.raw),
            }
        }
        Ok(changed.then_some(rope))
    }

    /// The tensor with what it says of its data file brought up to date; `None` where that file is none of the moved.
    fn moved(&self, tensor: &Bytes) -> Result<Option<Rope>, String> {
        if self.moved.is_empty() {
            return Ok(None);
        }
        let records = wire::records(tensor)?;
        if !records.iter().any(|r| r.field == TENSOR_DATA_LOCATION && r.body[..] == [DataLocation::External as u8]) {
            return Ok(None);
        }
        let entry = |record: &Record| {
            let entry =
                (record.field == TENSOR_EXTERNAL_DATA).then(|| StringStringEntryProto::decode(&record.body[..]));
            entry.transpose().map_err(|e| e.to_string())
        };
        let mut moved = None;
        for record in &records {
            if let Some(entry) = entry(record)?.filter(|e| e.key() == "location") {
                moved = self.moved.get(entry.value());
            }
        }
        let Some(moved) = moved else { return Ok(None) };
        let mut rope = Rope::default();
        for record in records {
            let value = match entry(&record)?.as_ref().map(|e| e.key()) {
                Some("location") => Some(&moved.location),
                Some("checksum") => moved.checksum.as_ref(),
                _ => None,
            };
            match value {
                Some(value) => {
                    let entry = wire::with_string(&record.body, ENTRY_VALUE, 0, value)?;
                    rope.append(Rope::from(entry).into_field(TENSOR_EXTERNAL_DATA));
                }
                None => rope.push(record.raw),
            }
        }
        Ok(Some(rope))
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
        NewPlace::Inline(value) => rope.append(value.into_field(TENSOR_RAW_DATA)),
        NewPlace::External(place) => rope.push(place.entries().encode_to_vec()),
    }
    Ok(rope)
}
