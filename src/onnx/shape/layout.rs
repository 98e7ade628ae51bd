//! Operators that move elements about: Reshape, Transpose, Slice, Concat, Split, Expand and their kin.

use ndarray::{Axis, IxDyn, concatenate};

use super::op::{Op, Rules, axis, known};
use super::value::{axes, target};
use super::{DataType, Dim, MAX_VALUE, Symbols, Value};

pub(super) const RULES: Rules = &[
    (&["Reshape"], reshape),
    (&["Flatten"], flatten),
    (&["Transpose"], transpose),
    (&["Squeeze"], squeeze),
    (&["Unsqueeze"], unsqueeze),
    (&["Concat"], concat),
    (&["Split"], split),
    (&["Slice"], slice),
    (&["Expand"], expand),
    (&["Tile"], tile),
    (&["Pad"], pad),
    (&["DepthToSpace"], depth_to_space),
    (&["SpaceToDepth"], space_to_depth),
    (&["ReverseSequence"], reverse),
];

/// Gives output 0 the elements of input 0 in a new shape.
fn reshape_value(op: &mut Op, dims: &[Dim]) -> Option<()> {
    let value = op.value(0)?;
    let sizes = dims.iter().map(|d| usize::try_from(known(*d)?).ok()).collect::<Option<Vec<_>>>()?;
    let value = Value::from_shape_vec(sizes, value.iter().copied().collect()).ok()?;
    op.set_value(0, value);
    Some(())
}

fn reshape(op: &mut Op) -> Option<()> {
    let input = op.dims(0);
    op.out(None);
    let target = match op.node.attr_ints("shape") {
        // Opset < 5.
        Some(shape) => shape.iter().map(|n| Dim::Known(*n)).collect(),
        None => target(op, 1)?,
    };
    let copies = op.node.attr_i("allowzero", 0) == 0;
    let mut dims = Vec::with_capacity(target.len());
    let mut open = Vec::new();
    for (i, size) in target.into_iter().enumerate() {
        dims.push(match size {
            Dim::Known(0) if copies => input.as_ref().and_then(|d| d.get(i).copied()).unwrap_or_else(|| op.fresh()),
            Dim::Known(n) if n >= 0 => size,
            Dim::Symbol(_) if op.symbols().at_most(Dim::Known(0), size) && !op.symbols().is_fresh(size) => size,
            // -1, or a value that may be -1.
            _ => {
                open.push(i);
                op.fresh()
            }
        });
    }
    if let (Some(input), [open]) = (&input, open.as_slice()) {
        let others: Vec<Dim> = dims.iter().enumerate().filter(|(i, _)| i != open).map(|(_, d)| *d).collect();
        dims[*open] = op.symbols().quotient_of_products(input, &others);
    }
    op.out(Some(dims.clone()));
    reshape_value(op, &dims)
}

fn flatten(op: &mut Op) -> Option<()> {
    op.out(None);
    let dims = op.dims(0)?;
    // The axis may also stand behind the last dimension.
    let at = op.node.attr_i("axis", 1);
    let at = if at == dims.len() as i64 { dims.len() } else { axis(at, dims.len())? };
    let (front, back) = dims.split_at(at);
    let dims = vec![op.symbols().product(front), op.symbols().product(back)];
    op.out(Some(dims.clone()));
    reshape_value(op, &dims)
}

fn transpose(op: &mut Op) -> Option<()> {
    op.out(None);
    let dims = op.dims(0)?;
    let rank = dims.len();
    let order = match op.node.attr_ints("perm") {
        Some(perm) => perm.iter().map(|a| axis(*a, rank)).collect::<Option<Vec<_>>>()?,
        None => (0..rank).rev().collect(),
    };
    let mut seen = vec![false; rank];
    order.iter().for_each(|a| seen[*a] = true);
    if order.len() != rank || seen.contains(&false) {
        return None;
    }
    op.out(Some(order.iter().map(|a| dims[*a]).collect()));
    let value = op.value(0)?.clone().permuted_axes(order);
    op.set_value(0, value);
    Some(())
}

