//! Arrow's columns, from `.parquet` files and from streams and files of Arrow IPC, as the `datasets` library writes
//! them: lists of numbers become arrays, `ClassLabel` names are kept, structs of image bytes are images.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_cast::cast;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType, Field, Schema as ArrowSchema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::record::{At, Cell, Numbers, Place, Record, RecordFormat, Records, Schema, Wanted};
use crate::{Error, Result};

pub(super) const PARQUET: RecordFormat = RecordFormat { schema: parquet_schema, open: open_parquet };
pub(super) const IPC: RecordFormat = RecordFormat { schema: ipc_schema, open: open_ipc };

/// Rows that are decoded at a time.
const ROWS: usize = 256;

type Parquet = ParquetRecordBatchReaderBuilder<File>;
type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

fn broken(path: &Path, kind: &str, e: impl std::fmt::Display) -> Error {
    let text = e.to_string();
    // Arrow says of what kind an error is: "Parser error: …".
    let what = text.split_once(" error: ").map_or(text.as_str(), |(_, what)| what);
    Error::file(path, format!("this is not a whole {kind} file ({what})"))
}

fn parquet(path: &Path) -> Result<Parquet> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    Parquet::try_new(file).map_err(|e| broken(path, ".parquet", e))
}

fn parquet_schema(path: &Path) -> Result<Schema> {
    Ok(schema(parquet(path)?.schema()))
}

fn open_parquet(path: &Path, wanted: &[Wanted]) -> Result<Records> {
    let builder = parquet(path)?;
    let picked = picked(path, builder.schema(), wanted)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), picked.iter().copied());
    let reader =
        builder.with_projection(mask).with_batch_size(ROWS).build().map_err(|e| broken(path, ".parquet", e))?;
    Ok(records(path, ".parquet", wanted, Box::new(reader)))
}

/// The two forms of Arrow IPC; a file begins with `ARROW1`.
enum Ipc {
    File(FileReader<BufReader<File>>),
    Stream(StreamReader<Ended>),
}

impl Ipc {
    fn open(path: &Path, projection: Option<Vec<usize>>) -> Result<Self> {
        let failed = |e| broken(path, "Arrow", e);
        let open = || File::open(path).map_err(Error::io("open", path));
        let mut magic = [0; 6];
        let is_file = open()?.read_exact(&mut magic).is_ok() && &magic == b"ARROW1";
        let file = BufReader::with_capacity(1 << 18, open()?);
        Ok(match is_file {
            true => Ipc::File(FileReader::try_new(file, projection).map_err(failed)?),
            false => Ipc::Stream(StreamReader::try_new(Ended { file, ended: false }, projection).map_err(failed)?),
        })
    }

    fn schema(&self) -> Arc<ArrowSchema> {
        match self {
            Ipc::File(reader) => reader.schema(),
            Ipc::Stream(reader) => reader.schema(),
        }
    }

    fn batches(self) -> Batches {
        match self {
            Ipc::File(reader) => Box::new(reader),
            Ipc::Stream(reader) => Box::new(Stream(reader)),
        }
    }
}

/// A file that knows whether somebody tried to read beyond its end.
struct Ended {
    file: BufReader<File>,
    ended: bool,
}

impl Read for Ended {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.ended |= read == 0 && !buffer.is_empty();
        Ok(read)
    }
}

/// The batches of a stream. The format lets a stream just end where a message could follow, but whoever finishes one
/// writes a mark: without it, nobody knows how much is gone.
struct Stream(StreamReader<Ended>);

impl Iterator for Stream {
    type Item = Result<RecordBatch, ArrowError>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.0.next();
        let cut =
            || ArrowError::ParseError("it ends without the mark of its end: it was cut, or never finished".into());
        if batch.is_none() && self.0.get_ref().ended { Some(Err(cut())) } else { batch }
    }
}

fn ipc_schema(path: &Path) -> Result<Schema> {
    Ok(schema(&Ipc::open(path, None)?.schema()))
}

fn open_ipc(path: &Path, wanted: &[Wanted]) -> Result<Records> {
    let picked = picked(path, &Ipc::open(path, None)?.schema(), wanted)?;
    Ok(records(path, "Arrow", wanted, Ipc::open(path, Some(picked))?.batches()))
}

