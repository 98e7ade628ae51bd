//! What is frozen before the layers that learn: computed once and kept, it changes nothing but the time.

use std::fmt::Write;
use std::path::Path;

use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor, node, value_info};
use bone_onnx::train::{self, CacheFrozen, CachePlan, Loss, Plan, Progress, StepReport, TrainOptions};
use prost::Message;

use crate::common::{injected, metrics, onnxruntime, shared, write_arrays};

/// Hears what is said of the cache, and asks to stop after so many steps.
struct Watch {
    cache: Option<CachePlan>,
    warnings: Vec<String>,
    rows: usize,
    steps: usize,
}

impl Watch {
    fn until(steps: usize) -> Self {
        Self { cache: None, warnings: Vec::new(), rows: 0, steps }
    }
}

impl Progress for Watch {
    fn caching(&mut self, done: usize, of: usize) {
        assert!(done < of);
        self.rows = of;
    }
    fn started(&mut self, plan: &Plan) {
        self.cache = Some(plan.cache.clone());
    }
    fn step(&mut self, _report: &StepReport) {
        self.steps -= 1;
    }
    fn warned(&mut self, what: &str) {
        self.warnings.push(what.into());
    }
    fn stop(&self) -> bool {
        self.steps == 0
    }
}

/// Texts of 1 to 11 tokens; each with a class, or with the tokens as their own labels.
fn texts(path: &Path, rows: usize, labels_are_tokens: bool) {
    let mut lines = String::new();
    for row in 0..rows {
        let ids: Vec<usize> = (0..1 + row * 7 % 11).map(|at| 1 + (row * 5 + at * 3) % 60).collect();
        let mask = vec![1; ids.len()];
        let labels = if labels_are_tokens { format!("{ids:?}") } else { (row % 3).to_string() };
        let _ = writeln!(lines, "{{\"input_ids\": {ids:?}, \"attention_mask\": {mask:?}, \"labels\": {labels}}}");
    }
    std::fs::write(path, lines).expect("a file");
}

fn pictures(path: &Path, rows: usize) {
    let numbers = (0..rows * 3 * 16 * 16).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let labels = Tensor::new(&[rows], (0..rows).map(|row| (row % 3) as i64).collect());
    write_arrays(path, &[("pixel_values", &Tensor::new(&[rows, 3, 16, 16], numbers)), ("labels", &labels)]);
}

/// The numbers that were trained, those of all parameters.
fn learned(summary: &train::Summary) -> Vec<f32> {
    let model = Model::open(&summary.injected).expect("a model");
    let blocks = model.graph().initializer.iter().filter(|t| t.name().contains("_block."));
    blocks.flat_map(|t| model.tensor(t).expect("values").to_f64()).map(|v| v as f32).collect()
}

#[test]
fn a_run_with_the_cache_is_the_run_without_it() {
    let loss = Loss::CrossEntropy { label_smoothing: 0.0 };
    let causal = Loss::CausalLm { label_smoothing: 0.0 };
    let bert = "bert.encoder.layer.1.attention.self.query,bert.encoder.layer.1.output.dense";
    for (name, targets, loss) in [
        ("bert.ts17.onnx", bert, loss),
        ("bert.dyn18.onnx", bert, loss),
        ("bert.ts11.onnx", "classifier", loss),
        ("bert_fp16.dyn18.onnx", "bert.encoder.layer.1.output.dense", loss),
        ("vit.ts17.onnx", "vit.layers.1.mlp.fc1,classifier", loss),
        ("llama.dyn18.onnx", "model.layers.1.self_attn.o_proj", causal),
        ("gpt2.ts17.onnx", "transformer.h.1.attn.c_attn", causal),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (data, eval) = match name.starts_with("vit") {
            true => (dir.path().join("data.safetensors"), dir.path().join("eval.safetensors")),
            false => (dir.path().join("data.jsonl"), dir.path().join("eval.jsonl")),
        };
        for (path, rows) in [(&data, 23), (&eval, 9)] {
            match name.starts_with("vit") {
                true => pictures(path, rows),
                false => texts(path, rows, loss == causal),
            }
        }
        let model = injected(&shared(&format!("models/{name}")), dir.path(), 4, targets, None);
        let run = |out: &str, cache_frozen| {
            let options = TrainOptions {
                eval_data: vec![eval.clone()],
                epochs: Some(3),
                batch_size: Some(4),
                lr: 1e-2,
                cache_frozen,
                ..TrainOptions::new(dir.path().join(out), &data, loss)
            };
            let mut watch = Watch::until(usize::MAX);
            let summary = train::run(&model, &options, onnxruntime(), &mut watch).unwrap();
            assert_eq!(watch.warnings, Vec::<String>::new(), "{name}");
            (summary, watch)
        };
        let (without, _) = run("without", CacheFrozen::Off);
        let (with, watch) = run("with", CacheFrozen::On);
        let cache = watch.cache.unwrap();
        println!("{name}: {cache:?}");
        assert_eq!((watch.rows, &cache.why_not, cache.values.is_empty()), (32, &None, false), "{name}");
        assert!(!name.contains("ts11") || cache.values.len() == 1, "{cache:?}");
        let tolerance = if name.contains("fp16") { 5e-3 } else { 1e-5 };
        let close = |a: f64, b: f64| assert!((a - b).abs() <= tolerance * a.abs(), "{name}: {a} and {b}");
        assert_eq!(with.steps.len(), 18);
        // Tokens count as before, though they are read no more.
        let per_sample = |s: &train::Summary| s.tokens_per_second.map(|t| (t / s.samples_per_second * 1e6).round());
        assert!(per_sample(&with).is_some() != name.starts_with("vit"), "{name}");
        assert_eq!(per_sample(&with), per_sample(&without), "{name}");
        without.steps.iter().zip(&with.steps).for_each(|(a, b)| close(a.loss, b.loss));
        without.evals.iter().zip(&with.evals).for_each(|(a, b)| close(a.eval_loss, b.eval_loss));
        let (a, b) = (learned(&without), learned(&with));
        let norm = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        let (all, off) = (norm(&mut a.iter().copied()), norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)));
        println!("{name}: adapters differ by {:.1e}", off / all);
        assert!(all > 0.0 && off <= 10.0 * tolerance * all, "{name}: {off} of {all}");
    }
}

