//! One case or more for every rule, at shapes where mistakes show: broadcasting, scalars, axes of size 1, negative axes,
//! absent optional inputs.

use bone_onnx::onnx::Tensor;

use super::harness::{Arg, Case, Random, case};

mod attention;
mod contrib;
mod edges;
mod einsum;
mod loss;
mod ml;
mod more;
mod resize;
mod sample;
mod signal;
mod window;

const MS: &str = "com.microsoft";

/// Floats in general position to differentiate by.
fn by(dims: &[usize]) -> Arg {
    between(dims, -1.5, 1.5)
}

pub fn between(dims: &[usize], lo: f64, hi: f64) -> Arg {
    let n = dims.iter().product();
    Arg::By(dims.to_vec(), Random(n as u64 * 31 + dims.len() as u64 + lo.to_bits() % 97).values(n, lo, hi))
}

/// Distinct values at least 0.07 apart and as far from 0, in mixed order: no kink is near.
fn spaced(dims: &[usize]) -> Arg {
    Arg::By(dims.to_vec(), spaced_values(dims, 0.0))
}

fn spaced_values(dims: &[usize], shift: f64) -> Vec<f64> {
    let n: usize = dims.iter().product();
    let mut order: Vec<usize> = (0..n).collect();
    let mut random = Random(n as u64 + 5);
    for i in (1..n).rev() {
        order.swap(i, (random.bits() % (i as u64 + 1)) as usize);
    }
    order.iter().map(|k| (*k as f64 - (n / 2) as f64 + 0.5) * 0.15 + shift).collect()
}

fn ints(values: &[i64]) -> Tensor {
    Tensor::new(&[values.len()], values.to_vec())
}

fn fixed(values: &[i64]) -> Arg {
    Arg::Const(ints(values))
}

fn given(values: &[i64]) -> Arg {
    Arg::Given(ints(values))
}

fn index(dims: &[usize], values: &[i64]) -> Tensor {
    Tensor::new(dims, values.to_vec())
}

fn flags(dims: &[usize], seed: u64) -> Tensor {
    let mut random = Random(seed);
    let n: usize = dims.iter().product();
    let values = (0..n).map(|_| random.bits().is_multiple_of(2)).collect();
    Tensor::Bool(ndarray::ArrayD::from_shape_vec(ndarray::IxDyn(dims), values).unwrap())
}

pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    elementwise(&mut cases);
    matmul(&mut cases);
    reduce(&mut cases);
    layout(&mut cases);
    indices(&mut cases);
    norm(&mut cases);
    conv(&mut cases);
    contrib::add(&mut cases);
    cases.extend(super::recurrent::cases());
    window::add(&mut cases);
    resize::add(&mut cases);
    einsum::add(&mut cases);
    edges::add(&mut cases);
    loss::add(&mut cases);
    more::add(&mut cases);
    sample::add(&mut cases);
    signal::add(&mut cases);
    ml::add(&mut cases);
    attention::add(&mut cases);
    cases
}