fn squeeze(op: &mut Op) -> Option<()> {
    op.out(None);
    let dims = op.dims(0)?;
    let removed = match axes(op, 1, dims.len())? {
        Some(axes) => axes,
        None if dims.iter().all(|d| known(*d).is_some()) => {
            (0..dims.len()).filter(|i| dims[*i] == Dim::Known(1)).collect()
        }
        // A dimension that may or may not be 1: not even the rank is known.
        None => return None,
    };
    let dims: Vec<Dim> = dims.iter().enumerate().filter(|(i, _)| !removed.contains(i)).map(|(_, d)| *d).collect();
    op.out(Some(dims.clone()));
    reshape_value(op, &dims)
}

fn unsqueeze(op: &mut Op) -> Option<()> {
    op.out(None);
    let mut dims = op.dims(0)?;
    let count = op.ints_of("axes", 1)??.len();
    let mut added = axes(op, 1, dims.len() + count)??;
    added.sort_unstable();
    for axis in added {
        if axis > dims.len() {
            return None;
        }
        dims.insert(axis, Dim::Known(1));
    }
    op.out(Some(dims.clone()));
    reshape_value(op, &dims)
}

fn concat(op: &mut Op) -> Option<()> {
    op.out(None);
    let count = op.node.input.len();
    let rank = (0..count).find_map(|i| op.rank(i))?;
    // The default is opset 1's.
    let along = op.axis("axis", 1, rank)?;
    let mut dims: Option<Vec<Dim>> = None;
    let mut total = Some(Dim::Known(0));
    for i in 0..count {
        let Some(next) = op.dims(i).filter(|d| d.len() == rank) else {
            total = None;
            continue;
        };
        total = total.map(|total| op.symbols().add(total, next[along]));
        dims = Some(match dims {
            None => next,
            // All are equal in a run: what is known of one is known of all.
            Some(dims) => dims.into_iter().zip(next).map(|(a, b)| best(op.symbols(), a, b)).collect(),
        });
    }
    let mut dims = dims?;
    dims[along] = total.unwrap_or_else(|| op.fresh());
    op.out(Some(dims));
    if !matches!(op.element(0), Some(DataType::Int64 | DataType::Int32)) {
        return None;
    }
    let mut parts = Vec::with_capacity(count);
    for i in 0..count {
        parts.push(match op.value(i) {
            Some(value) => value.clone(),
            // Some of the sizes may be known where others are not.
            None => {
                let [Dim::Known(n @ 0..=64)] = op.dims(i)?[..] else { return None };
                let unknown: Vec<Dim> = (0..n).map(|_| op.symbols().fresh_integer()).collect();
                ndarray::Array1::from(unknown).into_dyn()
            }
        });
    }
    if parts.iter().any(|p| p.ndim() != rank) || parts.iter().map(|p| p.len()).sum::<usize>() > MAX_VALUE {
        return None;
    }
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
    let value = concatenate(Axis(along), &views).ok()?;
    op.set_value(0, value);
    Some(())
}

/// The more telling of two dimensions that are equal.
fn best(symbols: &Symbols, a: Dim, b: Dim) -> Dim {
    let vague = |d: Dim| (known(d).is_none(), symbols.is_fresh(d), !symbols.is_bound(d));
    if vague(b) < vague(a) { b } else { a }
}

