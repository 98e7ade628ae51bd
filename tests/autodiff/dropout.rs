//! Dropout in training: one run draws one mask, which its result and its gradient share.

use bone_onnx::autodiff::{Request, Seed, gradient};
use bone_onnx::onnx::Tensor;

use super::harness::{Arg, Case, Random, case, load};

fn dropout(ratio: Option<Arg>, mode: Arg) -> Case {
    let x = Arg::By(vec![8, 16], Random(3).values(128, 0.5, 1.5));
    case("Dropout", vec![x, ratio.unwrap_or(Arg::Missing), mode]).single().int("seed", 5)
}

#[test]
fn the_gradient_has_the_mask_of_the_result() {
    let training = |given: bool| {
        let mode = Tensor::Bool(ndarray::ArrayD::from_elem(ndarray::IxDyn(&[]), true));
        if given { Arg::Given(mode) } else { Arg::Const(mode) }
    };
    let cases = [
        (dropout(None, training(false)), 0.5),
        (dropout(None, training(true)), 0.5),
        (dropout(Some(Arg::FloatConst(vec![], vec![0.25])), training(false)), 0.25),
        (dropout(Some(Arg::By(vec![], vec![0.25])), training(false)), 0.25),
        (dropout(Some(Arg::By(vec![], vec![0.25])), training(true)), 0.25),
    ];
    for ((case, ratio), dynamic) in cases.iter().flat_map(|c| [(c, false), (c, true)]) {
        let model = case.model(dynamic, 17);
        let request = Request { of: vec![("y0".into(), Seed::One)], wrt: case.wrt(), ..Default::default() };
        let derived = gradient(&model, &request).unwrap();
        let feeds = case.feeds();
        let lent: Vec<(&str, &Tensor)> = feeds.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut names = vec!["y0"];
        names.extend(derived.gradients.iter().map(String::as_str));
        for optimize in [false, true] {
            let got = load(&derived.model, optimize).unwrap().run(&lent, &names).unwrap();
            let (x, y, dx) = (feeds["x0"].to_f64(), got[0].to_f64(), got[1].to_f64());
            let dropped = y.iter().filter(|y| **y == 0.0).count();
            assert!((10..118).contains(&dropped), "{dropped} of 128 dropped");
            for ((x, y), dx) in x.iter().zip(&y).zip(&dx) {
                assert!((dx * x - y).abs() < 1e-6, "{dx}·{x} is not {y}");
            }
            if let Some(by_ratio) = got.get(2) {
                let expected = y.iter().sum::<f64>() / (1.0 - ratio);
                assert!(
                    (by_ratio.as_f64().unwrap() - expected).abs() < 1e-4 * expected,
                    "{by_ratio:?}, not {expected}"
                );
            }
        }
    }
}
