//! ONNX Runtime through crate `ort`: the shared library is loaded at run time, and any stock build from 1.24 on serves.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use ndarray::{ArrayD, Dimension};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{OutputSelector, RunOptions, Session as OrtSession, SessionInputValue};
use ort::value::{DynTensorValueType, DynValue, TensorElementType, TensorRef, ValueType};
use prost::Message;

use super::guard::guarded;
use super::lent::{self, Lent};
use super::signature::Signature;
use super::{
    Arena, ArenaStrategy, Device, Engine, LARGE_WEIGHTS, LoadOptions, Memory, NodeRun, Resident, Session, cuda,
    discover, profile,
};
use crate::onnx::{ModelProto, Tensor};
use crate::{Error, Result};

const NAME: &str = "onnxruntime";

/// Protobuf's limit for one message.
const LARGEST_MODEL: usize = i32::MAX as usize;

/// The engine's error, as it speaks.
pub(super) fn error(what: impl Into<String>) -> Error {
    Error::Engine { engine: NAME, what: what.into() }
}

pub(super) fn told<R>(e: ort::Error<R>) -> Error {
    error(e.message().trim())
}

/// The library and its environment. Both are for the life of the process: ONNX Runtime allows one environment only.
struct Runtime {
    environment: Environment,
    path: PathBuf,
    version: String,
}

static RUNTIME: OnceLock<Runtime> = OnceLock::new();

impl Runtime {
    fn get(library: &Path) -> Result<&'static Self> {
        static OPENING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = OPENING.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(runtime) = RUNTIME.get() {
            return Ok(runtime);
        }
        let version = discover::version(library).map_err(|e| error(format!("{}: {e}", library.display())))?;
        // `ort::init` alone would panic where the library cannot be loaded; this tells.
        let builder = ort::init_from(library).map_err(|e| error(e.to_string()))?;
        let environment =
            builder.with_name("bone-onnx").with_telemetry(false).with_logger(Arc::new(log)).build().map_err(told)?;
        environment.set_log_level(LogLevel::Warning);
        Ok(RUNTIME.get_or_init(|| Self { environment, path: library.into(), version }))
    }
}

/// What ONNX Runtime says on its own goes to `tracing`; failures reach the caller as errors besides.
fn log(level: LogLevel, _category: &str, _id: &str, place: &str, message: &str) {
    match level {
        LogLevel::Verbose | LogLevel::Info => tracing::trace!(place, "onnxruntime: {message}"),
        _ => tracing::debug!(place, "onnxruntime: {message}"),
    }
}

/// ONNX Runtime on one device.
pub struct OnnxRuntime {
    runtime: &'static Runtime,
    device: Device,
    arena: Arena,
}

impl OnnxRuntime {
    /// Loads `library` (or goes on with the one this process has loaded) and makes sure that `device` works.
    pub fn open(library: &Path, device: Device) -> Result<Self> {
        let runtime = Runtime::get(library)?;
        let engine = Self { runtime, device, arena: Arena::default() };
        if let Device::Cuda(_) = device {
            cuda::prepare(&runtime.path, &runtime.version)?;
            // Only a session touches the device; a model of one node does.
            engine.load(&super::doctor::tiny_model(), &LoadOptions::default())?;
        }
        Ok(engine)
    }

    /// The same engine with other settings of its memory.
    pub fn with_arena(self, arena: Arena) -> Self {
        Self { arena, ..self }
    }

    /// Execution providers compiled into the library (which need not mean that their devices are there).
    pub fn providers(&self) -> Vec<String> {
        let api = ort::api();
        let (mut names, mut count) = (std::ptr::null_mut(), 0);
        // SAFETY: as the C API documents: an array of `count` C strings, released by the library itself.
        unsafe {
            if ort::Error::result_from_status((api.GetAvailableProviders)(&mut names, &mut count)).is_err() {
                return Vec::new();
            }
            let list = (0..usize::try_from(count).unwrap_or(0))
                .map(|i| std::ffi::CStr::from_ptr(*names.add(i)).to_string_lossy().into_owned())
                .collect();
            let _ = ort::Error::result_from_status((api.ReleaseAvailableProviders)(names, count));
            list
        }
    }

