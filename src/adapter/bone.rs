//! Bone: one block B `[r, out]` per layer, tiled over the input dimension.
//!
//! With W in torch's layout `[out, in]`: `W'[o, i] = W[o, i] + B[i mod r, o]`, hence `y = x·Wᵀ + b + S(x)·B` with
//! `S(x)[j] = Σ x[i]` over all i with `i mod r = j`. Where r does not divide `in`, the last shard is short and uses only
//! the first rows of B. Source: PEFT 0.18.1 `peft/tuners/bone/layer.py`, read and measured.

use ndarray::{Array2, ArrayView2};
use rand::distr::{Distribution, Uniform};
use rand_chacha::ChaCha8Rng;

use super::InitWeights;
use crate::onnx::{Names, NodeProto, Tensor, TensorProto, node};

/// A new block `[r, out]`: zeros, or uniform in ±1/√out (what torch's Kaiming initialisation with a = √5 gives, whose
/// fan-in is the block's second dimension).
pub fn init(init: InitWeights, r: usize, out_features: usize, rng: &mut ChaCha8Rng) -> Array2<f32> {
    match init {
        InitWeights::Zeros => Array2::zeros((r, out_features)),
        InitWeights::Random => {
            let bound = 1.0 / (out_features.max(1) as f32).sqrt();
            match Uniform::new(-bound, bound) {
                Ok(uniform) => Array2::from_shape_simple_fn((r, out_features), || uniform.sample(rng)),
                Err(_) => Array2::zeros((r, out_features)),
            }
        }
    }
}

/// The constant that turns S into a product: `[in, r]`, row i has its one in column `i mod r`. One serves all layers of
/// the same input width, any rank of x, any remainder of `in / r`, and r > in.
pub fn selection(name: &str, in_features: usize, r: usize) -> TensorProto {
    let one = |(i, j): (usize, usize)| if i % r == j { 1.0f32 } else { 0.0 };
    Tensor::from(Array2::from_shape_fn((in_features, r), one).into_dyn()).to_proto(name)
}

/// The value names around an adapted node.
pub struct Branch<'a> {
    /// Prefix of new names: `<module>.bone.<adapter>`.
    pub prefix: &'a str,
    /// The layer's input `[…, in]` (`[in, rows]` where `transposed`).
    pub x: &'a str,
    /// True where the node multiplies by the transpose of x (Gemm with transA = 1).
    pub transposed: bool,
    pub selection: &'a str,
    pub block: &'a str,
    /// What the base node computes, and what the sum is to be called.
    pub base_output: &'a str,
    pub output: &'a str,
}

/// The nodes of `output = base_output + S(x)·B`.
pub fn branch(branch: &Branch, names: &mut Names) -> Vec<NodeProto> {
    let mut nodes = Vec::new();
    let mut x = branch.x.to_string();
    if branch.transposed {
        let rows = names.fresh(&format!("{}.rows", branch.prefix));
        nodes.push(node("Transpose", &[&x], &[&rows]));
        x = rows;
    }
    let shards = names.fresh(&format!("{}.shards", branch.prefix));
    let delta = names.fresh(&format!("{}.delta", branch.prefix));
    nodes.push(node("MatMul", &[&x, branch.selection], &[&shards]));
    nodes.push(node("MatMul", &[&shards, branch.block], &[&delta]));
    let mut add = node("Add", &[branch.base_output, &delta], &[branch.output]);
    add.name = Some(names.fresh(&format!("{}.add", branch.prefix)));
    nodes.push(add);
    nodes
}

/// Adds the block to a weight in place: `weight[i, o] += block[i mod r, o] / alpha` for a weight stored `[in, out]`,
/// the transpose of that for one stored `[out, in]`. One addition an element, so that f32 equals PEFT's bit for bit.
pub fn merge(weight: &mut [f32], stored_out_in: bool, block: ArrayView2<f32>, alpha: f32) {
    let (r, out) = block.dim();
    if r == 0 || out == 0 {
        return;
    }
    let scaled;
    let block = if alpha == 1.0 {
        block
    } else {
        scaled = &block / alpha;
        scaled.view()
    };
    if stored_out_in {
        // Each row of the weight is one output; its column of the block repeats along the row.
        let columns = block.t().as_standard_layout().into_owned();
        let width = weight.len() / out;
        for (row, column) in weight.chunks_exact_mut(width.max(1)).zip(columns.rows()) {
            let column = column.to_slice().unwrap_or_default();
            for shard in row.chunks_mut(r) {
                shard.iter_mut().zip(column).for_each(|(w, b)| *w += b);
            }
        }
    } else {
        let rows = block.as_standard_layout();
        for (i, row) in weight.chunks_exact_mut(out).enumerate() {
            row.iter_mut().zip(rows.row(i % r)).for_each(|(w, b)| *w += b);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    #[test]
    fn merging_in_both_layouts_is_the_formula() {
        let (inp, out, r) = (7, 3, 3);
        let w = Array2::from_shape_fn((out, inp), |(o, i)| (o * 10 + i) as f32);
        let b = Array2::from_shape_fn((r, out), |(j, o)| 0.5 + (j * 7 + o) as f32);
        let expected = Array2::from_shape_fn((out, inp), |(o, i)| w[[o, i]] + b[[i % r, o]] / 2.0);

        let mut torch = w.clone();
        merge(torch.as_slice_mut().unwrap(), true, b.view(), 2.0);
        assert_eq!(torch, expected);

        let mut matmul = w.t().as_standard_layout().into_owned();
        merge(matmul.as_slice_mut().unwrap(), false, b.view(), 2.0);
        assert_eq!(matmul.t(), expected);
    }

    #[test]
    fn a_block_taller_than_the_layer_uses_its_first_rows() {
        let mut w = vec![0.0; 4];
        merge(&mut w, false, Array2::from_shape_fn((5, 2), |(j, o)| (j * 2 + o) as f32).view(), 1.0);
        assert_eq!(w, [0.0, 1.0, 2.0, 3.0]);
    }
}
