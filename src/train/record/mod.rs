//! What a run leaves behind: metrics, curves and a report, the trained values, checkpoints to go on from.

pub(super) mod checkpoint;
pub(super) mod curve;
mod fingerprint;
pub(super) mod metrics;
pub(super) mod report;
pub(super) mod save;
pub(super) mod tensorboard;
