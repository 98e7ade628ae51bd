//! Layers that are several modules in one: queries, keys and values of one product, cut apart again behind it. Each
//! part can be adapted by the name it has where it is a layer of its own.

use std::collections::BTreeMap;

use super::bias::BETWEEN;
use super::constant::{ints, trace};
use super::linears::Linear;
use super::values::{Reader, Values};
use crate::onnx::NodeProto;
use crate::{Error, Result};

/// The outputs of a packed layer that are one of its modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Parameter path of the packed layer.
    pub of: String,
    /// Its first output there; it has as many as the part's `out_features`.
    pub start: usize,
}

const QKV: &[&str] = &["q_proj", "k_proj", "v_proj"];

/// Last segments of packed modules, and what their parts are called elsewhere.
const PACKED: [(&str, &[&str]); 6] = [
    ("qkv_proj", QKV),
    ("query_key_value", &["query", "key", "value"]),
    ("qkv", QKV),
    ("Wqkv", QKV),
    ("in_proj_qkv", QKV),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
];

/// The parts of every packed layer among `linears`, each of which counts as a layer. Where neither the graph says how the
/// outputs are cut nor `sizes`, by the parts' names, the parts cannot be adapted, and say why.
pub fn parts(values: &Values, linears: &[Linear], sizes: &BTreeMap<String, usize>) -> Vec<Linear> {
    let mut parts = Vec::new();
    for linear in linears {
        let Some(module) = &linear.module else { continue };
        let (front, last) = module.rsplit_once('.').map_or(("", module.as_str()), |(front, last)| (front, last));
        let Some((_, names)) = PACKED.iter().find(|(packed, _)| *packed == last) else { continue };
        let cuts = cuts(values, linear, names.len()).or_else(|| given(names, sizes, linear.out_features));
        for (i, name) in names.iter().enumerate() {
            let path = if front.is_empty() { name.to_string() } else { format!("{front}.{name}") };
            if linears.iter().any(|l| l.path == path) {
                break;
            }
            let mut part = linear.clone();
            let (start, end) = match &cuts {
                Some(cuts) => (cuts[i], cuts[i + 1]),
                None => (0, linear.out_features),
            };
            if cuts.is_none() && part.adaptable.is_ok() {
                part.adaptable = Err(format!(
                    "it is a part of {module}, and the graph does not say which of its {} outputs: there is no Split \
                     or Slice of the last axis behind it. Name {last} to adapt it as a whole, or say how many each \
                     part has, if they follow one another: --packed-sizes {}",
                    linear.out_features,
                    names.iter().map(|name| format!("{name}=…")).collect::<Vec<_>>().join(",")
                ));
            }
            part.part = Some(Part { of: linear.path.clone(), start });
            (part.path, part.module) = (path.clone(), Some(path));
            part.out_features = end - start;
            part.bias = None;
            parts.push(part);
        }
    }
    parts
}

/// Where the outputs of `linear` are cut into `count` parts: `count + 1` numbers from 0 to the end.
fn cuts(values: &Values, linear: &Linear, count: usize) -> Option<Vec<usize>> {
    let mut graph = values.graphs.iter().position(|view| view.scope == linear.scope)?;
    let mut node = linear.beside.exit;
    for _ in 0..=BETWEEN.len() {
        let (value, _) = values.lookup(graph, values.node(graph, node)?.output_at(0)?)?;
        let mut readers = Vec::new();
        for reader in values.readers(value) {
            let Reader::Node { graph, node, input } = *reader else { return None };
            // Shapes are read off on the side.
            if !values.node(graph, node)?.is("Shape") {
                readers.push((graph, node, input));
            }
        }
        if let [(at, n, input)] = readers.as_slice() {
            let next = values.node(*at, *n)?;
            let is_bias = || {
                let other = next.input_at(1usize.checked_sub(*input)?)?;
                (trace(values, *at, other)?.dims == [linear.out_features]).then_some(())
            };
            let passes = next.is("Identity")
                || (BETWEEN.contains(&next.op_type()) && next.op_type() != "Mul")
                || (next.is("Add") && is_bias().is_some());
            if passes {
                (graph, node) = (*at, *n);
                continue;
            }
            return sizes(values, *at, next, linear.out_features, count).map(|sizes| ends(&sizes));
        }
        return slices(values, &readers, linear.out_features, count);
    }
    None
}

/// Sizes that are given for all the parts, and make up the layer.
fn given(names: &[&str], sizes: &BTreeMap<String, usize>, outputs: usize) -> Option<Vec<usize>> {
    let sizes: Vec<usize> = names.iter().map(|name| sizes.get(*name).copied()).collect::<Option<_>>()?;
    let total = sizes.iter().try_fold(0usize, |sum, n| sum.checked_add(*n))?;
    (total == outputs && sizes.iter().all(|n| *n > 0)).then(|| ends(&sizes))
}

