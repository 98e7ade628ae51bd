//! One step of a run, wherever the parameters are: on the host, or on the engine's device.

use super::accumulate;
use super::device::{self, OnDevice};
use super::optimizer::{Optimizer, Scale, clip_factor, global_norm};
use crate::train::data::Batch;
use crate::train::graph::scale::LossScale;
use crate::train::graph::{GradientSession, Parameter};
use crate::train::loss::Loss;
use crate::{Error, Result};

/// What came of a step.
#[derive(Debug, Clone, Copy)]
pub(in crate::train) struct Outcome {
    /// Of the step's batches, before the update.
    pub loss: f64,
    /// Over all gradients together, before clipping.
    pub grad_norm: f64,
    /// Whether all parameters are finite after the update.
    pub finite: bool,
}

impl Outcome {
    /// Whether loss and gradients are.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_finite()
    }
}

/// What a run trains, as the host has it.
pub(in crate::train) struct Learned {
    pub parameters: Vec<Parameter>,
    /// The parameters' values before the last update: those that the last finite loss was computed from.
    pub last_good: Vec<Parameter>,
    pub optimizer: Optimizer,
}

/// Where the parameters, their moments and gradients are while a run goes on.
pub(in crate::train) enum Place {
    /// In [`Learned`], which every step changes.
    Host { gradient: Box<GradientSession>, done: Option<Outcome> },
    /// On the device; [`Learned`] is what [`Place::fetch`] last made of it.
    Device(Box<OnDevice>),
}

impl Place {
    /// How many steps may be begun before the first of them is finished.
    pub fn ahead(&self) -> usize {
        match self {
            Self::Host { .. } => 0,
            Self::Device(_) => device::AHEAD,
        }
    }

    /// Starts from `learned`.
    pub fn start(&mut self, learned: &Learned) -> Result<()> {
        match self {
            Self::Host { .. } => Ok(()),
            Self::Device(device) => device.start(&learned.parameters, &learned.last_good, &learned.optimizer),
        }
    }

    /// Begins the step of `micro` at `factor` of the learning rates.
    pub fn begin(
        &mut self,
        learned: &mut Learned,
        micro: &[Batch],
        loss: Loss,
        factor: f64,
        max_norm: Option<f64>,
    ) -> Result<()> {
        match self {
            Self::Device(device) => device.begin(micro, loss, factor),
            Self::Host { gradient, done } => {
                *done = Some(learned.step(gradient, micro, loss, factor, max_norm)?);
                Ok(())
            }
        }
    }

    /// The outcome of the oldest step that was begun.
    pub fn finish(&mut self) -> Result<Outcome> {
        match self {
            Self::Device(device) => device.finish(),
            Self::Host { done, .. } => done.take().ok_or_else(|| Error::model("no step was begun")),
        }
    }

    /// Brings `learned` to the state after the last finished step.
    pub fn fetch(&self, learned: &mut Learned) -> Result<()> {
        match self {
            Self::Host { .. } => Ok(()),
            Self::Device(device) => {
                device.fetch(&mut learned.parameters, &mut learned.last_good, &mut learned.optimizer)
            }
        }
    }

    /// After an outcome that is not finite: brings `learned.last_good` to the values to go back to (none where there
    /// are none), and ends the training.
    pub fn go_back(&mut self, learned: &mut Learned) -> Result<()> {
        match self {
            Self::Host { .. } => Ok(()),
            Self::Device(device) => device.go_back(&learned.parameters, &mut learned.last_good),
        }
    }

    /// How often the gradient graph was run.
    pub fn runs(&self) -> u64 {
        match self {
            Self::Host { gradient, .. } => gradient.runs(),
            Self::Device(device) => device.runs(),
        }
    }

    /// What the loss is multiplied by, where it is.
    pub fn loss_scale(&self) -> Option<LossScale> {
        match self {
            Self::Host { gradient, .. } => gradient.loss_scale(),
            Self::Device(device) => device.loss_scale(),
        }
    }

    /// Takes over from a run that had come so far ([`GradientSession::go_on`]).
    pub fn go_on(&mut self, runs: u64, loss_scale: Option<LossScale>) {
        match self {
            Self::Host { gradient, .. } => gradient.go_on(runs, loss_scale),
            Self::Device(device) => device.go_on(runs, loss_scale),
        }
    }
}

impl Learned {
    /// Gradients, clipping and the update on the host; no update where the loss or the gradients are not finite.
    fn step(
        &mut self,
        session: &mut GradientSession,
        micro: &[Batch],
        loss: Loss,
        factor: f64,
        max_norm: Option<f64>,
    ) -> Result<Outcome> {
        let (loss, gradients) = accumulate::gradients(session, &self.parameters, micro, loss)?;
        let gradients: Vec<&[f32]> = gradients.iter().map(|g| g.values().unwrap_or_default()).collect();
        let grad_norm = global_norm(gradients.iter().copied());
        let mut outcome = Outcome { loss, grad_norm, finite: true };
        if outcome.is_finite() {
            session.stepped();
            let clip = max_norm.map_or(1.0, |max| clip_factor(grad_norm, max));
            self.keep();
            let values = self.parameters.iter_mut().map(Parameter::values_mut);
            self.optimizer.step(values.zip(gradients), Scale { lr: factor, gradient: clip });
            outcome.finite = self.parameters.iter().all(Parameter::is_finite);
        }
        Ok(outcome)
    }

    /// Remembers the parameters as they are, in the memory of the last time.
    fn keep(&mut self) {
        if self.last_good.is_empty() {
            self.last_good = self.parameters.clone();
        } else {
            for (kept, now) in self.last_good.iter_mut().zip(&self.parameters) {
                kept.values_mut().copy_from_slice(now.value.values().unwrap_or_default());
            }
        }
    }
}
