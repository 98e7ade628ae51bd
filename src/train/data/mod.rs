//! Training data: columns of rows by name, read from array files or from lines of text, handed out in batches.

mod arrays;
mod batch;
mod fit;
mod roles;
mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;

pub use batch::Batches;
pub use fit::{Axis, Batch, Feed, Field, IGNORE, Target};
pub use roles::Roles;
pub use text::TextOptions;

use crate::onnx::{DataType, Tensor, data_type_name};
use crate::{Error, Result};

/// What a label is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelKind {
    /// A class id from 0, or −100 for "ignore".
    Class,
    /// A number to come close to.
    Number,
}

/// How a data file is to be read.
#[derive(Debug, Clone)]
pub struct ReadOptions<'a> {
    /// The model's inputs, which say what columns text is turned into.
    pub inputs: &'a [Field],
    /// Name of the label column.
    pub labels: &'a str,
    /// What the labels are; `None`: there are none.
    pub kind: Option<LabelKind>,
    pub roles: Roles,
    pub text: &'a TextOptions,
    /// Class names in order of their ids, where another file (the training data) has fixed them.
    pub label_names: Option<&'a [String]>,
}

/// Rows of a data file, column by column.
#[derive(Debug)]
pub struct Dataset {
    /// Where it was read from (for messages).
    pub path: PathBuf,
    /// In the file's order; all have [`Dataset::rows`] rows, times [`Dataset::roles`]: those of one role below the other.
    columns: Vec<(String, Column)>,
    rows: usize,
    roles: usize,
    /// Class names in order of their ids, where labels were given as text.
    pub label_names: Option<Vec<String>>,
}

/// One column.
#[derive(Debug)]
enum Column {
    /// Rows of one shape.
    Dense(Array),
    /// One number for all rows, for an input without axes (a sample rate, a number of steps).
    Single(Array),
    /// Token sequences of different lengths, padded per batch.
    Ragged { rows: Vec<Vec<i64>>, padding: Padding },
}

/// An array as a file holds it: little-endian elements, row-major.
#[derive(Debug)]
struct Array {
    data_type: DataType,
    dims: Vec<usize>,
    bytes: Bytes,
}

impl Array {
    fn tensor(&self) -> Result<Tensor, String> {
        Tensor::from_bytes(self.data_type, &self.dims, &self.bytes)
    }
}

/// How sequences of different lengths become one array.
#[derive(Debug, Clone, Copy)]
struct Padding {
    value: i64,
    left: bool,
    /// The length every batch gets; `None`: the longest of the batch.
    length: Option<usize>,
}

