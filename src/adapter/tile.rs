//! What additive variants share: a block D `[r, out]`, tiled over the input dimension.
//! `W'[o, i] = W[o, i] + D[i mod r, o]`, or beside the layer `y = base(x) + S(x)·D`.

use ndarray::{Array2, ArrayView2};

use super::variant::{Dims, Layout, Merge};
use super::writer::Writer;
use crate::onnx::{AttributeProto, DataType};

/// The constant that turns S into a product: `[in, r]`, row i has its one in column `i mod r`. One serves all layers of
/// the same input width, any rank of x, any remainder of `in / r`, and r > in.
pub fn selection(inputs: usize, r: usize) -> Array2<f32> {
    Array2::from_shape_fn((inputs, r), |(i, j)| if i % r == j { 1.0 } else { 0.0 })
}

/// The nodes of `S(x)·D` for x `[…, in]`, x and D being of type `element`, float64, or float32; returns its name.
pub fn write_branch(dims: &Dims, x: &str, block: &str, element: DataType, writer: &mut Writer) -> String {
    let mut selection = writer.selection(dims.inputs, dims.r);
    if element == DataType::Double {
        selection = writer.cast(&selection, "select", DataType::Double);
    }
    let shards = writer.op("MatMul", "shards", &[x, &selection], Vec::new());
    writer.op("MatMul", "delta", &[&shards, block], Vec::new())
}

/// The nodes of `W + tile(D)` in the weight's layout; returns its name.
pub fn write_weight(dims: &Dims, layout: Layout, weight: &str, block: &str, w: &mut Writer) -> String {
    let n = dims.inputs.div_ceil(dims.r) as i64;
    let [inputs, outputs, r] = [dims.inputs, dims.outputs, dims.r].map(|n| n as i64);
    let mut block = if layout.out_in { w.transposed(block) } else { block.to_string() };
    if layout.alpha != 1.0 {
        let alpha = w.scalar(layout.alpha);
        block = w.op("Div", "block", &[&block, &alpha], Vec::new());
    }
    if n * r == inputs {
        // Whole shards: the block broadcasts over them.
        let [shards, flat, one] = match layout.out_in {
            true => [vec![outputs, n, r], vec![outputs, inputs], vec![outputs, 1, r]],
            false => [vec![n, r, outputs], vec![inputs, outputs], vec![1, r, outputs]],
        }
        .map(|dims| w.ints(&dims));
        let weight = w.op("Reshape", "sharded", &[weight, &shards], Vec::new());
        let block = w.op("Reshape", "block", &[&block, &one], Vec::new());
        let sum = w.op("Add", "sum", &[&weight, &block], Vec::new());
        return w.op("Reshape", "merged", &[&sum, &flat], Vec::new());
    }
    let axis = i64::from(layout.out_in);
    let copies = vec![block.as_str(); n as usize];
    let tiled = w.op("Concat", "tiled", &copies, vec![AttributeProto::int("axis", axis)]);
    let (start, end, axes) = (w.ints(&[0]), w.ints(&[inputs]), w.ints(&[axis]));
    let cut = w.op("Slice", "cut", &[&tiled, &start, &end, &axes], Vec::new());
    w.op("Add", "merged", &[weight, &cut], Vec::new())
}

/// A block made ready to be added to a weight as it is stored, or taken off it.
pub(super) struct Tiled {
    /// The block's rows for a weight stored `[in, out]`, its columns for one stored `[out, in]`; divided by alpha.
    lines: Vec<f32>,
    line_len: usize,
    out_in: bool,
}

impl Tiled {
    pub(super) fn new(block: ArrayView2<f32>, layout: Layout, undo: bool) -> Self {
        let block = if layout.out_in { block.t() } else { block };
        // x / 1 is x, bit for bit, and w + (−b) is w − b. Iteration is row by row whatever the layout in memory.
        let factor = if undo { -layout.alpha } else { layout.alpha };
        Self { lines: block.iter().map(|b| b / factor).collect(), line_len: block.ncols(), out_in: layout.out_in }
    }
}

impl Merge for Tiled {
    /// `W[i, o] += D[i mod r, o] / alpha`, or the transpose of that. One addition an element, so that float32 equals
    /// PEFT's bit for bit.
    fn apply(&self, rows: &mut [f32], row_len: usize, first: usize) {
        if self.lines.is_empty() || row_len == 0 {
            return;
        }
        let count = self.lines.len() / self.line_len;
        for (k, row) in rows.chunks_exact_mut(row_len).enumerate() {
            // A row of [out, in] takes its line again and again; one of [in, out] takes line i mod r once.
            let at = if self.out_in { first + k } else { (first + k) % count };
            let line = &self.lines[at * self.line_len..][..self.line_len];
            for shard in row.chunks_mut(self.line_len) {
                shard.iter_mut().zip(line).for_each(|(w, b)| *w += b);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_in_both_layouts_is_the_formula() {
        let (inputs, outputs, r) = (7, 3, 3);
        let w = Array2::from_shape_fn((outputs, inputs), |(o, i)| (o * 10 + i) as f32);
        let d = Array2::from_shape_fn((r, outputs), |(j, o)| 0.5 + (j * 7 + o) as f32);
        let expected = Array2::from_shape_fn((outputs, inputs), |(o, i)| w[[o, i]] + d[[i % r, o]] / 2.0);

        let mut torch = w.clone();
        let merger = |out_in, undo| Tiled::new(d.view(), Layout { out_in, alpha: 2.0 }, undo);
        merger(true, false).apply(torch.as_slice_mut().unwrap(), inputs, 0);
        assert_eq!(torch, expected);
        merger(true, true).apply(torch.as_slice_mut().unwrap(), inputs, 0);
        assert_eq!(torch, w);

        let mut matmul = w.t().as_standard_layout().into_owned();
        let (head, tail) = matmul.as_slice_mut().unwrap().split_at_mut(4 * outputs);
        merger(false, false).apply(head, outputs, 0);
        merger(false, false).apply(tail, outputs, 4);
        assert_eq!(matmul.t(), expected);
    }

    #[test]
    fn a_block_taller_than_the_layer_uses_its_first_rows() {
        let mut w = vec![0.0; 4];
        let d = Array2::from_shape_fn((5, 2), |(j, o)| (j * 2 + o) as f32);
        Tiled::new(d.view(), Layout { out_in: false, alpha: 1.0 }, false).apply(&mut w, 2, 0);
        assert_eq!(w, [0.0, 1.0, 2.0, 3.0]);
    }
}
