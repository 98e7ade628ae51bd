//! Deformable convolution: a convolution whose window reads each element at a place of its own, moved by `offset` and
//! scaled by `mask`.

use super::rotary::counting;
use super::sample::{Images, Outside, Reading, permuted, pick};
use super::{Rules, Vjp};
use crate::Result;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("DeformConv", |v| v.through(|v| Ok(vec![Some(deform_conv(v)?)])));
}

/// y = W·columns + b, where a column holds what the window reads at one of its positions, for each channel the
/// elements of the window.
fn deform_conv(v: &Vjp) -> Result<String> {
    let (x, w, offset) = (v.x(0)?, v.x(1)?, v.x(2)?);
    let kernel = match v.node.attr_ints("kernel_shape") {
        None => [v.dim_of(w, 2), v.dim_of(w, 3)],
        Some(&[height, width]) => [v.ints(&[height]), v.ints(&[width])],
        Some(_) => return Err(v.error("its window must have 2 axes")),
    };
    let product = |a: &str, b: &str| v.dim_op("Mul", a, b, i64::saturating_mul);
    let elements = product(&kernel[0], &kernel[1]);
    let ints = |name: &str, n: usize, default: i64| match v.node.attr_ints(name) {
        None => Ok(vec![default; n]),
        Some(values) if values.len() == n => Ok(values.to_vec()),
        Some(_) => Err(v.error(format!("attribute {name} must have {n} values"))),
    };
    let (strides, dilations, pads) = (ints("strides", 2, 1)?, ints("dilations", 2, 1)?, ints("pads", 4, 0)?);
    let (group, offset_group) = (v.node.attr_i("group", 1), v.node.attr_i("offset_group", 1));

    // Each group of channels that moves together is an image of its own, `[batch·offset groups, channels, …]`.
    let out: Vec<String> = (2..4).map(|axis| v.dim_of(offset, axis)).collect();
    let (batch, groups, rest) = (v.dim_of(x, 0), v.ints(&[offset_group]), v.ints(&[-1]));
    let sizes: Vec<String> = (2..4).map(|axis| v.dim_of(x, axis)).collect();
    let count = v.times(&batch, offset_group);
    let channels = v.dim_op("Div", &v.dim_of(x, 1), &groups, |a, b| a.checked_div(b).unwrap_or(0));
    let parts = v.join(&[vec![count.clone(), channels], sizes.clone()].concat());
    let images = Images::of(v, &v.op("Reshape", &[x, &parts], vec![]), sizes);

    // Axes: image, element of the window, the pair (height, width), position.
    let spread = [vec![count.clone(), elements.clone(), v.ints(&[2])], out.clone()].concat();
    let moved = v.op("Reshape", &[offset, &v.join(&spread)], vec![]);
    let places: Vec<String> = (0..2)
        .map(|axis| {
            // Where the element would be read without an offset: position·stride + element·dilation - pad.
            let element = v.op(if axis == 0 { "Div" } else { "Mod" }, &[&counting(v, &elements), &kernel[1]], vec![]);
            let start = v.sub(v.mul(element, v.ints(&[dilations[axis]])), v.ints(&[pads[axis]]));
            let position = v.mul(counting(v, &out[axis]), v.ints(&[strides[axis]]));
            let position = v.respec(&position, if axis == 0 { &[-1, 1] } else { &[1, -1] });
            let fixed = v.add(v.respec(&start, &[-1, 1, 1]), position);
            v.add(pick(v, &moved, axis as i64, 2), v.number(&fixed))
        })
        .collect();
    let image = v.respec(&counting(v, &count), &[-1, 1, 1, 1]);
    let mut read = images.read(v, &image, &places, Reading::Linear, Outside::Zeros).sum(v);
    if let Some(mask) = v.node.input_at(4) {
        read = v.mul(read, v.respec(mask, &[-1, 1]));
    }

    // Axes: batch, offset group, channel, element of the window, position; then by the groups of W.
    let shape = [vec![batch.clone(), groups, elements.clone()], out.clone(), vec![rest.clone()]].concat();
    let columns = permuted(v, &v.op("Reshape", &[&read, &v.join(&shape)], vec![]), &[0, 1, 5, 2, 3, 4]);
    let positions = product(&out[0], &out[1]);
    let shape = v.join(&[batch.clone(), v.ints(&[group]), rest.clone(), positions]);
    let columns = v.op("Reshape", &[&columns, &shape], vec![]);
    let rows = v.join(&[v.ints(&[group]), rest.clone(), product(&v.dim_of(w, 1), &elements)]);
    let product = v.matmul(v.op("Reshape", &[w, &rows], vec![]), columns);
    let y = v.op("Reshape", &[&product, &v.join(&[vec![batch, rest], out].concat())], vec![]);
    Ok(match v.node.input_at(3) {
        Some(bias) => v.add(y, v.respec(bias, &[-1, 1, 1])),
        None => y,
    })
}
