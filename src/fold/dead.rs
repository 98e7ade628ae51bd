//! What a model no longer needs once some nodes read other values: nodes whose results nobody reads any more, and the
//! initializers that only they read.

use std::collections::HashSet;

use crate::base::Base;
use crate::onnx::Patch;
use crate::select::{Definition, Reader, Values};

/// Node inputs that are gone, by graph, node and input.
#[derive(Default)]
pub(super) struct Cut {
    pub inputs: Vec<(usize, usize, usize)>,
    /// Values that new nodes read: graph and name.
    pub alive: HashSet<(usize, String)>,
}

impl Cut {
    /// Drops what nobody reads after the cut.
    pub fn drop(self, base: &Base, values: &Values, patch: &mut Patch) {
        let mut gone: HashSet<(usize, usize, usize)> = HashSet::new();
        let mut dead: HashSet<(usize, usize)> = HashSet::new();
        let mut queue = self.inputs;
        while let Some((graph, node, input)) = queue.pop() {
            gone.insert((graph, node, input));
            let Some(name) = values.node(graph, node).and_then(|n| n.input_at(input)) else { continue };
            let Some((value, definition)) = values.lookup(graph, name) else { continue };
            let unread = |value: (usize, &str)| {
                let is_gone = |reader: &Reader| match reader {
                    Reader::Node { graph, node, input } => gone.contains(&(*graph, *node, *input)),
                    Reader::Output => false,
                };
                !self.alive.contains(&(value.0, value.1.to_string())) && values.readers(value).iter().all(is_gone)
            };
            let scope = &values.graphs[value.0].scope;
            match definition {
                Definition::Input => {}
                Definition::Initializer(index) => {
                    // One that is listed among the inputs is a part of the model's face.
                    let is_input = values.graphs[value.0].graph.input.iter().any(|i| i.name() == value.1);
                    if unread(value) && !is_input {
                        let index = base.initializer(scope, index);
                        patch.graph(&base.scope(scope)).drop_initializers.insert(index);
                    }
                }
                Definition::Node(n) => {
                    let Some(maker) = values.node(value.0, n) else { continue };
                    let outputs = maker.output.iter().filter(|y| !y.is_empty());
                    if outputs.into_iter().all(|y| unread((value.0, y))) && dead.insert((value.0, n)) {
                        patch.graph(&base.scope(scope)).drop_nodes.insert(base.node(scope, n));
                        queue.extend((0..maker.input.len()).map(|i| (value.0, n, i)));
                    }
                }
            }
        }
    }
}
