//! Ropes: files as slices of what was read, new bytes, and bytes that are made only while they are written.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::wire;
use crate::{Error, Result};

/// Bytes to be written one after another: slices of what was read, new bytes, and bytes made only when they are due.
#[derive(Default)]
pub struct Rope {
    pieces: Vec<Piece>,
    len: usize,
}

/// Pieces from this size on are worth a kernel copy, and a thread's turn.
const LONG: usize = 1 << 20;

/// Copies are cut into parts of this size, so that all threads have something to do.
const PART: usize = 1 << 26;

/// More threads than this do not make one file grow any faster.
const THREADS: usize = 8;

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

/// A file and the map of it: long slices of the map go from file to file inside the kernel (a reflink where the file
/// system has them), not through memory.
#[derive(Debug, Clone)]
pub struct Origin {
    pub file: Arc<File>,
    pub bytes: Bytes,
}

impl From<Bytes> for Rope {
    fn from(bytes: Bytes) -> Self {
        let mut rope = Self::default();
        rope.push(bytes);
        rope
    }
}

impl From<Due> for Rope {
    fn from(due: Due) -> Self {
        let mut rope = Self::default();
        rope.push_due(due);
        rope
    }
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
                Piece::Due(due) => due.write_to(&mut bytes)?,
            }
        }
        Ok(bytes.into())
    }

    /// The origin that this rope is a whole copy of.
    pub fn whole<'a>(&self, origins: &'a [Origin]) -> Option<&'a Origin> {
        let [Piece::Ready(bytes)] = self.pieces.as_slice() else { return None };
        origins.iter().find(|o| o.bytes.len() == bytes.len() && offset_in(&o.bytes, bytes) == Some(0))
    }

    /// Writes everything to `out`, a new file. What is long is made and written by several threads at once, each piece at
    /// its place; runs of zeros are left to the file system. `origins` are the files that slices may come from.
    ///
    /// # Errors
    /// Where several pieces fail, the first of those that were reached.
    pub fn write_to(self, out: &File, origins: &[Origin]) -> Result<(), RopeError> {
        out.set_len(self.len as u64)?;
        let jobs = self.jobs(origins);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS).min(jobs.len());
        let queue = Mutex::new(jobs.into_iter().enumerate());
        let failed: Mutex<Option<(usize, RopeError)>> = Mutex::new(None);
        let stop = AtomicBool::new(false);
        let work = || {
            while !stop.load(Ordering::Relaxed) {
                let next = queue.lock().unwrap_or_else(|e| e.into_inner()).next();
                let Some((index, job)) = next else { break };
                if let Err(error) = job.write(out, origins) {
                    stop.store(true, Ordering::Relaxed);
                    let mut failed = failed.lock().unwrap_or_else(|e| e.into_inner());
                    if failed.as_ref().is_none_or(|(first, _)| index < *first) {
                        *failed = Some((index, error));
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// The pieces with their places: slices that follow each other in an origin as one copy, short ones together.
    fn jobs(self, origins: &[Origin]) -> Vec<Job> {
        let mut runs: Vec<(usize, What)> = Vec::new();
        for piece in self.pieces {
            let (len, source) = match &piece {
                Piece::Due(due) => (due.len, None),
                Piece::Ready(bytes) => {
                    (bytes.len(), origins.iter().enumerate().find_map(|(i, o)| Some((i, offset_in(&o.bytes, bytes)?))))
                }
            };
            match (runs.last_mut(), source) {
                (Some((run, What::Copy { origin, from })), Some(source)) if source == (*origin, *from + *run) => {
                    *run += len;
                }
                (_, Some((origin, from))) => runs.push((len, What::Copy { origin, from })),
                (_, None) => runs.push((len, What::Pieces(vec![piece]))),
            }
        }
        let mut jobs: Vec<Job> = Vec::new();
        let mut at = 0;
        for (len, what) in runs {
            let what = match what {
                What::Copy { origin, from } if len < LONG => {
                    What::Pieces(vec![Piece::Ready(origins[origin].bytes.slice(from..from + len))])
                }
                what => what,
            };
            match (jobs.last_mut().filter(|job| job.len < LONG && len < LONG), what) {
                (Some(Job { len: run, what: What::Pieces(all), .. }), What::Pieces(pieces)) => {
                    *run += len;
                    all.extend(pieces);
                }
                (_, what) => jobs.push(Job { at, len, what }),
            }
            at += len;
        }
        jobs.into_iter().flat_map(Job::parts).collect()
    }
}

/// What one thread writes at a time.
struct Job {
    /// First byte in the written file.
    at: usize,
    len: usize,
    what: What,
}

enum What {
    /// From byte `from` of an origin.
    Copy {
        origin: usize,
        from: usize,
    },
    Pieces(Vec<Piece>),
}

impl Job {
    fn parts(self) -> Vec<Job> {
        let Job { at, len, what: What::Copy { origin, from } } = self else { return vec![self] };
        let part =
            |start| Job { at: at + start, len: PART.min(len - start), what: What::Copy { origin, from: from + start } };
        (0..len).step_by(PART).map(part).collect()
    }

    fn write(self, out: &File, origins: &[Origin]) -> Result<(), RopeError> {
        match self.what {
            What::Copy { origin, from } => Ok(copy(&origins[origin], from, out, self.at, self.len)?),
            What::Pieces(pieces) => {
                let mut out = BufWriter::with_capacity(1 << 16, At { file: out, offset: self.at as u64 });
                for piece in pieces {
                    match piece {
                        Piece::Ready(bytes) => out.write_all(&bytes)?,
                        Piece::Due(due) => due.write_to(&mut out)?,
                    }
                }
                Ok(out.flush()?)
            }
        }
    }
}

/// Copies `len` bytes at `from` of the origin to `at` of `out`.
fn copy(origin: &Origin, from: usize, out: &File, at: usize, len: usize) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    if len >= LONG {
        use rustix::io::Errno;
        let (mut from, mut at, end) = (from as u64, at as u64, (from + len) as u64);
        let copied = loop {
            if from == end {
                return Ok(());
            }
            // Both offsets are moved on by what was copied.
            let left = (end - from) as usize;
            match rustix::fs::copy_file_range(&*origin.file, Some(&mut from), out, Some(&mut at), left) {
                Ok(0) => return Err(std::io::Error::other("the input file became shorter while it was read")),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => break from,
                Err(e) => return Err(e.into()),
            }
        };
        let rest = &origin.bytes[copied as usize..end as usize];
        return At { file: out, offset: at }.write_all(rest);
    }
    At { file: out, offset: at as u64 }.write_all(&origin.bytes[from..from + len])
}

/// Writes to a new file at a place of its own, whatever others do with the file meanwhile. Zeros are there already.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

/// Zeros are passed over by pages.
static PAGE: [u8; 4096] = [0; 4096];

impl Write for At<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let zeros: usize =
            bytes.chunks(PAGE.len()).take_while(|part| **part == PAGE[..part.len()]).map(<[u8]>::len).sum();
        if zeros > 0 {
            self.offset += zeros as u64;
            return Ok(zeros);
        }
        #[cfg(unix)]
        let written = std::os::unix::fs::FileExt::write_at(self.file, bytes, self.offset)?;
        #[cfg(windows)]
        let written = std::os::windows::fs::FileExt::seek_write(self.file, bytes, self.offset)?;
        self.offset += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Why a rope was not written: the file system, or what a due piece had to say.
#[derive(Debug)]
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
    /// Makes the bytes into `out`.
    ///
    /// # Errors
    /// Those of the making and of `out`; more or fewer bytes than were announced.
    pub fn write_to(self, out: &mut dyn Write) -> Result<(), RopeError> {
        let mut counted = Counted { out, written: 0 };
        (self.write)(&mut counted)?;
        if counted.written != self.len {
            let what = format!("a rewritten tensor has {} bytes where {} were announced", counted.written, self.len);
            return Err(Error::model(what).into());
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn every_piece_lands_at_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let long: Vec<u8> = (0..3 * LONG).map(|i| (i % 251) as u8).collect();
        std::fs::write(dir.path().join("long"), &long).unwrap();
        let origin = Origin::open(&dir.path().join("long")).unwrap();
        let mut rope = Rope::default();
        let mut expected = Vec::new();
        for turn in 0..6u8 {
            let (from, to) = (usize::from(turn) * 1000, 2 * LONG + usize::from(turn) * 777);
            rope.push(origin.bytes.slice(from..to));
            expected.extend(&long[from..to]);
            rope.push(vec![turn; 5]);
            expected.extend([turn; 5]);
            // Zeros that are not written, with and without something before them in the same piece.
            let mut zeros = vec![0; LONG + 9000];
            zeros[0] = turn % 3;
            expected.extend(&zeros);
            rope.push(zeros);
            // Long ones take a thread's turn, short ones join their neighbours.
            let len = if turn % 2 == 0 { LONG + 3 } else { 10 };
            let write = move |out: &mut dyn Write| Ok(out.write_all(&vec![100 + turn; len])?);
            rope.push_due(Due { len, write: Box::new(write) });
            expected.extend(vec![100 + turn; len]);
        }
        assert_eq!(rope.len(), expected.len());
        let mut out = File::options().read(true).write(true).create_new(true).open(dir.path().join("out")).unwrap();
        rope.write_to(&out, &[origin]).unwrap();
        let mut found = Vec::new();
        out.read_to_end(&mut found).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn of_several_failures_the_first_is_told_and_a_wrong_length_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let out = File::create_new(dir.path().join("out")).unwrap();
        let mut rope = Rope::default();
        let write = |out: &mut dyn Write| Ok(out.write_all(&[0; 7])?);
        rope.push_due(Due { len: 8, write: Box::new(write) });
        let told = rope.write_to(&out, &[]).unwrap_err().at(dir.path()).to_string();
        assert!(told.contains("7 bytes where 8"), "{told}");
    }
}
