//! Where a function has a kink: the sub-gradients of `docs/gradients.md`, one line each. The numbers are what PyTorch 2.15
//! computes for the same function at the same place.

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::Tensor;

use super::harness::{Arg, Case, case, load};

/// A line of the table, a node at its kinks, and ∂Σy by each of its inputs in general.
struct Line {
    text: &'static str,
    case: Case,
    gradients: Vec<Vec<f64>>,
}

fn at(values: &[f64]) -> Arg {
    Arg::By(vec![values.len()], values.to_vec())
}

fn lines() -> Vec<Line> {
    let line = |text, case: Case, gradients: &[&[f64]]| {
        let gradients = gradients.iter().map(|g| g.to_vec()).collect();
        Line { text, case: case.single(), gradients }
    };
    let constant = |value| Arg::FloatConst(vec![], vec![value]);
    let scalar = |value| Arg::By(vec![], vec![value]);
    let axis = |n: i64| Arg::Const(Tensor::new(&[1], vec![n]));
    let twice = || Arg::Given(Tensor::new(&[3], vec![0i64, 0, 1]));
    let image = |values: &[f64]| Arg::By(vec![1, 1, values.len()], values.to_vec());
    vec![
        line("| Abs | at 0 | 0 | `torch.abs` |", case("Abs", vec![at(&[-1.0, 0.0, 2.0])]), &[&[-1.0, 0.0, 1.0]]),
        line("| Relu | at 0 | 0 | `torch.relu` |", case("Relu", vec![at(&[-1.0, 0.0, 2.0])]), &[&[0.0, 0.0, 1.0]]),
        line(
            "| PRelu | at 0 | the slope | `prelu` |",
            case("PRelu", vec![at(&[-1.0, 0.0, 2.0]), at(&[0.25])]),
            &[&[0.25, 0.25, 1.0], &[-1.0]],
        ),
        line(
            "| LeakyRelu | at 0 | alpha | `leaky_relu` |",
            case("LeakyRelu", vec![at(&[-1.0, 0.0, 2.0])]).float("alpha", 0.25),
            &[&[0.25, 0.25, 1.0]],
        ),
        line("| Elu | at 0 | alpha | `elu` |", case("Elu", vec![at(&[0.0, 2.0])]).float("alpha", 2.0), &[&[2.0, 1.0]]),
        line(
            "| Selu | at 0 | alpha·gamma | `selu` |",
            case("Selu", vec![at(&[0.0, 2.0])]),
            &[&[1.758_099_340_847_376_6, 1.050_700_987_355_480_5]],
        ),
        line("| Celu | at 0 | 1 | `celu` |", case("Celu", vec![at(&[0.0, 2.0])]).float("alpha", 2.0), &[&[1.0, 1.0]]),
        line(
            "| HardSigmoid | at both corners | 0 | `hardsigmoid` |",
            case("HardSigmoid", vec![at(&[-2.0, 0.0, 2.0])]).float("alpha", 0.25),
            &[&[0.0, 0.25, 0.0]],
        ),
        line(
            "| HardSwish | at -3 and at 3 | 0 and 1 | `hardswish` |",
            case("HardSwish", vec![at(&[-3.0, 0.0, 3.0])]),
            &[&[0.0, 0.5, 1.0]],
        ),
        line(
            "| ThresholdedRelu | at the threshold | 0 | `threshold` |",
            case("ThresholdedRelu", vec![at(&[0.0, 1.0, 2.0])]),
            &[&[0.0, 0.0, 1.0]],
        ),
        line(
            "| Shrink | at both corners | 0 | `hardshrink`, `softshrink` |",
            case("Shrink", vec![at(&[-0.5, 0.0, 0.5, 0.75])]).float("bias", 0.5),
            &[&[0.0, 0.0, 0.0, 1.0]],
        ),
        line(
            "| Clip | at a bound | 0 | `clamp` since 2.14, `relu6`, `hardtanh` |",
            case("Clip", vec![at(&[-2.0, -1.0, 0.0, 1.0, 2.0]), constant(-1.0), constant(1.0)]),
            &[&[0.0, 0.0, 1.0, 0.0, 0.0]],
        ),
        line(
            "| Clip | at a bound that is differentiated | half to each | `clamp` of tensors |",
            case("Clip", vec![at(&[-2.0, -1.0, 0.0, 1.0, 2.0]), scalar(-1.0), scalar(1.0)]),
            &[&[0.0, 0.5, 1.0, 0.5, 0.0], &[1.5], &[1.5]],
        ),
        line(
            "| Clip | bounds that cross | all to the upper one | `clamp` of tensors |",
            case("Clip", vec![at(&[-2.0, -1.0, 0.0, 1.0, 2.0]), scalar(1.0), scalar(-1.0)]),
            &[&[0.0; 5], &[0.0], &[5.0]],
        ),
        line(
            "| Max, Min | operands that are equal | an equal share to each | `maximum`, `minimum` |",
            case("Max", vec![at(&[1.0, 2.0, 3.0]), at(&[1.0, 3.0, 2.0])]),
            &[&[0.5, 0.0, 1.0], &[0.5, 1.0, 0.0]],
        ),
        line(
            "| ReduceMax, ReduceMin | elements that are equal | an equal share to each | `amax`, `amin` |",
            case("ReduceMax", vec![at(&[3.0, 1.0, 3.0, 0.0, 3.0, 3.0]), axis(0)]).opsets(&[18]),
            &[&[0.25, 0.0, 0.25, 0.0, 0.25, 0.25]],
        ),
        line(
            "| ScatterElements, ScatterND by max or min | values that are equal | an equal share to each | `scatter_reduce` |",
            case("ScatterElements", vec![at(&[3.0, 1.0]), twice(), at(&[3.0, 2.0, 0.0])])
                .string("reduction", "max")
                .opsets(&[18]),
            &[&[0.5, 1.0], &[0.5, 0.0, 0.0]],
        ),
        line(
            "| MaxPool | elements that are equal | all to the first | `max_pool1d` |",
            case("MaxPool", vec![image(&[2.0, 2.0, 1.0, 1.0])]).ints("kernel_shape", &[2]),
            &[&[1.0, 1.0, 1.0, 0.0]],
        ),
        line(
            "| GlobalMaxPool | elements that are equal | all to the first | `adaptive_max_pool1d` |",
            case("GlobalMaxPool", vec![image(&[1.0, 2.0, 2.0])]),
            &[&[0.0, 1.0, 0.0]],
        ),
        line(
            "| TopK | elements that are equal | to those that were taken | `topk` |",
            case("TopK", vec![at(&[1.0, 2.0, 2.0]), axis(1)]).outputs(&[true, false]),
            &[&[0.0, 1.0, 0.0]],
        ),
        line(
            "| ReduceL1 | elements that are 0 | 0 | `vector_norm(x, 1)` |",
            case("ReduceL1", vec![at(&[-1.0, 0.0, 2.0])]),
            &[&[-1.0, 0.0, 1.0]],
        ),
        line(
            "| ReduceL2 | all elements are 0 | 0 | `vector_norm(x, 2)` |",
            case("ReduceL2", vec![at(&[0.0, 0.0])]),
            &[&[0.0, 0.0]],
        ),
        line(
            "| LpPool, GlobalLpPool | all elements are 0 | 0 | `lp_pool1d` |",
            case("LpPool", vec![image(&[0.0, 0.0])]).ints("kernel_shape", &[2]),
            &[&[0.0, 0.0]],
        ),
        line(
            "| ReduceProd | elements that are 0 | the product of the others | `prod` |",
            case("ReduceProd", vec![at(&[2.0, 0.0, 3.0])]),
            &[&[0.0, 6.0, 0.0]],
        ),
        line(
            "| CumProd | elements that are 0 | the sum of the products of the others | `cumprod` |",
            case("CumProd", vec![at(&[2.0, 0.0, 3.0]), Arg::Const(Tensor::scalar(0i64))]).opsets(&[26]),
            &[&[1.0, 8.0, 0.0]],
        ),
        line(
            "| Pow | 0 to the power of 0, by the base | 0 | `pow` |",
            case("Pow", vec![at(&[0.0, 0.0, 2.0]), Arg::Float(vec![3], vec![0.0, 2.0, 0.0])]),
            &[&[0.0, 0.0, 0.0]],
        ),
        line(
            "| Pow | a base of 0, by the exponent | 0 | `pow` |",
            case("Pow", vec![Arg::Float(vec![2], vec![0.0, 2.0]), at(&[2.0, 0.0])]),
            &[&[0.0, std::f64::consts::LN_2]],
        ),
        line("| Sqrt | at 0 | infinite | `sqrt` |", case("Sqrt", vec![at(&[0.0, 4.0])]), &[&[f64::INFINITY, 0.25]]),
        line(
            "| Mod, with fmod | a quotient that is whole | 1, and minus the quotient | `fmod` |",
            case("Mod", vec![at(&[5.0, -5.0, 4.0]), at(&[3.0, 3.0, 2.0])]).int("fmod", 1),
            &[&[1.0, 1.0, 1.0], &[-1.0, 1.0, -2.0]],
        ),
    ]
}

