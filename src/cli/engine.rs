//! The flags that choose an engine, shared by every command that runs a model.

use super::printer::Printer;
use crate::Result;
use crate::engine::{self, Arena, ArenaStrategy, Device, Engine, EngineKind, LoadOptions};

#[derive(clap::Args, Clone)]
pub struct EngineArgs {
    /// auto (ONNX Runtime where a library is found, else tract), onnxruntime or tract
    #[arg(long, default_value = "auto")]
    pub engine: EngineKind,

    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,

    /// Threads inside an operator [default: the physical cores]
    #[arg(long)]
    pub threads: Option<usize>,

    /// How ONNX Runtime's memory grows: next-power-of-two, same-as-requested (CUDA: less memory), none (CPU: least memory,
    /// several times slower)
    #[arg(long, default_value = "next-power-of-two")]
    pub arena_extend_strategy: ArenaStrategy,

    /// MiB of a CUDA device's memory that are not exceeded
    #[arg(long, value_name = "MIB")]
    pub gpu_mem_limit: Option<usize>,
}

impl EngineArgs {
    /// Opens the engine and says which it is.
    pub fn open(&self, printer: &Printer) -> Result<Box<dyn Engine>> {
        let limit = self.gpu_mem_limit.map(|mebibytes| mebibytes.saturating_mul(1 << 20));
        let arena = Arena { strategy: self.arena_extend_strategy, limit };
        let engine = engine::open_with(self.engine, self.device, arena)?;
        printer.say(format!("engine: {}", engine.describe()));
        Ok(engine)
    }

    pub fn load_options(&self) -> LoadOptions {
        LoadOptions { threads: self.threads, optimize: true }
    }
}
