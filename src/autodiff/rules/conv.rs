//! Convolution. The adjoint by the input is the transposed convolution with the same weight, and the other way round;
//! the adjoint by the weight is a convolution of input and adjoint over the batch.

use super::window::Window;
use super::{Rules, Vjp};
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
    rules.vjp("Col2Im", |v| {
        // The windows of dy, by a convolution with one kernel for each of their elements.
        let (x, dy) = (v.x(0)?, v.dy()?);
        let block = v.constant_ints(2).ok_or_else(|| v.error("its block_shape must be constant"))?;
        let image = v.constant_ints(1).ok_or_else(|| v.error("its image_shape must be constant"))?;
        let ints =
            |name: &str, n: usize, default: i64| v.node.attr_ints(name).map_or(vec![default; n], <[i64]>::to_vec);
        let n = block.len();
        let size = block.iter().try_fold(1i64, |n, k| n.checked_mul(*k)).ok_or_else(|| v.error("bad block_shape"))?;
        let square = v.expand(v.c(0.0), v.ints(&[size, size]));
        let eye = v.reshape(v.op("EyeLike", &[&square], vec![]), v.ints(&[&[size, 1][..], &block].concat()));
        let planes = v.op("Reshape", &[dy, &v.ints(&[&[-1, 1][..], &image].concat())], vec![]);
        let attributes = ["strides", "dilations"].map(|name| AttributeProto::ints(name, &ints(name, n, 1)));
        let mut attributes = attributes.to_vec();
        attributes.push(AttributeProto::ints("pads", &ints("pads", 2 * n, 0)));
        v.first(v.reshape(v.op("Conv", &[&planes, &eye], attributes), v.shape_of(x)))
    });
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
