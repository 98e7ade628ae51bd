//! Host tensors: n-dimensional arrays of any element type the engines exchange, and their passage to and from
//! [`TensorProto`].

use std::io::Write;

use bytemuck::Pod;
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};

use super::{DataType, Due, TensorProto};
use crate::{Error, Result};

macro_rules! tensor {
    ($($variant:ident $type:ty, $onnx:ident, $name:literal;)*) => {
        /// A tensor in host memory, row-major.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Tensor {
            $(#[doc = $name] $variant(ArrayD<$type>),)*
            /// bool
            Bool(ArrayD<bool>),
        }

        /// Element types that are plain numbers.
        pub trait Element: Pod + Send + Sync {
            const TYPE: DataType;
            fn wrap(array: ArrayD<Self>) -> Tensor;
            fn view(tensor: &Tensor) -> Option<&ArrayD<Self>>;
        }

        $(impl Element for $type {
            const TYPE: DataType = DataType::$onnx;
            fn wrap(array: ArrayD<Self>) -> Tensor { Tensor::$variant(array) }
            fn view(tensor: &Tensor) -> Option<&ArrayD<Self>> {
                if let Tensor::$variant(a) = tensor { Some(a) } else { None }
            }
        })*

        $(impl From<ArrayD<$type>> for Tensor {
            fn from(array: ArrayD<$type>) -> Self { Tensor::$variant(array) }
        })*

        impl Tensor {
            /// Shape, outermost dimension first; empty for a scalar.
            pub fn dims(&self) -> &[usize] {
                match self { $(Tensor::$variant(a) => a.shape(),)* Tensor::Bool(a) => a.shape() }
            }

            pub fn data_type(&self) -> DataType {
                match self { $(Tensor::$variant(_) => DataType::$onnx,)* Tensor::Bool(_) => DataType::Bool }
            }

            /// Little-endian bytes of the elements in row-major order, as `raw_data` wants them.
            pub fn to_bytes(&self) -> Vec<u8> {
                match self {
                    $(Tensor::$variant(a) => bytemuck::cast_slice(&a.as_standard_layout().as_slice().unwrap_or(&[])).to_vec(),)*
                    Tensor::Bool(a) => a.iter().map(|b| u8::from(*b)).collect(),
                }
            }

            /// Writes what [`Tensor::to_bytes`] gives, without a copy of it where the elements lie in one piece.
            pub fn write_bytes(&self, out: &mut dyn Write) -> std::io::Result<()> {
                match self {
                    $(Tensor::$variant(a) => match a.as_slice() {
                        Some(values) => out.write_all(bytemuck::cast_slice(values)),
                        None => out.write_all(&self.to_bytes()),
                    },)*
                    Tensor::Bool(_) => out.write_all(&self.to_bytes()),
                }
            }

            /// Bytes that [`Tensor::to_bytes`] gives.
            pub fn byte_len(&self) -> usize {
                match self { $(Tensor::$variant(a) => a.len() * size_of::<$type>(),)* Tensor::Bool(a) => a.len() }
            }

            /// A tensor of `dims` from little-endian bytes; the length must fit exactly.
            pub fn from_bytes(data_type: DataType, dims: &[usize], bytes: &[u8]) -> Result<Self, String> {
                match data_type {
                    $(DataType::$onnx => {
                        let values: Vec<$type> = numbers(bytes, dims)?;
                        Ok(Tensor::$variant(shaped(dims, values)?))
                    })*
                    DataType::Bool => {
                        let values: Vec<u8> = numbers(bytes, dims)?;
                        Ok(Tensor::Bool(shaped(dims, values.into_iter().map(|b| b != 0).collect())?))
                    }
                    other => Err(format!("elements of type {} cannot be read as numbers", other.as_str_name())),
                }
            }

            /// Zeros of `dims`.
            pub fn zeros(data_type: DataType, dims: &[usize]) -> Result<Self, String> {
                match data_type {
                    $(DataType::$onnx => Ok(Tensor::$variant(ArrayD::from_elem(IxDyn(dims), bytemuck::Zeroable::zeroed()))),)*
                    DataType::Bool => Ok(Tensor::Bool(ArrayD::from_elem(IxDyn(dims), false))),
                    other => Err(format!("there is no zero of type {}", other.as_str_name())),
                }
            }
        }

        /// The name that NumPy and PEFT use for an element type (`float32`, `int8`, …).
        pub fn data_type_name(data_type: DataType) -> &'static str {
            match data_type {
                $(DataType::$onnx => $name,)*
                DataType::Bool => "bool",
                other => other.as_str_name(),
            }
        }
    };
}

tensor! {
    F32 f32, Float, "float32";
    F64 f64, Double, "float64";
    F16 f16, Float16, "float16";
    Bf16 bf16, Bfloat16, "bfloat16";
    I64 i64, Int64, "int64";
    I32 i32, Int32, "int32";
    I16 i16, Int16, "int16";
    I8 i8, Int8, "int8";
    U64 u64, Uint64, "uint64";
    U32 u32, Uint32, "uint32";
    U16 u16, Uint16, "uint16";
    U8 u8, Uint8, "uint8";
}

impl From<ArrayD<bool>> for Tensor {
    fn from(array: ArrayD<bool>) -> Self {
        Tensor::Bool(array)
    }
}

impl From<Tensor> for Due {
    fn from(tensor: Tensor) -> Self {
        Due { len: tensor.byte_len(), write: Box::new(move |out| Ok(tensor.write_bytes(out)?)) }
    }
}

impl Tensor {
    pub fn scalar<T: Element>(value: T) -> Self {
        T::wrap(ArrayD::from_elem(IxDyn(&[]), value))
    }

