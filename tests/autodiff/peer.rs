//! `onnx-ad` 0.3.0's list of operators (`fixtures/onnx_ad`): each has its counterpart here.

use bone_onnx::autodiff::{Rule, Rules};
use bone_onnx::onnx::{Tensor, node};

use super::harness::{Arg, Random, case};

/// Lifted to a newer operator before it is differentiated.
const LIFTED: &[(&str, &str)] = &[("Scatter", "ScatterElements"), ("Upsample", "Resize")];

/// Refused on purpose: zero would be silence about a way that is cut, or no ONNX Runtime has the operator yet.
const REFUSED: &[&str] = &["BitCast", "CausalConvWithState", "LinearAttention", "QuantizeLinear"];

/// No operator of ONNX (1.23 has IsInf and IsNaN alone).
const UNKNOWN: &[&str] = &["IsFinite"];

#[test]
fn every_operator_of_onnx_ad_has_a_rule() {
    let rules = Rules::standard();
    let text = include_str!("../../fixtures/onnx_ad/operators.txt");
    let groups = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(": "));
    let mut missing = Vec::new();
    let mut count = 0;
    for (group, op) in groups.flat_map(|(group, ops)| ops.split_whitespace().map(move |op| (group, op))) {
        count += 1;
        let name = LIFTED.iter().find(|(old, _)| *old == op).map_or(op, |(_, new)| new);
        match rules.get(&node(name, &["x"], &["y"])) {
            Some(Rule::Vjp(_)) => {}
            Some(Rule::Zero(_)) if group == "zero" => {}
            Some(Rule::Refused(_)) if REFUSED.contains(&op) => {}
            None if UNKNOWN.contains(&op) => {}
            other => missing.push(format!("{group}: {op} ({other:?})")),
        }
    }
    assert_eq!(count, 171);
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// Zero in onnx-ad, which they are not.
#[test]
fn det_and_the_values_of_one_hot_are_not_zero() {
    let mut random = Random(3);
    let det = case("Det", vec![Arg::By(vec![2, 3, 3], random.values(18, -1.0, 1.0))]).single();
    let indices = Tensor::new(&[2, 2], vec![0i64, 2, -1, 1]);
    let depth = Tensor::new(&[1], vec![3i64]);
    let values = Arg::By(vec![2], vec![-0.5, 1.5]);
    let one_hot = case("OneHot", vec![Arg::Given(indices), Arg::Const(depth), values]).single();
    for case in [det, one_hot] {
        case.check().unwrap();
        let rules = Rules::standard();
        assert!(matches!(rules.get(&node(case.op, &["x"], &["y"])), Some(Rule::Vjp(_))));
    }
}
