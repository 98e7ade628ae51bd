//! A run from its options to what it leaves.

use std::time::Instant;

use super::best::Best;
use super::data::{Batches, Feed};
use super::goal::Goal;
use super::graph::{LossModel, Parameter};
use super::prefix::{FrozenPrefix, Steps};
use super::record::checkpoint::{Checkpoints, Saved};
use super::record::curve::Curve;
use super::record::metrics::{self, MetricsFile};
use super::record::tensorboard::{self, EventsFile};
use super::record::{curve, report, save};
use super::subject::Subject;
use super::trainer::{End, Trainer};
use super::update::device::OnDevice;
use super::update::flat::Flat;
use super::update::optimizer::{Group, Optimizer};
use super::update::schedule::{self, Schedule};
use super::update::step::{Learned, Place};
use super::{Amount, MemoryPlan, Plan, Progress, Summary, TrainOptions, plan};
use crate::engine::{Device, Engine};
use crate::onnx::Model;
use crate::{Error, Result};

/// Trains the adapters and the head of `model`.
///
/// # Errors
/// Before anything is written: an unusable setting, a model without adapters, data that does not fit, operators without
/// a derivative rule. Later: a loss or gradient that is not finite ends the run; the last values whose loss was finite
/// are saved, and the message says which step it was. With [`TrainOptions::resume`], a setting or a file that is not
/// what the checkpoint was made with.
pub fn run(model: &Model, options: &TrainOptions, engine: &dyn Engine, progress: &mut dyn Progress) -> Result<Summary> {
    options.validate()?;
    let subject = Subject::of(model, options, engine)?;
    let goal = Goal::of(model, &subject.injection, options)?;
    let rows = goal.rows()?;
    let mut feeds = goal.feeds(&rows)?;
    let mut checkpoints = Checkpoints::new(model, options, engine);
    let resumed = checkpoints.resume(options.resume, &mut |what| progress.warned(what))?;
    let dropout = subject.drops_out.then_some(options.seed);
    let mut training = goal.loss_model(model, &subject, &feeds, dropout)?;
    let prefix = FrozenPrefix::find(&training, &feeds, options, engine)?;
    if options.plan {
        let rows: Vec<usize> = (0..feeds.batch_size.min(feeds.train.rows())).collect();
        let batch = feeds.train.batch(&rows)?;
        let plan = plan::plan(&mut training, &subject.parameters, batch, options.optimizer)?;
        progress.planned(&MemoryPlan { cache: prefix.plan, ..plan });
        return Ok(Summary::planned(options));
    }
    training.skip_runs(resumed.as_ref().map_or(0, Saved::runs));
    let mut evaluated = match &feeds.eval {
        // Nothing drops out in an evaluation.
        Some(_) if subject.drops_out => Some(goal.loss_model(model, &subject, &feeds, None)?),
        _ => None,
    };
    let steps = Steps { parameters: &subject.parameters, options, engine };
    let cache = prefix.fill((&mut training, &mut evaluated), &mut feeds, steps, progress)?;
    let place = place(&training, &subject.parameters, options, engine)?;
    let evaluated = evaluated.as_ref().unwrap_or(&training);
    let eval = feeds.eval.as_ref().map(|_| evaluated.forward(engine, &options.load)).transpose()?;
    drop(training);

    std::fs::create_dir_all(&options.out).map_err(Error::io("create", &options.out))?;
    checkpoints.sweep()?;
    if !options.settings.is_empty() {
        save::file(&options.out.join("train.toml"), options.settings.clone().into_bytes())?;
    }
    if let Some(names) = &rows.train.label_names {
        save::labels(names, &options.out.join("labels.json"))?;
    }
    let (feed, batch_size) = (&feeds.train, feeds.batch_size);
    let batches = match options.group_by_length {
        true => Batches::grouped(feed.rows(), batch_size, options.seed, feed.lengths()?),
        false => Batches::new(feed.rows(), batch_size, options.shuffle.then_some(options.seed)),
    };
    let steps_per_epoch = batches.per_epoch().div_ceil(options.gradient_accumulation_steps);
    let steps = options.steps.unwrap_or_else(|| options.epochs.unwrap_or(3).saturating_mul(steps_per_epoch));
    let steps_before = resumed.as_ref().map_or(0, Saved::step);
    let trainable = subject.trainable();
    progress.started(&Plan {
        rows: feed.rows(),
        eval_rows: feeds.eval.as_ref().map(Feed::rows),
        packed: feed.packed(),
        eval_packed: feeds.eval.as_ref().and_then(Feed::packed),
        batch_size: batch_size.saturating_mul(options.gradient_accumulation_steps),
        steps,
        steps_per_epoch,
        steps_taken: steps_before,
        output: goal.output.name.clone(),
        trainable,
        frozen: subject.frozen,
        cache,
    });
    let begun = Instant::now();
    let (metrics, events) = (options.out.join(metrics::FILE), options.out.join(tensorboard::FILE));
    let parameters = subject.parameters;
    let mut trainer = Trainer {
        options,
        schedule: schedule(options, steps),
        learned: Learned { optimizer: optimizer(options, &parameters), parameters, last_good: Vec::new() },
        position: (0, 0),
        batch_size,
        place,
        eval: eval.zip(feeds.eval.as_ref()),
        metrics: match &resumed {
            Some(saved) => MetricsFile::go_on(&metrics, saved.metrics_bytes())?,
            None => MetricsFile::create(&metrics)?,
        },
        events: match &resumed {
            Some(saved) => EventsFile::go_on(&events, &saved.history)?,
            None => EventsFile::create(&events)?,
        },
        checkpoints,
        best: Best::new(
            options.metric_for_best_model,
            options.early_stopping_patience,
            options.early_stopping_threshold,
        ),
        steps: Vec::new(),
        evals: Vec::new(),
        taken: Amount::default(),
    };
    resumed.map(|saved| trainer.restore(saved)).transpose()?;
    trainer.place.start(&trainer.learned)?;
    let outcome = trainer.steps(steps, feed, batches, progress);

    let injected = options.out.join("injected.onnx");
    let adapter = options.out.join("adapter");
    let best_kept = outcome.is_ok() && !trainer.best.kept.is_empty();
    let parameters = if best_kept { &trainer.best.kept } else { &trainer.learned.parameters };
    let curves = curve::curves(&goal.output.name, &trainer.steps, &trainer.evals);
    let keep = || {
        save::injected(model, parameters, &injected)?;
        save::adapters(model, &subject.injection, parameters, &adapter)?;
        draw(&curves, options)
    };
    // Whatever ended the run, the steps that were taken are kept.
    let kept = if trainer.steps.is_empty() { Ok(()) } else { keep() };
    let end = match (outcome, kept) {
        // A disk that takes no more is the first cause of all that follows.
        (Err(error @ Error::Io { .. }), _) | (_, Err(error)) | (Err(error), Ok(())) => {
            return Err(trainer.checkpoints.hint(error));
        }
        (Ok(end), Ok(())) => end,
    };
    let seconds: f64 = trainer.steps.iter().skip(steps_before).map(|step| step.seconds).sum();
    let per_second = |count: usize| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let summary = Summary {
        best: trainer.best.found(),
        best_kept,
        stopped: end == End::Asked,
        stopped_early: end == End::Early,
        samples_per_second: per_second(trainer.taken.samples),
        tokens_per_second: trainer.taken.tokens.map(per_second),
        peak_memory: report::peak_memory(),
        adapter_bytes: save::adapter_bytes(&subject.injection, &adapter),
        trainable,
        checkpoint: trainer.checkpoints.last(),
        steps_before,
        steps: trainer.steps,
        evals: trainer.evals,
        seconds: begun.elapsed().as_secs_f64(),
        label_names: rows.train.label_names.clone(),
        injected,
        adapter,
    };
    if !summary.steps.is_empty() {
        let title = format!("{}: training of {}", model.path.display(), goal.output.name);
        let page = report::html(&title, &engine.describe(), options, &summary, &curves)
            .map_err(|what| Error::model(format!("report.html could not be made: {what}")))?;
        save::file(&options.out.join("report.html"), page.into_bytes())?;
    }
    Ok(summary)
}

