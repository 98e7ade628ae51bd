//! Normalizations by groups and norms, scatters with reductions, products with zeros, and the rest.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    for (opset, params) in [(18, 2), (21, 6)] {
        let args = vec![by(&[2, 6, 3, 2]), by(&[params]), between(&[params], 0.0, 1.0)];
        c.push(case("GroupNormalization", args).int("num_groups", 2).single().opsets(&[opset]));
    }
    c.push(case("MeanVarianceNormalization", vec![by(&[2, 3, 4, 2])]).single());
    c.push(case("MeanVarianceNormalization", vec![by(&[2, 3, 4])]).ints("axes", &[1, 2]).single().what("axes"));
    for p in [1, 2] {
        c.push(case("LpNormalization", vec![spaced(&[2, 3, 4])]).int("axis", 1).int("p", p).single());
    }
    for size in [3, 5] {
        let case = case("LRN", vec![by(&[2, 6, 3, 2])]).int("size", size);
        c.push(case.float("alpha", 0.5).float("beta", 0.6).float("bias", 1.2).single());
    }
    for how in ["mul", "max", "min"] {
        let at = Arg::Given(index(&[2, 3], &[0, 1, 3, 0, 0, 1]));
        let args = vec![spaced(&[4, 3]), at, Arg::By(vec![2, 3], spaced_values(&[2, 3], 0.04))];
        c.push(case("ScatterElements", args).string("reduction", how).opsets(&[18]));
        let at = Arg::Given(index(&[3, 1], &[3, 0, 3]));
        let args = vec![spaced(&[4, 2]), at, Arg::By(vec![3, 2], spaced_values(&[3, 2], 0.04))];
        c.push(case("ScatterND", args).string("reduction", how).opsets(&[18]));
    }
    let zeros = vec![
        Arg::By(vec![4], vec![0.0, 2.0, 0.5, 0.0]),
        Arg::Given(index(&[4], &[0, 1, 1, 3])),
        Arg::By(vec![4], vec![1.5, 0.0, 3.0, 0.0]),
    ];
    c.push(case("ScatterElements", zeros).string("reduction", "mul").opsets(&[18]).what("zeros"));
    c.push(case("GatherND", vec![by(&[2, 3, 4]), Arg::Given(index(&[2, 2, 1], &[0, 2, 1, 1]))]).int("batch_dims", 1));
    c.push(case("GatherND", vec![by(&[2, 2, 3]), Arg::Given(index(&[2, 2, 1], &[0, 2, 1, 1]))]).int("batch_dims", 2));
    c.push(case("Compress", vec![by(&[3, 4]), Arg::Given(flags(&[4], 3))]).int("axis", 1));
    c.push(case("Compress", vec![by(&[3, 4]), Arg::Given(flags(&[9], 4))]).what("flat"));
    let lengths = given(&[3, 1]);
    c.push(
        case("ReverseSequence", vec![by(&[3, 2, 2]), lengths.clone()])
            .int("time_axis", 0)
            .int("batch_axis", 1)
            .single(),
    );
    c.push(case("ReverseSequence", vec![by(&[2, 3]), lengths]).int("time_axis", 1).int("batch_axis", 0).single());
    let depth = Arg::Const(Tensor::scalar(4i64));
    c.push(case("OneHot", vec![given(&[0, 2, 3, 9]), depth, by(&[2])]).int("axis", 0).single());
    // No quotient is near a whole number.
    let away = Arg::By(vec![2, 3], vec![0.3, -0.7, 1.2, -1.3, 0.8, 0.2]);
    c.push(case("Mod", vec![away, Arg::By(vec![3], vec![0.5, 0.52, 0.48])]).int("fmod", 1).single());
    for n in [1, 2, 3, 4] {
        c.push(case("Det", vec![by(&[2, n, n])]).single());
    }
    c.push(case("Det", vec![Arg::By(vec![2, 2], vec![1.0, 2.0, 2.0, 4.0])]).single().what("singular"));
    c.push(case("AffineGrid", vec![by(&[2, 2, 3]), fixed(&[2, 1, 3, 4])]).single().opsets(&[20, 21]));
    for keep in [0, 1] {
        let x = || Arg::By(vec![2, 3, 2], vec![0.0, 1.0, 2.0, 3.0, -1.0, 0.5, 0.0, 1.5, 0.7, 0.0, 0.0, 2.0]);
        let attribute = case("ReduceProd", vec![x()]).ints("axes", &[1]).int("keepdims", keep).opsets(&[17]);
        c.push(attribute.single().what("zeros"));
        let input = case("ReduceProd", vec![x(), fixed(&[-1])]).int("keepdims", keep).opsets(&[18]);
        c.push(input.single().what("axes as input"));
        c.push(case("ReduceProd", vec![by(&[2, 3])]).int("keepdims", keep).single().what("all axes"));
    }
}
