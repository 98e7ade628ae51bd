//! Quantised weights in memory: stored integers to the numbers they stand for, and numbers back to integers with scales
//! and zero points fitted anew.

use super::values::narrowed;
use crate::base::Base;
use crate::inject::place::{source, to_f32};
use crate::onnx::{DataType, Model, Tensor};
use crate::select::{Laid, Linear, Packing, Scheme};
use crate::{Error, Result};

/// A quantised weight.
pub(super) struct Grid<'a> {
    scheme: &'a Scheme,
    bits: u32,
    /// Least and greatest integer.
    range: (i32, i32),
    integers: Vec<i32>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    /// Which scale and zero point each element has.
    scale_of: Cells,
    zero_of: Cells,
    zeros_are_integers: bool,
}

/// The bytes of a weight that was quantised again. `None`: as it was.
pub(super) struct Requantized {
    pub integers: Vec<u8>,
    pub scales: Option<Vec<u8>>,
    pub zeros: Option<Vec<u8>>,
    /// Root mean square of what rounding took from the merged weight, over that of the weight.
    pub error: f64,
    /// The same for the base, its rounding being even over a step of its grid: what its own quantisation cost.
    pub base_error: f64,
}

/// Which cell of a grid of blocks an element lies in.
struct Cells {
    dims: Vec<usize>,
    blocks: Vec<usize>,
}

impl Cells {
    fn of(dims: &[usize], laid: Option<&Laid>) -> Self {
        let blocks = laid.map_or_else(|| dims.iter().map(|d| (*d).max(1)).collect(), |l| l.blocks.clone());
        Self { dims: dims.to_vec(), blocks }
    }

    fn count(&self) -> usize {
        self.dims.iter().zip(&self.blocks).map(|(d, b)| d.div_ceil(*b)).product()
    }

    /// The cell of each element, in order.
    fn each(&self) -> Vec<u32> {
        let mut cells = vec![0u32];
        for (d, b) in self.dims.iter().zip(&self.blocks) {
            let along = d.div_ceil(*b) as u32;
            cells = cells.iter().flat_map(|c| (0..*d).map(move |i| c * along + (i / b) as u32)).collect();
        }
        cells
    }
}

