//! Where rows lie once they were read: in memory up to a bound, and beyond it in files without a name, which are gone
//! with the process however it ends. Every row can be read at any time, so an order of them is a full one in any case.

use std::borrow::Cow;
use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::onnx::{Origin, Tensor};
use crate::{Error, Result};

/// How much of what is read may stay in memory, and where the rest goes.
#[derive(Debug)]
pub struct Room {
    left: Cell<u64>,
    dir: PathBuf,
}

impl Room {
    /// `bytes` in memory, the rest in the file system of `out`, which need not be there yet: a run's directory has to
    /// have room for what it leaves, while the system's temporary directory may itself be in memory.
    pub fn new(bytes: u64, out: &Path) -> Self {
        let dir = out.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("."));
        Self { left: bytes.into(), dir: dir.into() }
    }

    /// All in memory.
    pub(super) fn unbounded() -> Self {
        Self::new(u64::MAX, Path::new("."))
    }

    /// Moves everything that `stores` hold to files where it is more than may stay in memory.
    pub(super) fn settle<'a>(&self, stores: impl IntoIterator<Item = &'a mut Store>) -> Result<()> {
        let mut stores: Vec<&mut Store> = stores.into_iter().collect();
        let held: u64 = stores.iter().map(|store| store.tail.len() as u64).sum();
        if held > self.left.get() {
            stores.iter_mut().try_for_each(|store| store.move_out(self))?;
        }
        Ok(())
    }

    /// Whether as many bytes may still stay in memory.
    pub(super) fn has(&self, bytes: usize) -> bool {
        bytes as u64 <= self.left.get()
    }

    /// The elements of `tensor`.
    pub(super) fn keep(&self, tensor: &Tensor) -> Result<Stored> {
        let mut store = Store::default();
        if self.has(tensor.byte_len()) {
            store.tail = tensor.to_bytes();
        } else {
            tensor.write_bytes(store.file(self)?).map_err(|e| self.full(e))?;
        }
        store.finish(self)
    }

    fn full(&self, error: std::io::Error) -> Error {
        Error::file(
            &self.dir,
            format!(
                "rows of the data that are more than --data-memory cannot be written to a temporary file here: {error}. \
                 Make room, allow more memory, or choose an output directory on another disk"
            ),
        )
    }
}

/// Bytes that are written one after the other.
#[derive(Debug, Default)]
pub(super) struct Store {
    file: Option<File>,
    written: u64,
    tail: Vec<u8>,
}

impl Store {
    /// What is appended to; [`Room::settle`] is to look at it now and then.
    pub fn tail(&mut self) -> &mut Vec<u8> {
        &mut self.tail
    }

    /// All bytes so far.
    pub fn len(&self) -> u64 {
        self.written + self.tail.len() as u64
    }

    fn file(&mut self, room: &Room) -> Result<&mut File> {
        if self.file.is_none() {
            self.file = Some(tempfile::tempfile_in(&room.dir).map_err(|e| room.full(e))?);
        }
        self.file.as_mut().ok_or_else(|| Error::model("a temporary file is gone"))
    }

    fn move_out(&mut self, room: &Room) -> Result<()> {
        if self.tail.is_empty() {
            return Ok(());
        }
        let tail = std::mem::take(&mut self.tail);
        self.file(room)?.write_all(&tail).map_err(|e| room.full(e))?;
        self.written += tail.len() as u64;
        // The same memory again.
        self.tail = tail;
        self.tail.clear();
        Ok(())
    }

    /// Ready to be read.
    pub fn finish(mut self, room: &Room) -> Result<Stored> {
        if self.file.is_some() {
            self.move_out(room)?;
        }
        match self.file {
            Some(file) => Ok(Stored::File(Origin::map(file).map_err(|e| room.full(e))?)),
            None => {
                room.left.set(room.left.get().saturating_sub(self.tail.len() as u64));
                Ok(Stored::Memory(self.tail.into()))
            }
        }
    }
}

/// Bytes that are read in any order.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    /// Of the process, or of a map of the file that they were found in.
    Memory(Bytes),
    File(Origin),
}

impl Stored {
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(bytes) => bytes.len(),
            Self::File(origin) => origin.bytes.len(),
        }
    }

    /// Those in `range`.
    pub fn read(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, String> {
        if range.start > range.end || range.end > self.len() {
            return Err("a row is missing".into());
        }
        match self {
            Self::Memory(bytes) => Ok(Cow::Borrowed(&bytes[range])),
            Self::File(origin) => {
                origin.read(range).map(Cow::Owned).map_err(|e| format!("a row cannot be read back: {e}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes the bytes 0, 1, … 199 in five parts beside a store of another one, with room for `bytes`.
    fn stored(bytes: u64) -> (Stored, Stored) {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::new(bytes, &dir.path().join("run/is/not/there"));
        let (mut store, mut other) = (Store::default(), Store::default());
        for part in 0..5 {
            store.tail().extend(part * 40..(part + 1) * 40);
            other.tail().push(part);
            room.settle([&mut store, &mut other]).unwrap();
        }
        assert_eq!((store.len(), other.len()), (200, 5));
        // Nothing lies there under a name.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let stored = (store.finish(&room).unwrap(), other.finish(&room).unwrap());
        let held = [&stored.0, &stored.1].map(|s| if let Stored::Memory(bytes) = s { bytes.len() as u64 } else { 0 });
        assert_eq!(room.left.get(), bytes - held.iter().sum::<u64>());
        stored
    }

    #[test]
    fn what_is_written_is_read_wherever_it_lies() {
        for bytes in [0, 1, 50, 100, 204, 205, 1000] {
            let (stored, other) = stored(bytes);
            assert_eq!(matches!(stored, Stored::Memory(_)), bytes >= 205, "{bytes}");
            assert_eq!((stored.len(), other.len()), (200, 5));
            assert_eq!(*stored.read(0..200).unwrap(), (0..200).collect::<Vec<u8>>());
            assert_eq!(*stored.read(39..42).unwrap(), [39, 40, 41]);
            assert_eq!(*other.read(4..5).unwrap(), [4]);
            assert!(stored.read(199..201).is_err());
        }
        let room = Room::new(10, Path::new("run"));
        let tensor = Tensor::new(&[3], vec![1i64, 2, 3]);
        let kept = room.keep(&tensor).unwrap();
        assert!(matches!(kept, Stored::File(_)));
        assert_eq!(*kept.read(0..24).unwrap(), tensor.to_bytes());
    }

    #[test]
    fn a_place_that_cannot_be_written_to_is_named() {
        let room = Room { left: 0.into(), dir: "/proc/self/fd".into() };
        let complaint = room.keep(&Tensor::new(&[1], vec![1u8])).unwrap_err().to_string();
        assert!(complaint.contains("/proc/self/fd: ") && complaint.contains("--data-memory"), "{complaint}");
    }
}
