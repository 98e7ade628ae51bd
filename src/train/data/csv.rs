//! `.csv` and `.tsv`: a header with the columns' names, then rows. What a cell is depends on what it is wanted for.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};

use super::record::{At, Cell, Place, Record, RecordFormat, Records, Schema, Wanted};
use crate::{Error, Result};

pub(super) const FORMAT: RecordFormat = RecordFormat { schema, open };

fn reader(path: &Path) -> Result<Reader<File>> {
    let tabs = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tsv"));
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut builder = ReaderBuilder::new();
    builder.delimiter(if tabs { b'\t' } else { b',' }).buffer_capacity(1 << 18);
    Ok(builder.from_reader(file))
}

fn columns(path: &Path, reader: &mut Reader<File>) -> Result<Vec<String>> {
    let header = reader.headers().map_err(|e| failed(&path.into(), e))?;
    // Spreadsheets begin their files with a mark of the encoding.
    let columns: Vec<String> = header.iter().map(|name| name.trim_start_matches('\u{feff}').to_string()).collect();
    match columns.iter().enumerate().find(|(at, name)| columns[..*at].contains(name)) {
        Some((_, twice)) => Err(Error::data(format!("{}:1: two columns are named {twice:?}", path.display()))),
        None => Ok(columns),
    }
}

fn schema(path: &Path) -> Result<Schema> {
    Ok(Schema { columns: columns(path, &mut reader(path)?)?, line: Some(1), ..Default::default() })
}

fn open(path: &Path, wanted: &[Wanted]) -> Result<Records> {
    let mut reader = reader(path)?;
    let columns = columns(path, &mut reader)?;
    let picked = wanted.iter().map(|w| w.position(path, &columns)).collect::<Result<Vec<_>>>()?;
    let path: Arc<Path> = path.into();
    let mut row = StringRecord::new();
    let mut failure = false;
    Ok(Box::new(std::iter::from_fn(move || {
        if failure {
            return None;
        }
        match reader.read_record(&mut row) {
            Ok(false) => None,
            Ok(true) => {
                let at = At::Line(row.position().map_or(0, csv::Position::line));
                let cell = |at: &usize| match row.get(*at).unwrap_or_default() {
                    "" => Cell::Null,
                    text => Cell::Raw(text.into()),
                };
                Some(Ok(Record { place: Place { path: path.clone(), at }, cells: picked.iter().map(cell).collect() }))
            }
            Err(e) => {
                failure = true;
                Some(Err(failed(&path, e)))
            }
        }
    })))
}

fn failed(path: &Arc<Path>, error: csv::Error) -> Error {
    let line = error.position().map_or(1, csv::Position::line);
    let place = Place { path: path.clone(), at: At::Line(line) };
    match error.into_kind() {
        ErrorKind::Io(e) => Error::io("read", path)(e),
        ErrorKind::Utf8 { err, .. } => place.error(format!(
            "field {} is not UTF-8; save the file in that encoding (iconv -f latin1 -t utf-8)",
            err.field() + 1
        )),
        ErrorKind::UnequalLengths { expected_len, len, .. } => place
            .error(format!("it has {len} fields, but the header has {expected_len}; quote fields that hold commas")),
        other => place.error(format!("it cannot be read ({other:?})")),
    }
}
