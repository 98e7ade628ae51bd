//! The metrics as TensorBoard reads them: an event file in TFRecord form, each record a length and a protobuf message
//! with masked CRC-32C checksums (`tensorflow/core/lib/io/record_writer.h`, `tensorflow/core/util/event.proto`).

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::metrics::{EvalReport, History, StepReport};
use crate::{Error, Result};

/// Its place in the run's directory. TensorBoard looks for "tfevents" in the name.
pub const FILE: &str = "tensorboard/events.out.tfevents.bone-onnx";
const VERSION: &str = "brain.Event:2";
/// No event that is written here is longer.
const LONGEST: u64 = 4096;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An event file, open for writing.
pub struct EventsFile {
    path: PathBuf,
    file: File,
}

impl EventsFile {
    /// Starts the file anew.
    pub fn create(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        }
        let file = File::create(path).map_err(Error::io("create", path))?;
        let mut events = Self { path: path.into(), file };
        events.write(&Event { wall_time: now(), file_version: Some(VERSION.into()), ..Event::default() })?;
        Ok(events)
    }

    /// Goes on behind the events of `history`. Where the file does not hold all of them, it is written anew.
    pub fn go_on(path: &Path, history: &History) -> Result<Self> {
        if let Some(len) = length_of(path, history) {
            let mut file = OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
            file.set_len(len).and_then(|()| file.seek(SeekFrom::End(0))).map_err(Error::io("cut", path))?;
            return Ok(Self { path: path.into(), file });
        }
        let mut events = Self::create(path)?;
        let mut evals = history.evals.iter().peekable();
        for step in &history.steps {
            events.step(step)?;
            while let Some(eval) = evals.next_if(|eval| eval.step <= step.step) {
                events.eval(eval)?;
            }
        }
        Ok(events)
    }

    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        let StepReport { step, loss, lr, grad_norm, seconds: _ } = *report;
        self.scalars(step, &[("train/loss", loss), ("train/learning_rate", lr), ("train/grad_norm", grad_norm)])
    }

    pub fn eval(&mut self, report: &EvalReport) -> Result<()> {
        let EvalReport { step, eval_loss, eval_accuracy } = *report;
        let accuracy = eval_accuracy.map(|accuracy| ("eval/accuracy", accuracy));
        let values: Vec<_> = std::iter::once(("eval/loss", eval_loss)).chain(accuracy).collect();
        self.scalars(step, &values)
    }

    fn scalars(&mut self, step: usize, values: &[(&str, f64)]) -> Result<()> {
        let value = |(tag, value): &(&str, f64)| Value { tag: (*tag).into(), simple_value: Some(*value as f32) };
        let summary = Summary { value: values.iter().map(value).collect() };
        self.write(&Event { wall_time: now(), step: step as i64, summary: Some(summary), file_version: None })
    }

    /// Adds one record; it is with the operating system when this returns.
    fn write(&mut self, event: &Event) -> Result<()> {
        let data = event.encode_to_vec();
        let len = (data.len() as u64).to_le_bytes();
        let record = [&len[..], &masked_crc(&len).to_le_bytes(), &data, &masked_crc(&data).to_le_bytes()].concat();
        self.file.write_all(&record).map_err(Error::io("write", &self.path))
    }
}

/// How long the file is with the events of `history` and none after; `None` where they are not what it begins with.
fn length_of(path: &Path, history: &History) -> Option<u64> {
    let mut file = BufReader::new(File::open(path).ok()?);
    let first = next(&mut file)?;
    (first.file_version.as_deref() == Some(VERSION)).then_some(())?;
    let mut last = first;
    for _ in 0..history.steps.len() + history.evals.len() {
        last = next(&mut file)?;
    }
    (last.step == history.steps.last().map_or(0, |s| s.step) as i64).then_some(())?;
    file.stream_position().ok()
}

/// The next whole record.
fn next(file: &mut impl Read) -> Option<Event> {
    let mut read = |len: u64| {
        let mut bytes = Vec::new();
        file.take(len).read_to_end(&mut bytes).ok()?;
        (bytes.len() as u64 == len).then_some(bytes)
    };
    let mut checked = |len: u64| {
        let bytes = read(len)?;
        let crc = read(4)?;
        (crc == masked_crc(&bytes).to_le_bytes()).then_some(bytes)
    };
    let len = u64::from_le_bytes(checked(8)?.try_into().ok()?);
    Event::decode(checked(Some(len).filter(|len| *len <= LONGEST)?)?.as_slice()).ok()
}

/// TFRecord's checksum: turned and shifted, so that data with checksums in it does not check itself.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(path: &Path) -> Vec<Event> {
        let mut file = BufReader::new(File::open(path).unwrap());
        std::iter::from_fn(|| next(&mut file)).collect()
    }

    fn step(step: usize) -> StepReport {
        StepReport { step, loss: step as f64, lr: 0.5, grad_norm: 2.0, seconds: 0.1 }
    }

    #[test]
    fn the_checksum_is_that_of_a_record_tensorflow_wrote() {
        // The header of every event file that begins with a wall time and "brain.Event:2" (24 bytes).
        assert_eq!(masked_crc(&24u64.to_le_bytes()).to_le_bytes(), [0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_resumed_file_holds_what_a_file_written_at_once_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let eval = |step, eval_accuracy| EvalReport { step, eval_loss: 0.25, eval_accuracy };
        let mut events = EventsFile::create(&path).unwrap();
        for n in 1..=6 {
            events.step(&step(n)).unwrap();
            if n % 2 == 0 {
                events.eval(&eval(n, Some(0.5))).unwrap();
            }
        }
        let whole = all(&path);
        assert_eq!(whole.len(), 10);
        let history =
            History { steps: (1..=4).map(step).collect(), evals: vec![eval(2, Some(0.5)), eval(4, Some(0.5))] };
        let same = |events: &[Event]| {
            let plain = |e: &Event| Event { wall_time: 0.0, ..e.clone() };
            events.iter().map(plain).eq(whole[..events.len()].iter().map(plain))
        };
        // Cut back to what belongs to the checkpoint, wall times and all.
        drop(EventsFile::go_on(&path, &history).unwrap());
        assert_eq!(all(&path), whole[..7]);
        // Damaged, too short, or gone: written anew.
        for damage in [Some(300), Some(5), None] {
            match damage {
                Some(at) => {
                    let mut bytes = std::fs::read(&path).unwrap();
                    bytes[at] ^= 1;
                    std::fs::write(&path, &bytes).unwrap();
                }
                None => std::fs::remove_file(&path).unwrap(),
            }
            let mut events = EventsFile::go_on(&path, &history).unwrap();
            assert!(same(&all(&path)) && all(&path).len() == 7);
            events.step(&step(5)).unwrap();
            assert!(same(&all(&path)) && all(&path).len() == 8);
        }
    }
}
