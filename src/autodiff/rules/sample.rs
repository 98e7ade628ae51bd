//! Images read at real-valued places, and GridSample, which does nothing else.
//!
//! Along each axis a place has neighbours, and what each weighs depends on how far it is. The value at a place is the
//! sum over the neighbours of all axes, each times the product of its weights; so the adjoint of the image is a scatter
//! that adds, and that of the place comes through the weights alone.

use super::rotary::counting;
use super::{Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("GridSample", |v| v.through(|v| Ok(vec![Some(grid_sample(v)?)])));
}

/// How a place between elements is read along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Nearest,
    Linear,
    /// Keys' cubic convolution with a = -0.75.
    Cubic,
}

/// What is read outside of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outside {
    Zeros,
    Border,
    /// The image mirrored at the centres of its outermost elements, or at their outer edges.
    Reflection {
        centres: bool,
    },
}

/// What is read at each of a list of places.
pub(super) struct Samples {
    /// Neighbours of each place: `[places, neighbours, channels]`.
    pub values: String,
    /// `[places, 1, neighbours]`; none where a place has one neighbour and takes all of it.
    pub weights: Option<String>,
}

impl Samples {
    /// The values at the places: `[places, channels]`.
    pub fn sum(&self, v: &Vjp) -> String {
        let sum = self.weights.as_ref().map_or_else(|| self.values.clone(), |w| v.matmul(w, &self.values));
        v.squeeze(sum, v.ints(&[1]))
    }
}

/// Images, one after the other, each element with its channels: `[images·sizes…, channels]`.
pub(super) struct Images {
    rows: String,
    /// Extent along each spatial axis, 1-D int64 values of one element.
    pub sizes: Vec<String>,
}

impl Images {
    /// Of `x`, whose axes are images, channels and the spatial ones, of `sizes`.
    pub fn of(v: &Vjp, x: &str, sizes: Vec<String>) -> Self {
        let n = sizes.len() as i64;
        let perm: Vec<i64> = std::iter::once(0).chain(2..n + 2).chain([1]).collect();
        Self { rows: rows(v, &permuted(v, x, &perm), n + 1), sizes }
    }

    /// Reads at `places`, one value for each spatial axis, in elements. Like `image`, the number of the image, they
    /// have one rank and broadcast together; the places are listed in the order of that shape.
    pub fn read(&self, v: &Vjp, image: &str, places: &[String], reading: Reading, outside: Outside) -> Samples {
        let n = self.sizes.len() as i64;
        // Each axis has its neighbours along an axis of their own, behind those of the places.
        let behind = |x: &str, own: i64| -> String {
            let others: Vec<i64> = (0..n).filter(|i| *i != own).map(|i| i - n).collect();
            if others.is_empty() { x.to_string() } else { v.unsqueeze(x, v.ints(&others)) }
        };
        let mut row = v.unsqueeze(image, v.ints(&(-n..0).collect::<Vec<_>>()));
        let mut weights: Option<String> = None;
        let mut count = 1;
        for (i, (place, size)) in places.iter().zip(&self.sizes).enumerate() {
            let (at, weight, neighbours) = neighbours(v, place, size, reading, outside);
            row = v.add(v.mul(row, size), behind(&at, i as i64));
            let weight = weight.map(|w| behind(&w, i as i64));
            weights = match (weights, weight) {
                (Some(before), Some(weight)) => Some(v.mul(before, weight)),
                (before, weight) => before.or(weight),
            };
            count *= neighbours;
        }
        let values = v.op("Gather", &[&self.rows, &v.respec(&row, &[-1, count])], vec![]);
        Samples { values, weights: weights.map(|w| v.respec(&w, &[-1, 1, count])) }
    }
}

/// Numbers and weights of the neighbours of each place along an axis of `size` elements, along a new last axis.
fn neighbours(v: &Vjp, place: &str, size: &str, reading: Reading, outside: Outside) -> (String, Option<String>, i64) {
    let column = |x: &str| v.unsqueeze(x, v.ints(&[-1]));
    let (base, steps): (String, &[i64]) = match reading {
        Reading::Nearest => (v.op("Round", &[place], vec![]), &[0]),
        Reading::Linear => (v.op("Floor", &[place], vec![]), &[0, 1]),
        Reading::Cubic => (v.op("Floor", &[place], vec![]), &[-1, 0, 1, 2]),
    };
    let t = column(&v.sub(place, &base));
    let rest = v.sub(v.c(1.0), &t);
    let weights = match reading {
        Reading::Nearest => None,
        Reading::Linear => Some(v.concat(&[rest, t], -1)),
        Reading::Cubic => {
            let (before, after) = (v.add(&t, v.c(1.0)), v.add(&rest, v.c(1.0)));
            Some(v.concat(&[far(v, &before), near(v, &t), near(v, &rest), far(v, &after)], -1))
        }
    };
    let at = v.add(column(&v.cast(base, DataType::Int64)), v.ints(steps));
    let (zero, last) = (v.ints(&[0]), v.minus(size, &v.ints(&[1])));
    let least = |a: &str, b: &str| v.op("Min", &[a, b], vec![]);
    let most = |a: &str, b: &str| v.op("Max", &[a, b], vec![]);
    let count = steps.len() as i64;
    match outside {
        Outside::Border => (least(&most(&at, &zero), &last), weights, count),
        Outside::Zeros => {
            let inside = v.mask(v.and(v.greater_or_equal(&at, &zero), v.less_or_equal(&at, &last)));
            let weights = weights.map_or_else(|| inside.clone(), |w| v.mul(w, &inside));
            (least(&most(&at, &zero), &last), Some(weights), count)
        }
        Outside::Reflection { centres } => {
            let (period, end) = match centres {
                true => (most(&v.times(&last, 2), &v.ints(&[1])), v.times(&last, 2)),
                false => (v.times(size, 2), v.plus(&v.times(&last, 2), &v.ints(&[1]))),
            };
            let turn = v.op("Mod", &[&at, &period], vec![]);
            (least(&turn, &v.sub(end, &turn)), weights, count)
        }
    }
}

