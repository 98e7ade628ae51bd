//! Weights in memory: to float32 and back, and turned.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::onnx::DataType;

/// Stored floats as float32, in `values`.
pub(super) fn widened(bytes: &[u8], data_type: DataType, values: &mut Vec<f32>) {
    values.resize(bytes.len() / if data_type == DataType::Float { 4 } else { 2 }, 0.0);
    if data_type == DataType::Float {
        bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
        return;
    }
    let mut bits = vec![0u16; values.len()];
    bytemuck::cast_slice_mut(&mut bits).copy_from_slice(bytes);
    match data_type {
        DataType::Float16 => bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(values),
        _ => bits.reinterpret_cast::<half::bf16>().convert_to_f32_slice(values),
    }
}

/// Float32 values in the stored type, rounded to nearest.
pub(super) fn narrowed(values: &[f32], data_type: DataType) -> Vec<u8> {
    let mut bits = vec![0u16; values.len()];
    match data_type {
        DataType::Float16 => bits.reinterpret_cast_mut::<half::f16>().convert_from_f32_slice(values),
        DataType::Bfloat16 => bits.reinterpret_cast_mut::<half::bf16>().convert_from_f32_slice(values),
        DataType::Double => return values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        _ => return bytemuck::cast_slice(values).to_vec(),
    }
    bytemuck::cast_slice(&bits).to_vec()
}

/// Of two numbers above zero.
pub(super) fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}

/// A row-major matrix of `rows` × `columns` elements of `size` bytes, turned.
pub(super) fn transposed(bytes: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    for (row, line) in bytes.chunks_exact((columns * size).max(1)).enumerate() {
        for (column, value) in line.chunks_exact(size).enumerate() {
            let at = (column * rows + row) * size;
            out[at..at + size].copy_from_slice(value);
        }
    }
    out
}
