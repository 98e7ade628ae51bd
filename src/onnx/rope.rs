//! Ropes: files as slices of what was read, new bytes, and bytes that are made only while they are written.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

use super::wire;
use crate::{Error, Result};

/// Bytes to be written one after another: slices of what was read, new bytes, and bytes made only when they are due.
#[derive(Default)]
pub struct Rope {
    pieces: Vec<Piece>,
    len: usize,
}

/// Pieces from this size on are worth a kernel copy or a thread.
const LONG: usize = 1 << 20;

enum Piece {
    Ready(Bytes),
    Due(Due),
}

/// Writes what is due.
pub type WriteDue = Box<dyn FnOnce(&mut dyn Write) -> Result<(), RopeError> + Send>;

/// Bytes that are made when they are written, piece by piece, so that little of them is ever held.
pub struct Due {
    pub len: usize,
    pub write: WriteDue,
}

impl Rope {
    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.len += bytes.len();
        if !bytes.is_empty() {
            self.pieces.push(Piece::Ready(bytes));
        }
    }

    pub fn push_due(&mut self, due: Due) {
        self.len += due.len;
        self.pieces.push(Piece::Due(due));
    }

    pub fn append(&mut self, other: Rope) {
        for piece in other.pieces {
            match piece {
                Piece::Ready(bytes) => self.push(bytes),
                Piece::Due(due) => self.push_due(due),
            }
        }
    }

    /// This rope as the body of length-delimited field `number`.
    pub fn into_field(self, number: u32) -> Rope {
        let mut rope = Rope::default();
        rope.push(wire::header(number, self.len));
        rope.append(self);
        rope
    }

    /// All of it, in memory.
    pub fn into_bytes(self) -> Result<Bytes, RopeError> {
        let mut bytes = Vec::with_capacity(self.len);
        for piece in self.pieces {
            match piece {
                Piece::Ready(ready) => bytes.extend_from_slice(&ready),
                Piece::Due(due) => (due.write)(&mut bytes)?,
            }
        }
        Ok(bytes.into())
    }

    /// Writes everything at the file's position. `origin` is the file that `mapped` was read from: long slices of it
    /// go from file to file inside the kernel (a reflink where the file system has them), not through memory.
    pub fn write_to(self, out: &mut File, origin: Option<(&File, &Bytes)>) -> Result<(), RopeError> {
        let mut out = BufWriter::with_capacity(1 << 16, out);
        // A run of neighbouring slices of the origin: (first byte in the origin, the slices).
        let mut run: (usize, Vec<Bytes>) = (0, Vec::new());
        let mut run_len = 0;
        for piece in self.pieces {
            let place = match (&piece, origin) {
                (Piece::Ready(bytes), Some((_, mapped))) => offset_in(mapped, bytes),
                _ => None,
            };
            if run_len > 0 && place != Some(run.0 + run_len) {
                write_run(&mut out, origin, (run.0, std::mem::take(&mut run.1)), run_len >= LONG)?;
                run_len = 0;
            }
            match (piece, place) {
                (Piece::Ready(bytes), Some(offset)) => {
                    if run_len == 0 {
                        run.0 = offset;
                    }
                    run_len += bytes.len();
                    run.1.push(bytes);
                }
                (Piece::Ready(bytes), None) => out.write_all(&bytes)?,
                (Piece::Due(due), _) if due.len >= LONG => due.write_ahead(&mut out)?,
                (Piece::Due(due), _) => due.write_to(&mut out)?,
            }
        }
        if run_len > 0 {
            write_run(&mut out, origin, run, run_len >= LONG)?;
        }
        out.flush()?;
        Ok(())
    }
}

fn write_run(
    out: &mut BufWriter<&mut File>,
    origin: Option<(&File, &Bytes)>,
    (offset, slices): (usize, Vec<Bytes>),
    by_kernel: bool,
) -> std::io::Result<()> {
    let Some((mut file, _)) = origin.filter(|_| by_kernel) else {
        return slices.iter().try_for_each(|bytes| out.write_all(bytes));
    };
    out.flush()?;
    let len = slices.iter().map(|b| b.len() as u64).sum();
    file.seek(SeekFrom::Start(offset as u64))?;
    if std::io::copy(&mut file.take(len), *out.get_mut())? != len {
        return Err(std::io::Error::other("the input file became shorter while it was read"));
    }
    Ok(())
}

/// Why a rope was not written: the file system, or what a due piece had to say.
pub enum RopeError {
    Io(std::io::Error),
    Made(Error),
}

impl RopeError {
    /// As the library's error, for bytes that were to go to `path`.
    pub fn at(self, path: &std::path::Path) -> Error {
        match self {
            Self::Io(e) => Error::io("write", path)(e),
            Self::Made(e) => e,
        }
    }
}

impl From<std::io::Error> for RopeError {
    fn from(e: std::io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<Error> for RopeError {
    fn from(e: Error) -> Self {
        Self::Made(e)
    }
}

impl Due {
    fn write_to(self, out: &mut dyn Write) -> Result<(), RopeError> {
        let mut counted = Counted { out, written: 0 };
        (self.write)(&mut counted)?;
        if counted.written != self.len {
            let what = format!("a rewritten tensor has {} bytes where {} were announced", counted.written, self.len);
            return Err(Error::model(what).into());
        }
        Ok(())
    }
}

impl Due {
    /// As [`Due::write_to`], with the making in a thread of its own, a few chunks ahead of the writing.
    fn write_ahead(self, out: &mut dyn Write) -> Result<(), RopeError> {
        let (full, chunks) = sync_channel::<Vec<u8>>(AHEAD);
        let (used, empty) = sync_channel::<Vec<u8>>(AHEAD);
        std::thread::scope(|scope| {
            let maker = scope.spawn(move || {
                let mut ahead = Ahead { chunk: Vec::new(), full, empty };
                self.write_to(&mut ahead)?;
                Ok(ahead.flush()?)
            });
            // Where writing fails, the channel closes and the maker ends as well.
            let written = chunks.into_iter().try_for_each(|mut chunk| {
                out.write_all(&chunk)?;
                chunk.clear();
                let _ = used.try_send(chunk);
                Ok::<(), RopeError>(())
            });
            let made = maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written.and(made)
        })
    }
}

/// Chunks that may wait to be written, and their size.
const AHEAD: usize = 4;
const CHUNK: usize = 1 << 19;

/// Sends what is written to it on in chunks, whose buffers come back.
struct Ahead {
    chunk: Vec<u8>,
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

impl Write for Ahead {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.chunk.extend_from_slice(bytes);
        if self.chunk.len() >= CHUNK {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let next = self.empty.try_recv().unwrap_or_default();
        self.full.send(std::mem::replace(&mut self.chunk, next)).map_err(std::io::Error::other)
    }
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    written: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

fn offset_in(whole: &Bytes, part: &Bytes) -> Option<usize> {
    let (whole, part) = (whole.as_ptr_range(), part.as_ptr_range());
    (whole.start <= part.start && part.end <= whole.end).then(|| part.start as usize - whole.start as usize)
}