fn elementwise(c: &mut Vec<Case>) {
    for op in ["Sin", "Cos", "Tan", "Tanh", "Sigmoid", "Exp", "Neg", "Identity", "Atan", "Sinh", "Cosh", "Asinh"] {
        // ONNX Runtime has these for f32 alone in part.
        let case = case(op, vec![by(&[2, 3])]);
        c.push(match op {
            "Tan" | "Atan" | "Sinh" | "Cosh" | "Asinh" => case.single(),
            _ => case,
        });
    }
    c.push(case("Erf", vec![by(&[2, 3])]).single());
    c.push(case("Acos", vec![between(&[5], -0.8, 0.8)]).single());
    c.push(case("Asin", vec![between(&[5], -0.8, 0.8)]).single());
    c.push(case("Atanh", vec![between(&[5], -0.8, 0.8)]).single());
    c.push(case("Acosh", vec![between(&[5], 1.5, 3.0)]).single());
    for op in ["Log", "Sqrt", "Reciprocal"] {
        c.push(case(op, vec![between(&[2, 3], 0.5, 2.0)]));
        c.push(case(op, vec![between(&[], 0.5, 2.0)]).what("scalar"));
    }
    for op in ["Abs", "Relu", "Softplus", "Softsign"] {
        c.push(match op {
            "Softplus" | "Softsign" => case(op, vec![spaced(&[4, 6])]).single(),
            _ => case(op, vec![spaced(&[4, 6])]),
        });
    }
    for op in ["LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "HardSigmoid", "HardSwish", "Shrink", "Mish"] {
        // Kinks lie halfway between two of the values.
        let case = case(op, vec![spaced(&[8, 6])]).single();
        c.push(match op {
            "HardSigmoid" => case.float("alpha", 1.0 / 3.0),
            "Mish" => case.opsets(&[18, 21]),
            "Shrink" => case.float("lambd", 0.6),
            "ThresholdedRelu" => case.float("alpha", 0.9),
            _ => case,
        });
    }
    c.push(case("LeakyRelu", vec![spaced(&[8])]).float("alpha", 0.3).single().what("alpha"));
    c.push(case("Elu", vec![spaced(&[8])]).float("alpha", 1.7).single().what("alpha"));
    c.push(case("Celu", vec![spaced(&[8])]).float("alpha", 0.6).single().what("alpha"));
    c.push(case("Selu", vec![spaced(&[8])]).float("alpha", 1.2).float("gamma", 0.7).single().what("alpha"));
    c.push(case("HardSigmoid", vec![spaced(&[40])]).float("alpha", 0.41).float("beta", 0.43).single().what("alpha"));
    c.push(case("PRelu", vec![spaced(&[3, 4]), between(&[4], 0.1, 0.5)]).single());
    c.push(case("PRelu", vec![spaced(&[3, 4]), between(&[3, 1], 0.1, 0.5)]).single().what("column"));
    c.push(case("Gelu", vec![between(&[3, 5], -3.0, 3.0)]).opsets(&[20, 22]).single());
    c.push(
        case("Gelu", vec![between(&[3, 5], -3.0, 3.0)])
            .string("approximate", "tanh")
            .opsets(&[20])
            .single()
            .what("tanh"),
    );

    let shapes: [(&[usize], &[usize], &str); 7] = [
        (&[2, 3], &[2, 3], "same"),
        (&[2, 3], &[3], "row"),
        (&[2, 1, 3], &[4, 1], "both"),
        (&[], &[2, 3], "scalar left"),
        (&[2, 3], &[], "scalar right"),
        (&[1, 3], &[2, 1], "outer"),
        (&[1], &[1, 1, 2], "one"),
    ];
    for (a, b, what) in shapes {
        for op in ["Add", "Sub", "Mul"] {
            c.push(case(op, vec![by(a), between(b, -2.0, 1.0)]).what(what));
        }
        c.push(case("Div", vec![by(a), between(b, 0.7, 2.0)]).what(what));
        c.push(case("Pow", vec![between(a, 0.6, 2.0), between(b, -2.0, 2.0)]).what(what));
        c.push(
            case(
                "Where",
                vec![
                    Arg::Given(flags([a, b].iter().max_by_key(|s| s.len()).unwrap(), 3)),
                    by(a),
                    between(b, -2.0, 1.0),
                ],
            )
            .what(what),
        );
        let far = Arg::By(b.to_vec(), spaced_values(b, 0.04));
        c.push(case("Max", vec![spaced(a), far.clone()]).what(what));
        c.push(case("Min", vec![spaced(a), far]).what(what));
    }
    c.push(case("Mul", vec![by(&[2, 3]), Arg::FloatConst(vec![], vec![0.25])]).what("constant"));
    for exponent in [0.0, 0.5, 1.0, 2.0, 3.0, -1.5] {
        c.push(
            case("Pow", vec![between(&[3], 0.5, 2.0), Arg::FloatConst(vec![], vec![exponent])])
                .what("constant exponent"),
        );
    }
    c.push(case("Pow", vec![by(&[3]), Arg::Const(Tensor::scalar(3i64))]).what("integer exponent"));
    c.push(case("Pow", vec![by(&[3]), Arg::Given(ints(&[0, 1, 2]))]).what("integer exponents at run time"));
    c.push(case("Where", vec![Arg::Given(flags(&[4, 1, 3], 3)), by(&[2, 1]), by(&[3])]).what("condition broadcasts"));
    c.push(
        case("Max", vec![spaced(&[3, 4]), Arg::By(vec![4], spaced_values(&[4], 0.05)), Arg::By(vec![], vec![0.1])])
            .what("three"),
    );
    c.push(case("Min", vec![spaced(&[5])]).what("one operand"));
    for op in ["Sum", "Mean"] {
        c.push(case(op, vec![by(&[2, 3]), by(&[3]), by(&[2, 1])]).single());
        c.push(case(op, vec![by(&[2, 3])]).single().what("one operand"));
    }
    c.push(case("Clip", vec![spaced(&[5, 4]), Arg::By(vec![], vec![-0.6]), Arg::By(vec![], vec![0.6])]));
    c.push(case("Clip", vec![spaced(&[5, 4]), Arg::Missing, Arg::By(vec![], vec![0.6])]).what("upper"));
    c.push(case("Clip", vec![spaced(&[5, 4]), Arg::By(vec![], vec![0.6])]).what("lower"));
    c.push(case("Clip", vec![spaced(&[5, 4])]).what("no bounds"));
    let crossed = vec![spaced(&[5, 4]), Arg::By(vec![], vec![0.6]), Arg::By(vec![], vec![-0.6])];
    c.push(case("Clip", crossed).what("crossed bounds"));
    let constant = |value| Arg::FloatConst(vec![], vec![value]);
    c.push(case("Clip", vec![spaced(&[5, 4]), constant(-0.6), constant(0.6)]).what("constant bounds"));
    c.push(case("Clip", vec![spaced(&[5, 4]), constant(0.6), constant(-0.6)]).what("constant bounds, crossed"));
    c.push(case("Cast", vec![by(&[3])]).int("to", 11));
    c.push(case("CastLike", vec![by(&[3]), Arg::Float(vec![1], vec![0.0])]));
    c.push(case("Dropout", vec![by(&[2, 3])]).single());
    for (mode, ratio, what) in [(false, 0.4, "inference"), (true, 0.0, "nothing dropped")] {
        let mode = Tensor::Bool(ndarray::ArrayD::from_elem(ndarray::IxDyn(&[]), mode));
        let ratio = |by: bool| if by { Arg::By(vec![], vec![ratio]) } else { Arg::Float(vec![], vec![ratio]) };
        c.push(case("Dropout", vec![by(&[2, 3]), ratio(false), Arg::Given(mode.clone())]).single().what(what));
        c.push(case("Dropout", vec![by(&[2, 3]), ratio(false), Arg::Const(mode.clone())]).single().what(what));
        if what == "inference" {
            c.push(case("Dropout", vec![by(&[2, 3]), ratio(true), Arg::Given(mode)]).single().what("ratio"));
        }
    }
    c.push(case("Swish", vec![by(&[2, 3])]).float("alpha", 1.3).opsets(&[24]).single());
}

