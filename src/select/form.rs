//! How a node multiplies by its matrix: the rows of an input, the channels of a convolution with a kernel of ones, or
//! the axes that an Einsum sums over.

use crate::onnx::NodeProto;

/// The product that a linear layer's node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// `x[…, in]` by a matrix, as MatMul and Gemm do.
    Rows,
    /// `x[n, in, …]` with this many axes after the channels, by a weight `[out, in, 1, …]`.
    Channels(usize),
    /// An Einsum.
    Sum(Sum),
    /// The product of rows is a part of what the node does: an adapter can only be in its matrix, not beside the node.
    Within,
}

/// An Einsum of x and a matrix, where no label of the matrix is both summed over and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sum {
    /// The term of x, and that of the result.
    pub x: String,
    pub result: String,
    /// The matrix's labels that are summed over, with their sizes and in its order: together the inputs.
    pub summed: Vec<(char, usize)>,
    /// Its other labels: together the outputs.
    pub kept: Vec<(char, usize)>,
}

impl Form {
    /// Shape of the matrix as the node reads it, `[out, in]` or not; `None` for a plain matrix.
    pub fn shape(&self, inputs: usize, outputs: usize, out_in: bool) -> Option<Vec<usize>> {
        let sizes = |labels: &[(char, usize)]| labels.iter().map(|l| l.1).collect::<Vec<_>>();
        match self {
            Self::Rows | Self::Within => None,
            Self::Channels(spatial) => Some([vec![outputs, inputs], vec![1; *spatial]].concat()),
            Self::Sum(sum) if out_in => Some([sizes(&sum.kept), sizes(&sum.summed)].concat()),
            Self::Sum(sum) => Some([sizes(&sum.summed), sizes(&sum.kept)].concat()),
        }
    }
}

/// Why a convolution with this weight is no linear layer, or how it is one. Groups, strides and pads make it another
/// function of the pixels; a kernel of ones alone does not.
pub fn channels(node: &NodeProto, weight: &[usize]) -> Option<Form> {
    let [_, _, kernel @ ..] = weight else { return None };
    let all = |name: &str, value: i64| node.attr_ints(name).is_none_or(|list| list.iter().all(|v| *v == value));
    let is_plain = !kernel.is_empty()
        && kernel.iter().all(|k| *k == 1)
        && node.attr_i("group", 1) == 1
        && all("strides", 1)
        && all("pads", 0);
    is_plain.then_some(Form::Channels(kernel.len()))
}

impl Sum {
    /// The product that `equation` is, of x and a matrix of shape `dims` (its operand `matrix`), and whether the matrix
    /// is read `[out, in]`.
    ///
    /// # Errors
    /// Why it multiplies by a constant and is no linear layer all the same; `None`: it is something else.
    pub fn of(equation: &str, matrix: usize, dims: &[usize]) -> Result<(Self, bool), Option<String>> {
        let equation: String = equation.split_whitespace().collect();
        let (left, result) = equation.split_once("->").ok_or(None)?;
        let (first, second) = left.split_once(',').filter(|(_, rest)| !rest.contains(',')).ok_or(None)?;
        let (w, x) = if matrix == 0 { (first, second) } else { (second, first) };
        let is_twice = |term: &str| term.chars().any(|c| c != '.' && term.matches(c).count() > 1);
        if w.contains('.') || w.chars().count() != dims.len() || [w, x, result].into_iter().any(is_twice) {
            return Err(None);
        }
        if let Some(label) = w.chars().find(|c| x.contains(*c) && result.contains(*c)) {
            return Err(Some(format!("has a matrix for each {label} ({equation}), and only one matrix is adapted")));
        }
        if w.chars().any(|c| !x.contains(c) && !result.contains(c)) {
            return Err(None);
        }
        let labels: Vec<(char, usize)> = w.chars().zip(dims.iter().copied()).collect();
        let (summed, kept): (Vec<_>, Vec<_>) = labels.iter().partition(|(label, _)| x.contains(*label));
        // What stays of x is in the result, and nothing else is.
        let rest = |term: &str, taken: &[(char, usize)]| {
            let mut rest: Vec<char> = term.chars().filter(|c| taken.iter().all(|l| l.0 != *c)).collect();
            rest.sort_unstable();
            rest
        };
        if summed.is_empty() || kept.is_empty() || rest(x, &summed) != rest(result, &kept) {
            return Err(None);
        }
        let out_in = labels.starts_with(&kept);
        if !out_in && !labels.starts_with(&summed) {
            return Err(Some(format!("takes inputs and outputs of its matrix in turns ({equation})")));
        }
        Ok((Self { x: x.into(), result: result.into(), summed, kept }, out_in))
    }

