//! The shapes that the values of a model have for rows of the data, without a run.

use std::collections::BTreeMap;

use crate::onnx::shape::{Dim, Shapes};
use crate::onnx::{DataType, ModelProto};
use crate::train::data::Feed;

use super::work;
use crate::{Error, Result};

/// Lengths of rows that are looked at to tell how large all of them are; others count as the next longer one of these.
const LOOKED_AT: usize = 8;

/// Shapes for several numbers of rows like one of the data.
pub(super) struct Sizes<'a> {
    model: &'a ModelProto,
    /// Rows of a run, and whether it cannot have another number of them.
    group: (usize, bool),
    /// For a run.
    pub shapes: Shapes,
    /// For two rows and for three.
    few: Option<[Shapes; 2]>,
}

impl<'a> Sizes<'a> {
    pub fn new(model: &'a ModelProto, feed: &Feed, group: (usize, bool)) -> Result<Self> {
        let row = sorted(feed)?.get(feed.input_rows() / 2).map_or(0, |(_, row)| *row);
        let shapes = |count| Ok::<_, Error>(Shapes::infer(model, &dims(feed, row, count)?));
        let few = if group.1 { None } else { Some([shapes(2)?, shapes(3)?]) };
        Ok(Self { model, group, shapes: shapes(group.0)?, few })
    }

    /// The axis of `value` on which the rows stand; `None` where there is none, or it is not known.
    pub fn axis(&self, value: &str) -> Option<usize> {
        let Some([two, three]) = &self.few else {
            let first = known(self.shapes.dims(value)?.first()?)?;
            return (first > 0 && first % self.group.0 as i64 == 0).then_some(0);
        };
        let sizes = |shapes: &Shapes| shapes.dims(value)?.iter().map(known).collect::<Option<Vec<i64>>>();
        let (two, three) = (sizes(two)?, sizes(three)?);
        let mut differ = two.iter().zip(&three).enumerate().filter(|(_, (two, three))| two != three);
        let (axis, (two, three)) = differ.next()?;
        (differ.next().is_none() && *two > 0 && two * 3 == three * 2).then_some(axis)
    }

    /// Bytes that `values` hold for all rows of `feed`, at most; `None` where they are not known.
    pub fn bytes(&self, values: &[String], feed: &Feed) -> Result<Option<u64>> {
        let sorted = sorted(feed)?;
        let count = if self.group.1 { self.group.0 } else { 2 };
        let (mut all, mut done) = (0.0, 0);
        for part in 1..=LOOKED_AT {
            let until = sorted.len() * part / LOOKED_AT;
            if until == done {
                continue;
            }
            let shapes = Shapes::infer(self.model, &dims(feed, sorted[until - 1].1, count)?);
            let of = |value: &String| Some(work::numbers(&shapes, value)? * width(shapes.element(value)?));
            let Some(bytes) = values.iter().map(of).sum::<Option<f64>>() else { return Ok(None) };
            all += bytes / count as f64 * (until - done) as f64;
            done = until;
        }
        Ok(Some(all.ceil() as u64))
    }
}

/// Rows of the inputs of `feed` after how many numbers they hold, the shortest first.
pub(super) fn sorted(feed: &Feed) -> Result<Vec<(usize, usize)>> {
    let numbers = |row| -> Result<usize> {
        Ok(feed.row_shape(row)?.into_iter().flatten().map(|dims| dims.iter().product::<usize>()).sum())
    };
    let rows = (0..feed.input_rows()).map(|row| Ok((numbers(row)?, row)));
    let mut rows: Vec<(usize, usize)> = rows.collect::<Result<_>>()?;
    rows.sort_unstable();
    Ok(rows)
}

/// Shapes of the inputs for `count` rows like `row`.
fn dims(feed: &Feed, row: usize, count: usize) -> Result<BTreeMap<String, Vec<i64>>> {
    let shapes = feed.row_shape(row)?;
    let dims = feed.input_names().zip(shapes).map(|(name, shape)| {
        let rows = shape.into_iter().flat_map(|dims| std::iter::once(count).chain(dims));
        (name.to_string(), rows.map(|n| n as i64).collect())
    });
    Ok(dims.collect())
}

fn known(dim: &Dim) -> Option<i64> {
    match dim {
        Dim::Known(n) => Some(*n),
        Dim::Symbol(_) => None,
    }
}

/// Bytes of one number.
fn width(element: DataType) -> f64 {
    match element {
        DataType::Double | DataType::Int64 | DataType::Uint64 => 8.0,
        DataType::Float | DataType::Int32 | DataType::Uint32 => 4.0,
        DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => 2.0,
        _ => 1.0,
    }
}
