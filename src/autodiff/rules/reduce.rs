//! Reductions and cumulative sums.

use super::super::vjp::known;
use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rule(rules, "ReduceSum", |r| r.dy.clone());
    rule(rules, "ReduceMean", |r| r.v.div(&r.dy, r.count()));
    // What is extreme shares the adjoint equally.
    let extremum = |r: &Reduction| {
        let hit = r.v.mask(r.v.equal(r.x, &r.y));
        let share = r.v.div(&r.dy, r.again(&hit));
        r.v.mul(hit, share)
    };
    rule(rules, "ReduceMax", extremum);
    rule(rules, "ReduceMin", extremum);
    rule(rules, "ReduceL1", |r| r.v.mul(&r.dy, r.v.sign(r.x)));
    // x/|x|, and 0 where |x| is 0.
    rule(rules, "ReduceL2", |r| {
        let empty = r.v.equal(&r.y, r.v.c(0.0));
        let scale = r.v.select(&empty, r.v.c(0.0), r.v.div(&r.dy, r.v.select(&empty, r.v.c(1.0), &r.y)));
        r.v.mul(r.x, scale)
    });
    rule(rules, "ReduceLogSum", |r| r.v.div(&r.dy, r.v.exp(&r.y)));
    rule(rules, "ReduceLogSumExp", |r| r.v.mul(&r.dy, r.v.exp(r.v.sub(r.x, &r.y))));
    rule(rules, "ReduceSumSquare", |r| r.v.mul(r.x, r.v.mul(&r.dy, r.v.c(2.0))));
    // The product of the others: y/x, but where zeros are, those others that are not.
    rule(rules, "ReduceProd", |r| {
        let v = r.v;
        let empty = v.equal(r.x, v.c(0.0));
        let zeros = v.mask(&empty);
        let whole = v.select(empty, v.c(1.0), r.x);
        let all = v.op("ReduceProd", &product_inputs(r, &whole), v.node.attribute.clone());
        let all = r.restored(all);
        let only = v.equal(r.again(&zeros), zeros);
        v.mul(&r.dy, v.select(only, v.div(all, whole), v.c(0.0)))
    });
    rules.vjp("CumSum", |v| {
        let attributes = vec![
            AttributeProto::int("exclusive", v.node.attr_i("exclusive", 0)),
            AttributeProto::int("reverse", 1 - v.node.attr_i("reverse", 0).clamp(0, 1)),
        ];
        v.first(v.op("CumSum", &[v.dy()?, v.x(1)?], attributes))
    });
    rules.vjp("CumProd", cumulative_product);
}

/// Each x is a factor of the products behind it: dx = Σ dy·y / x over these. Of zeros only the first has products that
/// its change would move, and in them it counts as 1.
fn cumulative_product(v: &Vjp) -> Result<Adjoints> {
    let (x, axis, y, dy) = (v.x(0)?, v.x(1)?, v.y(0)?, v.dy()?);
    let (exclusive, reverse) = (v.node.attr_i("exclusive", 0), v.node.attr_i("reverse", 0).clamp(0, 1));
    let sum = |x: &str, exclusive: i64, reverse: i64| {
        let attributes = vec![AttributeProto::int("exclusive", exclusive), AttributeProto::int("reverse", reverse)];
        v.op("CumSum", &[x, axis], attributes)
    };
    let behind = |g: String| sum(&g, exclusive, 1 - reverse);
    let empty = v.equal(x, v.c(0.0));
    let whole = v.select(&empty, v.c(1.0), x);
    let first = v.and(&empty, v.equal(sum(&v.mask(&empty), 0, reverse), v.c(1.0)));
    let others = v.op("CumProd", &[&v.select(&first, v.c(1.0), x), axis], v.node.attribute.clone());
    let at_zero = v.select(first, behind(v.mul(dy, others)), v.c(0.0));
    v.first(v.select(empty, at_zero, v.div(behind(v.mul(dy, y)), whole)))
}

