//! Weights that ONNX Runtime reads where they are: it gets the model without them, and their addresses, instead of a copy
//! in the model's bytes and another one of its own. Several sessions share what is lent to them.

use std::collections::HashSet;
use std::ffi::CString;

use bytes::Bytes;
use ort::AsPointer;
use ort::memory::MemoryInfo;
use ort::session::builder::SessionBuilder;
use ort::value::{DynValueRefMut, PrimitiveTensorElementType, Shape, TensorRefMut};

use crate::onnx::external::{Place, is_external};
use crate::onnx::{DataType, GraphProto, ModelProto, TensorProto, walk_graphs};

/// Smaller tensors stay in the model, where optimizations look at their values.
const WORTH_LENDING: usize = 1 << 16;

/// Where lent tensors stand, as far as the model can say. ONNX Runtime does not look there.
const NOWHERE: &str = "lent-by-bone-onnx";

/// A tensor of the main graph, taken out of the model.
pub(super) struct Weight {
    pub bytes: Bytes,
    name: String,
    dims: Vec<i64>,
    data_type: DataType,
}

/// A value that a session uses, over bytes that must stay.
pub(super) struct Lent {
    _value: DynValueRefMut<'static>,
    _bytes: Bytes,
}

/// `model` without its large weights, and these. Those that nothing uses go altogether: ONNX Runtime has dropped them when
/// it looks for what is lent to it.
pub(super) fn split(model: &ModelProto) -> (ModelProto, Vec<Weight>) {
    let mut rest = model.clone();
    let mut weights = Vec::new();
    if let (Some(graph), Some(of)) = (&mut rest.graph, &model.graph) {
        let used = used(of);
        graph.initializer.retain(|tensor| used.contains(tensor.name()) || Weight::of(tensor).is_none());
    }
    let initializers = rest.graph.iter_mut().flat_map(|g| &mut g.initializer);
    for tensor in initializers {
        let Some(weight) = Weight::of(tensor) else { continue };
        let length = Some(weight.bytes.len() as u64);
        let place = Place { location: NOWHERE.into(), offset: 0, length, checksum: None }.entries();
        tensor.raw_data = None;
        tensor.external_data = place.external_data;
        tensor.data_location = place.data_location;
        weights.push(weight);
    }
    (rest, weights)
}

/// Values that some node or graph reads, or that are inputs as well.
fn used(graph: &GraphProto) -> HashSet<&str> {
    let mut used: HashSet<&str> = graph.input.iter().map(|i| i.name()).collect();
    walk_graphs(graph, &mut |_, graph| {
        used.extend(graph.node.iter().flat_map(|n| &n.input).map(String::as_str));
        used.extend(graph.output.iter().map(|o| o.name()));
    });
    used
}

impl Weight {
    fn of(tensor: &TensorProto) -> Option<Self> {
        let bytes = tensor.raw_data.as_ref().filter(|raw| raw.len() >= WORTH_LENDING && !is_external(tensor))?;
        let data_type = DataType::try_from(tensor.data_type()).ok()?;
        let size = size(data_type)?;
        let dims = tensor.dims.clone();
        let count = dims.iter().try_fold(1usize, |n, d| n.checked_mul(usize::try_from(*d).ok()?))?;
        (count.checked_mul(size)? == bytes.len()).then(|| Self {
            // Kernels may read whole elements only at multiples of their size; weights inside a model need not be at one.
            bytes: if (bytes.as_ptr() as usize).is_multiple_of(size) { bytes.clone() } else { aligned(bytes) },
            name: tensor.name().into(),
            dims,
            data_type,
        })
    }

    /// Has sessions of `builder` use the weight.
    pub fn lend(self, builder: &mut SessionBuilder) -> ort::Result<Lent> {
        let value = match self.data_type {
            DataType::Float => self.value::<f32>(),
            DataType::Double => self.value::<f64>(),
            DataType::Float16 => self.value::<half::f16>(),
            DataType::Bfloat16 => self.value::<half::bf16>(),
            DataType::Int64 => self.value::<i64>(),
            DataType::Int32 => self.value::<i32>(),
            DataType::Int8 => self.value::<i8>(),
            _ => self.value::<u8>(),
        }?;
        let name = CString::new(self.name).map_err(|e| ort::Error::new(e.to_string()))?;
        let (api, options) = (ort::api(), builder.ptr().cast_mut());
        // SAFETY: one name and one value, both alive during the calls; the value stays alive as long as the session.
        unsafe {
            // The graph takes the value's address for the file it would look in; the session takes the value itself,
            // where it would copy what it finds in the graph.
            ort::Error::result_from_status((api.AddExternalInitializers)(options, &name.as_ptr(), &value.ptr(), 1))?;
            ort::Error::result_from_status((api.AddInitializer)(options, name.as_ptr(), value.ptr()))?;
        }
        Ok(Lent { _value: value, _bytes: self.bytes })
    }

    fn value<T: PrimitiveTensorElementType + std::fmt::Debug + 'static>(&self) -> ort::Result<DynValueRefMut<'static>> {
        let data = self.bytes.as_ptr().cast_mut().cast();
        // SAFETY: the bytes are as many as the shape needs, aligned, and kept with the value; initializers are only read.
        let value = unsafe { TensorRefMut::<T>::from_raw(MemoryInfo::default(), data, Shape::new(self.dims.clone()))? };
        Ok(value.into_dyn())
    }
}

/// Bytes of an element, for types that are lent.
fn size(data_type: DataType) -> Option<usize> {
    use DataType::*;
    Some(match data_type {
        Double | Int64 => 8,
        Float | Int32 => 4,
        Float16 | Bfloat16 => 2,
        Int8 | Uint8 => 1,
        _ => return None,
    })
}

/// A copy at an address that suits every element type.
fn aligned(bytes: &[u8]) -> Bytes {
    struct Words(Vec<u64>, usize);
    impl AsRef<[u8]> for Words {
        fn as_ref(&self) -> &[u8] {
            &bytemuck::cast_slice(&self.0)[..self.1]
        }
    }
    let mut words = vec![0u64; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
    Bytes::from_owner(Words(words, bytes.len()))
}
