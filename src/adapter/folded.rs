//! What a merged model says of adapters that stayed beside the layers they adapt: plain nodes that are no layers of the
//! model's own, so that nobody takes them for some.

use serde::{Deserialize, Serialize};

use crate::onnx::Model;

/// Key of the note in `metadata_props`.
pub const FOLDED_KEY: &str = "org.bone-onnx.folded";

/// The note.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Folded {
    /// Modules whose adapters are nodes beside them.
    pub beside: Vec<String>,
    /// Names of these nodes.
    pub nodes: Vec<String>,
}

impl Folded {
    /// The note of `model`; an empty one where there is none that can be read.
    pub fn read(model: &Model) -> Self {
        model.metadata(FOLDED_KEY).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
    }
}
