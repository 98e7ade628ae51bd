//! Matrix products: MatMul of any ranks, Gemm, and ONNX Runtime's FusedMatMul.
//!
//! For Y = A·B: dA = dY·Bᵀ and dB = Aᵀ·dY, summed over the batch axes that were broadcast.

use super::super::vjp::known;
use super::{Adjoints, MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::shape::Dim;
use crate::onnx::{AttributeProto, NodeProto};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("MatMul", matmul);
    rules.vjp("Gemm", gemm);
    for op in ["FusedMatMul", "TransposeMatMul"] {
        rules.insert(MICROSOFT, op, Rule::vjp(fused_matmul));
    }
}

fn matmul(v: &Vjp) -> Result<Adjoints> {
    let (a, b, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    match v.rank(b)? {
        0 => Err(v.error("its operands must not be scalars")),
        1 => {
            // Y[…] = A[…, k]·b[k]
            let da = v.wants(0).then(|| v.mul(v.unsqueeze(dy, v.ints(&[-1])), b));
            let db = v.wants(1).then(|| {
                let column = v.op("Reshape", &[dy, &v.ints(&[-1, 1])], vec![]);
                v.op("Reshape", &[&product(v, &rows(v, a, b, 0), &column, true, false, 1.0), &v.ints(&[-1])], vec![])
            });
            Ok(vec![da, db])
        }
        2 => {
            // All leading axes of A are rows of one matrix.
            let da = v.wants(0).then(|| v.matmul(dy, v.swap(b, 2)));
            let db = v.wants(1).then(|| product(v, &rows(v, a, b, 0), &rows(v, dy, b, 1), true, false, 1.0));
            Ok(vec![da, db])
        }
        rank_b => batched(v, (a, v.rank(a)?), (b, rank_b), dy),
    }
}

/// The rule where B has batch axes of its own.
fn batched(v: &Vjp, (a, rank_a): (&str, usize), (b, rank_b): (&str, usize), dy: &str) -> Result<Adjoints> {
    if rank_a == 0 {
        return Err(v.error("its operands must not be scalars"));
    }
    // A vector on the left is a matrix of one row, an axis that the result lacks.
    let (a2, g) = match rank_a {
        1 => (v.unsqueeze(a, v.ints(&[0])), v.unsqueeze(dy, v.ints(&[-2]))),
        _ => (a.to_string(), dy.to_string()),
    };
    let rank = rank_a.max(rank_b);
    // Dimensions of the adjoint of `x` before it is summed: the batch of the product, the matrix of `x`.
    let unsummed = |x: &str| {
        let (x, y) = (v.dims(x)?, v.dims(v.node.output_at(0)?)?);
        let mut dims = y.get(..rank - 2)?.to_vec();
        match x {
            [k] => dims.extend([Dim::Known(1), *k]),
            _ => dims.extend(x.get(x.len().checked_sub(2)?..)?),
        }
        Some(dims)
    };
    let da = v.wants(0).then(|| v.unbroadcast(v.matmul(&g, v.swap(b, rank_b)), unsummed(a).as_deref(), a));
    let db = v.wants(1).then(|| {
        // Where B is a transposition (the keys of attention), dBᵀ = dYᵀ·A goes back through it without a move more.
        let db = match v.producer(b).is_some_and(|node| node.is("Transpose") && moves_last(node)) {
            true => v.swap(v.matmul(v.swap(&g, rank), &a2), rank),
            false => v.matmul(v.swap(&a2, rank_a.max(2)), &g),
        };
        v.unbroadcast(db, unsummed(b).as_deref(), b)
    });
    Ok(vec![da, db])
}

fn moves_last(transpose: &NodeProto) -> bool {
    transpose.attr_ints("perm").is_none_or(|perm| perm.last().is_some_and(|last| *last != perm.len() as i64 - 1))
}

/// `value` as a matrix of rows as long as axis `axis` of the matrix or vector `of`.
fn rows(v: &Vjp, value: &str, of: &str, axis: usize) -> String {
    if v.shapes.rank(value) == Some(2) {
        return value.to_string();
    }
    let spec = match v.dims(of).and_then(|dims| known(dims.get(axis)?)) {
        Some(width) => v.ints(&[-1, width]),
        None => v.concat(&[v.ints(&[-1]), v.dim_of(of, axis)], 0),
    };
    v.op("Reshape", &[value, &spec], vec![])
}

/// α·op(A)·op(B) of two matrices.
fn product(v: &Vjp, a: &str, b: &str, trans_a: bool, trans_b: bool, alpha: f32) -> String {
    let mut attributes = Vec::new();
    if trans_a {
        attributes.push(AttributeProto::int("transA", 1));
    }
    if trans_b {
        attributes.push(AttributeProto::int("transB", 1));
    }
    if alpha != 1.0 {
        attributes.push(AttributeProto::float("alpha", alpha));
    }
    v.op("Gemm", &[a, b], attributes)
}

/// Y = α·op(A)·op(B) + β·C.
fn gemm(v: &Vjp) -> Result<Adjoints> {
    let (a, b, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let (ta, tb) = (v.node.attr_i("transA", 0) != 0, v.node.attr_i("transB", 0) != 0);
    let (alpha, beta) = (v.node.attr_f("alpha", 1.0), v.node.attr_f("beta", 1.0));
    let da = v.wants(0).then(|| match ta {
        false => product(v, dy, b, false, !tb, alpha),
        true => product(v, b, dy, tb, true, alpha),
    });
    let db = v.wants(1).then(|| match tb {
        false => product(v, a, dy, !ta, false, alpha),
        true => product(v, dy, a, true, ta, alpha),
    });
    let dc = v.to_input(2, || if beta == 1.0 { dy.to_string() } else { v.mul(dy, v.c(f64::from(beta))) });
    Ok(vec![da, db, dc])
}

/// Y = α·op(A)·op(B) over batches (ContribOperators.md).
fn fused_matmul(v: &Vjp) -> Result<Adjoints> {
    let (a, b, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let (ra, rb) = (v.rank(a)?, v.rank(b)?);
    let moved = |name: &str, rank: usize| v.node.attr_i(name, 0) != 0 && rank > 2;
    let moves = (moved("transBatchA", ra), moved("transBatchB", rb));
    if ra < 2 || rb < 2 || moves.0 || moves.1 {
        return v.through(|v| plain_matmul(v, (a, ra, moves.0), (b, rb, moves.1)));
    }
    let (ta, tb) = (v.node.attr_i("transA", 0) != 0, v.node.attr_i("transB", 0) != 0);
    let alpha = v.node.attr_f("alpha", 1.0);
    let fused = |a: &str, b: &str, ta: bool, tb: bool| {
        let attributes = vec![
            AttributeProto::float("alpha", alpha),
            AttributeProto::int("transA", ta as i64),
            AttributeProto::int("transB", tb as i64),
        ];
        v.node(MICROSOFT, "FusedMatMul", &[a, b], attributes, 1).remove(0)
    };
    let batch = ra.max(rb) - 2;
    let unsummed = |x: &str| {
        let (x, y) = (v.dims(x)?, v.dims(v.node.output_at(0)?)?);
        let mut dims = y.get(..batch)?.to_vec();
        dims.extend(x.get(x.len().checked_sub(2)?..)?);
        Some(dims)
    };
    let da = v.wants(0).then(|| {
        let da = if ta { fused(b, dy, tb, true) } else { fused(dy, b, false, !tb) };
        v.unbroadcast(da, unsummed(a).as_deref(), a)
    });
    let db = v.wants(1).then(|| {
        let db = if tb { fused(dy, a, true, ta) } else { fused(a, dy, !ta, false) };
        v.unbroadcast(db, unsummed(b).as_deref(), b)
    });
    Ok(vec![da, db])
}

/// The same in plain operators, for operands with a rank each, and whether their first axis is that of the rows, before
/// those of the batch.
fn plain_matmul(v: &Vjp, a: (&str, usize, bool), b: (&str, usize, bool)) -> Result<Vec<Option<String>>> {
    let operand = |(x, rank, moves): (&str, usize, bool), transposed: &str| {
        let mut perm: Vec<i64> = (0..rank as i64).collect();
        if moves {
            perm[..rank - 1].rotate_left(1);
        }
        if v.node.attr_i(transposed, 0) != 0 && rank >= 2 {
            perm.swap(rank - 1, rank - 2);
        }
        v.transpose(x, &perm)
    };
    let product = v.matmul(operand(a, "transA"), operand(b, "transB"));
    Ok(vec![Some(v.mul(product, v.c(f64::from(v.node.attr_f("alpha", 1.0)))))])
}