fn matmul(c: &mut Vec<Case>) {
    let shapes: [(&[usize], &[usize]); 15] = [
        (&[2, 3], &[3, 4]),
        (&[5, 2, 3], &[3, 4]),
        (&[2, 1, 2, 3], &[3, 4]),
        (&[5, 2, 3], &[5, 3, 4]),
        (&[5, 2, 3], &[1, 3, 4]),
        (&[1, 2, 3], &[5, 3, 4]),
        (&[2, 3], &[5, 3, 4]),
        (&[2, 1, 2, 3], &[5, 3, 4]),
        (&[5, 2, 3], &[2, 1, 3, 4]),
        (&[3], &[3]),
        (&[3], &[3, 4]),
        (&[2, 3], &[3]),
        (&[3], &[5, 3, 4]),
        (&[5, 2, 3], &[3]),
        (&[1, 1], &[1, 1]),
    ];
    for (a, b) in shapes {
        c.push(case("MatMul", vec![by(a), by(b)]).what(Box::leak(format!("{a:?}·{b:?}").into_boxed_str())));
    }
    for (ta, tb) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let a: &[usize] = if ta == 1 { &[3, 2] } else { &[2, 3] };
        let b: &[usize] = if tb == 1 { &[4, 3] } else { &[3, 4] };
        for bias in [vec![by(&[4])], vec![by(&[2, 1])], vec![by(&[])], vec![by(&[2, 4])], vec![]] {
            let mut args = vec![by(a), by(b)];
            args.extend(bias);
            let case = case("Gemm", args).int("transA", ta).int("transB", tb).float("alpha", 0.5).float("beta", 1.5);
            c.push(case.opsets(&[17]));
        }
        c.push(case("Gemm", vec![by(a), by(b), by(&[1, 4])]).int("transA", ta).int("transB", tb).what("plain"));
    }
}

