//! Training: loss graphs, data readers, optimizer, schedule, loop, metrics.
//!
//! [`run`] takes an injected model and changes nothing but the values of its trainable initializers. What it leaves in
//! [`TrainOptions::out`]: `metrics.jsonl` (while it runs), the same as `tensorboard/`, its curves (`loss.png` and
//! others), all of it on one page as `report.html`, `injected.onnx` with the trained values, `adapter/` in PEFT's form,
//! `labels.json` where labels were given as names, `train.toml` where settings came as a text, and `checkpoint-<step>/`
//! to resume from.

mod best;
pub mod data;
pub(crate) mod evaluate;
mod goal;
#[cfg(test)]
mod goldens;
pub mod graph;
mod loss;
mod options;
mod plan;
mod prefix;
mod probe;
mod record;
mod run;
mod subject;
mod trainer;
mod update;
mod watch;

pub use best::Metric;
pub use graph::precision::Precision;
pub use graph::teacher::Teacher;
pub use loss::{Distance, Loss, Pooling};
pub use options::{EvalStrategy, TrainOptions};
pub use plan::MemoryPlan;
pub use prefix::{CacheFrozen, CachePlan};
pub use probe::{Probe, probe};
pub use record::metrics::{EvalReport, StepReport};
pub use record::report::size;
pub use run::run;
pub use update::{optimizer, schedule};
pub use watch::{Amount, Plan, Progress, Summary};
