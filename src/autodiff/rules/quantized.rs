//! What comes off a grid, and products with weights of few bits. What goes onto a grid is refused, in `zero`.

use super::rotary::counting;
use super::{Adjoints, MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    let rule = |v: &Vjp| v.through(|v| Ok(vec![Some(matmul_n_bits(v)?)]));
    rules.insert(MICROSOFT, "MatMulNBits", Rule::vjp(rule));
    for domain in ["", MICROSOFT] {
        rules.insert(domain, "DequantizeLinear", Rule::vjp(dequantize));
    }
}

/// (x - zero point)·scale, with one scale for all, for each slice along `axis`, or for each block of a slice. What is
/// read, x, is whole numbers, so only the scale has an adjoint.
fn dequantize(v: &Vjp) -> Result<Adjoints> {
    let (x, scale) = (v.x(0)?, v.x(1)?);
    // The difference is what a scale of 1 gives.
    let ones = v.expand(v.c(1.0), v.shape_of(scale));
    let inputs: Vec<&str> = [x, ones.as_str()].into_iter().chain(v.node.input_at(2)).collect();
    let grid = v.node(v.node.domain(), v.node.op_type(), &inputs, v.node.attribute.clone(), 1).remove(0);
    v.through(|v| Ok(vec![Some(v.mul(&grid, spread(v, x, scale)?))]))
}

/// The scale that each element has.
fn spread(v: &Vjp, x: &str, scale: &str) -> Result<String> {
    if v.rank(scale)? == 0 || v.static_dims(scale).is_some_and(|dims| dims == [1]) {
        return Ok(v.respec(scale, &[]));
    }
    let (rank, block) = (v.rank(x)?, v.node.attr_i("block_size", 0));
    let axis = v.axis(v.node.attr_i("axis", 1), rank)?;
    if block <= 0 {
        let shape: Vec<i64> = (0..rank).map(|i| if i == axis { -1 } else { 1 }).collect();
        return Ok(v.respec(scale, &shape));
    }
    let places = counting(v, &v.dim_of(x, axis));
    let blocks = v.op("Div", &[&places, &v.int(block)], vec![]);
    Ok(v.op("Gather", &[scale, &blocks], vec![AttributeProto::int("axis", axis as i64)]))
}

/// Y = A·Wᵀ + bias with W[n, k] = (B[n, k] - zero[n, k / block])·scale[n, k / block] (`ContribOperators.md`).
fn matmul_n_bits(v: &Vjp) -> Result<String> {
    let (a, b, scales) = (v.x(0)?, v.x(1)?, v.x(2)?);
    let bits = v.node.attr_i("bits", 4);
    let (width, rows, block) = (v.node.attr_i("K", 0), v.node.attr_i("N", 0), v.node.attr_i("block_size", 0));
    if !matches!(bits, 2 | 4 | 8) || width <= 0 || rows <= 0 || block <= 0 {
        return Err(v.error("only weights of 2, 4 or 8 bits are supported"));
    }
    if v.node.input_at(4).is_some() || v.node.attr_i("weight_prepacked", 0) != 0 {
        return Err(v.error("g_idx and weight_prepacked are not supported; quantize the model without them"));
    }
    let element = v.shapes.element(a).unwrap_or(DataType::Float);
    let blocks = (width - 1) / block + 1;
    let values = v.cast(unpacked(v, b, bits, &[rows, blocks, block]), element);
    let zero = match v.node.input_at(3) {
        None => v.c(f64::from(1 << (bits - 1))),
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

/// The numbers of `bits` bits in bytes, the lowest first, in `spec`.
fn unpacked(v: &Vjp, bytes: &str, bits: i64, spec: &[i64]) -> String {
    if bits == 8 {
        return v.respec(bytes, spec);
    }
    let shift = |x: &str, to: &str, by: i64| {
        let by = v.cast(v.int(by), DataType::Uint8);
        v.op("BitShift", &[x, &by], vec![AttributeProto::string("direction", to)])
    };
    let number = |from: i64| shift(&shift(bytes, "LEFT", 8 - bits - from), "RIGHT", 8 - bits);
    let numbers: Vec<String> =
        (0..8).step_by(bits as usize).map(|from| v.unsqueeze(number(from), v.ints(&[-1]))).collect();
    v.respec(&v.concat(&numbers, -1), spec)
}
