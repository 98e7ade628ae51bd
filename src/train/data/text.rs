//! Texts become tokens, as the model's inputs want them.

use std::path::{Path, PathBuf};

use tokenizers::{EncodeInput, Encoding, PaddingDirection, Tokenizer, TruncationParams};

use super::column::{Growing, Padding};
use super::record::Numbers;
use super::{Axis, Field, roles};
use crate::onnx::DataType;
use crate::{Error, Result};

/// How text becomes tokens, and where it stands in files of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// A `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    pub text_field: String,
    /// The second text of a pair.
    pub text_pair_field: Option<String>,
    pub label_field: String,
    /// The texts of a pair, for losses that compare outputs.
    pub anchor_field: String,
    pub positive_field: String,
    /// `None`: the column `negative`, where there is one.
    pub negative_field: Option<String>,
    /// Tokens kept of a text, special ones included; `None`: as the tokenizer's file says, else 512.
    pub max_length: Option<usize>,
    /// Texts are joined and cut into rows of exactly `max_length` tokens, which are their own labels (`pack.rs`).
    pub packing: bool,
    /// The token that packing puts between texts; `None`: the one that the tokenizer has for it.
    pub eos_token: Option<String>,
}

impl Default for TextOptions {
    fn default() -> Self {
        let [anchor_field, positive_field, _] = roles::NAMES.map(String::from);
        Self {
            tokenizer: None,
            text_field: "text".into(),
            text_pair_field: None,
            label_field: "label".into(),
            anchor_field,
            positive_field,
            negative_field: None,
            max_length: None,
            packing: false,
            eos_token: None,
        }
    }
}

/// A part of an encoding, by the names exporters give to the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Ids,
    Mask,
    Types,
    Positions,
}

const PARTS: [(&str, Part); 6] = [
    ("input_ids", Part::Ids),
    ("attention_mask", Part::Mask),
    ("input_mask", Part::Mask),
    ("token_type_ids", Part::Types),
    ("segment_ids", Part::Types),
    ("position_ids", Part::Positions),
];

impl Part {
    pub fn of(input: &str) -> Option<Self> {
        PARTS.iter().find(|(name, _)| *name == input).map(|(_, part)| *part)
    }

    /// The names of inputs that are made from text.
    pub fn names() -> String {
        PARTS.map(|(name, _)| name).join(", ")
    }

    /// The narrowest type that holds it; batches are widened.
    fn data_type(self) -> DataType {
        match self {
            Part::Ids | Part::Positions => DataType::Int32,
            Part::Mask | Part::Types => DataType::Int8,
        }
    }

    fn values(self, encoding: &Encoding) -> Vec<i64> {
        let wide = |values: &[u32]| values.iter().map(|v| i64::from(*v)).collect();
        match self {
            Part::Ids => wide(encoding.get_ids()),
            Part::Mask => wide(encoding.get_attention_mask()),
            Part::Types => wide(encoding.get_type_ids()),
            Part::Positions => self.beside(encoding.len()),
        }
    }

    /// What goes with `len` tokens that a file holds ready.
    pub fn beside(self, len: usize) -> Vec<i64> {
        match self {
            Part::Mask => vec![1; len],
            Part::Positions => (0..len as i64).collect(),
            Part::Ids | Part::Types => vec![0; len],
        }
    }
}

/// A tokenizer that was set up for a model.
pub(super) struct Texts {
    pub file: PathBuf,
    tokenizer: Tokenizer,
    /// Tokens of a row at most.
    pub max_length: usize,
    pad_id: u32,
    pad_type_id: u32,
    left: bool,
    /// A model exported with a fixed sequence length wants that length in every batch.
    fixed: Option<usize>,
}

impl Texts {
    /// # Errors
    /// A file that is no tokenizer; a length that leaves no room for a token.
    pub fn open(file: &Path, options: &TextOptions, inputs: &[Field]) -> Result<Self> {
        if !file.is_file() {
            return Err(Error::config(format!(
                "{}: there is no such file; --tokenizer names a tokenizer.json",
                file.display()
            )));
        }
        let mut tokenizer = Tokenizer::from_file(file)
            .map_err(|e| Error::file(file, format!("this is not a tokenizer.json that can be read ({e})")))?;
        let failed = |e| Error::file(file, format!("the tokenizer failed: {e}"));
        let fixed = inputs.iter().find_map(|i| match i.dims.as_deref() {
            Some([_, Axis::Known(n)]) if Part::of(&i.name).is_some() => Some(*n),
            _ => None,
        });
        let padding = tokenizer.get_padding().cloned();
        let truncation = tokenizer.get_truncation().cloned().unwrap_or_default();
        let wanted = options.max_length.unwrap_or(truncation.max_length);
        let max_length = fixed.map_or(wanted, |n| wanted.min(n));
        tokenizer.with_padding(None).with_truncation(None).map_err(failed)?;
        let empty = match options.text_pair_field {
            Some(_) => tokenizer.encode(("", ""), true),
            None => tokenizer.encode("", true),
        };
        let special = empty.map_err(failed)?.len();
        if max_length <= special {
            return Err(Error::config(format!(
                "max-length is {max_length}, which leaves no room beside the tokenizer's {special} special tokens"
            )));
        }
        let truncation = TruncationParams { max_length, stride: 0, ..truncation };
        // Nothing of a text is cut off where the next row goes on with it.
        tokenizer.with_truncation((!options.packing).then_some(truncation)).map_err(failed)?;
        let pad_id = padding
            .as_ref()
            .map(|p| p.pad_id)
            .or_else(|| ["[PAD]", "<pad>", "<|endoftext|>"].iter().find_map(|t| tokenizer.token_to_id(t)))
            .unwrap_or(0);
        let left = padding.as_ref().is_some_and(|p| matches!(p.direction, PaddingDirection::Left));
        let pad_type_id = padding.map_or(0, |p| p.pad_type_id);
        Ok(Self { file: file.into(), tokenizer, max_length, pad_id, pad_type_id, left, fixed })
    }

    /// Tokens of texts and of pairs of them, on all cores.
    pub fn encode(&self, texts: Vec<EncodeInput>) -> Result<Vec<Encoding>> {
        let encoded = self.tokenizer.encode_batch(texts, true);
        encoded.map_err(|e| Error::file(&self.file, format!("the tokenizer failed: {e}")))
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// An empty column for one part of the encodings.
    pub fn column(&self, part: Part) -> Growing {
        let fill = match part {
            Part::Ids => self.pad_id.to_le_bytes().to_vec(),
            Part::Types => vec![self.pad_type_id as u8],
            Part::Mask => vec![0],
            Part::Positions => vec![0; 4],
        };
        Growing::padded(part.data_type(), Padding { fill, left: self.left, length: self.fixed })
    }
}

/// Appends one part of `encoding` to `column`.
pub(super) fn push(column: &mut Growing, part: Part, encoding: &Encoding) -> Result<(), String> {
    let values = part.values(encoding);
    column.push(&[values.len()], &Numbers::Int(values))
}
