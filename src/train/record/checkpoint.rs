//! Checkpoints: what a run needs to go on with the same bits, in `checkpoint-<step>/` of its directory.
//!
//! `training_state.safetensors` holds the parameters, their values before the last update and at the best evaluation,
//! and the optimizer's moments. `trainer_state.json` holds the counters, the run's settings, and checksums of both files. The directory is
//! filled under another name and renamed once it is on the disk, so a checkpoint is there whole or not at all; older
//! ones go only after that.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::fingerprint::{self, Settings};
use super::metrics::{self, History};
use super::save;
use crate::engine::Engine;
use crate::onnx::external::map_file;
use crate::onnx::{Model, sync_dir};
use crate::train::TrainOptions;
use crate::train::graph::Parameter;
use crate::train::graph::scale::LossScale;
use crate::train::trainer::Trainer;
use crate::train::update::step::Learned;
use crate::{Error, Result};

const STATE: &str = "trainer_state.json";
const TENSORS: &str = "training_state.safetensors";
const PREFIX: &str = "checkpoint-";
/// What a directory is called while it is filled, or while it is taken away.
const UNFINISHED: &str = ".bone-onnx-checkpoint-";
const FORMAT: u32 = 1;

/// Everything between two steps that is no array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    /// Steps taken.
    step: usize,
    /// Place in the data: the order of an epoch follows from its number and the seed.
    epoch: u64,
    row: usize,
    /// Updates that the optimizer has counted.
    updates: i32,
    /// Runs of the gradient graph; a layer with dropout draws another mask in each.
    runs: u64,
    /// What the loss is multiplied by, for models that compute in halves; a power of two.
    loss_scale: Option<f32>,
    /// Steps since that changed; not there where it is 0, as in checkpoints from before it was counted.
    #[serde(default, skip_serializing_if = "is_zero")]
    finite_steps: u32,
    /// How much of `metrics.jsonl` belongs to these steps.
    metrics_bytes: u64,
    tensors_crc32: u32,
    settings: Settings,
}

/// `trainer_state.json`
#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    /// Of `state` as compact JSON.
    crc32: u32,
    state: State,
}

/// A checkpoint that was read and is whole.
pub(in crate::train) struct Saved {
    state: State,
    tensors: Bytes,
    path: PathBuf,
    /// What was reported up to then.
    pub history: History,
}

impl Saved {
    pub fn step(&self) -> usize {
        self.state.step
    }

    pub fn runs(&self) -> u64 {
        self.state.runs
    }

    pub fn metrics_bytes(&self) -> u64 {
        self.state.metrics_bytes
    }
}

/// The checkpoints of one run.
pub(in crate::train) struct Checkpoints<'a> {
    dir: &'a Path,
    every: Option<usize>,
    limit: Option<usize>,
    model: &'a Model,
    options: &'a TrainOptions,
    engine: &'a dyn Engine,
    /// Made once checkpoints are asked for or come about: the checksums read the whole model and all data.
    settings: OnceCell<Settings>,
    /// The step of the newest whole one.
    last: Option<usize>,
}

impl<'a> Checkpoints<'a> {
    pub fn new(model: &'a Model, options: &'a TrainOptions, engine: &'a dyn Engine) -> Self {
        let (dir, every, limit) = (&options.out, options.save_steps, options.save_total_limit);
        Self { dir, every, limit, model, options, engine, settings: OnceCell::new(), last: None }
    }

    /// The run's settings and the checksums of its files.
    fn settings(&self) -> Result<&Settings> {
        if let Some(settings) = self.settings.get() {
            return Ok(settings);
        }
        let settings = fingerprint::settings(self.model, self.options, self.engine)?;
        Ok(self.settings.get_or_init(|| settings))
    }

    /// The checkpoint to go on from where `resume` is asked for; `None` where there is none yet. One that is damaged is
    /// told to `warn`, and the one before it is taken.
    ///
    /// # Errors
    /// Settings or files that have changed since, by name; checkpoints of which none is whole; without `resume`, any
    /// checkpoint.
    pub fn resume(&mut self, resume: bool, warn: &mut dyn FnMut(&str)) -> Result<Option<Saved>> {
        if self.every.is_some() {
            // What the files hold as the run begins.
            self.settings()?;
        }
        let steps = self.steps()?;
        let Some(newest) = steps.last() else { return Ok(None) };
        if !resume {
            return Err(Error::config(format!(
                "{} holds checkpoints of an earlier run, up to step {newest}; go on with it by --resume, remove them, or \
                 choose another directory",
                self.dir.display()
            )));
        }
        for step in steps.iter().rev() {
            match self.read(*step) {
                Ok(saved) => {
                    if let Some(changes) = fingerprint::changes(&saved.state.settings, self.settings()?) {
                        return Err(Error::config(format!(
                            "{} cannot be gone on with, as the result would be another one than that of a run which \
                             was never interrupted: {changes}. Set it back, or train into another directory",
                            self.path(*step).display()
                        )));
                    }
                    self.last = Some(*step);
                    return Ok(Some(saved));
                }
                Err(what) => warn(&format!("{} is passed over: {what}", self.path(*step).display())),
            }
        }
        Err(Error::data(format!(
            "{}: none of the checkpoints is whole; remove them to train from the start",
            self.dir.display()
        )))
    }

