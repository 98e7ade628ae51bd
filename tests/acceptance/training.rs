//! Rows about what training changes: only what the adapters brought, and exactly that.

use std::collections::BTreeSet;
use std::path::Path;

use bone_onnx::adapter::{Adapter, Bias, BoneConfig, Injection};
use bone_onnx::engine::LoadOptions;
use bone_onnx::onnx::{Model, ModelProto};
use bone_onnx::peft::{self, ReadOptions};
use bone_onnx::train::data::{Batch, Field, LabelKind, Target};
use bone_onnx::train::graph::{self, Learners, LossModel, Task};
use bone_onnx::train::optimizer::Rule;
use bone_onnx::train::{self, Loss, Pooling, TrainOptions};

use crate::common::{Bench, KINDS, Subject, VARIANTS, assert_close, engine, extracted, initializers, mlps, record};
use crate::learning::each_learner;

fn sgd(options: TrainOptions) -> TrainOptions {
    TrainOptions { optimizer: Rule::Sgd { momentum: 0.0, nesterov: false }, lr: 0.5, ..options }
}

/// Names of the initializers whose bytes differ; everything else in the two files has to be the same.
fn changed(before: &Path, after: &Path) -> BTreeSet<String> {
    let (a, b) = (initializers(before), initializers(after));
    assert!(a.keys().eq(b.keys()));
    let changed = a.iter().filter(|(name, value)| b[*name] != **value).map(|(name, _)| name.clone()).collect();
    let rest = |path: &Path| -> ModelProto {
        let mut proto = Model::open(path).expect("a model").proto;
        for tensor in &mut proto.graph.as_mut().expect("a graph").initializer {
            if a[tensor.name()] != b[tensor.name()] {
                tensor.raw_data = None;
            }
        }
        proto
    };
    assert!(rest(before) == rest(after));
    changed
}

/// With a bias of its own and another module in full, where the variant is for all of it.
fn saving(subject: &Subject, config: BoneConfig) -> BoneConfig {
    BoneConfig { modules_to_save: Some(vec![subject.second[0].into()]), bias: Bias::Only, ..config }
}

#[test]
fn row_13_only_the_adapters_parameters_and_saved_modules_change() {
    each_learner(&VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        // A frozen adapter stays as it is, active or not.
        let frozen = subject.adapter("frozen", variant.config(subject.first), 13);
        let start = bench.import(&subject.path, &frozen);
        let start = bench.inject(&start, "default", saving(subject, variant.config(subject.first)));
        for active in [&["frozen", "default"][..], &["default"]] {
            let start = bench.activate(&start, active);
            let learn = |options| TrainOptions { adapter_names: Some(vec!["default".into()]), ..sgd(options) };
            let trained = bench.train(subject, &start, learn).injected;
            let wanted: BTreeSet<String> =
                record(&start).named("default").expect("it").parameters().map(str::to_string).collect();
            assert_eq!(changed(&start, &trained), wanted, "{what}");
            // PEFT's criterion, on PEFT's kind of model.
            let (before, after) = (initializers(&start), initializers(&trained));
            for parameter in wanted.iter().filter(|_| subject.name.starts_with("base_")) {
                let pairs = before[parameter].to_f64().into_iter().zip(after[parameter].to_f64());
                let moved = pairs.into_iter().any(|(a, b)| (a - b).abs() > 1e-4 + 1e-4 * b.abs());
                assert!(moved, "{what}: {parameter}");
            }
        }
    });
}

#[test]
fn row_14_gradients_only_on_what_trains() {
    each_learner(&VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let start = bench.import(&subject.path, &subject.adapter("frozen", variant.config(subject.first), 14));
        let start = bench.inject(&start, "default", saving(subject, variant.config(subject.first)));
        let model = Model::open(&start).expect("a model");
        let injection = Injection::expect(&model).expect("a record");
        let trained = vec!["default".to_string()];
        let parameters = graph::parameters(&model, &injection, &trained, false).expect("parameters");
        let wanted: BTreeSet<&str> = injection.named("default").expect("it").parameters().collect();
        assert_eq!(parameters.iter().map(|p| p.name.as_str()).collect::<BTreeSet<_>>(), wanted, "{what}");

        let learners = Learners { injection: &injection, trained: &trained, dropout: None };
        let (goal, output) = (subject.goal(), Field::of(&model.graph().output[0]));
        let columns = [Target::labels("labels", LabelKind::Number, &output).field(goal.dims().len())];
        let (loss, pooling) = (Loss::Mse, &Pooling::default());
        let task = Task::new(loss, pooling, &output, &columns);
        let loss = LossModel::new(&model, learners, &parameters, task).expect(what);
        let mut session = loss.gradient(engine(), &LoadOptions { threads: Some(1), optimize: true }).expect(what);
        let inputs = subject.inputs.iter().map(|(n, t)| (n.clone(), t.clone())).collect();
        let (_, gradients) = session
            .run(&parameters, &Batch { inputs, samples: goal.dims()[0], targets: vec![goal], tokens: None })
            .expect(what);
        assert_eq!(gradients.len(), parameters.len(), "{what}");
        for (parameter, gradient) in parameters.iter().zip(gradients) {
            let values = gradient.to_f64();
            let some = values.iter().all(|v| v.is_finite()) && values.iter().any(|v| *v != 0.0);
            assert!(some, "{what}: {}", parameter.name);
        }
    });
}

