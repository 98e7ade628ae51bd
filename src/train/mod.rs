//! Training: loss graphs, data readers, optimizer, schedule, loop, metrics.

pub mod optimizer;
pub mod schedule;
