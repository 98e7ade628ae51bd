//! A second decoder's word: everything we write is read by rust-protobuf, which keeps unknown fields, and compared
//! message by message with what it reads in the base.

use onnx_protobuf::{GraphProto, Message, ModelProto};

use crate::common::{inject_and_fold, shared};

fn read(path: &std::path::Path) -> ModelProto {
    ModelProto::parse_from_bytes(&std::fs::read(path).expect("a file")).expect("a model for the other decoder as well")
}

/// Names of the nodes of `graph` that `other` does not have in the very same form.
fn changed<'a>(graph: &'a GraphProto, other: &GraphProto) -> Vec<&'a str> {
    graph.node.iter().filter(|n| !other.node.contains(n)).map(|n| n.name.as_str()).collect()
}

#[test]
fn nothing_but_the_adapted_layers_changes() {
    for name in ["bert.ts17", "bert.dyn18", "llama.dyn18.ort_ext", "vit.ts17", "bert_fp16.dyn18", "bert.ts17.qdq"] {
        let base = shared(&format!("models/{name}.onnx"));
        let (_dir, targets, injected, merged) = inject_and_fold(&base).expect("an adapted model");
        let (base, injected, merged) = (read(&base), read(&injected), read(&merged));
        let (base_graph, injected_graph) = (&base.graph, &injected.graph);
        // Injected: the adapted nodes have another output, all else of the base is there, in the same order.
        let mut renamed = changed(base_graph, injected_graph);
        renamed.sort();
        assert_eq!(renamed, targets, "{name}");
        let kept: Vec<_> = injected_graph.node.iter().filter(|n| base_graph.node.contains(n)).collect();
        let theirs: Vec<_> = base_graph.node.iter().filter(|n| injected_graph.node.contains(n)).collect();
        assert_eq!(kept, theirs, "{name}");
        assert_eq!(base_graph.initializer[..], injected_graph.initializer[..base_graph.initializer.len()], "{name}");
        assert_eq!(base_graph.input, injected_graph.input);
        assert_eq!(base_graph.output, injected_graph.output);

        if name.contains("qdq") {
            // The adapters of quantised layers stay as nodes.
            continue;
        }
        // Merged: the base's graph again, but for the values of adapted weights.
        let mut like_base = merged.clone();
        let mut values = 0;
        for (ours, theirs) in
            like_base.graph.mut_or_insert_default().initializer.iter_mut().zip(&base_graph.initializer)
        {
            if ours != theirs {
                values += 1;
                ours.raw_data = theirs.raw_data.clone();
            }
        }
        assert_eq!(values, targets.len(), "{name}");
        assert_eq!(like_base, base, "{name}");
    }
}
