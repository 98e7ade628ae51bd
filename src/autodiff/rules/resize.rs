//! Resize is a linear map along each axis. Its matrix is what Resize makes of an identity matrix, whatever the mode, and
//! the adjoint is the product with its transpose. The scales say how large the result is, which jumps where they move:
//! they carry no gradient. The region that `tf_crop_and_resize` reads does.

use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Resize", resize);
}

fn resize(v: &Vjp) -> Result<Adjoints> {
    let resize = Resize::of(v)?;
    let dx = v.wants(0).then(|| resize.back(v.dy().unwrap_or_default(), None));
    Ok(vec![dx, if v.wants(1) { resize.region()? } else { None }])
}

/// The maps of a Resize along its axes.
struct Resize<'v, 'a> {
    v: &'v Vjp<'a>,
    rank: usize,
    /// Those that are given sizes or scales, in their order.
    axes: Vec<usize>,
    crop: bool,
    mode: &'v str,
    /// Matrix of each of `axes`, places of y by those of x; `None` where nothing happens.
    matrices: Vec<Option<String>>,
}

impl<'v, 'a> Resize<'v, 'a> {
    fn of(v: &'v Vjp<'a>) -> Result<Self> {
        let (x, y) = (v.x(0)?, v.y(0)?);
        let rank = v.rank(x)?;
        let axes = match v.node.attr_ints("axes") {
            Some(axes) => axes.iter().map(|axis| v.axis(*axis, rank)).collect::<Result<Vec<_>>>()?,
            None => (0..rank).collect(),
        };
        let crop = v.node.attr_s("coordinate_transformation_mode") == Some("tf_crop_and_resize");
        let mode = v.node.attr_s("mode").unwrap_or("nearest");
        let mut resize = Self { v, rank, axes, crop, mode, matrices: vec![] };
        for (k, axis) in resize.axes.iter().enumerate() {
            let fixed = !resize.crop || resize.outer(*axis);
            let idle = fixed && !resize.keeps_ratio() && untouched(v, x, y, k, *axis);
            resize.matrices.push(if idle { None } else { Some(resize.matrix(x, k, *axis)?) });
        }
        Ok(resize)
    }

    /// Whether one scale serves all axes.
    fn keeps_ratio(&self) -> bool {
        !matches!(self.v.node.attr_s("keep_aspect_ratio_policy"), None | Some("stretch"))
    }

    /// Whether the axis is the batch or the channels to ONNX Runtime, which reads no region of it if it keeps its size.
    fn outer(&self, axis: usize) -> bool {
        self.mode != "nearest" && self.rank >= 4 && axis < 2
    }

    /// `g` through the transposes of all matrices but that of the `without`-th axis.
    fn back(&self, g: &str, without: Option<usize>) -> String {
        let v = self.v;
        let mut g = g.to_string();
        for (k, (axis, matrix)) in self.axes.iter().zip(&self.matrices).enumerate() {
            let Some(matrix) = matrix.as_ref().filter(|_| without != Some(k)) else { continue };
            // The axis goes to the end, where the product is.
            let mut perm: Vec<i64> = (0..self.rank as i64).collect();
            g = match self.rank - axis {
                1 => v.matmul(&g, matrix),
                2 => v.matmul(v.transpose(matrix, &[1, 0]), &g),
                _ => {
                    perm.swap(*axis, self.rank - 1);
                    v.transpose(v.matmul(v.transpose(&g, &perm), matrix), &perm)
                }
            };
        }
        g
    }

    /// Element `at` of a 1-D value, as a 1-D value.
    fn part(&self, value: &str, at: usize) -> String {
        let (v, at) = (self.v, at as i64);
        v.op("Slice", &[value, &v.ints(&[at]), &v.ints(&[at + 1]), &v.ints(&[0])], vec![])
    }

