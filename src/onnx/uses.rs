//! Who reads a value: all consumers of each name, in all graphs of a model.

use std::collections::HashMap;

use super::{GraphProto, Scope, walk_graphs};

/// One place where a value is read: input `input` of node `node` in the graph at `scope`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Use {
    pub scope: Scope,
    pub node: usize,
    pub input: usize,
}

/// Uses by value name. A name that a subgraph shadows counts as one value, so a use may be reported too many, never
/// one too few.
#[derive(Debug, Default)]
pub struct Uses {
    by_name: HashMap<String, Vec<Use>>,
    outputs: HashMap<String, usize>,
}

impl Uses {
    pub fn of(graph: &GraphProto) -> Self {
        let mut uses = Self::default();
        walk_graphs(graph, &mut |scope, graph| {
            for (node, n) in graph.node.iter().enumerate() {
                for (input, name) in n.input.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
                    let place = Use { scope: scope.clone(), node, input };
                    uses.by_name.entry(name.clone()).or_default().push(place);
                }
            }
            for output in &graph.output {
                *uses.outputs.entry(output.name().to_string()).or_default() += 1;
            }
        });
        uses
    }

    /// Nodes that read `name`.
    pub fn of_value(&self, name: &str) -> &[Use] {
        self.by_name.get(name).map_or(&[], Vec::as_slice)
    }

    /// True where a graph hands `name` out as its output.
    pub fn is_output(&self, name: &str) -> bool {
        self.outputs.contains_key(name)
    }
}
