//! What an injected file says of itself: one JSON value in the model's metadata, so that every later command needs
//! the file alone.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::BoneConfig;
use crate::onnx::Model;
use crate::{Error, Result};

/// Key of the record in `metadata_props` (ONNX IR: keys carry a reverse-DNS prefix).
pub const METADATA_KEY: &str = "org.bone-onnx.injection";

/// No dimension of a layer is larger than this.
pub const MAX_SIZE: usize = 1 << 31;

/// The record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Injection {
    /// Version of this record's form.
    pub format: u32,
    pub adapters: Vec<AdapterRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadRecord>,
}

/// One adapter and the layers it sits on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    pub name: String,
    pub config: BoneConfig,
    pub targets: Vec<TargetRecord>,
    /// Names of the added initializers that hold no parameter (the shard selections).
    pub constants: Vec<String>,
}

/// One adapted linear layer (all the nodes that call one module with one weight).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetRecord {
    pub module: String,
    /// The initializer that holds the block, `[r, out_features]`.
    pub parameter: String,
    pub in_features: usize,
    pub out_features: usize,
    pub calls: Vec<CallRecord>,
}

/// One node that computes an adapted layer, and what was added around it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CallRecord {
    /// The node's output as the base file has it; the injected file gives it to the last added node.
    pub output: String,
    /// The name the base node's output goes by in the injected file; no other value of the file has it.
    pub base_output: String,
    /// Names of the added nodes.
    pub nodes: Vec<String>,
}

/// How a sequence of token embeddings becomes one vector before the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    Mean,
    Cls,
    None,
}

/// A trainable linear layer appended to the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadRecord {
    /// The new output, `[…, labels]`.
    pub name: String,
    pub input: String,
    pub labels: usize,
    pub pool: Pool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
    /// Initializers `[labels, features]` and `[labels]`.
    pub weight: String,
    pub bias: String,
    pub nodes: Vec<String>,
    /// Names of the added initializers that hold no parameter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub constants: Vec<String>,
}

/// An initializer that training changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trainable {
    pub name: String,
    /// True for layers trained in full (a head), which take `--head-lr`.
    pub full: bool,
}

impl Injection {
    /// The record of an injected model; `None` for a plain one.
    pub fn read(model: &Model) -> Result<Option<Self>> {
        let Some(text) = model.metadata(METADATA_KEY) else { return Ok(None) };
        let record: Self = serde_json::from_str(text).map_err(|e| {
            Error::file(
                &model.path,
                format!("its metadata {METADATA_KEY} cannot be read ({e}); inject it again from the base"),
            )
        })?;
        if record.format != 1 {
            return Err(Error::file(
                &model.path,
                format!("it was injected by a newer bone-onnx (record format {}); update this one", record.format),
            ));
        }
        record.check().map_err(|what| {
            Error::file(
                &model.path,
                format!("its metadata {METADATA_KEY} makes no sense: {what}; inject it again from the base"),
            )
        })?;
        Ok(Some(record))
    }

    /// A file may come from a stranger: sizes that nobody means, and outputs renamed in a circle.
    fn check(&self) -> Result<(), String> {
        for adapter in &self.adapters {
            let r = adapter.config.r;
            for target in &adapter.targets {
                for (size, what) in
                    [(r, "r"), (target.in_features, "in_features"), (target.out_features, "out_features")]
                {
                    if size == 0 || size > MAX_SIZE {
                        return Err(format!("module {} has {what} = {size}", target.module));
                    }
                }
                if target.calls.is_empty() {
                    return Err(format!("module {} is called by no node", target.module));
                }
            }
        }
        let mut renamed: HashMap<&str, &str> = HashMap::new();
        for call in self.adapters.iter().flat_map(|a| &a.targets).flat_map(|t| &t.calls) {
            if renamed.insert(&call.base_output, &call.output).is_some() {
                return Err(format!("value {} is named twice", call.base_output));
            }
        }
        // Each adapter on a node renames its output once more.
        for start in renamed.keys() {
            let chain = std::iter::successors(Some(start), |name| renamed.get(**name)).take(self.adapters.len() + 2);
            if chain.count() > self.adapters.len() + 1 {
                return Err(format!("value {start} is renamed in a circle"));
            }
        }
        Ok(())
    }

    /// As [`Injection::read`], but a plain model is an error that says what to do.
    pub fn expect(model: &Model) -> Result<Self> {
        Self::read(model)?.ok_or_else(|| {
            Error::file(&model.path, "no adapter was injected into this model; run `bone-onnx inject` on it first")
        })
    }

    /// Names of all nodes that injection added (adapters and head).
    pub fn added_nodes(&self) -> impl Iterator<Item = &str> {
        let calls = self.adapters.iter().flat_map(|a| &a.targets).flat_map(|t| &t.calls);
        calls.flat_map(|c| &c.nodes).chain(self.head.iter().flat_map(|h| &h.nodes)).map(String::as_str)
    }

    /// All initializers that training changes, in the order they were injected.
    pub fn trainable(&self) -> Vec<Trainable> {
        let blocks =
            self.adapters.iter().flat_map(|a| &a.targets).map(|t| Trainable { name: t.parameter.clone(), full: false });
        let head =
            self.head.iter().flat_map(|h| [&h.weight, &h.bias]).map(|n| Trainable { name: n.clone(), full: true });
        blocks.chain(head).collect()
    }
}
