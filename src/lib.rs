//! Fine-tune ONNX files without PyTorch: [`inject`] Bone adapters, [`train`] them, [`fold`] them back.
//!
//! Data flows one way, and each step reads and writes ordinary ONNX files:
//!
//! | room | what lives there |
//! |---|---|
//! | [`onnx`] | the file: schema, lossless read and streaming write, tensors, external data, shapes |
//! | [`select`] | which nodes are linear layers, the module path of each, PEFT's matching rules |
//! | [`adapter`] | the config, one file per variant: parameter shapes, init, subgraph, ΔW |
//! | [`base`], [`inline`], [`inject`], [`fold`], [`unload`] | graph surgery: the base inside an injected model, and the ways there and back |
//! | [`peft`], [`export`] | adapters in the forms that others read and write |
//! | [`autodiff`] | reverse mode, ONNX → ONNX |
//! | [`grad`] | a model and its gradient in one file |
//! | [`engine`] | ONNX Runtime and tract behind one trait |
//! | [`verify`], [`weights`] | do two models compute the same, and hold the same weights |
//! | [`train`] | loss graphs, data readers, optimizer, schedule, loop, metrics |
//! | [`cli`] | one file per subcommand |

pub mod adapter;
pub mod autodiff;
pub mod base;
pub mod cli;
pub mod engine;
mod error;
pub mod export;
pub mod fold;
pub mod grad;
pub mod inject;
pub mod inline;
pub mod onnx;
pub mod peft;
pub mod select;
pub mod train;
pub mod unload;
pub mod verify;
pub mod weights;
mod words;

pub use error::{Error, Result, did_you_mean};
