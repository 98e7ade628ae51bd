//! Which columns of a file of records make up which input of the model, and how rows become them.

use std::path::Path;

use tokenizers::EncodeInput;

use super::column::{Column, Growing, Padding, number};
use super::image::{Album, Transform};
use super::labels::Labels;
use super::pack::{Packed, Packer, Packing};
use super::record::{Cell, Numbers, Record, Schema, Wanted};
use super::room::{Room, Store};
use super::text::{self, Part, Texts};
use super::{Axis, Field, ReadOptions, Roles, roles};
use crate::onnx::DataType;
use crate::{Error, Result, did_you_mean};

/// What an input is made of; columns by their places in [`Plan::wanted`].
enum Source {
    Column(usize),
    /// Numbers of several columns, one after the other.
    Joined(Vec<usize>),
    /// Of the text's encoding.
    Token(Part),
    /// Goes with the tokens that another column holds ready.
    Beside(Part, usize),
    Image(usize, Transform),
}

/// How rows become columns.
pub(super) struct Plan {
    pub wanted: Vec<Wanted>,
    /// The place of the label among `wanted`, where there is one.
    pub label: Option<usize>,
    /// How many rows of the inputs a record makes.
    pub roles: usize,
    label_name: String,
    /// A source for each role.
    inputs: Vec<(Field, Vec<Source>)>,
    texts: Option<Texts>,
    packing: Option<Packing>,
    /// For each role, the places of its text and of the second one of a pair; empty where no text is read.
    fields: Vec<(usize, Option<usize>)>,
}

/// Columns that are being filled.
enum Filling {
    Numbers(Growing),
    Images(Album),
}

impl Filling {
    fn stores(&mut self) -> Vec<&mut Store> {
        match self {
            Filling::Numbers(column) => column.stores().into(),
            Filling::Images(album) => vec![album.store()],
        }
    }
}

/// Adds a column to those that are wanted, once.
fn want(wanted: &mut Vec<Wanted>, column: &str, flag: &'static str) -> usize {
    wanted.iter().position(|w| w.column == column).unwrap_or_else(|| {
        wanted.push(Wanted { column: column.into(), flag });
        wanted.len() - 1
    })
}

impl Plan {
    /// For files with the columns of `schema`, which is that of `path`.
    ///
    /// # Errors
    /// A column that is not there; an input that nothing in the file can be made into.
    pub fn new(path: &Path, schema: &Schema, options: &ReadOptions) -> Result<Self> {
        let bad = |what: String| Error::data(format!("{}: {what}", path.display()));
        let texts = options.text.tokenizer.as_ref();
        let texts = texts.map(|file| Texts::open(file, options.text, options.inputs)).transpose()?;
        let names = || options.inputs.iter().map(|i| i.name.as_str()).chain([options.labels]);
        if let Some((name, _)) = options.map.iter().find(|(name, _)| !names().any(|n| n == name)) {
            let all: Vec<&str> = names().collect();
            return Err(Error::config(format!(
                "map: {name} is neither an input of the model nor the labels (those are {}).{}",
                all.join(", "),
                did_you_mean(name, names())
            )));
        }
        let mut plan = Plan {
            wanted: Vec::new(),
            label: None,
            roles: roles(schema, options).map_err(bad)?,
            label_name: options.labels.into(),
            inputs: Vec::new(),
            texts,
            packing: None,
            fields: Vec::new(),
        };
        for input in options.inputs {
            let sources = match plan.roles {
                1 => vec![plan.source(input, schema, options).map_err(|e| e.at(path))?],
                count => {
                    let roles = roles::NAMES.iter().take(count);
                    roles.map(|role| plan.source_of(role, input, schema)).collect::<Result<_, _>>().map_err(bad)?
                }
            };
            plan.inputs.push((input.clone(), sources));
        }
        if plan.inputs.iter().flat_map(|(_, sources)| sources).any(|source| matches!(source, Source::Token(_))) {
            let text = options.text;
            let wanted = &mut plan.wanted;
            plan.fields = match options.roles {
                Roles::One => {
                    let first = want(wanted, &text.text_field, "--text-field");
                    let pair = text.text_pair_field.as_ref();
                    vec![(first, pair.map(|field| want(wanted, field, "--text-pair-field")))]
                }
                Roles::Pair | Roles::Triple => {
                    let negative = text.negative_field.as_deref().unwrap_or(roles::NAMES[2]);
                    let fields = [
                        (text.anchor_field.as_str(), "--anchor-field"),
                        (&text.positive_field, "--positive-field"),
                        (negative, "--negative-field"),
                    ];
                    fields.into_iter().take(plan.roles).map(|(field, flag)| (want(wanted, field, flag), None)).collect()
                }
            };
        }
        if options.text.packing {
            plan.packing = Some(plan.packing(options)?);
        } else if options.kind.is_some() {
            let has = |name: &str| schema.columns.iter().any(|c| c == name);
            plan.label = Some(match mapped(options, options.labels) {
                Some([column]) => want(&mut plan.wanted, column, "--map"),
                Some(_) => return Err(bad(format!("map {}: labels are one column", options.labels))),
                // The name that arrays and the trainers of transformers use.
                None if !has(&options.text.label_field) && has(options.labels) => {
                    want(&mut plan.wanted, options.labels, "--label-field")
                }
                None => want(&mut plan.wanted, &options.text.label_field, "--label-field"),
            });
        }
        for wanted in &plan.wanted {
            wanted.position(path, &schema.columns)?;
        }
        Ok(plan)
    }