/// The columns to decode, in the file's order.
fn picked(path: &Path, schema: &ArrowSchema, wanted: &[Wanted]) -> Result<Vec<usize>> {
    let columns: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
    let mut picked = wanted.iter().map(|w| w.position(path, &columns)).collect::<Result<Vec<_>>>()?;
    picked.sort_unstable();
    picked.dedup();
    Ok(picked)
}

fn schema(arrow: &ArrowSchema) -> Schema {
    let fields = arrow.fields().iter();
    Schema {
        line: None,
        columns: fields.clone().map(|f| f.name().clone()).collect(),
        images: fields.filter(|f| is_image(f)).map(|f| f.name().clone()).collect(),
        classes: classes(arrow),
    }
}

/// `{"bytes": binary, "path": string}`, the storage of `datasets.Image`, or bytes alone.
fn is_image(field: &Field) -> bool {
    match field.data_type() {
        DataType::Struct(fields) => fields.iter().any(|f| f.name() == "bytes"),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        _ => false,
    }
}

/// What `datasets` writes of its features into a schema's metadata.
fn classes(arrow: &ArrowSchema) -> Vec<(String, Vec<String>)> {
    let info = arrow.metadata().get("huggingface").and_then(|text| serde_json::from_str::<Value>(text).ok());
    let features = info.as_ref().and_then(|info| info["info"]["features"].as_object());
    let names = |feature: &Value| -> Option<Vec<String>> {
        let names = (feature["_type"] == "ClassLabel").then(|| feature["names"].as_array()).flatten()?;
        names.iter().map(|n| n.as_str().map(str::to_string)).collect()
    };
    let features = features.into_iter().flatten();
    features.filter_map(|(column, feature)| Some((column.clone(), names(feature)?))).collect()
}

fn records(path: &Path, kind: &'static str, wanted: &[Wanted], batches: Batches) -> Records {
    let path: Arc<Path> = path.into();
    let wanted = wanted.to_vec();
    let mut done = 0;
    let mut failed = false;
    let rows = batches.map_while(move |batch| {
        if failed {
            return None;
        }
        let batch = batch.map_err(|e| broken(&path, kind, e));
        let rows = batch.and_then(|batch| {
            let from = done;
            done += batch.num_rows() as u64;
            rows(&path, from, &wanted, &batch)
        });
        failed = rows.is_err();
        Some(rows)
    });
    Box::new(rows.flat_map(|rows| {
        let (rows, error) = match rows {
            Ok(rows) => (rows, None),
            Err(e) => (Vec::new(), Some(Err(e))),
        };
        rows.into_iter().map(Ok).chain(error)
    }))
}

/// The rows of a batch, the first of which is row `from` of the file.
fn rows(path: &Arc<Path>, from: u64, wanted: &[Wanted], batch: &RecordBatch) -> Result<Vec<Record>> {
    let mut columns = Vec::with_capacity(wanted.len());
    for wanted in wanted {
        let array = batch
            .column_by_name(&wanted.column)
            .ok_or_else(|| Error::file(path, format!("its column {:?} is gone", wanted.column)))?;
        let cells = cells(array).map_err(|(row, what)| {
            let place = Place { path: path.clone(), at: At::Row(from + row as u64) };
            place.error(format!("field {:?} {what}", wanted.column))
        })?;
        columns.push(cells.into_iter());
    }
    let row = |at: usize| Record {
        place: Place { path: path.clone(), at: At::Row(from + at as u64) },
        cells: columns.iter_mut().filter_map(Iterator::next).collect(),
    };
    Ok((0..batch.num_rows()).map(row).collect())
}

/// A row and what is wrong with it.
type Refused = (usize, String);