const REDUCTIONS: [&str; 10] = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceSumSquare",
    "ReduceProd",
];

fn reduce(c: &mut Vec<Case>) {
    // Products have cases of their own.
    for op in REDUCTIONS.into_iter().filter(|op| *op != "ReduceProd") {
        let x = || if op == "ReduceLogSum" { between(&[2, 3, 4], 0.5, 2.0) } else { spaced(&[2, 3, 4]) };
        let single =
            |case: Case| if matches!(op, "ReduceL1" | "ReduceL2" | "ReduceLogSum") { case.single() } else { case };
        for keep in [0, 1] {
            for axes in [&[1][..], &[-1], &[0, 2], &[-3, 1]] {
                let case = case(op, vec![x(), fixed(axes)]).int("keepdims", keep).opsets(if op == "ReduceSum" {
                    &[17, 21]
                } else {
                    &[18]
                });
                c.push(single(case).what("axes as input"));
                if op != "ReduceSum" {
                    c.push(
                        single(self::case(op, vec![x()]).ints("axes", axes).int("keepdims", keep).opsets(&[17]))
                            .what("axes as attribute"),
                    );
                }
            }
            c.push(single(case(op, vec![x()]).int("keepdims", keep)).what("all axes"));
            let runtime = case(op, vec![x(), given(&[2, 0])]).int("keepdims", keep);
            c.push(single(runtime.opsets(if op == "ReduceSum" { &[17] } else { &[18] })).what("axes at run time"));
        }
    }
    c.push(case("ReduceSum", vec![by(&[2, 3]), fixed(&[])]).int("noop_with_empty_axes", 1).what("nothing to reduce"));
    c.push(case("ReduceSum", vec![by(&[])]).what("scalar"));
    for (exclusive, reverse) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let axis = Arg::Const(Tensor::scalar(-2i64));
        c.push(case("CumSum", vec![by(&[2, 3, 2]), axis]).int("exclusive", exclusive).int("reverse", reverse));
    }
    for axis in [0, 1, -1] {
        c.push(case("Softmax", vec![by(&[2, 3, 4])]).int("axis", axis));
        c.push(case("LogSoftmax", vec![by(&[2, 3, 4])]).int("axis", axis));
    }
    c.push(case("Softmax", vec![by(&[2, 3])]).what("default axis"));
}

