//! `README.md`: the model card that a hub shows for an adapter.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::{CARD, put};
use crate::Result;
use crate::adapter::{Adapter, InitWeights, PeftType};

/// Stands in every card of ours; a card without it is somebody's own text and is left alone.
const MARK: &str =
    "<!-- Written by bone-onnx, which replaces cards that have this line and no others. -->";

/// What a card says.
pub(super) struct Card<'a> {
    pub base_model: Option<&'a str>,
    pub tags: Vec<&'static str>,
    pub causal_lm: bool,
    pub title: String,
    /// What the adapter is, in one paragraph.
    pub about: String,
    pub facts: Vec<(&'static str, String)>,
    pub modules: Vec<&'a str>,
    pub saved: Vec<&'a str>,
    /// Which releases of PEFT read it.
    pub readers: &'static str,
    /// True where this program reads it too.
    pub ours: bool,
}

impl<'a> Card<'a> {
    pub fn of_bone(adapter: &'a Adapter, peft_type: PeftType, base_model: Option<&'a str>) -> Self {
        let config = &adapter.config;
        let variant = config.init_weights.variant().name();
        let mut facts = vec![("kind", format!("{peft_type}, variant {variant}")), ("r", config.r.to_string())];
        if config.init_weights == InitWeights::Mini {
            facts.push(("mini_r", config.mini_r.to_string()));
        }
        facts.push(("bias", config.bias.to_string()));
        let count = adapter.blocks.values().chain(adapter.saved.values()).map(|t| t.len()).sum::<usize>();
        facts.push(("parameters", count.to_string()));
        let about = if config.init_weights == InitWeights::Bat {
            "Each adapted layer has a parameter `[out/r, r, r]`: with the weight cut into r × r blocks, the k-th along the \
             outputs becomes `W + W·B[k] + B[k]`."
        } else {
            "Each adapted layer has a block D of r rows that is repeated over the layer's inputs: \
             `W'[o, i] = W[o, i] + D[i mod r, o]`."
        };
        Self {
            base_model,
            tags: vec![if peft_type == PeftType::Miss { "miss" } else { "bone" }, "onnx"],
            causal_lm: config.task_type == Some(crate::adapter::TaskType::CausalLm),
            title: format!("{variant} adapter"),
            about: about.into(),
            facts,
            modules: adapter.blocks.keys().map(String::as_str).collect(),
            saved: adapter.saved.keys().map(String::as_str).collect(),
            readers: match peft_type {
                PeftType::Miss => "PEFT from 0.17 on",
                PeftType::Bone => "PEFT 0.14 to 0.18",
            },
            ours: true,
        }
    }

    fn text(&self) -> String {
        let mut text = String::from("---\n");
        // A JSON string is a YAML string too, whatever is in it.
        if let Some(base) = self.base_model {
            let _ = writeln!(text, "base_model: {}", json!(base));
        }
        text += "library_name: peft\n";
        if self.causal_lm {
            text += "pipeline_tag: text-generation\n";
        }
        text += "tags:\n";
        if let Some(base) = self.base_model {
            let _ = writeln!(text, "- {}", json!(format!("base_model:adapter:{base}")));
        }
        for tag in &self.tags {
            let _ = writeln!(text, "- {tag}");
        }
        let _ = write!(text, "---\n\n{MARK}\n\n# {}\n\n{}\n\n| | |\n|---|---|\n", self.title, self.about);
        for (name, value) in &self.facts {
            let _ = writeln!(text, "| {name} | {value} |");
        }
        list(&mut text, "Adapted layers", &self.modules);
        list(&mut text, "Parameters trained in full", &self.saved);
        let _ = write!(
            text,
            "\n## In PyTorch\n\n{} reads it:\n\n```python\nfrom peft import PeftModel\n\nmodel = \
             PeftModel.from_pretrained(base_model, \"DIRECTORY\")\n```\n",
            self.readers
        );
        if self.ours {
            text += "\n## In an ONNX file\n\nFolded into the base model's weights, at no cost when it runs:\n\n```sh\n\
                     bone-onnx fold BASE.onnx --adapter DIRECTORY -o MERGED.onnx\n```\n";
        }
        text
    }
}

fn list(text: &mut String, title: &str, names: &[&str]) {
    if names.is_empty() {
        return;
    }
    let _ = write!(text, "\n{title}:\n\n");
    for name in names {
        let _ = writeln!(text, "- `{}`", name.escape_debug());
    }
}

/// Writes the card into `dir`, unless one is there that somebody else wrote.
pub(super) fn write(dir: &Path, card: &Card) -> Result<()> {
    let path = dir.join(CARD);
    // One that cannot be read (another encoding, say) is not ours.
    let foreign = path.exists() && !fs::read_to_string(&path).is_ok_and(|old| old.contains(MARK));
    if foreign { Ok(()) } else { put(&path, card.text()) }
}
