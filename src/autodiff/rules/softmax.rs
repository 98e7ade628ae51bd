//! Softmax and LogSoftmax (operator set 13 and later: along one axis).

use super::{Rules, Vjp};
use crate::Result;

pub(super) fn add(rules: &mut Rules) {
    // y·(dy - Σ y·dy)
    rules.vjp("Softmax", |v| {
        let (y, dy) = (v.settled(v.y(0)?.into()), v.dy()?);
        let p = v.mul(&y, dy);
        let sum = v.reduce_sum(&p, axis(v)?, true);
        v.first(v.sub(p, v.mul(y, sum)))
    });
    // dy - exp(y)·Σ dy
    rules.vjp("LogSoftmax", |v| {
        let (y, dy) = (v.y(0)?, v.dy()?);
        v.first(v.sub(dy, v.mul(v.settled(v.exp(y)), v.reduce_sum(dy, axis(v)?, true))))
    });
}

fn axis(v: &Vjp) -> Result<String> {
    match v.opset {
        ..13 => Err(v.error("its form before operator set 13 is not supported")),
        _ => Ok(v.ints(&[v.node.attr_i("axis", -1)])),
    }
}
