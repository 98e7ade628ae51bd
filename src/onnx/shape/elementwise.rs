//! Operators that work element by element, with NumPy's broadcasting, and those that keep their input's shape.

use ndarray::{ArrayD, IxDyn};

use super::op::{Op, Rules};
use super::{DataType, Dim, MAX_VALUE, Symbols, Value};

pub(super) const RULES: Rules = &[
    (
        &[
            "Acos",
            "Acosh",
            "Asin",
            "Asinh",
            "Atan",
            "Atanh",
            "Bernoulli",
            "BitwiseNot",
            "Celu",
            "Clip",
            "Cos",
            "Cosh",
            "CumProd",
            "CumSum",
            "Elu",
            "Erf",
            "Exp",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Hardmax",
            "LRN",
            "LeakyRelu",
            "Log",
            "LogSoftmax",
            "LpNormalization",
            "MeanVarianceNormalization",
            "Mish",
            "PRelu",
            "RandomNormalLike",
            "RandomUniformLike",
            "Reciprocal",
            "Relu",
            "Selu",
            "Shrink",
            "Sigmoid",
            "Sin",
            "Sinh",
            "Softmax",
            "Softplus",
            "Softsign",
            "Sqrt",
            "Swish",
            "Tan",
            "Tanh",
            "ThresholdedRelu",
            "Trilu",
            "EyeLike",
            "CastLike",
            "InstanceNormalization",
            "GroupNormalization",
            "RMSNormalization",
            "com.microsoft:Gelu",
            "com.microsoft:QuickGelu",
            "com.microsoft:BiasGelu",
            "com.microsoft:FastGelu",
            "SimplifiedLayerNormalization",
            "TensorScatter",
        ],
        same,
    ),
    (&["Identity", "Abs", "Ceil", "Floor", "Neg", "Round", "Sign", "Not"], same_value),
    (&["IsNaN", "IsInf"], boolean),
    (&["Add", "Sub", "Mul", "Div", "Mod", "Pow", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"], binary),
    (&["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"], compare),
    (&["Sum", "Mean", "Max", "Min"], variadic),
    (&["Where"], choose),
    (&["Cast"], cast),
    (&["Dropout"], dropout),
];

fn same(op: &mut Op) -> Option<()> {
    let element = match op.node.op_type() {
        "CastLike" => op.element(1),
        // The attribute `dtype` overrides the input's type.
        "Bernoulli" | "EyeLike" | "RandomNormalLike" | "RandomUniformLike" if op.node.attr("dtype").is_some() => {
            op.type_attr("dtype")
        }
        _ => op.element(0),
    };
    let dims = op.dims(0);
    op.set(0, element, dims);
    Some(())
}

fn same_value(op: &mut Op) -> Option<()> {
    same(op)?;
    let value = op.value(0)?.clone();
    let kind = op.node.op_type();
    let symbols = op.symbols();
    let value = match kind {
        "Neg" => value.mapv(|d| symbols.sub(Dim::Known(0), d)),
        "Not" => value.mapv(|d| symbols.sub(Dim::Known(1), d)),
        "Abs" => each(&value, |d| match d {
            Dim::Known(n) => Some(Dim::Known(n.checked_abs()?)),
            d => symbols.at_most(Dim::Known(0), d).then_some(d),
        })?,
        "Sign" => each(&value, |d| match d {
            Dim::Known(n) => Some(Dim::Known(n.signum())),
            d => symbols.at_most(Dim::Known(1), d).then_some(Dim::Known(1)),
        })?,
        // A whole number is its own ceiling, floor and nearest.
        _ => value,
    };
    if op.node.is("Identity")
        && let (Some(floats), Some(name)) = (op.floats(0).map(<[f64]>::to_vec), op.node.output_at(0))
    {
        op.shapes.floats.insert(name.into(), floats);
    }
    op.set_value(0, value);
    Some(())
}

/// `f` of every element, where it has one.
fn each(value: &Value, f: impl FnMut(Dim) -> Option<Dim>) -> Option<Value> {
    let found = value.iter().copied().map(f).collect::<Option<Vec<_>>>()?;
    Value::from_shape_vec(value.raw_dim(), found).ok()
}

fn boolean(op: &mut Op) -> Option<()> {
    let dims = op.dims(0);
    op.set(0, Some(DataType::Bool), dims);
    Some(())
}

/// Shape of inputs 0 and 1 broadcast together.
fn broadcast_two(op: &mut Op) -> Option<Vec<Dim>> {
    let (a, b) = (op.dims(0)?, op.dims(1)?);
    // Before opset 7 the second input was fitted to the first by attributes.
    Some(if op.opset < 7 { a } else { op.broadcast(&a, &b) })
}

fn binary(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    op.set(0, element, None);
    let dims = broadcast_two(op)?;
    op.set(0, element, Some(dims));
    let whole = !matches!(element, Some(DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16));
    let (a, b) = (op.value(0)?.clone(), op.value(1)?.clone());
    let floored = op.node.attr_i("fmod", 0) == 0;
    let combine: fn(&mut Symbols, Dim, Dim) -> Option<Dim> = match op.node.op_type() {
        "Add" => |s, a, b| Some(s.add(a, b)),
        "Sub" => |s, a, b| Some(s.sub(a, b)),
        "Mul" => |s, a, b| Some(s.mul(a, b)),
        "Div" if whole => |s, a, b| Some(s.div(a, b)),
        "Div" => |s, a, b| s.div_exact(a, b),
        "Mod" if whole && floored => |s, a, b| match (a, b) {
            (Dim::Known(a), Dim::Known(b)) => {
                let r = a.checked_rem(b)?;
                Some(Dim::Known(if r != 0 && (r < 0) != (b < 0) { r + b } else { r }))
            }
            // The two remainders differ only where a sign does.
            _ if s.at_most(Dim::Known(0), a) && s.at_most(Dim::Known(1), b) => Some(s.rem(a, b)),
            _ => None,
        },
        "Pow" => |_, a, b| match (a, b) {
            (Dim::Known(a), Dim::Known(b)) => Some(Dim::Known(a.checked_pow(u32::try_from(b).ok()?)?)),
            _ => None,
        },
        _ => return None,
    };
    let value = zip(op.symbols(), &a, &b, combine)?;
    op.set_value(0, value);
    Some(())
}

fn compare(op: &mut Op) -> Option<()> {
    op.set(0, Some(DataType::Bool), None);
    let dims = broadcast_two(op)?;
    op.set(0, Some(DataType::Bool), Some(dims));
    let (a, b) = (op.value(0)?.clone(), op.value(1)?.clone());
    let truth = |t: bool| Dim::Known(t.into());
    let decide: fn(&mut Symbols, Dim, Dim) -> Option<bool> = match op.node.op_type() {
        "Equal" => |s, a, b| s.equal(a, b),
        "Less" => |s, a, b| s.less(a, b),
        "Greater" => |s, a, b| s.less(b, a),
        "LessOrEqual" => |s, a, b| s.less(b, a).map(|t| !t),
        "GreaterOrEqual" => |s, a, b| s.less(a, b).map(|t| !t),
        "And" => |_, a, b| match (a, b) {
            (Dim::Known(0), _) | (_, Dim::Known(0)) => Some(false),
            (Dim::Known(_), Dim::Known(_)) => Some(true),
            _ => None,
        },
        "Or" => |_, a, b| match (a, b) {
            (Dim::Known(0), Dim::Known(0)) => Some(false),
            (Dim::Known(n), _) | (_, Dim::Known(n)) if n != 0 => Some(true),
            _ => None,
        },
        _ => return None,
    };
    let value = zip(op.symbols(), &a, &b, |s, a, b| Some(decide(s, a, b).map_or_else(|| s.fresh_integer(), truth)))?;
    op.set_value(0, value);
    Some(())
}

fn variadic(op: &mut Op) -> Option<()> {
    let element = op.element(0);
    op.set(0, element, None);
    let mut dims = op.dims(0)?;
    for i in 1..op.node.input.len() {
        let other = op.dims(i)?;
        dims = op.broadcast(&dims, &other);
    }
    op.set(0, element, Some(dims));
    let combine: fn(&mut Symbols, Dim, Dim) -> Option<Dim> = match op.node.op_type() {
        "Max" => |s, a, b| Some(s.max(a, b)),
        "Min" => |s, a, b| Some(s.min(a, b)),
        "Sum" => |s, a, b| Some(s.add(a, b)),
        _ => return None,
    };
    let mut value = op.value(0)?.clone();
    for i in 1..op.node.input.len() {
        let next = op.value(i)?.clone();
        value = zip(op.symbols(), &value, &next, combine)?;
    }
    op.set_value(0, value);
    Some(())
}

fn choose(op: &mut Op) -> Option<()> {
    let element = op.element(1).or(op.element(2));
    op.set(0, element, None);
    let (cond, a, b) = (op.dims(0)?, op.dims(1)?, op.dims(2)?);
    let dims = op.broadcast(&a, &b);
    let dims = op.broadcast(&dims, &cond);
    op.set(0, element, Some(dims));
    let (cond, a, b) = (op.value(0)?.clone(), op.value(1)?.clone(), op.value(2)?.clone());
    // Both choices side by side first, then the one that is taken.
    let mut pairs: Vec<(Dim, Dim)> = Vec::new();
    let index = zip(op.symbols(), &a, &b, |_, a, b| {
        pairs.push((a, b));
        Some(Dim::Known(pairs.len() as i64 - 1))
    })?;
    let value = zip(op.symbols(), &cond, &index, |s, cond, index| {
        let Dim::Known(index) = index else { return None };
        let (a, b) = *pairs.get(usize::try_from(index).ok()?)?;
        Some(match cond {
            _ if a == b => a,
            Dim::Known(0) => b,
            Dim::Known(_) => a,
            Dim::Symbol(_) => s.fresh_integer(),
        })
    })?;
    op.set_value(0, value);
    Some(())
}

fn cast(op: &mut Op) -> Option<()> {
    use DataType::*;
    let element = op.type_attr("to");
    let dims = op.dims(0);
    op.set(0, element, dims);
    let value = op.value(0)?.clone();
    // Whole numbers pass unchanged between the types that hold any dimension.
    match element? {
        Int64 | Int32 | Float | Double => op.set_value(0, value),
        Bool => {
            let truth = value.mapv(|d| match op.symbols().equal(d, Dim::Known(0)) {
                Some(zero) => Dim::Known((!zero).into()),
                None => op.symbols().fresh_integer(),
            });
            op.set_value(0, truth);
        }
        _ => {}
    }
    Some(())
}

fn dropout(op: &mut Op) -> Option<()> {
    same(op)?;
    let dims = op.dims(0);
    op.set(1, if op.opset < 10 { op.element(0) } else { Some(DataType::Bool) }, dims);
    Some(())
}

/// Combines two small tensors with broadcasting; `None` where they do not fit or an element has no value.
fn zip(
    symbols: &mut Symbols,
    a: &Value,
    b: &Value,
    mut combine: impl FnMut(&mut Symbols, Dim, Dim) -> Option<Dim>,
) -> Option<Value> {
    let rank = a.ndim().max(b.ndim());
    let size = |v: &Value, i: usize| (i + v.ndim()).checked_sub(rank).map_or(1, |i| v.shape()[i]);
    let dims: Vec<usize> = (0..rank).map(|i| if size(a, i) == 1 { size(b, i) } else { size(a, i) }).collect();
    if dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))? > MAX_VALUE {
        return None;
    }
    let (a, b) = (a.broadcast(IxDyn(&dims))?, b.broadcast(IxDyn(&dims))?);
    let values = a.iter().zip(b.iter()).map(|(a, b)| combine(symbols, *a, *b)).collect::<Option<Vec<_>>>()?;
    ArrayD::from_shape_vec(IxDyn(&dims), values).ok()
}