    fn builder(&self, options: &LoadOptions) -> Result<SessionBuilder> {
        let level = if options.optimize { GraphOptimizationLevel::All } else { GraphOptimizationLevel::Disable };
        let threads = options.threads.unwrap_or_else(physical_cores);
        let builder = OrtSession::builder(&self.runtime.environment).map_err(told)?;
        let builder = builder.with_log_level(LogLevel::Warning).map_err(told)?;
        let builder = builder.with_optimization_level(level).map_err(told)?;
        let builder = builder.with_intra_threads(threads).map_err(told)?;
        // A pattern would be one block for all of a run's tensors, taken in the second run beside what the first one took:
        // twice the memory (measured).
        let builder = builder.with_memory_pattern(false).map_err(told)?;
        // Spinning threads halve the speed of a machine that does anything else besides (measured).
        let builder = builder.with_intra_op_spinning(false).map_err(told)?;
        match self.device {
            Device::Cpu if self.arena.strategy == ArenaStrategy::None => {
                let provider = ort::ep::CPU::default().with_arena_allocator(false).build();
                builder.with_execution_providers([provider.error_on_failure()]).map_err(told)
            }
            Device::Cpu => Ok(builder),
            Device::Cuda(id) => {
                // f32 products in TF32 would keep 10 bits; PyTorch's default is full precision too.
                let mut provider = ort::ep::CUDA::default().with_device_id(id as i32).with_tf32(false);
                if self.arena.strategy == ArenaStrategy::SameAsRequested {
                    provider = provider.with_arena_extend_strategy(ort::ep::ArenaExtendStrategy::SameAsRequested);
                }
                if let Some(limit) = self.arena.limit {
                    provider = provider.with_memory_limit(limit);
                }
                builder
                    .with_execution_providers([provider.build().error_on_failure()])
                    .map_err(|e| error(cuda::explain(e.message(), &self.runtime.path)))
            }
        }
    }
}

impl Engine for OnnxRuntime {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        format!("ONNX Runtime {} on {} ({})", self.runtime.version, self.device, self.runtime.path.display())
    }

    fn load(&self, model: &ModelProto, options: &LoadOptions) -> Result<Box<dyn Session>> {
        Ok(Box::new(self.loaded(model, self.builder(options)?)?))
    }

    fn profile(&self, model: &ModelProto, inputs: &[(&str, &Tensor)], options: &LoadOptions) -> Result<Vec<NodeRun>> {
        let dir = tempfile::tempdir().map_err(Error::io("create", std::env::temp_dir()))?;
        let builder = self.builder(options)?.with_profiling(dir.path().join("profile")).map_err(told)?;
        let mut loaded = self.loaded(model, builder)?;
        let outputs = loaded.outputs().to_vec();
        let wanted: Vec<&str> = outputs.iter().map(String::as_str).collect();
        // The first run allocates, and chooses algorithms.
        for _ in 0..2 {
            loaded.run(inputs, &wanted)?;
        }
        let path = PathBuf::from(loaded.session.end_profiling().map_err(told)?);
        profile::read(&std::fs::read_to_string(&path).map_err(Error::io("read", &path))?, 2)
    }

    fn memory(&self) -> Option<Memory> {
        Some(Memory(self.device))
    }
}

impl OnnxRuntime {
    fn loaded(&self, model: &ModelProto, mut builder: SessionBuilder) -> Result<Loaded> {
        let signature = Signature::of(model)?;
        let (rest, weights) = lent::split(model);
        let size = rest.encoded_len();
        if size > LARGEST_MODEL {
            return Err(Error::model(format!(
                "the model is {:.1} GB without the weights of its main graph, but ONNX Runtime takes no more than 2 GB \
                 from memory (protobuf's limit)",
                size as f64 / 1e9
            )));
        }
        let encoded = rest.encode_to_vec();
        drop(rest);
        if weights.iter().map(|w| w.bytes.len()).sum::<usize>() >= LARGE_WEIGHTS {
            // Packed or turned at load time, the weights would be in memory once more.
            builder = builder.with_prepacking(false).map_err(told)?;
            builder = builder.with_disabled_optimizers("ConstantFolding").map_err(told)?;
        }
        let weights =
            weights.into_iter().map(|w| w.lend(&mut builder)).collect::<ort::Result<Vec<_>>>().map_err(told)?;
        let session =
            guarded(|| builder.commit_from_memory(&encoded)).map_err(error)?.map_err(|e| match self.device {
                Device::Cpu => told(e),
                Device::Cuda(_) => error(cuda::explain(e.message(), &self.runtime.path)),
            })?;
        Ok(Loaded { session, signature, memory: Memory(self.device), _weights: weights })
    }
}

struct Loaded {
    // Goes before what it reads.
    session: OrtSession,
    signature: Signature,
    memory: Memory,
    _weights: Vec<Lent>,
}

impl Session for Loaded {
    fn inputs(&self) -> &[String] {
        &self.signature.inputs
    }

    fn outputs(&self) -> &[String] {
        &self.signature.outputs
    }