fn layout(c: &mut Vec<Case>) {
    for shape in [&[3, 2, 4][..], &[0, -1], &[-1], &[2, 3, 2, 2], &[1, 2, 3, 4, 1]] {
        c.push(case("Reshape", vec![by(&[2, 3, 4]), fixed(shape)]));
        c.push(case("Reshape", vec![by(&[2, 3, 4]), given(shape)]).what("at run time"));
    }
    c.push(case("Reshape", vec![by(&[1]), fixed(&[])]).what("to a scalar"));
    for axis in [0, 1, 2, -1] {
        c.push(case("Flatten", vec![by(&[2, 3, 4])]).int("axis", axis));
    }
    c.push(case("Squeeze", vec![by(&[1, 3, 1]), fixed(&[-1])]));
    c.push(case("Squeeze", vec![by(&[1, 3, 1])]).what("all"));
    c.push(case("Squeeze", vec![by(&[1, 3, 1]), given(&[0, 2])]).what("at run time"));
    c.push(case("Unsqueeze", vec![by(&[3, 2]), fixed(&[0, -1])]));
    c.push(case("Unsqueeze", vec![by(&[]), fixed(&[0])]).what("scalar"));
    c.push(case("Transpose", vec![by(&[2, 3, 4])]));
    c.push(case("Transpose", vec![by(&[2, 3, 4])]).ints("perm", &[2, 0, 1]));
    c.push(case("Expand", vec![by(&[3, 1]), fixed(&[2, 1, 4])]));
    c.push(case("Expand", vec![by(&[3, 1]), given(&[2, 1, 4])]).what("at run time"));
    c.push(case("Expand", vec![by(&[]), fixed(&[2, 3])]).what("scalar"));
    for axis in [1, -2] {
        c.push(case("Concat", vec![by(&[2, 3, 2]), by(&[2, 1, 2]), by(&[2, 2, 2])]).int("axis", axis));
    }
    c.push(case("Concat", vec![by(&[2])]).int("axis", 0).what("one operand"));
    let frozen = Arg::Float(vec![2, 2], vec![1.0, 2.0, 3.0, 4.0]);
    c.push(case("Concat", vec![by(&[2, 3]), frozen]).int("axis", 1).what("partly frozen"));
    c.push(case("Split", vec![by(&[2, 6]), fixed(&[1, 2, 3])]).int("axis", 1).outputs(&[true, true, true]));
    c.push(case("Split", vec![by(&[6])]).int("axis", -1).outputs(&[true, true]).opsets(&[17]).what("equal parts"));
    c.push(case("Split", vec![by(&[7])]).int("num_outputs", 2).outputs(&[true, true]).opsets(&[18]).what("parts"));
    type Ints<'a> = &'a [i64];
    let slices: [(Ints, Ints, Option<Ints>, Option<Ints>); 8] = [
        (&[1], &[3], None, None),
        (&[1, -2], &[100, -1], Some(&[0, 2]), None),
        (&[-100], &[-1], Some(&[-1]), Some(&[1])),
        (&[0], &[100], Some(&[1]), Some(&[2])),
        (&[3, -1], &[-100, 0], Some(&[2, 0]), Some(&[-1, -2])),
        (&[2, 0], &[100, 2], None, None),
        (&[2], &[2], Some(&[2]), None),
        (&[0], &[i64::MAX], Some(&[-2]), None),
    ];
    for (starts, ends, axes, steps) in slices {
        // Without axes, starts at run time would leave the number of axes open.
        let makes: &[fn(&[i64]) -> Arg] = if axes.is_some() { &[fixed, given] } else { &[fixed] };
        for make in makes {
            let mut args = vec![by(&[4, 3, 5]), make(starts), make(ends)];
            if let Some(axes) = axes {
                args.push(fixed(axes));
            }
            if let Some(steps) = steps {
                args.push(fixed(steps));
            }
            c.push(
                case("Slice", args).what(Box::leak(format!("{starts:?} {ends:?} {axes:?} {steps:?}").into_boxed_str())),
            );
        }
    }
    for (starts, ends, axes, steps) in [([1, -2], [9, -1], [0, 2], [1, 1]), ([-1, 0], [-9, 4], [2, 0], [-2, 3])] {
        let x = || by(&[4, 3, 5]);
        let args = vec![x(), fixed(&starts), fixed(&ends), given(&axes)];
        c.push(case("Slice", args).what("axes at run time"));
        let args = vec![x(), given(&starts), given(&ends), fixed(&axes), given(&steps)];
        c.push(case("Slice", args).what("steps at run time"));
        c.push(
            case("Slice", vec![x(), given(&starts), given(&ends), given(&axes), given(&steps)]).what("all at run time"),
        );
        c.push(case("Slice", vec![x(), given(&starts), given(&ends)]).what("starts and ends at run time"));
        let narrow = |values: [i64; 2]| Arg::Given(Tensor::new(&[2], values.map(|v| v as i32).to_vec()));
        let args = vec![x(), narrow(starts), narrow(ends), narrow(axes), narrow(steps)];
        c.push(case("Slice", args).what("int32"));
    }
    c.push(case("Tile", vec![by(&[2, 3]), fixed(&[2, 4])]));
    c.push(case("Tile", vec![by(&[2, 1, 3]), given(&[1, 3, 2])]).what("at run time"));
    c.push(case("Pad", vec![by(&[2, 3]), fixed(&[1, 0, 2, 1])]));
    c.push(case("Pad", vec![by(&[4, 3]), fixed(&[-1, 2, 0, -1]), Arg::By(vec![], vec![0.7])]).what("crops, value"));
    c.push(case("Pad", vec![by(&[4, 3]), given(&[1, 2]), Arg::Missing, fixed(&[-1])]).opsets(&[18, 21]).what("axes"));
    c.push(case("Trilu", vec![by(&[3, 4])]));
    c.push(case("Trilu", vec![by(&[2, 3, 4]), Arg::Const(Tensor::scalar(-1i64))]).int("upper", 0).what("below"));
    c.push(case("DepthToSpace", vec![by(&[1, 8, 2, 3])]).int("blocksize", 2));
    c.push(case("SpaceToDepth", vec![by(&[1, 2, 4, 6])]).int("blocksize", 2));
}

