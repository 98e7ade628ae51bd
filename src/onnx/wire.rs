//! Protobuf's wire format, one level deep: a message as the sequence of its fields' raw bytes, and ropes of such
//! bytes. This is what makes a rewrite lossless: what is not changed is copied as it stands, never re-encoded.
//! Source: the "Encoding" page of the Protocol Buffers documentation.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};

use bytes::Bytes;

use crate::{Error, Result};

/// One field of a message: its number and its bytes as they stand in the file.
#[derive(Debug, Clone)]
pub struct Record {
    pub field: u32,
    /// Key, length (if any) and body.
    pub raw: Bytes,
    /// The body of a length-delimited field, the value's bytes of any other.
    pub body: Bytes,
}

/// Splits a message into its fields, in file order. Fails on anything that protobuf does not allow.
pub fn records(message: &Bytes) -> std::result::Result<Vec<Record>, String> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < message.len() {
        let start = at;
        let key = varint(message, &mut at)?;
        let field = u32::try_from(key >> 3).ok().filter(|f| *f > 0).ok_or("a field number out of range")?;
        let body_start;
        match key & 7 {
            0 => {
                body_start = at;
                varint(message, &mut at)?;
            }
            1 | 5 => {
                body_start = at;
                at += if key & 7 == 1 { 8 } else { 4 };
            }
            2 => {
                let len = usize::try_from(varint(message, &mut at)?).map_err(|_| "a field length out of range")?;
                body_start = at;
                at = at.checked_add(len).ok_or("a field length out of range")?;
            }
            other => return Err(format!("wire type {other} at byte {start}, which ONNX files do not use")),
        }
        if at > message.len() {
            return Err(format!("field {field} at byte {start} runs past the end"));
        }
        out.push(Record { field, raw: message.slice(start..at), body: message.slice(body_start..at) });
    }
    Ok(out)
}

fn varint(bytes: &[u8], at: &mut usize) -> std::result::Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..70).step_by(7) {
        let byte = *bytes.get(*at).ok_or("a number runs past the end")?;
        *at += 1;
        if shift == 63 && byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number of more than 64 bits".into())
}

/// Key and length of a length-delimited field.
pub fn header(field: u32, len: usize) -> Bytes {
    let mut out = Vec::with_capacity(12);
    for mut value in [u64::from(field) << 3 | 2, len as u64] {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }
    out.into()
}

/// A length-delimited field with `message` as its body.
pub fn field(number: u32, message: &impl prost::Message) -> Rope {
    let mut rope = Rope::default();
    let body = message.encode_to_vec();
    rope.push(header(number, body.len()));
    rope.push(body);
    rope
}

/// The message with the `nth` occurrence of string field `number` replaced; every other byte as it was.
pub fn with_string(message: &Bytes, number: u32, nth: usize, value: &str) -> std::result::Result<Bytes, String> {
    let mut out = Vec::with_capacity(message.len() + value.len());
    let mut seen = 0;
    for record in records(message)? {
        if record.field == number {
            if seen == nth {
                out.extend_from_slice(&header(number, value.len()));
                out.extend_from_slice(value.as_bytes());
                seen += 1;
                continue;
            }
            seen += 1;
        }
        out.extend_from_slice(&record.raw);
    }
    if seen <= nth { Err(format!("there is no occurrence {nth} of field {number}")) } else { Ok(out.into()) }
}

/// Bytes to be written one after another: slices of what was read, new bytes, and bytes made only when they are due.
#[derive(Default)]
pub struct Rope {
    pieces: Vec<Piece>,
    len: usize,
}

enum Piece {
    Ready(Bytes),
    Due { len: usize, make: Box<dyn FnOnce() -> Result<Bytes> + Send> },
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

    /// `len` bytes that `make` will give when they are written, so that no more than one of them is held at a time.
    pub fn push_due(&mut self, len: usize, make: impl FnOnce() -> Result<Bytes> + Send + 'static) {
        self.len += len;
        self.pieces.push(Piece::Due { len, make: Box::new(make) });
    }

    pub fn append(&mut self, other: Rope) {
        for piece in other.pieces {
            match piece {
                Piece::Ready(bytes) => self.push(bytes),
                Piece::Due { len, make } => {
                    self.len += len;
                    self.pieces.push(Piece::Due { len, make });
                }
            }
        }
    }

    /// This rope as the body of length-delimited field `number`.
    pub fn into_field(self, number: u32) -> Rope {
        let mut rope = Rope::default();
        rope.push(header(number, self.len));
        rope.append(self);
        rope
    }

    /// The whole as one buffer.
    pub fn into_bytes(self) -> Result<Bytes> {
        let mut out = Vec::with_capacity(self.len);
        for piece in self.pieces {
            match piece {
                Piece::Ready(bytes) => out.extend_from_slice(&bytes),
                Piece::Due { len, make } => out.extend_from_slice(&made(len, make)?),
            }
        }
        Ok(out.into())
    }

    /// Writes everything at the file's position. `origin` is the file that `mapped` was read from: long slices of it
    /// go from file to file inside the kernel (a reflink where the file system has them), not through memory.
    pub fn write_to(self, out: &mut File, origin: Option<(&File, &Bytes)>) -> Result<(), RopeError> {
        const LONG: usize = 1 << 20;
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
                (Piece::Due { len, make }, _) => out.write_all(&made(len, make)?)?,
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

fn made(len: usize, make: Box<dyn FnOnce() -> Result<Bytes> + Send>) -> Result<Bytes> {
    let bytes = make()?;
    if bytes.len() != len {
        return Err(Error::model(format!("a rewritten tensor has {} bytes where {len} were announced", bytes.len())));
    }
    Ok(bytes)
}

fn offset_in(whole: &Bytes, part: &Bytes) -> Option<usize> {
    let (whole, part) = (whole.as_ptr_range(), part.as_ptr_range());
    (whole.start <= part.start && part.end <= whole.end).then(|| part.start as usize - whole.start as usize)
}
