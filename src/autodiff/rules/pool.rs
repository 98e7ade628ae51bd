//! Pools. Where elements are equal, a maximum belongs to the first, as in PyTorch.

use super::window::Window;
use super::{Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("MaxPool", |v| {
        let (x, dy) = (v.x(0)?, v.dy()?);
        let indices = match v.node.attr_i("storage_order", 0) {
            0 => v.forward_output(v.node, 1),
            // Its indices count columns first.
            _ => {
                let rows = v.node.attribute.iter().filter(|a| a.name() != "storage_order").cloned().collect();
                v.node("", "MaxPool", &[x], rows, 2).remove(1)
            }
        };
        v.first(scatter_flat(v, x, &indices, dy))
    });
    rules.vjp("MaxUnpool", |v| {
        let (indices, dy) = (v.x(1)?, v.dy()?);
        v.first(v.op("Gather", &[&flat(v, dy), indices], vec![]))
    });
    rules.vjp("AveragePool", |v| {
        let window = window(v)?;
        let share = v.div(v.dy()?, count(v, &window)?);
        v.first(fold(v, &window, &share)?)
    });
    // y = (Σ|x|ᵖ)^(1/p): dx = sign(x)·|x|ᵖ⁻¹ · Σ dy·y¹⁻ᵖ over the windows that x is in.
    rules.vjp("LpPool", |v| {
        let window = window(v)?;
        let (slope, share) = lp(v)?;
        v.first(v.mul(slope, fold(v, &window, &share)?))
    });
    rules.vjp("GlobalLpPool", |v| {
        let (slope, share) = lp(v)?;
        v.first(v.mul(slope, share))
    });
    rules.vjp("GlobalAveragePool", |v| {
        let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
        let size = |value: &str| v.static_dims(value)?.iter().try_fold(1i64, |n, d| n.checked_mul(*d));
        let count = v.ratio(x, y, size(x).zip(size(y)).and_then(|(x, y)| x.checked_div(y)));
        v.first(v.expand_like(v.div(dy, count), x))
    });
    rules.vjp("GlobalMaxPool", |v| {
        let (x, dy) = (v.x(0)?, v.dy()?);
        let rows = |value: &str| v.op("Reshape", &[value, &v.ints(&[0, 0, -1])], vec![]);
        let planes = rows(x);
        let first = v.op("ArgMax", &[&planes], vec![AttributeProto::int("axis", 2)]);
        let zeros = v.expand(v.c(0.0), v.shape(&planes));
        let at = v.op("ScatterElements", &[&zeros, &first, &rows(dy)], vec![AttributeProto::int("axis", 2)]);
        v.first(v.reshape(at, v.shape_of(x)))
    });
}

fn flat(v: &Vjp, x: &str) -> String {
    v.op("Reshape", &[x, &v.ints(&[-1])], vec![])
}

/// `g` added up at flat `indices` of zeros in the shape of `x`.
pub(super) fn scatter_flat(v: &Vjp, x: &str, indices: &str, g: &str) -> String {
    let zeros = v.expand(v.c(0.0), v.count_of(x));
    let add = vec![AttributeProto::int("axis", 0), AttributeProto::string("reduction", "add")];
    let sum = v.op("ScatterElements", &[&zeros, &flat(v, indices), &flat(v, g)], add);
    v.reshape(sum, v.shape_of(x))
}

impl Vjp<'_> {
    /// Number of elements of `x` as a 1-D int64 value of one element.
    fn count_of(&self, x: &str) -> String {
        match self.static_dims(x).and_then(|dims| dims.iter().try_fold(1i64, |n, d| n.checked_mul(*d))) {
            Some(n) => self.ints(&[n]),
            None => self.unsqueeze(self.size(x), self.ints(&[0])),
        }
    }
}

/// Size of a pool's window.
fn kernel(v: &Vjp) -> Result<Vec<i64>> {
    let kernel = v.node.attr_ints("kernel_shape").filter(|k| !k.is_empty());
    let kernel = kernel.ok_or_else(|| v.error("it has no kernel_shape"))?;
    match v.rank(v.x(0)?)? == kernel.len() + 2 && kernel.iter().all(|k| *k > 0) {
        true => Ok(kernel.to_vec()),
        false => Err(v.error("its kernel_shape does not fit its input")),
    }
}

fn window<'v, 'a>(v: &'v Vjp<'a>) -> Result<Window<'v, 'a>> {
    let kernel: Vec<String> = kernel(v)?.iter().map(|k| v.ints(&[*k])).collect();
    Window::of(v, v.x(0)?, v.y(0)?, &kernel)
}

/// Kernel of ones for one channel.
fn ones(v: &Vjp) -> Result<String> {
    Ok(v.expand(v.c(1.0), v.ints(&[vec![1, 1], kernel(v)?].concat())))
}

/// Sum of `g` over the windows that each element of x is in, channel by channel.
fn fold(v: &Vjp, window: &Window, g: &str) -> Result<String> {
    let (x, y) = (v.x(0)?, v.y(0)?);
    let rank = v.rank(x)?;
    let planes: Vec<String> =
        [-1, 1].iter().map(|n| v.ints(&[*n])).chain((2..rank).map(|axis| v.dim_of(y, axis))).collect();
    let planes = v.op("Reshape", &[g, &v.join(&planes)], vec![]);
    Ok(v.reshape(window.spread(&planes, &ones(v)?, 1), v.shape_of(x)))
}

/// Elements that each window of an AveragePool counts: those inside the input, or, where pads count too, inside it and
/// its pads. (Rounding up lets windows reach beyond both.)
fn count(v: &Vjp, window: &Window) -> Result<String> {
    let x = v.x(0)?;
    let (with_pads, ceil) = (v.node.attr_i("count_include_pad", 0) != 0, v.node.attr_i("ceil_mode", 0) != 0);
    let inside =
        || window.pads().is_some_and(|(before, after)| before.iter().all(|p| *p == 0) && after.iter().all(|p| *p <= 0));
    let kernel = kernel(v)?;
    if (with_pads && !ceil) || inside() {
        return Ok(v.c(kernel.iter().map(|k| *k as f64).product()));
    }
    let (n, one) = (kernel.len(), v.ints(&[1]));
    let pads = v.node.attr_ints("pads").filter(|pads| pads.len() == 2 * n);
    let mut sizes = vec![one.clone(), one];
    let mut window = window.clone();
    for i in 0..n {
        let mut size = v.dim_of(x, i + 2);
        if with_pads {
            let behind = v.ints(&[pads.map_or(0, |pads| pads[n + i])]);
            size = v.plus(&v.plus(&size, &window.before[i]), &behind);
            window.after[i] = v.minus(&window.after[i], &behind);
            window.before[i] = v.ints(&[0]);
        }
        sizes.push(size);
    }
    Ok(window.convolve(&v.expand(v.c(1.0), v.join(&sizes)), &ones(v)?, 1))
}

/// sign(x)·|x|ᵖ⁻¹ and dy·y¹⁻ᵖ.
fn lp(v: &Vjp) -> Result<(String, String)> {
    let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
    // Where y is 0, so is every x.
    let safe = || v.select(v.equal(y, v.c(0.0)), v.c(1.0), y);
    Ok(match v.node.attr_i("p", 2) {
        1 => (v.sign(x), dy.to_string()),
        2 => (x.to_string(), v.div(dy, safe())),
        p => {
            let power = v.c(p as f64 - 1.0);
            (v.mul(v.sign(x), v.pow(v.abs(x), &power)), v.div(dy, v.pow(safe(), &power)))
        }
    })
}