fn indices(c: &mut Vec<Case>) {
    let scalar = |value| Arg::By(vec![], vec![value]);
    c.push(case("Range", vec![scalar(0.3), scalar(2.0), scalar(0.4)]));
    c.push(case("Range", vec![scalar(0.3), scalar(-2.0), scalar(-0.5)]).what("down"));
    c.push(case("Range", vec![scalar(0.3), scalar(0.1), scalar(0.5)]).what("empty"));
    for at in [0, 2, -1, -4] {
        for axis in [0, 1, -1] {
            c.push(
                case("Gather", vec![by(&[4, 5, 4]), Arg::Const(Tensor::scalar(at))])
                    .int("axis", axis)
                    .what("one slice"),
            );
        }
    }
    for axis in [0, 1, -1] {
        let several = index(&[2, 3], &[0, 2, -1, 2, 2, 1]);
        c.push(case("Gather", vec![by(&[4, 3, 5]), Arg::Given(several.clone())]).int("axis", axis));
        c.push(case("Gather", vec![by(&[4, 3, 5]), Arg::Const(several)]).int("axis", axis).what("constant"));
        c.push(
            case("Gather", vec![by(&[4, 3, 5]), Arg::Given(Tensor::scalar(-1i64))])
                .int("axis", axis)
                .what("scalar at run time"),
        );
    }
    c.push(
        case("GatherElements", vec![by(&[3, 4]), Arg::Given(index(&[2, 4], &[0, 1, 2, 0, 2, 1, 2, -1]))])
            .int("axis", 0),
    );
    c.push(case("GatherElements", vec![by(&[3, 4]), Arg::Given(index(&[3, 2], &[0, 0, 2, 1, 3, -1]))]).int("axis", -1));
    c.push(case("GatherND", vec![by(&[3, 4, 2]), Arg::Given(index(&[3, 2], &[0, 1, 2, 3, 0, 1]))]));
    c.push(case("GatherND", vec![by(&[3, 4]), Arg::Given(index(&[2, 1], &[-1, 0]))]).what("rows"));
    for axis in [0, 1, -1] {
        let several = Arg::Given(Tensor::new(&[2, 2], vec![0i32, 2, -1, 2]));
        c.push(case("Gather", vec![by(&[4, 3, 5]), several]).int("axis", axis).what("int32"));
        let one = Arg::Const(Tensor::scalar(-2i32));
        c.push(case("Gather", vec![by(&[4, 3, 5]), one]).int("axis", axis).what("int32, one slice"));
        let each = Arg::Given(Tensor::new(&[2, 2, 1], vec![0i32, 1, -1, 1]));
        c.push(case("GatherElements", vec![by(&[2, 2, 2]), each]).int("axis", axis).what("int32"));
    }
    for how in ["none", "add"] {
        let at = Arg::Given(index(&[2, 3], &[0, 1, 3, 2, 0, 1]));
        c.push(
            case("ScatterElements", vec![by(&[4, 3]), at, between(&[2, 3], 0.0, 1.0)])
                .string("reduction", how)
                .opsets(&[16, 18]),
        );
        let at = Arg::Given(index(&[2, 1], &[3, 0]));
        c.push(
            case("ScatterND", vec![by(&[4, 3]), at, between(&[2, 3], 0.0, 1.0)])
                .string("reduction", how)
                .opsets(&[16, 18]),
        );
    }
    let several = index(&[3, 1], &[3, 0, 3]);
    c.push(
        case("ScatterND", vec![by(&[4]), Arg::Given(several), by(&[3])])
            .string("reduction", "add")
            .opsets(&[18])
            .what("twice"),
    );
    c.push(case("TopK", vec![spaced(&[3, 5]), fixed(&[2])]).int("axis", -1).outputs(&[true, false]));
    c.push(
        case("TopK", vec![spaced(&[3, 5]), given(&[2])])
            .int("axis", 0)
            .int("largest", 0)
            .outputs(&[true, false])
            .what("smallest"),
    );
}

