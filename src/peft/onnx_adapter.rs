//! `.onnx_adapter`, which ONNX Runtime lays over a model's overridable initializers at run time: named tensors in a
//! flatbuffer, below 2 GiB. Source: ONNX Runtime's `lora/adapter_format/adapter_schema.fbs`, and files that it wrote.
//!
//! ```text
//! file identifier "TORT"
//! Adapter:   format_version, adapter_version, model_version: int32; parameters: [Parameter]
//! Parameter: name: string; dims: [int64]; data_type: int32 (ONNX's numbers); raw_data: [uint8], 8-byte aligned
//! ```

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use flatbuffers::{FlatBufferBuilder, InvalidFlatbuffer, Vector, Verifier, VerifierOptions, WIPOffset};

use super::{content, put};
use crate::onnx::{DataType, Tensor, TensorProto};
use crate::{Error, Result};

const IDENTIFIER: &str = "TORT";
const FORMAT: i32 = 1;
/// Where a table's index has the offsets of its four fields; both tables have four.
const SLOTS: [u16; 4] = [4, 6, 8, 10];
/// Offsets are 32-bit and signed.
const MAX_FILE: usize = i32::MAX as usize;

/// Numbers of the writer's own choosing, which ONNX Runtime only hands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Versions {
    pub adapter: i32,
    pub model: i32,
}

/// Writes named tensors to `path`, which appears whole.
///
/// # Errors
/// What ONNX Runtime would not load: two tensors of one name, a tensor without dimensions, 2 GiB or more; anything the
/// file system refuses.
pub fn write(path: &Path, parameters: &[(String, Tensor)], versions: Versions) -> Result<()> {
    put(path, encode(parameters, versions).map_err(|what| Error::file(path, what))?)
}

/// Reads the tensors of `path` in the file's order.
///
/// # Errors
/// Anything that is not such a file, damaged or hostile: no offset is followed and nothing is allocated before it has
/// been checked against the file's length.
pub fn read(path: &Path) -> Result<Vec<(String, Tensor)>> {
    decode(&content(path)?).map_err(|what| Error::file(path, what))
}

fn encode(parameters: &[(String, Tensor)], versions: Versions) -> Result<Bytes, String> {
    let mut names = HashSet::new();
    let mut size = 256;
    for (name, tensor) in parameters {
        if !names.insert(name) {
            return Err(format!("two tensors are called {name}; an adapter has one of a name"));
        }
        if tensor.dims().is_empty() {
            return Err(format!("tensor {name} is a scalar, which ONNX Runtime does not load from an adapter"));
        }
        size += tensor.len() * element_size(tensor) + name.len() + 8 * tensor.dims().len() + 64;
    }
    if size > MAX_FILE {
        return Err(format!(
            "the tensors need {size} bytes, and an .onnx_adapter ends below 2 GiB; write a PEFT directory instead"
        ));
    }
    let mut builder = FlatBufferBuilder::with_capacity(size);
    let mut tables = Vec::new();
    for (name, tensor) in parameters {
        let name = builder.create_string(name);
        let dims: Vec<i64> = tensor.dims().iter().map(|d| *d as i64).collect();
        let dims = builder.create_vector(&dims);
        let data = aligned(&mut builder, &tensor.to_bytes());
        let table = builder.start_table();
        builder.push_slot_always(SLOTS[0], name);
        builder.push_slot_always(SLOTS[1], dims);
        builder.push_slot_always(SLOTS[2], tensor.data_type() as i32);
        builder.push_slot_always(SLOTS[3], data);
        tables.push(builder.end_table(table));
    }
    let tables = builder.create_vector(&tables);
    let root = builder.start_table();
    for (slot, version) in SLOTS.into_iter().zip([FORMAT, versions.adapter, versions.model]) {
        builder.push_slot_always(slot, version);
    }
    builder.push_slot_always(SLOTS[3], tables);
    let root = builder.end_table(root);
    builder.finish(root, Some(IDENTIFIER));
    let (bytes, start) = builder.collapse();
    Ok(Bytes::from(bytes).slice(start..))
}

