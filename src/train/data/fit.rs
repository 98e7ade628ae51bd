//! Does the data fit the model? Everything that can be known before the first step is checked here, and the message
//! names the file, the array, what was wanted and what was found.

use std::collections::BTreeMap;

use super::column::{Column, widens};
use super::text::Part;
use super::{Dataset, LabelKind, Packed};
use crate::onnx::proto::tensor_shape_proto::dimension::Value as DimValue;
use crate::onnx::{DataType, GraphProto, Tensor, ValueInfoProto, data_type_name, value_info};
use crate::train::prefix::Cache;
use crate::{Error, Result, did_you_mean};

/// Labels of this value are left out of a cross-entropy (PyTorch's `ignore_index`).
pub const IGNORE: i64 = -100;

/// One axis of a model's input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Axis {
    Known(usize),
    /// Equal wherever the name stands.
    Named(String),
    Free,
}

/// A model's input or output as it declares itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub data_type: Option<DataType>,
    /// `None` where not even the rank is known.
    pub dims: Option<Vec<Axis>>,
}

impl Field {
    pub fn of(info: &ValueInfoProto) -> Self {
        let tensor = info.tensor();
        let dims = tensor.and_then(|t| t.shape.as_ref()).map(|shape| {
            let axis = |value: &Option<DimValue>| match value {
                Some(DimValue::DimValue(n)) => usize::try_from(*n).map_or(Axis::Free, Axis::Known),
                Some(DimValue::DimParam(name)) if !name.is_empty() => Axis::Named(name.clone()),
                _ => Axis::Free,
            };
            shape.dim.iter().map(|d| axis(&d.value)).collect()
        });
        let data_type = tensor.and_then(|t| DataType::try_from(t.elem_type()).ok());
        Self { name: info.name().into(), data_type: data_type.filter(|t| *t != DataType::Undefined), dims }
    }

    /// As a graph declares it; float32 where the type is not known.
    pub fn info(&self) -> ValueInfoProto {
        let axis = |axis: &Axis| match axis {
            Axis::Known(n) => n.to_string(),
            Axis::Named(name) => name.clone(),
            Axis::Free => String::new(),
        };
        let dims: Vec<String> = self.dims.iter().flatten().map(axis).collect();
        let dims: Vec<&str> = dims.iter().map(String::as_str).collect();
        value_info(&self.name, self.data_type.unwrap_or(DataType::Float), &dims)
    }

    /// The inputs that have to be given (initializers may be listed among a graph's inputs too).
    pub fn inputs(graph: &GraphProto) -> Vec<Self> {
        let is_constant = |name: &str| graph.initializer.iter().any(|t| t.name() == name);
        graph.input.iter().filter(|i| !is_constant(i.name())).map(Self::of).collect()
    }

    /// Size of the last axis, where it is known: the number of classes of an output that scores them.
    pub fn classes(&self) -> Option<usize> {
        match self.dims.as_ref()?.last()? {
            Axis::Known(n) => Some(*n),
            _ => None,
        }
    }

    /// The number of rows that every batch must have, where the model is exported with one.
    pub fn fixed_rows(&self) -> Option<usize> {
        match self.dims.as_ref()?.first()? {
            Axis::Known(n) => Some(*n),
            _ => None,
        }
    }
}

/// A column that the loss reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub name: String,
    pub data_type: DataType,
    /// The shapes it may have, the usual one first; none: any.
    pub shapes: Vec<Vec<Axis>>,
    /// The flag that names it (for messages), where there is one.
    pub flag: Option<&'static str>,
    /// What else its name could have meant, beside a column (for messages).
    pub others: Vec<String>,
}

impl Target {
    /// What `output` is compared with; for classes, its last axis is one score per class.
    pub fn labels(name: &str, kind: LabelKind, output: &Field) -> Self {
        let data_type = match kind {
            LabelKind::Class => DataType::Int64,
            LabelKind::Number => DataType::Float,
        };
        let mut shapes: Vec<Vec<Axis>> = output.dims.iter().cloned().collect();
        let without_last = |dims: &Vec<Axis>| dims[..dims.len().saturating_sub(1)].to_vec();
        match (kind, output.dims.as_ref()) {
            (LabelKind::Class, Some(dims)) => shapes = vec![without_last(dims)],
            // One number a row may stand without the axis of length one that the output has.
            (LabelKind::Number, Some(dims)) if dims.len() > 1 && dims.last() == Some(&Axis::Known(1)) => {
                shapes.push(without_last(dims));
            }
            _ => {}
        }
        Self { name: name.into(), data_type, shapes, flag: Some("--labels"), others: Vec::new() }
    }

