//! MiSS mini: a block `[r, mini_r]`, repeated along the outputs until it is Bone's `[r, out]`:
//! `D[j, o] = B[j, o mod mini_r]`. Source: PEFT 0.21.2 `peft/tuners/miss/layer.py`, read and measured.

use ndarray::{Array2, ArrayViewD, Ix2};

use super::variant::{Dims, Variant};
use super::writer::Writer;

pub struct Mini;

impl Variant for Mini {
    fn name(&self) -> &'static str {
        "MiSS mini"
    }

    fn check(&self, dims: &Dims) -> Result<(), String> {
        match dims.mini_r {
            0 => Err("mini_r should be a positive integer value but the value passed is 0".into()),
            m if !dims.outputs.is_multiple_of(m) => {
                Err(format!("mini_r = {m} has to divide out_features, which is {}", dims.outputs))
            }
            _ => Ok(()),
        }
    }

    fn shape(&self, dims: &Dims) -> Vec<usize> {
        vec![dims.r, dims.mini_r]
    }

    fn block(&self, dims: &Dims, parameter: ArrayViewD<f32>) -> Option<Array2<f32>> {
        let parameter = parameter.into_dimensionality::<Ix2>().ok().filter(|p| p.ncols() > 0)?;
        let columns = parameter.ncols();
        Some(Array2::from_shape_fn((parameter.nrows(), dims.outputs), |(j, o)| parameter[[j, o % columns]]))
    }

    /// A product with a constant of ones and zeros: the gradient sums what the repetition spread.
    fn write_block(&self, dims: &Dims, parameter: &str, writer: &mut Writer) -> String {
        let repeat = writer.repetition(dims.mini_r, dims.outputs);
        writer.op("MatMul", "block", &[parameter, &repeat], Vec::new())
    }
}
