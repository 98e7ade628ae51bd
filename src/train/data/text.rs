//! Lines of JSON with a text and a label, or with texts to compare: tokenized as the model's inputs want it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::{Encoding, PaddingDirection, Tokenizer, TruncationParams};

use super::{Array, Axis, Column, Dataset, LabelKind, Padding, ReadOptions, Roles, roles};
use crate::onnx::Tensor;
use crate::{Error, Result, did_you_mean};

/// How text becomes tokens. Only `.jsonl` data needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// A `tokenizer.json`.
    pub tokenizer: Option<PathBuf>,
    pub text_field: String,
    pub label_field: String,
    /// Fields of the texts of a pair, for losses that compare outputs.
    pub anchor_field: String,
    pub positive_field: String,
    /// `None`: the field `negative`, where the first line has it.
    pub negative_field: Option<String>,
    /// Tokens kept of a text, special ones included; `None`: as the tokenizer's file says, else 512.
    pub max_length: Option<usize>,
}

impl Default for TextOptions {
    fn default() -> Self {
        let [anchor_field, positive_field, _] = roles::NAMES.map(String::from);
        let (text_field, label_field) = ("text".into(), "label".into());
        Self {
            tokenizer: None,
            text_field,
            label_field,
            anchor_field,
            positive_field,
            negative_field: None,
            max_length: None,
        }
    }
}

/// What an encoding offers, by the names exporters give to the inputs.
const SOURCES: [(&[&str], Source); 4] = [
    (&["input_ids"], |e| e.get_ids().iter().map(|v| i64::from(*v)).collect()),
    (&["attention_mask", "input_mask"], |e| e.get_attention_mask().iter().map(|v| i64::from(*v)).collect()),
    (&["token_type_ids", "segment_ids"], |e| e.get_type_ids().iter().map(|v| i64::from(*v)).collect()),
    (&["position_ids"], |e| (0..e.len() as i64).collect()),
];

type Source = fn(&Encoding) -> Vec<i64>;

/// One line's label as it stands.
#[derive(Debug, Clone, PartialEq)]
enum Label {
    Id(i64),
    Name(String),
    Number(f32),
}

/// Reads and tokenizes all of `path`.
pub(super) fn read(path: &Path, options: &ReadOptions) -> Result<Dataset> {
    let Lines { texts, labels } = lines(path, options)?;
    let (rows, roles) = (texts[0].len(), texts.len());
    let mut columns = Vec::new();
    if rows > 0 {
        columns = tokenize(path, &texts.concat(), options)?;
    }
    let mut label_names = None;
    if let Some(kind) = options.kind {
        let (column, names) = label_column(path, labels, kind, options)?;
        columns.push((options.labels.to_string(), column));
        label_names = names;
    }
    Ok(Dataset { path: path.into(), columns, rows, roles, label_names })
}

/// What is read of every line that is not blank.
struct Lines {
    /// The texts of each role; at least of one.
    texts: Vec<Vec<String>>,
    /// With the number of their line.
    labels: Vec<(usize, Label)>,
}

/// The fields with the texts, and the flags that name them.
fn text_fields<'a>(
    options: &'a ReadOptions,
    first: &Map<String, Value>,
) -> Result<Vec<(&'a str, &'static str)>, String> {
    let text = options.text;
    if options.roles == Roles::One {
        return Ok(vec![(&text.text_field, "--text-field")]);
    }
    let negatives = text.negative_field.is_some() || first.contains_key(roles::NAMES[2]);
    let count =
        options.roles.count(negatives).map_err(|what| format!("{what}; name its field with --negative-field"))?;
    let negative = text.negative_field.as_deref().unwrap_or(roles::NAMES[2]);
    let mut fields = vec![
        (text.anchor_field.as_str(), "--anchor-field"),
        (&text.positive_field, "--positive-field"),
        (negative, "--negative-field"),
    ];
    fields.truncate(count);
    Ok(fields)
}

fn lines(path: &Path, options: &ReadOptions) -> Result<Lines> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let (mut texts, mut labels) = (vec![Vec::new()], Vec::new());
    let mut fields = Vec::new();
    for (number, line) in bytes.split(|b| *b == b'\n').enumerate().map(|(i, l)| (i + 1, l)) {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let bad = |what: String| Error::data(format!("{}:{number}: {what}", path.display()));
        let record: Value =
            serde_json::from_slice(line).map_err(|e| bad(format!("not a JSON value ({e}); one object a line")))?;
        let Value::Object(record) = record else {
            return Err(bad("not a JSON object; one object a line was expected".into()));
        };
        let field = |name: &str, flag: &str| {
            record.get(name).ok_or_else(|| {
                let near = did_you_mean(name, record.keys().map(String::as_str));
                let there: Vec<&str> = record.keys().map(String::as_str).collect();
                bad(format!("no field {name:?} (there are: {}); name it with {flag}.{near}", there.join(", ")))
            })
        };
        if fields.is_empty() {
            fields = text_fields(options, &record).map_err(bad)?;
            texts = vec![Vec::new(); fields.len()];
        }
        for ((name, flag), texts) in fields.iter().zip(&mut texts) {
            match field(name, flag)? {
                Value::String(text) => texts.push(text.clone()),
                other => return Err(bad(format!("field {name:?} is {other}, not a string"))),
            }
        }
        let Some(kind) = options.kind else { continue };
        let value = field(&options.text.label_field, "--label-field")?;
        let label = match (value, kind) {
            (Value::String(name), LabelKind::Class) => Some(Label::Name(name.clone())),
            (Value::Number(n), LabelKind::Class) => n.as_i64().map(Label::Id),
            (Value::Number(n), LabelKind::Number) => n.as_f64().map(|v| Label::Number(v as f32)),
            _ => None,
        };
        let label = label.ok_or_else(|| {
            let wanted = match kind {
                LabelKind::Class => "a class id (an integer) or a class name (a string) for cross-entropy",
                LabelKind::Number => "a number for mse",
            };
            bad(format!("field {:?} is {value}; the label has to be {wanted}", options.text.label_field))
        })?;
        labels.push((number, label));
    }
    Ok(Lines { texts, labels })
}

