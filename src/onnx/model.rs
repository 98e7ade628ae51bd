//! A model as it was read: the decoded schema over a memory map of the file, and access to its tensors.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use super::external::{self, ExternalData};
use super::tensor::{proto_dims, proto_type, typed_bytes};
use super::{Durability, GraphProto, ModelProto, Origin, Patch, Rope, Scope, Tensor, TensorProto};
use crate::{Error, Result};

/// An ONNX file, read without copying a weight.
#[derive(Debug)]
pub struct Model {
    /// Where it was read from (used in messages and to find external data).
    pub path: PathBuf,
    /// The file's bytes: a map, or a buffer.
    pub source: Bytes,
    /// Decoded; `raw_data` are slices of `source`. Read only: changes go through a [`Patch`].
    pub proto: ModelProto,
    /// Files beside the model that hold tensors.
    pub external: ExternalData,
    /// The file that `source` maps.
    origin: Option<Origin>,
}

impl Model {
    /// Reads the file at `path`. Weights stay where they are: the cost is that of the graph's nodes.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let meta = std::fs::metadata(path).map_err(Error::io("read", path))?;
        if !meta.is_file() {
            return Err(Error::file(path, "this is not a file"));
        }
        let origin = Origin::open(path).map_err(Error::io("read", path))?;
        let model = Self::from_bytes(path, origin.bytes.clone())?;
        Ok(Self { origin: Some(origin), ..model })
    }

    /// Decodes `source`; `path` names it in messages, and external data is looked for beside it.
    pub fn from_bytes(path: impl AsRef<Path>, source: Bytes) -> Result<Self> {
        let path = path.as_ref();
        if source.is_empty() {
            return Err(Error::file(path, "the file is empty; an ONNX model was expected"));
        }
        let proto = ModelProto::decode(source.clone()).map_err(|e| {
            let what = if e.to_string().contains("recursion limit") {
                "its subgraphs are nested more than 100 messages deep, which no engine loads".to_string()
            } else {
                format!("this is not a whole ONNX model ({e}); check that it is an .onnx file and was copied in full")
            };
            Error::file(path, what)
        })?;
        let fields = super::wire::records(&source).map_err(|e| Error::file(path, format!("not an ONNX model: {e}")))?;
        match (&proto.graph, fields.iter().filter(|r| r.field == super::patch::MODEL_GRAPH).count()) {
            (Some(_), 1) => {}
            (None, _) => return Err(Error::file(path, "this is not an ONNX model: it holds no graph")),
            (Some(_), n) => return Err(Error::file(path, format!("this file holds {n} graphs; one was expected"))),
        }
        if proto.opset_import.is_empty() {
            return Err(Error::file(path, "this is not a usable ONNX model: it imports no operator set"));
        }
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(Self { path: path.into(), source, proto, external: ExternalData::beside(dir), origin: None })
    }

    /// The file that was read, and its map; `None` where the bytes came from elsewhere.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    pub fn graph(&self) -> &GraphProto {
        self.proto.graph.as_ref().expect("checked when the model was read")
    }

    /// The graph at `scope`: the main one for `[]`, else the attribute of a node of the graph around it.
    pub fn graph_at(&self, scope: &Scope) -> Option<&GraphProto> {
        scope.iter().try_fold(self.graph(), |graph, (node, attribute)| {
            graph.node.get(*node)?.attribute.get(*attribute)?.g.as_ref()
        })
    }

    /// Value of a metadata property of the model.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.proto.metadata_props.iter().find(|p| p.key() == key).map(|p| p.value())
    }

    /// A tensor's raw little-endian bytes, from wherever they stand; copied only out of the typed fields.
    /// The length is checked against shape and type.
    pub fn tensor_bytes(&self, tensor: &TensorProto) -> Result<Bytes> {
        let bytes = if external::is_external(tensor) {
            self.external.bytes(tensor)?
        } else if let Some(raw) = &tensor.raw_data {
            raw.clone()
        } else {
            typed_bytes(tensor, proto_type(tensor)?).into()
        };
        if let Some(bits) = element_bits(proto_type(tensor)?) {
            let wanted = (proto_dims(tensor)?.iter().product::<usize>() * bits).div_ceil(8);
            if bytes.len() != wanted {
                return Err(Error::file(
                    &self.path,
                    format!(
                        "tensor {}: shape {:?} needs {wanted} bytes, but the file gives {}",
                        tensor.name(),
                        tensor.dims,
                        bytes.len()
                    ),
                ));
            }
        }
        Ok(bytes)
    }

    /// A tensor's value in host memory.
    pub fn tensor(&self, tensor: &TensorProto) -> Result<Tensor> {
        let bytes = self.tensor_bytes(tensor)?;
        Tensor::from_bytes(proto_type(tensor)?, &proto_dims(tensor)?, &bytes)
            .map_err(|what| Error::file(&self.path, format!("tensor {}: {what}", tensor.name())))
    }

    /// A copy of the schema with external tensors drawn in, for engines that take the model from memory.
    pub fn to_inline(&self) -> Result<ModelProto> {
        self.inlined(self.proto.clone())
    }

    /// `proto`, which was made from this model's, with external tensors drawn in.
    pub fn inlined(&self, mut proto: ModelProto) -> Result<ModelProto> {
        if let Some(graph) = &mut proto.graph {
            self.inline(graph)?;
        }
        Ok(proto)
    }

    fn inline(&self, graph: &mut GraphProto) -> Result<()> {
        for tensor in &mut graph.initializer {
            self.inline_tensor(tensor)?;
        }
        for attribute in graph.node.iter_mut().flat_map(|n| &mut n.attribute) {
            if let Some(tensor) = &mut attribute.t {
                self.inline_tensor(tensor)?;
            }
            for graph in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                self.inline(graph)?;
            }
        }
        Ok(())
    }

    fn inline_tensor(&self, tensor: &mut TensorProto) -> Result<()> {
        if external::is_external(tensor) {
            tensor.raw_data = Some(self.tensor_bytes(tensor)?);
            tensor.external_data.clear();
            tensor.data_location = None;
        }
        Ok(())
    }

    /// The model that results from `patch`, in memory; its external data is this one's.
    pub fn edited(&self, patch: Patch) -> Result<Self> {
        let bytes = self.patched(patch)?.into_bytes().map_err(|e| e.at(&self.path))?;
        Self::from_bytes(&self.path, bytes)
    }

    /// The bytes of a node as they stand in the file.
    pub fn node_bytes(&self, scope: &Scope, index: usize) -> Result<Bytes> {
        use super::patch::{ATTRIBUTE_GRAPH, GRAPH_NODE, MODEL_GRAPH, NODE_ATTRIBUTE};
        let nth = |message: &Bytes, field: u32, n: usize| {
            let records = super::wire::records(message).map_err(|what| Error::file(&self.path, what))?;
            let found = records.into_iter().filter(|r| r.field == field).nth(n).map(|r| r.body);
            found.ok_or_else(|| Error::file(&self.path, "a node is gone"))
        };
        let mut graph = nth(&self.source, MODEL_GRAPH, 0)?;
        for (node, attribute) in scope {
            let node = nth(&graph, GRAPH_NODE, *node)?;
            graph = nth(&nth(&node, NODE_ATTRIBUTE, *attribute)?, ATTRIBUTE_GRAPH, 0)?;
        }
        nth(&graph, GRAPH_NODE, index)
    }

    /// The file that results from `patch`.
    pub fn patched(&self, patch: Patch) -> Result<Rope> {
        patch.apply(&self.source).map_err(|what| Error::file(&self.path, what))
    }

    /// Writes `rope` (made by [`Model::patched`]) to `path`, whole or not at all. `path` may be this model's own.
    pub fn write(&self, rope: Rope, path: &Path) -> Result<()> {
        self.write_as(rope, path, Durability::OnDisk)
    }

    /// As [`Model::write`], waiting for the disk or not.
    ///
    /// # Errors
    /// A file that no reader would take, because it is larger than protobuf allows; those of the file system.
    pub fn write_as(&self, rope: Rope, path: &Path, durability: Durability) -> Result<()> {
        if rope.len() > LARGEST {
            return Err(Error::model(format!(
                "{}: the model would be a file of {:.1} GB, but no reader takes more than 2 GB (protobuf's limit); keep \
                 its weights in a file of their own: fold has --external-data-location for that",
                path.display(),
                rope.len() as f64 / 1e9
            )));
        }
        super::write_atomic(path, rope, self.origin.as_slice(), durability)
    }
}

