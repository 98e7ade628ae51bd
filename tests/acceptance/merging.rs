//! Rows about merging: the folded model computes what the injected one does, and unmerging leads back.

use std::collections::HashSet;
use std::path::Path;

use bone_onnx::adapter::Injection;
use bone_onnx::fold::FoldOptions;
use bone_onnx::onnx::{DataType, Model, walk_graphs};
use bone_onnx::train::TrainOptions;

use crate::common::{
    Bench, VARIANTS, assert_close, assert_differs, bytes, everywhere, extracted, files, fold_to, record,
};
use crate::learning::each_learner;

/// A plain model: no record, no initializer or node that a base of these names does not have, but for copies of tied
/// weights.
fn assert_plain(merged: &Path, base: &Path, what: &str) {
    let (merged, base) = (Model::open(merged).expect("a model"), Model::open(base).expect("a model"));
    assert!(Injection::read(&merged).expect("metadata").is_none(), "{what}");
    let names = |model: &Model| {
        let (mut nodes, mut tensors) = (Vec::new(), HashSet::new());
        walk_graphs(model.graph(), &mut |_, graph| {
            nodes.extend(graph.node.iter().map(|n| (n.op_type().to_string(), n.output.clone())));
            tensors.extend(graph.initializer.iter().map(|t| t.name().to_string()));
        });
        (nodes, tensors)
    };
    let ((nodes, tensors), (base_nodes, base_tensors)) = (names(&merged), names(&base));
    assert_eq!(nodes, base_nodes, "{what}");
    let new: Vec<&String> = tensors.difference(&base_tensors).filter(|t| !t.ends_with(".weight.merged")).collect();
    assert!(new.is_empty(), "{what}: {new:?}");
}

#[test]
fn row_06_merged_and_unmerged_outputs_are_equal() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let adapter = subject.adapter("default", variant.config(subject.first), 6);
        let injected = bench.import(&subject.path, &adapter);
        let (base, unmerged) = (subject.base(), subject.run(&injected));
        assert_differs(base, &unmerged, 1e-3, what);
        let merged = bench.merge(&injected);
        assert_close(&subject.run(&merged), &unmerged, 1e-4, what);
        assert_plain(&merged, &subject.path, what);
        let back = bench.unmerge(&merged, &[&adapter]);
        assert_close(&subject.run(&back), base, 1e-4, &format!("{what}, unmerged"));
        // A directory straight onto the base is the same.
        let extra = FoldOptions { extra: vec![adapter], ..Default::default() };
        assert_eq!(bytes(&bench.fold(&subject.path, extra)), bytes(&merged), "{what}");
    });
}

#[test]
fn row_07_merging_twice_changes_nothing_and_says_why() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let injected = bench.import(&subject.path, &subject.adapter("default", variant.config(subject.first), 7));
        let merged = bench.merge(&injected);
        assert_eq!(bytes(&bench.merge(&injected)), bytes(&merged), "{what}");
        let (before, there) = (bytes(&merged), files(bench.dir()));
        for out in [bench.next(), merged.clone()] {
            let refusal = fold_to(&merged, &FoldOptions::default(), &out).expect_err(what).to_string();
            assert!(refusal.contains("no adapter was injected"), "{what}: {refusal}");
        }
        let twice = FoldOptions { adapters: Some(vec!["default".into(); 2]), ..Default::default() };
        let refusal = fold_to(&injected, &twice, &bench.next()).expect_err(what).to_string();
        assert!(refusal.contains("adapter default is named twice"), "{what}: {refusal}");
        assert_eq!((bytes(&merged), files(bench.dir())), (before, there), "{what}");
    });
}

#[test]
fn row_08_a_safe_merge_is_the_plain_one_and_its_file_is_whole() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let injected = bench.import(&subject.path, &subject.adapter("default", variant.config(subject.first), 8));
        let safe = bench.fold(&injected, FoldOptions { safe: true, ..Default::default() });
        assert_close(&subject.run(&safe), &subject.run(&injected), 1e-6, what);
        assert_eq!(bytes(&safe), bytes(&bench.merge(&injected)), "{what}");
        // Each tensor has as many values as its shape says.
        let model = Model::open(&safe).expect("a model");
        for tensor in model.graph().initializer.iter().filter(|t| t.data_type() == DataType::Float as i32) {
            let len: i64 = tensor.dims.iter().product();
            assert_eq!(model.tensor(tensor).expect("values").len() as i64, len, "{what}: {}", tensor.name());
        }
    });
}

