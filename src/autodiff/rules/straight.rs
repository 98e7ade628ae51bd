//! Straight through what is quantised: the rules that training has on top of the standard ones.
//!
//! Rounding is a step function, so its derivative is zero or not there, and the standard table refuses it. Training of a
//! quantised model takes the derivative of what is rounded instead: integers are read as the real numbers
//! `x / scale + zero` that they stand for (Bengio, Léonard and Courville 2013, the straight-through estimator), and where
//! a value lies outside of what its integers can hold, nothing passes (as in PyTorch's `fake_quantize`, whose gradient
//! has the same bounds). A quantiser without a lower bound below zero is a ReLU, and this is what keeps it one.
//!
//! An adjoint of an integer value is floating-point: by how much the result moves for one step of the grid. Scales and
//! zero points are constants, those that `DynamicQuantizeLinear` computes from its input as well.

use super::elementwise::cast;
use super::{Adjoints, MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::DataType;

pub(super) fn add(rules: &mut Rules) {
    for domain in ["", MICROSOFT] {
        rules.insert(domain, "QuantizeLinear", Rule::vjp(quantize));
        rules.insert(domain, "DequantizeLinear", Rule::vjp(dequantize));
    }
    rules.vjp("DynamicQuantizeLinear", |v| {
        // Its bounds are those of its input: nothing lies outside.
        let scale = v.y(1)?;
        Ok(vec![v.adjoint(0).map(|dy| v.div(dy, scale))])
    });
    rules.vjp("Cast", |v| match v.shapes.element(v.x(0)?) {
        Some(element) if is_integer(element) => v.first(v.dy()?.to_string()),
        _ => cast(v),
    });
    let mut through = |domain: &str, op: &str, definition: fn(&Vjp) -> Result<String>| {
        rules.insert(domain, op, Rule::vjp(move |v: &Vjp| v.through(|v| Ok(vec![Some(definition(v)?)]))));
    };
    through("", "MatMulInteger", |v| {
        let a = shifted(v, v.x(0)?, v.node.input_at(2), Along::Rows)?;
        Ok(v.matmul(a, shifted(v, v.x(1)?, v.node.input_at(3), Along::Columns)?))
    });
    through("", "QLinearMatMul", |v| {
        let (a, b) = (real(v, 0, Along::Rows)?, real(v, 3, Along::Columns)?);
        on_grid(v, &v.matmul(a, b), 6)
    });
    through(MICROSOFT, "MatMulIntegerToFloat", |v| {
        // a, b, their scales, their zero points, bias.
        let a = v.mul(shifted(v, v.x(0)?, v.node.input_at(4), Along::Rows)?, v.x(2)?);
        let b = v.mul(shifted(v, v.x(1)?, v.node.input_at(5), Along::Columns)?, v.x(3)?);
        Ok(biased(v, v.matmul(a, b), 6))
    });
    through(MICROSOFT, "DynamicQuantizeMatMul", |v| {
        // a in floating point, b, its scale, its zero point, bias.
        let b = v.mul(shifted(v, v.x(1)?, v.node.input_at(3), Along::Columns)?, v.x(2)?);
        Ok(biased(v, v.matmul(v.x(0)?, b), 4))
    });
    through(MICROSOFT, "QGemm", |v| {
        // The bias is what it is: a constant.
        let (a, b) = (real(v, 0, Along::Whole)?, real(v, 3, Along::Whole)?);
        let attributes = v.node.attribute.clone();
        let y = v.op("Gemm", &[&a, &b], attributes);
        if v.node.input_at(7).is_some() { on_grid(v, &y, 7) } else { Ok(y) }
    });
    through(MICROSOFT, "QLinearAdd", |v| on_grid(v, &v.add(real(v, 0, Along::Whole)?, real(v, 3, Along::Whole)?), 6));
    through(MICROSOFT, "QLinearMul", |v| on_grid(v, &v.mul(real(v, 0, Along::Whole)?, real(v, 3, Along::Whole)?), 6));
    through(MICROSOFT, "QLinearSigmoid", |v| on_grid(v, &v.sigmoid(real(v, 0, Along::Whole)?), 3));
    through(MICROSOFT, "QLinearLeakyRelu", |v| {
        let y = v.op("LeakyRelu", &[&real(v, 0, Along::Whole)?], v.node.attribute.clone());
        on_grid(v, &y, 3)
    });
}

/// Element types that a quantiser gives, and sums of products of them.
pub(super) fn is_integer(element: DataType) -> bool {
    use DataType::*;
    matches!(element, Int8 | Uint8 | Int16 | Uint16 | Int32 | Int4 | Uint4)
}

/// The least and the greatest number of an integer type.
fn range(element: DataType) -> Option<(f64, f64)> {
    Some(match element {
        DataType::Int8 => (-128.0, 127.0),
        DataType::Uint8 => (0.0, 255.0),
        DataType::Int16 => (-32768.0, 32767.0),
        DataType::Uint16 => (0.0, 65535.0),
        DataType::Int4 => (-8.0, 7.0),
        DataType::Uint4 => (0.0, 15.0),
        _ => return None,
    })
}

/// `y = x / scale + zero`, rounded and cut to the range of its type: dx = dy / scale where x lies in it.
fn quantize(v: &Vjp) -> Result<Adjoints> {
    let (x, dy) = (v.x(0)?, v.dy()?);
    let y = v.shapes.element(v.y(0)?).unwrap_or(DataType::Uint8);
    let (least, greatest) = range(y).ok_or_else(|| v.error("only integers of 4, 8 or 16 bits are passed through"))?;
    let scale = along(v, 1, x)?;
    let bound = |of_grid: f64| -> Result<String> {
        Ok(match v.node.input_at(2) {
            None => v.mul(&scale, v.c(of_grid)),
            Some(_) => v.mul(&scale, v.sub(v.c(of_grid), as_float(v, &along(v, 2, x)?))),
        })
    };
    // What rounds to the last step of the grid is in it.
    let inside = v.and(v.greater_or_equal(x, bound(least - 0.5)?), v.less_or_equal(x, bound(greatest + 0.5)?));
    v.first(v.select(inside, v.div(dy, scale), v.c(0.0)))
}

/// `y = (x − zero)·scale`.
fn dequantize(v: &Vjp) -> Result<Adjoints> {
    v.first(v.mul(v.dy()?, along(v, 1, v.x(0)?)?))
}

/// Input `i`, a scale or zero point, in a shape that broadcasts to `x` as the node's `axis` says.
fn along(v: &Vjp, i: usize, x: &str) -> Result<String> {
    let value = v.x(i)?;
    if v.node.attr_i("block_size", 0) != 0 {
        return Err(v.error("activations that are quantized in blocks are not supported"));
    }
    if v.rank(value)? == 0 || v.static_dims(value).is_some_and(|dims| dims == [1]) {
        return Ok(value.into());
    }
    let rank = v.rank(x)?;
    let axis = v.axis(v.node.attr_i("axis", 1), rank)?;
    let mut spec = vec![-1];
    spec.resize(rank - axis, 1);
    Ok(v.respec(value, &spec))
}

/// How a vector of scales or zero points lies over a matrix.
#[derive(Clone, Copy, PartialEq)]
enum Along {
    Rows,
    Columns,
    /// One number for all of it, or one for each column.
    Whole,
}

/// `value − zero` in floating point.
fn shifted(v: &Vjp, value: &str, zero: Option<&str>, along: Along) -> Result<String> {
    let value = as_float(v, value);
    let Some(zero) = zero else { return Ok(value) };
    Ok(v.sub(value, as_float(v, &laid(v, zero, along)?)))
}

/// Inputs `i`, `i + 1` and `i + 2`: integers, their scale, their zero point, as real numbers.
fn real(v: &Vjp, i: usize, along: Along) -> Result<String> {
    let shifted = shifted(v, v.x(i)?, v.node.input_at(i + 2), along)?;
    Ok(v.mul(shifted, laid(v, v.x(i + 1)?, along)?))
}

/// A vector of one number a row becomes a column.
fn laid(v: &Vjp, value: &str, along: Along) -> Result<String> {
    let one_a_row = along == Along::Rows && v.rank(value)? == 1 && v.static_dims(value).is_none_or(|dims| dims != [1]);
    Ok(if one_a_row { v.unsqueeze(value, v.ints(&[-1])) } else { value.into() })
}

fn as_float(v: &Vjp, value: &str) -> String {
    let element =
        (0..v.node.input.len()).filter_map(|i| v.shapes.element(v.node.input_at(i)?)).find(|e| !is_integer(*e));
    v.cast(value, element.unwrap_or(DataType::Float))
}

fn biased(v: &Vjp, y: String, bias: usize) -> String {
    v.node.input_at(bias).map_or(y.clone(), |bias| v.add(&y, bias))
}

/// `y` in steps of the grid whose scale is input `scale`; what the node cut to its range does not move.
fn on_grid(v: &Vjp, y: &str, scale: usize) -> Result<String> {
    let out = v.y(0)?;
    let steps = v.div(y, v.x(scale)?);
    let element = v.shapes.element(out).or_else(|| v.shapes.element(v.node.input_at(scale + 1)?));
    let (least, greatest) =
        element.and_then(range).ok_or_else(|| v.error("only integers of 4, 8 or 16 bits are passed through"))?;
    let number = as_float(v, out);
    let inside = v.and(v.greater(&number, v.c(least)), v.less(&number, v.c(greatest)));
    Ok(v.mul(steps, v.cast(inside, v.shapes.element(v.x(scale)?).unwrap_or(DataType::Float))))
}
