//! Array files: `.safetensors` (read in place over a memory map) and NumPy's `.npz`.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::{NpzReader, ReadNpyError, ReadNpzError, ReadableElement};
use safetensors::{Dtype, SafeTensors};

use super::room::{Room, Stored};
use super::{Array, npz};
use crate::onnx::external::map_file;
use crate::onnx::{DataType, Element, Tensor};
use crate::{Error, Result};

/// The arrays of a `.safetensors` file; no element is copied.
pub(super) fn safetensors(path: &Path, _: &Room) -> Result<Vec<(String, Array)>> {
    let bytes = map_file(path).map_err(Error::io("open", path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::file(path, format!("this is not a whole .safetensors file ({e})")))?;
    let mut arrays = Vec::new();
    for (name, view) in file.iter() {
        let data_type = match view.dtype() {
            Dtype::F32 => DataType::Float,
            Dtype::F64 => DataType::Double,
            Dtype::F16 => DataType::Float16,
            Dtype::BF16 => DataType::Bfloat16,
            Dtype::I64 => DataType::Int64,
            Dtype::I32 => DataType::Int32,
            Dtype::I16 => DataType::Int16,
            Dtype::I8 => DataType::Int8,
            Dtype::U64 => DataType::Uint64,
            Dtype::U32 => DataType::Uint32,
            Dtype::U16 => DataType::Uint16,
            Dtype::U8 => DataType::Uint8,
            Dtype::BOOL => DataType::Bool,
            other => return Err(Error::file(path, format!("array {name}: elements of type {other:?} are not read"))),
        };
        let array =
            Array { data_type, dims: view.shape().to_vec(), bytes: Stored::Memory(bytes.slice_ref(view.data())) };
        arrays.push((name.to_string(), array));
    }
    arrays.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(arrays)
}

/// The arrays of a `.npz` file, compressed or not. Those that are too large for memory are read where they lie, if they lie
/// there as they are; else one at a time is in memory as a whole.
pub(super) fn npz(path: &Path, room: &Room) -> Result<Vec<(String, Array)>> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut reader = NpzReader::new(BufReader::new(file))
        .map_err(|e| Error::file(path, format!("this is not a whole .npz file ({e})")))?;
    let names = reader.names().map_err(|e| Error::file(path, format!("its list of arrays cannot be read ({e})")))?;
    let archive = map_file(path).map_err(Error::io("open", path))?;
    let mut arrays = Vec::new();
    for name in names {
        if let Some(array) = npz::in_place(&archive, &name).filter(|array| !room.has(array.bytes.len())) {
            arrays.push((name, array));
            continue;
        }
        let tensor = npy(&mut reader, &name).map_err(|what| Error::file(path, format!("array {name}: {what}")))?;
        let (data_type, dims) = (tensor.data_type(), tensor.dims().to_vec());
        arrays.push((name, Array { data_type, dims, bytes: room.keep(&tensor)? }));
    }
    Ok(arrays)
}

type Npz = NpzReader<BufReader<File>>;

/// An array of whichever type it has: each is tried on the header, which says so at once where it is another.
fn npy(npz: &mut Npz, name: &str) -> Result<Tensor, String> {
    let readers: [fn(&mut Npz, &str) -> Attempt; 11] = [
        |npz, name| read(npz, name, f32::wrap),
        |npz, name| read(npz, name, i64::wrap),
        |npz, name| read(npz, name, i32::wrap),
        |npz, name| read(npz, name, f64::wrap),
        |npz, name| read(npz, name, u8::wrap),
        |npz, name| read(npz, name, i8::wrap),
        |npz, name| read(npz, name, i16::wrap),
        |npz, name| read(npz, name, u16::wrap),
        |npz, name| read(npz, name, u32::wrap),
        |npz, name| read(npz, name, u64::wrap),
        |npz, name| read(npz, name, Tensor::Bool),
    ];
    let mut descriptor = String::new();
    for read in readers {
        match read(npz, name)? {
            Typed::Right(tensor) => return Ok(tensor),
            Typed::Other(found) => descriptor = found,
        }
    }
    Err(format!("elements of type {descriptor} are not read from .npz; save it as .safetensors, or as another type"))
}

type Attempt = Result<Typed, String>;

/// Whether the array had the type it was tried as.
enum Typed {
    Right(Tensor),
    /// It has this one (NumPy's descriptor).
    Other(String),
}

fn read<T: ReadableElement + Clone>(npz: &mut Npz, name: &str, wrap: fn(ArrayD<T>) -> Tensor) -> Attempt {
    match npz.by_name::<OwnedRepr<T>, IxDyn>(name) {
        // NumPy may have stored columns first.
        Ok(array) if array.is_standard_layout() => Ok(Typed::Right(wrap(array))),
        Ok(array) => Ok(Typed::Right(wrap(array.as_standard_layout().into_owned()))),
        Err(ReadNpzError::Npy(ReadNpyError::WrongDescriptor(found))) => Ok(Typed::Other(found.to_string())),
        Err(e) => Err(format!("it cannot be read ({e})")),
    }
}
