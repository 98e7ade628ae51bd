//! The file: the official schema, lossless zero-copy read, streaming write, tensors, external data, shapes.
//!
//! [`Model`] is what was read (decoded over a memory map, weights never copied); [`Patch`] is what a rewrite changes
//! in it; [`Model::patched`] gives the new file as a [`Rope`] of slices of the old one. What no patch names comes out
//! byte for byte, unknown fields included.

mod atomic;
mod beside;
mod build;
pub mod external;
pub mod functions;
mod model;
mod names;
mod patch;
pub mod proto;
mod rope;
mod safetensors;
pub mod shape;
mod store;
mod tensor;
pub mod upgrade;
pub mod wire;

pub(crate) use atomic::sync_dir;
pub use atomic::{Durability, write_atomic};
pub use beside::{copy_external, write_beside};
pub use build::{constant_i64, node, value_info};
pub use external::ExternalData;
pub use model::{Model, walk_graphs};
pub use names::Names;
pub use patch::{GraphPatch, Moved, NewPlace, NewTensor, Patch, Scope};
pub use proto::tensor_proto::DataType;
pub use proto::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
pub use rope::{Due, Origin, Rope, RopeError};
pub(crate) use store::sha1;
pub use store::{Layout, NewValues, Slot, Store, Stored};
pub use tensor::{Element, Tensor, data_type_name, proto_dims, proto_type};
