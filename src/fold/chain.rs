//! Stored floats that nodes scale, convert or move before a product reads them: what it reads, in memory, and the way
//! back to what is stored.

use bytes::Bytes;
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn, Zip};

use super::values::narrowed;
use crate::base::Base;
use crate::inject::place::source;
use crate::onnx::{DataType, Model, Tensor, data_type_name, proto_dims, proto_type};
use crate::select::{Chain, Linear, Link, Source};
use crate::{Error, Result};

/// A stored tensor and what is done to it. Computing with it takes a few times its size in float64.
pub(crate) struct Chained {
    name: String,
    stored: Bytes,
    data_type: DataType,
    dims: Vec<usize>,
    steps: Vec<Step>,
}

/// A [`Link`] with its constant, and the shape before it.
struct Step {
    does: Does,
    from: Vec<usize>,
}

enum Does {
    Cast(DataType),
    Scale { by: ArrayD<f64>, divides: bool },
    Transpose(Vec<usize>),
    Reshape(Vec<usize>),
}

impl Chained {
    /// The weight of `linear`. The constants that scale it are read, itself it is not.
    pub fn of(model: &Model, base: &Base, linear: &Linear) -> Result<Self> {
        Self::read(model, base, &linear.weight.source, &linear.weight.chain)
    }

    fn read(model: &Model, base: &Base, at: &Source, chain: &Chain) -> Result<Self> {
        let tensor = source(base, at)?;
        let (dims, data_type) = (proto_dims(tensor)?, proto_type(tensor)?);
        let (mut shape, mut steps) = (dims.clone(), Vec::new());
        for link in chain {
            let from = shape.clone();
            let does = match link {
                Link::Cast(to) => Does::Cast(*to),
                Link::Scale { by, chain, divides } => {
                    let by = Self::read(model, base, by, chain)?.as_read()?;
                    Does::Scale { by, divides: *divides }
                }
                Link::Transpose(perm) => {
                    shape = perm.iter().map(|p| from[*p]).collect();
                    Does::Transpose(perm.clone())
                }
                Link::Reshape(dims) => {
                    shape.clone_from(dims);
                    Does::Reshape(dims.clone())
                }
            };
            steps.push(Step { does, from });
        }
        Ok(Self { name: tensor.name().into(), stored: model.tensor_bytes(tensor)?, data_type, dims, steps })
    }

    /// Bytes of the stored tensor.
    pub fn byte_len(&self) -> usize {
        self.stored.len()
    }

    /// Why a change of what is read is no change of what is stored, if so.
    pub fn obstacle(&self) -> Option<String> {
        let is_lost = |step: &Step| match &step.does {
            Does::Scale { by, .. } => by.iter().any(|s| *s == 0.0 || !s.is_finite()),
            _ => false,
        };
        self.steps.iter().any(is_lost).then(|| {
            format!(
                "{} is scaled by 0 in places, or by what is not finite, so that no value of it could do the same",
                self.name
            )
        })
    }

    /// What the product reads.
    pub fn as_read(&self) -> Result<ArrayD<f64>> {
        let mut element = self.data_type;
        let values = Tensor::from_bytes(element, &self.dims, &self.stored).map_err(Error::model)?.to_f64();
        let mut values = array(&self.dims, values)?;
        for step in &self.steps {
            match &step.does {
                Does::Cast(to) => {
                    element = *to;
                    values.mapv_inplace(|v| rounded(v, element));
                }
                Does::Scale { by, divides } => {
                    let by = self.laid(by, &step.from)?;
                    Zip::from(&mut values).and_broadcast(&by).for_each(|v, s| {
                        *v = rounded(if *divides { *v / s } else { *v * s }, element);
                    });
                }
                Does::Transpose(perm) => values = standard(values.permuted_axes(IxDyn(perm))),
                Does::Reshape(dims) => values = array(dims, values.into_raw_vec_and_offset().0)?,
            }
        }
        Ok(values)
    }

