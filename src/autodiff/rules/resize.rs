//! Resize is a linear map along each axis. Its matrix is what Resize makes of an identity matrix, whatever the mode, and
//! the adjoint is the product with its transpose.

use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Resize", resize);
}

fn resize(v: &Vjp) -> Result<Adjoints> {
    let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
    let rank = v.rank(x)?;
    if !matches!(v.node.attr_s("keep_aspect_ratio_policy"), None | Some("stretch")) {
        return Err(v.error("its keep_aspect_ratio_policy must be \"stretch\"; give the sizes themselves"));
    }
    let axes = match v.node.attr_ints("axes") {
        Some(axes) => axes.iter().map(|axis| v.axis(*axis, rank)).collect::<Result<Vec<_>>>()?,
        None => (0..rank).collect(),
    };
    let crop = v.node.attr_s("coordinate_transformation_mode") == Some("tf_crop_and_resize");
    let mut g = dy.to_string();
    for (k, axis) in axes.iter().enumerate() {
        if !crop && untouched(v, x, y, k, *axis) {
            continue;
        }
        let matrix = matrix(v, x, k, *axis, axes.len(), crop)?;
        // The axis goes to the end, where the product is.
        let mut perm: Vec<i64> = (0..rank as i64).collect();
        g = match rank - axis {
            1 => v.matmul(&g, matrix),
            2 => v.matmul(v.transpose(matrix, &[1, 0]), &g),
            _ => {
                perm.swap(*axis, rank - 1);
                v.transpose(v.matmul(v.transpose(&g, &perm), matrix), &perm)
            }
        };
    }
    v.first(g)
}

/// Whether axis `axis`, the `k`-th of the scales, keeps its size and so its values.
fn untouched(v: &Vjp, x: &str, y: &str, k: usize, axis: usize) -> bool {
    let scales = v.node.input_at(2).and_then(|scales| v.shapes.floats(scales));
    if let Some(scale) = scales.and_then(|scales| scales.get(k)) {
        return *scale == 1.0;
    }
    let size = |value: &str| v.dims(value).and_then(|dims| dims.get(axis));
    v.node.input_at(3).is_some() && size(x).is_some() && size(x) == size(y)
}

/// Rows: places of y along the axis; columns: those of x.
fn matrix(v: &Vjp, x: &str, k: usize, axis: usize, count: usize, crop: bool) -> Result<String> {
    let n = v.dim_of(x, axis);
    let one = v.ints(&[1]);
    let square = v.expand(v.c(0.0), v.join(&[n.clone(), n.clone()]));
    let eye = v.reshape(v.op("EyeLike", &[&square], vec![]), v.join(&[one.clone(), one.clone(), n.clone(), n.clone()]));
    let part = |value: &str, at: usize| {
        let at = at as i64;
        v.op("Slice", &[value, &v.ints(&[at]), &v.ints(&[at + 1]), &v.ints(&[0])], vec![])
    };
    let mut inputs = vec![eye, String::new()];
    if crop {
        let roi = v.x(1)?;
        let (start, end) = (part(roi, k), part(roi, count + k));
        let like = |value: f64| v.cast_like(v.expand(v.c(value), v.ints(&[1])), &start);
        let (zero, whole) = (like(0.0), like(1.0));
        let ends = [&zero, &zero, &start, &zero, &whole, &whole, &end, &whole].map(String::from);
        inputs[1] = v.concat(&ends, 0);
    }
    match (v.node.input_at(2), v.node.input_at(3)) {
        (_, Some(sizes)) => {
            let size = v.constant_ints(3).and_then(|sizes| sizes.get(k).copied());
            let size = size.map_or_else(|| part(sizes, k), |size| v.ints(&[size]));
            inputs.extend([String::new(), v.join(&[one.clone(), one, size, n])]);
        }
        (Some(scales), None) => {
            let scale = part(scales, k);
            let unit = v.float(1.0, crate::onnx::DataType::Float).unwrap_or_default();
            let unit = v.expand(unit, v.ints(&[1]));
            inputs.push(v.concat(&[unit.clone(), unit.clone(), scale, unit], 0));
        }
        _ => return Err(v.error("it has neither scales nor sizes")),
    }
    let fixed = ["axes", "extrapolation_value", "keep_aspect_ratio_policy"];
    let mut attributes: Vec<AttributeProto> =
        v.node.attribute.iter().filter(|a| !fixed.contains(&a.name())).cloned().collect();
    attributes.push(AttributeProto::float("extrapolation_value", 0.0));
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let resized = v.op("Resize", &inputs, attributes);
    Ok(v.squeeze(resized, v.ints(&[0, 1])))
}