/// Labels as one column. Names get the ids of their sorted order, or those that `options.label_names` fixed.
fn label_column(
    path: &Path,
    labels: Vec<(usize, Label)>,
    kind: LabelKind,
    options: &ReadOptions,
) -> Result<(Column, Option<Vec<String>>)> {
    let bad = |line: usize, what: String| Error::data(format!("{}:{line}: {what}", path.display()));
    let by_name = labels.iter().any(|(_, l)| matches!(l, Label::Name(_)));
    let names: Option<Vec<String>> = by_name.then(|| match options.label_names {
        Some(fixed) => fixed.to_vec(),
        None => {
            let names: BTreeSet<&String> =
                labels.iter().filter_map(|(_, l)| if let Label::Name(n) = l { Some(n) } else { None }).collect();
            names.into_iter().cloned().collect()
        }
    });
    let rows = labels.len();
    let tensor = match kind {
        LabelKind::Number => {
            Tensor::new(&[rows], labels.iter().map(|(_, l)| if let Label::Number(v) = l { *v } else { 0.0 }).collect())
        }
        LabelKind::Class => {
            let mut ids = Vec::with_capacity(rows);
            for (line, label) in labels {
                ids.push(match (label, &names) {
                    (Label::Id(id), None) => id,
                    (Label::Name(name), Some(names)) => names.binary_search(&name).map(|i| i as i64).map_err(|_| {
                        let near = did_you_mean(&name, names.iter().map(String::as_str));
                        bad(line, format!("label {name:?} does not occur in the training data.{near}"))
                    })?,
                    _ => return Err(bad(line, "labels are class ids on some lines and names on others".into())),
                });
            }
            Tensor::new(&[rows], ids)
        }
    };
    let array = Array { data_type: tensor.data_type(), dims: vec![rows], bytes: tensor.to_bytes().into() };
    Ok((Column::Dense(array), names))
}

/// One column for every input of the model.
fn tokenize(path: &Path, texts: &[String], options: &ReadOptions) -> Result<Vec<(String, Column)>> {
    let Some(file) = &options.text.tokenizer else {
        return Err(Error::config(format!("{}: text needs --tokenizer tokenizer.json", path.display())));
    };
    if !file.is_file() {
        return Err(Error::config(format!(
            "{}: there is no such file; --tokenizer names a tokenizer.json",
            file.display()
        )));
    }
    let mut tokenizer = Tokenizer::from_file(file)
        .map_err(|e| Error::file(file, format!("this is not a tokenizer.json that can be read ({e})")))?;
    let failed = |e| Error::file(file, format!("the tokenizer failed: {e}"));

    // A model exported with a fixed sequence length wants that length in every batch.
    let fixed = options.inputs.iter().find_map(|i| match i.dims.as_deref() {
        Some([_, Axis::Known(n)]) if source(&i.name).is_some() => Some(*n),
        _ => None,
    });
    let padding = tokenizer.get_padding().cloned();
    let wanted = options.text.max_length.or(tokenizer.get_truncation().map(|t| t.max_length)).unwrap_or(512);
    let max_length = fixed.map_or(wanted, |n| wanted.min(n));
    tokenizer.with_padding(None).with_truncation(None).map_err(failed)?;
    let special = tokenizer.encode("", true).map_err(failed)?.len();
    if max_length <= special {
        return Err(Error::config(format!(
            "max-length is {max_length}, which leaves no room beside the tokenizer's {special} special tokens"
        )));
    }
    tokenizer.with_truncation(Some(TruncationParams { max_length, ..Default::default() })).map_err(failed)?;
    let pad_id = padding
        .as_ref()
        .map(|p| p.pad_id)
        .or_else(|| ["[PAD]", "<pad>", "<|endoftext|>"].iter().find_map(|t| tokenizer.token_to_id(t)))
        .unwrap_or(0);
    let left = padding.as_ref().is_some_and(|p| matches!(p.direction, PaddingDirection::Left));
    let encodings = tokenizer.encode_batch(texts.iter().map(String::as_str).collect(), true).map_err(failed)?;

    options
        .inputs
        .iter()
        .map(|input| {
            let source = source(&input.name).ok_or_else(|| {
                let known: Vec<&str> = SOURCES.iter().flat_map(|(names, _)| *names).copied().collect();
                Error::data(format!(
                    "{}: the model's input {} cannot be made from text (known are {}); give arrays in a .safetensors \
                     or .npz file instead",
                    path.display(),
                    input.name,
                    known.join(", ")
                ))
            })?;
            let value = match input.name.as_str() {
                "input_ids" => i64::from(pad_id),
                "token_type_ids" | "segment_ids" => i64::from(padding.as_ref().map_or(0, |p| p.pad_type_id)),
                _ => 0,
            };
            let rows = encodings.iter().map(source).collect();
            Ok((input.name.clone(), Column::Ragged { rows, padding: Padding { value, left, length: fixed } }))
        })
        .collect()
}

fn source(input: &str) -> Option<Source> {
    SOURCES.iter().find(|(names, _)| names.contains(&input)).map(|(_, source)| *source)
}
