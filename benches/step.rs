//! One training step against one forward pass of the base model, both in ONNX Runtime, on a 6-layer MiniLM at 16 × 128
//! tokens: Bone (r = 16) on all linear layers and a head. Criterion times each alone; the ratio comes from runs taken
//! in turn, so that the machine's drift meets both, and goes into benches/RESULTS.md.
//!
//! The model comes from `scripts/fetch.py minilm6` and `scripts/minilm6_onnx.py`; the 3-layer one of `scripts/fetch.py
//! minilm` serves where it is not there.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bone_onnx::adapter::{BoneConfig, Injection, Pool, TargetModules};
use bone_onnx::engine::{self, Device, EngineKind, LoadOptions, Session};
use bone_onnx::inject::{HeadOptions, InjectOptions, inject};
use bone_onnx::onnx::{Model, Tensor};
use bone_onnx::train::data::{Batch, Field, LabelKind, Target};
use bone_onnx::train::graph::{GradientSession, Learners, LossModel, Parameter, Task, parameters};
use bone_onnx::train::optimizer::{Group, Optimizer, Rule, Scale};
use bone_onnx::train::{Loss, Pooling};
use criterion::Criterion;

const BATCH: usize = 16;
const LENGTH: usize = 128;
const R: usize = 16;

struct Bench {
    name: &'static str,
    forward: Box<dyn Session>,
    inputs: Vec<(String, Tensor)>,
    output: String,
    step: GradientSession,
    parameters: Vec<Parameter>,
    batch: Batch,
    optimizer: Optimizer,
}

impl Bench {
    fn forward(&mut self) {
        let inputs: Vec<(&str, &Tensor)> = self.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
        self.forward.run(&inputs, &[&self.output]).expect("a forward pass");
    }

    fn step(&mut self) {
        let (_, gradients) = self.step.run(&self.parameters, &self.batch).expect("a step");
        let gradients: Vec<&[f32]> = gradients.iter().map(|g| g.values().expect("f32")).collect();
        let values = self.parameters.iter_mut().map(Parameter::values_mut);
        self.optimizer.step(values.zip(gradients), Scale { lr: 1.0, gradient: 1.0 });
    }
}

fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache/bone-onnx"));
    std::env::var_os("BONE_ONNX_CACHE").map(PathBuf::from).or_else(home).unwrap_or_default()
}

fn prepare() -> Option<Bench> {
    let models = [
        ("all-MiniLM-L6-v2.onnx", "6-layer MiniLM, 16 × 128, Bone r = 16 on 36 layers + head", "last_hidden_state"),
        (
            "paraphrase-MiniLM-L3-v2.onnx",
            "3-layer MiniLM, 16 × 128, Bone r = 16 on 18 layers + head",
            "onnx::Shape_422",
        ),
    ];
    let (path, name, output) =
        models.iter().map(|(f, n, o)| (cache().join("models").join(f), *n, *o)).find(|m| m.0.exists())?;
    let engine = engine::open(EngineKind::OnnxRuntime, Device::Cpu).expect("ONNX Runtime");
    let load = LoadOptions { threads: None, optimize: true };
    let base = Model::open(&path).expect("the model");
    let forward = engine.load(&base.to_inline().expect("tensors"), &load).expect("a session");

    let head = HeadOptions {
        name: "topic".into(),
        labels: 5,
        input: output.into(),
        pool: Pool::Mean,
        mask: Some("attention_mask".into()),
    };
    let config = BoneConfig { r: R, target_modules: Some(TargetModules::parse("all-linear")), ..Default::default() };
    let options = InjectOptions { config, head: Some(head), ..Default::default() };
    let dir = tempfile::tempdir().expect("a directory");
    let injected = dir.path().join("injected.onnx");
    inject(&base, &options).and_then(|i| i.write(&base, &injected)).expect("an injection");
    let model = Model::open(&injected).expect("the injected model");
    let record = Injection::expect(&model).expect("a record");
    let parameters = parameters(&model, &record, &record.active, false).expect("parameters");
    let learners = Learners { injection: &record, trained: &record.active, dropout: None };
    let topic = model.graph().output.iter().find(|o| o.name() == "topic").expect("the head");
    let field = Field::of(topic);
    let (loss, pooling) = (Loss::cross_entropy(), &Pooling::default());
    let columns = [Target::labels("labels", LabelKind::Class, &field).field(1)];
    let step = LossModel::new(&model, learners, &parameters, Task::new(loss, pooling, &field, &columns))
        .and_then(|m| m.gradient(engine.as_ref(), &load))
        .expect("a gradient");

    let ids = (0..BATCH * LENGTH).map(|i| 1000 + (i as i64 * 7919) % 20000).collect();
    let inputs = vec![
        ("input_ids".to_string(), Tensor::new::<i64>(&[BATCH, LENGTH], ids)),
        ("attention_mask".to_string(), Tensor::new::<i64>(&[BATCH, LENGTH], vec![1; BATCH * LENGTH])),
    ];
    let labels = Tensor::new::<i64>(&[BATCH], (0..BATCH as i64).map(|i| i % 5).collect());
    let group = Group { lr: 2e-4, weight_decay: 0.0 };
    let rule = Rule::AdamW { betas: (0.9, 0.999), eps: 1e-8 };
    let optimizer = Optimizer::new(rule, parameters.iter().map(|p| (p.value.len(), group)));
    let batch = Batch { inputs: inputs.clone(), targets: vec![labels], samples: BATCH, tokens: None };
    Some(Bench { name, forward, inputs, output: output.into(), step, parameters, batch, optimizer })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let Some(mut bench) = prepare() else {
        eprintln!("no MiniLM in {}: run scripts/fetch.py minilm; nothing is measured", cache().display());
        return;
    };
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(8))
        .configure_from_args();
    criterion.bench_function("forward of the base, 16 x 128", |b| b.iter(|| bench.forward()));
    criterion.bench_function("training step, 16 x 128", |b| b.iter(|| bench.step()));
    criterion.final_summary();

    let rounds: usize = std::env::var("BONE_ONNX_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(15);
    let (mut forward, mut step) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let begun = Instant::now();
        bench.forward();
        let middle = Instant::now();
        bench.step();
        if round > 0 {
            forward.push((middle - begun).as_secs_f64());
            step.push(middle.elapsed().as_secs_f64());
        }
    }
    let ratio = median(forward.iter().zip(&step).map(|(f, s)| s / f).collect());
    let (forward, step) = (median(forward) * 1e3, median(step) * 1e3);
    println!("{}: forward {forward:.0} ms, step {step:.0} ms, step / forward {ratio:.2} (medians)", bench.name);
    record(&format!("| {} | {} | {rounds} | {forward:.0} | {step:.0} | **{ratio:.2}** |", today(), bench.name));
}

/// Adds a row to the table in benches/RESULTS.md, where `BONE_ONNX_RECORD` asks for it.
fn record(row: &str) {
    const END: &str = "<!-- step: end -->";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/RESULTS.md");
    if std::env::var_os("BONE_ONNX_RECORD").is_some() {
        let text = std::fs::read_to_string(&path).expect("the table");
        std::fs::write(&path, text.replace(END, &format!("{row}\n{END}"))).expect("the table");
    }
}

/// Today's date as `date` prints it.
fn today() -> String {
    let output = std::process::Command::new("date").arg("+%F").output().expect("date");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}