/// A reduction whose result and adjoint have the reduced axes back, of size 1.
struct Reduction<'v, 'a> {
    v: &'v Vjp<'a>,
    x: &'v str,
    y: String,
    dy: String,
    axes: Option<String>,
}

/// A rule for a reduction: `adjoint` gives the adjoint of x, or something that broadcasts to it.
fn rule(rules: &mut Rules, op: &str, adjoint: impl Fn(&Reduction) -> String + Send + Sync + 'static) {
    rules.vjp(op, move |v| {
        let (x, y, dy) = (v.x(0)?, v.y(0)?, v.dy()?);
        let Some(axes) = axes(v)? else {
            // Nothing is reduced, but the function is still applied to each element.
            let r = Reduction { v, x, y: y.into(), dy: dy.into(), axes: Some(v.ints(&[])) };
            return v.first(adjoint(&r));
        };
        let kept = v.node.attr_i("keepdims", 1) != 0;
        let restore = |value: &str| match &axes {
            _ if kept => value.to_string(),
            Some(axes) => v.unsqueeze(value, axes),
            // Everything was reduced to a scalar, which broadcasts as it is.
            None => value.to_string(),
        };
        let r = Reduction { v, x, y: restore(y), dy: restore(dy), axes: axes.clone() };
        let dx = adjoint(&r);
        // Sums and means do not touch x, so their adjoint still has to be spread.
        v.first(if dx == r.dy || v.node.is("ReduceMean") || v.node.is("ReduceLogSum") {
            v.expand_like(dx, x)
        } else {
            dx
        })
    });
}

/// Inputs of the same reduction of `x`.
fn product_inputs<'x>(r: &'x Reduction, x: &'x str) -> Vec<&'x str> {
    [Some(x), r.v.node.input_at(1)].into_iter().flatten().collect()
}

/// The axes of a reduction (`Some(None)`: all of them), or `None` where it reduces nothing.
fn axes(v: &Vjp) -> Result<Option<Option<String>>> {
    let noop = v.node.attr_i("noop_with_empty_axes", 0) != 0;
    if let Some(axes) = v.node.attr_ints("axes").filter(|axes| !axes.is_empty()) {
        return Ok(Some(Some(v.ints(axes))));
    }
    match v.node.input_at(1) {
        None => Ok(if noop { None } else { Some(None) }),
        Some(axes) => match v.constant_ints(1) {
            Some(values) if values.is_empty() => Ok(if noop { None } else { Some(None) }),
            Some(values) => Ok(Some(Some(v.ints(&values)))),
            None => Ok(Some(Some(axes.to_string()))),
        },
    }
}

impl Reduction<'_, '_> {
    /// Elements of x to one of y.
    fn count(&self) -> String {
        let v = self.v;
        let size = |value: &str| v.static_dims(value)?.iter().try_fold(1i64, |n, d| n.checked_mul(*d));
        let whole = || size(self.x)?.checked_div(size(v.node.output_at(0)?)?);
        let reduced = || {
            let dims = v.dims(self.x)?;
            let axes = v.node.attr_ints("axes").map(<[i64]>::to_vec).or_else(|| v.constant_ints(1))?;
            axes.iter().try_fold(1i64, |n, axis| n.checked_mul(known(dims.get(v.axis(*axis, dims.len()).ok()?)?)?))
        };
        let count = whole().or_else(|| reduced().filter(|_| self.axes.is_some()));
        v.ratio(self.x, v.node.output_at(0).unwrap_or_default(), count)
    }

    /// A result of the node's own reduction with the reduced axes back.
    fn restored(&self, y: String) -> String {
        match &self.axes {
            Some(axes) if self.v.node.attr_i("keepdims", 1) == 0 => self.v.unsqueeze(y, axes),
            _ => y,
        }
    }

    /// The same reduction by sum, axes kept.
    fn again(&self, x: &str) -> String {
        match &self.axes {
            Some(axes) => self.v.reduce_sum(x, axes, true),
            None => self.v.sum_all(x),
        }
    }
}
