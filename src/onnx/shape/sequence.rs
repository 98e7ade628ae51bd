//! Sequences and optionals. Of a sequence is known what holds of every tensor in it, as if it were one of them; sizes
//! that are no numbers may differ from one to the next.

use super::op::{Op, Rules, known};
use super::{Dim, Value, ValueShape};

pub(super) const RULES: Rules = &[
    (&["SequenceConstruct"], construct),
    (&["SequenceEmpty"], empty),
    (&["SequenceInsert"], insert),
    (&["SequenceErase", "Optional", "OptionalGetElement"], same),
    (&["SequenceAt"], at),
    (&["SplitToSequence"], split),
    (&["ConcatFromSequence"], concat),
];

fn of(op: &Op, i: usize) -> ValueShape {
    ValueShape { element: op.element(i), dims: op.dims(i) }
}

/// What holds of both; sizes that differ are like no other.
fn common(op: &mut Op, a: ValueShape, b: ValueShape) -> ValueShape {
    let dims = a.dims.zip(b.dims).filter(|(a, b)| a.len() == b.len()).map(|(a, b)| {
        let pairs: Vec<(Dim, Dim)> = a.into_iter().zip(b).collect();
        pairs.into_iter().map(|(a, b)| if a == b { a } else { op.fresh() }).collect()
    });
    ValueShape { element: a.element.filter(|e| Some(*e) == b.element), dims }
}

fn put(op: &mut Op, shape: ValueShape) -> Option<()> {
    op.set(0, shape.element, shape.dims);
    Some(())
}

fn construct(op: &mut Op) -> Option<()> {
    let mut all = of(op, 0);
    for i in 1..op.node.input.len() {
        let next = of(op, i);
        all = common(op, all, next);
    }
    put(op, all)
}

/// Written as a list of no numbers, which no other sequence is.
fn empty(op: &mut Op) -> Option<()> {
    op.set_value(0, Value::from_shape_vec(vec![0], vec![]).ok()?);
    Some(())
}

fn insert(op: &mut Op) -> Option<()> {
    let (sequence, tensor) = (of(op, 0), of(op, 1));
    let none = op.elements(0).is_some_and(|elements| elements.is_empty());
    let all = if none { tensor } else { common(op, sequence, tensor) };
    put(op, all)
}

fn same(op: &mut Op) -> Option<()> {
    let shape = of(op, 0);
    put(op, shape)
}

/// One of the tensors, whose open sizes are its own.
fn own(op: &mut Op) -> ValueShape {
    let mut shape = of(op, 0);
    for dim in shape.dims.iter_mut().flatten() {
        if known(*dim).is_none() {
            *dim = op.fresh();
        }
    }
    shape
}

fn at(op: &mut Op) -> Option<()> {
    let shape = own(op);
    put(op, shape)
}

fn split(op: &mut Op) -> Option<()> {
    op.out(None);
    let mut dims = op.dims(0)?;
    let axis = op.axis("axis", 0, dims.len())?;
    if op.has(1) {
        dims[axis] = op.fresh();
    } else if op.node.attr_i("keepdims", 1) != 0 {
        dims[axis] = Dim::Known(1);
    } else {
        dims.remove(axis);
    }
    op.out(Some(dims));
    Some(())
}

fn concat(op: &mut Op) -> Option<()> {
    let mut shape = own(op);
    let new = op.node.attr_i("new_axis", 0) != 0;
    shape.dims = shape.dims.and_then(|mut dims| {
        let axis = op.axis("axis", 0, dims.len() + usize::from(new))?;
        match new {
            true => dims.insert(axis, op.fresh()),
            false => dims[axis] = op.fresh(),
        }
        Some(dims)
    });
    put(op, shape)
}
