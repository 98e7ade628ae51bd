//! Which nodes are linear layers, the module path of each, and which of them a config means.

mod constant;
mod linears;
mod module_path;
mod values;

pub use constant::{Source, Step};
pub use linears::{Linear, Weight, linears, linears_of};
pub use module_path::NameRule;

#[cfg(test)]
mod tests;