/// input_ids[n,t] → an embedding → the mean over the tokens, padding included → frozen → fc → logits[n,3]
fn mean_of_all(width: usize) -> ModelProto {
    let values = |dims: &[usize]| {
        let len = dims.iter().product::<usize>();
        Tensor::new(dims, (0..len).map(|i| ((i * 37 % 23) as f32 - 11.0) / 40.0).collect())
    };
    let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
    graph.input.push(value_info("input_ids", DataType::Int64, &["n", "t"]));
    graph.output.push(value_info("logits", DataType::Float, &["n", "3"]));
    graph.initializer = vec![
        values(&[61, width]).to_proto("embedding"),
        values(&[width, width]).to_proto("frozen.weight"),
        values(&[width, 3]).to_proto("fc.weight"),
    ];
    let mut mean = node("ReduceMean", &["e"], &["m"]);
    mean.attribute = vec![AttributeProto::ints("axes", &[1]), AttributeProto::int("keepdims", 0)];
    graph.node = vec![
        node("Gather", &["embedding", "input_ids"], &["e"]),
        mean,
        node("MatMul", &["m", "frozen.weight"], &["f"]),
        node("Tanh", &["f"], &["h"]),
        node("Gemm", &["h", "fc.weight"], &["logits"]),
    ];
    let opset = OperatorSetIdProto { domain: Some(String::new()), version: Some(17) };
    ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
}

#[test]
fn a_frozen_part_that_padding_changes_is_found_out() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.onnx");
    std::fs::write(&base, mean_of_all(512).encode_to_vec()).unwrap();
    let model = injected(&base, dir.path(), 4, "fc", None);
    let data = dir.path().join("data.jsonl");
    let rows = |padded: bool| {
        let lines = (0..48).map(|row| {
            let length = if padded { 12 } else { 1 + row % 12 };
            let ids: Vec<usize> = (0..length).map(|at| 1 + (row * 5 + at * 3) % 60).collect();
            format!("{{\"input_ids\": {ids:?}, \"labels\": {}}}\n", row % 3)
        });
        std::fs::write(&data, lines.collect::<String>()).unwrap();
    };
    // So many epochs that it would pay; they are not waited for.
    let options = |out: &str, cache_frozen| TrainOptions {
        epochs: Some(10_000),
        batch_size: Some(4),
        cache_frozen,
        ..TrainOptions::new(dir.path().join(out), &data, Loss::CrossEntropy { label_smoothing: 0.0 })
    };
    let run = |out: &str, cache_frozen| {
        let mut watch = Watch::until(3);
        train::run(&model, &options(out, cache_frozen), onnxruntime(), &mut watch).map(|summary| (summary, watch))
    };
    rows(false);
    let (with, watch) = run("with", CacheFrozen::Auto).unwrap();
    assert_eq!(watch.warnings.len(), 1, "{:?}", watch.warnings);
    assert!(watch.warnings[0].contains("padding"), "{}", watch.warnings[0]);
    assert!(watch.cache.unwrap().why_not.unwrap().contains("padding"));
    // It goes on as if there had been none.
    let (without, _) = run("without", CacheFrozen::Off).unwrap();
    let losses = |summary: &train::Summary| summary.steps.iter().map(|step| step.loss).collect::<Vec<_>>();
    assert_eq!(losses(&with), losses(&without));
    let Err(refused) = run("asked", CacheFrozen::On) else { panic!("it was taken") };
    assert!(refused.to_string().contains("cache-frozen on") && refused.to_string().contains("padding"), "{refused}");
    assert!(!dir.path().join("asked").exists(), "a run that is refused leaves nothing");
    // Where no row is padded, the same model is taken.
    rows(true);
    let (_, watch) = run("even", CacheFrozen::Auto).unwrap();
    assert_eq!((watch.warnings.len(), watch.cache.unwrap().why_not), (0, None));
}

