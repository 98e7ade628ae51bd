//! Adapters: the config in PEFT's fields, one file per variant, the values of an adapter, and the record of what was
//! injected.

mod bat;
mod bone;
mod config;
mod folded;
mod mini;
mod record;
pub mod tile;
mod values;
mod variant;
mod writer;

pub use config::{Bias, BoneConfig, InitWeights, PeftType, TargetModules, TaskType};
pub use folded::{FOLDED_KEY, Folded};
pub use record::{
    AdapterRecord, HeadRecord, Injection, Inlined, MAX_SIZE, METADATA_KEY, Pool, Renamed, SavedRecord, TargetRecord,
    Trainable, Written, join_sizes,
};
pub use values::Adapter;
pub use variant::{Dims, Layout, Merge, Variant};
pub use writer::{Constants, Writer};