/// Checks that sizes which a config gives are those of parts that `linears` have.
///
/// # Errors
/// The first that is not, and what packed layers there are.
pub fn check_sizes(linears: &[Linear], sizes: &BTreeMap<String, usize>) -> Result<()> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let is_there = |name: &str, size: usize| {
        linears.iter().any(|l| l.part.is_some() && l.out_features == size && last(&l.path) == *name)
    };
    let Some((name, size)) = sizes.iter().find(|(name, size)| !is_there(name, **size)) else { return Ok(()) };
    let packed = linears.iter().filter(|l| PACKED.iter().any(|(packed, _)| *packed == last(&l.path)));
    let mut there: Vec<String> = packed
        .map(|l| {
            let of = linears.iter().filter(|part| part.part.as_ref().is_some_and(|p| p.of == l.path));
            let parts: Vec<String> = of.map(|part| last(&part.path)).collect();
            format!("{} ({}) with {} outputs", last(&l.path), parts.join(", "), l.out_features)
        })
        .collect();
    there.sort_unstable();
    there.dedup();
    Err(Error::config(format!(
        "packed_sizes: {name} = {size} fits no packed layer of this model; the sizes of all its parts are given, and make up \
         its outputs. There is {}",
        if there.is_empty() { "none".into() } else { there.join("; ") }
    )))
}

/// How one node cuts its input.
fn sizes(values: &Values, graph: usize, node: &NodeProto, outputs: usize, count: usize) -> Option<Vec<usize>> {
    let sizes: Vec<usize> = if node.is("Split") {
        if !is_last(node.attr_i("axis", 0)) || node.output.len() != count {
            return None;
        }
        match (node.attr_ints("split"), node.input_at(1)) {
            (Some(sizes), _) => sizes.iter().map(|n| usize::try_from(*n).ok()).collect::<Option<_>>()?,
            (None, Some(sizes)) => {
                ints(values, graph, sizes)?.iter().map(|n| usize::try_from(*n).ok()).collect::<Option<_>>()?
            }
            (None, None) => {
                let size = outputs.div_ceil(count);
                let rest = outputs.checked_sub(size * (count - 1))?;
                [vec![size; count - 1], vec![rest]].concat()
            }
        }
    } else if node.op_type() == "GroupQueryAttention" && node.input_at(1).is_none() && count == 3 {
        let [heads, kv] = ["num_heads", "kv_num_heads"].map(|name| usize::try_from(node.attr_i(name, 0)).ok());
        let (heads, kv) = (heads?, kv?);
        let all = heads.checked_add(kv.checked_mul(2)?).filter(|all| *all > 0 && outputs.is_multiple_of(*all))?;
        vec![outputs / all * heads, outputs / all * kv, outputs / all * kv]
    } else {
        return None;
    };
    (sizes.len() == count && sizes.iter().all(|n| *n > 0) && sizes.iter().sum::<usize>() == outputs).then_some(sizes)
}

fn ends(sizes: &[usize]) -> Vec<usize> {
    let mut at = 0;
    let ends = sizes.iter().map(|n| {
        at += n;
        at
    });
    std::iter::once(0).chain(ends).collect()
}

/// Where Slices of the last axis cut it, without a gap.
fn slices(values: &Values, readers: &[(usize, usize, usize)], outputs: usize, count: usize) -> Option<Vec<usize>> {
    let mut ranges = Vec::new();
    for (graph, node, _) in readers {
        let node = values.node(*graph, *node).filter(|n| n.is("Slice"))?;
        let one = |input: usize, attribute: &str| match node.input_at(input) {
            Some(name) => ints(values, *graph, name).filter(|v| v.len() == 1).map(|v| v[0]),
            None => node.attr_ints(attribute).filter(|v| v.len() == 1).map(|v| v[0]),
        };
        if !is_last(one(3, "axes")?) || node.input_at(4).is_some_and(|_| one(4, "") != Some(1)) {
            return None;
        }
        let place = |at: i64| match usize::try_from(at) {
            Ok(at) => Some(at.min(outputs)),
            Err(_) => outputs.checked_sub(usize::try_from(at.unsigned_abs()).ok()?),
        };
        ranges.push((place(one(1, "starts")?)?, place(one(2, "ends")?)?));
    }
    ranges.sort_unstable();
    ranges.dedup();
    let mut cuts = vec![0];
    for (start, end) in ranges {
        if cuts.last() != Some(&start) || end <= start {
            return None;
        }
        cuts.push(end);
    }
    (cuts.len() == count + 1 && cuts.last() == Some(&outputs)).then_some(cuts)
}

/// True for an axis that is the last one of what a layer gives: from the back, or behind batch and sequence.
fn is_last(axis: i64) -> bool {
    axis == -1 || axis == 2
}
