//! Rows by their number, on disk or in memory.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::rows::Row;

trait Bytes: Read + Write + Seek + Send {}
impl<T: Read + Write + Seek + Send> Bytes for T {}

/// What is kept of each row: the values of the cut, one after the other.
pub(super) struct Store {
    bytes: Mutex<Box<dyn Bytes>>,
    /// Where the next row begins.
    end: u64,
    limit: u64,
    /// Which of `shapes` a row has, and where it begins.
    rows: HashMap<usize, (usize, u64)>,
    /// Shape and bytes of each value; rows of like lengths share them.
    shapes: Vec<Vec<(Vec<usize>, usize)>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Store({} rows, {} bytes)", self.rows.len(), self.end)
    }
}

impl Store {
    /// In a file without a name in `dir`, which is gone with the process, and holds no more than `limit` bytes.
    pub fn on_disk(dir: &Path, limit: u64) -> io::Result<Self> {
        Ok(Self::new(tempfile::tempfile_in(dir)?, limit))
    }

    pub fn in_memory() -> Self {
        Self::new(Cursor::new(Vec::new()), u64::MAX)
    }

    fn new(bytes: impl Bytes + 'static, limit: u64) -> Self {
        Self { bytes: Mutex::new(Box::new(bytes)), end: 0, limit, rows: HashMap::new(), shapes: Vec::new() }
    }

    /// Bytes by now.
    pub fn len(&self) -> u64 {
        self.end
    }

    /// Keeps the values of the row of this number.
    pub fn put(&mut self, number: usize, values: &[Row]) -> io::Result<()> {
        let shape: Vec<(Vec<usize>, usize)> = values.iter().map(|v| (v.dims.clone(), v.bytes.len())).collect();
        let at = self.shapes.iter().rposition(|known| *known == shape).unwrap_or_else(|| {
            self.shapes.push(shape);
            self.shapes.len() - 1
        });
        let len: u64 = values.iter().map(|v| v.bytes.len() as u64).sum();
        if self.limit.saturating_sub(self.end) < len {
            return Err(io::Error::other(format!("more than {} bytes would be needed", self.limit)));
        }
        // A lock is poisoned where another thread has panicked; the bytes are what they are.
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.seek(SeekFrom::Start(self.end))?;
        values.iter().try_for_each(|v| bytes.write_all(&v.bytes))?;
        self.rows.insert(number, (at, self.end));
        self.end += len;
        Ok(())
    }

    /// The values of the row of this number.
    pub fn get(&self, number: usize) -> io::Result<Vec<Row>> {
        let (shape, begin) = *self.rows.get(&number).ok_or(io::ErrorKind::NotFound)?;
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.seek(SeekFrom::Start(begin))?;
        let mut read = |(dims, len): &(Vec<usize>, usize)| {
            let mut row = Row { dims: dims.clone(), bytes: vec![0; *len] };
            bytes.read_exact(&mut row.bytes).map(|()| row)
        };
        self.shapes[shape].iter().map(&mut read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_their_number_and_the_limit_holds() {
        let row = |n: u8, len: usize| Row { dims: vec![1, len], bytes: vec![n; len] };
        let dir = tempfile::tempdir().unwrap();
        let limited = Store::on_disk(dir.path(), 12).unwrap();
        for mut store in [limited, Store::new(Cursor::new(Vec::new()), 12)] {
            store.put(7, &[row(1, 2), row(2, 3)]).unwrap();
            store.put(3, &[row(3, 1), row(4, 4)]).unwrap();
            store.put(9, &[row(5, 2)]).unwrap();
            assert_eq!(store.get(7).unwrap(), [row(1, 2), row(2, 3)]);
            assert_eq!(store.get(3).unwrap(), [row(3, 1), row(4, 4)]);
            assert_eq!(store.len(), 12);
            assert!(store.put(1, &[row(6, 1)]).unwrap_err().to_string().contains("12 bytes"));
            assert!(store.get(1).is_err());
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
    }
}
