//! Training data: columns of rows by name, read from files of arrays or of records, handed out in batches.
//!
//! What `--data` names is found by `files`, whose table has a line for every kind of file. Arrays come as they are.
//! Records (`jsonl`, `csv`, `arrow`, `folder`) come row by row; a `plan` says which of their columns make up which
//! input of the model, and turns text into tokens and lists into arrays. What is made of
//! them stays in memory as far as there is `room`. Batches are made `ahead` of the step that they are for.

mod ahead;
mod arrays;
mod arrow;
mod batch;
mod column;
mod csv;
mod files;
mod fit;
mod folder;
mod image;
mod jsonl;
mod labels;
mod npz;
mod pack;
mod plan;
mod record;
mod roles;
mod room;
mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use ahead::{Portion, Portions, ahead};
pub use batch::Batches;
pub use fit::{Axis, Batch, Feed, Field, IGNORE, Target};
pub use image::ImageOptions;
pub use pack::Packed;
pub use roles::Roles;
pub use room::Room;
pub use text::TextOptions;

use crate::onnx::Tensor;
use crate::{Error, Result};
use column::{Array, Column};
use files::{Files, Read};
use labels::{Labels, Seen};
use plan::Plan;
use record::{RecordFormat, Records};

/// What a label is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelKind {
    /// A class id from 0, or −100 for "ignore".
    Class,
    /// A number to come close to.
    Number,
}

/// How data files are to be read.
#[derive(Debug, Clone)]
pub struct ReadOptions<'a> {
    /// The model's inputs, which say what columns rows are turned into.
    pub inputs: &'a [Field],
    /// Name of the label column.
    pub labels: &'a str,
    /// What the labels are; `None`: there are none.
    pub kind: Option<LabelKind>,
    pub roles: Roles,
    /// How many classes the output scores, where that is known and labels are classes.
    pub classes: Option<usize>,
    /// For files of records, the columns that make up an input or the labels; several are joined.
    pub map: &'a [(String, Vec<String>)],
    pub text: &'a TextOptions,
    pub image: &'a ImageOptions,
    /// Class names in order of their ids, where another file (the training data) has fixed them.
    pub label_names: Option<&'a [String]>,
    pub room: &'a Room,
}

/// Rows of data files, column by column.
#[derive(Debug)]
pub struct Dataset {
    /// Where it was read from (for messages).
    pub path: PathBuf,
    /// All have [`Dataset::rows`] rows, and the inputs that times [`Dataset::roles`], those of a sample in succession.
    columns: Vec<(String, Column)>,
    rows: usize,
    roles: usize,
    /// Class names in order of their ids, where labels were given as text.
    pub label_names: Option<Vec<String>>,
    /// How its rows came of texts that were packed.
    pub packed: Option<Packed>,
}

/// Rows that are tokenized at a time, and about how many bytes of them at most.
const CHUNK: usize = 1024;
const CHUNK_BYTES: usize = 8 << 20;

impl Dataset {
    /// Reads all of `paths`: files, globs, folders that `datasets` saved, folders of images. Files are told apart by
    /// their extensions, and all are of one kind.
    ///
    /// # Errors
    /// Names the file and the array, line or row that cannot be used; no rows at all is one of them.
    pub fn open(paths: &[PathBuf], options: &ReadOptions) -> Result<Self> {
        let files = Files::find(paths)?;
        let dataset = match files.format.read {
            Read::Arrays(_) if options.text.packing => {
                return Err(Error::data(format!(
                    "{}: packing joins texts, and this is a file of arrays; leave out --packing",
                    files.name().display()
                )));
            }
            Read::Arrays(read) => {
                let parts = files.paths.iter().map(|path| {
                    let rows = Self::of_arrays(path, read(path, options.room)?)?;
                    roles::stack(rows, options.roles)
                });
                Self::join(files.name(), parts.collect::<Result<_>>()?)?
            }
            Read::Records(format) => Self::of_records(&files, format, options)?,
        };
        if dataset.rows == 0 {
            return Err(Error::data(format!(
                "{}: it holds no rows; there is nothing to train on",
                dataset.path.display()
            )));
        }
        Ok(dataset)
    }

    fn of_arrays(path: &Path, arrays: Vec<(String, Array)>) -> Result<Self> {
        let column = |a: Array| if a.dims.is_empty() { Column::Single(a) } else { Column::Dense(a) };
        let columns: Vec<(String, Column)> = arrays.into_iter().map(|(name, a)| (name, column(a))).collect();
        let counted = columns.iter().filter(|(_, c)| !matches!(c, Column::Single(_)));
        let rows = counted.map(|(name, c)| (name, c.rows())).collect::<Vec<_>>();
        let Some((first, count)) = rows.first().copied() else {
            return Err(Error::data(format!("{}: it holds no arrays of rows", path.display())));
        };
        if let Some((name, other)) = rows.iter().find(|(_, n)| *n != count) {
            return Err(Error::data(format!(
                "{}: every array has one row per sample, but {first} has {count} and {name} has {other}",
                path.display()
            )));
        }
        Ok(Self { path: path.into(), rows: count, roles: 1, columns, label_names: None, packed: None })
    }

