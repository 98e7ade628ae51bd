//! Which nodes are linear layers, the module path of each, and which of them a config means.

mod bias;
mod chain;
mod constant;
mod defaults;
mod form;
mod kinds;
mod linears;
mod matching;
mod module_path;
mod nodes;
mod packed;
mod parameters;
mod quantized;
mod selection;
mod values;

pub use bias::BiasUse;
pub use chain::{Chain, Link};
pub use constant::{Source, Step};
pub use defaults::{Defaults, default_targets};
pub use form::{Form, Sum};
pub(crate) use linears::is_product;
pub use linears::{Linear, Weight, linears, linears_of, linears_with};
pub use matching::{Matcher, Verdict, Version};
pub use module_path::NameRule;
pub use nodes::with_nodes;
pub use packed::{Part, check_sizes};
pub use parameters::{Parameter, Use, parameters, saved};
pub use quantized::{Beside, Laid, Packing, Quantized, Scheme};
pub use selection::{Selection, select, select_as};
pub(crate) use values::{Definition, Reader, Values};

#[cfg(test)]
mod tests;
