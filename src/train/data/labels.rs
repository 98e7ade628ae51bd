//! Labels: class ids, class names, numbers, and rows of ids or numbers.

use std::collections::{BTreeMap, BTreeSet};

use super::LabelKind;
use super::column::{Growing, Padding, number};
use super::fit::IGNORE;
use super::record::{Cell, Numbers, Place};
use crate::onnx::DataType;
use crate::{Error, Result, did_you_mean};

/// What the labels of a dataset are, as far as it was read.
#[derive(Debug)]
pub(super) struct Seen {
    kind: Option<LabelKind>,
    classes: Option<usize>,
    names: BTreeSet<String>,
    /// Where the first one of each sort stands: ids, and names.
    id: Option<Place>,
    name: Option<Place>,
    /// The first id that is no class, if labels are ids.
    beyond: Option<Error>,
    pub rows: usize,
}

impl Seen {
    pub fn new(kind: Option<LabelKind>, classes: Option<usize>) -> Self {
        Self { kind, classes, names: BTreeSet::new(), id: None, name: None, beyond: None, rows: 0 }
    }

    /// Takes note of the label of another row, which stands under `column`.
    pub fn add(&mut self, place: &Place, cell: &Cell, column: &str) -> Result<()> {
        self.rows += 1;
        if self.kind != Some(LabelKind::Class) {
            return Ok(());
        }
        match cell {
            Cell::Text(name) => {
                self.name.get_or_insert_with(|| place.clone());
                self.insert(name);
            }
            Cell::Raw(text) => {
                if text.trim().parse::<i64>().is_err() {
                    self.name.get_or_insert_with(|| place.clone());
                }
                // Digits may turn out to be names among others.
                self.insert(text);
            }
            Cell::Int(_) | Cell::Array { .. } => {
                self.id.get_or_insert_with(|| place.clone());
            }
            _ => {}
        }
        if let (Some(id), Some(name)) = (&self.id, &self.name) {
            return Err(id.error(format!(
                "field {column:?}: labels are class ids on some rows and names on others, the first of those in {name}"
            )));
        }
        let id = match cell {
            Cell::Int(id) => Some(*id),
            Cell::Raw(text) => text.trim().parse().ok(),
            _ => None,
        };
        if let (Some(id), Some(classes), None) = (id, self.classes, &self.beyond)
            && id != IGNORE
            && usize::try_from(id).map_or(true, |id| id >= classes)
        {
            self.beyond = Some(place.error(format!(
                "field {column:?}: label {id} is out of range; the output has {classes} classes, so labels go from 0 to \
                 {} ({IGNORE} for none)",
                classes.saturating_sub(1)
            )));
        }
        Ok(())
    }

    fn insert(&mut self, name: &str) {
        if !self.names.contains(name) {
            self.names.insert(name.into());
        }
    }

    /// The names in the order of their ids, where labels are names.
    pub fn names(self) -> Result<Option<Vec<String>>> {
        match (self.name, self.beyond) {
            (Some(_), _) => Ok(Some(self.names.into_iter().collect())),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }
}

/// Makes rows of a label column out of cells.
#[derive(Debug)]
pub(super) struct Labels {
    kind: Option<LabelKind>,
    /// Ids by name, where labels may be names.
    ids: Option<BTreeMap<String, i64>>,
}

impl Labels {
    pub fn new(kind: Option<LabelKind>, names: Option<&[String]>) -> Self {
        let ids = names.map(|names| names.iter().cloned().zip(0..).collect());
        Self { kind, ids }
    }

    /// An empty column of labels, where there are any.
    pub fn column(&self) -> Option<Growing> {
        let fill = IGNORE.to_le_bytes().to_vec();
        self.kind.map(|kind| match kind {
            LabelKind::Class => Growing::padded(DataType::Int64, Padding { fill, ..Default::default() }),
            LabelKind::Number => Growing::new(DataType::Float, None),
        })
    }

    /// Appends the label in `cell` to `column`; says what it is and what was wanted where it is none.
    pub fn push(&self, cell: &Cell, column: &mut Growing) -> Result<(), String> {
        let Some(kind) = self.kind else { return Ok(()) };
        let refused = || {
            let wanted = match kind {
                LabelKind::Class => "a class id (an integer), a class name (a string) or a list of ids",
                LabelKind::Number => "a number or a list of numbers",
            };
            format!("is {cell}; with this loss the label has to be {wanted}")
        };
        match (kind, cell) {
            (LabelKind::Class, Cell::Text(name)) => column.push(&[], &Numbers::Int(vec![self.id(name)?])),
            (LabelKind::Class, Cell::Raw(text)) => {
                let id = match (text.trim().parse(), &self.ids) {
                    (_, Some(ids)) if ids.contains_key(text) => self.id(text)?,
                    (Ok(id), _) => id,
                    (Err(_), Some(_)) => self.id(text)?,
                    (Err(_), None) => return Err(refused()),
                };
                column.push(&[], &Numbers::Int(vec![id]))
            }
            (LabelKind::Class, Cell::Int(id)) => column.push(&[], &Numbers::Int(vec![*id])),
            (LabelKind::Class, Cell::Array { dims, numbers: numbers @ Numbers::Int(_) })
            | (LabelKind::Number, Cell::Array { dims, numbers }) => column.push(dims, numbers),
            (LabelKind::Number, Cell::Int(_) | Cell::Float(_) | Cell::Raw(_)) => {
                column.push(&[], &number(cell).map_err(|_| refused())?)
            }
            _ => Err(refused()),
        }
    }

    fn id(&self, name: &str) -> Result<i64, String> {
        let ids = self.ids.as_ref();
        ids.and_then(|ids| ids.get(name)).copied().ok_or_else(|| {
            let near = did_you_mean(name, ids.into_iter().flatten().map(|(name, _)| name.as_str()));
            format!("is {name:?}, which is no label of the training data.{near}")
        })
    }
}
