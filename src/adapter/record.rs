//! What an injected file says of itself: one JSON value in the model's metadata, so that every later command needs
//! the file alone.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use super::BoneConfig;
use crate::inject::SharedData;
use crate::onnx::Model;
use crate::{Error, Result, did_you_mean};

/// Key of the record in `metadata_props` (ONNX IR: keys carry a reverse-DNS prefix).
pub const METADATA_KEY: &str = "org.bone-onnx.injection";

/// No dimension of a layer is larger than this.
pub const MAX_SIZE: usize = 1 << 31;

/// Version of the record's form.
const FORMAT: u32 = 2;

/// The record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Injection {
    pub format: u32,
    /// All adapters in the file, in the order they came.
    pub adapters: Vec<AdapterRecord>,
    /// Those the graph computes with, in the order they apply.
    pub active: Vec<String>,
    /// Whether the adapters' parameters are inputs of the graph, too: constants that a caller may override.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overridable: bool,
    pub written: Written,
    /// Calls of functions that are written out, so that layers inside can be adapted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inlined: Vec<Inlined>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<HeadRecord>,
    /// Data files of the base that the model refers to where they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<SharedData>,
}

/// One adapter, the layers it sits on, and what it trains in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterRecord {
    pub name: String,
    pub config: BoneConfig,
    pub targets: Vec<TargetRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub saved: Vec<SavedRecord>,
}

/// One adapted linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TargetRecord {
    pub module: String,
    /// The initializer that holds the layer's parameter.
    pub parameter: String,
    pub in_features: usize,
    pub out_features: usize,
}

/// A parameter of the base that an adapter has a copy of, to train in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedRecord {
    /// Path of the parameter, such as `classifier.weight`.
    pub path: String,
    /// The initializer that holds the copy, as the nodes read it.
    pub parameter: String,
    /// True where that is the transpose of what torch has.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
    /// True for a bias that [`super::Bias`] asks for, false for a part of `modules_to_save`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
}

/// What the active adapters changed in the graph: all of it can be taken back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Names of the added nodes.
    pub nodes: Vec<String>,
    /// Names of the added initializers that hold no parameter.
    pub constants: Vec<String>,
    /// Outputs of base nodes that go by another name, because an added node gives theirs.
    pub outputs: Vec<Renamed>,
    /// Inputs of base nodes that read an added value.
    pub inputs: Vec<Renamed>,
}

/// A call of a model-local function in whose place the function's nodes stand.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inlined {
    pub function: String,
    /// Names of the nodes.
    pub nodes: Vec<String>,
    /// The call as it was: the bytes of its node, in hexadecimal digits.
    pub call: String,
}

/// A value's name in the base file, and the name that stands there now; that one stands nowhere else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Renamed {
    pub base: String,
    pub now: String,
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
    /// True for layers trained in full (a head, `modules_to_save`), which take `--head-lr`.
    pub full: bool,
}

impl Default for Injection {
    fn default() -> Self {
        Self {
            format: FORMAT,
            adapters: Vec::new(),
            active: Vec::new(),
            overridable: false,
            written: Written::default(),
            inlined: Vec::new(),
            head: None,
            data: Vec::new(),
        }
    }
}

