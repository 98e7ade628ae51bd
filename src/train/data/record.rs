//! Rows as files of records hold them: cells under the names of columns, and where each row stands.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result, did_you_mean};

/// What stands in one row under one name.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    Null,
    /// Characters of a file that tells no types (csv): a number where one is wanted.
    Raw(String),
    Text(String),
    Int(i64),
    Float(f64),
    /// Numbers in lists, row-major.
    Array {
        dims: Vec<usize>,
        numbers: Numbers,
    },
    /// An image file's bytes.
    Bytes(Vec<u8>),
    /// The image file that a folder holds.
    File(PathBuf),
}

/// The numbers of a list: integers if all of them are.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Numbers {
    Int(Vec<i64>),
    Float(Vec<f64>),
}

impl Numbers {
    pub fn len(&self) -> usize {
        match self {
            Numbers::Int(v) => v.len(),
            Numbers::Float(v) => v.len(),
        }
    }

    pub fn push(&mut self, number: Self) {
        match (&mut *self, number) {
            (Numbers::Int(all), Numbers::Int(more)) => all.extend(more),
            (Numbers::Float(all), Numbers::Float(more)) => all.extend(more),
            (Numbers::Float(all), Numbers::Int(more)) => all.extend(more.into_iter().map(|v| v as f64)),
            (Numbers::Int(all), more) => {
                *self = Numbers::Float(all.iter().map(|v| *v as f64).collect());
                self.push(more);
            }
        }
    }
}

impl Cell {
    /// About as many bytes as it takes.
    fn size(&self) -> usize {
        match self {
            Cell::Raw(text) | Cell::Text(text) => text.len(),
            Cell::Array { numbers, .. } => numbers.len() * size_of::<f64>(),
            Cell::Bytes(bytes) => bytes.len(),
            Cell::Null | Cell::Int(_) | Cell::Float(_) | Cell::File(_) => 0,
        }
    }
}

/// What a message calls a cell.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Cell::Null => f.write_str("null"),
            Cell::Raw(text) | Cell::Text(text) => {
                let short: String = text.chars().take(40).collect();
                write!(f, "{short:?}{}", if short.len() < text.len() { "…" } else { "" })
            }
            Cell::Int(v) => write!(f, "{v}"),
            Cell::Float(v) => write!(f, "{v}"),
            Cell::Array { dims, .. } => write!(f, "a list of shape {dims:?}"),
            Cell::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Cell::File(path) => write!(f, "the file {}", path.display()),
        }
    }
}

/// Where a row stands, for messages.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub path: Arc<Path>,
    pub at: At,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum At {
    /// Of a text file, counted from 1.
    Line(u64),
    /// Counted from 0.
    Row(u64),
    /// The file is the row.
    Whole,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let path = self.path.display();
        match self.at {
            At::Line(n) => write!(f, "{path}:{n}"),
            At::Row(n) => write!(f, "{path}, row {n}"),
            At::Whole => write!(f, "{path}"),
        }
    }
}

impl Place {
    pub fn error(&self, what: impl fmt::Display) -> Error {
        Error::data(format!("{self}: {what}"))
    }
}

/// One row: the cells of the columns that were asked for, in that order.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub place: Place,
    pub cells: Vec<Cell>,
}

impl Record {
    /// About as many bytes as its cells take beyond themselves.
    pub fn size(&self) -> usize {
        self.cells.iter().map(Cell::size).sum()
    }
}

/// A column that is read, and the flag that chooses another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub column: String,
    pub flag: &'static str,
}

impl Wanted {
    /// What is said where it is not among the columns `there`.
    pub fn missing<'a>(&self, there: impl Iterator<Item = &'a str> + Clone) -> String {
        let near = did_you_mean(&self.column, there.clone());
        let there: Vec<&str> = there.collect();
        format!("no field {:?} (there are: {}); name it with {}.{near}", self.column, there.join(", "), self.flag)
    }

    /// Its place among `columns`.
    pub fn position(&self, path: &Path, columns: &[String]) -> Result<usize> {
        columns.iter().position(|c| *c == self.column).ok_or_else(|| {
            Error::data(format!("{}: {}", path.display(), self.missing(columns.iter().map(String::as_str))))
        })
    }
}

/// What a file says of its columns before a row is read.
#[derive(Debug, Default)]
pub(super) struct Schema {
    pub columns: Vec<String>,
    /// The line that names them.
    pub line: Option<u64>,
    /// Columns of images.
    pub images: Vec<String>,
    /// Class names in order of their ids, by column, where the file lists them.
    pub classes: Vec<(String, Vec<String>)>,
}

/// Rows one after the other; after an error there are no more.
pub(super) type Records = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// The two questions that a format of records answers.
#[derive(Clone, Copy)]
pub(super) struct RecordFormat {
    pub schema: fn(&Path) -> Result<Schema>,
    /// The cells of these columns, each of which is named once.
    pub open: fn(&Path, &[Wanted]) -> Result<Records>,
}