fn split(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    let outputs = op.node.output.len();
    (0..outputs).for_each(|i| op.set(i, element, None));
    let dims = op.dims(0)?;
    let along = op.axis("axis", 0, dims.len())?;
    let sizes: Vec<Dim> = match (op.node.attr_ints("split"), op.has(1)) {
        (Some(sizes), _) => sizes.iter().map(|n| Dim::Known(*n)).collect(),
        (None, true) => op.elements(1).unwrap_or_else(|| op.unknown(outputs)),
        (None, false) => {
            let whole = dims[along];
            let n = outputs as i64;
            match op.symbols().div_exact(whole, Dim::Known(n)) {
                Some(part) => vec![part; outputs],
                // Since opset 18 the last part may be smaller; before, the size must divide.
                None => {
                    let part = op.symbols().div_ceil(whole, n);
                    let others = op.symbols().mul(part, Dim::Known(n - 1));
                    let last = op.symbols().sub(whole, others);
                    (0..outputs).map(|i| if i + 1 == outputs { last } else { part }).collect()
                }
            }
        }
    };
    let value = op.value(0).cloned();
    let mut from = Some(0usize);
    for (i, size) in sizes.into_iter().enumerate().take(outputs) {
        let mut part = dims.clone();
        part[along] = size;
        op.set(i, element, Some(part));
        let start = from;
        from = from.zip(known(size)).and_then(|(from, n)| from.checked_add(usize::try_from(n).ok()?));
        if let (Some(value), Some(start), Some(end)) = (&value, start, from)
            && end <= value.len_of(Axis(along))
        {
            let part = value.select(Axis(along), &(start..end).collect::<Vec<_>>());
            op.set_value(i, part);
        }
    }
    Some(())
}

fn slice(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    op.set(0, element, None);
    let mut dims = op.dims(0)?;
    let rank = dims.len();
    let numbers = |ints: &[i64]| ints.iter().map(|n| Dim::Known(*n)).collect::<Vec<_>>();
    let given = |op: &Op, name: &str, i: usize| match op.node.attr_ints(name) {
        Some(ints) => Some(numbers(ints)),
        None => op.elements(i),
    };
    let (starts, ends) = (given(op, "starts", 1), given(op, "ends", 2));
    let axes = match op.ints_of("axes", 3) {
        Some(Some(axes)) => axes.iter().map(|a| axis(*a, rank)).collect::<Option<Vec<_>>>(),
        Some(None) => {
            let count = starts.as_ref().or(ends.as_ref()).map(Vec::len);
            count.or_else(|| usize::try_from(known(*op.dims(1)?.first()?)?).ok()).map(|n| (0..n).collect())
        }
        None => None,
    };
    let Some(axes) = axes.filter(|axes| axes.iter().all(|a| *a < rank)) else {
        // Any dimension may be cut.
        let unknown = op.unknown(rank);
        op.set(0, element, Some(unknown));
        return None;
    };
    let steps = match op.has(4) {
        true => op.elements(4),
        false => Some(vec![Dim::Known(1); axes.len()]),
    };
    let mut value = op.value(0).cloned();
    for (k, along) in axes.into_iter().enumerate() {
        let at = |v: &Option<Vec<Dim>>| v.as_ref().and_then(|v| v.get(k).copied());
        let bounds = at(&starts).zip(at(&ends)).zip(at(&steps).and_then(known));
        let cut = bounds.and_then(|((start, end), step)| cut(op.symbols(), dims[along], start, end, step));
        value = value.zip(cut).and_then(|(value, (from, length, step))| {
            let (from, length) = (known(from)?, known(length)?);
            let index = (0..length).map(|i| usize::try_from(from + i * step).ok()).collect::<Option<Vec<_>>>()?;
            let size = value.len_of(Axis(along));
            index.iter().all(|i| *i < size).then(|| value.select(Axis(along), &index))
        });
        dims[along] = cut.map_or_else(|| op.fresh(), |(_, length, _)| length);
    }
    op.set(0, element, Some(dims));
    op.set_value(0, value?);
    Some(())
}

