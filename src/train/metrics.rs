//! What a run reports, and `metrics.jsonl`: a line for every step and every evaluation, on disk as soon as it happened.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Error, Result};

/// One optimizer step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepReport {
    /// Counted from 1.
    pub step: usize,
    /// Of this step's batch, before the update.
    pub loss: f64,
    /// Learning rate of the adapters in this update.
    pub lr: f64,
    /// Over all gradients together, before clipping.
    pub grad_norm: f64,
    /// Time that the step took.
    pub seconds: f64,
}

/// One pass over the evaluation data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalReport {
    /// Steps taken before it.
    pub step: usize,
    pub eval_loss: f64,
    /// Share of labels (other than −100) whose class has the highest score; cross-entropy only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
}

/// `metrics.jsonl`, open for writing.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Starts the file anew.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Self { path: path.into(), file })
    }

    /// Adds one line; it is with the operating system when this returns.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line).map_err(|e| Error::io("write", &self.path)(e.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io("write", &self.path))
    }
}