    /// As a column of this rank is: in the shape that it may have.
    pub fn field(&self, rank: usize) -> Field {
        let dims = self.shapes.iter().find(|dims| dims.len() == rank).or(self.shapes.first());
        let dims = dims.cloned().unwrap_or_else(|| vec![Axis::Free; rank]);
        Field { name: self.name.clone(), data_type: Some(self.data_type), dims: Some(dims) }
    }
}

/// A dataset whose columns were checked against a model.
#[derive(Debug)]
pub struct Feed<'a> {
    dataset: &'a Dataset,
    inputs: Vec<(&'a str, &'a Column, DataType)>,
    targets: Vec<(Field, &'a Column)>,
    /// What stands for the frozen part of the model, and for the inputs that nothing else reads.
    cache: Option<Cache>,
}

/// One batch: a tensor for each of the model's inputs, by name, and for each column that the loss reads.
#[derive(Debug)]
pub struct Batch {
    pub inputs: Vec<(String, Tensor)>,
    pub targets: Vec<Tensor>,
    /// How many samples it holds; each input has a row for each role of each.
    pub samples: usize,
    /// The tokens that count, of models that read tokens.
    pub tokens: Option<usize>,
}

/// Whether an input by this name holds tokens.
fn is_ids(name: &str) -> bool {
    Part::of(name).map_or(name.ends_with("_ids"), |part| part == Part::Ids)
}

fn is_mask(name: &str) -> bool {
    Part::of(name) == Some(Part::Mask)
}

/// How many tokens `inputs` hold, where there are rows of integers among them that are such: those that the mask counts,
/// or all.
fn tokens(inputs: &[(String, Tensor)]) -> Option<usize> {
    let is_row =
        |value: &Tensor| value.dims().len() == 2 && matches!(value.data_type(), DataType::Int64 | DataType::Int32);
    let (_, ids) = inputs.iter().find(|(name, value)| is_ids(name) && is_row(value))?;
    let mask = inputs.iter().find(|(name, mask)| is_mask(name) && mask.dims() == ids.dims());
    Some(match mask {
        Some((_, mask)) => mask.to_f64().iter().filter(|counts| **counts != 0.0).count(),
        None => ids.len(),
    })
}

impl<'a> Feed<'a> {
    /// # Errors
    /// An input without an array, an array without an input, a wrong type or shape, a column that the loss reads missing.
    pub fn new(dataset: &'a Dataset, inputs: &'a [Field], targets: &[Target]) -> Result<Self> {
        let bad = |what: String| Error::data(format!("{}: {what}", dataset.path.display()));
        let arrays = || dataset.names().collect::<Vec<_>>().join(", ");
        let is_target = |name: &str| targets.iter().any(|t| t.name == name);
        for target in targets {
            let what = match dataset.column(&target.name) {
                None => match target.flag {
                    Some(flag) => format!(
                        "no array {:?} with the labels (there are: {}); name it with {flag}",
                        target.name,
                        arrays()
                    ),
                    None => format!("no array {:?}, which the loss reads (there are: {})", target.name, arrays()),
                },
                Some(Column::Single(_)) => {
                    return Err(bad(format!(
                        "array {} is a single number; labels have one row per sample",
                        target.name
                    )));
                }
                Some(_) => continue,
            };
            let names = dataset.names().chain(target.others.iter().map(String::as_str));
            return Err(bad(format!("{what}.{}", did_you_mean(&target.name, names))));
        }
        for name in dataset.names().filter(|n| !is_target(n)) {
            if !inputs.iter().any(|i| i.name == name) {
                let near = did_you_mean(name, inputs.iter().map(|i| i.name.as_str()));
                let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
                return Err(bad(format!(
                    "array {name} is no input of the model, whose inputs are {}.{near}",
                    names.join(", ")
                )));
            }
        }
        let mut sizes = BTreeMap::new();
        let mut bound = Vec::new();
        for input in inputs {
            let Some(column) = dataset.column(&input.name).filter(|_| !is_target(&input.name)) else {
                let near = did_you_mean(&input.name, dataset.names());
                return Err(bad(format!(
                    "no array for the model's input {} (there are: {}).{near}",
                    input.name,
                    arrays()
                )));
            };
            let data_type = input.data_type.unwrap_or(column.data_type());
            if !widens(column.data_type(), data_type) {
                return Err(bad(wrong_type(&input.name, column.data_type(), data_type)));
            }
            if let Some(dims) = &input.dims {
                check_dims(&input.name, column, dims, &mut sizes).map_err(bad)?;
            }
            bound.push((input.name.as_str(), column, data_type));
        }
        let mut read = Vec::new();
        for target in targets {
            let Some((name, column)) = dataset.columns.iter().find(|(n, _)| *n == target.name) else { continue };
            if !widens(column.data_type(), target.data_type) {
                return Err(bad(wrong_type(name, column.data_type(), target.data_type)));
            }
            let field = target.field(column.row_dims().len() + 1);
            if let Some(dims) = &field.dims {
                check_dims(name, column, dims, &mut sizes).map_err(bad)?;
            }
            read.push((field, column));
        }
        Ok(Self { dataset, inputs: bound, targets: read, cache: None })
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        self.dataset.rows()
    }