    /// How texts are packed, where all that the model reads is made of them.
    fn packing(&self, options: &ReadOptions) -> Result<Packing> {
        let other = self.inputs.iter().find(|(_, sources)| !matches!(sources[..], [Source::Token(_)]));
        let (Some(texts), None) = (&self.texts, other) else {
            let input = other.map_or("input_ids", |(input, _)| &input.name);
            return Err(Error::config(format!(
                "packing joins texts, but the model's input {input} is not made of text here; give texts and --tokenizer, \
                 or leave out --packing"
            )));
        };
        if options.text.text_pair_field.is_some() {
            return Err(Error::config("packing joins texts, not pairs of them; leave out --text-pair-field"));
        }
        if mapped(options, options.labels).is_some() {
            return Err(Error::config(format!(
                "with packing the tokens are their own labels; leave out --map {}=…",
                options.labels
            )));
        }
        Packing::new(texts, options.text)
    }

    /// What `input` is made of.
    fn source(&mut self, input: &Field, schema: &Schema, options: &ReadOptions) -> Result<Source, Unfit> {
        let wanted = &mut self.wanted;
        let has = |name: &str| schema.columns.iter().any(|c| c == name);
        let image = |wanted: &mut Vec<Wanted>, column: &str, flag| match Transform::new(input, options.image)? {
            Some(transform) => Ok(Source::Image(want(wanted, column, flag), transform)),
            None => Err(Unfit::Data(format!(
                "the model's input {} takes no images: those have the shape [batch, channels, height, width] or [batch, \
                 height, width, channels] with 1 or 3 channels",
                input.name
            ))),
        };
        if let Some(columns) = mapped(options, &input.name) {
            let columns = patterns(columns, &schema.columns);
            let columns = columns.map_err(|what| Unfit::Data(format!("map {}: {what}", input.name)))?;
            return match columns.as_slice() {
                [one] if schema.images.contains(one) => image(wanted, one, "--map"),
                [one] => Ok(Source::Column(want(wanted, one, "--map"))),
                all => Ok(Source::Joined(all.iter().map(|c| want(wanted, c, "--map")).collect())),
            };
        }
        let part = Part::of(&input.name);
        if let (Some(part), Some(_)) = (part, &self.texts) {
            return Ok(Source::Token(part));
        }
        if has(&input.name) && !schema.images.contains(&input.name) {
            return Ok(Source::Column(want(wanted, &input.name, "--map")));
        }
        let numbered = numbered(&input.name, &schema.columns);
        if !numbered.is_empty() {
            return Ok(Source::Joined(numbered.iter().map(|c| want(wanted, c, "--map")).collect()));
        }
        if let (Some(part), Some(ids)) = (part.filter(|p| *p != Part::Ids), ids(options, schema)) {
            return Ok(Source::Beside(part, want(wanted, ids, "--map")));
        }
        if part.is_some() && has(&options.text.text_field) {
            return Err(Unfit::Data("text needs --tokenizer tokenizer.json".into()));
        }
        if let Some((column, flag)) = image_column(options, schema) {
            return image(wanted, column, flag);
        }
        Err(Unfit::Data(format!(
            "nothing in it is the model's input {} (there are: {}); name a column for it with --map {}=COLUMN. From text, \
             with --tokenizer, come {}.{}",
            input.name,
            schema.columns.join(", "),
            input.name,
            Part::names(),
            did_you_mean(&input.name, schema.columns.iter().map(String::as_str))
        )))
    }

