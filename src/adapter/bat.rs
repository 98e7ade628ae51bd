//! BAT: the weight passes through a block, and the block is added: with the weight cut into `r` × `r` blocks,
//! `W'[k, c] = W[k, c] + W[k, c]·B[k] + B[k]`, where k counts along the outputs and c along the inputs. The parameter
//! is `[out/r, r, r]`. Source: PEFT 0.18.1 `peft/tuners/bone/layer.py` (`get_delta_weight`), read and measured.
//!
//! Every row of `[out, in]` changes by itself, and so does every group of r rows of `[in, out]`: merging streams. The way
//! back is `W[k, c] = (W'[k, c] − B[k])·(I + B[k])⁻¹`.

use faer::linalg::solvers::DenseSolveCore;
use ndarray::{Array2, Array3, ArrayViewD, Axis, Ix3};

use super::variant::{Dims, Layout, Merge, Variant};
use super::writer::Writer;

pub struct Bat;

impl Variant for Bat {
    fn name(&self) -> &'static str {
        "BAT"
    }

    fn check(&self, dims: &Dims) -> Result<(), String> {
        let Dims { inputs, outputs, r, .. } = *dims;
        if r == 0 || inputs % r != 0 || outputs % r != 0 {
            return Err(format!(
                "the weight matrix must be fully divisible into [r, r] blocks, and r = {r} does not divide both of \
                 {inputs} → {outputs}"
            ));
        }
        Ok(())
    }

    fn shape(&self, dims: &Dims) -> Vec<usize> {
        vec![dims.outputs / dims.r.max(1), dims.r, dims.r]
    }

    fn block(&self, _: &Dims, _: ArrayViewD<f32>) -> Option<Array2<f32>> {
        None
    }

    fn is_additive(&self) -> bool {
        false
    }

    /// On `[k, row, c, column]`, which is the memory order of `[out, in]`: one batched product over the last two axes.
    fn write_weight(&self, dims: &Dims, layout: Layout, weight: &str, parameter: &str, w: &mut Writer) -> String {
        let [inputs, outputs, r] = [dims.inputs, dims.outputs, dims.r].map(|n| n as i64);
        let (k, c) = (outputs / r, inputs / r);
        let turned = if layout.out_in { weight.to_string() } else { w.transposed(weight) };
        let (blocks, left, added) = (w.ints(&[k, r, c, r]), w.ints(&[k, 1, r, r]), w.ints(&[k, r, 1, r]));
        let cut = w.op("Reshape", "blocks", &[&turned, &blocks], Vec::new());
        let factor = w.op("Reshape", "factor", &[parameter, &left], Vec::new());
        let mut addend = w.op("Reshape", "addend", &[parameter, &added], Vec::new());
        if layout.alpha != 1.0 {
            let alpha = w.scalar(layout.alpha);
            addend = w.op("Div", "addend", &[&addend, &alpha], Vec::new());
        }
        let product = w.op("MatMul", "product", &[&cut, &factor], Vec::new());
        // As PEFT adds: the change first, then the weight.
        let change = w.op("Add", "change", &[&product, &addend], Vec::new());
        let sum = w.op("Add", "sum", &[&cut, &change], Vec::new());
        let flat = w.ints(&[outputs, inputs]);
        let merged = w.op("Reshape", "merged", &[&sum, &flat], Vec::new());
        if layout.out_in { merged } else { w.transposed(&merged) }
    }

    fn merger(
        &self,
        dims: &Dims,
        layout: Layout,
        parameter: ArrayViewD<f32>,
        undo: bool,
    ) -> Result<Box<dyn Merge>, String> {
        let blocks = parameter.to_owned().into_dimensionality::<Ix3>().map_err(|e| e.to_string())?;
        if blocks.shape() != [dims.outputs / dims.r, dims.r, dims.r] {
            return Err(format!("BAT's blocks have shape {:?}", blocks.shape()));
        }
        let addend = &blocks / layout.alpha;
        let factor = if undo { inverses(&blocks)? } else { blocks };
        Ok(Box::new(Affine { factor, addend, layout, undo }))
    }
}

/// `(I + B[k])⁻¹` for each k.
fn inverses(blocks: &Array3<f32>) -> Result<Array3<f32>, String> {
    let mut inverses = blocks.clone();
    let r = blocks.shape()[1];
    for (k, mut inverse) in inverses.axis_iter_mut(Axis(0)).enumerate() {
        let block = inverse.to_owned();
        let matrix = faer::Mat::<f64>::from_fn(r, r, |i, j| f64::from(block[[i, j]]) + if i == j { 1.0 } else { 0.0 });
        let inverted = matrix.partial_piv_lu().inverse();
        let size = |m: &faer::Mat<f64>| {
            let entries = (0..r).flat_map(|i| (0..r).map(move |j| m[(i, j)].abs()));
            entries.fold(0.0, |max: f64, v| if v.is_nan() { f64::NAN } else { max.max(v) })
        };
        // The error of a solution in float32 grows with this product (the condition number).
        let condition = size(&matrix) * size(&inverted) * r as f64;
        if !condition.is_finite() || condition > 1e6 {
            return Err(format!(
                "block {k} has no usable inverse of I + B (condition about {condition:.0e}), so the weight before the \
                 merge cannot be computed"
            ));
        }
        inverse.indexed_iter_mut().for_each(|((i, j), v)| *v = inverted[(i, j)] as f32);
    }
    Ok(inverses)
}

/// `W + W·factor + addend`, or to undo `(W − addend)·factor`, block by block.
struct Affine {
    factor: Array3<f32>,
    addend: Array3<f32>,
    layout: Layout,
    undo: bool,
}

