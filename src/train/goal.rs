//! What is learned: which output, by which loss, from which data.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::data::{Axis, Dataset, Feed, Field, LabelKind, ReadOptions, Room, Target};
use super::graph::teacher::TeacherModel;
use super::graph::{LossModel, Task};
use super::loss::OwnLoss;
use super::subject::Subject;
use super::{Loss, TrainOptions};
use crate::adapter::Injection;
use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{DataType, Model, ValueInfoProto, data_type_name};
use crate::{Error, Result, did_you_mean};

/// What a run makes small, before any data is seen.
pub(super) struct Goal<'a> {
    options: &'a TrainOptions,
    inputs: Vec<Field>,
    /// The output that the loss looks at.
    pub output: Field,
    /// The same after pooling.
    scored: Field,
    own: Option<OwnLoss>,
    teacher: Option<TeacherModel<'a>>,
    /// What the loss reads beside the output.
    targets: Vec<Target>,
    /// What the labels are; `None`: there are none.
    kind: Option<LabelKind>,
    /// How many classes the output scores.
    classes: Option<usize>,
}

/// The data of a run, checked against nothing yet.
pub(super) struct Rows {
    pub train: Dataset,
    pub eval: Option<Dataset>,
}

/// The data of a run as its goal reads it.
pub(super) struct Feeds<'a> {
    pub train: Feed<'a>,
    pub eval: Option<Feed<'a>>,
    /// The columns that the loss reads.
    columns: Vec<Field>,
    pub batch_size: usize,
}

impl<'a> Goal<'a> {
    /// # Errors
    /// An output that is not there or holds no floats; a loss or teacher that does not fit it.
    pub fn of(model: &Model, injection: &Injection, options: &'a TrainOptions) -> Result<Self> {
        let inputs = Field::inputs(model.graph());
        let own = options.loss_model.as_deref().map(|path| OwnLoss::open(path, model.graph())).transpose()?;
        let wanted = options.output.as_deref().or(own.as_ref().and_then(OwnLoss::output));
        let output = output_field(model, injection, wanted)?;
        let scored = options.pooling.checked(&output, &inputs)?;
        let (targets, kind) = match &own {
            Some(own) => (own.columns(model.graph()), own.label_kind(&options.labels)),
            None => (options.loss.columns(&options.labels, &scored), options.loss.label_kind()),
        };
        let teacher = options.teacher.as_ref().map(|t| TeacherModel::open(t, &inputs, &output)).transpose()?;
        let classes = scored.classes().filter(|_| kind == Some(LabelKind::Class));
        Ok(Self { options, inputs, output, scored, own, teacher, targets, kind, classes })
    }

    /// Reads the data.
    ///
    /// # Errors
    /// What cannot be read, with file and place; labels that are names in one part only.
    pub fn rows(&self) -> Result<Rows> {
        let room = Room::new(self.options.data_memory, &self.options.out);
        let train = self.read(&self.options.data, None, &room)?;
        let eval = match self.options.eval_data.as_slice() {
            [] => None,
            paths => Some(self.read(paths, train.label_names.as_deref(), &room)?),
        };
        if let (None, Some(eval)) = (&train.label_names, eval.as_ref().filter(|e| e.label_names.is_some())) {
            return Err(Error::data(format!(
                "{}: its labels are names, but those of {} are class ids; use the same in both",
                eval.path.display(),
                train.path.display()
            )));
        }
        Ok(Rows { train, eval })
    }

    fn read(&self, paths: &[PathBuf], label_names: Option<&[String]>, room: &Room) -> Result<Dataset> {
        let options = self.options;
        let read = ReadOptions {
            inputs: &self.inputs,
            labels: &options.labels,
            kind: self.kind,
            classes: self.classes,
            roles: options.loss.roles(),
            map: &options.map,
            text: &options.text,
            image: &options.image,
            label_names,
            room,
        };
        Dataset::open(paths, &read)
    }

    /// # Errors
    /// Columns that the model or the loss cannot take; training and evaluation data that are not alike; rows that a
    /// model of a fixed batch cannot take.
    pub fn feeds<'b>(&'b self, rows: &'b Rows) -> Result<Feeds<'b>> {
        let train = self.feed(&rows.train)?;
        let eval = rows.eval.as_ref().map(|rows| self.feed(rows)).transpose()?;
        if let Some(other) = eval.as_ref().filter(|eval| eval.roles() != train.roles()) {
            let has = |feed: &Feed| if feed.roles() > 2 { "negatives" } else { "no negatives" };
            return Err(Error::data(format!(
                "{} has {}, but {} has {}; let both be alike",
                train.path().display(),
                has(&train),
                other.path().display(),
                has(other)
            )));
        }
        let columns = train.targets();
        let batch_size = batch_size(&self.inputs, self.options.batch_size, std::iter::once(&train).chain(&eval))?;
        Ok(Feeds { train, eval, columns, batch_size })
    }

    /// The columns of `dataset` that the run reads; labels are below [`Goal::classes`], where that is known.
    fn feed<'b>(&'b self, dataset: &'b Dataset) -> Result<Feed<'b>> {
        let feed = Feed::new(dataset, &self.inputs, &self.targets)?;
        self.classes.map(|classes| feed.check_classes(classes)).transpose()?;
        Ok(feed)
    }

    /// The loss of `feeds` behind the output of `model`. `dropout`: the seed of its masks.
    pub fn loss_model(
        &self,
        model: &Model,
        subject: &Subject,
        feeds: &Feeds,
        dropout: Option<u64>,
    ) -> Result<LossModel> {
        let options = self.options;
        let (loss, pooling): (Loss, _) = (options.loss, &options.pooling);
        let (own, teacher, roles) = (self.own.as_ref(), self.teacher.as_ref(), feeds.train.roles());
        let (precision, recompute) = (options.precision, options.recompute);
        let task = Task::new(loss, pooling, &self.scored, &feeds.columns);
        let task = Task { own, teacher, roles, precision, recompute, ..task };
        LossModel::new(model, subject.learners(dropout), &subject.parameters, task)
    }
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

/// The output to train: the one named, else the head's, else the only one.
pub(super) fn output_field(model: &Model, injection: &Injection, wanted: Option<&str>) -> Result<Field> {
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