    /// Whether one is to be saved after `step`, which may be the `last` one.
    pub fn due(&self, step: usize, last: bool) -> bool {
        self.every.is_some_and(|every| step.is_multiple_of(every) || last)
    }

    /// The newest whole one.
    pub fn last(&self) -> Option<PathBuf> {
        self.last.map(|step| self.path(step))
    }

    /// Says with an error of the file system which checkpoint is there to go on from.
    pub fn hint(&self, error: Error) -> Error {
        match (error, self.last()) {
            (Error::Io { action, path, source }, Some(last)) => Error::File {
                path,
                what: format!(
                    "cannot {action}: {source}. {} is whole: make room and go on from it with --resume",
                    last.display()
                ),
            },
            (error, _) => error,
        }
    }

    /// Removes what a process that was killed left half written or half removed.
    pub fn sweep(&self) -> Result<()> {
        for name in self.names()? {
            if name.starts_with(UNFINISHED) {
                let path = self.dir.join(name);
                fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }

    fn path(&self, step: usize) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step}"))
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("read", self.dir)(e)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(Error::io("read", self.dir))?.file_name();
            names.extend(name.into_string());
        }
        Ok(names)
    }

    /// The steps that have a checkpoint, in order.
    fn steps(&self) -> Result<Vec<usize>> {
        let names = self.names()?;
        let step = |name: &String| {
            let step: usize = name.strip_prefix(PREFIX)?.parse().ok()?;
            (*name == format!("{PREFIX}{step}")).then_some(step)
        };
        let mut steps: Vec<usize> = names.iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Reads the checkpoint of `step`, or says why it is not whole.
    fn read(&self, step: usize) -> Result<Saved, String> {
        let path = self.path(step);
        let file = |name: &str| map_file(&path.join(name)).map_err(|e| format!("{name} cannot be read: {e}"));
        let text = file(STATE)?;
        let StateFile { format, crc32, state } =
            serde_json::from_slice(&text).map_err(|e| format!("{STATE} is damaged: {e}"))?;
        if format != FORMAT {
            return Err(format!("{STATE} has format {format}, of which this version knows nothing"));
        }
        if crc32 != checksum(&state)? || state.step != step {
            return Err(format!("{STATE} is damaged: its checksum is another one"));
        }
        let tensors = file(TENSORS)?;
        if crc32fast::hash(&tensors) != state.tensors_crc32 {
            return Err(format!("{TENSORS} is damaged: its checksum is another one"));
        }
        let history = metrics::read(&self.dir.join(metrics::FILE), state.metrics_bytes)?;
        if history.steps.len() != step {
            return Err(format!("{} holds {} steps of its {step}", metrics::FILE, history.steps.len()));
        }
        Ok(Saved { state, tensors, path, history })
    }

    /// Writes a checkpoint, whole or not at all, and takes away those beyond the limit.
    fn write(&mut self, mut state: State, tensors: Vec<u8>) -> Result<()> {
        let (step, target) = (state.step, self.path(state.step));
        // Whatever happens in the unfinished directory is told of the one it was to become.
        let of_target = |e| match e {
            Error::Io { action, source, .. } => Error::Io { action, path: target.clone(), source },
            other => other,
        };
        state.tensors_crc32 = crc32fast::hash(&tensors);
        let crc32 = checksum(&state).map_err(Error::model)?;
        let text = serde_json::to_vec_pretty(&StateFile { format: FORMAT, crc32, state })
            .map_err(|e| Error::model(format!("{STATE}: {e}")))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(UNFINISHED);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // What a new directory gets; the kernel takes the umask off it.
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        let unfinished = builder.tempdir_in(self.dir).map_err(Error::io("create", &target))?;
        let put = |name: &str, bytes| save::file(&unfinished.path().join(name), bytes).map_err(of_target);
        put(TENSORS, tensors)?;
        put(STATE, text)?;
        // One of this step that is there already was found damaged.
        self.remove(step)?;
        fs::rename(unfinished.path(), &target).map_err(Error::io("create", &target))?;
        // There is nothing left to remove under its name.
        let _ = unfinished.keep();
        sync_dir(self.dir)?;
        self.last = Some(step);

        let Some(limit) = self.limit else { return Ok(()) };
        let mut older = self.steps()?;
        older.retain(|s| *s <= step);
        older.iter().rev().skip(limit).try_for_each(|s| self.remove(*s))
    }

    /// Removes the checkpoint of `step`, if there is one: first its name, so that no half of it is ever seen.
    fn remove(&self, step: usize) -> Result<()> {
        let path = self.path(step);
        let away = self.dir.join(format!("{UNFINISHED}{step}"));
        match fs::rename(&path, &away) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            moved => moved.and_then(|()| fs::remove_dir_all(&away)).map_err(Error::io("remove", &path)),
        }
    }
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

fn checksum(state: &State) -> Result<u32, String> {
    serde_json::to_vec(state).map(|text| crc32fast::hash(&text)).map_err(|e| e.to_string())
}

