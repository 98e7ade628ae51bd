//! Training: loss graphs, data readers, optimizer, schedule, loop, metrics.
//!
//! [`run`] takes an injected model and changes nothing but the values of its trainable initializers. What it leaves in
//! [`TrainOptions::out`]: `metrics.jsonl` (while it runs), the same as `tensorboard/`, its curves (`loss.png` and
//! others), all of it on one page as `report.html`, `injected.onnx` with the trained values, `adapter/` in PEFT's form,
//! `labels.json` where labels were given as names, `train.toml` where settings came as a text, and `checkpoint-<step>/`
//! to resume from.

mod accumulate;
mod best;
mod checkpoint;
mod curve;
pub mod data;
mod device;
pub(crate) mod evaluate;
mod fingerprint;
mod flat;
mod form;
mod freeze;
#[cfg(test)]
mod goldens;
pub mod graph;
mod loss;
mod merge;
mod metrics;
pub mod optimizer;
mod options;
mod plan;
mod precision;
mod probe;
mod recompute;
mod report;
mod save;
pub mod schedule;
mod step;
mod teacher;
mod tensorboard;
mod update;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

pub use best::Metric;
pub use loss::{Distance, Loss, Pooling};
pub use metrics::{EvalReport, StepReport};
pub use options::{EvalStrategy, TrainOptions};
pub use plan::MemoryPlan;
pub use precision::Precision;
pub use probe::{Probe, probe};
pub use report::size;
pub use teacher::Teacher;

use crate::adapter::Injection;
use crate::engine::{Device, Engine};
use crate::inject::check_shared;
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{DataType, Model, ValueInfoProto, data_type_name};
use crate::{Error, Result, did_you_mean};
use best::Best;
use checkpoint::{Checkpoints, Saved};
use data::{Axis, Batches, Dataset, Feed, Field, LabelKind, ReadOptions, Target};
use device::OnDevice;
use flat::Flat;
use graph::{ForwardSession, Learners, LossModel, Parameter, Task};
use loss::OwnLoss;
use metrics::MetricsFile;
use optimizer::{Group, Optimizer};
use schedule::Schedule;
use step::{Learned, Outcome, Place};
use teacher::TeacherModel;
use tensorboard::EventsFile;

/// Watches a run. The library itself prints nothing.
pub trait Progress {
    /// What memory the run would take, where nothing but that was asked for.
    fn planned(&mut self, _memory: &MemoryPlan) {}
    /// Everything was checked and loaded; the first step comes next.
    fn started(&mut self, _plan: &Plan) {}
    fn step(&mut self, _report: &StepReport) {}
    fn evaluated(&mut self, _report: &EvalReport) {}
    /// Something to know that does not end the run.
    fn warned(&mut self, _what: &str) {}
    /// Asked before every step: true ends the run early, with everything saved, a checkpoint included.
    fn stop(&self) -> bool {
        false
    }
}

/// Watches nothing.
impl Progress for () {}

/// What a run is going to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub rows: usize,
    pub eval_rows: Option<usize>,
    /// Samples per step, those of all its batches together.
    pub batch_size: usize,
    pub steps: usize,
    pub steps_per_epoch: usize,
    /// Steps that a checkpoint has spared.
    pub steps_taken: usize,
    /// The output that the loss looks at.
    pub output: String,
    /// Numbers that are trained.
    pub trainable: usize,
    /// Parameters that lie before the node where the gradients end, and stay as they are.
    pub frozen: Vec<String>,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// All of them, those before a checkpoint included.
    pub steps: Vec<StepReport>,
    /// How many of them were taken before the checkpoint that the run went on from.
    pub steps_before: usize,
    pub evals: Vec<EvalReport>,
    /// The best of them, by [`TrainOptions::metric_for_best_model`].
    pub best: Option<EvalReport>,
    /// Whether the saved values are those of the best evaluation, not the last ones.
    pub best_kept: bool,
    /// True where [`Progress::stop`] ended it.
    pub stopped: bool,
    /// True where it ended because evaluations became no better.
    pub stopped_early: bool,
    /// Of the steps after `steps_before`, evaluations and saving included.
    pub seconds: f64,
    /// Training samples in the steps after `steps_before`, by the time of these steps alone.
    pub samples_per_second: f64,
    /// The most memory that the process ever held, where the system tells.
    pub peak_memory: Option<u64>,
    /// Of the files with the adapters' values.
    pub adapter_bytes: u64,
    /// Numbers that are trained.
    pub trainable: usize,
    /// Class names in order of their ids, where labels were given as names.
    pub label_names: Option<Vec<String>>,
    pub injected: PathBuf,
    pub adapter: PathBuf,
    /// The newest one in the run's directory.
    pub checkpoint: Option<PathBuf>,
}

