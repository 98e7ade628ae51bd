//! Convolution. The adjoint by the input is the transposed convolution with the same weight; the adjoint by the weight is
//! a convolution of input and adjoint over the batch, with strides and dilations exchanged.

use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Conv", conv);
}

fn conv(v: &Vjp) -> Result<Adjoints> {
    let (x, w, y, dy) = (v.x(0)?, v.x(1)?, v.y(0)?, v.dy()?);
    let rank = v.rank(x)?;
    let Some(spatial) = rank.checked_sub(2).filter(|n| *n > 0) else {
        return Err(v.error("its input must have 3 axes or more"));
    };
    if !matches!(v.node.attr_s("auto_pad"), None | Some("NOTSET" | "VALID")) {
        return Err(v.error("its auto_pad must be NOTSET or VALID; give the pads as numbers"));
    }
    let ints = |name: &str, n: usize, default: i64| match v.node.attr_ints(name) {
        Some(values) if values.len() == n => Ok(values.to_vec()),
        Some(_) => Err(v.error(format!("attribute {name} must have {n} values"))),
        None => Ok(vec![default; n]),
    };
    let (strides, dilations) = (ints("strides", spatial, 1)?, ints("dilations", spatial, 1)?);
    let (pads, group) = (ints("pads", 2 * spatial, 0)?, v.node.attr_i("group", 1));
    let channels: Vec<i64> = (0..rank as i64).filter(|axis| *axis != 1).collect();
    let sizes = |value: &str| -> Result<Vec<i64>> {
        let dims = v.dims(value).and_then(|d| d.get(2..)).unwrap_or(&[]);
        let sizes: Option<Vec<i64>> = dims.iter().map(known).collect();
        sizes
            .filter(|s| s.len() == spatial)
            .ok_or_else(|| v.error(format!("the spatial size of {value} must be known")))
    };

    let dx = match v.wants(0) {
        false => None,
        true => {
            let (full, kernel, part) = (sizes(x)?, sizes(w)?, sizes(y)?);
            // What the strides left over at the far end.
            let rest: Vec<i64> = (0..spatial)
                .map(|i| {
                    full[i] + pads[i] + pads[spatial + i]
                        - (part[i] - 1) * strides[i]
                        - (kernel[i] - 1) * dilations[i]
                        - 1
                })
                .collect();
            let attributes = vec![
                AttributeProto::ints("strides", &strides),
                AttributeProto::ints("dilations", &dilations),
                AttributeProto::ints("pads", &pads),
                AttributeProto::ints("output_padding", &rest),
                AttributeProto::int("group", group),
            ];
            Some(v.op("ConvTranspose", &[dy, w], attributes))
        }
    };
    let dw = match v.wants(1) {
        false => None,
        true if group != 1 => {
            return Err(v.error("the derivative by the weight of a grouped convolution is not supported"));
        }
        true => {
            let mut turn: Vec<i64> = (0..rank as i64).collect();
            turn.swap(0, 1);
            let attributes = vec![
                AttributeProto::ints("strides", &dilations),
                AttributeProto::ints("dilations", &strides),
                AttributeProto::ints("pads", &pads),
            ];
            let all = v.transpose(v.op("Conv", &[&v.transpose(x, &turn), &v.transpose(dy, &turn)], attributes), &turn);
            // Positions past the kernel come from what the strides left over.
            let axes: Vec<i64> = (2..rank as i64).collect();
            let ends = v.ints(&sizes(w)?);
            Some(v.op("Slice", &[&all, &v.ints(&vec![0; spatial]), &ends, &v.ints(&axes)], vec![]))
        }
    };
    let db = v.wants(2).then(|| v.reduce_sum(dy, v.ints(&channels), false));
    Ok(vec![dx, dw, db])
}
