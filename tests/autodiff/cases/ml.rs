//! Classical models.

use super::*;

const ML: &str = "ai.onnx.ml";

pub fn add(c: &mut Vec<Case>) {
    let ml = |op: &'static str, args: Vec<Arg>| case(op, args).domain(ML).single().opsets(&[17]);
    let scaler = || ml("Scaler", vec![by(&[4, 3])]);
    c.push(scaler().floats("offset", &[0.5, -1.0, 2.0]).floats("scale", &[2.0, 0.3, -1.5]));
    c.push(scaler().floats("offset", &[0.5]).floats("scale", &[2.0]).what("one for all"));
    for norm in ["MAX", "L1", "L2"] {
        c.push(ml("Normalizer", vec![spaced(&[4, 3])]).string("norm", norm).what(norm));
    }
    c.push(ml("Normalizer", vec![Arg::By(vec![2, 2], vec![0.3, -1.2, 0.7, 0.4])]).string("norm", "L2"));
    let weights = [0.5, -1.0, 0.3, 0.8, 1.2, -0.4];
    for post in ["NONE", "LOGISTIC", "SOFTMAX"] {
        let regressor = ml("LinearRegressor", vec![by(&[4, 3])]).floats("coefficients", &weights).int("targets", 2);
        c.push(regressor.floats("intercepts", &[0.1, -0.2]).string("post_transform", post).what(post));
        let classifier = ml("LinearClassifier", vec![by(&[4, 2])]).floats("coefficients", &weights);
        let classifier = classifier.floats("intercepts", &[0.1, -0.2, 0.4]).ints("classlabels_ints", &[3, 1, 2]);
        c.push(classifier.string("post_transform", post).outputs(&[false, true]).what(post));
    }
    for post in ["NONE", "LOGISTIC"] {
        let two = ml("LinearClassifier", vec![by(&[4, 3])]).floats("coefficients", &weights[..3]);
        let two = two.floats("intercepts", &[0.1]).ints("classlabels_ints", &[0, 1]).string("post_transform", post);
        c.push(two.outputs(&[false, true]).what("two classes"));
    }
    for kernel in ["LINEAR", "POLY", "RBF", "SIGMOID"] {
        let machine = ml("SVMRegressor", vec![by(&[4, 3])]).floats("support_vectors", &weights).int("n_supports", 2);
        let machine = machine.floats("coefficients", &[0.7, -0.4]).floats("rho", &[0.2]).string("kernel_type", kernel);
        c.push(machine.floats("kernel_params", &[0.4, 0.3, 3.0]).what(kernel));
    }
    c.push(ml("FeatureVectorizer", vec![by(&[4, 3]), by(&[4, 2])]).ints("inputdimensions", &[3, 2]));
    let missing = Arg::By(vec![2, 3], vec![0.3, 7.0, -1.2, 0.7, 0.4, 1.1]);
    c.push(ml("Imputer", vec![missing]).floats("imputed_value_floats", &[9.0]).float("replaced_value_float", 50.0));
    c.push(ml("ArrayFeatureExtractor", vec![by(&[4, 5]), given(&[3, 0, 3])]).domain(ML));
    c.push(ml("ArrayFeatureExtractor", vec![by(&[5]), given(&[3, 0, 4])]).what("one row"));
}