impl Summary {
    /// Of a run that was only planned.
    fn planned(options: &TrainOptions) -> Self {
        Self {
            steps: Vec::new(),
            steps_before: 0,
            evals: Vec::new(),
            best: None,
            best_kept: false,
            stopped: false,
            stopped_early: false,
            seconds: 0.0,
            samples_per_second: 0.0,
            peak_memory: None,
            adapter_bytes: 0,
            trainable: 0,
            label_names: None,
            injected: options.out.join("injected.onnx"),
            adapter: options.out.join("adapter"),
            checkpoint: None,
        }
    }
}

/// Trains the adapters and the head of `model`.
///
/// # Errors
/// Before anything is written: an unusable setting, a model without adapters, data that does not fit, operators without
/// a derivative rule. Later: a loss or gradient that is not finite ends the run; the last values whose loss was finite
/// are saved, and the message says which step it was. With [`TrainOptions::resume`], a setting or a file that is not
/// what the checkpoint was made with.
pub fn run(model: &Model, options: &TrainOptions, engine: &dyn Engine, progress: &mut dyn Progress) -> Result<Summary> {
    options.validate()?;
    let injection = Injection::expect(model)?;
    check_shared(model, &injection, false)?;
    let trained = trained(&injection, options.adapter_names.as_deref())?;
    let mut parameters = graph::parameters(model, &injection, &trained, options.decay_all)?;
    if parameters.is_empty() {
        let what = match injection.adapters.first() {
            Some(adapter) => format!(
                "none of its adapters is active, so there is nothing to train; activate one: `bone-onnx adapter activate \
                 --adapters {}`",
                adapter.name
            ),
            None => "nothing in it is trainable; inject an adapter or a head first".into(),
        };
        return Err(Error::file(&model.path, what));
    }
    let mut frozen = Vec::new();
    if let Some(node) = &options.freeze_until {
        let before = freeze::before(model, &injection, node)?;
        frozen = parameters.iter().map(|p| p.name.clone()).filter(|name| before.contains(name)).collect();
        parameters.retain(|p| !before.contains(&p.name));
        if parameters.is_empty() {
            return Err(Error::config(format!(
                "freeze-until {node:?} leaves nothing to train: all adapters are before it"
            )));
        }
    }
    let inputs = Field::inputs(model.graph());
    let own = options.loss_model.as_deref().map(|path| OwnLoss::open(path, model.graph())).transpose()?;
    let wanted = options.output.as_deref().or(own.as_ref().and_then(OwnLoss::output));
    let output = output_field(model, &injection, wanted)?;
    let scored = options.pooling.checked(&output, &inputs)?;
    let targets = match &own {
        Some(own) => own.columns(model.graph()),
        None => options.loss.columns(&options.labels, &scored),
    };
    let teacher = options.teacher.as_ref().map(|t| TeacherModel::open(t, &inputs, &output)).transpose()?;

    let kind = match &own {
        Some(own) => own.label_kind(&options.labels),
        None => options.loss.label_kind(),
    };
    let classes = scored.classes().filter(|_| kind == Some(LabelKind::Class));
    let open = |paths: &[PathBuf], label_names| {
        let read = ReadOptions {
            inputs: &inputs,
            labels: &options.labels,
            kind,
            classes,
            roles: options.loss.roles(),
            map: &options.map,
            text: &options.text,
            image: &options.image,
            label_names,
        };
        Dataset::open(paths, &read)
    };
    let dataset = open(&options.data, None)?;
    let eval_set = match options.eval_data.as_slice() {
        [] => None,
        paths => Some(open(paths, dataset.label_names.as_deref())?),
    };
    if let (None, Some(eval_set)) = (&dataset.label_names, eval_set.as_ref().filter(|e| e.label_names.is_some())) {
        return Err(Error::data(format!(
            "{}: its labels are names, but those of {} are class ids; use the same in both",
            eval_set.path.display(),
            dataset.path.display()
        )));
    }
    let feed = checked_feed(&dataset, &inputs, &targets, classes)?;
    let eval_feed = eval_set.as_ref().map(|set| checked_feed(set, &inputs, &targets, classes)).transpose()?;
    if let Some(other) = eval_feed.as_ref().filter(|eval| eval.roles() != feed.roles()) {
        let has = |feed: &Feed| if feed.roles() > 2 { "negatives" } else { "no negatives" };
        return Err(Error::data(format!(
            "{} has {}, but {} has {}; let both be alike",
            feed.path().display(),
            has(&feed),
            other.path().display(),
            has(other)
        )));
    }
    let columns = feed.targets();
    let batch_size = batch_size(&inputs, options.batch_size, std::iter::once(&feed).chain(&eval_feed))?;

    let drops_out = injection.active().any(|a| trained.contains(&a.name) && a.config.miss_dropout > 0.0);
    if drops_out && engine.name() == "tract" {
        return Err(Error::config(
            "miss_dropout needs ONNX Runtime: tract cannot drop inputs out. Use --engine onnxruntime, or inject without \
             --miss-dropout",
        ));
    }
    let loss_model = |dropout| {
        let learners = Learners { injection: &injection, trained: &trained, dropout };
        let (loss, pooling) = (options.loss, &options.pooling);
        let (own, teacher, roles) = (own.as_ref(), teacher.as_ref(), feed.roles());
        let (precision, recompute) = (options.precision, options.recompute);
        let task = Task { own, teacher, roles, precision, recompute, ..Task::new(loss, pooling, &scored, &columns) };
        LossModel::new(model, learners, &parameters, task)
    };
    let mut checkpoints = Checkpoints::new(model, options, engine);
    let resumed = checkpoints.resume(options.resume, &mut |what| progress.warned(what))?;
    let mut training = loss_model(drops_out.then_some(options.seed))?;
    if options.plan {
        let rows: Vec<usize> = (0..batch_size.min(feed.rows())).collect();
        progress.planned(&plan::plan(&mut training, &parameters, feed.batch(&rows)?, options.optimizer)?);
        return Ok(Summary::planned(options));
    }
    training.skip_runs(resumed.as_ref().map_or(0, Saved::runs));
    let place = place(&training, &parameters, options, engine)?;
    let eval = match eval_feed {
        Some(feed) if drops_out => Some((loss_model(None)?.forward(engine, &options.load)?, feed)),
        Some(feed) => Some((training.forward(engine, &options.load)?, feed)),
        None => None,
    };
    drop(training);

    std::fs::create_dir_all(&options.out).map_err(Error::io("create", &options.out))?;
    checkpoints.sweep()?;
    if !options.settings.is_empty() {
        save::file(&options.out.join("train.toml"), options.settings.clone().into_bytes())?;
    }
    if let Some(names) = &dataset.label_names {
        save::labels(names, &options.out.join("labels.json"))?;
    }
    let batches = Batches::new(feed.rows(), batch_size, options.shuffle.then_some(options.seed));
    let steps_per_epoch = batches.per_epoch().div_ceil(options.gradient_accumulation_steps);
    let steps = options.steps.unwrap_or_else(|| options.epochs.unwrap_or(3).saturating_mul(steps_per_epoch));
    let steps_before = resumed.as_ref().map_or(0, Saved::step);
    progress.started(&Plan {
        rows: feed.rows(),
        eval_rows: eval.as_ref().map(|(_, feed)| feed.rows()),
        batch_size: batch_size.saturating_mul(options.gradient_accumulation_steps),
        steps,
        steps_per_epoch,
        steps_taken: steps_before,
        output: output.name.clone(),
        trainable: parameters.iter().map(|p| p.value.len()).sum(),
        frozen,
    });
    let begun = Instant::now();
    let (metrics, events) = (options.out.join(metrics::FILE), options.out.join(tensorboard::FILE));
    let mut trainer = Trainer {
        options,
        schedule: schedule(options, steps),
        learned: Learned { optimizer: optimizer(options, &parameters), parameters, last_good: Vec::new() },
        batches,
        place,
        eval,
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
        samples: 0,
    };
    resumed.map(|saved| trainer.restore(saved)).transpose()?;
    trainer.place.start(&trainer.learned)?;
    let outcome = trainer.steps(steps, &feed, progress);

    let injected = options.out.join("injected.onnx");
    let adapter = options.out.join("adapter");
    let best_kept = outcome.is_ok() && !trainer.best.kept.is_empty();
    let parameters = if best_kept { &trainer.best.kept } else { &trainer.learned.parameters };
    let curves = curve::curves(&output.name, &trainer.steps, &trainer.evals);
    let keep = || {
        save::injected(model, parameters, &injected)?;
        save::adapters(model, &injection, parameters, &adapter)?;
        for curve in &curves {
            let picture =
                curve.png().map_err(|what| Error::model(format!("{}.png could not be drawn: {what}", curve.name)))?;
            save::file(&options.out.join(format!("{}.png", curve.name)), picture)?;
        }
        Ok(())
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
    let summary = Summary {
        best: trainer.best.found(),
        best_kept,
        stopped: end == End::Asked,
        stopped_early: end == End::Early,
        samples_per_second: if seconds > 0.0 { trainer.samples as f64 / seconds } else { 0.0 },
        peak_memory: report::peak_memory(),
        adapter_bytes: save::adapter_bytes(&injection, &adapter),
        trainable: parameters.iter().map(|p| p.value.len()).sum(),
        checkpoint: trainer.checkpoints.last(),
        steps_before,
        steps: trainer.steps,
        evals: trainer.evals,
        seconds: begun.elapsed().as_secs_f64(),
        label_names: dataset.label_names,
        injected,
        adapter,
    };
    if !summary.steps.is_empty() {
        let title = format!("{}: training of {}", model.path.display(), output.name);
        let page = report::html(&title, &engine.describe(), options, &summary, &curves)
            .map_err(|what| Error::model(format!("report.html could not be made: {what}")))?;
        save::file(&options.out.join("report.html"), page.into_bytes())?;
    }
    Ok(summary)
}

/// Why a run is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// All steps are taken.
    Done,
    /// Evaluations became no better.
    Early,
    /// [`Progress::stop`] asked for it.
    Asked,
}

