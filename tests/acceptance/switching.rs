//! Rows about which adapters count: zeros, on and off, several, deleting, unloading.

use bone_onnx::inject;
use bone_onnx::onnx::Model;
use bone_onnx::train::TrainOptions;
use bone_onnx::train::optimizer::Rule;

use crate::common::{
    Bench, KINDS, VARIANTS, allclose, assert_close, assert_differs, bytes, each, everywhere, extracted, initializers,
    mlps, record, shared, transformers, zero_starts,
};
use crate::learning::each_learner;

#[test]
fn row_11_zeros_change_nothing_training_does_and_switching_off_and_on_brings_each_back() {
    each_learner(&zero_starts(), |subject, variant, what| {
        let bench = Bench::new();
        let start = bench.inject(&subject.path, "default", variant.config(subject.first));
        assert!(allclose(&subject.run(&start), subject.base(), 1e-5, 1e-8), "{what}");
        let sgd =
            |options| TrainOptions { optimizer: Rule::Sgd { momentum: 0.0, nesterov: false }, lr: 1.0, ..options };
        let trained = bench.train(subject, &start, sgd).injected;
        let output = subject.run(&trained);
        assert!(!allclose(&output, subject.base(), 1e-5, 1e-8), "{what}");
        let off = bench.activate(&trained, &[]);
        assert!(allclose(&subject.run(&off), subject.base(), 1e-5, 1e-8), "{what}");
        let on = bench.activate(&off, &["default"]);
        assert!(allclose(&subject.run(&on), &output, 1e-5, 1e-8), "{what}");
    });
}

#[test]
fn row_18_the_active_adapters_are_those_that_were_set() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let config = || variant.config(subject.first);
        let (a, b) = (subject.adapter("default", config(), 181), subject.adapter("other", config(), 182));
        let first = bench.import(&subject.path, &a);
        assert_eq!(record(&first).active, ["default"], "{what}");
        let both = bench.import(&first, &b);
        assert_eq!(record(&both).active, ["default", "other"], "{what}");
        for names in [&["other"][..], &["default"], &["other", "default"], &["default", "other"], &[]] {
            let set = bench.activate(&both, names);
            assert_eq!(record(&set).active, names, "{what}");
            // Setting it again finds nothing to do.
            assert_eq!(bytes(&bench.activate(&set, names)), bytes(&set), "{what}");
            if let [only] = names {
                let alone = bench.import(&subject.path, if *only == "other" { &b } else { &a });
                assert_eq!(subject.run(&set), subject.run(&alone), "{what}: {only}");
            }
        }
        let model = Model::open(&both).expect("a model");
        let refused = |names: &[&str], word: &str| {
            let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
            let refusal = inject::activate(&model, &names).err().expect(what).to_string();
            assert!(refusal.contains(word), "{what}: {refusal}");
        };
        refused(&["othre"], "Adapter othre does not exist; the model has default, other. Did you mean other?");
        refused(&["other", "other"], "named twice");
    });
}

#[test]
fn row_19_switching_off_leads_back_to_the_very_state_before() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let config = || variant.config(subject.first);
        let first = bench.import(&subject.path, &subject.adapter("default", config(), 191));
        let both = bench.import(&first, &subject.adapter("other", config(), 192));
        for state in [&["default", "other"][..], &["other"], &["default"], &[]] {
            let set = bench.activate(&both, state);
            let before = bytes(&set);
            let off = bench.activate(&set, &[]);
            assert_eq!(subject.run(&off), subject.base(), "{what}");
            assert_eq!(bytes(&bench.activate(&off, state)), before, "{what}: {state:?}");
            assert_eq!(bytes(&set), before, "{what}: {state:?}");
        }
    });
}

#[test]
fn row_20_deleting_leaves_nothing_and_another_adapter_takes_over() {
    everywhere(|subject, variant, what| {
        let bench = Bench::new();
        let config = || variant.config(subject.first);
        let adapters = ["default", "to-delete", "zeta"].map(|name| subject.adapter(name, config(), name.len() as u64));
        let all = adapters.iter().fold(subject.path.clone(), |path, adapter| bench.import(&path, adapter));
        let leftovers = |path: &std::path::Path| {
            let model = Model::open(path).expect("a model");
            let named = |text: &str| text.contains("to-delete");
            model.graph().initializer.iter().any(|t| named(t.name()))
                || model.graph().node.iter().any(|n| named(n.name()) || n.output.iter().any(|o| named(o)))
                || model.proto.metadata_props.iter().any(|p| named(p.value()))
        };

        // Active: the alphabetically first of the others takes over.
        let active = bench.activate(&all, &["to-delete"]);
        assert!(leftovers(&active), "{what}");
        let deleted = bench.delete(&active, "to-delete");
        assert_eq!(record(&deleted).active, ["default"], "{what}");
        assert!(!leftovers(&deleted), "{what}");
        assert_eq!(subject.run(&deleted), subject.run(&bench.import(&subject.path, &adapters[0])), "{what}");

        // Inactive: those that are active stay.
        let inactive = bench.delete(&bench.activate(&all, &["zeta"]), "to-delete");
        assert_eq!(record(&inactive).active, ["zeta"], "{what}");
        assert!(!leftovers(&inactive), "{what}");

        let model = Model::open(&all).expect("a model");
        let refusal = inject::delete(&model, "unknown-adapter").err().expect(what).to_string();
        assert!(refusal.contains("Adapter unknown-adapter does not exist"), "{refusal}");

        // The last one can go, and the model still runs.
        let none = ["default", "zeta"].iter().fold(deleted, |path, name| bench.delete(&path, name));
        let record = bone_onnx::adapter::Injection::read(&Model::open(&none).expect("a model")).expect("metadata");
        assert!(record.is_none_or(|r| r.active.is_empty() && r.adapters.is_empty()), "{what}");
        assert_eq!(subject.run(&none), subject.base(), "{what}");
    });
}

