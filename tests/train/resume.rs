//! Going on from a checkpoint in ONNX Runtime, where layers drop inputs out and where the loss scale has changed.

use std::path::Path;

use bone_onnx::adapter::{BoneConfig, Pool, TargetModules};
use bone_onnx::inject::{HeadOptions, InjectOptions, inject};
use bone_onnx::onnx::proto::OperatorSetIdProto;
use bone_onnx::onnx::{AttributeProto, DataType, GraphProto, Model, ModelProto, Tensor};
use bone_onnx::onnx::{node, value_info};
use bone_onnx::train::{self, Loss, Precision, Progress, StepReport, Summary, TrainOptions};

use prost::Message;

use crate::common::{arrays, injected, metrics, mlp, onnxruntime, shared, write_arrays};

/// Asks to stop after a number of steps.
struct Until(usize);

impl Progress for Until {
    fn step(&mut self, _report: &StepReport) {
        self.0 = self.0.saturating_sub(1);
    }
    fn stop(&self) -> bool {
        self.0 == 0
    }
}

fn without_time(dir: &Path) -> Vec<serde_json::Value> {
    let mut lines = metrics(dir);
    lines.iter_mut().filter_map(|line| line.as_object_mut()).for_each(|line| drop(line.remove("seconds")));
    lines
}

#[test]
fn dropout_draws_what_it_would_have_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let base = Model::open(mlp("base_gemm.onnx")).unwrap();
    let config = BoneConfig {
        r: 4,
        miss_dropout: 0.5,
        target_modules: Some(TargetModules::parse("all-linear")),
        ..Default::default()
    };
    let head = HeadOptions { name: "goal".into(), labels: 4, input: "y".into(), pool: Pool::None, mask: None };
    let path = dir.path().join("start.onnx");
    let injection = InjectOptions { config, head: Some(head), seed: 1, ..Default::default() };
    inject(&base, &injection).unwrap().write(&base, &path).unwrap();
    let model = Model::open(&path).unwrap();
    let goldens = arrays(&shared("goldens/mlp/base.safetensors"));
    let data = dir.path().join("data.safetensors");
    write_arrays(&data, &[("x", &goldens["x"]), ("labels", &goldens["y"])]);
    let options = |out: &str| TrainOptions {
        steps: Some(12),
        batch_size: Some(5),
        eval_data: vec![data.clone()],
        head_lr: Some(1e-2),
        save_steps: Some(12),
        resume: true,
        ..TrainOptions::new(dir.path().join(out), &data, Loss::Mse)
    };
    let alone = train::run(&model, &options("alone"), onnxruntime(), &mut ()).unwrap();
    for steps in [3, 1, 4] {
        let summary = train::run(&model, &options("parts"), onnxruntime(), &mut Until(steps)).unwrap();
        assert!(summary.stopped && summary.checkpoint.is_some());
    }
    let parts = train::run(&model, &options("parts"), onnxruntime(), &mut ()).unwrap();
    assert!(!parts.stopped && parts.steps.len() == 12 && parts.evals == alone.evals);
    let (a, b) = (dir.path().join("alone"), dir.path().join("parts"));
    assert_eq!(without_time(&a), without_time(&b));
    for name in ["injected.onnx", "adapter/adapter_model.safetensors", "checkpoint-12/training_state.safetensors"] {
        assert!(std::fs::read(a.join(name)).unwrap() == std::fs::read(b.join(name)).unwrap(), "{name}");
    }
    // Masks that drew nothing would not have told.
    let last_loss = |out: &str, seed| {
        let options = TrainOptions { seed, shuffle: false, ..options(out) };
        train::run(&model, &options, onnxruntime(), &mut ()).unwrap().steps[11].loss
    };
    assert_ne!(last_loss("seed 0", 0), last_loss("seed 1", 1));
}

/// input_ids[n,t] → an embedding → the mean over the tokens, padding included → fc (Gemm) → logits[n,3]
fn tokens() -> ModelProto {
    let values = |dims: &[usize]| {
        let len = dims.iter().product::<usize>();
        Tensor::new(dims, (0..len).map(|i| ((i * 37 % 23) as f32 - 11.0) / 40.0).collect())
    };
    let mut graph = GraphProto { name: Some("net".into()), ..Default::default() };
    graph.input.push(value_info("input_ids", DataType::Int64, &["n", "t"]));
    graph.output.push(value_info("logits", DataType::Float, &["n", "3"]));
    graph.initializer = vec![values(&[50, 8]).to_proto("embedding"), values(&[8, 3]).to_proto("fc.weight")];
    let mut mean = node("ReduceMean", &["e"], &["m"]);
    mean.attribute = vec![AttributeProto::ints("axes", &[1]), AttributeProto::int("keepdims", 0)];
    let fc = node("Gemm", &["m", "fc.weight"], &["logits"]);
    graph.node = vec![node("Gather", &["embedding", "input_ids"], &["e"]), mean, fc];
    let opset = OperatorSetIdProto { domain: Some(String::new()), version: Some(17) };
    ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
}

