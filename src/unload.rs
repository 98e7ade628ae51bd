//! Injected → base: takes every adapter (and the head) out again. The result is the base file, byte for byte.

use std::collections::{HashMap, HashSet};

use crate::Result;
use crate::adapter::{Injection, METADATA_KEY};
use crate::base::changed;
use crate::inject::check_shared;
use crate::inline;
use crate::onnx::{Model, Moved, Patch, Scope, walk_graphs};

/// The changes that give back the base of an injected model.
///
/// # Errors
/// Where the model carries no adapter, or something its record names is gone.
pub fn unload(model: &Model) -> Result<Patch> {
    let record = Injection::expect(model)?;
    check_shared(model, &record, false)?;
    let mut patch = strip(model, &record, &HashSet::new())?;
    inline::restore(model, &record.inlined, &mut patch)?;
    for data in record.data.iter().filter(|d| d.location != d.base) {
        patch.moved.insert(data.location.clone(), Moved { location: data.base.clone(), checksum: None });
    }
    if let Some(head) = &record.head {
        let nodes: HashSet<&str> = head.nodes.iter().map(String::as_str).collect();
        let initializers: HashSet<&str> =
            head.constants.iter().chain([&head.weight, &head.bias]).map(String::as_str).collect();
        let main = patch.graph(&Scope::new());
        let graph = model.graph();
        let before = main.drop_nodes.len();
        main.drop_nodes.extend(positions(graph.node.iter().map(|n| n.name()), &nodes));
        main.drop_outputs
            .extend(positions(graph.output.iter().map(|v| v.name()), &HashSet::from([head.name.as_str()])));
        let dropped = positions(graph.initializer.iter().map(|t| t.name()), &initializers);
        if main.drop_nodes.len() - before != nodes.len() || dropped.len() != initializers.len() {
            return Err(changed(model));
        }
        main.drop_initializers.extend(dropped);
        main.drop_inputs.extend(positions(graph.input.iter().map(|v| v.name()), &initializers));
    }
    Ok(patch)
}

/// Takes the active adapters out of the graph, and the parameters of all adapters but those called in `keep`.
pub(crate) fn strip(model: &Model, record: &Injection, keep: &HashSet<&str>) -> Result<Patch> {
    let written = &record.written;
    let nodes: HashSet<&str> = written.nodes.iter().map(String::as_str).collect();
    let mut initializers: HashSet<&str> = record.adapters.iter().flat_map(|a| a.parameters()).collect();
    initializers.retain(|name| !keep.contains(name));
    initializers.extend(written.constants.iter().map(String::as_str));
    let names = |renamed: &'_ [crate::adapter::Renamed]| -> HashMap<String, String> {
        renamed.iter().map(|r| (r.now.clone(), r.base.clone())).collect()
    };
    let (outputs, inputs) = (names(&written.outputs), names(&written.inputs));

    let mut patch = Patch::default();
    let mut found = HashSet::new();
    walk_graphs(model.graph(), &mut |scope, graph| {
        for (index, node) in graph.node.iter().enumerate() {
            if nodes.contains(node.name()) {
                patch.graph(scope).drop_nodes.insert(index);
                found.insert(("node", node.name()));
                continue;
            }
            for (nth, name) in node.output.iter().enumerate() {
                if let Some(original) = outputs.get(name) {
                    patch.graph(scope).rename_output(index, nth, original);
                    found.insert(("output", name));
                }
            }
            for (nth, name) in node.input.iter().enumerate() {
                if let Some(original) = inputs.get(name) {
                    patch.graph(scope).rename_input(index, nth, original);
                    found.insert(("input", name));
                }
            }
        }
    });
    let main = patch.graph(&Scope::new());
    let graph = model.graph();
    main.drop_initializers.extend(positions(graph.initializer.iter().map(|t| t.name()), &initializers));
    main.drop_inputs.extend(positions(graph.input.iter().map(|v| v.name()), &initializers));
    let wanted = nodes.len() + outputs.len() + inputs.len();
    if found.len() != wanted || main.drop_initializers.len() != initializers.len() {
        return Err(changed(model));
    }
    patch.drop_metadata.insert(METADATA_KEY.into());
    Ok(patch)
}

/// Indices of the names that are in `set`.
fn positions<'a>(names: impl Iterator<Item = &'a str>, set: &HashSet<&str>) -> Vec<usize> {
    names.enumerate().filter(|(_, n)| set.contains(n)).map(|(i, _)| i).collect()
}
