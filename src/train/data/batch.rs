//! Which rows make up which batch: epochs in an order that depends on the seed alone.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Batches without end, epoch after epoch; the last one of an epoch may be short.
#[derive(Debug, Clone)]
pub struct Batches {
    order: Vec<usize>,
    size: usize,
    /// `None`: always in the file's order.
    seed: Option<u64>,
    /// Of each row, where rows of like lengths are to meet.
    lengths: Option<Vec<usize>>,
    epoch: u64,
    at: usize,
}

/// Rows of like lengths are looked for in so many batches at a time, as in transformers' LengthGroupedSampler: few enough
/// that an epoch stays a shuffled one.
const POOL: usize = 50;

impl Batches {
    /// `size` rows at a time out of `rows` (both at least 1); shuffled anew in each epoch where a seed is given.
    pub fn new(rows: usize, size: usize, seed: Option<u64>) -> Self {
        let mut batches = Self { order: (0..rows).collect(), size: size.max(1), seed, lengths: None, epoch: 0, at: 0 };
        batches.arrange();
        batches
    }

    /// The same, but in shuffled epochs the rows of a batch are of like lengths, so that little is padded. The longest
    /// row comes first: a batch that memory cannot hold ends the run at once.
    pub fn grouped(rows: usize, size: usize, seed: u64, lengths: Vec<usize>) -> Self {
        let mut batches = Self { lengths: Some(lengths), ..Self::new(rows, size, Some(seed)) };
        batches.arrange();
        batches
    }

    /// Batches in one epoch.
    pub fn per_epoch(&self) -> usize {
        self.order.len().div_ceil(self.size)
    }

    /// The rows of the next batch; begins a new epoch after the last.
    pub fn next_rows(&mut self) -> &[usize] {
        if self.at >= self.order.len() {
            self.at = 0;
            self.epoch += 1;
            self.arrange();
        }
        let from = self.at;
        self.at = (from + self.size).min(self.order.len());
        &self.order[from..self.at]
    }

    /// True right after the last batch of an epoch.
    pub fn at_epoch_end(&self) -> bool {
        self.at == self.order.len()
    }

    /// The epoch, counted from 0, and how many of its rows were handed out.
    pub fn position(&self) -> (u64, usize) {
        (self.epoch, self.at)
    }

    /// Goes on from a [`Batches::position`].
    pub fn go_to(&mut self, epoch: u64, row: usize) {
        (self.epoch, self.at) = (epoch, row.min(self.order.len()));
        self.arrange();
    }

    /// An epoch's order follows from seed and epoch number, not from the epochs before it.
    fn arrange(&mut self) {
        let Some(seed) = self.seed else { return };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(self.epoch);
        self.order.sort_unstable();
        self.order.shuffle(&mut rng);
        let Some(lengths) = &self.lengths else { return };
        let length = |row: &usize| lengths.get(*row).copied().unwrap_or(0);
        let batches = (self.order.len() / self.size.saturating_mul(4)).clamp(1, POOL);
        for pool in self.order.chunks_mut(batches.saturating_mul(self.size)) {
            pool.sort_by_key(|row| std::cmp::Reverse(length(row)));
        }
        let longest = (0..self.order.len()).rev().max_by_key(|at| length(&self.order[*at]));
        if let Some(longest) = longest {
            self.order.swap(0, longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(batches: &mut Batches, n: usize) -> Vec<Vec<usize>> {
        (0..n).map(|_| batches.next_rows().to_vec()).collect()
    }

    #[test]
    fn in_order_they_go_round_and_keep_the_short_one() {
        let mut batches = Batches::new(5, 2, None);
        assert_eq!(batches.per_epoch(), 3);
        assert_eq!(take(&mut batches, 3), [vec![0, 1], vec![2, 3], vec![4]]);
        assert!(batches.at_epoch_end());
        assert_eq!(take(&mut batches, 1), [vec![0, 1]]);
        assert!(!batches.at_epoch_end());
    }

    #[test]
    fn shuffled_epochs_hold_every_row_once_and_depend_on_the_seed_alone() {
        let epochs = |seed| {
            let mut batches = Batches::new(10, 4, Some(seed));
            (take(&mut batches, 3).concat(), take(&mut batches, 3).concat())
        };
        let (first, second) = epochs(7);
        for epoch in [&first, &second] {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(first, second);
        assert_eq!(epochs(7), (first.clone(), second));
        assert_ne!(epochs(8).0, first);
    }

    #[test]
    fn rows_of_like_lengths_meet_and_the_longest_comes_first() {
        let lengths: Vec<usize> = (0..400).map(|row| (row * 37) % 101 + 1).collect();
        let padded = |batches: &mut Batches| -> usize {
            let padded =
                take(batches, 50).into_iter().map(|rows| rows.iter().map(|r| lengths[*r]).max().unwrap() * rows.len());
            padded.sum()
        };
        let mut grouped = Batches::grouped(400, 8, 3, lengths.clone());
        for _ in 0..2 {
            let mut epoch = grouped.clone();
            let rows = take(&mut epoch, 50).concat();
            let mut sorted = rows.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..400).collect::<Vec<_>>());
            assert_eq!(lengths[rows[0]], 101);
            let all: usize = lengths.iter().sum();
            let (grouped, plain) = (padded(&mut grouped), padded(&mut Batches::new(400, 8, Some(3))));
            assert!(grouped < all * 115 / 100 && plain > all * 160 / 100, "{grouped} and {plain} for {all}");
        }
    }

    #[test]
    fn from_a_position_they_go_on_as_if_nothing_had_happened() {
        let make = |seed| match seed {
            Some(9) => Batches::grouped(10, 4, 9, (0..10).rev().collect()),
            _ => Batches::new(10, 4, seed),
        };
        for seed in [None, Some(7), Some(9)] {
            for taken in 0..9 {
                let mut batches = make(seed);
                take(&mut batches, taken);
                let mut again = make(seed);
                let (epoch, row) = batches.position();
                again.go_to(epoch, row);
                assert_eq!(take(&mut again, 5), take(&mut batches, 5));
            }
        }
    }
}
