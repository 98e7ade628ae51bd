//! One update of the parameters: gradients of its batches together, clipping, schedule, optimizer; on the host
//! (`step`), or as a graph on the engine's device (`device`, `model`).

pub(super) mod accumulate;
pub(super) mod device;
pub(super) mod flat;
mod model;
pub mod optimizer;
pub mod schedule;
pub(super) mod step;
