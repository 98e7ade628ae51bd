//! The authority on names: every value and node name in use anywhere in a model, and fresh ones beside them.

use std::collections::HashSet;

use super::{ModelProto, walk_graphs};

/// Names taken in a model, in all scopes at once, so that a fresh name shadows nothing.
#[derive(Debug, Default, Clone)]
pub struct Names(HashSet<String>);

impl Names {
    pub fn of(model: &ModelProto) -> Self {
        let mut names = HashSet::new();
        if let Some(graph) = &model.graph {
            walk_graphs(graph, &mut |_, graph| {
                for node in &graph.node {
                    names.extend(node.input.iter().chain(&node.output).cloned());
                    names.insert(node.name().to_string());
                }
                names.extend(graph.initializer.iter().map(|t| t.name().to_string()));
                names.extend(graph.input.iter().chain(&graph.output).map(|v| v.name().to_string()));
            });
        }
        Self(names)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    /// Marks `names` as taken.
    pub fn take<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        self.0.extend(names.into_iter().map(str::to_string));
    }

    /// `wanted` itself where it is free, else `wanted_1`, `wanted_2`, …; taken from then on.
    pub fn fresh(&mut self, wanted: &str) -> String {
        let mut name = wanted.to_string();
        let mut k = 0;
        while !self.0.insert(name.clone()) {
            k += 1;
            name = format!("{wanted}_{k}");
        }
        name
    }
}
