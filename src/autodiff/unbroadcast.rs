//! The transpose of broadcasting: an adjoint summed back to the shape of the operand.

use super::vjp::Vjp;
use crate::onnx::shape::Dim;

/// How an adjoint becomes its operand's.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// Sum over these axes of the adjoint, and then these axes (of size 1) are put in.
    Sum { axes: Vec<i64>, restore: Vec<i64> },
    /// Only a run can tell.
    Runtime,
}

impl Vjp<'_> {
    /// Sums `g`, whose dimensions are `from` where known, to the shape of `to`, which was broadcast to it.
    pub fn unbroadcast(&self, g: impl AsRef<str>, from: Option<&[Dim]>, to: &str) -> String {
        let g = g.as_ref();
        let plan = match (from, self.dims(to)) {
            (Some(from), Some(to)) => plan(from, to),
            _ => Plan::Runtime,
        };
        match plan {
            Plan::Sum { axes, .. } if axes.is_empty() => g.to_string(),
            Plan::Sum { axes, restore } => {
                let whole = from.is_some_and(|f| f.len() == axes.len()) && restore.is_empty();
                if whole {
                    return self.sum_all(g);
                }
                let keep = restore == axes;
                let sum = self.reduce_sum(g, self.ints(&axes), keep);
                if keep || restore.is_empty() { sum } else { self.unsqueeze(sum, self.ints(&restore)) }
            }
            Plan::Runtime => self.unbroadcast_at_runtime(g, from.map(<[Dim]>::len), to),
        }
    }

    /// Sums over the axes where the shapes differ, after ones were put before the shorter one.
    fn unbroadcast_at_runtime(&self, g: &str, rank: Option<usize>, to: &str) -> String {
        let (from, target) = (self.shape(g), self.shape_of(to));
        let padded = match (rank, self.shapes.rank(to)) {
            (Some(a), Some(b)) if a == b => target.clone(),
            (Some(a), Some(b)) if a > b => self.concat(&[self.ints(&vec![1; a - b]), target.clone()], 0),
            _ => {
                let missing = self.sub(self.shape(&from), self.shape(&target));
                self.concat(&[self.expand(self.ints(&[1]), missing), target.clone()], 0)
            }
        };
        let differ = self.not(self.equal(from, padded));
        let axes = self.squeeze(self.op("NonZero", &[&differ], vec![]), self.ints(&[0]));
        self.reshape(self.reduce_sum(g, axes, true), target)
    }

    /// [`Vjp::unbroadcast`] of an adjoint in the shape of the node's first output to that of input `i`, if it wants one.
    pub fn to_input(&self, i: usize, g: impl FnOnce() -> String) -> Option<String> {
        let to = self.node.input_at(i).filter(|_| self.wants(i))?;
        let from = self.node.output_at(0).and_then(|y| self.dims(y));
        Some(self.unbroadcast(g(), from, to))
    }
}

fn plan(from: &[Dim], to: &[Dim]) -> Plan {
    let Some(extra) = from.len().checked_sub(to.len()) else { return Plan::Runtime };
    let mut axes: Vec<i64> = (0..extra as i64).collect();
    let mut restore = Vec::new();
    for (i, (f, t)) in from[extra..].iter().zip(to).enumerate() {
        match (f, t) {
            (f, t) if f == t => {}
            (_, Dim::Known(1)) => {
                axes.push((extra + i) as i64);
                restore.push(i as i64);
            }
            (_, Dim::Known(_)) => {}
            _ => return Plan::Runtime,
        }
    }
    Plan::Sum { axes, restore }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Dim::{Known, Symbol};

    #[test]
    fn plans() {
        let sum = |axes: &[i64], restore: &[i64]| Plan::Sum { axes: axes.to_vec(), restore: restore.to_vec() };
        assert_eq!(plan(&[Symbol(0), Known(3)], &[Symbol(0), Known(3)]), sum(&[], &[]));
        assert_eq!(plan(&[Symbol(0), Known(3)], &[Known(3)]), sum(&[0], &[]));
        assert_eq!(plan(&[Symbol(0), Known(3)], &[Known(1), Known(3)]), sum(&[0], &[0]));
        assert_eq!(plan(&[Symbol(0), Symbol(1), Known(3)], &[Known(1), Known(3)]), sum(&[0, 1], &[0]));
        assert_eq!(plan(&[Symbol(0), Known(3)], &[]), sum(&[0, 1], &[]));
        assert_eq!(plan(&[Symbol(0), Known(3)], &[Symbol(1), Known(3)]), Plan::Runtime);
        assert_eq!(plan(&[Known(1)], &[Known(1)]), sum(&[], &[]));
        assert_eq!(plan(&[Symbol(4)], &[Known(3)]), sum(&[], &[]));
    }
}
