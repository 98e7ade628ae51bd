//! How much work a node is, by the sizes of what it reads and writes.

use crate::onnx::NodeProto;
use crate::onnx::shape::{Dim, Shapes};

/// Operations that writing one number takes the time of, as memory is slower than arithmetic.
const WRITTEN: f64 = 16.0;

/// What a node does; what is not known counts for nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    /// Numbers that it writes.
    pub written: f64,
    /// Multiplications and additions, where it is a sum of products.
    pub product: f64,
}

impl Work {
    pub fn of(node: &NodeProto, shapes: &Shapes) -> Self {
        let written = match node.op_type() {
            // These leave the numbers where they are.
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Shape" | "Size" | "Constant" => 0.0,
            _ => node.output.iter().filter_map(|y| numbers(shapes, y)).sum(),
        };
        Self { written, product: product(node, shapes).unwrap_or(0.0) }
    }

    /// Operations in all.
    pub fn all(self) -> f64 {
        self.product + WRITTEN * self.written
    }
}

/// Multiplications and additions of a sum of products.
fn product(node: &NodeProto, shapes: &Shapes) -> Option<f64> {
    let size = |at: usize| node.input_at(at).and_then(|x| numbers(shapes, x));
    let axis = |at: usize, from_end: bool| -> Option<f64> {
        let dims = shapes.dims(node.input_at(at)?)?;
        known(if from_end { dims.last()? } else { dims.first()? })
    };
    let written = || numbers(shapes, node.output.first()?);
    match node.op_type() {
        "MatMul"
        | "Gemm"
        | "MatMulInteger"
        | "QLinearMatMul"
        | "QGemm"
        | "MatMulNBits"
        | "MatMulBnb4"
        | "FusedMatMul"
        | "FusedGemm"
        | "DynamicQuantizeMatMul"
        | "MatMulIntegerToFloat"
        | "TiledMatMul"
        | "TiledGemm" => Some(2.0 * written()? * axis(0, node.attr_i("transA", 0) == 0)?),
        "Conv" | "ConvInteger" | "FusedConv" | "DeformConv" => Some(2.0 * written()? * size(1)? / axis(1, false)?),
        "QLinearConv" => Some(2.0 * written()? * size(3)? / axis(3, false)?),
        "ConvTranspose" => Some(2.0 * size(0)? * size(1)? / axis(1, false)?),
        "LSTM" | "GRU" | "RNN" => Some(2.0 * size(0)? / axis(0, true)? * (size(1)? + size(2)?)),
        // Of a plain product of m·k and k·n numbers that write m·n this is 2·m·k·n.
        "Einsum" => Some(2.0 * (size(0)? * size(1)? * written()?).sqrt()),
        "Attention" | "MultiHeadAttention" | "GroupQueryAttention" => {
            let length = known(shapes.dims(node.input_at(0)?)?.get(1)?)?;
            Some(4.0 * size(0)? * length)
        }
        _ => None,
    }
}

fn known(dim: &Dim) -> Option<f64> {
    match dim {
        Dim::Known(n) => Some(*n as f64),
        Dim::Symbol(_) => None,
    }
}

/// Numbers in a value.
pub(super) fn numbers(shapes: &Shapes, value: &str) -> Option<f64> {
    shapes.dims(value)?.iter().try_fold(1.0, |n, dim| Some(n * known(dim)?))
}
