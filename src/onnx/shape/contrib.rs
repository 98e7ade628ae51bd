//! Operators of ONNX Runtime's `com.microsoft` domain that exporters and its optimizer emit
//! (`docs/ContribOperators.md`).

use super::op::{Op, Rules};
use super::{DataType, Dim};

pub(super) const RULES: Rules = &[
    (
        &[
            "com.microsoft:SkipLayerNormalization",
            "com.microsoft:SkipSimplifiedLayerNormalization",
            "com.microsoft:SkipGroupNorm",
        ],
        skip_normalization,
    ),
    (&["com.microsoft:RotaryEmbedding", "com.microsoft:SimplifiedLayerNormalization"], same),
    (&["com.microsoft:EmbedLayerNormalization"], embed),
    (&["com.microsoft:MatMulNBits"], mat_mul_n_bits),
    (&["com.microsoft:QLinearAdd", "com.microsoft:QLinearMul"], qlinear_pair),
    (&["com.microsoft:QLinearSigmoid", "com.microsoft:QLinearLeakyRelu", "com.microsoft:QLinearSoftmax"], same),
    (&["com.microsoft:QGemm"], qgemm),
    (&["com.microsoft:Attention"], attention),
    (&["com.microsoft:MultiHeadAttention"], multi_head),
    (&["com.microsoft:GroupQueryAttention"], group_query),
];

fn same(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims);
    Some(())
}

/// Outputs: the normalized sum, its mean and inverse deviation, the sum itself.
fn skip_normalization(op: &mut Op) -> Option<()> {
    same(op)?;
    let (element, dims) = (op.element(0), op.dims(0));
    let statistics = dims.clone().map(|mut dims| {
        dims.last_mut().into_iter().for_each(|last| *last = Dim::Known(1));
        dims
    });
    op.set(1, Some(DataType::Float), statistics.clone());
    op.set(2, Some(DataType::Float), statistics);
    op.set(3, element, dims);
    Some(())
}

/// Inputs: token ids, segment ids, then the tables of words, positions and segments, gamma, beta.
fn embed(op: &mut Op) -> Option<()> {
    let element = op.element(2);
    op.set(0, element, None);
    let (&[batch, length], &[_, width]) = (op.dims(0)?.as_slice(), op.dims(2)?.as_slice()) else { return None };
    let dims = vec![batch, length, width];
    op.set(0, element, Some(dims.clone()));
    op.set(1, Some(DataType::Int32), Some(vec![batch]));
    op.set(2, element, Some(dims));
    Some(())
}

fn mat_mul_n_bits(op: &mut Op) -> Option<()> {
    op.out(None);
    let mut dims = op.dims(0)?;
    *dims.last_mut()? = Dim::Known(op.node.attr("N")?.i());
    op.out(Some(dims));
    Some(())
}

/// Inputs: a, its scale and zero point, b, its scale and zero point, the result's scale and zero point.
fn qlinear_pair(op: &mut Op) -> Option<()> {
    same(op)?;
    let element = op.element(0);
    let (a, b) = (op.dims(0)?, op.dims(3)?);
    let dims = op.broadcast(&a, &b);
    op.set(0, element, Some(dims));
    Some(())
}

/// Inputs: a, its scale and zero point, b, its scale and zero point, bias, the result's scale and zero point, without
/// which that is floating-point.
fn qgemm(op: &mut Op) -> Option<()> {
    let element = if op.has(7) { op.element(8).or(op.element(0)) } else { op.element(1) };
    op.set(0, element, None);
    let (&[a0, a1], &[b0, b1]) = (op.dims(0)?.as_slice(), op.dims(3)?.as_slice()) else { return None };
    let rows = if op.node.attr_i("transA", 0) != 0 { a1 } else { a0 };
    let columns = if op.node.attr_i("transB", 0) != 0 { b0 } else { b1 };
    op.set(0, element, Some(vec![rows, columns]));
    Some(())
}

/// Queries, keys and values in one weight of `[width, q + k + v]`.
fn attention(op: &mut Op) -> Option<()> {
    op.out(None);
    let &[batch, length, _] = op.dims(0)?.as_slice() else { return None };
    let width = match op.node.attr_ints("qkv_hidden_sizes") {
        Some(&[_, _, v]) => Dim::Known(v),
        _ => {
            let all = *op.dims(1)?.get(1)?;
            op.symbols().div(all, Dim::Known(3))
        }
    };
    op.out(Some(vec![batch, length, width]));
    Some(())
}

fn multi_head(op: &mut Op) -> Option<()> {
    op.out(None);
    let width = match op.dims(2).as_deref() {
        Some(&[_, _, width]) => Some(width),
        // Values that a cross attention keeps, as `[batch, heads, length, size]`.
        Some(&[_, heads, _, size]) => Some(op.symbols().mul(heads, size)),
        _ => None,
    };
    let dims = match (op.dims(0)?.as_slice(), width) {
        (&[batch, length, _], Some(width)) => vec![batch, length, width],
        // Queries, keys and values packed as `[batch, length, heads, 3, size]`.
        (&[batch, length, heads, _, size], _) => vec![batch, length, op.symbols().mul(heads, size)],
        _ => return None,
    };
    op.out(Some(dims));
    Some(())
}

/// Inputs: query (or all packed), key, value, past key, past value, …; outputs: result, present key and value.
fn group_query(op: &mut Op) -> Option<()> {
    op.out(None);
    let &[batch, length, width] = op.dims(0)?.as_slice() else { return None };
    let (heads, kv) = (op.node.attr("num_heads")?.i(), op.node.attr("kv_num_heads")?.i());
    let packed = if op.has(1) { heads } else { kv.checked_mul(2)?.checked_add(heads)? };
    let size = op.symbols().div(width, Dim::Known(packed));
    let width = op.symbols().mul(size, Dim::Known(heads));
    op.out(Some(vec![batch, length, width]));
    // The length of what is kept is an input's value, or a buffer's size.
    let total = op.fresh();
    let element = op.element(0);
    op.set(1, element, Some(vec![batch, Dim::Known(kv), total, size]));
    op.set(2, element, Some(vec![batch, Dim::Known(kv), total, size]));
    Some(())
}