const KEYS: f64 = -0.75;

/// (a + 2)d³ - (a + 3)d² + 1, at a distance d up to 1.
fn near(v: &Vjp, d: &str) -> String {
    v.add(v.mul(v.mul(v.sub(v.mul(d, v.c(KEYS + 2.0)), v.c(KEYS + 3.0)), d), d), v.c(1.0))
}

/// a(d³ - 5d² + 8d - 4), at a distance d from 1 to 2.
fn far(v: &Vjp, d: &str) -> String {
    let cubic = v.mul(v.add(v.mul(v.sub(d, v.c(5.0)), d), v.c(8.0)), d);
    v.mul(v.sub(cubic, v.c(4.0)), v.c(KEYS))
}

pub(super) fn permuted(v: &Vjp, x: &str, perm: &[i64]) -> String {
    v.op("Transpose", &[x], vec![AttributeProto::ints("perm", perm)])
}

/// `x` as a matrix whose rows are the axes before `axis`.
pub(super) fn rows(v: &Vjp, x: &str, axis: i64) -> String {
    v.op("Flatten", &[x], vec![AttributeProto::int("axis", axis)])
}

/// Element (or slice) `at` of `x` along `axis`, which goes.
pub(super) fn pick(v: &Vjp, x: &str, at: i64, axis: i64) -> String {
    v.op("Gather", &[x, &v.int(at)], vec![AttributeProto::int("axis", axis)])
}

impl Vjp<'_> {
    /// A size (a 1-D int64 value of one element) in the node's element type.
    pub(super) fn number(&self, size: &str) -> String {
        match (self.constant_value(size), self.element()) {
            (Some(n), _) => self.c(n as f64),
            (None, Some(element)) => self.cast(size, element),
            (None, None) => self.cast_like(size, self.c(1.0)),
        }
    }
}

/// Coordinates in the grid go from -1 to 1, width first.
fn grid_sample(v: &Vjp) -> Result<String> {
    let (x, grid) = (v.x(0)?, v.x(1)?);
    let n = v.rank(x)?.checked_sub(2).filter(|n| (1..=3).contains(n));
    let n = n.ok_or_else(|| v.error("its input must have 3 to 5 axes"))?;
    let corners = v.node.attr_i("align_corners", 0) != 0;
    let reading = match v.node.attr_s("mode") {
        None | Some("linear" | "bilinear") => Reading::Linear,
        Some("nearest") => Reading::Nearest,
        Some("cubic" | "bicubic") => Reading::Cubic,
        Some(other) => return Err(v.error(format!("mode {other:?} is not known"))),
    };
    let outside = match v.node.attr_s("padding_mode") {
        None | Some("zeros") => Outside::Zeros,
        Some("border") => Outside::Border,
        Some("reflection") => Outside::Reflection { centres: corners },
        Some(other) => return Err(v.error(format!("padding_mode {other:?} is not known"))),
    };
    let images = Images::of(v, x, (0..n).map(|i| v.dim_of(x, i + 2)).collect());
    let place = |(i, size): (usize, &String)| {
        let from_edge = v.add(pick(v, grid, (n - 1 - i) as i64, -1), v.c(1.0));
        let (half, size) = (v.c(0.5), v.number(size));
        match corners {
            true => v.mul(from_edge, v.mul(v.sub(size, v.c(1.0)), half)),
            false => v.mul(v.sub(v.mul(from_edge, size), v.c(1.0)), half),
        }
    };
    let places: Vec<String> = images.sizes.iter().enumerate().map(place).collect();
    let image = v.respec(&counting(v, &v.dim_of(x, 0)), &[vec![-1], vec![1; n]].concat());
    let read = images.read(v, &image, &places, reading, outside).sum(v);
    let shape: Vec<String> = (0..=n).map(|axis| v.dim_of(grid, axis)).chain([v.ints(&[-1])]).collect();
    let read = v.op("Reshape", &[&read, &v.join(&shape)], vec![]);
    let perm: Vec<i64> = [0, n as i64 + 1].into_iter().chain(1..=n as i64).collect();
    Ok(permuted(v, &read, &perm))
}
