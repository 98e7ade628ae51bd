//! Operators that pick or place elements by index.

use super::op::{Op, Rules, known};
use super::{DataType, Dim, Value};

pub(super) const RULES: Rules = &[
    (&["Gather"], gather),
    (&["GatherElements"], gather_elements),
    (&["GatherND"], gather_nd),
    (&["Scatter", "ScatterElements", "ScatterND"], scatter),
    (&["OneHot"], one_hot),
    (&["NonZero"], non_zero),
    (&["Compress"], compress),
    (&["Unique"], unique),
    (&["NonMaxSuppression"], non_max_suppression),
];

fn gather(op: &mut Op) -> Option<()> {
    op.out(None);
    let (data, indices) = (op.dims(0)?, op.dims(1)?);
    let axis = op.axis("axis", 0, data.len())?;
    op.out(Some([&data[..axis], &indices, &data[axis + 1..]].concat()));
    if data.len() != 1 {
        return None;
    }
    let values = op.elements(0)?;
    let index = op.value(1)?.clone();
    let count = values.len() as i64;
    let picked = index.iter().map(|i| {
        let i = known(*i)?;
        let front = if i < 0 { i.checked_add(count)? } else { i };
        values.get(usize::try_from(front).ok()?).copied()
    });
    let picked = picked.collect::<Option<Vec<Dim>>>()?;
    op.set_value(0, Value::from_shape_vec(index.raw_dim(), picked).ok()?);
    Some(())
}

fn gather_elements(op: &mut Op) -> Option<()> {
    let dims = op.dims(1);
    op.out(dims);
    Some(())
}

fn gather_nd(op: &mut Op) -> Option<()> {
    op.out(None);
    let (data, indices) = (op.dims(0)?, op.dims(1)?);
    let (depth, outer) = indices.split_last()?;
    let from = op.node.attr_i("batch_dims", 0).checked_add(known(*depth)?)?;
    let inner = data.get(usize::try_from(from).ok()?..)?;
    op.out(Some([outer, inner].concat()));
    Some(())
}

fn scatter(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims);
    Some(())
}

fn one_hot(op: &mut Op) -> Option<()> {
    let element = op.element(2);
    op.set(0, element, None);
    let mut dims = op.dims(0)?;
    let axis = op.axis("axis", -1, dims.len() + 1)?;
    let depth = op.elements(1).and_then(|d| d.first().copied()).unwrap_or_else(|| op.fresh());
    dims.insert(axis, depth);
    op.set(0, element, Some(dims));
    Some(())
}

fn non_zero(op: &mut Op) -> Option<()> {
    let rank = op.rank(0).map(|rank| Dim::Known(rank as i64)).unwrap_or_else(|| op.fresh());
    let count = op.fresh();
    op.set(0, Some(DataType::Int64), Some(vec![rank, count]));
    Some(())
}

fn compress(op: &mut Op) -> Option<()> {
    op.out(None);
    let count = op.fresh();
    let dims = match op.node.attr("axis") {
        None => vec![count],
        Some(_) => {
            let mut dims = op.dims(0)?;
            let axis = op.axis("axis", 0, dims.len())?;
            dims[axis] = count;
            dims
        }
    };
    op.out(Some(dims));
    Some(())
}

fn unique(op: &mut Op) -> Option<()> {
    let (count, element) = (op.fresh(), op.element(0));
    let index = Some(DataType::Int64);
    let dims = match op.node.attr("axis") {
        None => Some(vec![count]),
        Some(_) => op.dims(0).and_then(|mut dims| {
            let axis = op.axis("axis", 0, dims.len())?;
            dims[axis] = count;
            Some(dims)
        }),
    };
    op.set(0, element, dims);
    op.set(1, index, Some(vec![count]));
    let whole = op.unknown(1);
    op.set(2, index, Some(whole));
    op.set(3, index, Some(vec![count]));
    Some(())
}

fn non_max_suppression(op: &mut Op) -> Option<()> {
    let count = op.fresh();
    op.set(0, Some(DataType::Int64), Some(vec![count, Dim::Known(3)]));
    Some(())
}