/// The state of a run between two steps.
struct Trainer<'a> {
    options: &'a TrainOptions,
    schedule: Schedule,
    learned: Learned,
    batches: Batches,
    place: Place,
    eval: Option<(ForwardSession, Feed<'a>)>,
    metrics: MetricsFile,
    events: EventsFile,
    checkpoints: Checkpoints<'a>,
    best: Best,
    steps: Vec<StepReport>,
    evals: Vec<EvalReport>,
    /// Samples in the steps of this process.
    samples: usize,
}

impl Trainer<'_> {
    /// Goes on until `total` steps are taken; or there is a reason to end before that. However it ends, `learned` is what the steps that were reported have made.
    fn steps(&mut self, total: usize, feed: &Feed, progress: &mut dyn Progress) -> Result<End> {
        let outcome = self.all_steps(total, feed, progress);
        let fetched = self.place.fetch(&mut self.learned);
        outcome.and_then(|end| fetched.map(|()| end))
    }

    fn all_steps(&mut self, total: usize, feed: &Feed, progress: &mut dyn Progress) -> Result<End> {
        let mut begun = self.steps.len();
        let mut since = Instant::now();
        while begun < total {
            if self.best.enough() {
                return Ok(End::Early);
            }
            if progress.stop() {
                self.finish(begun, &mut since, progress)?;
                self.save(begun)?;
                return Ok(End::Asked);
            }
            let micro = accumulate::micro_batches(feed, &mut self.batches, self.options.gradient_accumulation_steps)?;
            self.samples += micro.iter().map(|batch| batch.samples).sum::<usize>();
            let (factor, clip) = (self.schedule.factor(begun), self.options.max_grad_norm);
            self.place.begin(&mut self.learned, &micro, self.options.loss, factor, clip)?;
            begun += 1;

            let step = begun;
            let due = match self.options.eval_strategy {
                EvalStrategy::Epoch => self.batches.at_epoch_end(),
                EvalStrategy::Steps(every) => step.is_multiple_of(every),
                EvalStrategy::End => false,
            };
            let (evaluates, saves) = (due || step == total, self.checkpoints.due(step, step == total));
            let ahead = if evaluates || saves { 0 } else { self.place.ahead() };
            self.finish(step - ahead.min(step), &mut since, progress)?;
            if evaluates && self.eval.is_some() {
                self.place.fetch(&mut self.learned)?;
            }
            if evaluates && let Some((session, feed)) = &mut self.eval {
                let size = self.batches.size();
                let report =
                    evaluate::evaluate(session, &self.learned.parameters, feed, self.options.loss, size, step)?;
                self.evals.push(report);
                self.metrics.write(&report)?;
                self.events.eval(&report)?;
                progress.evaluated(&report);
                if self.best.see(&report) && self.options.load_best_model_at_end {
                    self.best.kept.clone_from(&self.learned.parameters);
                }
                since = Instant::now();
            }
            if saves || self.best.enough() && self.checkpoints.due(step, true) {
                self.save(step)?;
                since = Instant::now();
            }
        }
        Ok(End::Done)
    }

    /// Waits for the steps up to `last` and reports them.
    fn finish(&mut self, last: usize, since: &mut Instant, progress: &mut dyn Progress) -> Result<()> {
        while self.steps.len() < last {
            let step = self.steps.len() + 1;
            let outcome = self.place.finish()?;
            let Outcome { loss, grad_norm, finite } = outcome;
            if !outcome.is_finite() {
                let what = if loss.is_finite() { "gradient" } else { "loss" };
                return Err(self.not_finite(what, step));
            }
            let seconds = since.elapsed().as_secs_f64();
            *since = Instant::now();
            let report =
                StepReport { step, loss, lr: self.options.lr * self.schedule.factor(step - 1), grad_norm, seconds };
            self.steps.push(report);
            self.metrics.write(&report)?;
            self.events.step(&report)?;
            progress.step(&report);
            if !finite {
                return Err(self.not_finite("updated parameters", step));
            }
        }
        Ok(())
    }

    /// Goes back to the last good values and says what happened.
    fn not_finite(&mut self, what: &str, step: usize) -> Error {
        if let Err(error) = self.place.go_back(&mut self.learned) {
            return error;
        }
        let kept = if self.learned.last_good.is_empty() {
            "before anything was trained, so the data or the model hold values that are not finite or too large".into()
        } else {
            std::mem::swap(&mut self.learned.parameters, &mut self.learned.last_good);
            format!(
                "the last values with a finite loss are saved in {}. Try a lower lr, warm-up steps or a max-grad-norm",
                self.options.out.display()
            )
        };
        Error::Check(format!("training stopped at step {step}: the {what} became NaN or infinite; {kept}"))
    }
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

