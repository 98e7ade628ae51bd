//! Losses with every reduction, class weights and targets that are ignored.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    for op in ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"] {
        for reduction in ["none", "sum", "mean"] {
            for (weighted, ignored) in [(false, None), (true, None), (false, Some(2)), (true, Some(-100))] {
                let last = ignored.unwrap_or(1);
                let (flat, deep) =
                    (index(&[4], &[0, last, 2, 1]), index(&[2, 2, 3], &[0, last, 2, 1, 1, 0, 2, 2, last, 0, 1, 2]));
                for (dims, target) in [(&[4, 3][..], flat), (&[2, 3, 2, 3], deep)] {
                    let mut args = vec![by(dims), Arg::Given(target)];
                    if weighted {
                        args.push(Arg::By(vec![3], vec![0.5, 1.5, 0.8]));
                    }
                    let case = case(op, args).string("reduction", reduction).single();
                    c.push(match ignored {
                        Some(index) => case.int("ignore_index", index).what("ignored targets"),
                        None => case.what("no target ignored"),
                    });
                }
            }
        }
    }
    let constant = Arg::FloatConst(vec![3], vec![0.5, 1.5, 0.8]);
    for op in ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"] {
        let target = Arg::Given(Tensor::new(&[4], vec![0i32, 2, 2, 1]));
        c.push(case(op, vec![by(&[4, 3]), target.clone(), constant.clone()]).single().what("constant weights, int32"));
        let weights = Arg::By(vec![3], vec![0.5, 1.5, 0.8]);
        let scores = Arg::Float(vec![4, 3], Random(5).values(12, -1.0, 1.0));
        c.push(case(op, vec![scores, target, weights]).single().what("weights alone"));
    }
    let both = case("SoftmaxCrossEntropyLoss", vec![by(&[4, 3]), Arg::Given(index(&[4], &[0, 2, 2, 1]))]);
    c.push(both.outputs(&[true, true]).single().what("log_prob"));
}
