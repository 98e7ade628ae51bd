//! Training: loss graphs, data readers, optimizer, schedule, loop, metrics.

pub mod data;
pub mod optimizer;
pub mod schedule;
