//! The values of a cut for the rows of a feed: computed in groups that follow from the data alone, then put into batches.

use std::collections::BTreeMap;

use super::cut::Kept;
use super::rows;
use super::store::Store;
use crate::engine::Session;
use crate::onnx::Tensor;
use crate::train::data::Feed;
use crate::{Error, Result};

/// What was computed of the rows of a feed.
#[derive(Debug)]
pub(in crate::train) struct Cache {
    /// Inputs of the model that are still read.
    pub(super) inputs: Vec<String>,
    pub(super) values: Vec<Kept>,
    pub(super) rows: Store,
    /// Whether shorter rows are padded before their beginning.
    pub(super) left: bool,
}

impl Cache {
    /// Whether batches need the model's input of this name.
    pub fn reads(&self, input: &str) -> bool {
        self.inputs.iter().any(|name| name == input)
    }

    /// The values for a batch of the rows of these numbers.
    pub fn batch(&self, numbers: &[usize]) -> Result<Vec<(String, Tensor)>> {
        let mut columns: Vec<Vec<rows::Row>> = self.values.iter().map(|_| Vec::with_capacity(numbers.len())).collect();
        for number in numbers {
            let values = self.rows.get(*number).map_err(Error::io("read", "the cache of the frozen part"))?;
            columns.iter_mut().zip(values).for_each(|(column, row)| column.push(row));
        }
        let stack = |(kept, rows): (&Kept, Vec<rows::Row>)| {
            let value = rows::stack(&rows, kept.axis, kept.element, self.left);
            let value = value.map_err(|what| Error::model(format!("value {}: {what}", kept.name)))?;
            Ok((kept.name.clone(), value))
        };
        self.values.iter().zip(columns).map(stack).collect()
    }

    /// Computes the values of the rows of these numbers, `group` at a time; `fixed`: neither more nor fewer. A row's
    /// group has rows of its shape only and depends on the data alone, so that what is kept of it has the same bits in
    /// every process. `going_on` hears of each row and may end it: then false comes back.
    pub(super) fn fill(
        &mut self,
        session: &mut dyn Session,
        feed: &Feed,
        numbers: &[usize],
        (group, fixed): (usize, bool),
        going_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool> {
        let mut alike: BTreeMap<Vec<Option<Vec<usize>>>, Vec<usize>> = BTreeMap::new();
        for number in numbers {
            alike.entry(feed.row_shape(*number)?).or_default().push(*number);
        }
        let wanted: Vec<String> = session.inputs().to_vec();
        let names: Vec<&str> = self.values.iter().map(|kept| kept.name.as_str()).collect();
        for numbers in alike.values().flat_map(|numbers| numbers.chunks(group.max(1))) {
            if !going_on(numbers.len()) {
                return Ok(false);
            }
            let mut run = numbers.to_vec();
            if fixed {
                run.resize(group, numbers[0]);
            }
            let inputs = feed.inputs(&run, |name| wanted.iter().any(|w| w == name))?;
            let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
            let values = session.run(&inputs, &names)?;
            let mut columns = Vec::with_capacity(values.len());
            for (kept, value) in self.values.iter().zip(&values) {
                let rows = rows::cut(value, kept.axis, run.len());
                columns.push(rows.map_err(|what| Error::model(format!("value {} {what}", kept.name)))?.into_iter());
            }
            for number in numbers {
                let values: Vec<rows::Row> = columns.iter_mut().filter_map(Iterator::next).collect();
                self.rows.put(*number, &values).map_err(Error::io("write", "the cache of the frozen part"))?;
            }
        }
        Ok(true)
    }
}
