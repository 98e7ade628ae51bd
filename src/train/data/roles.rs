//! Samples of two or three parts that go through the model alike: an anchor, what belongs to it, what does not.
//!
//! All parts of a batch make one run of the model: the anchors' rows, below them the positives', below them the
//! negatives'.

use super::Dataset;
use super::column::{Array, Column};
use crate::{Error, Result};

/// The parts by the names that Hugging Face's datasets give them; in files of arrays, `anchor.input_ids` and so on.
pub(super) const NAMES: [&str; 3] = ["anchor", "positive", "negative"];

/// How many parts a loss wants of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Roles {
    /// One row is one sample.
    One,
    /// An anchor and its positive, and a negative where the data has it.
    Pair,
    /// All three.
    Triple,
}

impl Roles {
    /// The number of parts, where the data has negatives or not.
    pub(super) fn count(self, negatives: bool) -> Result<usize, String> {
        match (self, negatives) {
            (Roles::One, _) => Ok(1),
            (Roles::Pair, false) => Ok(2),
            (Roles::Pair | Roles::Triple, true) => Ok(3),
            (Roles::Triple, false) => Err("the loss wants a negative with each anchor and positive".into()),
        }
    }
}

/// Puts the rows of the roles in succession: those of `anchor.x` and `positive.x` in turn become x.
pub(super) fn stack(dataset: Dataset, roles: Roles) -> Result<Dataset> {
    if roles == Roles::One {
        return Ok(dataset);
    }
    let Dataset { path, columns, rows, label_names, .. } = dataset;
    let bad = |what: String| Error::data(format!("{}: {what}", path.display()));
    let mut parts: [Vec<(String, Array)>; 3] = Default::default();
    for (name, column) in columns {
        let found = NAMES.iter().zip(&mut parts).find_map(|(role, part)| {
            let input = name.strip_prefix(role)?.strip_prefix('.')?;
            Some((input.to_string(), part))
        });
        let Some((input, part)) = found else {
            return Err(bad(format!(
                "array {name} is none of a role; there has to be one for each input and role: anchor.INPUT, \
                 positive.INPUT and, where there are negatives, negative.INPUT"
            )));
        };
        match column {
            Column::Dense(array) => part.push((input, array)),
            _ => return Err(bad(format!("array {name} is a single number; here an array has one row per sample"))),
        }
    }
    let count = roles.count(!parts[2].is_empty()).map_err(bad)?;
    let [anchors, mut others @ ..] = parts;
    let mut columns = Vec::new();
    for (input, array) in anchors {
        let mut of_roles = Vec::new();
        for (role, part) in NAMES[1..].iter().zip(&mut others).take(count - 1) {
            let Some(at) = part.iter().position(|(name, _)| *name == input) else {
                return Err(bad(format!("there is an array anchor.{input}, but no {role}.{input}")));
            };
            let (_, other) = part.remove(at);
            if (other.data_type, &other.dims) != (array.data_type, &array.dims) {
                return Err(bad(format!(
                    "arrays anchor.{input} and {role}.{input} have to be alike, but the shapes are {:?} of {:?} and {:?} \
                     of {:?}",
                    array.dims, array.data_type, other.dims, other.data_type
                )));
            }
            of_roles.push(Column::Dense(other));
        }
        of_roles.insert(0, Column::Dense(array));
        columns.push((input, Column::Turns(of_roles)));
    }
    let alone = NAMES[1..].iter().zip(&others).find_map(|(role, part)| Some((role, part.first()?)));
    if let Some((role, (input, _))) = alone {
        return Err(bad(format!("there is an array {role}.{input}, but no anchor.{input}")));
    }
    Ok(Dataset { columns, rows, roles: count, label_names, path, packed: None })
}
