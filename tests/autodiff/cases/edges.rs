//! Empty tensors and scalars: the gradient has the shape of its input, whatever is in it.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    for op in REDUCTIONS {
        let reduce = |args| case(op, args).single().opsets(&[18]);
        for keep in [0, 1] {
            let axis = |dims: &[usize], axes: &[i64]| reduce(vec![by(dims), fixed(axes)]).int("keepdims", keep);
            c.push(axis(&[2, 0, 4], &[2]).what("an empty axis stays"));
            c.push(axis(&[0, 3], &[1]).what("an empty batch"));
            c.push(reduce(vec![between(&[], 0.5, 2.0)]).int("keepdims", keep).what("a scalar"));
            if !matches!(op, "ReduceSum" | "ReduceL1" | "ReduceL2" | "ReduceSumSquare" | "ReduceProd") {
                // Of nothing there is no extremum and no mean, and its logarithm is infinite.
                continue;
            }
            c.push(axis(&[2, 0, 4], &[1]).what("an empty axis"));
            c.push(axis(&[2, 0, 4], &[0, 1]).what("empty axes"));
            c.push(reduce(vec![by(&[0])]).int("keepdims", keep).what("all of nothing"));
        }
    }
    let empty = || by(&[0, 3, 4]);
    c.push(case("LayerNormalization", vec![empty(), by(&[4]), by(&[4])]).single().what("an empty batch"));
    c.push(case("RMSNormalization", vec![empty(), by(&[4])]).single().opsets(&[23]).what("an empty batch"));
    let channels = || [between(&[3], 0.5, 1.5), by(&[3]), by(&[3]), between(&[3], 0.5, 2.0)];
    c.push(case("BatchNormalization", [vec![empty()], channels().to_vec()].concat()).single().what("an empty batch"));
    c.push(case("LpNormalization", vec![empty()]).single().what("an empty batch"));
    for op in ["Softmax", "LogSoftmax"] {
        c.push(case(op, vec![empty()]).single().what("an empty batch"));
        c.push(case(op, vec![by(&[2, 0])]).single().what("an empty axis"));
    }
    c.push(case("CumSum", vec![by(&[2, 0]), Arg::Const(Tensor::scalar(1i64))]).single().what("an empty axis"));
    c.push(case("Gather", vec![empty(), given(&[2, 0])]).int("axis", 1).single().what("an empty batch"));
    c.push(case("Gather", vec![by(&[3, 4]), Arg::Given(index(&[0], &[]))]).single().what("nothing"));
    c.push(case("Slice", vec![by(&[3, 4]), fixed(&[2]), fixed(&[2]), given(&[1])]).single().what("nothing"));
    c.push(case("Concat", vec![by(&[2, 0]), by(&[2, 3])]).int("axis", -1).single().what("an empty part"));
    c.push(case("MatMul", vec![by(&[2, 0]), by(&[0, 3])]).single().what("an empty sum"));
    c.push(case("Add", vec![by(&[0, 3]), by(&[1, 3])]).single().what("an empty batch"));
}
