//! Surgery on whole models: the invariants as property tests, PEFT's layer vectors, every shared test model.

mod adapters;
mod common;
mod decoder;
mod doubles;
mod exported;
mod heads;
mod layers;
mod models;
mod properties;
mod quantized;
mod random_models;