    /// Rows: places of y along the axis; columns: those of x.
    fn matrix(&self, x: &str, k: usize, axis: usize) -> Result<String> {
        let v = self.v;
        let (n, one) = (v.dim_of(x, axis), v.ints(&[1]));
        let square = v.expand(v.c(0.0), v.join(&[n.clone(), n.clone()]));
        let eye = v.op("EyeLike", &[&square], vec![]);
        let fixed = ["axes", "extrapolation_value"];
        let mut attributes: Vec<AttributeProto> =
            v.node.attribute.iter().filter(|a| !fixed.contains(&a.name())).cloned().collect();
        attributes.push(AttributeProto::float("extrapolation_value", 0.0));
        if self.keeps_ratio() {
            return self.matrix_by_ratio(x, k, eye, attributes);
        }
        let eye = v.reshape(eye, v.join(&[one.clone(), one.clone(), n.clone(), n.clone()]));
        let mut inputs = vec![eye, String::new()];
        if self.crop {
            let (start, end) = self.ends(k)?;
            let like = |value: f64| v.cast_like(v.expand(v.c(value), v.ints(&[1])), &start);
            let (zero, whole) = (like(0.0), like(1.0));
            let ends = [&zero, &zero, &start, &zero, &whole, &whole, &end, &whole].map(String::from);
            inputs[1] = v.concat(&ends, 0);
        }
        match (v.node.input_at(2), v.node.input_at(3)) {
            (_, Some(sizes)) => {
                let size = v.constant_ints(3).and_then(|sizes| sizes.get(k).copied());
                let size = size.map_or_else(|| self.part(sizes, k), |size| v.ints(&[size]));
                inputs.extend([String::new(), v.join(&[one.clone(), one, size, n])]);
            }
            (Some(scales), None) => {
                let scale = self.part(scales, k);
                let unit = v.float(1.0, DataType::Float).unwrap_or_default();
                let unit = v.expand(unit, v.ints(&[1]));
                inputs.push(v.concat(&[unit.clone(), unit.clone(), scale, unit], 0));
            }
            _ => return Err(v.error("it has neither scales nor sizes")),
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let resized = v.op("Resize", &inputs, attributes);
        Ok(v.squeeze(resized, v.ints(&[0, 1])))
    }

    /// The axis whose size asks for the smallest (or largest) scale sets that of all. So the identity is resized along
    /// with that axis, on which it is constant.
    fn matrix_by_ratio(&self, x: &str, k: usize, eye: String, mut attributes: Vec<AttributeProto>) -> Result<String> {
        let v = self.v;
        if self.crop {
            return Err(v.error("a region and a keep_aspect_ratio_policy together are not supported"));
        }
        let Some(sizes) = v.node.input_at(3) else {
            return Err(v.error("its keep_aspect_ratio_policy needs sizes"));
        };
        let dims: Vec<String> = self.axes.iter().map(|axis| v.dim_of(x, *axis)).collect();
        let (n, all, one) = (dims[k].clone(), v.join(&dims), v.ints(&[1]));
        let ratios = v.div(v.cast(sizes, DataType::Float), v.cast(&all, DataType::Float));
        let smallest = v.node.attr_s("keep_aspect_ratio_policy") == Some("not_larger");
        let leads = v.op(if smallest { "ArgMin" } else { "ArgMax" }, &[&ratios], vec![AttributeProto::int("axis", 0)]);
        let lead = |of: &str| v.op("Gather", &[of, &leads], vec![]);
        let columns = v.reshape(eye, v.join(&[n.clone(), one.clone(), one.clone(), n.clone()]));
        let columns = v.expand(columns, v.concat(&[n.clone(), one, lead(&all), n], 0));
        attributes.push(AttributeProto::ints("axes", &[2, 3]));
        let both = v.concat(&[lead(sizes), self.part(sizes, k)], 0);
        let resized = v.op("Resize", &[&columns, "", "", &both], attributes);
        let first = v.op("Gather", &[&resized, &v.int(0)], vec![AttributeProto::int("axis", 2)]);
        Ok(v.transpose(v.squeeze(first, v.ints(&[1])), &[1, 0]))
    }

    /// Where the region begins and ends on the `k`-th axis, as shares of it.
    fn ends(&self, k: usize) -> Result<(String, String)> {
        let region = self.v.x(1)?;
        let ends = (self.part(region, k), self.part(region, self.axes.len() + k));
        let number = |value: f64| self.v.cast_like(self.v.c(value), region);
        Ok((self.unless_kept(k, ends.0, number(0.0))?, self.unless_kept(k, ends.1, number(1.0))?))
    }

    /// `otherwise` in place of `value` on an outer axis that keeps its size.
    fn unless_kept(&self, k: usize, value: String, otherwise: String) -> Result<String> {
        let (v, axis) = (self.v, self.axes[k]);
        if !self.outer(axis) {
            return Ok(value);
        }
        let kept = v.equal(v.dim_of(v.x(0)?, axis), v.dim_of(v.y(0)?, axis));
        Ok(v.select(kept, otherwise, value))
    }

    /// Adjoint of the region (the starts, then the ends). Place i of m reads x at c = (n - 1)·(start·(1 - u) + end·u) with
    /// u = i/(m - 1), or ½ where m is 1. There y rises by the step from x[⌊c⌋] to the next, unless c is outside of x.
    fn region(&self) -> Result<Option<String>> {
        let (v, x) = (self.v, self.v.x(0)?);
        let region = v.x(1)?;
        if !self.crop || self.mode == "nearest" {
            return Ok(None);
        }
        if self.mode != "linear" || v.node.attr_i("antialias", 0) != 0 {
            return Err(v.error("the derivative by its region is given for linear interpolation; freeze the region"));
        }
        let none = || v.expand(v.c(0.0), v.ints(&[1]));
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for (k, axis) in self.axes.iter().enumerate() {
            if self.matrices[k].is_none() {
                starts.push(none());
                ends.push(none());
                continue;
            }
            let number = |dim: &str| v.cast_like(dim, v.c(0.0));
            let scalar = |dim: String| v.squeeze(dim, v.ints(&[0]));
            let (n, m) = (v.dim_of(x, *axis), v.dim_of(v.y(0)?, *axis));
            let last = number(&v.minus(&n, &v.ints(&[1])));
            let steps = number(&v.minus(&m, &v.ints(&[1])));
            let counted = |dim: String| number(&v.op("Range", &[&v.int(0), &scalar(dim), &v.int(1)], vec![]));
            let single = v.equal(&steps, v.c(0.0));
            let u = v.div(counted(m), v.select(&single, v.c(1.0), &steps));
            let u = v.select(single, v.c(0.5), u);
            let (start, end) = self.ends(k)?;
            let rest = v.sub(v.c(1.0), &u);
            let at = v.add(v.mul(v.cast_like(start, v.c(0.0)), &rest), v.mul(v.cast_like(end, v.c(0.0)), &u));
            let c = v.mul(at, &last);
            let inside = v.and(v.greater_or_equal(&c, v.c(0.0)), v.less_or_equal(&c, &last));
            // The last element has no next: the step to it counts.
            let before = v.op("Min", &[&v.op("Floor", &[&c], vec![]), &v.sub(&last, v.c(1.0))], vec![]);
            let (column, row) = (v.ints(&[1]), v.unsqueeze(counted(n), v.ints(&[0])));
            let hits = |place: String| v.mask(v.equal(v.unsqueeze(place, &column), &row));
            let step = v.sub(hits(v.add(&before, v.c(1.0))), hits(before));
            let step = v.mul(step, v.unsqueeze(v.mask(inside), &column));

            let mut perm: Vec<i64> = (0..self.rank as i64).filter(|a| *a != *axis as i64).collect();
            perm.insert(0, *axis as i64);
            let rows = |value: &str| v.op("Reshape", &[&v.transpose(value, &perm), &v.ints(&[0, -1])], vec![]);
            let pairs = v.matmul(rows(&self.back(v.dy()?, Some(k))), v.transpose(rows(x), &[1, 0]));
            let dc = v.mul(v.reduce_sum(v.mul(pairs, step), v.ints(&[1]), false), last);
            let sum = |weights: &str| v.reduce_sum(v.mul(&dc, weights), v.ints(&[0]), true);
            starts.push(self.unless_kept(k, sum(&rest), none())?);
            ends.push(self.unless_kept(k, sum(&u), none())?);
        }
        Ok(Some(v.cast_like(v.concat(&[starts, ends].concat(), 0), region)))
    }
}

/// Whether axis `axis`, the `k`-th of the scales, keeps its size and so its values.
fn untouched(v: &Vjp, x: &str, y: &str, k: usize, axis: usize) -> bool {
    let scales = v.node.input_at(2).and_then(|scales| v.shapes.floats(scales));
    if let Some(scale) = scales.and_then(|scales| scales.get(k)) {
        return *scale == 1.0;
    }
    let size = |value: &str| v.dims(value).and_then(|dims| dims.get(axis));
    v.node.input_at(3).is_some() && size(x).is_some() && size(x) == size(y)
}
