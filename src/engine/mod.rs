//! Inference engines behind one small trait: ONNX Runtime (a shared library found at run time) and tract (built in).

mod cuda;
mod discover;
mod doctor;
mod elf;
mod guard;
mod lent;
mod log_softmax;
mod onnxruntime;
mod profile;
mod resident;
mod signature;
mod tract;

use std::fmt;
use std::str::FromStr;

use crate::onnx::{ModelProto, Tensor};
use crate::words::words;
use crate::{Error, Result};

pub use discover::{Library, Places};
pub use doctor::{Check, Doctor, doctor};
pub use onnxruntime::OnnxRuntime;
pub use profile::NodeRun;
pub use resident::{Memory, Resident};
pub use tract::Tract;

/// Weights of this many bytes are too many for a second copy of them that is quicker to compute with.
pub(crate) const LARGE_WEIGHTS: usize = 1 << 28;

/// Something that runs ONNX models.
pub trait Engine: Send + Sync {
    /// `"onnxruntime"` or `"tract"`.
    fn name(&self) -> &'static str;

    /// One line for people: version, device, library path.
    fn describe(&self) -> String;

    /// Prepares `model`, whose tensors are all inline (see [`crate::onnx::Model::to_inline`]).
    fn load(&self, model: &ModelProto, options: &LoadOptions) -> Result<Box<dyn Session>>;

    /// Runs `model` twice on `inputs` and says of the second run which node ran where, and for how long.
    ///
    /// # Errors
    /// As [`Engine::load`] and [`Session::run`]; an engine that does not tell.
    fn profile(
        &self,
        _model: &ModelProto,
        _inputs: &[(&str, &Tensor)],
        _options: &LoadOptions,
    ) -> Result<Vec<NodeRun>> {
        Err(Error::config(format!("{} does not tell where its nodes run; use --engine onnxruntime", self.name())))
    }

    /// Where tensors can stay between runs ([`Session::run_resident`]); `None` for an engine that has only the host's.
    fn memory(&self) -> Option<Memory> {
        None
    }
}

/// How a model is prepared.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Threads inside one operator; `None`: the physical cores.
    pub threads: Option<usize>,
    /// False: the engine runs the graph as it stands (to check a graph against its optimised form).
    pub optimize: bool,
}

/// A model ready to run.
pub trait Session: Send {
    /// Names of the inputs that have to be given.
    fn inputs(&self) -> &[String];

    /// Names of the outputs, in the model's order.
    fn outputs(&self) -> &[String];

    /// Runs the model on `inputs` (by name, any order) and returns the outputs named by `wanted`, in that order.
    /// Host tensors are lent, not copied, where the engine can.
    fn run(&mut self, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<Vec<Tensor>>;

    /// [`Session::run`] on tensors of the engine's [`Memory`], which its results stay in. Each of `wanted` is named once.
    ///
    /// # Errors
    /// As [`Session::run`]; an engine without such a memory.
    fn run_resident(&mut self, _inputs: &[(&str, &Resident)], _wanted: &[&str]) -> Result<Vec<Resident>> {
        Err(Error::config("this engine keeps no tensors on a device; use --engine onnxruntime"))
    }
}

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// ONNX Runtime where a usable library is found, else tract.
    #[default]
    Auto,
    OnnxRuntime,
    Tract,
}

words!(EngineKind, "engine" { Auto = "auto", OnnxRuntime = "onnxruntime" | "ort", Tract = "tract" });

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    #[default]
    Cpu,
    /// The CUDA device of this number. Never falls back to the CPU silently.
    Cuda(u32),
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "cpu" => Some(Self::Cpu),
            None if text == "cuda" => Some(Self::Cuda(0)),
            Some(("cuda", id)) => id.parse().ok().map(Self::Cuda),
            _ => None,
        }
        .ok_or_else(|| Error::config(format!("device {text:?} is unknown; there are cpu, cuda and cuda:N")))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(id) => write!(f, "cuda:{id}"),
        }
    }
}

/// How ONNX Runtime takes memory from a device. What is computed does not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Arena {
    pub strategy: ArenaStrategy,
    /// Bytes of a CUDA device that are not exceeded.
    pub limit: Option<usize>,
}

/// How an arena grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ArenaStrategy {
    /// To the next power of two: few allocations, and up to twice the memory (ONNX Runtime's default).
    #[default]
    NextPowerOfTwo,
    /// By what is asked for (CUDA only).
    SameAsRequested,
    /// There is none: every tensor is allocated by itself, slowly, and given back at once (CPU only).
    None,
}

words!(ArenaStrategy, "arena strategy" {
    NextPowerOfTwo = "next-power-of-two",
    SameAsRequested = "same-as-requested",
    None = "none",
});

impl Arena {
    /// Fails on what `device` has not.
    fn check(self, device: Device) -> Result<()> {
        match (device, self.strategy) {
            (Device::Cpu, _) if self.limit.is_some() => {
                Err(Error::config("gpu-mem-limit is for --device cuda; leave it out on the CPU"))
            }
            (Device::Cpu, ArenaStrategy::SameAsRequested) => Err(Error::config(
                "arena-extend-strategy same-as-requested is for --device cuda; on the CPU there are next-power-of-two and none",
            )),
            (Device::Cuda(_), ArenaStrategy::None) => Err(Error::config(
                "arena-extend-strategy none is for the CPU; on CUDA there are next-power-of-two and same-as-requested",
            )),
            _ => Ok(()),
        }
    }
}

/// Opens an engine. One process holds one ONNX Runtime library: the first that is opened stays.
pub fn open(kind: EngineKind, device: Device) -> Result<Box<dyn Engine>> {
    open_with(kind, device, Arena::default())
}

/// [`open`], with settings of its memory (which tract has not).
pub fn open_with(kind: EngineKind, device: Device, arena: Arena) -> Result<Box<dyn Engine>> {
    arena.check(device)?;
    open_in(&Places::from_env(), kind, device, arena)
}

fn open_in(places: &Places, kind: EngineKind, device: Device, arena: Arena) -> Result<Box<dyn Engine>> {
    if kind == EngineKind::Tract {
        return match device {
            Device::Cpu => Ok(Box::new(Tract)),
            Device::Cuda(_) => Err(Error::config("tract runs on the CPU only; CUDA needs --engine onnxruntime")),
        };
    }
    match discover::pick(places, device)? {
        Some(library) => Ok(Box::new(OnnxRuntime::open(&library.path, device)?.with_arena(arena))),
        None if kind == EngineKind::Auto && device == Device::Cpu => Ok(Box::new(Tract)),
        None => Err(onnxruntime::error(discover::none_found(device))),
    }
}

#[cfg(test)]
mod tests;