    fn run(&mut self, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<Vec<Tensor>> {
        self.signature.check(inputs, wanted)?;
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let lent = inputs
            .iter()
            .map(|(name, tensor)| Ok((Cow::Borrowed(*name), lend(tensor).map_err(told)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut selected = OutputSelector::no_default();
        for (i, name) in wanted.iter().enumerate() {
            if !wanted[..i].contains(name) {
                selected = selected.with(*name);
            }
        }
        let options = RunOptions::new().map_err(told)?.with_outputs(selected);
        let outputs = guarded(|| self.session.run_with_options(lent, &options)).map_err(error)?.map_err(told)?;
        wanted
            .iter()
            .map(|name| {
                let value = outputs.get(name).ok_or_else(|| error(format!("output {name:?} was not computed")))?;
                take(value).map_err(|what| error(format!("output {name:?} {what}")))
            })
            .collect()
    }

    fn run_resident(&mut self, inputs: &[(&str, &Resident)], wanted: &[&str]) -> Result<Vec<Resident>> {
        // A new one for each run: outputs that are bound again would be written to where they are.
        let mut binding = self.session.create_binding().map_err(told)?;
        for (name, value) in inputs {
            binding.bind_input(*name, &value.0).map_err(told)?;
        }
        let place = self.memory.info().map_err(told)?;
        for name in wanted {
            binding.bind_output_to_device(*name, &place).map_err(told)?;
        }
        let mut outputs = guarded(|| self.session.run_binding(&binding)).map_err(error)?.map_err(told)?;
        wanted
            .iter()
            .map(|name| {
                let value = outputs.remove(name).ok_or_else(|| error(format!("output {name:?} was not computed")))?;
                Ok(Resident(Arc::new(value)))
            })
            .collect()
    }
}

macro_rules! tensors {
    ($($variant:ident $type:ty, $element:ident;)*) => {
        /// The tensor as ONNX Runtime's, over the same memory (copied only where it is not row-major).
        fn lend(tensor: &Tensor) -> ort::Result<SessionInputValue<'_>> {
            match tensor {
                $(Tensor::$variant(array) => match array.as_slice() {
                    Some(values) => Ok(TensorRef::from_array_view((array.shape().to_vec(), values))?.into()),
                    None => Ok(ort::value::Tensor::from_array(array.as_standard_layout().into_owned())?.into()),
                },)*
                Tensor::Bool(array) => match array.as_slice() {
                    Some(values) => Ok(TensorRef::from_array_view((array.shape().to_vec(), values))?.into()),
                    None => Ok(ort::value::Tensor::from_array(array.as_standard_layout().into_owned())?.into()),
                },
            }
        }

        /// The tensor as one of ONNX Runtime's that keeps its own copy of the values.
        pub(super) fn own(tensor: &Tensor) -> ort::Result<DynValue> {
            Ok(match tensor {
                $(Tensor::$variant(array) =>
                    ort::value::Tensor::from_array(array.as_standard_layout().into_owned())?.into_dyn(),)*
                Tensor::Bool(array) =>
                    ort::value::Tensor::from_array(array.as_standard_layout().into_owned())?.into_dyn(),
            })
        }

        /// A value on the host as a tensor.
        pub(super) fn take(value: &DynValue) -> Result<Tensor, String> {
            let ValueType::Tensor { ty, .. } = value.dtype() else {
                return Err(format!("is no tensor, but {}", value.dtype()));
            };
            match ty {
                // Bytes of a boolean need not be 0 or 1 in a hostile model, so they are not taken as `bool`.
                TensorElementType::Bool => bools(value),
                $(TensorElementType::$element => {
                    let (shape, values) = value.try_extract_tensor::<$type>().map_err(|e| e.to_string())?;
                    let array = ArrayD::from_shape_vec(shape.to_ixdyn(), values.to_vec());
                    array.map(Tensor::$variant).map_err(|e| e.to_string())
                })*
                other => Err(format!("has elements of type {other}, which are not supported")),
            }
        }
    };
}

tensors! {
    F32 f32, Float32;
    F64 f64, Float64;
    F16 half::f16, Float16;
    Bf16 half::bf16, Bfloat16;
    I64 i64, Int64;
    I32 i32, Int32;
    I16 i16, Int16;
    I8 i8, Int8;
    U64 u64, Uint64;
    U32 u32, Uint32;
    U16 u16, Uint16;
    U8 u8, Uint8;
}

fn bools(value: &DynValue) -> Result<Tensor, String> {
    let tensor = value.view().downcast::<DynTensorValueType>().map_err(|e| e.to_string())?;
    let dims = tensor.shape().to_ixdyn();
    let start = tensor.data_ptr().cast::<u8>();
    let bytes = if start.is_null() {
        &[]
    } else {
        // SAFETY: session outputs stand in host memory, and a boolean takes one byte.
        unsafe { std::slice::from_raw_parts(start, dims.size()) }
    };
    let values = bytes.iter().map(|b| *b != 0).collect();
    ArrayD::from_shape_vec(dims, values).map(Tensor::Bool).map_err(|e| e.to_string())
}

/// Cores that this process may use, counting two threads of one core once.
fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    let topology = |cpu: usize, what: &str| {
        std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/{what}")).ok()
    };
    let cores: std::collections::HashSet<_> =
        (0..).map_while(|cpu| Some((topology(cpu, "physical_package_id")?, topology(cpu, "core_id")?))).collect();
    if cores.is_empty() { logical } else { cores.len().min(logical) }
}