    /// What `input` is made of for one of several roles: its text, or the column `role.input`.
    fn source_of(&mut self, role: &str, input: &Field, schema: &Schema) -> Result<Source, String> {
        if let (Some(part), Some(_)) = (Part::of(&input.name), &self.texts) {
            return Ok(Source::Token(part));
        }
        let column = format!("{role}.{}", input.name);
        if schema.columns.contains(&column) {
            return Ok(Source::Column(want(&mut self.wanted, &column, "--map")));
        }
        Err(format!(
            "there is no column {column} for the model's input {} (there are: {}). From text, with --tokenizer, come {}",
            input.name,
            schema.columns.join(", "),
            Part::names()
        ))
    }

    /// Empty columns to fill, within `room`.
    pub fn start<'a>(&'a self, labels: &'a Labels, room: &'a Room) -> Building<'a> {
        let inputs = self.inputs.iter().map(|(input, sources)| match (sources.first(), &self.texts) {
            (Some(Source::Image(_, transform)), _) => Filling::Images(Album::new(transform.clone())),
            (Some(Source::Token(part)), Some(texts)) => Filling::Numbers(texts.column(*part)),
            _ => Filling::Numbers(numbers(input)),
        });
        let packer = self.packing.map(Packer::new);
        Building { plan: self, labels, room, inputs: inputs.collect(), label: labels.column(), packer }
    }
}

/// A column for the numbers of `input`: of its type, and of its shape as far as it is fixed.
fn numbers(input: &Field) -> Growing {
    let data_type = input.data_type.unwrap_or(DataType::Float);
    let dims = input.dims.as_deref().unwrap_or_default();
    let known = |axis: &Axis| if let Axis::Known(n) = axis { Some(*n) } else { None };
    match dims.get(1..).map(|row| row.iter().map(known).collect::<Vec<_>>()) {
        Some(row) if row.first().is_some_and(Option::is_none) => {
            let zero = vec![0; element(data_type)];
            Growing::padded(data_type, Padding { fill: zero, ..Default::default() })
        }
        Some(row) => Growing::new(data_type, row.into_iter().collect()),
        None => Growing::new(data_type, None),
    }
}

/// Bytes of one number.
fn element(data_type: DataType) -> usize {
    match data_type {
        DataType::Int64 | DataType::Uint64 | DataType::Double => 8,
        DataType::Int32 | DataType::Uint32 | DataType::Float => 4,
        DataType::Int16 | DataType::Uint16 | DataType::Float16 | DataType::Bfloat16 => 2,
        _ => 1,
    }
}

/// Why an input cannot be made.
enum Unfit {
    /// Of the file.
    Data(String),
    Other(Error),
}

impl Unfit {
    fn at(self, path: &Path) -> Error {
        match self {
            Unfit::Data(what) => Error::data(format!("{}: {what}", path.display())),
            Unfit::Other(error) => error,
        }
    }
}

impl From<Error> for Unfit {
    fn from(error: Error) -> Self {
        Unfit::Other(error)
    }
}

/// The columns that `--map` gives a name.
fn mapped<'a>(options: &ReadOptions<'a>, name: &str) -> Option<&'a [String]> {
    options.map.iter().find(|(input, _)| input == name).map(|(_, columns)| columns.as_slice())
}

