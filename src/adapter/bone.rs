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

/// A block made ready to be added to a weight as it is stored.
pub struct Merger {
    /// `[r, out]` for a weight stored `[in, out]`, `[out, r]` for one stored `[out, in]`; divided by alpha.
    block: Array2<f32>,
    stored_out_in: bool,
    out_features: usize,
}

impl Merger {
    /// `alpha` is the factor that the node puts on the product (Gemm); the block is added outside of it.
    pub fn new(block: ArrayView2<f32>, stored_out_in: bool, alpha: f32) -> Self {
        let out_features = block.ncols();
        let block = if stored_out_in { block.t() } else { block };
        // x / 1 is x, bit for bit.
        Self { block: block.map(|b| b / alpha), stored_out_in, out_features }
    }

    /// Adds the block to whole rows of the stored weight, the first of which is row `first`:
    /// `W[i, o] += B[i mod r, o] / alpha`, or the transpose of that. One addition an element, so that f32 equals
    /// PEFT's bit for bit.
    pub fn merge(&self, rows: &mut [f32], row_len: usize, first: usize) {
        let r = if self.stored_out_in { self.block.ncols() } else { self.block.nrows() };
        if r == 0 || row_len == 0 || self.out_features == 0 {
            return;
        }
        for (k, row) in rows.chunks_exact_mut(row_len).enumerate() {
            let at = first + k;
            let line = self.block.row(if self.stored_out_in { at } else { at % r });
            let line = line.to_slice().unwrap_or_default();
            // A row of [out, in] takes its line of the block again and again, one of [in, out] just once.
            for shard in row.chunks_mut(line.len().max(1)) {
                shard.iter_mut().zip(line).for_each(|(w, b)| *w += b);
            }
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
        Merger::new(b.view(), true, 2.0).merge(torch.as_slice_mut().unwrap(), inp, 0);
        assert_eq!(torch, expected);

        let mut matmul = w.t().as_standard_layout().into_owned();
        let merger = Merger::new(b.view(), false, 2.0);
        let (head, tail) = matmul.as_slice_mut().unwrap().split_at_mut(4 * out);
        merger.merge(head, out, 0);
        merger.merge(tail, out, 4);
        assert_eq!(matmul.t(), expected);
    }

    #[test]
    fn a_block_taller_than_the_layer_uses_its_first_rows() {
        let mut w = vec![0.0; 4];
        Merger::new(Array2::from_shape_fn((5, 2), |(j, o)| (j * 2 + o) as f32).view(), false, 1.0).merge(&mut w, 2, 0);
        assert_eq!(w, [0.0, 1.0, 2.0, 3.0]);
    }
}
