//! The window that convolutions and pools slide over the spatial axes. With `places` positions, it covers
//! (places - 1)·stride + (kernel - 1)·dilation + 1 elements of the padded input, whatever pads and rounding say: an
//! input cut or padded to that gives the same result without pads, and an adjoint of that extent is cut or padded back.

use super::Vjp;
use crate::Result;
use crate::onnx::AttributeProto;

/// Dimensions are 1-D int64 values of one element, constants where they are known.
impl Vjp<'_> {
    pub(super) fn dim_op(&self, op: &str, a: &str, b: &str, value: fn(i64, i64) -> i64) -> String {
        match (self.constant_value(a), self.constant_value(b)) {
            (Some(a), Some(b)) => self.ints(&[value(a, b)]),
            _ => self.op(op, &[a, b], vec![]),
        }
    }

    pub(super) fn plus(&self, a: &str, b: &str) -> String {
        self.dim_op("Add", a, b, i64::saturating_add)
    }

    pub(super) fn minus(&self, a: &str, b: &str) -> String {
        self.dim_op("Sub", a, b, i64::saturating_sub)
    }

    pub(super) fn times(&self, a: &str, factor: i64) -> String {
        self.dim_op("Mul", a, &self.ints(&[factor]), i64::saturating_mul)
    }
}

#[derive(Clone)]
pub(super) struct Window<'v, 'a> {
    v: &'v Vjp<'a>,
    pub strides: Vec<i64>,
    pub dilations: Vec<i64>,
    /// Padding before each axis.
    pub before: Vec<String>,
    /// What the window covers behind each axis; negative where it leaves elements over.
    pub after: Vec<String>,
}

impl<'v, 'a> Window<'v, 'a> {
    /// The window of size `kernel` whose places in `big` are those of `small`.
    pub fn of(v: &'v Vjp<'a>, big: &str, small: &str, kernel: &[String]) -> Result<Self> {
        let n = kernel.len();
        let ints = |name: &str, length: usize, default: i64| match v.node.attr_ints(name) {
            Some([]) | None => Ok(vec![default; length]),
            Some(values) if values.len() == length => Ok(values.to_vec()),
            Some(_) => Err(v.error(format!("attribute {name} must have {length} values"))),
        };
        let (strides, dilations) = (ints("strides", n, 1)?, ints("dilations", n, 1)?);
        let (pads, rest) = (ints("pads", 2 * n, 0)?, ints("output_padding", n, 0)?);
        let auto = v.node.attr_s("auto_pad").unwrap_or("NOTSET");
        // Sizes come first, and pads follow from them.
        let by_size = auto.starts_with("SAME") || v.node.attr_ints("output_shape").is_some();
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for i in 0..n {
            let one = v.ints(&[1]);
            let steps = v.times(&v.minus(&v.dim_of(small, i + 2), &one), strides[i]);
            let gaps = v.times(&v.minus(&kernel[i], &one), dilations[i]);
            let covered = v.plus(&v.plus(&steps, &gaps), &one);
            let size = v.dim_of(big, i + 2);
            let start = match (by_size, auto) {
                (true, _) => {
                    let missing = v.minus(&v.plus(&covered, &v.ints(&[rest[i]])), &size);
                    let total = v.dim_op("Max", &missing, &v.ints(&[0]), i64::max);
                    let half = v.dim_op("Div", &total, &v.ints(&[2]), |a, b| a / b.max(1));
                    if auto == "SAME_UPPER" { half } else { v.minus(&total, &half) }
                }
                (false, "VALID") => v.ints(&[0]),
                (false, _) => v.ints(&[pads[i]]),
            };
            after.push(v.minus(&v.minus(&covered, &start), &size));
            before.push(start);
        }
        Ok(Self { v, strides, dilations, before, after })
    }

    /// Paddings as numbers, where they are known.
    pub fn pads(&self) -> Option<(Vec<i64>, Vec<i64>)> {
        let numbers =
            |pads: &[String]| -> Option<Vec<i64>> { pads.iter().map(|pad| self.v.constant_value(pad)).collect() };
        Some((numbers(&self.before)?, numbers(&self.after)?))
    }

    fn attributes(&self, group: i64) -> Vec<AttributeProto> {
        vec![
            AttributeProto::ints("strides", &self.strides),
            AttributeProto::ints("dilations", &self.dilations),
            AttributeProto::int("group", group),
        ]
    }