/// Protobuf's limit for one message.
pub(crate) const LARGEST: usize = i32::MAX as usize;

/// Calls `visit` for `graph` and every graph below it (depth first, in file order) with its place.
pub fn walk_graphs<'a>(graph: &'a GraphProto, visit: &mut impl FnMut(&Scope, &'a GraphProto)) {
    fn walk<'a>(scope: &mut Scope, graph: &'a GraphProto, visit: &mut impl FnMut(&Scope, &'a GraphProto)) {
        visit(scope, graph);
        for (n, node) in graph.node.iter().enumerate() {
            for (a, attribute) in node.attribute.iter().enumerate() {
                if let Some(graph) = &attribute.g {
                    scope.push((n, a));
                    walk(scope, graph, visit);
                    scope.pop();
                }
            }
        }
    }
    walk(&mut Scope::new(), graph, visit);
}

/// Bits of one element as `raw_data` packs it; `None` for strings and unknown types.
fn element_bits(data_type: super::DataType) -> Option<usize> {
    use super::DataType::*;
    Some(match data_type {
        Float | Int32 | Uint32 => 32,
        Double | Int64 | Uint64 | Complex64 => 64,
        Complex128 => 128,
        Float16 | Bfloat16 | Int16 | Uint16 => 16,
        Int8 | Uint8 | Bool | Float8e4m3fn | Float8e4m3fnuz | Float8e5m2 | Float8e5m2fnuz | Float8e8m0 => 8,
        Int4 | Uint4 | Float4e2m1 => 4,
        Int2 | Uint2 => 2,
        _ => return None,
    })
}