fn draw(curves: &[Curve], options: &TrainOptions) -> Result<()> {
    for curve in curves {
        let picture =
            curve.png().map_err(|what| Error::model(format!("{}.png could not be drawn: {what}", curve.name)))?;
        save::file(&options.out.join(format!("{}.png", curve.name)), picture)?;
    }
    Ok(())
}

/// Loads the gradients for where the parameters are to be: by default on the device, where there is another than the
/// CPU. There, AdamW in one pass over the host's memory takes less time than its operators one by one (measured).
fn place(training: &LossModel, parameters: &[Parameter], options: &TrainOptions, engine: &dyn Engine) -> Result<Place> {
    let elsewhere = engine.memory().is_some_and(|memory| memory.device() != Device::Cpu);
    if !options.optimizer_on_device.unwrap_or(elsewhere) {
        return Ok(Place::Host { gradient: Box::new(training.gradient(engine, &options.load)?), done: None });
    }
    let flats = Flat::of(parameters, |p| group(options, p));
    let gradient = training.resident(engine, &options.load, &flats, parameters)?;
    let accumulates = options.gradient_accumulation_steps > 1;
    let (rule, clip) = (options.optimizer, options.max_grad_norm);
    let device = OnDevice::new(engine, &options.load, gradient, flats, rule, clip, accumulates)?;
    Ok(Place::Device(Box::new(device)))
}

fn group(options: &TrainOptions, parameter: &Parameter) -> Group {
    Group {
        lr: options.head_lr.filter(|_| parameter.full).unwrap_or(options.lr),
        weight_decay: if parameter.decays { options.weight_decay } else { 0.0 },
    }
}

fn optimizer(options: &TrainOptions, parameters: &[Parameter]) -> Optimizer {
    Optimizer::new(options.optimizer, parameters.iter().map(|p| (p.value.len(), group(options, p))))
}

fn schedule(options: &TrainOptions, total: usize) -> Schedule {
    // One of the two is 0.
    let warmup = options.warmup_steps.max(schedule::warmup_of(options.warmup_ratio, total));
    Schedule { shape: options.schedule, peak: options.lr, warmup, total }
}