/// What a run left in `adapter/`, read again.
fn saved(dir: &Path, name: &str) -> Adapter {
    let dir = peft::place(dir, name).expect("a place");
    peft::read(&dir, name, &ReadOptions::default(), &mut Vec::new()).expect("an adapter")
}

#[test]
fn row_15_trained_parameters_survive_saving_and_loading() {
    each_learner(&VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let start = bench.inject(&subject.path, "default", saving(subject, variant.config(subject.first)));
        let start = bench.inject(&start, "other", variant.config(subject.first));
        let run = bench.train(subject, &start, |options| TrainOptions { lr: 0.01, ..options });
        for name in ["default", "other"] {
            let (fresh, trained) = (extracted(&start, name), extracted(&run.injected, name));
            assert!(fresh.blocks.iter().all(|(module, block)| trained.blocks[module] != *block), "{what}");
            assert!(fresh.saved.iter().all(|(path, value)| trained.saved[path] != *value), "{what}");
            let loaded = saved(&run.adapter, name);
            assert_eq!((&loaded.blocks, &loaded.saved), (&trained.blocks, &trained.saved), "{what}");
            let imported = extracted(&bench.import(&subject.path, &loaded), name);
            assert_eq!((&imported.blocks, &imported.saved), (&trained.blocks, &trained.saved), "{what}");
        }
    });
}

#[test]
fn row_16_outputs_after_saving_and_loading_are_the_trained_models() {
    each_learner(&VARIANTS, |subject, variant, what| {
        let bench = Bench::new();
        let start = bench.inject(&subject.path, "default", saving(subject, variant.config(subject.first)));
        let run = bench.train(subject, &start, |options| TrainOptions { lr: 0.01, ..options });
        let loaded = bench.import(&subject.path, &saved(&run.adapter, "default"));
        assert_close(&subject.run(&loaded), &subject.run(&run.injected), 1e-4, what);
    });
}

#[test]
fn row_24_exactly_these_parameters_train() {
    let [gemm, _] = &mlps()[..] else { panic!("two forms") };
    let names = |list: &[&str]| list.iter().map(|n| n.to_string()).collect::<BTreeSet<String>>();
    for variant in KINDS {
        let what = variant.name;
        let bench = Bench::new();
        let config = |targets: &[&str]| variant.config(targets);
        let both = &["lin0", "lin1"][..];
        // Targets and settings of two adapters; what trains of the first, of the second.
        let cases: [(BoneConfig, BoneConfig, &[&str], &[&str]); 4] = [
            (
                config(both),
                config(both),
                &["lin0.miss_block.default", "lin1.miss_block.default"],
                &["lin0.miss_block.second", "lin1.miss_block.second"],
            ),
            (config(&["lin0"]), config(&["lin1"]), &["lin0.miss_block.default"], &["lin1.miss_block.second"]),
            (
                saving(gemm, config(&["lin0"])),
                config(&["lin0"]),
                &["lin0.miss_block.default", "lin0.bias.default", "lin1.weight.default", "lin1.bias.default"],
                &["lin0.miss_block.second"],
            ),
            (
                config(&["lin1"]),
                BoneConfig { bias: Bias::All, ..config(&["lin0"]) },
                &["lin1.miss_block.default"],
                &["lin0.miss_block.second", "lin0.bias.second", "lin1.bias.second"],
            ),
        ];
        for (first, second, of_first, of_second) in cases {
            let model = bench.inject(&bench.inject(&gemm.path, "default", first), "second", second);
            let record = record(&model);
            let (of_first, of_second) = (names(of_first), names(of_second));
            let all: BTreeSet<String> = of_first.union(&of_second).cloned().collect();
            let train = |model: &Path, chosen: Option<&[&str]>| {
                let adapter_names = chosen.map(|c| c.iter().map(|n| n.to_string()).collect());
                let learn = |options| TrainOptions { adapter_names, steps: Some(1), ..sgd(options) };
                changed(model, &bench.train(gemm, model, learn).injected)
            };
            for (chosen, wanted) in
                [(&["default"][..], &of_first), (&["second"], &of_second), (&["default", "second"], &all)]
            {
                let trainable = record.trainable(&chosen.iter().map(|n| n.to_string()).collect::<Vec<_>>());
                assert_eq!(&trainable.into_iter().map(|t| t.name).collect::<BTreeSet<_>>(), wanted, "{what}");
                // Both are active, and one is chosen; or it is the only one that is active.
                assert_eq!(&train(&model, Some(chosen)), wanted, "{what}");
                assert_eq!(&train(&bench.activate(&model, chosen), None), wanted, "{what}");
            }
            assert!(record.trainable(&[]).is_empty());
            let refused = |active: &[&str], chosen: Option<&str>| {
                let model = Model::open(bench.activate(&model, active)).expect("a model");
                let adapter_names = chosen.map(|c| vec![c.to_string()]);
                let options = TrainOptions { adapter_names, ..bench.options(gemm) };
                train::run(&model, &options, engine(), &mut ()).expect_err(what).to_string()
            };
            let refusal = refused(&[], None);
            assert!(refusal.contains("none of its adapters is active"), "{refusal}");
            let refusal = refused(&["default"], Some("second"));
            assert!(refusal.contains("second") && refusal.contains("active"), "{refusal}");
        }
    }
}
