//! Training where the parameters, their moments and gradients stay on the engine's device. The host sends batches, a
//! step ahead of the one that is computed, and reads three numbers a step.
//!
//! A thread runs the graphs. A step leaves new tensors and changes none, so the values before it and after it are there
//! as long as somebody holds them: nothing has to be copied to be able to go back.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::flat::{Flat, FlatNames};
use super::model::{RATES, REPORT, SHARE, rates, sum_model, update_model, value};
use super::optimizer::{Optimizer, Rule};
use super::step::Outcome;
use crate::engine::{Engine, LoadOptions, Memory, Resident, Session};
use crate::onnx::Tensor;
use crate::train::data::Batch;
use crate::train::graph::scale::LossScale;
use crate::train::graph::{GradientSession, Parameter};
use crate::train::loss::Loss;
use crate::{Error, Result};

/// Steps that may be under way when the next one is sent.
pub(in crate::train) const AHEAD: usize = 1;

/// Vectors by group.
#[derive(Debug, Clone)]
struct State {
    values: Vec<Resident>,
    /// Empty where the rule keeps none.
    mean: Vec<Resident>,
    square: Vec<Resident>,
}

impl State {
    /// The vectors by kind, as the update graph names them.
    fn kinds(&self) -> [(&'static str, &Vec<Resident>); 3] {
        [("values", &self.values), ("mean", &self.mean), ("square", &self.square)]
    }
}

/// A step to make.
struct Job {
    micro: Vec<Micro>,
    updates: i32,
    factor: f64,
}

/// A batch on the device, and what it counts for among those of its step.
struct Micro {
    inputs: Vec<(String, Resident)>,
    share: f64,
}

/// A step that was made.
struct Done {
    outcome: Outcome,
    /// The parameters before the last step, those of this one, and what it made of them.
    before: Option<Vec<Resident>>,
    used: Vec<Resident>,
    after: State,
    updates: i32,
    runs: u64,
    loss_scale: Option<LossScale>,
}

/// The graphs, and what they go on from.
struct Worker {
    gradient: GradientSession,
    names: FlatNames,
    update: Box<dyn Session>,
    sum: Option<Box<dyn Session>>,
    memory: Memory,
    rule: Rule,
    flats: Vec<Flat>,
    state: Option<State>,
    before: Option<Vec<Resident>>,
}

/// The host's side.
pub(in crate::train) struct OnDevice {
    memory: Memory,
    /// Inputs for what the loss reads.
    targets: Vec<String>,
    flats: Vec<Flat>,
    /// Until it is started.
    worker: Option<Worker>,
    running: Option<(SyncSender<Job>, Receiver<Result<Done>>)>,
    updates: i32,
    latest: Option<Done>,
    runs: u64,
    loss_scale: Option<LossScale>,
}

impl OnDevice {
    /// Loads the graphs of the update beside `gradient`, which takes and gives the vectors `flats` by `names`.
    pub fn new(
        engine: &dyn Engine,
        options: &LoadOptions,
        (gradient, names): (GradientSession, FlatNames),
        flats: Vec<Flat>,
        rule: Rule,
        max_norm: Option<f64>,
        accumulates: bool,
    ) -> Result<Self> {
        let memory = engine.memory().ok_or_else(|| {
            Error::config(format!("{} keeps no optimizer on a device; use ONNX Runtime", engine.name()))
        })?;
        let update = engine.load(&update_model(rule, &flats, max_norm, gradient.loss_scale().is_some()), options)?;
        let sum = accumulates.then(|| engine.load(&sum_model(&flats), options)).transpose()?;
        let (targets, runs, loss_scale) = (gradient.targets().to_vec(), gradient.runs(), gradient.loss_scale());
        let host = flats.clone();
        let worker = Worker { gradient, names, update, sum, memory, rule, flats, state: None, before: None };
        Ok(Self {
            memory,
            targets,
            flats: host,
            worker: Some(worker),
            running: None,
            updates: 0,
            latest: None,
            runs,
            loss_scale,
        })
    }

    pub fn runs(&self) -> u64 {
        self.runs
    }

    pub fn loss_scale(&self) -> Option<LossScale> {
        self.loss_scale
    }

    /// Takes over from a run that had come so far ([`GradientSession::go_on`]).
    pub fn go_on(&mut self, runs: u64, loss_scale: Option<LossScale>) {
        (self.runs, self.loss_scale) = (runs, loss_scale);
        self.worker.iter_mut().for_each(|w| w.gradient.go_on(runs, loss_scale));
    }

    /// Puts the state of a run on the device and starts.
    pub fn start(&mut self, parameters: &[Parameter], last_good: &[Parameter], optimizer: &Optimizer) -> Result<()> {
        let Some(mut worker) = self.worker.take() else { return Ok(()) };
        let (memory, flats) = (self.memory, &self.flats);
        let upload = |values: Vec<&[f32]>| -> Result<Vec<Resident>> {
            if values.iter().all(|v| v.is_empty()) {
                return Ok(Vec::new());
            }
            flats.iter().map(|flat| memory.upload(&flat.gather(&values))).collect()
        };
        let of = |parameters: &'_ [Parameter]| -> Result<Vec<Resident>> {
            upload(parameters.iter().map(|p| p.value.values().unwrap_or_default()).collect())
        };
        let (updates, moments) = optimizer.state();
        let moments: Vec<[&[f32]; 2]> = moments.collect();
        let moment = |i: usize| upload(moments.iter().map(|m| m[i]).collect());
        worker.state = Some(State { values: of(parameters)?, mean: moment(0)?, square: moment(1)? });
        worker.before = if last_good.is_empty() { None } else { Some(of(last_good)?) };
        self.updates = updates;