    /// What has to be stored for the product to read `after` instead of `before`, but for the rounding of what is stored.
    /// Elements that stay the same stay to the bit.
    ///
    /// # Errors
    /// A value that is finite and would not be in the stored type.
    pub fn to_store(&self, before: &ArrayD<f64>, after: Vec<f64>) -> Result<Vec<u8>> {
        let after = array(before.shape(), after)?;
        let same = Zip::from(&after).and(before).map_collect(|a, b| f64::from(u8::from(a == b)));
        let finite = after.iter().all(|v| v.is_finite());
        let (same, wanted) = (self.back(same, false)?, self.back(after, true)?);
        let (wanted, _) = wanted.into_raw_vec_and_offset();
        let size = self.stored.len() / wanted.len().max(1);
        let mut bytes = to_bytes(&wanted, self.data_type);
        if finite && !self.widened(&bytes)?.iter().zip(&same).all(|(v, same)| *same == 1.0 || v.is_finite()) {
            return Err(Error::Check(format!(
                "the merged weight has values that, once its scale is taken out again, are too large for {} ({})",
                self.name,
                data_type_name(self.data_type)
            )));
        }
        for ((new, old), same) in
            bytes.chunks_exact_mut(size.max(1)).zip(self.stored.chunks_exact(size.max(1))).zip(&same)
        {
            if *same == 1.0 {
                new.copy_from_slice(old);
            }
        }
        Ok(bytes)
    }

    /// From the shape that is read to that which is stored; with `scales`, what scales is taken out again.
    fn back(&self, mut values: ArrayD<f64>, scales: bool) -> Result<ArrayD<f64>> {
        for step in self.steps.iter().rev() {
            match &step.does {
                Does::Scale { by, divides } if scales => {
                    let by = self.laid(by, &step.from)?;
                    Zip::from(&mut values).and_broadcast(&by).for_each(|v, s| {
                        *v = if *divides { *v * s } else { *v / s };
                    });
                }
                Does::Cast(_) | Does::Scale { .. } => {}
                Does::Transpose(perm) => {
                    let mut inverse = vec![0; perm.len()];
                    perm.iter().enumerate().for_each(|(to, from)| inverse[*from] = to);
                    values = standard(values.permuted_axes(IxDyn(&inverse)));
                }
                Does::Reshape(_) => values = array(&step.from, values.into_raw_vec_and_offset().0)?,
            }
        }
        Ok(values)
    }

    /// A scale with as many axes as what it scales.
    fn laid(&self, by: &ArrayD<f64>, dims: &[usize]) -> Result<ArrayD<f64>> {
        let missing = dims.len().saturating_sub(by.ndim());
        let shape: Vec<usize> = std::iter::repeat_n(1, missing).chain(by.shape().iter().copied()).collect();
        let fits = shape.len() == dims.len() && shape.iter().zip(dims).all(|(s, d)| s == d || *s == 1);
        match by.view().into_shape_with_order(IxDyn(&shape)) {
            Ok(laid) if fits => Ok(laid.into_owned()),
            _ => Err(Error::model(format!("{}: its scale of shape {:?} does not fit {dims:?}", self.name, by.shape()))),
        }
    }

    fn widened(&self, bytes: &[u8]) -> Result<Vec<f64>> {
        Ok(Tensor::from_bytes(self.data_type, &self.dims, bytes).map_err(Error::model)?.to_f64())
    }
}

fn array(dims: &[usize], values: Vec<f64>) -> Result<ArrayD<f64>> {
    ArrayD::from_shape_vec(IxDyn(dims), values).map_err(|e| Error::model(format!("a weight has another shape: {e}")))
}

fn standard(values: ArrayD<f64>) -> ArrayD<f64> {
    values.as_standard_layout().into_owned()
}

/// `value` as one of type `element`.
fn rounded(value: f64, element: DataType) -> f64 {
    match element {
        DataType::Float => f64::from(value as f32),
        DataType::Float16 => f16::from_f64(value).to_f64(),
        DataType::Bfloat16 => bf16::from_f64(value).to_f64(),
        _ => value,
    }
}

/// `values` as they are stored in type `element`, rounded to nearest.
pub(super) fn to_bytes(values: &[f64], element: DataType) -> Vec<u8> {
    match element {
        DataType::Double => bytemuck::cast_slice(values).to_vec(),
        _ => narrowed(&values.iter().map(|v| *v as f32).collect::<Vec<_>>(), element),
    }
}
