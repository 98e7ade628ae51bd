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
    let scales = Arg::Given(Tensor::new(&[4], vec![1.0f32, 1.0, 2.0, 1.5]));
    c.push(
        case("Resize", vec![by(&[1, 2, 3, 4]), Arg::Missing, scales])
            .string("mode", "linear")
            .single()
            .what("at run time"),
    );

    let region = |values: &[f64]| Arg::By(vec![values.len()], values.to_vec());
    let cropped = |dims: &[usize], roi: &[f64], sizes: &[i64]| {
        let case = case("Resize", vec![by(dims), region(roi), Arg::Missing, fixed(sizes)]).single();
        case.string("coordinate_transformation_mode", "tf_crop_and_resize").float("extrapolation_value", 3.0)
    };
    let inner = [0.2, 0.16, 0.9, 1.3];
    let whole = [[0.0, 0.0].as_slice(), &inner[..2], &[1.0, 1.0], &inner[2..]].concat();
    let linear = |case: Case| case.string("mode", "linear");
    c.push(linear(cropped(&[2, 3, 4, 5], &whole, &[2, 3, 3, 4])).what("region"));
    c.push(linear(cropped(&[4, 5], &inner, &[3, 4])).what("region, 2-D"));
    c.push(linear(cropped(&[1, 2, 4, 5], &whole, &[1, 2, 1, 3])).what("region, one place"));
    let turned = cropped(&[1, 2, 5, 4], &inner, &[3, 4]).ints("axes", &[3, 2]);
    c.push(linear(turned).opsets(&[18, 21]).what("region, axes"));
    c.push(cropped(&[2, 4], &[0.2, 0.1, 0.9, 0.8], &[3, 3]).what("region, nearest"));

    for policy in ["not_larger", "not_smaller"] {
        for mode in ["nearest", "linear", "cubic"] {
            for sizes in [fixed(&[8, 9]), fixed(&[3, 6])] {
                let args = vec![by(&[1, 2, 5, 7]), Arg::Missing, Arg::Missing, sizes];
                let case = case("Resize", args).string("keep_aspect_ratio_policy", policy).string("mode", mode);
                c.push(case.ints("axes", &[2, 3]).single().opsets(&[18, 21]).what(policy));
            }
        }
        let args = vec![by(&[4, 3, 5]), Arg::Missing, Arg::Missing, fixed(&[6, 5, 6])];
        let all = case("Resize", args).string("keep_aspect_ratio_policy", policy);
        c.push(all.single().opsets(&[18, 21]).what("policy, all axes"));
    }
}
