//! The flags that choose an engine, shared by every command that runs a model.

use super::printer::Printer;
use crate::Result;
use crate::engine::{self, Device, Engine, EngineKind, LoadOptions};

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
}

impl EngineArgs {
    /// Opens the engine and says which it is.
    pub fn open(&self, printer: &Printer) -> Result<Box<dyn Engine>> {
        let engine = engine::open(self.engine, self.device)?;
        printer.say(format!("engine: {}", engine.describe()));
        Ok(engine)
    }

    pub fn load_options(&self) -> LoadOptions {
        LoadOptions { threads: self.threads, optimize: true }
    }
}