    /// A tensor of `dims` over `values`, row-major. Panics where the lengths differ, so only for sizes we chose.
    pub fn new<T: Element>(dims: &[usize], values: Vec<T>) -> Self {
        T::wrap(ArrayD::from_shape_vec(IxDyn(dims), values).expect("as many values as the shape holds"))
    }

    pub fn len(&self) -> usize {
        self.dims().iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in row-major order, where the element type is `T` and they lie in one piece.
    pub fn values<T: Element>(&self) -> Option<&[T]> {
        T::view(self).and_then(|a| a.as_slice())
    }

    /// The only element of a one-element float or integer tensor.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            _ if self.len() != 1 => None,
            Tensor::F32(a) => a.first().map(|v| f64::from(*v)),
            Tensor::F64(a) => a.first().copied(),
            Tensor::F16(a) => a.first().map(|v| v.to_f64()),
            Tensor::Bf16(a) => a.first().map(|v| v.to_f64()),
            Tensor::I64(a) => a.first().map(|v| *v as f64),
            Tensor::I32(a) => a.first().map(|v| f64::from(*v)),
            _ => None,
        }
    }

    /// All elements as `f64`, row-major (for comparisons).
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Tensor::F32(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::F64(a) => a.iter().copied().collect(),
            Tensor::F16(a) => a.iter().map(|v| v.to_f64()).collect(),
            Tensor::Bf16(a) => a.iter().map(|v| v.to_f64()).collect(),
            Tensor::I64(a) => a.iter().map(|v| *v as f64).collect(),
            Tensor::I32(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::I16(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::I8(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::U64(a) => a.iter().map(|v| *v as f64).collect(),
            Tensor::U32(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::U16(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::U8(a) => a.iter().map(|v| f64::from(*v)).collect(),
            Tensor::Bool(a) => a.iter().map(|v| f64::from(u8::from(*v))).collect(),
        }
    }

    /// As an initializer: `raw_data`, no external file.
    pub fn to_proto(&self, name: &str) -> TensorProto {
        TensorProto {
            name: Some(name.into()),
            dims: self.dims().iter().map(|d| *d as i64).collect(),
            data_type: Some(self.data_type() as i32),
            raw_data: Some(self.to_bytes().into()),
            ..Default::default()
        }
    }

    /// An inline tensor's value, whichever field holds it (external data: [`super::Model::tensor`]).
    pub fn from_proto(proto: &TensorProto) -> Result<Self> {
        let dims = proto_dims(proto)?;
        let data_type = proto_type(proto)?;
        let named = |what| Error::model(format!("tensor {}: {what}", proto.name()));
        if let Some(raw) = &proto.raw_data {
            return Self::from_bytes(data_type, &dims, raw).map_err(named);
        }
        Self::from_bytes(data_type, &dims, &typed_bytes(proto, data_type)).map_err(named)
    }
}

/// Element type of a tensor, or an error for a number the schema does not know.
pub fn proto_type(proto: &TensorProto) -> Result<DataType> {
    DataType::try_from(proto.data_type())
        .map_err(|_| Error::model(format!("tensor {}: unknown element type {}", proto.name(), proto.data_type())))
}

/// Shape of a tensor, checked: no negative dimension, and the number of elements fits in memory's address space.
pub fn proto_dims(proto: &TensorProto) -> Result<Vec<usize>> {
    let bad = || Error::model(format!("tensor {}: impossible shape {:?}", proto.name(), proto.dims));
    let dims = proto.dims.iter().map(|d| usize::try_from(*d).map_err(|_| bad())).collect::<Result<Vec<_>>>()?;
    dims.iter()
        .try_fold(1usize, |n, d| n.checked_mul(*d))
        .and_then(|n| n.checked_mul(16))
        .filter(|n| isize::try_from(*n).is_ok())
        .ok_or_else(bad)?;
    Ok(dims)
}

/// Raw bytes of a tensor kept in one of the typed fields (`float_data`, `int64_data`, …).
pub(super) fn typed_bytes(proto: &TensorProto, data_type: DataType) -> Vec<u8> {
    use DataType::*;
    match data_type {
        Float => bytemuck::cast_slice(&proto.float_data).to_vec(),
        Double => bytemuck::cast_slice(&proto.double_data).to_vec(),
        Int64 => bytemuck::cast_slice(&proto.int64_data).to_vec(),
        Uint64 => bytemuck::cast_slice(&proto.uint64_data).to_vec(),
        Uint32 => proto.uint64_data.iter().flat_map(|v| (*v as u32).to_le_bytes()).collect(),
        Int32 => bytemuck::cast_slice(&proto.int32_data).to_vec(),
        Int16 | Uint16 | Float16 | Bfloat16 => {
            proto.int32_data.iter().flat_map(|v| (*v as u16).to_le_bytes()).collect()
        }
        // Those of 4 bits stand in pairs.
        Int8 | Uint8 | Bool | Int4 | Uint4 => proto.int32_data.iter().map(|v| *v as u8).collect(),
        _ => Vec::new(),
    }
}

fn numbers<T: Pod>(bytes: &[u8], dims: &[usize]) -> Result<Vec<T>, String> {
    let wanted = dims.iter().product::<usize>() * size_of::<T>();
    if bytes.len() != wanted {
        return Err(format!("shape {dims:?} needs {wanted} bytes, but there are {}", bytes.len()));
    }
    // The bytes need not be aligned in the file, so they are copied.
    let mut values = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
    Ok(values)
}

fn shaped<T>(dims: &[usize], values: Vec<T>) -> Result<ArrayD<T>, String> {
    ArrayD::from_shape_vec(IxDyn(dims), values).map_err(|e| e.to_string())
}
