//! Images read at real-valued places: inside, at the borders and beyond them.

use super::*;

/// Numbers up to `beyond` below 0 and above `last`, none nearer than 0.2 to a whole one, where neighbours change.
fn places(n: usize, last: usize, beyond: i64) -> Vec<f64> {
    let mut random = Random(n as u64 * 7 + last as u64);
    let span = (last as i64 + 2 * beyond) as u64;
    (0..n).map(|_| (random.bits() % span) as f64 - beyond as f64 + random.uniform(0.2, 0.8)).collect()
}

/// A grid of `out` whose places lie in and around images of `sizes`.
fn grid(out: &[usize], sizes: &[usize], corners: bool) -> Arg {
    let count: usize = out.iter().product();
    let along: Vec<Vec<f64>> = sizes.iter().rev().map(|size| places(count, size - 1, 2)).collect();
    let scaled = |place: f64, size: f64| match corners {
        true => 2.0 * place / (size - 1.0) - 1.0,
        false => (2.0 * place + 1.0) / size - 1.0,
    };
    let values = (0..count).flat_map(|i| {
        let sizes = sizes.iter().rev();
        along.iter().zip(sizes).map(move |(along, size)| scaled(along[i], *size as f64)).collect::<Vec<_>>()
    });
    Arg::By([out, &[sizes.len()]].concat(), values.collect())
}

fn fixed_places(arg: Arg) -> Arg {
    match arg {
        Arg::By(dims, values) => Arg::Float(dims, values),
        other => other,
    }
}

pub fn add(c: &mut Vec<Case>) {
    for mode in ["linear", "nearest", "cubic"] {
        for padding in ["zeros", "border", "reflection"] {
            for corners in [false, true] {
                let mut place = grid(&[2, 2, 3], &[4, 5], corners);
                if mode == "nearest" {
                    place = fixed_places(place);
                }
                let case = case("GridSample", vec![by(&[2, 3, 4, 5]), place]).string("mode", mode);
                let case = case.string("padding_mode", padding).int("align_corners", i64::from(corners));
                c.push(case.opsets(&[20, 22]).what(padding));
            }
        }
    }
    for mode in ["bilinear", "bicubic"] {
        let old = case("GridSample", vec![by(&[3, 2, 5, 3]), grid(&[3, 1, 4], &[5, 3], false)]);
        c.push(old.string("mode", mode).single().opsets(&[17]).what("old name"));
    }
    for (mode, corners) in [("linear", false), ("linear", true), ("nearest", false)] {
        let mut place = grid(&[2, 1, 3, 3], &[3, 4, 2], corners);
        if mode == "nearest" {
            place = fixed_places(place);
        }
        let volume = case("GridSample", vec![by(&[2, 2, 3, 4, 2]), place]).string("mode", mode).opsets(&[20]);
        c.push(volume.int("align_corners", i64::from(corners)).string("padding_mode", "border").what("volume"));
    }

    let deform = |x: &[usize], w: &[usize], rest: Vec<Arg>| {
        case("DeformConv", [vec![by(x), by(w)], rest].concat()).opsets(&[19, 22])
    };
    let moved = |dims: &[usize]| Arg::By(dims.to_vec(), places(dims.iter().product(), 1, 2));
    c.push(deform(&[2, 2, 4, 5], &[3, 2, 2, 2], vec![moved(&[2, 8, 3, 4])]));
    let all = vec![moved(&[2, 24, 2, 3]), by(&[6]), between(&[2, 12, 2, 3], 0.2, 1.0)];
    let all = deform(&[2, 4, 5, 6], &[6, 2, 3, 2], all).int("group", 2).int("offset_group", 2);
    c.push(all.ints("strides", &[2, 2]).ints("pads", &[0, 1, 0, 0]).what("groups, mask, bias"));
    let wide = deform(&[1, 3, 6, 6], &[2, 3, 2, 2], vec![moved(&[1, 8, 4, 4])]).ints("dilations", &[2, 3]);
    c.push(wide.ints("pads", &[0, 1, 0, 0]).ints("kernel_shape", &[2, 2]).what("dilations"));

    // Regions inside, over the border and beyond it; the second image first.
    let regions = |mode: &str| {
        let rois = Arg::By(vec![3, 4], vec![1.1, 0.7, 6.3, 5.2, -2.3, -1.2, 3.4, 2.7, 4.1, 3.3, 9.6, 8.4]);
        // Of many samples, which one is the largest changes within a step of the differences.
        let rois = if mode == "max" { fixed_places(rois) } else { rois };
        vec![by(&[2, 3, 6, 7]), rois, given(&[1, 0, 1])]
    };
    for mode in ["avg", "max"] {
        for coordinates in ["half_pixel", "output_half_pixel"] {
            for ratio in [0, 2] {
                let case = case("RoiAlign", regions(mode)).int("output_height", 2).int("output_width", 3);
                let case = case.string("mode", mode).int("sampling_ratio", ratio).float("spatial_scale", 0.75);
                c.push(case.string("coordinate_transformation_mode", coordinates).opsets(&[17]).what(mode));
            }
        }
    }
    let one = vec![spaced(&[1, 1, 5, 5]), Arg::By(vec![1, 4], vec![1.3, 0.9, 3.1, 2.6]), given(&[0])];
    c.push(case("RoiAlign", one).string("mode", "max").int("sampling_ratio", 1).opsets(&[17]).what("max by region"));
    let rois = Arg::Float(vec![3, 5], vec![1., 0., 1., 5., 4., 0., 2., 2., 3., 3., 1., 4., 3., 12., 9.]);
    let pool = case("MaxRoiPool", vec![spaced(&[2, 2, 6, 7]), rois]).ints("pooled_shape", &[2, 3]).single();
    c.push(pool.opsets(&[17]));
}