impl Trainer<'_> {
    /// Saves the state after `step` steps.
    pub(in crate::train) fn save(&mut self, step: usize) -> Result<()> {
        if step == 0 || self.checkpoints.last == Some(step) {
            return Ok(());
        }
        self.place.fetch(&mut self.learned)?;
        let (updates, moments) = self.learned.optimizer.state();
        let mut arrays: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let mut push = |kind: &str, parameter: &Parameter, values: &[f32]| {
            if !values.is_empty() {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                arrays.push((key(kind, parameter), parameter.value.dims().to_vec(), bytes));
            }
        };
        for (parameter, [mean, square]) in self.learned.parameters.iter().zip(moments) {
            push("parameter", parameter, parameter.value.values().unwrap_or_default());
            push("mean", parameter, mean);
            push("square", parameter, square);
        }
        for parameter in &self.learned.last_good {
            push("last_good", parameter, parameter.value.values().unwrap_or_default());
        }
        for parameter in &self.best.kept {
            push("best", parameter, parameter.value.values().unwrap_or_default());
        }
        let broken = |e| Error::model(format!("{TENSORS}: {e}"));
        let views =
            arrays.iter().map(|(name, dims, bytes)| Ok((name, TensorView::new(Dtype::F32, dims.clone(), bytes)?)));
        let views = views.collect::<Result<Vec<_>, _>>().map_err(broken)?;
        let tensors = safetensors::serialize(views, None).map_err(broken)?;
        let (epoch, row) = self.position;
        let loss_scale = self.place.loss_scale();
        let state = State {
            step,
            epoch,
            row,
            updates,
            runs: self.place.runs(),
            loss_scale: loss_scale.map(|scale| scale.value),
            finite_steps: loss_scale.map_or(0, |scale| scale.finite_steps),
            metrics_bytes: self.metrics.sync()?,
            tensors_crc32: 0,
            settings: self.checkpoints.settings()?.clone(),
        };
        self.checkpoints.write(state, tensors)
    }

    /// Puts everything as it was when `saved` was saved.
    pub(in crate::train) fn restore(&mut self, saved: Saved) -> Result<()> {
        let Saved { state, tensors, path, history } = saved;
        let misfit = |what: String| Error::file(path.join(TENSORS), what);
        let file = SafeTensors::deserialize(&tensors).map_err(|e| misfit(e.to_string()))?;
        let fill = |kind: &str, parameter: &Parameter, values: &mut [f32]| {
            let name = key(kind, parameter);
            let bytes = file.tensor(&name).map_err(|e| misfit(format!("{name}: {e}")))?.data();
            let (numbers, rest) = bytes.as_chunks::<4>();
            if numbers.len() != values.len() || !rest.is_empty() {
                return Err(misfit(format!("{name} has {} bytes for {} numbers", bytes.len(), values.len())));
            }
            values.iter_mut().zip(numbers).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
            Ok(())
        };
        let Learned { parameters, last_good, optimizer } = &mut self.learned;
        let (updates, moments) = optimizer.state_mut();
        *updates = state.updates;
        last_good.clone_from(parameters);
        let parameters = parameters.iter_mut().zip(last_good);
        for ((parameter, last_good), [mean, square]) in parameters.zip(moments) {
            for (kind, values) in [("mean", mean), ("square", square)] {
                if !values.is_empty() {
                    fill(kind, parameter, values)?;
                }
            }
            fill("last_good", parameter, last_good.values_mut())?;
            fill("parameter", &parameter.clone(), parameter.values_mut())?;
        }
        for report in &history.evals {
            self.best.see(report);
        }
        if self.options.load_best_model_at_end && self.best.found().is_some() {
            self.best.kept.clone_from(&self.learned.parameters);
            for parameter in &mut self.best.kept {
                fill("best", &parameter.clone(), parameter.values_mut())?;
            }
        }
        self.position = (state.epoch, state.row);
        let finite_steps = state.finite_steps;
        self.place.go_on(state.runs, state.loss_scale.map(|value| LossScale { value, finite_steps }));
        self.steps = history.steps;
        self.evals = history.evals;
        Ok(())
    }
}

/// The name of a parameter's array.
fn key(kind: &str, parameter: &Parameter) -> String {
    format!("{kind}/{}", parameter.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_from_before_finite_steps_were_counted_is_whole() {
        let text = r#"{"step":3,"epoch":1,"row":8,"updates":3,"runs":9,"loss_scale":1024.0,"metrics_bytes":321,"#
            .to_string()
            + r#""tensors_crc32":7,"settings":{"lr":"0.1"}}"#;
        let state: State = serde_json::from_str(&text).unwrap();
        assert_eq!((state.finite_steps, state.loss_scale), (0, Some(1024.0)));
        assert_eq!(checksum(&state).unwrap(), crc32fast::hash(text.as_bytes()));
        let later = State { finite_steps: 5, ..state };
        let written = serde_json::to_string(&later).unwrap();
        assert_eq!(serde_json::from_str::<State>(&written).unwrap(), later);
    }
}