/// The columns of `dataset` that the run reads; labels are below `classes`, where that is given.
fn checked_feed<'a>(
    dataset: &'a Dataset,
    inputs: &'a [Field],
    targets: &[Target],
    classes: Option<usize>,
) -> Result<Feed<'a>> {
    let feed = Feed::new(dataset, inputs, targets)?;
    classes.map(|classes| feed.check_classes(classes)).transpose()?;
    Ok(feed)
}

/// Samples per batch: as asked, but a model exported for a fixed number of rows decides itself.
fn batch_size<'a>(inputs: &[Field], wanted: Option<usize>, feeds: impl Iterator<Item = &'a Feed<'a>>) -> Result<usize> {
    let Some((fixed, input)) = inputs.iter().find_map(|i| Some((i.fixed_rows()?, i))) else {
        return Ok(wanted.unwrap_or(8));
    };
    let mut samples = fixed;
    for feed in feeds {
        samples = fixed / feed.roles();
        if wanted.is_some_and(|w| w != samples) {
            return Err(Error::config(format!(
                "the model's input {} is fixed to {fixed} rows, so the batch-size has to be {samples}",
                input.name
            )));
        }
        if samples == 0 || fixed % feed.roles() != 0 || feed.rows() % samples != 0 {
            return Err(Error::data(format!(
                "{}: the model's input {} is fixed to {fixed} rows, and {} rows cannot be split into such batches",
                feed.path().display(),
                input.name,
                feed.rows() * feed.roles()
            )));
        }
    }
    Ok(samples)
}

