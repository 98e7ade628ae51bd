//! Einsum: the adjoint of an operand is the Einsum of dy and the other operands to that operand's labels. Labels that
//! only it has are spread over, and one that it repeats (a diagonal) is put on the diagonal of zeros.

use super::{Adjoints, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;
use crate::onnx::shape::Dim;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Einsum", einsum);
}

fn einsum(v: &Vjp) -> Result<Adjoints> {
    let (terms, result) = labels(v)?;
    let dy = v.dy()?;
    let inputs = (0..terms.len()).map(|i| v.x(i)).collect::<Result<Vec<_>>>()?;
    // Sizes of a label agree, but those of an ellipsis broadcast.
    let named = v.node.attr_s("equation").unwrap_or("");
    let dim = |label: char| {
        let dims = inputs.iter().zip(&terms).filter_map(|(x, term)| {
            let at = term.iter().position(|l| *l == label)?;
            v.dims(x)?.get(at).copied()
        });
        let mut dims: Vec<Dim> = dims.collect();
        if !named.contains(label) {
            dims.sort_by_key(|d| *d == Dim::Known(1));
            let rest = dims.iter().filter(|d| **d != Dim::Known(1));
            if rest.clone().any(|d| Some(d) != dims.first()) {
                return None;
            }
        }
        dims.first().copied()
    };
    let mut adjoints = Vec::new();
    for (i, own) in terms.iter().enumerate() {
        if !v.wants(i) {
            adjoints.push(None);
            continue;
        }
        let (mut parts, mut values) = (vec![text(&result)], vec![dy]);
        for (k, term) in terms.iter().enumerate().filter(|(k, _)| *k != i) {
            parts.push(text(term));
            values.push(inputs[k]);
        }
        let reached = |label: &char| parts.iter().any(|part| part.contains(*label));
        // Labels that dy or another operand has, each once, in this operand's order.
        let mut found: Vec<char> = Vec::new();
        for label in own.iter().filter(|l| reached(l)) {
            if !found.contains(label) {
                found.push(*label);
            }
        }
        let g = match (values.as_slice(), found == result) {
            ([dy], true) => dy.to_string(),
            _ => {
                let equation = format!("{}->{}", parts.join(","), text(&found));
                v.op("Einsum", &values, vec![AttributeProto::string("equation", &equation)])
            }
        };
        adjoints.push(Some(spread(v, inputs[i], own, g, &found, &dim)));
    }
    Ok(adjoints)
}

/// `g`, which has the labels `found`, in the shape of `x`, which has the labels `own`.
fn spread(v: &Vjp, x: &str, own: &[char], g: String, found: &[char], dim: &impl Fn(char) -> Option<Dim>) -> String {
    if own == found {
        let from: Option<Vec<Dim>> = own.iter().map(|label| dim(*label)).collect();
        return v.unbroadcast(g, from.as_deref(), x);
    }
    let first = |i: usize| own.iter().position(|label| *label == own[i]) == Some(i);
    let new: Vec<i64> = (0..own.len()).filter(|i| !first(*i) || !found.contains(&own[*i])).map(|i| i as i64).collect();
    let mut g = v.expand_like(v.unsqueeze(g, v.ints(&new)), x);
    for i in (0..own.len()).filter(|i| !first(*i)) {
        let at = own.iter().position(|label| *label == own[i]).unwrap_or(i);
        let n = v.dim_of(x, i);
        let square = v.expand(v.c(0.0), v.concat(&[n.clone(), n.clone()], 0));
        let mut shape = vec![v.ints(&[1]); own.len()];
        (shape[at], shape[i]) = (n.clone(), n);
        g = v.mul(g, v.reshape(v.op("EyeLike", &[&square], vec![]), v.join(&shape)));
    }
    g
}

fn text(labels: &[char]) -> String {
    labels.iter().collect()
}

/// Labels of the operands and of the result. The axes of an ellipsis get labels of their own.
fn labels(v: &Vjp) -> Result<(Vec<Vec<char>>, Vec<char>)> {
    let equation: String = v.node.attr_s("equation").unwrap_or("").split_whitespace().collect();
    let (left, right) = match equation.split_once("->") {
        Some((left, right)) => (left, Some(right)),
        None => (equation.as_str(), None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != v.node.input.len() {
        return Err(v.error("its equation does not fit its inputs"));
    }
    let free: Vec<char> = ('a'..='z').chain('A'..='Z').filter(|label| !equation.contains(*label)).collect();
    let mut widest = 0;
    let mut widths = Vec::new();
    for (i, term) in terms.iter().enumerate() {
        let named = term.chars().filter(|c| *c != '.').count();
        let width = match term.contains("...") {
            true => v.rank(v.x(i)?)?.checked_sub(named),
            false => Some(0),
        };
        let width =
            width.filter(|w| *w <= free.len()).ok_or_else(|| v.error("its equation does not fit its inputs"))?;
        widest = widest.max(width);
        widths.push(width);
    }
    // An ellipsis counts from the back.
    let expand = |term: &str, width: usize| -> Vec<char> {
        let ellipsis: String = free[widest - width..widest].iter().collect();
        term.replacen("...", &ellipsis, 1).chars().collect()
    };
    let expanded: Vec<Vec<char>> = terms.iter().zip(&widths).map(|(term, width)| expand(term, *width)).collect();
    let result = match right {
        Some(right) => expand(right, widest),
        None => {
            // What the ellipsis stands for, then every label that occurs once, in alphabetical order.
            let all: Vec<char> = terms.iter().flat_map(|t| t.chars()).filter(|c| *c != '.').collect();
            let mut once: Vec<char> =
                all.iter().copied().filter(|c| all.iter().filter(|d| *d == c).count() == 1).collect();
            once.sort_unstable();
            [free[..widest].to_vec(), once].concat()
        }
    };
    Ok((expanded, result))
}
