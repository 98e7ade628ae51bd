//! Pooling over regions of interest.

use super::rotary::counting;
use super::sample::{Images, Outside, Reading, permuted, pick};
use super::{Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("RoiAlign", |v| v.through(|v| Ok(vec![Some(roi_align(v)?)])));
    rules.vjp("MaxRoiPool", |v| v.through(|v| Ok(vec![Some(max_roi_pool(v)?)])));
}

/// Samples of each bin along one axis, `[regions, bins, samples]`.
struct Axis {
    places: String,
    /// 1 for samples that exist, where regions take different numbers of them.
    exists: Option<String>,
    /// 1 for samples that lie in the image.
    inside: String,
    /// What each weighs in the mean.
    share: String,
    samples: String,
}

/// The maximum along `axis`.
pub(super) fn extreme(v: &Vjp, x: &str, axis: i64, keep: bool) -> String {
    let keep = AttributeProto::int("keepdims", i64::from(keep));
    match v.opset {
        18.. => v.op("ReduceMax", &[x, &v.ints(&[axis])], vec![keep]),
        _ => v.op("ReduceMax", &[x], vec![AttributeProto::ints("axes", &[axis]), keep]),
    }
}

/// The largest of `counts` and 1, as a 1-D int64 value.
fn most(v: &Vjp, counts: &str) -> String {
    let flat = v.respec(counts, &[-1]);
    let counts = v.concat(&[v.ints(&[1]), v.cast(flat, DataType::Int64)], 0);
    v.unsqueeze(extreme(v, &counts, 0, false), v.ints(&[0]))
}

/// Values that differ by height and by width, `[regions, bins, samples]` each, as ones that broadcast together.
fn across(v: &Vjp, [height, width]: [&str; 2]) -> [String; 2] {
    [v.unsqueeze(height, v.ints(&[2, 4])), v.unsqueeze(width, v.ints(&[1, 3]))]
}

/// `[regions·bins·samples, channels]` as `[regions·bins, samples, channels]`.
fn bins(v: &Vjp, x: &str, values: &str, samples: &str) -> String {
    v.op("Reshape", &[values, &v.join(&[v.ints(&[-1]), samples.to_string(), v.dim_of(x, 1)])], vec![])
}

/// `[regions·height·width, channels]` as the output has them.
fn regions(v: &Vjp, x: &str, values: &str, pooled: [i64; 2]) -> String {
    let shape = v.join(&[v.ints(&[-1]), v.ints(&pooled[..1]), v.ints(&pooled[1..]), v.dim_of(x, 1)]);
    permuted(v, &v.op("Reshape", &[values, &shape], vec![]), &[0, 3, 1, 2])
}

/// The mean (or the maximum) over samples that lie evenly in each bin, read linearly between elements and 0 where they
/// lie more than one element outside of the image.
fn roi_align(v: &Vjp) -> Result<String> {
    let (x, rois, batch) = (v.x(0)?, v.x(1)?, v.x(2)?);
    let half = match v.node.attr_s("coordinate_transformation_mode") {
        None | Some("half_pixel") => true,
        Some("output_half_pixel") => false,
        Some(other) => return Err(v.error(format!("coordinate_transformation_mode {other:?} is not known"))),
    };
    let pooled = [v.node.attr_i("output_height", 1), v.node.attr_i("output_width", 1)];
    let (scale, ratio) = (f64::from(v.node.attr_f("spatial_scale", 1.0)), v.node.attr_i("sampling_ratio", 0));
    let images = Images::of(v, x, vec![v.dim_of(x, 2), v.dim_of(x, 3)]);
    let axis = |axis: usize| {
        // Regions are [x1, y1, x2, y2].
        let edge = |k: usize| {
            let edge = v.mul(pick(v, rois, k as i64, 1), v.c(scale));
            let edge = if half { v.sub(edge, v.c(0.5)) } else { edge };
            v.unsqueeze(edge, v.ints(&[1, 2]))
        };
        let start = edge(1 - axis);
        let length = v.sub(edge(3 - axis), &start);
        let length = if half { length } else { v.op("Max", &[&length, &v.c(1.0)], vec![]) };
        let bin = v.div(length, v.c(pooled[axis] as f64));
        let (count, samples) = match ratio {
            1.. => (v.c(ratio as f64), v.ints(&[ratio])),
            _ => {
                let count = v.op("Ceil", &[&bin], vec![]);
                let samples = most(v, &count);
                (count, samples)
            }
        };
        let numbers = |n: &str| v.number(&counting(v, n));
        let (bins, sample) = (v.respec(&numbers(&v.ints(&pooled[axis..=axis])), &[-1, 1]), numbers(&samples));
        let exists = v.mask(v.less(&sample, &count));
        let count = v.op("Max", &[&count, &v.c(1.0)], vec![]);
        let within = v.div(v.add(sample, v.c(0.5)), &count);
        let places = v.add(start, v.mul(bin, v.add(bins, within)));
        let exists = (ratio <= 0).then(|| v.expand(exists, v.shape(&places)));
        let inside = v.mask(
            v.and(v.greater_or_equal(&places, v.c(-1.0)), v.less_or_equal(&places, v.number(&images.sizes[axis]))),
        );
        // Between the border and one element outside of it lies what is at the border.
        let last = v.sub(v.number(&images.sizes[axis]), v.c(1.0));
        let places = v.op("Min", &[&v.op("Max", &[&places, &v.c(0.0)], vec![]), &last], vec![]);
        let share = v.div(&inside, count);
        let share = exists.as_ref().map_or_else(|| share.clone(), |exists| v.mul(&share, exists));
        Axis { places, exists, share, inside, samples }
    };
    let [height, width] = [axis(0), axis(1)];
    let samples = v.dim_op("Mul", &height.samples, &width.samples, i64::saturating_mul);
    let image = v.respec(&v.cast(batch, DataType::Int64), &[-1, 1, 1, 1, 1]);
    let places = across(v, [&height.places, &width.places]);
    let read = images.read(v, &image, &places, Reading::Linear, Outside::Border);
    let product = |a: &str, b: &str| {
        let [a, b] = across(v, [a, b]);
        v.respec(&v.mul(a, b), &[-1, 1])
    };
    let pool = match v.node.attr_s("mode") {
        None | Some("avg") => {
            let weighted = v.mul(read.sum(v), product(&height.share, &width.share));
            v.reduce_sum(bins(v, x, &weighted, &samples), v.ints(&[1]), false)
        }
        Some("max") => {
            // The largest of all weighted neighbours, not of their sums: so say ONNX's reference and ONNX Runtime.
            let weights = read.weights.as_ref().map(|w| v.transpose(w, &[0, 2, 1]));
            let terms = weights.map_or_else(|| read.values.clone(), |w| v.mul(&read.values, w));
            let mut values = v.mul(extreme(v, &terms, 1, false), product(&height.inside, &width.inside));
            if let (Some(a), Some(b)) = (&height.exists, &width.exists) {
                values = v.select(v.greater(product(a, b), v.c(0.0)), values, v.c(f64::NEG_INFINITY));
            }
            extreme(v, &bins(v, x, &values, &samples), 1, false)
        }
        Some(other) => return Err(v.error(format!("mode {other:?} is not known"))),
    };
    Ok(regions(v, x, &pool, pooled))
}