/// The adapters that learn: those named, else all that are active.
fn trained(injection: &Injection, wanted: Option<&[String]>) -> Result<Vec<String>> {
    let Some(wanted) = wanted else { return Ok(injection.active.clone()) };
    for name in wanted {
        injection.named(name)?;
        if !injection.active.contains(name) {
            return Err(Error::config(format!(
                "adapter {name} is not active, so nothing it learns could have an effect; activate it first: \
                 `bone-onnx adapter activate --adapters {name}`"
            )));
        }
    }
    Ok(wanted.to_vec())
}

/// The output to train: the one named, else the head's, else the only one.
fn output_field(model: &Model, injection: &Injection, wanted: Option<&str>) -> Result<Field> {
    let outputs = &model.graph().output;
    let names = || outputs.iter().map(ValueInfoProto::name);
    let list = || names().collect::<Vec<_>>().join(", ");
    let name = match (wanted.or(injection.head.as_ref().map(|h| h.name.as_str())), outputs.as_slice()) {
        (Some(name), _) => name,
        (None, [only]) => only.name(),
        _ => {
            return Err(Error::config(format!("the model has several outputs ({}); choose one with --output", list())));
        }
    };
    let info = outputs.iter().find(|o| o.name() == name).ok_or_else(|| {
        Error::config(format!("{name:?} is no output of the model ({}).{}", list(), did_you_mean(name, names())))
    })?;
    let mut field = Field::of(info);
    if field.classes().is_none() {
        complete(&mut field, model);
    }
    match field.data_type {
        None | Some(DataType::Float | DataType::Double | DataType::Float16 | DataType::Bfloat16) => Ok(field),
        Some(other) => {
            Err(Error::model(format!("output {name} is {}; only floats are trained", data_type_name(other))))
        }
    }
}

/// Fills in what shape inference knows of an output beyond what the file declares.
fn complete(field: &mut Field, model: &Model) {
    let shapes = Shapes::infer(&model.proto, &BTreeMap::new());
    let Some(inferred) = shapes.dims(&field.name) else { return };
    let dims = field.dims.get_or_insert_with(|| vec![Axis::Free; inferred.len()]);
    for (axis, inferred) in dims.iter_mut().zip(inferred) {
        if let (Axis::Free | Axis::Named(_), Dim::Known(n)) = (&axis, inferred)
            && let Ok(n) = usize::try_from(*n)
        {
            *axis = Axis::Known(n);
        }
    }
}
