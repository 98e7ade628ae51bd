//! Reductions along axes.

use super::op::{Op, Rules, axis};
use super::{DataType, Dim};

pub(super) const RULES: Rules = &[
    (
        &[
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        ],
        reduce,
    ),
    (&["ArgMax", "ArgMin"], arg),
    (&["TopK"], top_k),
];

fn reduce(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    op.set(0, element, None);
    let dims = op.dims(0)?;
    let keep = op.node.attr_i("keepdims", 1) != 0;
    let axes = match op.ints_of("axes", 1) {
        Some(axes) => axes.unwrap_or_default(),
        None => {
            // Axes that only the run knows: with `keepdims` the rank is known nevertheless.
            let unknown = keep.then(|| op.unknown(dims.len()));
            op.set(0, element, unknown);
            return None;
        }
    };
    if axes.is_empty() && op.node.attr_i("noop_with_empty_axes", 0) != 0 {
        op.set(0, element, Some(dims));
        return Some(());
    }
    let reduced = reduced(&axes, dims.len())?;
    op.set(0, element, Some(without(&dims, &reduced, keep)));
    // Sizes multiplied up or summed in the graph.
    let total = |op: &mut Op, combine: fn(&mut Op, Dim, Dim) -> Dim, start: i64| {
        let elements = op.elements(0)?;
        Some(elements.into_iter().fold(Dim::Known(start), |total, d| combine(op, total, d)))
    };
    if dims.len() == 1 && reduced == [true] {
        let total = match op.node.op_type() {
            "ReduceProd" => total(op, |op, a, b| op.symbols().mul(a, b), 1)?,
            "ReduceSum" => total(op, |op, a, b| op.symbols().add(a, b), 0)?,
            _ => return None,
        };
        let shape = if keep { vec![1] } else { vec![] };
        op.set_value(0, super::Value::from_elem(shape, total));
    }
    Some(())
}

fn arg(op: &mut Op) -> Option<()> {
    let element = Some(DataType::Int64);
    op.set(0, element, None);
    let dims = op.dims(0)?;
    let reduced = reduced(&[op.node.attr_i("axis", 0)], dims.len())?;
    op.set(0, element, Some(without(&dims, &reduced, op.node.attr_i("keepdims", 1) != 0)));
    Some(())
}

fn top_k(op: &mut Op) -> Option<()> {
    let dims = op.dims(0).and_then(|mut dims| {
        let axis = op.axis("axis", -1, dims.len())?;
        dims[axis] = match op.node.attr("k") {
            Some(k) => Dim::Known(k.i()),
            None => op.elements(1).and_then(|k| k.first().copied()).unwrap_or_else(|| op.fresh()),
        };
        Some(dims)
    });
    let element = op.element(0);
    op.set(0, element, dims.clone());
    op.set(1, Some(DataType::Int64), dims);
    Some(())
}

/// Which of `rank` axes are reduced: those in `axes`, or all where it is empty.
fn reduced(axes: &[i64], rank: usize) -> Option<Vec<bool>> {
    let mut reduced = vec![axes.is_empty(); rank];
    for a in axes {
        reduced[axis(*a, rank)?] = true;
    }
    Some(reduced)
}

fn without(dims: &[Dim], reduced: &[bool], keep: bool) -> Vec<Dim> {
    dims.iter()
        .zip(reduced)
        .filter_map(|(dim, reduced)| match (reduced, keep) {
            (false, _) => Some(*dim),
            (true, true) => Some(Dim::Known(1)),
            (true, false) => None,
        })
        .collect()
}