    /// How its rows came of texts that were packed.
    pub fn packed(&self) -> Option<Packed> {
        self.dataset.packed
    }

    /// How many rows of the inputs make one sample.
    pub fn roles(&self) -> usize {
        self.dataset.roles()
    }

    /// The length of each sample before it is padded, by the longest of its rows; zeros where all are alike.
    pub fn lengths(&self) -> Result<Vec<usize>> {
        let roles = self.roles();
        let mut lengths = vec![0; self.rows()];
        for (name, column, _) in &self.inputs {
            for at in 0..lengths.len() * roles {
                let length = column
                    .length(at)
                    .map_err(|what| Error::data(format!("{}: array {name}: {what}", self.dataset.path.display())))?;
                // Either all rows of a column have a length, or none has.
                let Some(length) = length else { break };
                let sample = &mut lengths[at / roles];
                *sample = length.max(*sample);
            }
        }
        Ok(lengths)
    }

    /// The file it was read from.
    pub fn path(&self) -> &std::path::Path {
        &self.dataset.path
    }

    /// The columns that the loss reads, with the shapes they turned out to have.
    pub fn targets(&self) -> Vec<Field> {
        self.targets.iter().map(|(field, _)| field.clone()).collect()
    }

    /// Fails unless every label (the first column that the loss reads) is a class below `classes` or [`IGNORE`], and at
    /// least one is a class.
    pub fn check_classes(&self, classes: usize) -> Result<()> {
        let Some((Field { name, .. }, column)) = self.targets.first() else { return Ok(()) };
        let bad = |what: String| Error::data(format!("{}: {what}", self.dataset.path.display()));
        let mut used = false;
        for row in 0..self.rows() {
            let labels = column.gather(&[row], DataType::Int64).map_err(bad)?;
            for label in labels.values::<i64>().unwrap_or_default() {
                match usize::try_from(*label) {
                    Ok(class) if class < classes => used = true,
                    _ if *label == IGNORE => {}
                    _ => {
                        return Err(bad(format!(
                            "array {name}, row {row}: label {label} is out of range; the output has {classes} classes, \
                             so labels go from 0 to {} ({IGNORE} for none)",
                            classes.saturating_sub(1)
                        )));
                    }
                }
            }
        }
        if used {
            Ok(())
        } else {
            Err(bad(format!("array {name}: all labels are {IGNORE}, so there is nothing to learn")))
        }
    }

    /// Has batches go with a model whose frozen part is in `cache`; `None`: with the whole model.
    pub(in crate::train) fn keep(&mut self, cache: Option<Cache>) {
        self.cache = cache;
    }

    /// Rows of the inputs: one for each role of each sample.
    pub(in crate::train) fn input_rows(&self) -> usize {
        self.rows() * self.roles()
    }

    pub(in crate::train) fn input_names(&self) -> impl Iterator<Item = &str> {
        self.inputs.iter().map(|(name, ..)| *name)
    }

    /// Shape of a row of each input, where it is not padded to others; `None`: one number for all rows.
    pub(in crate::train) fn row_shape(&self, number: usize) -> Result<Vec<Option<Vec<usize>>>> {
        let shapes =
            self.inputs.iter().map(|(name, column, _)| column.row_shape(number).map_err(|e| self.bad(name, e)));
        shapes.collect()
    }