/// The maximum over the elements of each bin, whose edges are whole numbers; 0 where a bin is empty.
fn max_roi_pool(v: &Vjp) -> Result<String> {
    let (x, rois) = (v.x(0)?, v.x(1)?);
    let Some(&[rows, columns]) = v.node.attr_ints("pooled_shape") else {
        return Err(v.error("its pooled_shape must have 2 values"));
    };
    let pooled = [rows, columns];
    let scale = f64::from(v.node.attr_f("spatial_scale", 1.0));
    let images = Images::of(v, x, vec![v.dim_of(x, 2), v.dim_of(x, 3)]);
    let axis = |axis: usize| {
        // Regions are [image, x1, y1, x2, y2].
        let edge = |k: usize| {
            let edge = v.op("Round", &[&v.mul(pick(v, rois, k as i64, 1), v.c(scale))], vec![]);
            v.unsqueeze(edge, v.ints(&[1]))
        };
        let start = edge(2 - axis);
        let length = v.op("Max", &[&v.add(v.sub(edge(4 - axis), &start), v.c(1.0)), &v.c(1.0)], vec![]);
        let bin = v.div(length, v.c(pooled[axis] as f64));
        let numbers = |n: &str| v.number(&counting(v, n));
        let k = numbers(&v.ints(&pooled[axis..=axis]));
        let size = v.number(&images.sizes[axis]);
        let clipped = |edge: String| {
            let low = v.op("Max", &[&v.add(&start, edge), &v.c(0.0)], vec![]);
            v.op("Min", &[&low, &size], vec![])
        };
        let first = clipped(v.op("Floor", &[&v.mul(&k, &bin)], vec![]));
        let end = clipped(v.op("Ceil", &[&v.mul(v.add(&k, v.c(1.0)), &bin)], vec![]));
        let count = v.sub(end, &first);
        let samples = most(v, &count);
        let sample = numbers(&samples);
        let column = |value: &str| v.unsqueeze(value, v.ints(&[2]));
        let exists = v.mask(v.less(&sample, column(&count)));
        (v.add(column(&first), sample), exists, samples)
    };
    let [height, width] = [axis(0), axis(1)];
    let samples = v.dim_op("Mul", &height.2, &width.2, i64::saturating_mul);
    let image = v.respec(&v.cast(pick(v, rois, 0, 1), DataType::Int64), &[-1, 1, 1, 1, 1]);
    let read = images.read(v, &image, &across(v, [&height.0, &width.0]), Reading::Nearest, Outside::Border).sum(v);
    let [a, b] = across(v, [&height.1, &width.1]);
    let exists = v.respec(&v.mul(a, b), &[-1, 1]);
    let values = v.select(v.greater(&exists, v.c(0.0)), read, v.c(f64::NEG_INFINITY));
    let pool = extreme(v, &bins(v, x, &values, &samples), 1, false);
    let any = v.reduce_sum(v.op("Reshape", &[&exists, &v.join(&[v.ints(&[-1]), samples])], vec![]), v.ints(&[1]), true);
    let pool = v.select(v.greater(any, v.c(0.0)), pool, v.c(0.0));
    Ok(regions(v, x, &pool, pooled))
}
