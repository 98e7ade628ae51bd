//! Row 17: models in half precision, where PEFT 0.14 failed.

use std::collections::BTreeMap;

use bone_onnx::fold::FoldOptions;
use bone_onnx::onnx::Model;
use bone_onnx::verify::random_inputs;

use crate::common::{
    Bench, KINDS, assert_close, assert_differs, bytes, initializers, models_of, off, shared, zero_starts,
};

#[test]
fn row_17_half_precision_forward_merge_unmerge_safe_merge_unload() {
    let path = shared("models/bert_fp16.dyn18.onnx");
    let inputs = random_inputs(&Model::open(&path).expect("a model"), 2, 5, 1).expect("inputs");
    let subject = models_of("bert_fp16", path, inputs, &["query", "value"], &["output.dense"]);
    for variant in KINDS {
        let (what, bench) = (variant.name, Bench::new());
        let adapter = subject.adapter("default", variant.config(subject.first), 17);
        let injected = bench.import(&subject.path, &adapter);
        let outputs = subject.run(&injected);
        assert!(outputs.iter().all(|o| o.to_f64().iter().all(|v| v.is_finite())), "{what}");
        assert_differs(&outputs, subject.base(), 1e-3, what);

        // Both sides round to float16 in every layer.
        let merged = bench.fold(&injected, FoldOptions { safe: true, ..Default::default() });
        assert_close(&subject.run(&merged), &outputs, 5e-4, what);
        let types = |path| -> BTreeMap<String, _> {
            initializers(path).into_iter().map(|(name, value)| (name, value.data_type())).collect()
        };
        assert_eq!(types(&merged), types(&subject.path), "{what}");
        assert_eq!(bytes(&merged), bytes(&bench.merge(&injected)), "{what}: a safe merge is the plain one");

        let back = bench.unmerge(&merged, &[&adapter]);
        let (back, base) = (initializers(&back), initializers(&subject.path));
        for (name, value) in &base {
            let off = off(std::slice::from_ref(&back[name]), std::slice::from_ref(value));
            assert!(off <= 2e-3, "{what}: {name} is off by {off}");
        }
        assert!(bytes(&bench.unload(&injected)) == bytes(&subject.path), "{what}");
    }
    // A fresh one changes nothing, whatever the precision.
    for variant in zero_starts() {
        let bench = Bench::new();
        let fresh = bench.inject(&subject.path, "default", variant.config(subject.first));
        assert_close(&subject.run(&fresh), subject.base(), 5e-4, variant.name);
    }
}
