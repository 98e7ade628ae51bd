//! The step of a GRU: with the gates z, r, h in this order,
//!
//! ```text
//! z = f(Xz + H₋·Rzᵀ)   r = f(Xr + H₋·Rrᵀ)   H = (1 - z)⊙h + z⊙H₋
//! h = g(Xh + (r⊙H₋)·Rhᵀ)                    linear_before_reset = 0
//! h = g(Xh + r⊙(H₋·Rhᵀ))                    otherwise
//! ```
//!
//! where Xz, Xr, Xh stand for X·Wᵀ and the biases (that of Rh inside the bracket).

use super::recurrent::{Cell, Found};
use crate::Result;

pub(super) fn gru(cell: &Cell) -> Result<Found> {
    let v = cell.v;
    let linear = v.node.attr_i("linear_before_reset", 0) != 0;
    let x = cell.split(&cell.of_inputs(false), 3, -1);
    let weights = cell.split(&cell.r, 3, 0);
    let biases = cell.b.as_ref().map(|b| cell.split(&cell.halves(b).1, 3, 0));
    let product = |h: &str, gate: usize| {
        let hr = v.matmul(h, v.swap(&weights[gate], 2));
        biases.as_ref().map_or(hr.clone(), |b| v.add(&hr, &b[gate]))
    };
    let h_before = &cell.before;
    let z = cell.activate(0, v.add(&x[0], product(h_before, 0)));
    let r = cell.activate(0, v.add(&x[1], product(h_before, 1)));
    let reset = v.mul(&r, h_before);
    // What the reset gate lets through, and what it is multiplied with.
    let (inner, through) = match linear {
        true => {
            let q = product(h_before, 2);
            (v.mul(&r, &q), q)
        }
        false => (product(&reset, 2), h_before.clone()),
    };
    let h = cell.activate(1, v.add(&x[2], inner));
    // dZ per adjoint of H, of h's argument and of r⊙…
    let to_z = v.mul(v.sub(h_before, &h), cell.slope(0, &z));
    let to_h = v.mul(v.sub(cell.c(1.0), &z), cell.slope(1, &h));
    let to_r = v.mul(through, cell.slope(0, &r));
    let factors = [cell.dy.as_str(), &to_z, &to_h, &to_r, &z, &r];
    let out = cell.scan(true, &[&cell.dh], &factors, |state, step| {
        let dh = v.add(&state[0], &step[0]);
        let (dz, dn) = (v.mul(&dh, &step[1]), v.mul(&dh, &step[2]));
        let straight = v.mul(&dh, &step[4]);
        let (dr, before) = match linear {
            true => {
                let dr = v.mul(&dn, &step[3]);
                let du = v.concat(&[dz.clone(), dr.clone(), v.mul(&dn, &step[5])], -1);
                (dr, v.add(straight, v.matmul(du, &cell.r)))
            }
            false => {
                let through = v.matmul(&dn, &weights[2]);
                let dr = v.mul(&through, &step[3]);
                let gates = v.add(v.matmul(&dz, &weights[0]), v.matmul(&dr, &weights[1]));
                (dr, v.add(v.add(straight, v.mul(through, &step[5])), gates))
            }
        };
        vec![before, dz, dr, dn]
    });
    let (dh0, dz) = (out[0].clone(), out[1..].to_vec());
    let rows =
        |value: &str| v.reshape(value, v.concat(&[v.ints(&[-1]), v.dim_of(v.node.input_at(2).unwrap_or(""), 2)], 0));
    let weight =
        |dz: &str, h: &str| v.op("Gemm", &[&rows(dz), &rows(h)], vec![crate::onnx::AttributeProto::int("transA", 1)]);
    let (du, dr) = match linear {
        true => (v.concat(&[dz[0].clone(), dz[1].clone(), v.mul(&dz[2], &r)], -1), None),
        false => {
            let parts = [weight(&dz[0], h_before), weight(&dz[1], h_before), weight(&dz[2], &reset)];
            (v.concat(&dz, -1), Some(v.concat(&parts, 0)))
        }
    };
    Ok(Found { dz: v.concat(&dz, -1), du, dr, dh0, dc0: None, dp: None })
}
