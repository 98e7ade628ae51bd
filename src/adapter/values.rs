//! An adapter apart from any model: what PEFT keeps in a directory, and what fresh, imported and exported adapters are.

use std::collections::BTreeMap;

use super::BoneConfig;
use crate::onnx::Tensor;

/// Names, config and values of one adapter. All values are float32.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub name: String,
    pub config: BoneConfig,
    /// The parameter of each adapted layer by module path, in the shape of the config's variant.
    pub blocks: BTreeMap<String, Tensor>,
    /// What trains in full beside them (`modules_to_save`, biases) by parameter path, such as `classifier.weight`;
    /// matrices of linear layers as torch has them, `[out, in]`.
    pub saved: BTreeMap<String, Tensor>,
}