fn element_size(tensor: &Tensor) -> usize {
    use DataType::*;
    match tensor.data_type() {
        Double | Int64 | Uint64 => 8,
        Float | Int32 | Uint32 => 4,
        Float16 | Bfloat16 | Int16 | Uint16 => 2,
        _ => 1,
    }
}

/// A vector of bytes that begins at a multiple of 8. A builder works from the end of the file towards its beginning,
/// so the bytes go in as whole words, of which the last one may be filled up with zeros behind the vector's end.
fn aligned<'a>(builder: &mut FlatBufferBuilder<'a>, data: &[u8]) -> WIPOffset<Vector<'a, u8>> {
    let words = data.chunks(8);
    builder.start_vector::<u64>(words.len());
    for bytes in words.rev() {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        builder.push(u64::from_le_bytes(word));
    }
    builder.end_vector::<u8>(data.len())
}

fn decode(file: &Bytes) -> Result<Vec<(String, Tensor)>, String> {
    if file.len() > MAX_FILE {
        return Err(format!("the file has {} bytes, and an .onnx_adapter ends below 2 GiB", file.len()));
    }
    if file.get(4..8) != Some(IDENTIFIER.as_bytes()) {
        return Err("not an .onnx_adapter file (it has no \"TORT\" at byte 4)".into());
    }
    // Fields that share bytes could make a small file large: each byte may be read four times, which is more than the
    // indices need that honest tables share.
    let options = VerifierOptions { max_apparent_size: 4 * file.len(), ..Default::default() };
    let mut reader = Reader { file, verifier: Verifier::new(&options, file) };
    let damaged = |e: InvalidFlatbuffer| {
        let what = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        format!("this .onnx_adapter file is damaged: {what}")
    };
    let root = reader.followed(0).map_err(damaged)?;
    let [format, _, _, parameters] = reader.fields(root).map_err(damaged)?;
    let format = reader.int(format).map_err(damaged)?;
    if format != FORMAT {
        return Err(format!("the file is of format version {format}; only version {FORMAT} is known"));
    }
    let tables = reader.vector::<u32>(parameters).map_err(damaged)?;
    let mut read = Vec::new();
    let mut names = HashSet::new();
    for at in tables.step_by(size_of::<u32>()) {
        let (name, proto) = reader.parameter(at).map_err(damaged)?;
        let name = str::from_utf8(&name).map_err(|e| format!("the name of a tensor is not UTF-8: {e}"))?;
        let proto = TensorProto { name: Some(name.into()), ..proto };
        let tensor = Tensor::from_proto(&proto).map_err(|e| e.to_string())?;
        if !names.insert(name.to_string()) {
            return Err(format!("two tensors are called {name}"));
        }
        read.push((name.to_string(), tensor));
    }
    Ok(read)
}

type Checked<T> = std::result::Result<T, InvalidFlatbuffer>;

/// Follows offsets through the flatbuffers crate's verifier, which checks each one.
struct Reader<'a> {
    file: &'a Bytes,
    verifier: Verifier<'a, 'a>,
}

