//! `.jsonl`: one JSON object a line. Only the fields that are wanted are built; lists of numbers become arrays.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::record::{At, Cell, Numbers, Place, Record, RecordFormat, Records, Schema, Wanted};
use crate::{Error, Result};

pub(super) const FORMAT: RecordFormat = RecordFormat { schema, open };

/// The fields of the first line.
fn schema(path: &Path) -> Result<Schema> {
    let mut lines = Lines::open(path, &[])?;
    let columns = match lines.line()? {
        Some(at) => lines.keys(at)?,
        None => Vec::new(),
    };
    Ok(Schema { columns, line: Some(lines.number), ..Default::default() })
}

fn open(path: &Path, wanted: &[Wanted]) -> Result<Records> {
    Ok(Box::new(Lines::open(path, wanted)?))
}

struct Lines {
    path: Arc<Path>,
    wanted: Vec<Wanted>,
    file: BufReader<File>,
    line: Vec<u8>,
    number: u64,
    failed: bool,
}

impl Lines {
    fn open(path: &Path, wanted: &[Wanted]) -> Result<Self> {
        let file = BufReader::with_capacity(1 << 18, File::open(path).map_err(Error::io("open", path))?);
        Ok(Self { path: path.into(), wanted: wanted.into(), file, line: Vec::new(), number: 0, failed: false })
    }

    /// The next line that is not blank.
    fn line(&mut self) -> Result<Option<Place>> {
        loop {
            self.line.clear();
            let read = self.file.read_until(b'\n', &mut self.line).map_err(Error::io("read", &self.path))?;
            self.number += 1;
            if read == 0 {
                return Ok(None);
            }
            if !self.line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(Place { path: self.path.clone(), at: At::Line(self.number) }));
            }
        }
    }

    fn keys(&self, place: Place) -> Result<Vec<String>> {
        let value: Value = serde_json::from_slice(&self.line).map_err(|e| not_json(&place, &e))?;
        match value {
            Value::Object(record) => Ok(record.into_iter().map(|(name, _)| name).collect()),
            _ => Err(no_object(&place)),
        }
    }

    fn record(&self, place: Place) -> Result<Record> {
        let mut json = serde_json::Deserializer::from_slice(&self.line);
        let found = Fields(&self.wanted).deserialize(&mut json).and_then(|found| json.end().map(|()| found));
        let found = match found {
            Ok(found) => found,
            Err(e) => {
                return Err(match serde_json::from_slice::<Value>(&self.line) {
                    Ok(Value::Object(_)) | Err(_) => not_json(&place, &e),
                    Ok(_) => no_object(&place),
                });
            }
        };
        let mut cells = Vec::with_capacity(found.len());
        for (value, wanted) in found.into_iter().zip(&self.wanted) {
            let Some(value) = value else {
                let there = self.keys(place.clone())?;
                return Err(place.error(wanted.missing(there.iter().map(String::as_str))));
            };
            let cell = cell(value).map_err(|what| place.error(format!("field {:?} {what}", wanted.column)))?;
            cells.push(cell);
        }
        Ok(Record { place, cells })
    }
}

impl Iterator for Lines {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let record = self.line().and_then(|place| place.map(|place| self.record(place)).transpose()).transpose();
        self.failed = matches!(record, Some(Err(_)));
        record
    }
}

fn not_json(place: &Place, e: &serde_json::Error) -> Error {
    place.error(format!("not a JSON value ({e}); one object a line"))
}

fn no_object(place: &Place) -> Error {
    place.error("not a JSON object; one object a line was expected")
}

/// Picks the values of some fields out of an object.
struct Fields<'a>(&'a [Wanted]);

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Vec<Option<Value>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = Vec<Option<Value>>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = vec![None; self.0.len()];
        while let Some(key) = map.next_key::<std::borrow::Cow<str>>()? {
            match self.0.iter().position(|w| w.column == key) {
                Some(at) => found[at] = Some(map.next_value()?),
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }
}

fn cell(value: Value) -> Result<Cell, String> {
    Ok(match value {
        Value::Null => Cell::Null,
        Value::Bool(v) => Cell::Int(i64::from(v)),
        Value::String(text) => Cell::Text(text),
        Value::Number(n) => match n.as_i64() {
            Some(v) => Cell::Int(v),
            None => Cell::Float(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::Array(items) => {
            let (mut dims, mut numbers) = (Vec::new(), Numbers::Int(Vec::new()));
            flatten(items, 0, &mut dims, &mut numbers)?;
            Cell::Array { dims, numbers }
        }
        Value::Object(_) => return Err("is an object; text, numbers and lists of numbers are read".into()),
    })
}

/// Puts the numbers of nested lists in a row; all lists of one depth have one length.
fn flatten(items: Vec<Value>, depth: usize, dims: &mut Vec<usize>, numbers: &mut Numbers) -> Result<(), String> {
    match dims.get(depth) {
        None => dims.push(items.len()),
        Some(n) if *n != items.len() => {
            return Err(format!("holds lists of {n} and of {} in one array", items.len()));
        }
        Some(_) => {}
    }
    for item in items {
        match item {
            Value::Array(inner) => flatten(inner, depth + 1, dims, numbers)?,
            _ if dims.len() > depth + 1 => return Err("holds numbers beside lists".into()),
            Value::Number(n) => numbers.push(match n.as_i64() {
                Some(v) => Numbers::Int(vec![v]),
                None => Numbers::Float(vec![n.as_f64().unwrap_or(f64::NAN)]),
            }),
            Value::Bool(v) => numbers.push(Numbers::Int(vec![i64::from(v)])),
            other => return Err(format!("holds {other} in a list; lists are of numbers")),
        }
    }
    Ok(())
}
