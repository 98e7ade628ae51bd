//! Scatters with each reduction, and selections whose adjoint is one. What is extreme shares its adjoint equally, as in
//! PyTorch; a factor's adjoint is the product of the other factors, zeros among them included.

use super::rotary::counting;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("ScatterElements", |v| scatter(v, "GatherElements"));
    rules.vjp("ScatterND", |v| scatter(v, "GatherND"));
    rules.vjp("ReverseSequence", |v| v.first(v.op("ReverseSequence", &[v.dy()?, v.x(1)?], v.node.attribute.clone())));
    rules.vjp("Compress", compress);
    rules.vjp("TensorScatter", tensor_scatter);
    // y = off + (on - off)·h: what lies where h is 1 belongs to on, the rest to off.
    rules.vjp("OneHot", |v| {
        let (indices, depth, values, dy) = (v.x(0)?, v.x(1)?, v.x(2)?, v.dy()?);
        let bits =
            v.cast(v.concat(&[v.ints(&[0]), v.ints(&[1])], 0), v.shapes.element(values).unwrap_or(DataType::Float));
        let hot = v.op("OneHot", &[indices, depth, &bits], v.node.attribute.clone());
        let on = v.sum_all(v.mul(dy, hot));
        let off = v.sub(v.sum_all(dy), &on);
        let one = |value: &str| v.unsqueeze(value, v.ints(&[0]));
        Ok(vec![None, None, Some(v.concat(&[one(&off), one(&on)], 0))])
    });
}

fn scatter(v: &Vjp, gather: &str) -> Result<Adjoints> {
    let (data, indices, updates, y, dy) = (v.x(0)?, v.x(1)?, v.x(2)?, v.y(0)?, v.dy()?);
    let axis: Vec<AttributeProto> = v.node.attribute.iter().filter(|a| a.name() == "axis").cloned().collect();
    let read = |from: &str| v.op(gather, &[from, indices], axis.clone());
    let write = |into: &str, what: &str, how: &str| {
        let mut attributes = axis.clone();
        attributes.extend((how != "none").then(|| AttributeProto::string("reduction", how)));
        v.op(v.node.op_type(), &[into, indices, what], attributes)
    };
    let (data, updates) = match v.node.attr_s("reduction").unwrap_or("none") {
        "none" => (v.wants(0).then(|| write(dy, &v.zeros_like(updates), "none")), v.wants(2).then(|| read(dy))),
        "add" => (Some(dy.to_string()), v.wants(2).then(|| read(dy))),
        "mul" => {
            let zero = |value: &str| v.equal(value, v.c(0.0));
            let whole = |value: &str| v.select(zero(value), v.c(1.0), value);
            let (zeros, more) = (v.mask(zero(data)), v.mask(zero(updates)));
            let count = write(&zeros, &more, "add");
            let share = v.mul(dy, write(&whole(data), &whole(updates), "mul"));
            // The product of the others is 0 where one of them is.
            let others = |share: &str, own: &str, count: &str, zeros: &str| {
                v.select(v.equal(count, zeros), v.div(share, whole(own)), v.c(0.0))
            };
            (
                v.wants(0).then(|| others(&share, data, &count, &zeros)),
                v.wants(2).then(|| others(&read(&share), updates, &read(&count), &more)),
            )
        }
        _ => {
            let (hit, more) = (v.mask(v.equal(data, y)), v.mask(v.equal(updates, read(y))));
            let share = v.div(dy, v.op("Max", &[&write(&hit, &more, "add"), &v.c(1.0)], vec![]));
            (v.wants(0).then(|| v.mul(&share, &hit)), v.wants(2).then(|| v.mul(read(&share), &more)))
        }
    };
    Ok(vec![data, None, updates])
}

/// dy back to the places that the condition selected.
fn compress(v: &Vjp) -> Result<Adjoints> {
    let (x, condition, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let places = v.op("Reshape", &[&v.op("NonZero", &[condition], vec![]), &v.ints(&[-1])], vec![]);
    if v.node.attr("axis").is_none() {
        return v.first(super::pool::scatter_flat(v, x, &places, dy));
    }
    let rank = v.rank(x)?;
    let axis = v.axis(v.node.attr_i("axis", 0), rank)?;
    let mut shape = vec![1; rank];
    shape[axis] = -1;
    let at = v.expand(v.op("Reshape", &[&places, &v.ints(&shape)], vec![]), v.shape(dy));
    let along = vec![AttributeProto::int("axis", axis as i64)];
    v.first(v.op("ScatterElements", &[&v.zeros_like(x), &at, dy], along))
}

/// The update lies at its own places, one after the other from where each batch's begins (and around the end).
fn tensor_scatter(v: &Vjp) -> Result<Adjoints> {
    let (cache, update, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
    let rank = v.rank(cache)?;
    let axis = v.axis(v.node.attr_i("axis", -2), rank)?;
    let circular = v.node.attr_s("mode") == Some("circular");
    let along = |axis: usize| (0..rank).map(|i| if i == axis { -1 } else { 1 }).collect::<Vec<_>>();
    let mut places = v.respec(&counting(v, &v.dim_of(update, axis)), &along(axis));
    if let Some(start) = v.node.input_at(2) {
        places = v.add(places, v.respec(start, &along(0)));
    }
    if circular {
        places = v.op("Mod", &[&places, &v.dim_of(cache, axis)], vec![]);
    }
    let along = vec![AttributeProto::int("axis", axis as i64)];
    let places = v.expand(places, v.shape_of(update));
    let left = || v.op("ScatterElements", &[dy, &places, &v.zeros_like(update)], along.clone());
    let taken = || v.op("GatherElements", &[dy, &places], along.clone());
    Ok(vec![v.wants(0).then(left), v.wants(1).then(taken)])
}
