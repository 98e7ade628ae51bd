//! A merge that changes some outputs of a stored weight: those of one module of a packed layer.

use std::ops::Range;

use crate::adapter::Merge;

/// `merger`, which knows a weight of the outputs alone, on a weight that has them among others.
pub(super) struct Partly {
    pub(super) merger: Box<dyn Merge>,
    pub(super) outputs: Range<usize>,
    /// The weight's rows are outputs; else its columns are.
    pub(super) out_in: bool,
}

impl Merge for Partly {
    fn rows_together(&self) -> usize {
        self.merger.rows_together()
    }

    fn apply(&self, rows: &mut [f32], row_len: usize, first: usize) {
        let Range { start, end } = self.outputs;
        if row_len == 0 || start >= end {
            return;
        }
        if self.out_in {
            let count = rows.len() / row_len;
            let (from, to) = (start.max(first), end.min(first + count));
            if from < to {
                let own = &mut rows[(from - first) * row_len..(to - first) * row_len];
                self.merger.apply(own, row_len, from - start);
            }
            return;
        }
        let width = end - start;
        let mut own: Vec<f32> = rows.chunks_exact(row_len).flat_map(|row| &row[start..end]).copied().collect();
        self.merger.apply(&mut own, width, first);
        for (row, own) in rows.chunks_exact_mut(row_len).zip(own.chunks_exact(width)) {
            row[start..end].copy_from_slice(own);
        }
    }
}
