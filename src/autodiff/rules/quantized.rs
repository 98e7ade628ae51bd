//! Products with weights of few bits.

use super::{MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    let rule = |v: &Vjp| v.through(|v| Ok(vec![Some(matmul_n_bits(v)?)]));
    rules.insert(MICROSOFT, "MatMulNBits", Rule::vjp(rule));
}

/// Y = A·Wᵀ + bias with W[n, k] = (B[n, k] - zero[n, k / block])·scale[n, k / block] (`ContribOperators.md`).
fn matmul_n_bits(v: &Vjp) -> Result<String> {
    let (a, b, scales) = (v.x(0)?, v.x(1)?, v.x(2)?);
    let bits = v.node.attr_i("bits", 4);
    let (width, rows, block) = (v.node.attr_i("K", 0), v.node.attr_i("N", 0), v.node.attr_i("block_size", 0));
    if !matches!(bits, 4 | 8) || width <= 0 || rows <= 0 || block <= 0 {
        return Err(v.error("only weights of 4 or 8 bits are supported"));
    }
    if v.node.input_at(4).is_some() {
        return Err(v.error("g_idx is not supported"));
    }
    let element = v.shapes.element(a).unwrap_or(DataType::Float);
    let blocks = (width - 1) / block + 1;
    let values = v.cast(unpacked(v, b, bits, &[rows, blocks, block]), element);
    let zero = match v.node.input_at(3) {
        None => v.c(if bits == 4 { 8.0 } else { 128.0 }),
        Some(zero) if v.shapes.element(zero) == Some(DataType::Uint8) => {
            // Each row of zero points fills whole bytes.
            let zeros = unpacked(v, zero, bits, &[rows, -1]);
            v.cast(v.unsqueeze(slice(v, &zeros, 1, blocks), v.ints(&[-1])), element)
        }
        Some(zero) => v.respec(zero, &[rows, blocks, 1]),
    };
    let weight = v.mul(v.sub(values, zero), v.respec(scales, &[rows, blocks, 1]));
    let mut weight = v.respec(&weight, &[rows, blocks * block]);
    if blocks * block != width {
        weight = slice(v, &weight, 1, width);
    }
    let y = v.matmul(a, v.op("Transpose", &[&weight], vec![AttributeProto::ints("perm", &[1, 0])]));
    Ok(v.node.input_at(5).map_or(y.clone(), |bias| v.add(&y, bias)))
}

/// The first `n` along `axis`.
fn slice(v: &Vjp, x: &str, axis: i64, n: i64) -> String {
    v.op("Slice", &[x, &v.ints(&[0]), &v.ints(&[n]), &v.ints(&[axis])], vec![])
}

/// Bytes, or both halves of each, the lower one first, in `spec`.
fn unpacked(v: &Vjp, bytes: &str, bits: i64, spec: &[i64]) -> String {
    if bits == 8 {
        return v.respec(bytes, spec);
    }
    let four = v.cast(v.int(4), DataType::Uint8);
    let shift = |x: &str, to: &str| v.op("BitShift", &[x, &four], vec![AttributeProto::string("direction", to)]);
    let halves = [shift(&shift(bytes, "LEFT"), "RIGHT"), shift(bytes, "RIGHT")];
    v.respec(&v.concat(&halves.map(|half| v.unsqueeze(half, v.ints(&[-1]))), -1), spec)
}