impl Reader<'_> {
    /// Where the offset at `at` leads.
    fn followed(&mut self, at: usize) -> Checked<usize> {
        Ok(at.saturating_add(self.verifier.get_uoffset(at)? as usize))
    }

    /// Where the fields of the table at `at` are, `None` for one that is left out.
    fn fields(&mut self, at: usize) -> Checked<[Option<usize>; 4]> {
        let mut table = self.verifier.visit_table(at)?;
        let mut fields = [None; 4];
        for (field, slot) in fields.iter_mut().zip(SLOTS) {
            *field = table.deref(slot)?;
        }
        table.finish();
        Ok(fields)
    }

    fn int(&mut self, field: Option<usize>) -> Checked<i32> {
        let Some(at) = field else { return Ok(0) };
        self.verifier.in_buffer::<i32>(at)?;
        Ok(self.file[at..].first_chunk().map_or(0, |bytes| i32::from_le_bytes(*bytes)))
    }

    /// Where the elements are of a vector of `T` that a field leads to; nowhere if the field is left out.
    fn vector<T>(&mut self, field: Option<usize>) -> Checked<Range<usize>> {
        let Some(field) = field else { return Ok(0..0) };
        let at = self.followed(field)?;
        let len = (self.verifier.get_uoffset(at)? as usize).saturating_mul(size_of::<T>());
        let start = at.saturating_add(size_of::<u32>());
        self.verifier.is_aligned::<T>(start)?;
        self.verifier.range_in_buffer(start, len)?;
        Ok(start..start + len)
    }

    /// The name, and the rest as a tensor, of the parameter whose offset is at `at`.
    fn parameter(&mut self, at: usize) -> Checked<(Bytes, TensorProto)> {
        let table = self.followed(at)?;
        let [name, dims, data_type, data] = self.fields(table)?;
        let dims = self.vector::<i64>(dims)?;
        let proto = TensorProto {
            dims: self.file[dims].as_chunks().0.iter().map(|d| i64::from_le_bytes(*d)).collect(),
            data_type: Some(self.int(data_type)?),
            raw_data: Some(self.file.slice(self.vector::<u8>(data)?)),
            ..Default::default()
        };
        Ok((self.file.slice(self.vector::<u8>(name)?), proto))
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// `onnxruntime.AdapterFormat` 1.31.1 exported this with adapter version 3 and model version −2.
    const EXPORTED: &str = "\
        08000000544f525468ffffff0100000003000000feffffff04000000030000008c00000040000000040000008cffffff\
        2c0000001800000007000000040000000800000007000000000000000100000001000000000000000000000003000000\
        6f6e6500c4ffffff2c000000180000000a0000000400000006000000003e00c0ff7b0000010000000300000000000000\
        000000000400000068616c66000000000c001400040008000c0010000c00000044000000280000000100000004000000\
        180000000000803f0000004000004040000080c00000003f0000807f0200000002000000000000000300000000000000\
        00000000170000006c696e302e626f6e655f626c6f636b2e64656661756c7400";

    fn exported() -> Bytes {
        let digits: Vec<u32> = EXPORTED.chars().map(|c| c.to_digit(16).unwrap()).collect();
        digits.as_chunks::<2>().0.iter().map(|[high, low]| (high * 16 + low) as u8).collect()
    }

    fn parameters() -> Vec<(String, Tensor)> {
        let half = [1.5, -2.0, 65504.0].map(f16::from_f32).to_vec();
        [
            ("lin0.bone_block.default", Tensor::new(&[2, 3], vec![1f32, 2., 3., -4., 0.5, f32::INFINITY])),
            ("half", Tensor::new(&[3], half)),
            ("one", Tensor::new(&[1], vec![7i64])),
        ]
        .map(|(name, tensor)| (name.to_string(), tensor))
        .to_vec()
    }

    #[test]
    fn what_onnx_runtime_wrote_is_read() {
        assert_eq!(decode(&exported()).unwrap(), parameters());
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut all = parameters();
        all.push(("none".into(), Tensor::new(&[0, 3], Vec::<f32>::new())));
        all.push(("bytes".into(), Tensor::new(&[5], vec![1u8, 2, 3, 4, 5])));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.onnx_adapter");
        write(&path, &all, Versions { adapter: 1, model: i32::MIN }).unwrap();
        assert_eq!(read(&path).unwrap(), all);
        // Values begin at multiples of 8, for whoever reads them in place.
        let file = std::fs::read(&path).unwrap();
        for data in [&[1, 2, 3, 4, 5][..], &[0, 0x3e, 0, 0xc0], &[0, 0, 0x80, 0x3f]] {
            let at = file.windows(data.len()).position(|w| w == data).unwrap();
            assert_eq!(at % 8, 0, "{data:?}");
        }
        write(&path, &[], Versions::default()).unwrap();
        assert_eq!(read(&path).unwrap(), []);
    }

    #[test]
    fn no_damage_does_worse_than_an_error() {
        let whole = [exported(), encode(&parameters(), Versions::default()).unwrap()];
        for file in whole {
            for end in 0..file.len() {
                let cut = decode(&file.slice(..end));
                // The last bytes are the end of a name and its padding in one of the files.
                assert!(cut.is_err() || end + 8 > file.len(), "{end}");
            }
            for (at, flip) in (0..file.len()).flat_map(|at| [(at, 0xff), (at, 0x80), (at, 1), (at, 0x40)]) {
                let mut damaged = file.to_vec();
                damaged[at] ^= flip;
                let _ = decode(&damaged.into());
            }
            for at in 0..file.len() - 3 {
                for value in [0u32, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX, file.len() as u32] {
                    let mut damaged = file.to_vec();
                    damaged[at..at + 4].copy_from_slice(&value.to_le_bytes());
                    let _ = decode(&damaged.into());
                }
            }
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let at = |find: &[u8], file: &Bytes| file.windows(find.len()).position(|w| w == find).unwrap();
        let damaged = |find: &[u8], put: &[u8]| {
            let mut file = exported().to_vec();
            let at = at(find, &exported());
            file[at..at + put.len()].copy_from_slice(put);
            decode(&file.into()).unwrap_err()
        };
        for (find, put, words) in [
            (&b"TORT"[..], &b"TORS"[..], "not an .onnx_adapter file"),
            (&[1, 0, 0, 0, 3, 0, 0, 0, 0xfe], &[2], "format version 2"),
            (b"half", b"h\xffl", "not UTF-8"),
            // The element type 10 of `half`, and its 3 elements.
            (&[10, 0, 0, 0, 4, 0], &[77], "tensor half: unknown element type 77"),
            (&[10, 0, 0, 0, 4, 0], &[1], "tensor half: shape [3] needs 12 bytes, but there are 6"),
            (&[3, 0, 0, 0, 0, 0, 0, 0, 0], &[0, 0, 0, 0, 0, 0, 0, 0x80], "tensor half: impossible shape"),
            (&[3, 0, 0, 0, 0, 0, 0, 0, 0], &[0, 0, 0, 0, 0, 0, 0, 0x40], "tensor half: impossible shape"),
        ] {
            let text = damaged(find, put);
            assert!(text.contains(words), "{text}");
        }
        let refused = |parameters: &[(&str, Tensor)]| {
            let parameters: Vec<_> = parameters.iter().map(|(n, t)| (n.to_string(), t.clone())).collect();
            encode(&parameters, Versions::default()).unwrap_err()
        };
        let one = Tensor::new(&[1], vec![1f32]);
        assert!(refused(&[("a", one.clone()), ("a", one)]).contains("two tensors are called a"));
        assert!(refused(&[("a", Tensor::scalar(1f32))]).contains("scalar"));
    }

    /// Many parameters that share one large value would take far more memory than the file has bytes.
    #[test]
    fn shared_bytes_do_not_multiply() {
        let file = encode(&[("x".into(), Tensor::new(&[4000], vec![1u8; 4000]))], Versions::default()).unwrap();
        let mut builder = FlatBufferBuilder::new();
        let (name, dims) = (builder.create_string("x"), builder.create_vector(&[4000i64]));
        let data = aligned(&mut builder, &[1; 4000]);
        let tables: Vec<_> = (0..50)
            .map(|_| {
                let table = builder.start_table();
                builder.push_slot_always(SLOTS[0], name);
                builder.push_slot_always(SLOTS[1], dims);
                builder.push_slot_always(SLOTS[2], 2i32);
                builder.push_slot_always(SLOTS[3], data);
                builder.end_table(table)
            })
            .collect();
        let tables = builder.create_vector(&tables);
        let root = builder.start_table();
        builder.push_slot_always(SLOTS[0], FORMAT);
        builder.push_slot_always(SLOTS[3], tables);
        let root = builder.end_table(root);
        builder.finish(root, Some(IDENTIFIER));
        assert!(decode(&Bytes::copy_from_slice(builder.finished_data())).is_err());
        assert_eq!(decode(&file).unwrap().len(), 1);
    }
}