/// How many rows of the inputs a record makes; the file says whether there are negatives.
fn roles(schema: &Schema, options: &ReadOptions) -> Result<usize, String> {
    let negative = roles::NAMES[2];
    let has =
        schema.columns.iter().any(|c| c == negative || c.strip_prefix(negative).is_some_and(|c| c.starts_with('.')));
    let count = options.roles.count(has || options.text.negative_field.is_some());
    count.map_err(|what| format!("{what}; name its field with --negative-field"))
}

/// `x_0, x_1, …` in the order of their numbers, for the input `x`.
fn numbered(input: &str, columns: &[String]) -> Vec<String> {
    let number = |column: &String| -> Option<u32> {
        let rest = column.strip_prefix(input)?.strip_prefix(['_', '.'])?;
        rest.bytes().all(|b| b.is_ascii_digit()).then(|| rest.parse().ok()).flatten()
    };
    let mut found: Vec<(u32, &String)> = columns.iter().filter_map(|c| Some((number(c)?, c))).collect();
    found.sort();
    found.into_iter().map(|(_, column)| column.clone()).collect()
}

/// The columns that names and patterns such as `pixel*` stand for, the latter in the file's order.
fn patterns(wanted: &[String], columns: &[String]) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for name in wanted {
        if columns.contains(name) || !name.contains('*') {
            found.push(name.clone());
            continue;
        }
        let pattern = glob::Pattern::new(name).map_err(|e| format!("{name} is no pattern ({e})"))?;
        let before = found.len();
        found.extend(columns.iter().filter(|c| pattern.matches(c)).cloned());
        if found.len() == before {
            return Err(format!("no column is named {name} (there are: {})", columns.join(", ")));
        }
    }
    Ok(found)
}

/// The column with tokens that a file holds ready.
fn ids<'a>(options: &ReadOptions<'a>, schema: &'a Schema) -> Option<&'a str> {
    let input = options.inputs.iter().find(|i| Part::of(&i.name) == Some(Part::Ids))?;
    match mapped(options, &input.name) {
        Some([column]) => Some(column),
        Some(_) => None,
        None => schema.columns.iter().find(|c| **c == input.name).map(String::as_str),
    }
}

/// The column with images: the one that is asked for, the only one that holds images, or `image`.
fn image_column<'a>(options: &ReadOptions<'a>, schema: &'a Schema) -> Option<(&'a str, &'static str)> {
    let flag = "--image-field";
    match (&options.image.field, schema.images.as_slice()) {
        (Some(field), _) => Some((field, flag)),
        (None, [only]) => Some((only, flag)),
        (None, _) => schema.columns.iter().find(|c| *c == "image").map(|c| (c.as_str(), flag)),
    }
}

/// Columns that are filled row by row.
pub(super) struct Building<'a> {
    plan: &'a Plan,
    labels: &'a Labels,
    room: &'a Room,
    inputs: Vec<Filling>,
    label: Option<Growing>,
    packer: Option<Packer>,
}