#[test]
fn row_21_unloading_gives_the_base_back_byte_for_byte() {
    let more = ["bert_ext.dyn18", "bert_fp16.dyn18", "bert_nofold.ts17", "bert.ts11", "mlp3d.dyn18", "vit.ts17"];
    let extra =
        more.map(|name| (shared(&format!("models/{name}.onnx")), if name.starts_with('b') { "query" } else { "" }));
    let subjects = mlps().into_iter().chain(transformers()).map(|s| (s.path, s.first[0]));
    for (base, target) in subjects.chain(extra) {
        for variant in VARIANTS {
            let what = format!("{} with {}", base.display(), variant.name);
            let bench = Bench::new();
            let target = match (target, base.to_string_lossy().contains("vit")) {
                ("", true) => "q_proj",
                ("", false) => "fc1",
                (target, _) => target,
            };
            let three = ["default", "second", "third"]
                .iter()
                .fold(base.clone(), |path, name| bench.inject(&path, name, variant.config(&[target])));
            let two = bench.delete(&bench.activate(&three, &["third", "default"]), "second");
            assert!(bytes(&bench.unload(&two)) == bytes(&base), "{what}");
            assert!(bytes(&bench.unload(&three)) == bytes(&base), "{what}");
            assert!(bytes(&bench.unload(&bench.activate(&three, &[]))) == bytes(&base), "{what}");
        }
    }
}

#[test]
fn row_22_an_adapter_with_modules_to_save_and_one_without_take_turns() {
    everywhere(|subject, variant, what| {
        let mut config = variant.config(subject.first);
        let plain = subject.adapter("plain", config.clone(), 221);
        config.modules_to_save = Some(vec![subject.second[0].into()]);
        let saving = subject.adapter("saving", config, 222);
        assert!(!saving.saved.is_empty(), "{what}");
        let alone = [&plain, &saving].map(|a| subject.run(&Bench::new().import(&subject.path, a)));
        assert_differs(&alone[0], &alone[1], 1e-5, what);
        for order in [[&plain, &saving], [&saving, &plain]] {
            let bench = Bench::new();
            let mut path = order.into_iter().fold(subject.path.clone(), |path, adapter| bench.import(&path, adapter));
            for name in ["plain", "saving", "plain"] {
                path = bench.activate(&path, &[name]);
                let wanted = &alone[usize::from(name == "saving")];
                assert_eq!(&subject.run(&path), wanted, "{what}: {name}");
            }
            // Both at once merge to what they compute.
            let both = bench.activate(&path, &["plain", "saving"]);
            assert_close(&subject.run(&bench.merge(&both)), &subject.run(&both), 1e-4, what);
            assert_eq!(subject.run(&bench.activate(&both, &[])), subject.base(), "{what}");
            for adapter in order {
                let got = extracted(&both, &adapter.name);
                assert_eq!((&got.blocks, &got.saved), (&adapter.blocks, &adapter.saved), "{what}");
            }
        }
    });
}

#[test]
fn row_23_an_adapters_name_makes_no_difference() {
    let names = ["default", "adapter", "other-name", "layers", "b", "lin0", "miss_block"];
    each(&mlps(), &VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let injected = names.map(|name| bench.inject(&subject.path, name, variant.config(subject.first)));
        let values = |path: &std::path::PathBuf| initializers(path).into_values().collect::<Vec<_>>();
        let output = subject.run(&injected[0]);
        for (name, path) in names.iter().zip(&injected) {
            assert_eq!(values(path), values(&injected[0]), "{what}: {name}");
            assert_eq!(subject.run(path), output, "{what}: {name}");
        }
    });
    // Values that are no zeros, in models with layers of these names.
    each(&transformers(), &KINDS, |subject, variant, what| {
        let bench = Bench::new();
        let adapter = subject.adapter("default", variant.config(subject.first), 23);
        let wanted = subject.run(&bench.import(&subject.path, &adapter));
        for name in ["layer", "layers", "query"] {
            let renamed = bone_onnx::adapter::Adapter { name: name.into(), ..adapter.clone() };
            let loaded = bench.import(&subject.path, &renamed);
            assert_eq!(subject.run(&loaded), wanted, "{what}: {name}");
            assert_eq!(extracted(&loaded, name).blocks, adapter.blocks, "{what}: {name}");
        }
    });
}