#[test]
fn kinks_are_differentiated_as_documented() {
    for line in lines() {
        for (opset, dynamic) in line.case.opsets.iter().flat_map(|opset| [(*opset, false), (*opset, true)]) {
            let model = line.case.model(dynamic, opset);
            let wrt = line.case.wrt();
            let request = Request { of: vec![("y0".into(), Seed::One)], wrt: wrt.clone(), ..Default::default() };
            let derived = gradient(&model, &request).unwrap();
            let feeds = line.case.feeds();
            let lent: Vec<(&str, &Tensor)> = feeds.iter().map(|(n, t)| (n.as_str(), t)).collect();
            let names: Vec<&str> = derived.gradients.iter().map(String::as_str).collect();
            for optimize in [false, true] {
                let got = load(&derived.model, optimize).unwrap().run(&lent, &names).unwrap();
                for (got, expected) in got.iter().map(Tensor::to_f64).zip(&line.gradients) {
                    let close = |(a, b): (&f64, &f64)| a == b || (a - b).abs() < 1e-6 * b.abs();
                    assert!(
                        got.len() == expected.len() && got.iter().zip(expected).all(close),
                        "{}: {got:?}, not {expected:?} (opset {opset}, dynamic {dynamic}, optimize {optimize})",
                        line.text
                    );
                }
            }
        }
    }
}

#[test]
fn the_documented_table_is_the_proven_one() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/gradients.md");
    let text = std::fs::read_to_string(path).unwrap();
    let table: Vec<&str> = text.lines().filter(|l| l.starts_with("| ")).skip(1).collect();
    assert_eq!(table, lines().iter().map(|l| l.text).collect::<Vec<_>>());
}
