//! Convolution. The adjoint by the input is the transposed convolution with the same weight, and the other way round;
//! the adjoint by the weight is a convolution of input and adjoint over the batch.

use super::rotary::counting;
use super::window::Window;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Conv", |v| {
        let (x, w, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
        let (window, group) = (window(v, x, v.y(0)?, w)?, v.node.attr_i("group", 1));
        let dx = v.wants(0).then(|| window.spread(dy, w, group));
        let dw = v.wants(1).then(|| window.weight(x, dy, group));
        Ok(vec![dx, dw, bias(v, x, dy)?])
    });
    rules.vjp("ConvTranspose", |v| {
        let (x, w, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
        let (window, group) = (window(v, v.y(0)?, x, w)?, v.node.attr_i("group", 1));
        let dx = v.wants(0).then(|| window.convolve(dy, w, group));
        let dw = v.wants(1).then(|| window.weight(dy, x, group));
        Ok(vec![dx, dw, bias(v, x, dy)?])
    });
    rules.vjp("Col2Im", im2col);
}

/// What each element of the window reads at each of its positions: along one axis after the other, `[element, position]`
/// in place of the axis.
fn im2col(v: &Vjp) -> Result<Adjoints> {
    let (x, dy) = (v.x(0)?, v.dy()?);
    let block = v.x(2)?;
    let n = v.constant_ints(2).map(|block| block.len()).or_else(|| v.rank(v.y(0).ok()?).ok()?.checked_sub(2));
    let n = n.ok_or_else(|| v.error("the number of its spatial axes must be known"))?;
    let ints = |name: &str, length: usize, default: i64| match v.node.attr_ints(name) {
        None => Ok(vec![default; length]),
        Some(values) if values.len() == length => Ok(values.to_vec()),
        Some(_) => Err(v.error(format!("attribute {name} must have {length} values"))),
    };
    let (strides, dilations, pads) = (ints("strides", n, 1)?, ints("dilations", n, 1)?, ints("pads", 2 * n, 0)?);
    let none = [0, 0];
    let widths = [&none[..], &pads[..n], &none[..], &pads[n..]].concat();
    let mut read = v.pad(dy, &widths.iter().map(|width| v.ints(&[*width])).collect::<Vec<_>>());
    for i in 0..n {
        // Behind two axes for each spatial one that is done.
        let axis = 2 + 2 * i as i64;
        let elements = v.op("Mul", &[&counting(v, &v.gather_one(block, i)), &v.ints(&[dilations[i]])], vec![]);
        let last = v.op("Slice", &[&elements, &v.ints(&[-1]), &v.ints(&[i64::MAX])], vec![]);
        let starts = v.sub(v.size_of(&read, axis as usize), last);
        let positions = counting(
            v,
            &v.op("Div", &[&v.add(starts, v.ints(&[strides[i] - 1])), &v.ints(&[strides[i].max(1)])], vec![]),
        );
        let positions = v.mul(positions, v.ints(&[strides[i]]));
        let places = v.add(v.unsqueeze(elements, v.ints(&[1])), positions);
        read = v.op("Gather", &[&read, &places], vec![AttributeProto::int("axis", axis)]);
    }
    let pairs = |first: i64| (0..n as i64).map(move |i| 2 + first + 2 * i);
    let perm: Vec<i64> = [0, 1].into_iter().chain(pairs(0)).chain(pairs(1)).collect();
    v.first(v.reshape(v.transpose(read, &perm), v.shape_of(x)))
}

fn window<'v, 'a>(v: &'v Vjp<'a>, big: &str, small: &str, w: &str) -> Result<Window<'v, 'a>> {
    let rank = v.rank(v.x(0)?)?;
    if rank < 3 || v.shapes.rank(w).is_some_and(|r| r != rank) {
        return Err(v.error("its input must have 3 axes or more, and its weight as many"));
    }
    let kernel: Vec<String> = (2..rank).map(|axis| v.dim_of(w, axis)).collect();
    Window::of(v, big, small, &kernel)
}

fn bias(v: &Vjp, x: &str, dy: &str) -> Result<Option<String>> {
    let channels: Vec<i64> = (0..v.rank(x)? as i64).filter(|axis| *axis != 1).collect();
    Ok(v.wants(2).then(|| v.reduce_sum(dy, v.ints(&channels), false)))
}