    fn widths(&self, before: &[String], after: &[String]) -> Vec<String> {
        let none = || vec![self.v.ints(&[0]); 2];
        [none(), before.to_vec(), none(), after.to_vec()].concat()
    }

    /// What the window covers of `x`, and the pads that are left to the operator that uses it.
    fn cover(&self, x: &str) -> (String, AttributeProto) {
        match self.pads() {
            Some((before, after)) if before.iter().chain(&after).all(|pad| *pad >= 0) => {
                (x.into(), AttributeProto::ints("pads", &[before, after].concat()))
            }
            _ => {
                let covered = self.v.pad(x, &self.widths(&self.before, &self.after));
                (covered, AttributeProto::ints("pads", &vec![0; 2 * self.before.len()]))
            }
        }
    }

    /// The convolution of `big` with `w`.
    pub fn convolve(&self, big: &str, w: &str, group: i64) -> String {
        let (covered, pads) = self.cover(big);
        let mut attributes = self.attributes(group);
        attributes.push(pads);
        self.v.op("Conv", &[&covered, w], attributes)
    }

    /// The transpose of [`Window::convolve`].
    pub fn spread(&self, small: &str, w: &str, group: i64) -> String {
        let v = self.v;
        let mut attributes = self.attributes(group);
        if let Some((before, after)) = self.pads() {
            let behind: Vec<i64> = after.iter().map(|pad| (*pad).max(0)).collect();
            let rest: Vec<i64> = after.iter().map(|pad| pad.saturating_neg().max(0)).collect();
            attributes.push(AttributeProto::ints("pads", &[before, behind].concat()));
            attributes.push(AttributeProto::ints("output_padding", &rest));
            return v.op("ConvTranspose", &[small, w], attributes);
        }
        let full = v.op("ConvTranspose", &[small, w], attributes);
        let back = |pads: &[String]| pads.iter().map(|pad| v.minus(&v.ints(&[0]), pad)).collect::<Vec<_>>();
        v.pad(&full, &self.widths(&back(&self.before), &back(&self.after)))
    }

    /// `x`, or one image of zeros where its batch may be empty and is: ONNX Runtime's Conv never returns from an input
    /// without channels, which is what the batch becomes.
    fn no_empty_batch(&self, x: &str) -> String {
        let v = self.v;
        let batch = v.dim_of(x, 0);
        if v.constant_value(&batch).is_some_and(|n| n > 0) {
            return x.to_string();
        }
        let one = v.ints(&[1]);
        let missing = v.minus(&one, &v.dim_op("Min", &batch, &one, i64::min));
        let rank = self.before.len() + 2;
        let mut widths = vec![v.ints(&[0]); 2 * rank];
        widths[rank] = missing;
        v.pad(x, &widths)
    }

    /// The adjoint of w in `small` = convolve(`big`, w): a convolution over the batch with strides and dilations
    /// exchanged. Groups stay groups: their channels go to the batch, and the batch to their channels.
    pub fn weight(&self, big: &str, small: &str, group: i64) -> String {
        let v = self.v;
        let rank = self.before.len() + 2;
        let (big, small) = (&self.no_empty_batch(big), &self.no_empty_batch(small));
        let mut turn: Vec<i64> = (0..rank as i64).collect();
        turn.swap(0, 1);
        let turned = match group {
            1 => v.transpose(big, &turn),
            _ => {
                let spatial: Vec<String> = (2..rank).map(|axis| v.dim_of(big, axis)).collect();
                let split = [vec![v.dim_of(big, 0), v.ints(&[group]), v.ints(&[-1])], spatial.clone()].concat();
                let mut perm: Vec<i64> = (0..=rank as i64).collect();
                perm[..3].copy_from_slice(&[2, 1, 0]);
                let parts = v.transpose(v.op("Reshape", &[big, &v.join(&split)], vec![]), &perm);
                let batch = v.times(&v.dim_of(big, 0), group);
                let merged = [vec![v.ints(&[-1]), batch], spatial].concat();
                v.op("Reshape", &[&parts, &v.join(&merged)], vec![])
            }
        };
        let (covered, pads) = self.cover(&turned);
        let attributes = vec![
            AttributeProto::ints("strides", &self.dilations),
            AttributeProto::ints("dilations", &self.strides),
            AttributeProto::int("group", group),
            pads,
        ];
        v.transpose(v.op("Conv", &[&covered, &v.transpose(small, &turn)], attributes), &turn)
    }
}