    /// A label that the equation does not use.
    pub fn free_label(&self) -> Option<char> {
        let used = |c: &char| self.x.contains(*c) || self.result.contains(*c);
        ('a'..='z').chain('A'..='Z').find(|c| !used(c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(equation: &str, matrix: usize, dims: &[usize]) -> Result<(Sum, bool), Option<String>> {
        Sum::of(equation, matrix, dims)
    }

    #[test]
    fn an_einsum_is_a_linear_layer_where_a_matrix_is() {
        let (dense, out_in) = sum("bsd, df -> bsf", 1, &[3, 4]).unwrap();
        assert_eq!((dense.summed, dense.kept, out_in), (vec![('d', 3)], vec![('f', 4)], false));
        let (heads, out_in) = sum("...d,dhe->...he", 1, &[6, 2, 3]).unwrap();
        assert_eq!((heads.kept.clone(), out_in, heads.free_label()), (vec![('h', 2), ('e', 3)], false, Some('a')));
        assert_eq!(Form::Sum(heads).shape(6, 6, false), Some(vec![6, 2, 3]));
        let (left, out_in) = sum("of,bsf->bso", 0, &[5, 6]).unwrap();
        assert_eq!((left.x.as_str(), left.result.as_str(), out_in), ("bsf", "bso", true));
        let (merged, _) = sum("bhse,hef->bsf", 1, &[2, 4, 6]).unwrap();
        assert_eq!(merged.summed, [('h', 2), ('e', 4)]);
    }

    #[test]
    fn other_einsums_are_none() {
        assert!(sum("bhse,hef->bhsf", 1, &[2, 4, 4]).unwrap_err().unwrap().contains("a matrix for each h"));
        assert!(sum("bde,dfe->bf", 1, &[2, 3, 4]).unwrap_err().unwrap().contains("in turns"));
        for (equation, dims) in [
            ("bd,df", &[3, 4][..]),    // no result
            ("bd,df->b", &[3, 4]),     // what stays is summed, too
            ("bd,d->b", &[3]),         // no output
            ("bd,f->bdf", &[4]),       // nothing is summed
            ("bdd,df->bf", &[3, 4]),   // a diagonal
            ("bd,df,g->bfg", &[3, 4]), // three operands
            ("bcd,df->bf", &[3, 4]),   // a sum over c beside
            ("bd,df->bf", &[3, 4, 5]), // another shape
            ("b...d,...df->b...f", &[3, 4]),
        ] {
            assert_eq!(sum(equation, 1, dims), Err(None), "{equation}");
        }
    }

    #[test]
    fn a_convolution_is_one_where_its_kernel_is_of_ones() {
        use crate::onnx::{AttributeProto, node};
        let conv =
            |attributes: Vec<AttributeProto>| NodeProto { attribute: attributes, ..node("Conv", &["x", "w"], &["y"]) };
        let plain = conv(vec![AttributeProto::ints("strides", &[1, 1]), AttributeProto::ints("pads", &[0; 4])]);
        assert_eq!(channels(&plain, &[8, 4, 1, 1]), Some(Form::Channels(2)));
        assert_eq!(channels(&plain, &[8, 4, 1]), Some(Form::Channels(1)));
        assert_eq!(channels(&plain, &[8, 4, 3, 1]), None);
        assert_eq!(channels(&plain, &[8, 4]), None);
        assert_eq!(channels(&conv(vec![AttributeProto::int("group", 2)]), &[8, 4, 1]), None);
        assert_eq!(channels(&conv(vec![AttributeProto::ints("strides", &[2])]), &[8, 4, 1]), None);
        assert_eq!(channels(&conv(vec![AttributeProto::ints("pads", &[0, 1])]), &[8, 4, 1]), None);
        assert_eq!(Form::Channels(2).shape(4, 8, true), Some(vec![8, 4, 1, 1]));
    }
}
