//! Injected → base: takes every adapter (and the head) out again. The result is the base file, byte for byte.

use std::collections::{HashMap, HashSet};

use crate::Error;
use crate::Result;
use crate::adapter::{Injection, METADATA_KEY};
use crate::onnx::{Model, Patch, walk_graphs};

/// The changes that give back the base of an injected model.
///
/// # Errors
/// Where the model carries no adapter, or something its record names is gone.
pub fn unload(model: &Model) -> Result<Patch> {
    strip(model, &Injection::expect(model)?, false)
}

/// As [`unload`]; with `keep_head` the appended head stays in the model as an ordinary layer.
pub(crate) fn strip(model: &Model, record: &Injection, keep_head: bool) -> Result<Patch> {
    let head = record.head.iter().filter(|_| !keep_head);
    let mut nodes: HashSet<&str> = head.clone().flat_map(|h| &h.nodes).map(String::as_str).collect();
    let mut initializers: HashSet<&str> =
        head.clone().flat_map(|h| h.constants.iter().chain([&h.weight, &h.bias])).map(String::as_str).collect();
    // A node adapted twice had its output renamed twice; each name leads to the one before.
    let mut outputs: HashMap<&str, &str> = HashMap::new();
    for adapter in &record.adapters {
        initializers.extend(adapter.constants.iter().map(String::as_str));
        for target in &adapter.targets {
            initializers.insert(&target.parameter);
            for call in &target.calls {
                nodes.extend(call.nodes.iter().map(String::as_str));
                outputs.insert(&call.base_output, &call.output);
            }
        }
    }

    let mut patch = Patch::default();
    let mut found = 0;
    walk_graphs(model.graph(), &mut |scope, graph| {
        for (index, node) in graph.node.iter().enumerate() {
            if nodes.contains(node.name()) {
                patch.graph(scope).drop_nodes.insert(index);
                found += 1;
                continue;
            }
            let Some(mut original) = node.output.first().and_then(|o| outputs.get(o.as_str())) else { continue };
            found += 1;
            while let Some(earlier) = outputs.get(original) {
                found += 1;
                original = earlier;
            }
            patch.graph(scope).rename_output(index, 0, original);
        }
    });
    let main = patch.graph(&Vec::new());
    let graph = model.graph();
    let position = |names: &mut dyn Iterator<Item = &str>, set: &HashSet<&str>| -> Vec<usize> {
        names.enumerate().filter(|(_, n)| set.contains(n)).map(|(i, _)| i).collect()
    };
    main.drop_initializers.extend(position(&mut graph.initializer.iter().map(|t| t.name()), &initializers));
    main.drop_inputs.extend(position(&mut graph.input.iter().map(|v| v.name()), &initializers));
    let head_outputs = record.head.iter().filter(|_| !keep_head).map(|h| h.name.as_str()).collect();
    main.drop_outputs.extend(position(&mut graph.output.iter().map(|v| v.name()), &head_outputs));
    if found != nodes.len() + outputs.len() || main.drop_initializers.len() != initializers.len() {
        return Err(Error::file(
            &model.path,
            "another tool has changed this model since the adapters were injected: nodes or initializers of theirs are \
             gone, so they cannot be taken out; inject the base again",
        ));
    }
    patch.drop_metadata.insert(METADATA_KEY.into());
    Ok(patch)
}