/// First index, length and step of `start:end:step` in a dimension, as NumPy counts.
fn cut(s: &mut Symbols, dim: Dim, start: Dim, end: Dim, step: i64) -> Option<(Dim, Dim, i64)> {
    const ZERO: Dim = Dim::Known(0);
    // Exporters write "to the end" as the largest int32 or int64.
    const FAR: i64 = i32::MAX as i64;
    if step == 0 || step.unsigned_abs() > FAR as u64 {
        return None;
    }
    let last = s.sub(dim, Dim::Known(1));
    let (low, high) = if step > 0 { (ZERO, dim) } else { (Dim::Known(-1), last) };
    let mut place = |at: Dim| {
        let at = match at {
            Dim::Known(n) if n >= FAR => return Some(high),
            Dim::Known(n) if n <= -FAR => return Some(low),
            // Counted from the end where negative; `-n:` means the last `n`, runs with `n = 0` left aside.
            _ if at != ZERO && s.at_most(at, ZERO) => s.add(at, dim),
            _ if s.at_most(ZERO, at) => at,
            _ => return None,
        };
        let at = s.max(at, low);
        Some(s.min(at, high))
    };
    let (start, end) = (place(start)?, place(end)?);
    let (from, to) = if step > 0 { (start, end) } else { (end, start) };
    let span = s.sub(to, from);
    let span = s.max(span, ZERO);
    Some((start, s.div_ceil(span, step.abs()), step))
}

fn expand(op: &mut Op) -> Option<()> {
    op.out(None);
    let dims = op.dims(0)?;
    let target = target(op, 1)?;
    let dims = op.broadcast(&dims, &target);
    op.out(Some(dims.clone()));
    let sizes = dims.iter().map(|d| usize::try_from(known(*d)?).ok()).collect::<Option<Vec<_>>>()?;
    if sizes.iter().try_fold(1usize, |n, d| n.checked_mul(*d))? <= MAX_VALUE {
        let value = op.value(0)?.broadcast(IxDyn(&sizes))?.to_owned();
        op.set_value(0, value);
    }
    Some(())
}

fn tile(op: &mut Op) -> Option<()> {
    op.out(None);
    let dims = op.dims(0)?;
    let dims = match op.elements(1) {
        Some(repeats) if repeats.len() == dims.len() => {
            dims.into_iter().zip(repeats).map(|(d, n)| op.symbols().mul(d, n)).collect()
        }
        _ => op.unknown(dims.len()),
    };
    op.out(Some(dims));
    Some(())
}

fn pad(op: &mut Op) -> Option<()> {
    op.out(None);
    let mut dims = op.dims(0)?;
    let pads = match op.node.attr_ints("pads").or(op.node.attr_ints("paddings")) {
        Some(pads) => Some(pads.iter().map(|n| Dim::Known(*n)).collect()),
        None => op.elements(1),
    };
    let axes = match op.has(3) {
        true => op.ints(3).and_then(|axes| axes.iter().map(|a| axis(*a, dims.len())).collect::<Option<Vec<_>>>()),
        false => Some((0..dims.len()).collect()),
    };
    match (pads, axes) {
        (Some(pads), Some(axes)) if pads.len() == 2 * axes.len() => {
            let (before, after) = pads.split_at(axes.len());
            for ((along, before), after) in axes.into_iter().zip(before).zip(after) {
                let grown = op.symbols().add(dims[along], *before);
                dims[along] = op.symbols().add(grown, *after);
            }
        }
        _ => dims = op.unknown(dims.len()),
    }
    op.out(Some(dims));
    Some(())
}

fn depth_to_space(op: &mut Op) -> Option<()> {
    op.out(None);
    let &[n, c, h, w] = op.dims(0)?.as_slice() else { return None };
    let block = op.node.attr_i("blocksize", 1);
    let area = Dim::Known(block.checked_mul(block)?);
    let block = Dim::Known(block);
    let s = op.symbols();
    let dims = vec![n, s.div(c, area), s.mul(h, block), s.mul(w, block)];
    op.out(Some(dims));
    Some(())
}

fn space_to_depth(op: &mut Op) -> Option<()> {
    op.out(None);
    let &[n, c, h, w] = op.dims(0)?.as_slice() else { return None };
    let block = op.node.attr_i("blocksize", 1);
    let area = Dim::Known(block.checked_mul(block)?);
    let block = Dim::Known(block);
    let s = op.symbols();
    let dims = vec![n, s.mul(c, area), s.div(h, block), s.div(w, block)];
    op.out(Some(dims));
    Some(())
}

fn reverse(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.out(dims);
    Some(())
}
