//! `README.md`: the model card that a hub shows for an adapter.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::{CARD, put};
use crate::Result;
use crate::adapter::{Adapter, BoneConfig, InitWeights, PeftType, TaskType};
use crate::onnx::Tensor;

/// Stands in every card of ours; a card without it is somebody's own text and is left alone.
const MARK: &str = "<!-- Written by bone-onnx, which replaces cards that have this line and no others. -->";

const BONE: &str = "Each adapted layer has a block B `[r, out]` that is repeated over the layer's inputs: \
    `W'[o, i] = W[o, i] + B[i mod r, o]`.";
const MINI: &str = "Each adapted layer has a block B `[r, mini_r]` that is repeated over the layer's inputs and \
    outputs: `W'[o, i] = W[o, i] + B[i mod r, o mod mini_r]`.";
const BAT: &str = "Each adapted layer has blocks B `[out/r, r, r]`: with the weight cut into r × r blocks, those of \
    the k-th row of blocks become `W + W·B[k] + B[k]`.";
const LORA: &str = "Each adapted layer has two matrices: `W' = W + B·A`, with no other factor.";

/// What a card says.
pub(super) struct Card<'a> {
    base_model: Option<&'a str>,
    tag: &'static str,
    task_type: Option<TaskType>,
    title: String,
    /// What the adapter does to a layer.
    about: &'static str,
    facts: Vec<(&'static str, String)>,
    modules: Vec<&'a str>,
    saved: Vec<&'a str>,
    /// Which releases of PEFT read it.
    readers: &'static str,
    /// True where this program reads it too.
    ours: bool,
}

impl<'a> Card<'a> {
    pub fn of_bone(adapter: &'a Adapter, peft_type: PeftType, base_model: Option<&'a str>) -> Self {
        let config = &adapter.config;
        let variant = config.init_weights.variant().name();
        let mut facts = vec![("variant", variant.to_string()), ("r", config.r.to_string())];
        if config.init_weights == InitWeights::Mini {
            facts.push(("mini_r", config.mini_r.to_string()));
        }
        let count = adapter.blocks.values().chain(adapter.saved.values()).map(Tensor::len).sum::<usize>();
        facts.push(("parameters", count.to_string()));
        let (tag, readers) = match peft_type {
            PeftType::Miss => ("miss", "PEFT from 0.17 on"),
            PeftType::Bone => ("bone", "PEFT 0.14 to 0.18"),
        };
        Self {
            base_model,
            tag,
            task_type: config.task_type,
            title: format!("{variant} adapter"),
            about: match config.init_weights {
                InitWeights::Bat => BAT,
                InitWeights::Mini => MINI,
                InitWeights::Zeros | InitWeights::Random => BONE,
            },
            facts,
            modules: adapter.blocks.keys().map(String::as_str).collect(),
            saved: adapter.saved.keys().map(String::as_str).collect(),
            readers,
            ours: true,
        }
    }

    /// `config` is that of the adapter which the LoRA was made from; `parameters` are counted.
    pub fn of_lora(
        config: &BoneConfig,
        rank: usize,
        parameters: usize,
        modules: impl Iterator<Item = &'a String>,
        saved: impl Iterator<Item = &'a String>,
        base_model: Option<&'a str>,
    ) -> Self {
        let source = format!("{}, r = {}", config.init_weights.variant().name(), config.r);
        Self {
            base_model,
            tag: "lora",
            task_type: config.task_type,
            title: "LoRA adapter".into(),
            about: LORA,
            facts: vec![("rank", rank.to_string()), ("made from", source), ("parameters", parameters.to_string())],
            modules: modules.map(String::as_str).collect(),
            saved: saved.map(String::as_str).collect(),
            readers: "PEFT",
            ours: false,
        }
    }

    fn text(&self) -> String {
        let mut text = String::from("---\n");
        // A JSON string is a YAML string too, whatever is in it.
        if let Some(base) = self.base_model {
            let _ = writeln!(text, "base_model: {}", json!(base));
        }
        text += "library_name: peft\n";
        if self.task_type == Some(TaskType::CausalLm) {
            text += "pipeline_tag: text-generation\n";
        }
        text += "tags:\n";
        if let Some(base) = self.base_model {
            let _ = writeln!(text, "- {}", json!(format!("base_model:adapter:{base}")));
        }
        let _ = writeln!(text, "- onnx\n- {}", self.tag);
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