impl Building<'_> {
    /// Appends rows.
    ///
    /// # Errors
    /// Names the file and the line or row, the field, and what was wanted; a disk that is full.
    pub fn push(&mut self, mut records: Vec<Record>) -> Result<()> {
        let wanted = &self.plan.wanted;
        let refused = |record: &Record, at: usize, what: String| {
            record.place.error(format!("field {:?} {what}", wanted[at].column))
        };
        let mut encodings = Vec::new();
        if let (Some(texts), false) = (&self.plan.texts, self.plan.fields.is_empty()) {
            let mut inputs = Vec::with_capacity(records.len() * self.plan.roles);
            for record in &records {
                let text = |at: usize| match &record.cells[at] {
                    Cell::Raw(text) | Cell::Text(text) => Ok(text.as_str()),
                    Cell::Null => Err(refused(record, at, "is empty; every row needs a text".into())),
                    other => Err(refused(record, at, format!("is {other}, not a string"))),
                };
                for (first, second) in &self.plan.fields {
                    inputs.push(match second {
                        Some(second) => EncodeInput::from((text(*first)?, text(*second)?)),
                        None => EncodeInput::from(text(*first)?),
                    });
                }
            }
            encodings = texts.encode(inputs)?;
        }
        if self.packer.is_some() {
            encodings.iter().try_for_each(|encoding| self.pack(encoding.get_ids()))?;
            return self.settle();
        }
        let roles = self.plan.roles;
        for (row, record) in records.iter_mut().enumerate() {
            for ((_, sources), filling) in self.plan.inputs.iter().zip(&mut self.inputs) {
                for (role, source) in sources.iter().enumerate() {
                    let (at, pushed) = match (source, &mut *filling) {
                        (Source::Column(at), Filling::Numbers(column)) => (*at, column.push_cell(&record.cells[*at])),
                        (Source::Joined(all), Filling::Numbers(column)) => {
                            let mut joined = Numbers::Int(Vec::new());
                            for at in all {
                                let number = number(&record.cells[*at]);
                                joined.push(number.map_err(|what| refused(record, *at, what))?);
                            }
                            (all[0], column.push(&[joined.len()], &joined))
                        }
                        (Source::Token(part), Filling::Numbers(column)) => {
                            let pushed = encodings.get(row * roles + role).map(|e| text::push(column, *part, e));
                            (self.plan.fields[role].0, pushed.unwrap_or(Ok(())))
                        }
                        (Source::Beside(part, at), Filling::Numbers(column)) => {
                            let pushed = match &record.cells[*at] {
                                Cell::Array { dims, numbers } if dims.len() == 1 => {
                                    column.push(dims, &Numbers::Int(part.beside(numbers.len())))
                                }
                                other => Err(format!("is {other}, not a list of tokens")),
                            };
                            (*at, pushed)
                        }
                        (Source::Image(at, _), Filling::Images(album)) => {
                            let cell = std::mem::replace(&mut record.cells[*at], Cell::Null);
                            (*at, album.push(cell, &record.place))
                        }
                        _ => continue,
                    };
                    pushed.map_err(|what| refused(record, at, what))?;
                }
            }
            if let (Some(at), Some(column)) = (self.plan.label, &mut self.label) {
                self.labels.push(&record.cells[at], column).map_err(|what| refused(record, at, what))?;
            }
        }
        self.settle()
    }

    /// Keeps what lies in memory within its bound.
    fn settle(&mut self) -> Result<()> {
        let label = self.label.iter_mut().flat_map(Growing::stores);
        self.room.settle(self.inputs.iter_mut().flat_map(Filling::stores).chain(label))
    }

    /// Appends the rows that `tokens` fill, together with what was left of the texts before.
    fn pack(&mut self, tokens: &[u32]) -> Result<()> {
        let rows = self.packer.as_mut().map(|packer| packer.push(tokens)).unwrap_or_default();
        for row in rows {
            let dims = [row.len()];
            for ((_, sources), filling) in self.plan.inputs.iter().zip(&mut self.inputs) {
                if let ([Source::Token(part)], Filling::Numbers(column)) = (&sources[..], filling) {
                    let values = if *part == Part::Ids { row.clone() } else { part.beside(row.len()) };
                    column.push(&dims, &Numbers::Int(values)).map_err(Error::data)?;
                }
            }
            let labels = self.label.as_mut().map(|column| column.push(&dims, &Numbers::Int(row)));
            labels.transpose().map_err(Error::data)?;
        }
        Ok(())
    }

    /// What has come of packing so far.
    pub fn packed(&self) -> Option<Packed> {
        self.packer.as_ref().map(Packer::packed)
    }

    /// The columns by name, the labels last.
    pub fn finish(self) -> Result<Vec<(String, Column)>> {
        let mut columns = Vec::with_capacity(self.inputs.len() + 1);
        for ((input, _), filling) in self.plan.inputs.iter().zip(self.inputs) {
            let column = match filling {
                Filling::Numbers(growing) => growing.finish(self.room)?,
                Filling::Images(album) => Column::Images(album.finish(self.room)?),
            };
            columns.push((input.name.clone(), column));
        }
        if let Some(labels) = self.label {
            columns.push((self.plan.label_name.clone(), labels.finish(self.room)?));
        }
        Ok(columns)
    }
}