        let (jobs, todo) = sync_channel::<Job>(AHEAD);
        let (finished, done) = sync_channel(AHEAD + 1);
        let run = move || {
            for job in todo {
                let outcome = worker.step(&job);
                let failed = outcome.is_err();
                if finished.send(outcome).is_err() || failed {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("training".into())
            .spawn(run)
            .map_err(|e| Error::config(format!("the thread that trains could not be started: {e}")))?;
        self.running = Some((jobs, done));
        Ok(())
    }

    /// Copies the batches of a step to the device and has it made.
    pub fn begin(&mut self, micro: &[Batch], loss: Loss, factor: f64) -> Result<()> {
        let shares = super::accumulate::shares(micro, loss);
        let micro = micro.iter().zip(shares).map(|(batch, share)| {
            let data = batch.inputs.iter().map(|(name, value)| (name, value));
            let inputs = data.chain(self.targets.iter().zip(&batch.targets));
            let inputs = inputs.map(|(name, value)| Ok((name.clone(), self.memory.upload(value)?)));
            Ok(Micro { inputs: inputs.collect::<Result<_>>()?, share })
        });
        let micro = micro.collect::<Result<_>>()?;
        self.updates = self.updates.saturating_add(1);
        let job = Job { micro, updates: self.updates, factor };
        let sent = self.running.as_ref().map(|(jobs, _)| jobs.send(job));
        // Where it cannot be sent, a step before this one has failed, and says why.
        match sent {
            Some(_) => Ok(()),
            None => Err(ended()),
        }
    }

    /// Waits for the oldest step that was begun.
    pub fn finish(&mut self) -> Result<Outcome> {
        let (_, done) = self.running.as_ref().ok_or_else(ended)?;
        let done = done.recv().map_err(|_| ended())??;
        (self.runs, self.loss_scale) = (done.runs, done.loss_scale);
        Ok(self.latest.insert(done).outcome)
    }

    /// Copies the state after the last finished step to the host.
    pub fn fetch(
        &self,
        parameters: &mut [Parameter],
        last_good: &mut Vec<Parameter>,
        optimizer: &mut Optimizer,
    ) -> Result<()> {
        let Some(done) = &self.latest else { return Ok(()) };
        last_good.clone_from(&parameters.to_vec());
        self.download(&done.used, last_good)?;
        self.download(&done.after.values, parameters)?;
        let (updates, moments) = optimizer.state_mut();
        *updates = done.updates;
        let (mut mean, mut square): (Vec<&mut [f32]>, Vec<&mut [f32]>) = moments.map(|[m, v]| (m, v)).unzip();
        for (vectors, values) in [(&done.after.mean, &mut mean), (&done.after.square, &mut square)] {
            for (flat, vector) in self.flats.iter().zip(vectors) {
                flat.scatter(&vector.download()?, values)?;
            }
        }
        Ok(())
    }

    /// Copies the values to go back to into `last_good`, where there are any: those that the loss before the last
    /// finished step was computed from; with `outcome` finite, those that its own was. Ends the training.
    pub fn go_back(&mut self, parameters: &[Parameter], last_good: &mut Vec<Parameter>) -> Result<()> {
        self.running = None;
        let Some(done) = self.latest.take() else { return Ok(()) };
        let good = if done.outcome.is_finite() { Some(done.used) } else { done.before };
        last_good.clear();
        if let Some(values) = good {
            last_good.extend_from_slice(parameters);
            self.download(&values, last_good)?;
        }
        Ok(())
    }

    fn download(&self, vectors: &[Resident], parameters: &mut [Parameter]) -> Result<()> {
        let mut values: Vec<&mut [f32]> = parameters.iter_mut().map(Parameter::values_mut).collect();
        for (flat, vector) in self.flats.iter().zip(vectors) {
            flat.scatter(&vector.download()?, &mut values)?;
        }
        Ok(())
    }
}

fn ended() -> Error {
    Error::model("the thread that trains has ended before its time")
}

impl Worker {
    fn step(&mut self, job: &Job) -> Result<Done> {
        let state = self.state.clone().ok_or_else(ended)?;
        let (outcome, after) = loop {
            let (loss, gradients) = self.gradients(&state, job)?;
            let (grad_norm, finite, after) = self.update(&state, &gradients, job)?;
            let outcome = Outcome { loss, grad_norm, finite };
            // Out of the range of the model's halves: once more, with a smaller scale.
            let again = loss.is_finite() && !grad_norm.is_finite() && self.gradient.overflowed();
            if !again {
                break (outcome, after);
            }
        };
        if outcome.is_finite() {
            self.gradient.stepped();
        }
        let before = self.before.replace(state.values.clone());
        self.state = Some(after.clone());
        Ok(Done {
            outcome,
            before,
            used: state.values,
            after,
            updates: job.updates,
            runs: self.gradient.runs(),
            loss_scale: self.gradient.loss_scale(),
        })
    }

    /// Loss and gradients of all batches together.
    fn gradients(&mut self, state: &State, job: &Job) -> Result<(f64, Vec<Resident>)> {
        let scale = match self.gradient.scale_input() {
            Some(name) => {
                let value = Tensor::scalar(self.gradient.loss_scale().map_or(1.0, |scale| scale.value));
                Some((name.to_string(), self.memory.upload(&value)?))
            }
            None => None,
        };
        let (mut loss, mut sums) = (0.0, Vec::new());
        for micro in &job.micro {
            let parameters = self.names.inputs.iter().zip(&state.values);
            let data = micro.inputs.iter().chain(&scale).map(|(name, value)| (name.as_str(), value));
            let inputs: Vec<_> = parameters.map(|(name, value)| (name.as_str(), value)).chain(data).collect();
            let (part, gradients) = self.gradient.run_resident(&inputs)?;
            let part = part.download()?;
            loss += micro.share * part.as_f64().ok_or_else(|| Error::model("the loss is not one number"))?;
            sums = if job.micro.len() == 1 { gradients } else { self.add(sums, &gradients, micro.share)? };
        }
        Ok((loss, sums))
    }

    /// `sums` (nothing yet: zeros) and a batch's share.
    fn add(&mut self, sums: Vec<Resident>, gradients: &[Resident], share: f64) -> Result<Vec<Resident>> {
        let sums = match sums.is_empty() {
            true => self
                .flats
                .iter()
                .map(|flat| self.memory.upload(&Tensor::new(&[flat.len], vec![0f32; flat.len])))
                .collect::<Result<_>>()?,
            false => sums,
        };
        let session = self.sum.as_mut().ok_or_else(|| Error::model("no graph sums gradients"))?;
        let share = self.memory.upload(&Tensor::scalar(share as f32))?;
        let kinds = [("sum", &sums[..]), ("gradient", gradients)];
        let (inputs, new) = arguments(&kinds, &["sum"]);
        run(session.as_mut(), (SHARE, &share), &inputs, &new)
    }

    /// The gradients' norm, whether all updated values are finite, and the state after the update.
    fn update(&mut self, state: &State, gradients: &[Resident], job: &Job) -> Result<(f64, bool, State)> {
        let unscale = self.gradient.loss_scale().map_or(1.0, |scale| 1.0 / scale.value);
        let rates = rates(self.rule, &self.flats, job.updates, job.factor, unscale);
        let rates = self.memory.upload(&rates)?;
        let kinds = state.kinds().into_iter().filter(|(_, vectors)| !vectors.is_empty());
        let mut kinds: Vec<(&str, &[Resident])> = kinds.map(|(kind, vectors)| (kind, vectors.as_slice())).collect();
        let changed: Vec<&str> = kinds.iter().map(|(kind, _)| *kind).collect();
        kinds.push(("gradient", gradients));
        let (inputs, mut wanted) = arguments(&kinds, &changed);
        wanted.push(REPORT.into());
        let mut out = run(self.update.as_mut(), (RATES, &rates), &inputs, &wanted)?;
        let report = out.pop().ok_or_else(|| Error::model("the update reports nothing"))?.download()?.to_f64();
        let mut parts = out.chunks(self.flats.len()).map(<[_]>::to_vec);
        let mut next = |kind| if changed.contains(&kind) { parts.next().unwrap_or_default() } else { Vec::new() };
        let after = State { values: next("values"), mean: next("mean"), square: next("square") };
        match report[..] {
            [norm, check] => Ok((norm, check == 0.0, after)),
            _ => Err(Error::model("the update's report is not two numbers")),
        }
    }
}

/// Inputs of every kind, and the outputs of those that change, group by group.
fn arguments<'a>(kinds: &[(&str, &'a [Resident])], changed: &[&str]) -> (Vec<(String, &'a Resident)>, Vec<String>) {
    let named = |(kind, vectors): &(&str, &'a [Resident])| -> Vec<(String, &'a Resident)> {
        vectors.iter().enumerate().map(|(i, vector)| (value(i, kind), vector)).collect()
    };
    let inputs: Vec<(String, &Resident)> = kinds.iter().flat_map(named).collect();
    let changed = kinds.iter().filter(|(kind, _)| changed.contains(kind)).flat_map(named);
    let outputs = changed.map(|(name, _)| format!("{name}.new")).collect();
    (inputs, outputs)
}

fn run(
    session: &mut dyn Session,
    first: (&str, &Resident),
    inputs: &[(String, &Resident)],
    wanted: &[String],
) -> Result<Vec<Resident>> {
    let inputs = inputs.iter().map(|(name, value)| (name.as_str(), *value));
    let inputs: Vec<(&str, &Resident)> = [first].into_iter().chain(inputs).collect();
    let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
    session.run_resident(&inputs, &wanted)
}
