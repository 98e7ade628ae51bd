//! Products of matrices: MatMul and Gemm in all their guises, Einsum.

use std::collections::HashMap;

use super::op::{Op, Rules};
use super::{DataType, Dim};

pub(super) const RULES: Rules = &[
    (&["MatMul", "com.microsoft:GemmFastGelu", "org.bone-onnx:TiledMatMul"], mat_mul),
    (&["MatMulInteger"], mat_mul_integer),
    (&["QLinearMatMul"], qlinear_mat_mul),
    (&["com.microsoft:DynamicQuantizeMatMul", "com.microsoft:MatMulIntegerToFloat"], mat_mul_float),
    (&["com.microsoft:FusedMatMul", "com.microsoft:TransposeMatMul"], fused_mat_mul),
    (&["Gemm", "com.microsoft:FusedGemm", "org.bone-onnx:TiledGemm"], gemm),
    (&["Einsum"], einsum),
];

/// Shape of `a @ b` as `numpy.matmul` has it.
fn product(op: &mut Op, a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let (batch_a, rows) = match a {
        [] => return None,
        [_] => (&[][..], None),
        [batch @ .., rows, _] => (batch, Some(*rows)),
    };
    let (batch_b, columns) = match b {
        [] => return None,
        [_] => (&[][..], None),
        [batch @ .., _, columns] => (batch, Some(*columns)),
    };
    let mut dims = op.broadcast(batch_a, batch_b);
    dims.extend(rows);
    dims.extend(columns);
    Some(dims)
}

fn inputs(op: &mut Op, a: usize, b: usize, element: Option<DataType>) -> Option<()> {
    op.set(0, element, None);
    let (a, b) = (op.dims(a)?, op.dims(b)?);
    let dims = product(op, &a, &b);
    op.set(0, element, dims);
    Some(())
}

fn mat_mul(op: &mut Op) -> Option<()> {
    let element = op.element(0).or(op.element(1));
    inputs(op, 0, 1, element)
}

fn mat_mul_integer(op: &mut Op) -> Option<()> {
    inputs(op, 0, 1, Some(DataType::Int32))
}

fn mat_mul_float(op: &mut Op) -> Option<()> {
    inputs(op, 0, 1, Some(DataType::Float))
}

/// Inputs: a, its scale and zero point, b, its scale and zero point, the output's scale and zero point.
fn qlinear_mat_mul(op: &mut Op) -> Option<()> {
    let element = op.element(7);
    inputs(op, 0, 3, element)
}

fn fused_mat_mul(op: &mut Op) -> Option<()> {
    op.out(None);
    let (mut a, mut b) = (op.dims(0)?, op.dims(1)?);
    if op.node.attr_i("transBatchA", 0) != 0 || op.node.attr_i("transBatchB", 0) != 0 {
        let unknown = op.unknown(a.len().max(b.len()));
        op.out(Some(unknown));
        return None;
    }
    for (dims, transposed) in [(&mut a, "transA"), (&mut b, "transB")] {
        if let ([.., x, y], true) = (dims.as_mut_slice(), op.node.attr_i(transposed, 0) != 0) {
            std::mem::swap(x, y);
        }
    }
    let dims = product(op, &a, &b);
    op.out(dims);
    Some(())
}

fn gemm(op: &mut Op) -> Option<()> {
    op.out(None);
    let (Some(&[a0, a1]), Some(&[b0, b1])) = (op.dims(0).as_deref(), op.dims(1).as_deref()) else {
        // Gemm works on matrices whatever else is known.
        let unknown = op.unknown(2);
        op.out(Some(unknown));
        return None;
    };
    let rows = if op.node.attr_i("transA", 0) != 0 { a1 } else { a0 };
    let columns = if op.node.attr_i("transB", 0) != 0 { b0 } else { b1 };
    op.out(Some(vec![rows, columns]));
    Some(())
}

fn einsum(op: &mut Op) -> Option<()> {
    op.out(None);
    let equation: String = op.node.attr_s("equation")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (inputs, output) = match equation.split_once("->") {
        Some((inputs, output)) => (inputs, Some(output)),
        None => (equation.as_str(), None),
    };
    let mut labels: HashMap<char, Dim> = HashMap::new();
    let mut counts: Vec<(char, usize)> = Vec::new();
    let mut ellipsis: Vec<Dim> = Vec::new();
    for (i, term) in inputs.split(',').enumerate() {
        let dims = op.dims(i)?;
        let (front, back) = term.split_once("...").unwrap_or((term, ""));
        let named = front.chars().count() + back.chars().count();
        let hidden = dims.len().checked_sub(named)?;
        if hidden > 0 && !term.contains("...") {
            return None;
        }
        let (first, rest) = dims.split_at(front.chars().count());
        let (middle, last) = rest.split_at(hidden);
        ellipsis = op.broadcast(&ellipsis, middle);
        for (label, dim) in front.chars().chain(back.chars()).zip(first.iter().chain(last)) {
            let size = match labels.get(&label) {
                Some(size) => op.symbols().broadcast(*size, *dim),
                None => *dim,
            };
            labels.insert(label, size);
            match counts.iter_mut().find(|(l, _)| *l == label) {
                Some((_, n)) => *n += 1,
                None => counts.push((label, 1)),
            }
        }
    }
    let output = output.map(String::from).unwrap_or_else(|| {
        // Implicit form: the ellipsis, then what stands once, in alphabetical order.
        let mut once: Vec<char> = counts.iter().filter(|(_, n)| *n == 1).map(|(l, _)| *l).collect();
        once.sort_unstable();
        format!("...{}", once.into_iter().collect::<String>())
    });
    let (front, back) = output.split_once("...").unwrap_or((&output, ""));
    let sizes = |part: &str| part.chars().map(|label| labels.get(&label).copied()).collect::<Option<Vec<_>>>();
    let middle = if output.contains("...") { ellipsis } else { Vec::new() };
    op.out(Some([sizes(front)?, middle, sizes(back)?].concat()));
    Some(())
}
