//! What a run reports, and `metrics.jsonl`: a line for every step and every evaluation, on disk as soon as it happened.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
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

/// Its name in the run's directory.
pub const FILE: &str = "metrics.jsonl";

/// `metrics.jsonl`, open for writing.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
}

impl MetricsFile {
    /// Starts the file anew.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(Self { path: path.into(), file, len: 0 })
    }

    /// Cuts the file back to its first `len` bytes and goes on behind them.
    pub fn go_on(path: &Path, len: u64) -> Result<Self> {
        let mut file = OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
        file.set_len(len).and_then(|()| file.seek(SeekFrom::End(0))).map_err(Error::io("cut", path))?;
        Ok(Self { path: path.into(), file, len })
    }

    /// Adds one line; it is with the operating system when this returns.
    pub fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line).map_err(|e| Error::io("write", &self.path)(e.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io("write", &self.path))?;
        self.len += text.len() as u64;
        Ok(())
    }

    /// Returns how long the file is, once all of it is on the disk.
    pub fn sync(&mut self) -> Result<u64> {
        self.file.sync_data().map_err(Error::io("write", &self.path))?;
        Ok(self.len)
    }
}

/// What `metrics.jsonl` tells of the steps taken so far.
#[derive(Debug, Default, PartialEq)]
pub struct History {
    pub steps: Vec<StepReport>,
    pub evals: Vec<EvalReport>,
}

/// Reads the first `len` bytes of a `metrics.jsonl`, to the bit; or says what is wrong with them.
pub fn read(path: &Path, len: u64) -> Result<History, String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(len).read_to_string(&mut text))
        .map_err(|e| format!("{FILE} cannot be read: {e}"))?;
    if text.len() as u64 != len {
        return Err(format!("{FILE} has {} bytes of the {len} that belong to it", text.len()));
    }
    let mut history = History::default();
    for (at, line) in text.lines().enumerate() {
        let broken = || format!("line {} of {FILE} is none of a step or an evaluation", at + 1);
        let step = number(line, "step").ok_or_else(broken)? as usize;
        if let Some(eval_loss) = number(line, "eval_loss") {
            history.evals.push(EvalReport { step, eval_loss, eval_accuracy: number(line, "eval_accuracy") });
        } else {
            let number = |key| number(line, key).ok_or_else(broken);
            let (loss, lr) = (number("loss")?, number("lr")?);
            let (grad_norm, seconds) = (number("grad_norm")?, number("seconds")?);
            history.steps.push(StepReport { step, loss, lr, grad_norm, seconds });
        }
    }
    Ok(history)
}

/// The number of a key in a flat line that [`MetricsFile::write`] wrote. serde_json's own reading is off by a last bit
/// now and then.
fn number(line: &str, key: &str) -> Option<f64> {
    let (_, rest) = line.split_once(&format!("\"{key}\":"))?;
    match rest.split([',', '}']).next()? {
        "null" => Some(f64::NAN),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_to_the_bit_and_cut_where_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let third = |n: usize| 1.0 / (3.0 + n as f64).powi(20);
        let step = |n| StepReport { step: n, loss: third(n), lr: 1e-300, grad_norm: 1e22, seconds: third(n + 100) };
        let steps: Vec<StepReport> = (1..200).map(step).collect();
        let evals = [None, Some(0.1)].map(|eval_accuracy| EvalReport { step: 9, eval_loss: third(5), eval_accuracy });
        let mut file = MetricsFile::create(&path).unwrap();
        steps.iter().for_each(|s| file.write(s).unwrap());
        evals.iter().for_each(|e| file.write(e).unwrap());
        let whole = file.sync().unwrap();
        file.write(&step(200)).unwrap();
        drop(file);

        let expected = History { steps, evals: evals.to_vec() };
        assert_eq!(read(&path, whole).unwrap(), expected);
        let mut file = MetricsFile::go_on(&path, whole).unwrap();
        file.write(&EvalReport { step: 200, eval_loss: f64::NAN, eval_accuracy: None }).unwrap();
        let len = file.sync().unwrap();
        assert_eq!(len, std::fs::metadata(&path).unwrap().len());
        assert!(read(&path, len).unwrap().evals[2].eval_loss.is_nan());
        assert!(read(&path, len + 1).unwrap_err().contains("bytes"));
        assert!(read(&path, len - 4).unwrap_err().contains("line 202"));
    }
}