fn norm(c: &mut Vec<Case>) {
    for single in [false, true] {
        let form = |case: Case| if single { case.single() } else { case };
        for (axis, param) in [(-1, &[4][..]), (2, &[4]), (1, &[3, 4]), (-3, &[2, 3, 4])] {
            let case = case("LayerNormalization", vec![by(&[2, 3, 4]), by(param), between(param, 0.0, 1.0)]);
            c.push(form(case.int("axis", axis).float("epsilon", 1e-3)));
        }
        c.push(form(case("LayerNormalization", vec![by(&[3, 5]), by(&[5])])).what("no bias"));
        if single {
            // ONNX Runtime gives the statistics in single precision.
            for (outputs, axis) in [([true, true, true], -1), ([true, false, true], 1), ([false, true, false], 2)] {
                let params = &[2, 3, 4][if axis < 0 { 2 } else { axis as usize }..];
                let args = vec![by(&[2, 3, 4]), by(params), between(params, 0.0, 1.0)];
                let case = case("LayerNormalization", args).int("axis", axis).float("epsilon", 1e-3).single();
                c.push(case.outputs(&outputs).what("statistics"));
            }
            let args = vec![by(&[2, 3, 4]), by(&[4])];
            let case = case("SimplifiedLayerNormalization", args).float("epsilon", 1e-3).single().opsets(&[17]);
            c.push(case.clone().outputs(&[true, true]).what("statistics"));
            c.push(case.outputs(&[false, true]).what("statistics alone"));
        }
        let rms = case("RMSNormalization", vec![by(&[2, 3, 4]), by(&[4])]).float("epsilon", 1e-3);
        c.push(form(rms.clone().opsets(&[23])));
        c.push(form(
            case("SimplifiedLayerNormalization", vec![by(&[2, 3, 4]), by(&[4])]).float("epsilon", 1e-3).opsets(&[17]),
        ));
    }
    let channels = || [between(&[3], 0.5, 1.5), by(&[3]), by(&[3]), between(&[3], 0.5, 2.0)];
    for dims in [&[2, 3][..], &[2, 3, 4], &[2, 3, 2, 2]] {
        let mut args = vec![by(dims)];
        args.extend(channels());
        c.push(case("BatchNormalization", args.clone()));
        let training = || case("BatchNormalization", args.clone()).int("training_mode", 1).float("epsilon", 1e-3);
        c.push(training().outputs(&[true, true, true]).what("training"));
        c.push(training().float("momentum", 0.6).outputs(&[false, true, true]).what("training, running statistics"));
        c.push(training().outputs(&[true, false, false]).what("training, result alone"));
    }
    c.push(case("InstanceNormalization", vec![by(&[2, 3, 5]), by(&[3]), between(&[3], 0.0, 1.0)]).single());
    c.push(case("InstanceNormalization", vec![by(&[2, 3, 2, 4]), by(&[3]), between(&[3], 0.0, 1.0)]).single());
}

fn conv(c: &mut Vec<Case>) {
    let conv = |x: &[usize], w: &[usize]| case("Conv", vec![by(x), by(w), by(&w[..1])]).single();
    c.push(conv(&[2, 3, 8, 6], &[4, 3, 2, 2]).ints("strides", &[2, 2]).what("patches"));
    c.push(conv(&[2, 3, 7, 6], &[4, 3, 3, 2]).ints("strides", &[2, 1]).ints("pads", &[1, 0, 2, 1]).what("left over"));
    c.push(conv(&[1, 2, 9], &[3, 2, 3]).ints("dilations", &[2]).ints("strides", &[3]).what("dilated"));
    let grouped = vec![by(&[2, 4, 5]), Arg::FloatConst(vec![6, 2, 3], Random(1).values(36, -1.0, 1.0))];
    c.push(case("Conv", grouped).int("group", 2).single().what("groups"));
}
