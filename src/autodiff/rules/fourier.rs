//! Fourier transforms. They are linear, and the adjoint of one is another: the transform in the other direction, with
//! what the definition scales, cuts, fills with zeros or leaves out put right before and after it.

use super::rotary::counting;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType, Tensor};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("DFT", dft);
    rules.vjp("STFT", |v| v.through(|v| Ok(vec![Some(stft(v)?)])));
}

/// Forward: y = F·x, so dx = F̄ᵀ·dy = n·F⁻¹·dy; inverse: y = F⁻¹·x, so dx = F·dy/n. Complex numbers are pairs, and what
/// is real has no imaginary part to give an adjoint to.
fn dft(v: &Vjp) -> Result<Adjoints> {
    let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
    let rank = v.rank(x)?;
    let (inverse, onesided) = (v.node.attr_i("inverse", 0) != 0, v.node.attr_i("onesided", 0) != 0);
    let axis = match v.opset {
        20.. => v.node.input_at(2).map(String::from).unwrap_or_else(|| v.int(-2)),
        _ => v.int(v.axis(v.node.attr_i("axis", 1), rank)? as i64),
    };
    // A real signal that is not written with a last axis of its own can be only in old files.
    if rank < 3 || v.rank(y)? != rank {
        return Err(v.error("its input must have 3 axes or more, the last for the real and imaginary part"));
    }
    let along = |value: &str| v.op("Gather", &[&v.shape_of(value), &axis], vec![]);
    let length = match (v.node.input_at(1), inverse && onesided, onesided) {
        (Some(length), ..) => as_scalar(v, length),
        (None, true, _) => along(y),
        (None, ..) => along(x),
    };
    let transform = |x: &str, inverse: bool, length: &str| {
        let mut attributes = vec![AttributeProto::int("inverse", i64::from(inverse))];
        let mut inputs = vec![x, length];
        match v.opset {
            20.. => inputs.push(&axis),
            _ => attributes.push(AttributeProto::int("axis", v.node.attr_i("axis", 1))),
        }
        v.op("DFT", &inputs, attributes)
    };
    let (number, one) = (v.cast_like(&length, dy), v.c(1.0));
    let g = match (inverse, onesided) {
        (false, _) => v.mul(transform(dy, true, &length), number),
        (true, false) => v.div(transform(dy, false, &length), number),
        (true, true) => {
            // Each number between the first and the middle one stands for its conjugate as well.
            let full = v.div(transform(dy, false, &length), &number);
            let at = counting(v, &v.unsqueeze(&length, v.ints(&[0])));
            let twin = v.and(v.greater(&at, v.int(0)), v.less(v.mul(&at, v.int(2)), &length));
            let factor = v.select(twin, v.c(2.0), one);
            let place = v.select(
                v.equal(counting(v, &v.ints(&[rank as i64])), positive(v, &axis, rank)),
                v.ints(&[-1]),
                v.ints(&[1]),
            );
            v.mul(full, v.op("Reshape", &[&factor, &place], vec![]))
        }
    };
    // Cut, or filled with zeros, to what x is; of a real x the imaginary part is cut off.
    let missing = v.sub(v.shape_of(x), v.shape(&g));
    let widths = v.concat(&[v.ints(&vec![0; rank]), missing], 0);
    v.first(v.op("Pad", &[&g, &widths, &v.c(0.0)], vec![]))
}

fn positive(v: &Vjp, axis: &str, rank: usize) -> String {
    let flat = v.op("Reshape", &[axis, &v.ints(&[1])], vec![]);
    v.op("Mod", &[&flat, &v.ints(&[rank as i64])], vec![])
}

/// An integer of any type and of rank 0 or 1 as an int64 scalar.
fn as_scalar(v: &Vjp, x: &str) -> String {
    match v.constant(x) {
        Some(tensor @ (Tensor::I64(_) | Tensor::I32(_))) if tensor.len() == 1 => {
            v.int(tensor.as_f64().unwrap_or_default() as i64)
        }
        _ => v.op("Reshape", &[&v.cast(x, DataType::Int64), &v.ints(&[])], vec![]),
    }
}

/// The transforms of the signal's frames, each times the window.
fn stft(v: &Vjp) -> Result<String> {
    let (signal, step) = (v.x(0)?, as_scalar(v, v.x(1)?));
    let onesided = v.node.attr_i("onesided", 1);
    let mut signal = signal.to_string();
    match v.rank(&signal)? {
        2 => signal = v.unsqueeze(&signal, v.ints(&[-1])),
        3 => {}
        _ => return Err(v.error("its signal must have 2 or 3 axes")),
    }
    let window = v.node.input_at(2);
    let length = match (v.node.input_at(3), window) {
        (Some(length), _) => as_scalar(v, length),
        (None, Some(window)) => v.size(window),
        (None, None) => return Err(v.error("it has neither a window nor a frame_length")),
    };
    let count = v.op("Div", &[&v.sub(v.size_of(&signal, 1), &length), &step], vec![]);
    let frames = v.add(count, v.ints(&[1]));
    let starts = v.unsqueeze(v.mul(counting(v, &frames), &step), v.ints(&[1]));
    let places = v.add(starts, counting(v, &v.unsqueeze(&length, v.ints(&[0]))));
    // Axes: batch, frame, place in the frame, real and imaginary part.
    let mut frames = v.op("Gather", &[&signal, &places], vec![AttributeProto::int("axis", 1)]);
    if let Some(window) = window {
        frames = v.mul(frames, v.unsqueeze(window, v.ints(&[1])));
    }
    let mut attributes = vec![AttributeProto::int("onesided", onesided)];
    let mut inputs = vec![frames.as_str()];
    let axis = v.int(2);
    match v.opset {
        20.. => inputs.extend(["", axis.as_str()]),
        _ => attributes.push(AttributeProto::int("axis", 2)),
    }
    Ok(v.op("DFT", &inputs, attributes))
}
