//! Training end to end: PEFT's curves replayed, both engines, and what a run says when it cannot go on.

mod accumulation;
mod bad_input;
mod common;
mod device;
mod exported;
mod goldens;
mod models;
mod pairs;
mod precision;
mod prefix;
mod quantized;
mod resume;
mod runs;
mod teaching;
