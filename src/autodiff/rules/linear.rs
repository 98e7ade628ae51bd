//! Determinants, affine grids and remainders.

use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::DataType;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Det", det);
    rules.vjp("AffineGrid", |v| {
        // The grid of the identity gives the coordinates that theta multiplies.
        let (theta, size, dy) = (v.x(0)?, v.x(1)?, v.dy()?);
        let length = v.constant_ints(1).map(|size| size.len() as i64);
        let length = length.or_else(|| v.static_dims(size)?.first().copied());
        let n = length.ok_or_else(|| v.error("the length of its size must be known"))?.saturating_sub(2).max(0);
        let square = v.expand(v.c(0.0), v.ints(&[n, n + 1]));
        let identity = v.expand_like(v.op("EyeLike", &[&square], vec![]), theta);
        let grid = v.op("AffineGrid", &[&identity, size], v.node.attribute.clone());
        let rows = |value: &str| v.op("Reshape", &[value, &v.ints(&[0, -1, n])], vec![]);
        let (g, coordinates) = (v.transpose(rows(dy), &[0, 2, 1]), rows(&grid));
        let shift = v.reduce_sum(&g, v.ints(&[2]), true);
        v.first(v.concat(&[v.matmul(g, coordinates), shift], 2))
    });
    rules.vjp("Mod", |v| {
        // y = a - b·⌊a/b⌋ (or truncated): the quotient is a whole number that does not move.
        let (a, b, y, dy) = (v.x(0)?, v.x(1)?, v.y(0)?, v.dy()?);
        let quotient = || v.op("Round", &[&v.div(v.sub(a, y), b)], vec![]);
        Ok(vec![v.to_input(0, || dy.into()), v.to_input(1, || v.neg(v.mul(dy, quotient())))])
    });
}

/// d det/dX is the cofactors of X: the determinants of X with row i replaced by the unit vector j. (No inverse, so
/// singular matrices are right as well.)
fn det(v: &Vjp) -> Result<Adjoints> {
    let (x, dy) = (v.x(0)?, v.dy()?);
    let last = v.rank(x)?.checked_sub(1).filter(|last| *last > 0);
    let last = last.ok_or_else(|| v.error("its input must have 2 axes or more"))?;
    let (n, one) = (v.dim_of(x, last), v.ints(&[1]));
    let square = v.expand(v.c(0.0), v.join(&[n.clone(), n.clone()]));
    let eye = v.op("EyeLike", &[&square], vec![]);
    // Axes i, j, row, column.
    let row = v.reshape(&eye, v.join(&[n.clone(), one.clone(), n.clone(), one.clone()]));
    let unit = v.reshape(&eye, v.join(&[one.clone(), n.clone(), one, n]));
    let replaced = v.select(v.cast(row, DataType::Bool), unit, v.unsqueeze(x, v.ints(&[-4, -3])));
    let cofactors = v.op("Det", &[&replaced], vec![]);
    v.first(v.mul(v.unsqueeze(dy, v.ints(&[-2, -1])), cofactors))
}