impl<'a> Grid<'a> {
    /// The stored weight of `linear`.
    ///
    /// # Errors
    /// Why what it stands for is not known; tensors of another size than the scheme says.
    pub fn read(model: &Model, base: &Base, linear: &'a Linear) -> Result<Self> {
        let wrong = |what: &str| Error::model(format!("module {}: {what}", linear.path));
        let quantized = linear.quantized.as_ref().ok_or_else(|| wrong("its weight is not quantized"))?;
        let scheme = quantized.scheme.as_ref().map_err(|why| wrong(why))?;
        let (bits, signed) = (quantized.bits, quantized.signed);
        let range = if signed { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
        let bytes = model.tensor_bytes(source(base, &linear.weight.source)?)?;
        let integers = unpacked(&bytes, bits, signed, scheme);
        // Weights of 7 bits (`reduce_range`) stay so: with 8, some processors saturate in the sums.
        let least = integers.iter().min().copied().unwrap_or_default();
        let greatest = integers.iter().max().copied().unwrap_or_default();
        let range = match (bits, signed) {
            (8, true) if least >= -64 && greatest <= 64 => (-64, 64),
            (8, false) if greatest <= 127 => (0, 127),
            _ => range,
        };
        let (scale_of, zero_of) =
            (Cells::of(&scheme.dims, scheme.scale.as_ref()), Cells::of(&scheme.dims, scheme.zero.as_ref()));
        let scales = match &scheme.scale {
            Some(laid) => numbers(model, base, laid)?,
            None => vec![1.0],
        };
        let mut zeros_are_integers = true;
        let zeros = match &scheme.zero {
            None => vec![scheme.origin as f32; zero_of.count()],
            Some(laid) => {
                let tensor = source(base, &laid.source)?;
                zeros_are_integers =
                    !matches!(laid.data_type, DataType::Float | DataType::Float16 | DataType::Bfloat16);
                match (laid.data_type, scheme.packing) {
                    (DataType::Uint8, Packing::Blocks(block)) => {
                        // Each row of zero points fills whole bytes.
                        let across = scheme.dims[1].div_ceil(block);
                        let bytes = model.tensor_bytes(tensor)?;
                        let row = (across * bits as usize).div_ceil(8);
                        let rows = bytes.chunks(row.max(1));
                        rows.flat_map(|row| split(row, bits, false).into_iter().take(across))
                            .map(|z| z as f32)
                            .collect()
                    }
                    (DataType::Int4 | DataType::Uint4, _) => {
                        let bytes = model.tensor_bytes(tensor)?;
                        let signed = laid.data_type == DataType::Int4;
                        split(&bytes, 4, signed).into_iter().take(zero_of.count()).map(|z| z as f32).collect()
                    }
                    _ => model.tensor(tensor)?.to_f64().into_iter().map(|z| z as f32).collect(),
                }
            }
        };
        let elements: usize = scheme.dims.iter().product();
        if integers.len() != elements || scales.len() != scale_of.count() || zeros.len() != zero_of.count() {
            return Err(wrong("its weight, scales and zero points do not fit together"));
        }
        Ok(Self { scheme, bits, range, integers, scales, zeros, scale_of, zero_of, zeros_are_integers })
    }

    /// The numbers that the integers stand for, in the order of [`Scheme::matrix`].
    pub fn values(&self) -> Vec<f32> {
        let (scale_of, zero_of) = (self.scale_of.each(), self.zero_of.each());
        let cells = scale_of.iter().zip(&zero_of);
        let number =
            |(q, (s, z)): (&i32, (&u32, &u32))| (*q as f32 - self.zeros[*z as usize]) * self.scales[*s as usize];
        self.integers.iter().zip(cells).map(number).collect()
    }

    /// Integers for `values`, which are near what is stored: of several scales and zero points for each group the ones
    /// with the least square error, those that are there among them. What others read as well stays as it is.
    pub fn requantized(mut self, values: &[f32]) -> Requantized {
        let square = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let norm = square(values).max(f64::MIN_POSITIVE);
        let scale_of = self.scale_of.each();
        let mut steps = 0.0;
        scale_of.iter().for_each(|s| steps += f64::from(self.scales[*s as usize]).powi(2));
        let base_error = (steps / 12.0 / norm).sqrt();

        let own = |laid: &Option<Laid>| laid.as_ref().is_some_and(|l| l.own);
        let one_a_group =
            self.scheme.zero.as_ref().is_none_or(|z| {
                self.scheme.scale.as_ref().is_some_and(|s| s.blocks == z.blocks) || self.zeros.len() == 1
            });
        let scales_move = own(&self.scheme.scale) && one_a_group;
        let middle = (self.range.0 + self.range.1 + 1) / 2;
        let centred = self.zeros.iter().all(|z| *z == middle as f32);
        let zeros_move = scales_move
            && own(&self.scheme.zero)
            && self.zeros_are_integers
            && !centred
            && self.zeros.len() == self.scales.len();
        if scales_move {
            let members = grouped(&scale_of, self.scales.len());
            let stored = self.scheme.scale.as_ref().map_or(DataType::Float, |s| s.data_type);
            for (group, members) in members.iter().enumerate() {
                let numbers: Vec<f32> = members.iter().map(|i| values[*i as usize]).collect();
                let at = if self.zeros.len() == self.scales.len() { group } else { 0 };
                let start = (self.scales[group], self.zeros[at]);
                let (scale, zero) = fitted(&numbers, start, zeros_move, self.range, stored);
                self.scales[group] = scale;
                if zeros_move {
                    self.zeros[at] = zero;
                }
            }
        }
        let zero_of = self.zero_of.each();
        let mut lost = 0.0;
        for (i, v) in values.iter().enumerate() {
            let (scale, zero) = (self.scales[scale_of[i] as usize], self.zeros[zero_of[i] as usize]);
            let q = nearest(*v, scale, zero, self.range);
            lost += f64::from(v - (q - zero) * scale).powi(2);
            self.integers[i] = q as i32;
        }
        let scales = self.scheme.scale.as_ref().filter(|_| scales_move).map(|s| narrowed(&self.scales, s.data_type));
        let zeros = self.scheme.zero.as_ref().filter(|_| zeros_move).map(|_| match self.scheme.packing {
            Packing::Blocks(block) => {
                let across = self.scheme.dims[1].div_ceil(block).max(1);
                self.zeros.chunks(across).flat_map(|row| joined(row.iter().map(|z| *z as i32), self.bits)).collect()
            }
            Packing::Dense => joined(self.zeros.iter().map(|z| *z as i32), self.bits),
        });
        Requantized {
            integers: packed(&self.integers, self.bits, self.scheme),
            scales,
            zeros,
            error: (lost / norm).sqrt(),
            base_error,
        }
    }
}

/// The integer nearest to `v`, halves to even, as a float.
fn nearest(v: f32, scale: f32, zero: f32, range: (i32, i32)) -> f32 {
    let q = (v / scale).round_ties_even() + zero.round_ties_even();
    if q.is_nan() { zero } else { q.clamp(range.0 as f32, range.1 as f32) }
}

/// Scale and zero point for the numbers of one group, `start` being those that it had.
fn fitted(values: &[f32], start: (f32, f32), zero_moves: bool, range: (i32, i32), stored: DataType) -> (f32, f32) {
    /// Shares of the range of values that are tried: cutting off a few leaves a finer grid for the rest.
    const SHARES: [f32; 8] = [1.0, 0.975, 0.95, 0.92, 0.88, 0.84, 0.8, 0.75];
    let (least, greatest) = values.iter().fold((0f32, 0f32), |(a, b), v| (a.min(*v), b.max(*v)));
    let (low, high) = (range.0 as f32, range.1 as f32);
    let mut tried = vec![start];
    let zero = start.1;
    for share in SHARES {
        if zero_moves {
            let scale = share * (greatest - least) / (high - low);
            tried.push((scale, (low - share * least / scale).round_ties_even().clamp(low, high)));
            continue;
        }
        // So that both ends fit; and with the longer end on the longer side of the grid.
        let (down, up) = ((low - zero).min(-1.0), (high - zero).max(1.0));
        tried.push((share * (least / down).max(greatest / up), zero));
        let longer = if -least > greatest { least } else { greatest };
        let side = if -down > up { down } else { up };
        tried.push((share * longer / side, zero));
    }
    let stored_as = |scale: f32| {
        let mut back = Vec::new();
        super::values::widened(&narrowed(&[scale], stored), stored, &mut back);
        back.first().copied().unwrap_or(scale)
    };
    let cost = |(scale, zero): (f32, f32)| {
        let off = |v: &f32| f64::from(v - (nearest(*v, scale, zero, range) - zero) * scale).powi(2);
        values.iter().map(off).sum::<f64>()
    };
    let usable = |(scale, zero): &(f32, f32)| scale.is_finite() && *scale != 0.0 && zero.is_finite();
    let mut best = (start, cost(start));
    for (scale, zero) in tried {
        let candidate = (stored_as(scale), zero);
        if usable(&candidate) && cost(candidate) < best.1 {
            best = (candidate, cost(candidate));
        }
    }
    // The best scale for the integers that this gives.
    let (scale, zero) = best.0;
    let (mut over, mut under) = (0.0, 0.0);
    for v in values {
        let step = f64::from(nearest(*v, scale, zero, range) - zero);
        over += step * f64::from(*v);
        under += step * step;
    }
    let refined = (stored_as((over / under) as f32), zero);
    if usable(&refined) && cost(refined) < best.1 { refined } else { best.0 }
}

/// Indices of the elements of each of `count` groups.
fn grouped(group_of: &[u32], count: usize) -> Vec<Vec<u32>> {
    let mut members = vec![Vec::new(); count];
    for (i, group) in group_of.iter().enumerate() {
        members[*group as usize].push(i as u32);
    }
    members
}

fn numbers(model: &Model, base: &Base, laid: &Laid) -> Result<Vec<f32>> {
    let Tensor::F32(values) = to_f32(model.tensor(source(base, &laid.source)?)?)? else {
        return Err(Error::model("scales that are no floats"));
    };
    Ok(values.into_iter().collect())
}

/// The integers in `bytes`, those of 4 bits in pairs, the lower half first.
fn split(bytes: &[u8], bits: u32, signed: bool) -> Vec<i32> {
    let number = |byte: u8| match (bits, signed) {
        (4, true) => i32::from((byte << 4) as i8 >> 4),
        (4, false) => i32::from(byte & 15),
        (_, true) => i32::from(byte as i8),
        (_, false) => i32::from(byte),
    };
    match bits {
        4 => bytes.iter().flat_map(|b| [number(*b), number(*b >> 4)]).collect(),
        _ => bytes.iter().map(|b| number(*b)).collect(),
    }
}

/// The inverse of [`split`].
fn joined(integers: impl Iterator<Item = i32>, bits: u32) -> Vec<u8> {
    let bytes: Vec<u8> = integers.map(|q| q as u8).collect();
    match bits {
        4 => bytes.chunks(2).map(|pair| (pair[0] & 15) | (pair.get(1).copied().unwrap_or(0) << 4)).collect(),
        _ => bytes,
    }
}

/// Bytes of a row of `MatMulNBits`.
fn row_bytes(columns: usize, block: usize, bits: u32) -> usize {
    columns.div_ceil(block) * block * bits as usize / 8
}

fn unpacked(bytes: &[u8], bits: u32, signed: bool, scheme: &Scheme) -> Vec<i32> {
    let elements = scheme.dims.iter().product();
    match scheme.packing {
        Packing::Dense => split(bytes, bits, signed).into_iter().take(elements).collect(),
        Packing::Blocks(block) => {
            let columns = scheme.dims[1];
            let rows = bytes.chunks(row_bytes(columns, block, bits).max(1));
            rows.flat_map(|row| split(row, bits, signed).into_iter().take(columns)).collect()
        }
    }
}

fn packed(integers: &[i32], bits: u32, scheme: &Scheme) -> Vec<u8> {
    match scheme.packing {
        Packing::Dense => joined(integers.iter().copied(), bits),
        Packing::Blocks(block) => {
            let columns = scheme.dims[1].max(1);
            let wide = columns.div_ceil(block) * block;
            let rows = integers.chunks(columns);
            rows.flat_map(|row| {
                // What fills the last block up stands for zero.
                let filled = row.iter().copied().chain(std::iter::repeat_n(scheme.origin, wide - columns));
                joined(filled, bits)
            })
            .collect()
        }
    }
}
