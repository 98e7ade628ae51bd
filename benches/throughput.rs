//! What the training loop costs beside the engine: the real text run (BBC News on a 3-layer MiniLM, batches of 16, Bone on
//! all linear layers and a head) with every run of the engine timed from within the same process. Reported are the loop
//! from its second step on (batches, optimizer, metrics) and the whole command but for the preparation of the engine's
//! sessions (reading and tokenizing the data, deriving the gradient graph, saving), both as a share of the engine's runs.
//!
//! `scripts/fetch.py minilm bbc` brings model and texts. BONE_ONNX_RECORD puts a row into benches/RESULTS.md.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bone_onnx::Result;
use bone_onnx::adapter::{BoneConfig, Pool, TargetModules};
use bone_onnx::engine::{self, Device, Engine, EngineKind, LoadOptions, Memory, Resident, Session};
use bone_onnx::inject::{HeadOptions, InjectOptions, inject};
use bone_onnx::onnx::{Model, ModelProto, Tensor};
use bone_onnx::train::data::TextOptions;
use bone_onnx::train::{self, Loss, Plan, Progress, StepReport, TrainOptions};

const BATCH: usize = 16;
const LENGTH: usize = 48;
const R: usize = 16;

/// Nanoseconds that went into the engine.
#[derive(Clone, Default)]
struct Spent {
    loading: Arc<AtomicU64>,
    running: Arc<AtomicU64>,
}

fn timed<T>(into: &AtomicU64, what: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let made = what();
    into.fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
    made
}

fn seconds(of: &AtomicU64) -> f64 {
    Duration::from_nanos(of.load(Relaxed)).as_secs_f64()
}

struct TimedEngine(Box<dyn Engine>, Spent);
struct TimedSession(Box<dyn Session>, Spent);

impl Engine for TimedEngine {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn describe(&self) -> String {
        self.0.describe()
    }

    fn load(&self, model: &ModelProto, options: &LoadOptions) -> Result<Box<dyn Session>> {
        let session = timed(&self.1.loading, || self.0.load(model, options))?;
        Ok(Box::new(TimedSession(session, self.1.clone())))
    }

    fn memory(&self) -> Option<Memory> {
        self.0.memory()
    }
}

impl Session for TimedSession {
    fn inputs(&self) -> &[String] {
        self.0.inputs()
    }

    fn outputs(&self) -> &[String] {
        self.0.outputs()
    }

    fn run(&mut self, inputs: &[(&str, &Tensor)], wanted: &[&str]) -> Result<Vec<Tensor>> {
        timed(&self.1.running, || self.0.run(inputs, wanted))
    }

    fn run_resident(&mut self, inputs: &[(&str, &Resident)], wanted: &[&str]) -> Result<Vec<Resident>> {
        timed(&self.1.running, || self.0.run_resident(inputs, wanted))
    }
}

/// Remembers where the clocks stood after the first step and after the last.
struct Watch {
    spent: Spent,
    steps: usize,
    marks: Vec<(Instant, f64)>,
}

impl Progress for Watch {
    fn started(&mut self, plan: &Plan) {
        self.steps = plan.steps;
    }

    fn step(&mut self, report: &StepReport) {
        if report.step == 1 || report.step == self.steps {
            self.marks.push((Instant::now(), seconds(&self.spent.running)));
        }
    }
}

fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache/bone-onnx"));
    std::env::var_os("BONE_ONNX_CACHE").map(PathBuf::from).or_else(home).unwrap_or_default()
}

/// All texts as lines of JSON.
fn texts(into: &Path) -> Option<()> {
    let mut lines = String::new();
    for class in ["business", "entertainment", "politics", "sports", "tech"] {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(cache().join("data/bbc").join(class)).ok()?.flatten().map(|e| e.path()).collect();
        files.sort();
        for file in files {
            let text = String::from_utf8_lossy(&std::fs::read(file).ok()?).into_owned();
            lines += &format!("{}\n", serde_json::json!({"text": text, "label": class}));
        }
    }
    std::fs::write(into, lines).ok()
}

fn main() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let (data, injected) = (dir.path().join("bbc.jsonl"), dir.path().join("injected.onnx"));
    let base = cache().join("models/paraphrase-MiniLM-L3-v2.onnx");
    if !base.exists() || texts(&data).is_none() {
        eprintln!(
            "no MiniLM or no BBC News in {}: run scripts/fetch.py minilm bbc; nothing is measured",
            cache().display()
        );
        return Ok(());
    }
    let model = Model::open(&base)?;
    let config = BoneConfig { r: R, target_modules: Some(TargetModules::parse("all-linear")), ..Default::default() };
    let head = HeadOptions {
        name: "topic".into(),
        labels: 5,
        input: "onnx::Shape_422".into(),
        pool: Pool::Mean,
        mask: Some("attention_mask".into()),
    };
    inject(&model, &InjectOptions { config, head: Some(head), ..Default::default() })?.write(&model, &injected)?;

    let rounds: usize = std::env::var("BONE_ONNX_ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(3);
    let (mut in_loop, mut in_all, mut steps) = (Vec::new(), Vec::new(), 0);
    for round in 0..rounds {
        let spent = Spent::default();
        let engine = TimedEngine(engine::open(EngineKind::OnnxRuntime, Device::Cpu)?, spent.clone());
        let mut watch = Watch { spent: spent.clone(), steps: 0, marks: Vec::new() };
        let text = TextOptions {
            tokenizer: Some(cache().join("models/minilm-tokenizer.json")),
            max_length: Some(LENGTH),
            ..Default::default()
        };
        let options = TrainOptions {
            text,
            batch_size: Some(BATCH),
            epochs: Some(3),
            load: LoadOptions { threads: None, optimize: true },
            ..TrainOptions::new(dir.path().join(format!("run{round}")), &data, Loss::cross_entropy())
        };
        let begun = Instant::now();
        let summary = train::run(&Model::open(&injected)?, &options, &engine, &mut watch)?;
        let whole = begun.elapsed().as_secs_f64() - seconds(&spent.loading);
        steps = summary.steps.len();
        let [(first, before), (last, after)] = watch.marks[..] else { continue };
        in_loop.push((last - first).as_secs_f64() / (after - before) - 1.0);
        in_all.push(whole / seconds(&spent.running) - 1.0);
        println!(
            "round {round}: {steps} steps, loop +{:.2} %, all +{:.2} %",
            in_loop[round] * 1e2,
            in_all[round] * 1e2
        );
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2] * 100.0
    };
    let (in_loop, in_all) = (median(&mut in_loop), median(&mut in_all));
    println!(
        "beside the engine's runs: the loop {in_loop:+.2} %, the whole command {in_all:+.2} % (medians of {rounds})"
    );
    if std::env::var_os("BONE_ONNX_RECORD").is_some() {
        const END: &str = "<!-- throughput: end -->";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/RESULTS.md");
        let text = std::fs::read_to_string(&path).expect("the table");
        let today = std::process::Command::new("date").arg("+%F").output().expect("date");
        let today = String::from_utf8_lossy(&today.stdout).trim().to_string();
        let row = format!("| {today} | {rounds} | {steps} of {BATCH} × {LENGTH} | {in_loop:+.2} % | {in_all:+.2} % |");
        std::fs::write(&path, text.replace(END, &format!("{row}\n{END}"))).expect("the table");
    }
    Ok(())
}