    /// Whether shorter rows are padded before their beginning; `None` inside where inputs differ in that, outside where all
    /// rows are alike.
    pub(in crate::train) fn pads_left(&self) -> Option<Option<bool>> {
        let mut sides = self.inputs.iter().filter_map(|(_, column, _)| column.pads_left());
        let first = sides.next()?;
        Some(sides.all(|side| side == first).then_some(first))
    }

    /// The rows of the inputs that the given samples are made of: one role below the other.
    pub(in crate::train) fn input_numbers(&self, rows: &[usize]) -> Vec<usize> {
        let roles = self.roles();
        (0..roles).flat_map(|role| rows.iter().map(move |row| row * roles + role)).collect()
    }

    /// Those inputs that are `wanted`, with the rows of these numbers.
    pub(in crate::train) fn inputs(
        &self,
        numbers: &[usize],
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<(String, Tensor)>> {
        let inputs = self.inputs.iter().filter(|(name, ..)| wanted(name));
        inputs
            .map(|(name, column, data_type)| Ok((name.to_string(), self.gather(name, column, numbers, *data_type)?)))
            .collect()
    }

    fn gather(&self, name: &str, column: &Column, rows: &[usize], data_type: DataType) -> Result<Tensor> {
        column.gather(rows, data_type).map_err(|what| self.bad(name, what))
    }

    fn bad(&self, name: &str, what: String) -> Error {
        Error::data(format!("{}: array {name}: {what}", self.dataset.path.display()))
    }

    /// The given rows.
    pub fn batch(&self, rows: &[usize]) -> Result<Batch> {
        let numbers = self.input_numbers(rows);
        let mut inputs = self.inputs(&numbers, |name| self.cache.as_ref().is_none_or(|cache| cache.reads(name)))?;
        let tokens = match &self.cache {
            None => tokens(&inputs),
            // What the tokens were made into is kept, and they are read no more.
            Some(cache) => {
                inputs.extend(cache.batch(&numbers)?);
                tokens(&self.inputs(&numbers, |name| is_ids(name) || is_mask(name))?)
            }
        };
        let target = |(field, column): &(Field, &Column)| {
            self.gather(&field.name, column, rows, field.data_type.unwrap_or(column.data_type()))
        };
        let targets = self.targets.iter().map(target).collect::<Result<_>>()?;
        Ok(Batch { inputs, targets, samples: rows.len(), tokens })
    }
}

fn wrong_type(array: &str, found: DataType, wanted: DataType) -> String {
    let (found, wanted) = (data_type_name(found), data_type_name(wanted));
    format!("array {array} holds {found}, but {wanted} is wanted; convert it (NumPy: {array}.astype(\"{wanted}\"))")
}

/// Compares the rows of `column` with a value's axes (the first one is the batch). `sizes` keeps what each named axis
/// was seen to be.
fn check_dims<'a>(
    name: &'a str,
    column: &Column,
    wanted: &[Axis],
    sizes: &mut BTreeMap<String, (usize, &'a str)>,
) -> Result<(), String> {
    if let Column::Single(_) = column {
        return match wanted.is_empty() {
            true => Ok(()),
            false => Err(format!("array {name} is a single number; here an array has one row per sample")),
        };
    }
    let found = column.row_dims();
    let shape = || {
        let axis = |a: &Axis| match a {
            Axis::Known(n) => n.to_string(),
            Axis::Named(name) => name.clone(),
            Axis::Free => "?".into(),
        };
        let found = found.iter().map(|d| d.map_or("?".into(), |n| n.to_string()));
        let found: Vec<String> = std::iter::once(column.rows().to_string()).chain(found).collect();
        let wanted: Vec<String> = wanted.iter().map(axis).collect();
        format!("array {name} has shape [{}], but [{}] is wanted", found.join(", "), wanted.join(", "))
    };
    if found.len() + 1 != wanted.len() {
        return Err(shape());
    }
    for (found, wanted) in found.iter().zip(&wanted[1..]) {
        match (found, wanted) {
            (Some(n), Axis::Known(want)) if n != want => return Err(shape()),
            (Some(n), Axis::Named(axis)) => {
                let (seen, first) = sizes.entry(axis.clone()).or_insert((*n, name));
                if seen != n {
                    return Err(format!("{} where {axis} is {seen} in array {first}", shape()));
                }
            }
            _ => {}
        }
    }
    Ok(())
}
