//! What PEFT's own tests check of Bone and MiSS, row by row, and what they leave out (`docs/acceptance.md`). In PEFT a
//! model changes its state; here each step reads a file and writes a file, so that a test holds files against files.

mod common;
mod config;
mod half;
mod learning;
mod merging;
mod saving;
mod switching;
mod training;