impl Merge for Affine {
    fn rows_together(&self) -> usize {
        if self.layout.out_in { 1 } else { self.factor.shape()[1] }
    }

    fn apply(&self, rows: &mut [f32], row_len: usize, first: usize) {
        let r = self.factor.shape()[1];
        if row_len == 0 || r == 0 {
            return;
        }
        let (mut old, mut new) = (Vec::new(), Vec::new());
        if self.layout.out_in {
            for (n, row) in rows.chunks_exact_mut(row_len).enumerate() {
                let (k, o) = ((first + n) / r, (first + n) % r);
                for shard in row.chunks_exact_mut(r) {
                    self.vector(k, o, shard, &mut old, &mut new);
                }
            }
            return;
        }
        // Columns of [in, out] are the rows of [out, in]: r of them are taken across r rows.
        let mut column = vec![0.0; r];
        for group in rows.chunks_exact_mut(row_len * r) {
            for at in 0..row_len {
                column.iter_mut().zip(group[at..].iter().step_by(row_len)).for_each(|(c, w)| *c = *w);
                self.vector(at / r, at % r, &mut column, &mut old, &mut new);
                group[at..].iter_mut().step_by(row_len).zip(&column).for_each(|(w, c)| *w = *c);
            }
        }
    }
}

impl Affine {
    /// One row `o` of one block: r inputs of one output.
    fn vector(&self, k: usize, o: usize, w: &mut [f32], old: &mut Vec<f32>, new: &mut Vec<f32>) {
        let (factor, addend) = (self.factor.index_axis(Axis(0), k), self.addend.index_axis(Axis(0), k));
        old.clear();
        old.extend_from_slice(w);
        if self.undo {
            old.iter_mut().zip(addend.row(o)).for_each(|(w, a)| *w -= a);
        }
        new.clear();
        new.resize(w.len(), 0.0);
        for (i, value) in old.iter().enumerate() {
            if let Some(line) = factor.row(i).as_slice() {
                new.iter_mut().zip(line).for_each(|(n, f)| *n += value * f);
            }
        }
        if self.undo {
            w.copy_from_slice(new);
        } else {
            w.iter_mut().zip(new.iter()).zip(addend.row(o)).for_each(|((w, n), a)| *w += n + a);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Array3, s};

    use super::*;

    const DIMS: Dims = Dims { inputs: 6, outputs: 4, r: 2, mini_r: 1 };

    fn example() -> (Array2<f32>, Array3<f32>) {
        let weight = Array2::from_shape_fn((4, 6), |(o, i)| (o as f32 - 1.5) * 0.3 + (i as f32) * 0.11);
        let blocks = Array3::from_shape_fn((2, 2, 2), |(k, i, j)| 0.1 * (k as f32 + 1.0) - 0.07 * (i * 2 + j) as f32);
        (weight, blocks)
    }

    /// The formula of the reference, block by block.
    fn formula(weight: &Array2<f32>, blocks: &Array3<f32>) -> Array2<f32> {
        let mut merged = weight.clone();
        for (k, c) in (0..2).flat_map(|k| (0..3).map(move |c| (k, c))) {
            let b = blocks.index_axis(Axis(0), k);
            let at = s![k * 2..k * 2 + 2, c * 2..c * 2 + 2];
            let w = weight.slice(at).to_owned();
            merged.slice_mut(at).assign(&(&w + &w.dot(&b) + b));
        }
        merged
    }

    fn close(a: &Array2<f32>, b: &Array2<f32>) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a} {b}");
    }

    #[test]
    fn merging_in_both_layouts_and_in_pieces_is_the_formula_and_has_a_way_back() {
        let (weight, blocks) = example();
        let expected = formula(&weight, &blocks);
        for out_in in [true, false] {
            let layout = Layout { out_in, alpha: 1.0 };
            let start = if out_in { weight.clone() } else { weight.t().as_standard_layout().into_owned() };
            let mut w = start.clone();
            let row_len = w.ncols();
            let merger = |undo| Bat.merger(&DIMS, layout, blocks.view().into_dyn(), undo).unwrap();
            let (head, tail) = w.as_slice_mut().unwrap().split_at_mut(2 * row_len);
            merger(false).apply(head, row_len, 0);
            merger(false).apply(tail, row_len, 2);
            close(&if out_in { w.clone() } else { w.t().to_owned() }, &expected);
            merger(true).apply(w.as_slice_mut().unwrap(), row_len, 0);
            close(&w, &start);
        }
    }

    #[test]
    fn alpha_counts_as_part_of_the_weight() {
        let (weight, blocks) = example();
        let expected = formula(&(&weight * 2.0), &blocks) / 2.0;
        let layout = Layout { out_in: true, alpha: 2.0 };
        let mut w = weight.clone();
        Bat.merger(&DIMS, layout, blocks.view().into_dyn(), false).unwrap().apply(w.as_slice_mut().unwrap(), 6, 0);
        close(&w, &expected);
    }

    #[test]
    fn a_singular_block_is_named() {
        let (_, mut blocks) = example();
        blocks.index_axis_mut(Axis(0), 1).assign(&ndarray::arr2(&[[-1.0, 0.0], [0.0, 0.5]]));
        let layout = Layout { out_in: true, alpha: 1.0 };
        let text = Bat.merger(&DIMS, layout, blocks.view().into_dyn(), true).err().unwrap();
        assert!(text.contains("block 1 has no usable inverse"), "{text}");
    }
}