impl Injection {
    /// The record of an injected model; `None` for a plain one.
    pub fn read(model: &Model) -> Result<Option<Self>> {
        let Some(text) = model.metadata(METADATA_KEY) else { return Ok(None) };
        let bad = |what: String| {
            Error::file(&model.path, format!("its metadata {METADATA_KEY} {what}; inject it again from the base"))
        };
        let json: serde_json::Value = serde_json::from_str(text).map_err(|e| bad(format!("cannot be read ({e})")))?;
        match json["format"].as_u64() {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) if format > u64::from(FORMAT) => {
                return Err(Error::file(
                    &model.path,
                    format!("it was injected by a newer bone-onnx (record format {format}); update this one"),
                ));
            }
            format => return Err(bad(format!("has the old form {}", format.unwrap_or_default()))),
        }
        let record: Self = serde_json::from_value(json).map_err(|e| bad(format!("cannot be read ({e})")))?;
        record.check().map_err(|what| bad(format!("makes no sense: {what}")))?;
        Ok(Some(record))
    }

    /// A file may come from a stranger: sizes that nobody means, and names that stand for two things.
    fn check(&self) -> Result<(), String> {
        for adapter in &self.adapters {
            adapter.config.validate().map_err(|e| format!("adapter {}: {e}", adapter.name))?;
            for target in &adapter.targets {
                for (size, what) in [
                    (adapter.config.r, "r"),
                    (target.in_features, "in_features"),
                    (target.out_features, "out_features"),
                ] {
                    if size == 0 || size > MAX_SIZE {
                        return Err(format!("module {} has {what} = {size}", target.module));
                    }
                }
                adapter
                    .config
                    .dims(target.in_features, target.out_features)
                    .map_err(|what| format!("module {}: {what}", target.module))?;
            }
        }
        let mut packed = BTreeMap::new();
        self.adapters.iter().try_for_each(|a| join_sizes(&mut packed, &a.config.packed_sizes))?;
        let saved = self.adapters.iter().flat_map(|a| &a.saved).map(|s| s.parameter.as_str());
        let blocks = self.adapters.iter().flat_map(|a| &a.targets).map(|t| t.parameter.as_str());
        once(self.adapters.iter().map(|a| a.name.as_str()), "adapter")?;
        once(self.active.iter().map(String::as_str), "active adapter")?;
        once(blocks.chain(saved), "parameter")?;
        once(self.written.nodes.iter().map(String::as_str), "node")?;
        let renamed = self.written.outputs.iter().chain(&self.written.inputs);
        once(renamed.map(|r| r.now.as_str()), "value")?;
        match self.active.iter().find(|name| self.adapter(name).is_none()) {
            Some(gone) => Err(format!("the active adapter {gone:?} is not there")),
            None => Ok(()),
        }
    }

    /// As [`Injection::read`], but a plain model is an error that says what to do.
    pub fn expect(model: &Model) -> Result<Self> {
        Self::read(model)?.ok_or_else(|| {
            Error::file(&model.path, "no adapter was injected into this model; run `bone-onnx inject` on it first")
        })
    }

    pub fn adapter(&self, name: &str) -> Option<&AdapterRecord> {
        self.adapters.iter().find(|a| a.name == name)
    }

    /// The adapter called `name`; an unknown name is an error with the nearest one.
    pub fn named(&self, name: &str) -> Result<&AdapterRecord> {
        self.adapter(name).ok_or_else(|| {
            let known: Vec<&str> = self.adapters.iter().map(|a| a.name.as_str()).collect();
            let there = if known.is_empty() { "none".into() } else { known.join(", ") };
            Error::config(format!(
                "Adapter {name} does not exist; the model has {there}.{}",
                did_you_mean(name, known.iter().copied())
            ))
        })
    }

    /// Those that the graph computes with, in the order they apply.
    pub fn active(&self) -> impl Iterator<Item = &AdapterRecord> {
        self.active.iter().filter_map(|name| self.adapter(name))
    }

    /// Names of all nodes that injection added (adapters and head).
    pub fn added_nodes(&self) -> impl Iterator<Item = &str> {
        self.written.nodes.iter().chain(self.head.iter().flat_map(|h| &h.nodes)).map(String::as_str)
    }

    /// The initializers that training changes where the adapters `trained` learn, in the order they were injected.
    pub fn trainable(&self, trained: &[String]) -> Vec<Trainable> {
        let blocks = |a: &AdapterRecord| {
            a.targets.iter().map(|t| Trainable { name: t.parameter.clone(), full: false }).collect::<Vec<_>>()
        };
        let saved = |a: &AdapterRecord| {
            a.saved.iter().map(|s| Trainable { name: s.parameter.clone(), full: !s.bias }).collect::<Vec<_>>()
        };
        let adapters = self.adapters.iter().filter(|a| trained.contains(&a.name));
        let head = self.head.iter().flat_map(|h| [&h.weight, &h.bias]);
        adapters
            .flat_map(|a| blocks(a).into_iter().chain(saved(a)))
            .chain(head.map(|n| Trainable { name: n.clone(), full: true }))
            .collect()
    }
}

/// Adds `more` sizes of packed modules to those that are `known`.
///
/// # Errors
/// One that is known as another.
pub fn join_sizes(known: &mut BTreeMap<String, usize>, more: &BTreeMap<String, usize>) -> Result<(), String> {
    for (name, size) in more {
        match known.insert(name.clone(), *size) {
            Some(before) if before != *size => {
                return Err(format!("packed_sizes: {name} has {size} outputs, but {before} for another adapter"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// An error where a name comes twice.
fn once<'a>(mut names: impl Iterator<Item = &'a str>, what: &str) -> Result<(), String> {
    let mut seen = HashSet::new();
    match names.find(|name| !seen.insert(*name)) {
        Some(twice) => Err(format!("{what} {twice:?} is there twice")),
        None => Ok(()),
    }
}

impl AdapterRecord {
    /// Names of the initializers that hold its parameters.
    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        let blocks = self.targets.iter().map(|t| t.parameter.as_str());
        blocks.chain(self.saved.iter().map(|s| s.parameter.as_str()))
    }
}