#[test]
fn a_cache_that_cannot_be_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let bert = shared("models/bert.ts17.onnx");
    let data = dir.path().join("data.jsonl");
    texts(&data, 23, false);
    let run = |out: &str, targets: &str, change: fn(&mut TrainOptions)| {
        let model = injected(&bert, dir.path(), 4, targets, None);
        let mut options = TrainOptions {
            steps: Some(20),
            cache_frozen: CacheFrozen::On,
            ..TrainOptions::new(dir.path().join(out), &data, Loss::CrossEntropy { label_smoothing: 0.0 })
        };
        change(&mut options);
        let mut watch = Watch::until(1);
        train::run(&model, &options, onnxruntime(), &mut watch).map(|_| watch.cache.unwrap())
    };
    for (targets, change, why) in [
        ("classifier", (|o| o.cache_limit = 100) as fn(&mut TrainOptions), "cache-limit (100 bytes)"),
        ("all-linear", |_| (), "quickly computed"),
    ] {
        let refused = run("refused", targets, change).unwrap_err().to_string();
        assert!(refused.contains("cache-frozen on") && refused.contains(why), "{refused}");
    }
    for (change, why) in [
        ((|o| o.cache_frozen = CacheFrozen::Off) as fn(&mut TrainOptions), "off"),
        (|o| o.cache_frozen = CacheFrozen::Auto, "too little"),
        (|o| (o.cache_frozen, o.steps) = (CacheFrozen::Auto, Some(1)), "once"),
    ] {
        let said = run(why, "classifier", change).unwrap().why_not.unwrap();
        assert!(said.contains(why), "{said}");
    }
    // 23 rows of 32 floats.
    assert_eq!(run("taken", "classifier", |_| ()).unwrap().bytes, 23 * 32 * 4);
}

#[test]
fn a_run_with_the_cache_goes_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, eval) = (dir.path().join("data.jsonl"), dir.path().join("eval.jsonl"));
    texts(&data, 31, false);
    texts(&eval, 9, false);
    let targets = "bert.encoder.layer.1.attention.self.query,bert.encoder.layer.1.output.dense";
    let model = injected(&shared("models/bert.ts17.onnx"), dir.path(), 4, targets, None);
    let options = |out: &str| TrainOptions {
        eval_data: vec![eval.clone()],
        steps: Some(25),
        batch_size: Some(4),
        lr: 1e-2,
        cache_frozen: CacheFrozen::On,
        save_steps: Some(25),
        resume: true,
        ..TrainOptions::new(dir.path().join(out), &data, Loss::CrossEntropy { label_smoothing: 0.0 })
    };
    train::run(&model, &options("alone"), onnxruntime(), &mut ()).unwrap();
    for steps in [3, 1, 9] {
        assert!(train::run(&model, &options("parts"), onnxruntime(), &mut Watch::until(steps)).unwrap().stopped);
    }
    train::run(&model, &options("parts"), onnxruntime(), &mut ()).unwrap();
    let (a, b) = (dir.path().join("alone"), dir.path().join("parts"));
    let without_time = |dir: &Path| {
        let mut lines = metrics(dir);
        lines.iter_mut().filter_map(|line| line.as_object_mut()).for_each(|line| drop(line.remove("seconds")));
        lines
    };
    assert_eq!(without_time(&a), without_time(&b));
    for name in ["injected.onnx", "adapter/adapter_model.safetensors", "checkpoint-25/training_state.safetensors"] {
        assert!(std::fs::read(a.join(name)).unwrap() == std::fs::read(b.join(name)).unwrap(), "{name}");
    }
    // The cache leaves nothing behind.
    let left: Vec<String> = crate::common::files(&a);
    assert!(left.iter().all(|name| !name.starts_with('.')), "{left:?}");
    // Another choice is another run.
    let other = TrainOptions { cache_frozen: CacheFrozen::Off, ..options("parts") };
    let refused = train::run(&model, &other, onnxruntime(), &mut ()).unwrap_err().to_string();
    assert!(refused.contains("cache-frozen was On and is Off now"), "{refused}");
}
