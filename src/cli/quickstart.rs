//! `quickstart`: the whole path on a model and real data that ship with the program.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::printer::Printer;
use super::train::Bar;
use crate::adapter::{BoneConfig, TargetModules};
use crate::engine::{self, Device, EngineKind, LoadOptions};
use crate::fold::{FoldOptions, fold};
use crate::inject::{InjectOptions, inject};
use crate::onnx::{Durability, Model, Rope, Tensor, write_atomic};
use crate::train::data::read_arrays;
use crate::train::evaluate::hits;
use crate::train::{self, Loss, TrainOptions};
use crate::verify::{Tolerance, compare};
use crate::{Error, Result};

/// Adapt a small digit reader to another scanner: inject, train, fold, verify
#[derive(clap::Args)]
pub struct Args {
    /// Directory for the files
    #[arg(short, long, default_value = "quickstart")]
    output_dir: PathBuf,

    /// tract (built in), onnxruntime or auto
    #[arg(long, default_value = "tract")]
    engine: EngineKind,
}

const BASE: &[u8] = include_bytes!("../../fixtures/digits/digits.onnx");
const TRAIN: &[u8] = include_bytes!("../../fixtures/digits/train.safetensors");
const TEST: &[u8] = include_bytes!("../../fixtures/digits/test.safetensors");

/// Merged and injected outputs may differ by this much: logits of size 10, folded in f32.
const TOLERANCE: Tolerance = Tolerance { atol: 1e-4, rtol: 1e-4 };

pub fn run(args: Args, printer: &Printer) -> Result<()> {
    let start = Instant::now();
    let dir = &args.output_dir;
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let put = |name: &str, bytes: &'static [u8]| -> Result<PathBuf> {
        let path = dir.join(name);
        let mut rope = Rope::default();
        rope.push(bytes);
        write_atomic(&path, rope, &[], Durability::OnDisk).map(|()| path)
    };
    let (base, data, test) =
        (put("digits.onnx", BASE)?, put("train.safetensors", TRAIN)?, put("test.safetensors", TEST)?);
    let engine = engine::open(args.engine, Device::Cpu)?;
    printer.say(format!("engine: {}", engine.describe()));
    let load = LoadOptions { threads: None, optimize: true };

    printer.say("1. inject: a block beside each of the three layers");
    let config = BoneConfig { r: 16, target_modules: Some(TargetModules::parse("all-linear")), ..Default::default() };
    let model = Model::open(&base)?;
    let injected = dir.join("injected.onnx");
    let injection = inject(&model, &InjectOptions { config, ..Default::default() })?.write(&model, &injected)?;

    printer.say(format!(
        "2. train: {} parameters on 400 images of the new scanner, 300 steps",
        injection.trainable_parameters
    ));
    let run = dir.join("run");
    let options = TrainOptions {
        eval_data: vec![test.clone()],
        lr: 3e-3,
        batch_size: Some(32),
        steps: Some(300),
        load: load.clone(),
        ..TrainOptions::new(&run, &data, Loss::cross_entropy())
    };
    let summary = train::run(&Model::open(&injected)?, &options, engine.as_ref(), &mut Bar::new(printer, false))?;

    printer.say("3. fold: the blocks go into the weights");
    let trained = Model::open(run.join("injected.onnx"))?;
    let merged = dir.join("merged.onnx");
    fold(&trained, &FoldOptions { safe: true, ..FoldOptions::default() })?.write(&trained, &merged)?;

    printer.say("4. verify: merged = injected, and better than the base on 397 images that nobody trained on");
    let inputs = read_arrays(&test)?;
    let merged_model = Model::open(&merged)?;
    let comparison = compare(&trained, &merged_model, &inputs, engine.as_ref(), &load, TOLERANCE)?;
    let worst = comparison.outputs.iter().map(|o| o.max_abs).fold(0.0, f64::max);
    let accuracy = |model: &Model| -> Result<f64> {
        let mut session = engine.load(&model.to_inline()?, &load)?;
        let given: Vec<(&str, &Tensor)> =
            inputs.iter().filter(|(n, _)| *n == "pixels").map(|(n, t)| (n.as_str(), t)).collect();
        let logits = session.run(&given, &["logits"])?;
        let (right, count) = hits(&logits[0], &inputs["labels"])?;
        Ok(right as f64 / count as f64)
    };
    let (before, after) = (accuracy(&model)?, accuracy(&merged_model)?);
    let seconds = start.elapsed().as_secs_f64();

    let loss = |step: Option<&train::StepReport>| step.map_or(f64::NAN, |s| s.loss);
    let (first_loss, last_loss) = (loss(summary.steps.first()), loss(summary.steps.last()));
    let value = json!({
        "engine": engine.name(),
        "trainable_parameters": injection.trainable_parameters,
        "loss": {"first": first_loss, "last": last_loss},
        "accuracy": {"base": before, "merged": after},
        "merged_minus_injected": worst,
        "seconds": seconds,
        "output_dir": dir,
    });
    printer.result(&value, |p| {
        let percent = |a: f64| format!("{:.1} %", a * 100.0);
        let row = |what: &str, value: String| vec![what.to_string(), value];
        p.table(
            &["on 397 held-out images", ""],
            vec![
                row("accuracy of the base model", percent(before)),
                row("accuracy of the merged model", percent(after)),
                row("training loss, first → last step", format!("{:.3} → {:.3}", first_loss, last_loss)),
                row("merged − injected, worst logit", format!("{worst:.1e}")),
                row("seconds in all", format!("{seconds:.1}")),
            ],
        );
        p.line("");
        for (path, what) in files(dir) {
            p.line(&format!("{:<32} {what}", path.display()));
        }
    });
    if !comparison.within() {
        return Err(Error::Check(format!("the merged model differs from the injected one by {worst:.1e}")));
    }
    if after <= before {
        return Err(Error::Check(format!("training did not help: accuracy {before:.3} → {after:.3}")));
    }
    Ok(())
}

fn files(dir: &Path) -> [(PathBuf, &'static str); 5] {
    [
        (dir.join("digits.onnx"), "the base"),
        (dir.join("injected.onnx"), "with untrained adapters"),
        (dir.join("run/injected.onnx"), "with trained adapters (adapter/ beside it is PEFT's form)"),
        (dir.join("merged.onnx"), "folded: serve this one"),
        (dir.join("run/loss.png"), "the loss curve"),
    ]
}