fn cells(array: &ArrayRef) -> Result<Vec<Cell>, Refused> {
    let cast = |to: &DataType| cast(array, to).map_err(|e| (0, format!("cannot be read ({e})")));
    let all = |cell: &dyn Fn(usize) -> Result<Cell, String>| {
        (0..array.len())
            .map(|at| if array.is_null(at) { Ok(Cell::Null) } else { cell(at).map_err(|what| (at, what)) })
            .collect()
    };
    match array.data_type() {
        DataType::Null => Ok(vec![Cell::Null; array.len()]),
        kind if kind.is_integer() || *kind == DataType::Boolean => {
            let (numbers, _) = leaves(array)?;
            let Numbers::Int(numbers) = numbers else { return Err((0, "holds no integers".into())) };
            all(&|at| Ok(Cell::Int(numbers[at])))
        }
        kind if kind.is_floating() => {
            let (numbers, _) = leaves(array)?;
            let Numbers::Float(numbers) = numbers else { return Err((0, "holds no numbers".into())) };
            all(&|at| Ok(Cell::Float(numbers[at])))
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            let texts = cast(&DataType::LargeUtf8)?;
            let texts = texts.as_string::<i64>();
            all(&|at| Ok(Cell::Text(texts.value(at).into())))
        }
        DataType::Dictionary(_, values) => cells(&cast(values)?),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let bytes = cast(&DataType::LargeBinary)?;
            let bytes = bytes.as_binary::<i64>();
            all(&|at| Ok(Cell::Bytes(bytes.value(at).into())))
        }
        DataType::Struct(fields) if fields.iter().any(|f| f.name() == "bytes") => {
            let parts = array.as_struct();
            let part = |name: &str| parts.column_by_name(name).map(cells).transpose();
            let (bytes, paths) = (part("bytes")?, part("path")?);
            let of = |cells: &Option<Vec<Cell>>, at: usize| cells.as_ref().map_or(Cell::Null, |c| c[at].clone());
            all(&|at| match (of(&bytes, at), of(&paths, at)) {
                (Cell::Null, path) => Ok(path),
                (bytes, _) => Ok(bytes),
            })
        }
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => all(&|at| {
            let (mut dims, mut numbers) = (Vec::new(), Numbers::Int(Vec::new()));
            flatten(array, at, 0, &mut dims, &mut numbers)?;
            Ok(Cell::Array { dims, numbers })
        }),
        other => Err((0, format!("has the type {other}; text, numbers, lists of numbers and images are read"))),
    }
}

/// The elements of an array of numbers, and which of them are there.
fn leaves(array: &ArrayRef) -> Result<(Numbers, Option<usize>), Refused> {
    let failed = |e| (0, format!("cannot be read ({e})"));
    let missing = (0..array.len()).find(|at| array.is_null(*at));
    let kind = array.data_type();
    if *kind == DataType::UInt64 {
        // What is beyond int64 must not become null.
        let values = array.as_primitive::<arrow_array::types::UInt64Type>().values();
        if let Some(at) = values.iter().position(|v| i64::try_from(*v).is_err()) {
            return Err((at, format!("is {}, which is beyond int64", values[at])));
        }
    }
    if kind.is_integer() || *kind == DataType::Boolean {
        let numbers = cast(array, &DataType::Int64).map_err(failed)?;
        return Ok((Numbers::Int(numbers.as_primitive::<Int64Type>().values().to_vec()), missing));
    }
    if kind.is_floating() {
        let numbers = cast(array, &DataType::Float64).map_err(failed)?;
        return Ok((Numbers::Float(numbers.as_primitive::<Float64Type>().values().to_vec()), missing));
    }
    Err((0, format!("holds lists of {kind}; lists are of numbers")))
}

/// Appends the numbers of the list at row `at`; all lists of one depth have one length.
fn flatten(
    lists: &ArrayRef,
    at: usize,
    depth: usize,
    dims: &mut Vec<usize>,
    numbers: &mut Numbers,
) -> Result<(), String> {
    if lists.is_null(at) {
        return Err("holds null in a list".into());
    }
    let items = match lists.data_type() {
        DataType::List(_) => lists.as_list::<i32>().value(at),
        DataType::LargeList(_) => lists.as_list::<i64>().value(at),
        _ => lists.as_fixed_size_list().value(at),
    };
    match dims.get(depth) {
        None => dims.push(items.len()),
        Some(n) if *n != items.len() => {
            return Err(format!("holds lists of {n} and of {} in one array", items.len()));
        }
        Some(_) => {}
    }
    match items.data_type() {
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => {
            (0..items.len()).try_for_each(|at| flatten(&items, at, depth + 1, dims, numbers))
        }
        _ => {
            let (more, missing) = leaves(&items).map_err(|(_, what)| what)?;
            if missing.is_some() {
                return Err("holds null in a list".into());
            }
            numbers.push(more);
            Ok(())
        }
    }
}