    /// The rows of several files of arrays.
    fn join(path: PathBuf, parts: Vec<Self>) -> Result<Self> {
        let rows = parts.iter().map(|part| part.rows).sum();
        let roles = parts.first().map_or(1, |part| part.roles);
        let mut columns: BTreeMap<String, Vec<Column>> = BTreeMap::new();
        let count = parts.len();
        for (name, column) in parts.into_iter().flat_map(|part| part.columns) {
            columns.entry(name).or_default().push(column);
        }
        let join = |(name, parts): (String, Vec<Column>)| {
            let bad = |what: String| Error::data(format!("{}: array {name}: {what}", path.display()));
            if parts.len() < count {
                return Err(bad("it is not in all of the files".into()));
            }
            let column = Column::join(parts).map_err(bad)?;
            Ok((name, column))
        };
        let columns = columns.into_iter().map(join).collect::<Result<_>>()?;
        Ok(Self { path, columns, rows, roles, label_names: None, packed: None })
    }

    fn of_records(files: &Files, format: RecordFormat, options: &ReadOptions) -> Result<Self> {
        let Some(first) = files.paths.first() else { return Err(Error::config("no data file was given")) };
        let path = files.name();
        let mut schema = (format.schema)(first)?;
        if schema.columns.is_empty() {
            return Err(Error::data(format!("{}: it holds no rows; there is nothing to train on", first.display())));
        }
        let header = schema.line.map_or(first.clone(), |line| format!("{}:{line}", first.display()).into());
        let plan = Plan::new(&header, &schema, options)?;
        let open = || -> Result<Records> {
            let files = files.paths.iter().map(|path| (format.open)(path, &plan.wanted));
            Ok(Box::new(files.collect::<Result<Vec<_>>>()?.into_iter().flatten()))
        };
        // Class names are known once all rows were seen; a file may list them, too.
        let key = &plan.wanted[plan.label.unwrap_or(0)];
        let listed = schema.classes.iter().position(|(column, _)| *column == key.column);
        let listed = listed.map(|at| schema.classes.swap_remove(at).1);
        // What is packed is its own label.
        let kind = options.kind.filter(|_| !options.text.packing);
        let listed = listed.filter(|_| kind == Some(LabelKind::Class));
        if let (Some(listed), Some(fixed)) = (&listed, options.label_names)
            && listed != fixed
        {
            return Err(Error::data(format!(
                "{}: its classes are {}, but those of the training data {}",
                path.display(),
                listed.join(", "),
                fixed.join(", ")
            )));
        }
        let mut seen = Seen::new(kind, options.classes);
        for path in &files.paths {
            for record in (format.open)(path, std::slice::from_ref(key))? {
                let record = record?;
                seen.add(&record.place, &record.cells[0], &key.column)?;
            }
        }
        let rows = seen.rows;
        let names = match (options.label_names, listed, seen.names()?) {
            (Some(fixed), _, Some(_)) => Some(fixed.to_vec()),
            (_, Some(listed), _) => Some(listed),
            (_, None, found) => found,
        };
        if let (Some(names), Some(classes)) = (&names, options.classes.filter(|_| options.label_names.is_none()))
            && names.len() > classes
        {
            return Err(Error::data(format!(
                "{}: it has {} classes ({}), but the output only {classes}",
                path.display(),
                names.len(),
                names.join(", ")
            )));
        }
        let labels = Labels::new(options.kind, names.as_deref());
        let mut building = plan.start(&labels, options.room);
        let (mut chunk, mut bytes) = (Vec::with_capacity(CHUNK), 0);
        for record in open()? {
            let record = record?;
            bytes += record.size();
            chunk.push(record);
            if chunk.len() == CHUNK || bytes >= CHUNK_BYTES {
                building.push(std::mem::take(&mut chunk))?;
                bytes = 0;
            }
        }
        building.push(chunk)?;
        let packed = building.packed();
        if let Some(Packed { texts, rows: 0, length, left_out }) = packed {
            return Err(Error::data(format!(
                "{}: its {texts} texts have {left_out} tokens together, fewer than one row of {length}; make --max-length \
                 smaller, or leave out --packing",
                path.display()
            )));
        }
        let rows = packed.map_or(rows, |packed| packed.rows);
        Ok(Self { path, columns: building.finish()?, rows, roles: plan.roles, label_names: names, packed })
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many rows of each input make one sample: 1, or one for each role of a loss that compares outputs.
    pub fn roles(&self) -> usize {
        self.roles
    }

    fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|(n, _)| n == name).map(|(_, c)| c)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|(n, _)| n.as_str())
    }
}

/// Every file that `paths` stand for, in the order in which they are read.
pub(super) fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    Files::find(paths)?.all()
}

/// The arrays of a `.safetensors` or `.npz` file by name, as they are.
///
/// # Errors
/// Names the file, and the array that cannot be used.
pub fn read_arrays(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let arrays = match extension.as_str() {
        "safetensors" => arrays::safetensors(path, &Room::unbounded())?,
        "npz" => arrays::npz(path, &Room::unbounded())?,
        _ => return Err(Error::data(format!("{}: arrays are read from .safetensors and .npz files", path.display()))),
    };
    arrays
        .into_iter()
        .map(|(name, array)| {
            let tensor = array.tensor().map_err(|what| Error::file(path, format!("array {name}: {what}")))?;
            Ok((name, tensor))
        })
        .collect()
}

#[cfg(test)]
mod peers;
#[cfg(test)]
mod tests;