#[test]
fn row_09_several_adapters_merge_alone_and_together() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let config = || variant.config(subject.first);
        let (first, second) = (subject.adapter("default", config(), 91), subject.adapter("adapter-2", config(), 92));
        let both = bench.import(&bench.import(&subject.path, &first), &second);
        let alone = [&first, &second].map(|adapter| {
            let merged = subject.run(&bench.merge_named(&both, &[&adapter.name]));
            let injected = subject.run(&bench.import(&subject.path, adapter));
            assert_close(&merged, &injected, 1e-3, &format!("{what}, {}", adapter.name));
            merged
        });
        assert_differs(&alone[0], &alone[1], 1e-3, what);
        for order in [["adapter-2", "default"], ["default", "adapter-2"]] {
            let together = subject.run(&bench.merge_named(&both, &order));
            let injected = subject.run(&bench.activate(&both, &order));
            assert_close(&together, &injected, 1e-3, &format!("{what}, {order:?}"));
            alone.iter().for_each(|alone| assert_differs(&together, alone, 1e-3, what));
        }
        let (there, out) = (files(bench.dir()), bench.next());
        let unknown = FoldOptions { adapters: Some(vec!["adapter-3".into()]), ..Default::default() };
        let refusal = fold_to(&both, &unknown, &out).expect_err(what).to_string();
        assert!(refusal.contains("Adapter adapter-3 does not exist"), "{refusal}");
        assert!(refusal.contains("default, adapter-2") && files(bench.dir()) == there, "{refusal}");
    });
}

#[test]
fn row_10_two_active_adapters_on_the_same_and_on_different_layers() {
    everywhere(|subject, variant, what| {
        for (targets, what) in [(subject.first, format!("{what}, same")), (subject.second, format!("{what}, other"))] {
            let bench = Bench::new();
            let first = subject.adapter("a", variant.config(subject.first), 101);
            let second = subject.adapter("b", variant.config(targets), 102);
            let both = bench.import(&bench.import(&subject.path, &first), &second);
            assert_eq!(record(&both).active, ["a", "b"], "{what}");
            let together = subject.run(&both);
            for name in ["a", "b"] {
                assert_differs(&together, &subject.run(&bench.activate(&both, &[name])), 1e-5, &what);
            }
            let merged = bench.merge(&both);
            assert_close(&subject.run(&merged), &together, 1e-4, &what);
            let back = bench.unmerge(&merged, &[&first, &second]);
            assert_close(&subject.run(&back), subject.base(), 1e-4, &what);
            assert_close(&subject.run(&bench.activate(&both, &[])), subject.base(), 1e-4, &what);
        }
    });
}

#[test]
fn row_12_trained_adapters_merge_and_come_out_again() {
    each_learner(&VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let start = bench.inject(&subject.path, "default", variant.config(subject.first));
        let trained = bench.train(subject, &start, |options| TrainOptions { lr: 0.01, ..options }).injected;
        let adapter = extracted(&trained, "default");
        assert!(adapter.blocks.values().all(|b| b.to_f64().iter().any(|v| *v != 0.0)), "{what}");
        let output = subject.run(&trained);
        assert_differs(&output, subject.base(), 1e-5, what);
        let merged = bench.merge(&trained);
        assert_close(&subject.run(&merged), &output, 1e-5, what);
        // PEFT disables the merged adapter, which unmerges it.
        assert_close(&subject.run(&bench.unmerge(&merged, &[&adapter])), subject.base(), 1e-5, what);
        assert_close(&subject.run(&bench.activate(&trained, &[])), subject.base(), 1e-5, what);
        assert_close(&subject.run(&trained), &output, 1e-5, what);
    });
}
