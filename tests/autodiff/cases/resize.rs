//! Resize: modes, coordinates, scales and sizes.

use super::*;

pub fn add(c: &mut Vec<Case>) {
    let floats = |values: &[f32]| Arg::Const(Tensor::new(&[values.len()], values.to_vec()));
    let scaled = |dims: &[usize], scales: &[f32]| case("Resize", vec![by(dims), Arg::Missing, floats(scales)]).single();
    let sized = |dims: &[usize], sizes: &[i64]| {
        case("Resize", vec![by(dims), Arg::Missing, Arg::Missing, fixed(sizes)]).single()
    };
    for mode in ["nearest", "linear", "cubic"] {
        for coordinates in ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"] {
            let form = |case: Case| case.string("mode", mode).string("coordinate_transformation_mode", coordinates);
            c.push(form(scaled(&[2, 1, 3, 4], &[1.0, 1.0, 2.0, 2.5])).what(coordinates));
            c.push(form(sized(&[1, 2, 5, 4], &[1, 2, 3, 7])).what(coordinates));
        }
    }
    for rounding in ["floor", "ceil", "round_prefer_ceil"] {
        let case = scaled(&[1, 2, 3, 4], &[1.0, 1.0, 2.0, 0.6]).string("mode", "nearest");
        c.push(case.string("nearest_mode", rounding).what(rounding));
    }
    let cubic = scaled(&[1, 1, 5, 6], &[1.0, 1.0, 0.6, 1.7]).string("mode", "cubic").int("exclude_outside", 1);
    c.push(cubic.float("cubic_coeff_a", -0.5).what("cubic coefficients"));
    c.push(scaled(&[2, 3, 4], &[1.0, 1.0, 2.0]).string("mode", "linear").what("1-D"));
    c.push(scaled(&[3, 2, 4], &[2.0, 1.0, 1.5]).string("mode", "nearest").what("first axis"));
    let crop =
        vec![by(&[1, 1, 4, 5]), floats(&[0.0, 0.0, 0.2, 0.1, 1.0, 1.0, 0.9, 1.3]), Arg::Missing, fixed(&[1, 1, 3, 4])];
    let crop = case("Resize", crop).string("coordinate_transformation_mode", "tf_crop_and_resize").single();
    c.push(crop.string("mode", "linear").float("extrapolation_value", 3.0).what("crop"));
    let less = scaled(&[1, 1, 8, 9], &[1.0, 1.0, 0.5, 0.6]).string("mode", "linear").int("antialias", 1);
    c.push(less.opsets(&[18, 21]).what("antialias"));
    let axes =
        case("Resize", vec![by(&[1, 2, 3, 4]), Arg::Missing, Arg::Missing, fixed(&[5, 6])]).ints("axes", &[2, 3]);
    c.push(axes.string("mode", "linear").single().opsets(&[18, 21]).what("axes"));
    let given = Arg::Given(Tensor::new(&[4], vec![1.0f32, 1.0, 2.0, 1.5]));
    c.push(
        case("Resize", vec![by(&[1, 2, 3, 4]), Arg::Missing, given])
            .string("mode", "linear")
            .single()
            .what("at run time"),
    );
}
