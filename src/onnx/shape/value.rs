//! Where sizes become values and values become sizes: Shape, Size, constants, Range.

use super::op::{Op, Rules, axis, known};
use super::{DataType, Dim, MAX_VALUE, Tensor, Value};

pub(super) const RULES: Rules = &[
    (&["Shape"], shape),
    (&["Size"], size),
    (&["Constant"], constant),
    (&["ConstantOfShape"], constant_of_shape),
    (&["Range"], range),
    (&["RandomNormal", "RandomUniform"], random),
];

fn shape(op: &mut Op) -> Option<()> {
    let element = Some(DataType::Int64);
    let length = op.fresh();
    op.set(0, element, Some(vec![length]));
    let dims = op.dims(0)?;
    let rank = dims.len() as i64;
    // `start` and `end` since opset 15: counted from the end where negative, clamped to the rank.
    let clamp = |n: i64| if n < 0 { n.saturating_add(rank) } else { n }.clamp(0, rank) as usize;
    let (start, end) = (clamp(op.node.attr_i("start", 0)), clamp(op.node.attr_i("end", rank)));
    op.set_value(
        0,
        dims.get(start..end).unwrap_or_default().iter().copied().collect::<ndarray::Array1<_>>().into_dyn(),
    );
    Some(())
}

fn size(op: &mut Op) -> Option<()> {
    op.set(0, Some(DataType::Int64), Some(vec![]));
    let dims = op.dims(0)?;
    let size = op.symbols().product(&dims);
    op.set_value(0, Value::from_elem(vec![], size));
    Some(())
}

fn constant(op: &mut Op) -> Option<()> {
    let name = op.node.output_at(0)?;
    for attribute in &op.node.attribute {
        let tensor = match attribute.name() {
            "value" => {
                op.shapes.constant(name, attribute.t.as_ref()?, false);
                return Some(());
            }
            "value_int" => Tensor::scalar(attribute.i()),
            "value_float" => Tensor::scalar(attribute.f()),
            "value_ints" => ndarray::Array1::from(attribute.ints.clone()).into_dyn().into(),
            "value_floats" => ndarray::Array1::from(attribute.floats.clone()).into_dyn().into(),
            "value_string" => {
                op.set(0, Some(DataType::String), Some(vec![]));
                return Some(());
            }
            "value_strings" => {
                op.set(0, Some(DataType::String), Some(vec![Dim::Known(attribute.strings.len() as i64)]));
                return Some(());
            }
            "sparse_value" => {
                let sparse = attribute.sparse_tensor.as_ref()?;
                let element = sparse.values.as_ref().and_then(|v| DataType::try_from(v.data_type()).ok());
                op.set(0, element, Some(sparse.dims.iter().map(|d| Dim::Known(*d)).collect()));
                return Some(());
            }
            _ => continue,
        };
        op.set(0, Some(tensor.data_type()), Some(tensor.dims().iter().map(|d| Dim::Known(*d as i64)).collect()));
        if tensor.len() <= MAX_VALUE {
            op.shapes.constant_tensor(name, &tensor);
        }
        return Some(());
    }
    None
}

fn constant_of_shape(op: &mut Op) -> Option<()> {
    let fill = op.node.attr("value").and_then(|a| a.t.as_ref());
    let element = match fill {
        Some(fill) => DataType::try_from(fill.data_type()).ok(),
        None => Some(DataType::Float),
    };
    op.set(0, element, None);
    let dims = target(op, 0)?;
    op.set(0, element, Some(dims.clone()));
    let fill = match fill {
        Some(fill) if fill.dims.iter().all(|d| *d == 1) => {
            let fill = Tensor::from_proto(fill).ok()?;
            let number = fill.to_f64().first().copied().filter(|v| v.fract() == 0.0 && v.abs() < 9e15)?;
            fill.values::<i64>().and_then(|v| v.first().copied()).unwrap_or(number as i64)
        }
        Some(_) => return None,
        None => 0,
    };
    let sizes = dims.iter().map(|d| usize::try_from(known(*d)?).ok()).collect::<Option<Vec<_>>>()?;
    if sizes.iter().try_fold(1usize, |n, d| n.checked_mul(*d))? <= MAX_VALUE {
        op.set_value(0, Value::from_elem(sizes, Dim::Known(fill)));
    }
    Some(())
}

/// The shape that input `i` spells out; of unknown dimensions where only its length is known.
pub(super) fn target(op: &mut Op, i: usize) -> Option<Vec<Dim>> {
    if let Some(dims) = op.elements(i) {
        return Some(dims);
    }
    let [length] = op.dims(i)?[..] else { return None };
    // More than any engine allows is nonsense.
    let rank = usize::try_from(known(length)?).ok().filter(|rank| *rank <= 64)?;
    Some(op.unknown(rank))
}

fn range(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    let length = op.fresh();
    op.set(0, element, Some(vec![length]));
    let scalar = |op: &Op, i| op.elements(i).and_then(|v| v.first().copied());
    let (Some(start), Some(limit), Some(delta)) = (scalar(op, 0), scalar(op, 1), scalar(op, 2)) else {
        // Steps that are no whole numbers.
        let float = |i| op.floats(i).and_then(|v| v.first().copied());
        let length = ((float(1)? - float(0)?) / float(2)?).ceil();
        (0.0..9e15).contains(&length).then(|| op.set(0, element, Some(vec![Dim::Known(length as i64)])))?;
        return Some(());
    };
    let step = known(delta).filter(|step| *step != 0)?;
    let (from, to) = if step > 0 { (start, limit) } else { (limit, start) };
    let span = op.symbols().sub(to, from);
    let span = op.symbols().max(span, Dim::Known(0));
    let length = op.symbols().div_ceil(span, step.checked_abs()?);
    op.set(0, element, Some(vec![length]));
    if let Dim::Known(n @ 0..=64) = length {
        let values: Vec<Dim> = (0..n).map(|i| op.symbols().add(start, Dim::Known(i.saturating_mul(step)))).collect();
        op.set_value(0, ndarray::Array1::from(values).into_dyn());
    }
    Some(())
}

fn random(op: &mut Op) -> Option<()> {
    let dims = op.node.attr_ints("shape").map(|dims| dims.iter().map(|d| Dim::Known(*d)).collect());
    let element = if op.node.attr("dtype").is_some() { op.type_attr("dtype") } else { Some(DataType::Float) };
    op.set(0, element, dims);
    Some(())
}

/// Axes of an operator that took them as the attribute `axes` before they became input `i`, as positions.
pub(super) fn axes(op: &Op, i: usize, rank: usize) -> Option<Option<Vec<usize>>> {
    match op.ints_of("axes", i)? {
        Some(axes) => axes.iter().map(|a| axis(*a, rank)).collect::<Option<Vec<_>>>().map(Some),
        None => Some(None),
    }
}
