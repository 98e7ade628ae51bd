//! Tensors that stay where an engine computes: what one run leaves is what the next one reads, without a way over the
//! host. On the CPU that is the host's own memory, and everything goes the same way.

use std::fmt;
use std::sync::Arc;

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::value::{DynTensorValueType, DynValue};

use super::{Device, onnxruntime};
use crate::Result;
use crate::onnx::Tensor;

/// A tensor in an engine's memory. What it holds never changes, and its clones are the same one.
#[derive(Clone)]
pub struct Resident(pub(super) Arc<DynValue>);

impl fmt::Debug for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resident({})", self.0.dtype())
    }
}

impl Resident {
    /// Copies it to the host.
    pub fn download(&self) -> Result<Tensor> {
        let tensor = self.0.view().downcast::<DynTensorValueType>().map_err(onnxruntime::told)?;
        let taken = if tensor.memory_info().is_cpu_accessible() {
            onnxruntime::take(&self.0)
        } else {
            let copy = tensor.to(AllocationDevice::CPU, 0).map_err(onnxruntime::told)?;
            onnxruntime::take(&copy.into_dyn())
        };
        taken.map_err(|what| onnxruntime::error(format!("a tensor on the device {what}")))
    }
}

/// The memory of a device, as an engine has opened it.
#[derive(Debug, Clone, Copy)]
pub struct Memory(pub(super) Device);

impl Memory {
    pub fn device(&self) -> Device {
        self.0
    }

    /// Copies a tensor of the host there.
    pub fn upload(&self, tensor: &Tensor) -> Result<Resident> {
        let here = onnxruntime::own(tensor).map_err(onnxruntime::told)?;
        let there = match self.0 {
            Device::Cpu => here,
            Device::Cuda(id) => {
                let tensor = here.downcast::<DynTensorValueType>().map_err(onnxruntime::told)?;
                tensor.to(AllocationDevice::CUDA, id as i32).map_err(onnxruntime::told)?.into_dyn()
            }
        };
        Ok(Resident(Arc::new(there)))
    }

    pub(super) fn info(&self) -> ort::Result<MemoryInfo<'static>> {
        let (device, id) = match self.0 {
            Device::Cpu => (AllocationDevice::CPU, 0),
            Device::Cuda(id) => (AllocationDevice::CUDA, id as i32),
        };
        MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
    }
}