#[test]
fn batches_of_like_lengths_go_on_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.onnx");
    std::fs::write(&base, tokens().encode_to_vec()).unwrap();
    let model = injected(&base, dir.path(), 2, "all-linear", None);
    let lines = (0..50).map(|row| {
        let ids: Vec<usize> = (0..1 + row * 17 % 40).map(|at| 1 + (row * 7 + at * 3) % 49).collect();
        format!("{{\"input_ids\": {ids:?}, \"label\": {}}}\n", row % 3)
    });
    let data = dir.path().join("data.jsonl");
    std::fs::write(&data, lines.collect::<String>()).unwrap();
    // Two and a half epochs, with the short batches at their ends.
    let options = |out: &str, group_by_length| TrainOptions {
        steps: Some(17),
        batch_size: Some(4),
        gradient_accumulation_steps: 2,
        lr: 1e-2,
        group_by_length,
        save_steps: Some(17),
        resume: true,
        ..TrainOptions::new(dir.path().join(out), &data, Loss::CrossEntropy { label_smoothing: 0.0 })
    };
    train::run(&model, &options("alone", true), onnxruntime(), &mut ()).unwrap();
    for steps in [3, 1, 6] {
        assert!(train::run(&model, &options("parts", true), onnxruntime(), &mut Until(steps)).unwrap().stopped);
    }
    train::run(&model, &options("parts", true), onnxruntime(), &mut ()).unwrap();
    let (a, b) = (dir.path().join("alone"), dir.path().join("parts"));
    assert_eq!(without_time(&a), without_time(&b));
    for name in ["injected.onnx", "adapter/adapter_model.safetensors", "checkpoint-17/training_state.safetensors"] {
        assert!(std::fs::read(a.join(name)).unwrap() == std::fs::read(b.join(name)).unwrap(), "{name}");
    }
    // It is another order than the one that heeds no lengths.
    train::run(&model, &options("plain", false), onnxruntime(), &mut ()).unwrap();
    assert_ne!(without_time(&a), without_time(&dir.path().join("plain")));
}

/// What a run came to: steps, runs of the graph, loss scale, steps since that changed.
fn scaling(summary: &Summary) -> (usize, u64, f64, u64) {
    let text = std::fs::read(summary.checkpoint.as_ref().unwrap().join("trainer_state.json")).unwrap();
    let file: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let state = &file["state"];
    let [runs, finite_steps] = ["runs", "finite_steps"].map(|key| state[key].as_u64().unwrap());
    (summary.steps.len(), runs, state["loss_scale"].as_f64().unwrap(), finite_steps)
}

#[test]
fn the_loss_scale_falls_where_gradients_overflow_and_grows_again_over_interruptions() {
    let dir = tempfile::tempdir().unwrap();
    let model = injected(&mlp("base_gemm.onnx"), dir.path(), 4, "all-linear", None);
    let goldens = arrays(&shared("goldens/mlp/base.safetensors"));
    // Far beyond what the model gives: the loss is in float32, but its gradient times 65536 is no float16.
    let far = goldens["y"].to_f64().iter().map(|v| *v as f32 * 10.0 + 2000.0).collect();
    let far = Tensor::new(goldens["y"].dims(), far);
    let data = dir.path().join("data.safetensors");
    write_arrays(&data, &[("x", &goldens["x"]), ("labels", &far)]);
    for on_device in [false, true] {
        let run = |out: &str, until: usize| {
            let options = TrainOptions {
                steps: Some(2040),
                batch_size: Some(5),
                lr: 0.1,
                precision: Precision::F16,
                save_steps: Some(2040),
                resume: true,
                optimizer_on_device: Some(on_device),
                ..TrainOptions::new(dir.path().join(format!("{out} {on_device}")), &data, Loss::Mse)
            };
            train::run(&model, &options, onnxruntime(), &mut Until(until)).unwrap()
        };
        let alone = run("alone", usize::MAX);
        // Right after it fell, within the row of steps after which it grows, and after that.
        let (steps, runs, first, finite_steps) = scaling(&run("parts", 1));
        assert!(first < 65536.0 && finite_steps == steps as u64 && runs > finite_steps, "{first} after {runs} runs");
        let (start, runs, fallen, counted) = scaling(&run("parts", 49));
        let (steps, later_runs, scale, finite_steps) = scaling(&run("parts", 1800));
        let more = (steps - start) as u64;
        assert_eq!((later_runs, scale, finite_steps), (runs + more, fallen, counted + more));
        let (steps, _, grown, finite_steps) = scaling(&run("parts", 182));
        let since = counted + (steps - start) as u64 - 2000;
        assert!((grown, finite_steps) == (fallen * 2.0, since), "{grown} since {finite_steps} steps, not {since}");
        let parts = run("parts", usize::MAX);
        assert!(!parts.stopped && parts.steps.len() == 2040);
        assert_eq!(scaling(&alone), scaling(&parts));
        let [alone, parts] = ["alone", "parts"].map(|out| dir.path().join(format!("{out} {on_device}")));
        assert_eq!(without_time(&alone), without_time(&parts));
        for name in ["injected.onnx", "checkpoint-2040/training_state.safetensors"] {
            assert!(std::fs::read(alone.join(name)).unwrap() == std::fs::read(parts.join(name)).unwrap(), "{name}");
        }
    }
}
