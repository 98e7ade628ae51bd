//! The head of a `.safetensors` file: what the tensors after it are called, and where each stands.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::{DataType, TensorProto};

/// A tensor of such a file: the bytes after the head from `start` on are its own, without a gap to the next one.
pub(super) struct Entry {
    name: String,
    data_type: DataType,
    dims: Vec<i64>,
    start: usize,
    end: usize,
}

impl Entry {
    pub fn of(tensor: &TensorProto, range: std::ops::Range<usize>) -> Self {
        let data_type = DataType::try_from(tensor.data_type()).unwrap_or(DataType::Undefined);
        let dims = tensor.dims.clone();
        Self { name: tensor.name().into(), data_type, dims, start: range.start, end: range.end }
    }
}

/// Bytes of an element of type `data_type`, as the format knows it; what it does not know stands there in bytes.
pub(super) fn element_size(data_type: i32) -> usize {
    match known(DataType::try_from(data_type).unwrap_or(DataType::Undefined)) {
        Some("F64" | "I64" | "U64") => 8,
        Some("F32" | "I32" | "U32") => 4,
        Some("F16" | "BF16" | "I16" | "U16") => 2,
        _ => 1,
    }
}

fn known(data_type: DataType) -> Option<&'static str> {
    use DataType::*;
    Some(match data_type {
        Double => "F64",
        Float => "F32",
        Float16 => "F16",
        Bfloat16 => "BF16",
        Float8e4m3fn => "F8_E4M3",
        Float8e5m2 => "F8_E5M2",
        Int64 => "I64",
        Int32 => "I32",
        Int16 => "I16",
        Int8 => "I8",
        Uint64 => "U64",
        Uint32 => "U32",
        Uint16 => "U16",
        Uint8 => "U8",
        Bool => "BOOL",
        _ => return None,
    })
}

/// The head, its length in front. Names that come twice (in graphs of their own) get a number.
pub(super) fn head(entries: &[Entry]) -> Vec<u8> {
    let mut taken: HashSet<String> = HashSet::new();
    let mut fields = Map::new();
    for Entry { name, data_type, dims, start, end } in entries {
        let name = if name.is_empty() { "constant" } else { name };
        let candidates = (1..).map(|n| if n == 1 { name.to_string() } else { format!("{name}.{n}") });
        let free = candidates.into_iter().find(|c| *c != "__metadata__" && !taken.contains(c)).unwrap_or_default();
        taken.insert(free.clone());
        let (dtype, shape): (&str, Value) = match known(*data_type) {
            Some(dtype) => (dtype, json!(dims)),
            None => ("U8", json!([end - start])),
        };
        fields.insert(free, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let mut text = Value::Object(fields).to_string();
    // Elements of 8 bytes stay aligned.
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
