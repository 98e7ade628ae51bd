//! The step of an LSTM: with the gates i, o, f, c in this order,
//!
//! ```text
//! i = f(Zi + Pi⊙C₋)   f = f(Zf + Pf⊙C₋) or 1 - i (input_forget)   c = g(Zc)
//! C = f⊙C₋ + i⊙c      o = f(Zo + Po⊙C)                             H = o⊙h(C)
//! ```
//!
//! where Z = X·Wᵀ + H₋·Rᵀ + b. The forward node gives only the last C: a Scan without matrix products finds all.

use super::recurrent::{Cell, Found};
use crate::Result;

pub(super) fn lstm(cell: &Cell) -> Result<Found> {
    let v = cell.v;
    let coupled = v.node.attr_i("input_forget", 0) != 0;
    let z = v.add(cell.of_inputs(true), v.matmul(&cell.before, v.swap(&cell.r, 2)));
    let z = cell.split(&z, 4, -1);
    let p = cell.p.as_ref().map(|p| cell.split(p, 3, 0));
    // Argument of a gate that looks at the cell state through peephole `k`.
    let peep = |z: &str, k: usize, c: &str| match &p {
        Some(p) => v.add(z, v.mul(&p[k], c)),
        None => z.to_string(),
    };
    let gates = |zi: &str, zf: &str, zc: &str, before: &str| {
        let i = cell.activate(0, peep(zi, 0, before));
        let f = if coupled { v.sub(cell.c(1.0), &i) } else { cell.activate(0, peep(zf, 2, before)) };
        (i, f, cell.activate(1, zc))
    };
    let c0 = cell.c0.clone().unwrap_or_default();
    let states = cell.scan(false, &[&c0], &[&z[0], &z[2], &z[3]], |state, step| {
        let (i, f, c) = gates(&step[0], &step[1], &step[2], &state[0]);
        let next = v.add(v.mul(f, &state[0]), v.mul(i, c));
        vec![next.clone(), next]
    });
    let all = &states[1];
    let before = cell.shifted(all, &c0);
    let (i, f, c) = gates(&z[0], &z[2], &z[3], &before);
    let o = cell.activate(0, peep(&z[1], 1, all));
    let shown = cell.activate(2, all);

    // dZ per adjoint of H (o) and of C (i, f, c).
    let to_o = v.mul(&shown, cell.slope(0, &o));
    let to_cell = v.mul(&o, cell.slope(2, &shown));
    let slope = cell.slope(0, &i);
    let to_i = v.mul(if coupled { v.sub(&c, &before) } else { c.clone() }, slope);
    let to_f = v.mul(&before, if coupled { cell.c(0.0) } else { cell.slope(0, &f) });
    let to_c = v.mul(&i, cell.slope(1, &c));
    let factors = [cell.dy.as_str(), &to_o, &to_cell, &to_i, &to_f, &to_c, &f];
    let out = cell.scan(true, &[&cell.dh, &cell.dc], &factors, |state, step| {
        let dh = v.add(&state[0], &step[0]);
        let d_o = v.mul(&dh, &step[1]);
        let mut dc = v.add(&state[1], v.mul(&dh, &step[2]));
        if let Some(p) = &p {
            dc = v.add(dc, v.mul(&d_o, &p[1]));
        }
        let [di, df, dn] = [3, 4, 5].map(|k| v.mul(&dc, &step[k]));
        let mut before = v.mul(&dc, &step[6]);
        if let Some(p) = &p {
            before = v.add(before, v.add(v.mul(&di, &p[0]), v.mul(&df, &p[2])));
        }
        let dz = v.concat(&[di, d_o, df, dn], -1);
        vec![v.matmul(&dz, &cell.r), before, dz]
    });
    let dz = out[2].clone();
    let dp = v.wants(7).then(|| {
        let parts = cell.split(&dz, 4, -1);
        let sum = |d: &str, c: &str| v.reduce_sum(v.mul(d, c), v.ints(&[0, 1]), false);
        v.concat(&[sum(&parts[0], &before), sum(&parts[1], all), sum(&parts[2], &before)], 0)
    });
    Ok(Found { du: dz.clone(), dz, dr: None, dh0: out[0].clone(), dc0: Some(out[1].clone()), dp })
}