impl Dataset {
    /// Reads `path` by its extension: `.safetensors`, `.npz` or `.jsonl`.
    ///
    /// # Errors
    /// Names the file and the array or line that cannot be used; an empty file is one of them.
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self> {
        let dataset = match extension(path).as_str() {
            "safetensors" => roles::stack(Self::of_arrays(path, arrays::safetensors(path)?)?, options.roles)?,
            "npz" => roles::stack(Self::of_arrays(path, arrays::npz(path)?)?, options.roles)?,
            "jsonl" => text::read(path, options)?,
            _ => {
                return Err(Error::data(format!(
                    "{}: data files are told apart by their names, and this one ends in neither .safetensors, .npz \
                     nor .jsonl",
                    path.display()
                )));
            }
        };
        if dataset.rows == 0 {
            return Err(Error::data(format!("{}: it holds no rows; there is nothing to train on", path.display())));
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
        Ok(Self { path: path.into(), rows: count, roles: 1, columns, label_names: None })
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many rows of each column make one sample: 1, or one for each role of a loss that compares outputs.
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

/// The arrays of a `.safetensors` or `.npz` file by name, as they are.
///
/// # Errors
/// Names the file, and the array that cannot be used.
pub fn read_arrays(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let arrays = match extension(path).as_str() {
        "safetensors" => arrays::safetensors(path)?,
        "npz" => arrays::npz(path)?,
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

fn extension(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

impl Column {
    fn rows(&self) -> usize {
        match self {
            Column::Dense(Array { dims, .. }) => dims.first().copied().unwrap_or(0),
            Column::Single(_) => 1,
            Column::Ragged { rows, .. } => rows.len(),
        }
    }

    fn data_type(&self) -> DataType {
        match self {
            Column::Dense(Array { data_type, .. }) | Column::Single(Array { data_type, .. }) => *data_type,
            Column::Ragged { .. } => DataType::Int64,
        }
    }

    /// Shape of one row; `None` for a length that differs from row to row.
    fn row_dims(&self) -> Vec<Option<usize>> {
        match self {
            Column::Dense(Array { dims, .. }) => dims.iter().skip(1).map(|d| Some(*d)).collect(),
            Column::Single(_) => Vec::new(),
            Column::Ragged { padding, .. } => vec![padding.length],
        }
    }

    /// The given rows as one tensor of `data_type`, which is the column's own type or a wider integer one.
    fn gather(&self, rows: &[usize], data_type: DataType) -> Result<Tensor, String> {
        let tensor = match self {
            Column::Dense(Array { data_type, dims, bytes }) => {
                let row = bytes.len() / dims.first().copied().unwrap_or(0).max(1);
                let mut picked = Vec::with_capacity(row * rows.len());
                for at in rows {
                    picked.extend_from_slice(bytes.get(at * row..(at + 1) * row).ok_or("a row is missing")?);
                }
                let mut dims = dims.clone();
                dims[0] = rows.len();
                Tensor::from_bytes(*data_type, &dims, &picked)?
            }
            Column::Single(array) => array.tensor()?,
            Column::Ragged { rows: all, padding } => {
                let picked: Vec<&Vec<i64>> =
                    rows.iter().map(|at| all.get(*at)).collect::<Option<_>>().ok_or("a row is missing")?;
                let longest = picked.iter().map(|r| r.len()).max().unwrap_or(0);
                let length = padding.length.unwrap_or(longest);
                let mut values = vec![padding.value; length * picked.len()];
                for (row, into) in picked.iter().zip(values.chunks_mut(length.max(1))) {
                    let used = row.len().min(length);
                    let from = if padding.left { length - used } else { 0 };
                    into[from..from + used].copy_from_slice(&row[..used]);
                }
                Tensor::new(&[rows.len(), length], values)
            }
        };
        widen(tensor, data_type)
    }
}

/// True where every value of integer type `from` is one of integer type `to`, or the types are the same.
fn widens(from: DataType, to: DataType) -> bool {
    use DataType::*;
    from == to
        || matches!((from, to), (Int8 | Uint8 | Int16 | Uint16 | Int32 | Uint32, Int64))
        || matches!((from, to), (Int8 | Uint8 | Int16 | Uint16, Int32))
}

fn widen(tensor: Tensor, to: DataType) -> Result<Tensor, String> {
    if tensor.data_type() == to {
        return Ok(tensor);
    }
    let integers = match &tensor {
        Tensor::I8(a) => a.mapv(i64::from),
        Tensor::U8(a) => a.mapv(i64::from),
        Tensor::I16(a) => a.mapv(i64::from),
        Tensor::U16(a) => a.mapv(i64::from),
        Tensor::I32(a) => a.mapv(i64::from),
        Tensor::U32(a) => a.mapv(i64::from),
        Tensor::I64(a) => a.clone(),
        _ => return Err(format!("{} cannot become {}", data_type_name(tensor.data_type()), data_type_name(to))),
    };
    match to {
        DataType::Int64 => Ok(integers.into()),
        DataType::Int32 => Ok(integers.mapv(|v| v as i32).into()),
        _ => Err(format!("{} cannot become {}", data_type_name(tensor.data_type()), data_type_name(to))),
    }
}

#[cfg(test)]
mod tests;
