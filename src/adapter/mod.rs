//! Adapters: the config in PEFT's fields, one file per variant, and the record of what was injected.

pub mod bone;
mod config;
mod record;

pub use config::{BoneConfig, InitWeights, TargetModules};
pub use record::{
    AdapterRecord, CallRecord, HeadRecord, Injection, MAX_SIZE, METADATA_KEY, Pool, TargetRecord, Trainable,
};
