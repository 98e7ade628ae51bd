//! Attention: softmax(cap(Q·Kᵀ·scale) + mask)·V. The scores and their softmax are computed again from Q and K, as flash
//! attention does. Here ONNX's `Attention` (operator sets 23 to 25) and what the forms of other domains share with it.

use super::rotary::counting;
use super::{Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Attention", |v| v.through(attention));
}

pub(super) fn permuted(v: &Vjp, x: &str, perm: &[i64]) -> String {
    v.op("Transpose", &[x], vec![AttributeProto::ints("perm", perm)])
}

/// [batch, length, heads·size] as [batch, heads, length, size].
pub(super) fn split_heads(v: &Vjp, x: &str, heads: i64) -> String {
    permuted(v, &v.respec(x, &[0, 0, heads, -1]), &[0, 2, 1, 3])
}

pub(super) fn join_heads(v: &Vjp, x: &str) -> String {
    v.respec(&permuted(v, x, &[0, 2, 1, 3]), &[0, 0, -1])
}

/// Past keys or values before the present ones.
pub(super) fn after(v: &Vjp, past: Option<&str>, x: String) -> String {
    past.map_or(x.clone(), |past| v.concat(&[past.to_string(), x], 2))
}

/// Scores of [batch, heads, length, total]; heads of Q may share those of K.
pub(super) fn scores(v: &Vjp, q: &str, k: &str, shared: bool, default_scale: f32) -> String {
    let scale = match v.node.attr_f("scale", default_scale) {
        0.0 => {
            let size = v.size_of(q, 3);
            v.reciprocal(v.sqrt(v.cast(size, v.element().unwrap_or(DataType::Float))))
        }
        scale => v.c(f64::from(scale)),
    };
    let keys = permuted(v, k, &[0, 1, 3, 2]);
    if !shared {
        return v.mul(v.matmul(q, keys), scale);
    }
    // The heads that share one are its further rows.
    let spec = v.concat(&[v.ints(&[0]), v.size_of(k, 1), v.ints(&[-1]), v.size_of(q, 3)], 0);
    let rows = v.matmul(v.op("Reshape", &[q, &spec], vec![]), keys);
    let spec = v.concat(&[v.ints(&[0]), v.size_of(q, 1), v.size_of(q, 2), v.size_of(k, 2)], 0);
    v.mul(v.op("Reshape", &[&rows, &spec], vec![]), scale)
}

pub(super) fn capped(v: &Vjp, scores: String) -> String {
    match f64::from(v.node.attr_f("softcap", 0.0)) {
        cap if cap > 0.0 => v.mul(v.tanh(v.mul(scores, v.c(1.0 / cap))), v.c(cap)),
        _ => scores,
    }
}

pub(super) fn softmax(v: &Vjp, scores: &str) -> String {
    v.op("Softmax", &[scores], vec![AttributeProto::int("axis", -1)])
}

/// Weights times values.
pub(super) fn mixed(v: &Vjp, weights: &str, values: &str, q: &str, shared: bool) -> String {
    if !shared {
        return v.matmul(weights, values);
    }
    let spec = v.concat(&[v.ints(&[0]), v.size_of(values, 1), v.ints(&[-1]), v.size_of(values, 2)], 0);
    let rows = v.matmul(v.op("Reshape", &[weights, &spec], vec![]), values);
    let spec = v.concat(&[v.ints(&[0]), v.size_of(q, 1), v.size_of(q, 2), v.size_of(values, 3)], 0);
    v.op("Reshape", &[&rows, &spec], vec![])
}

/// What to add to the scores so that nothing is left of them but where `allowed`.
pub(super) fn hiding(v: &Vjp, allowed: &str) -> String {
    v.select(allowed, v.c(0.0), v.c(f64::NEG_INFINITY))
}

/// Place of each query among the keys, those of the past before them: [length, 1].
pub(super) fn places(v: &Vjp, q: &str, past: Option<&str>) -> String {
    let first = past.map_or(v.ints(&[0]), |past| v.size_of(past, 2));
    v.unsqueeze(v.add(counting(v, &v.size_of(q, 2)), first), v.ints(&[1]))
}

/// Q, K, V, mask, past key, past value, number of keys that are none of padding. A query of which every key is hidden
/// gives zeros.
fn attention(v: &Vjp) -> Result<Vec<Option<String>>> {
    let (q, k, value) = (v.x(0)?, v.x(1)?, v.x(2)?);
    let flat = v.rank(q)? == 3;
    let (heads, kv) = (v.node.attr_i("q_num_heads", 0), v.node.attr_i("kv_num_heads", 0));
    let split = |x: &str, heads: i64| if flat { split_heads(v, x, heads) } else { x.to_string() };
    let shared = match flat {
        true => heads != kv,
        false => v.dims(q).and_then(|d| d.get(1)) != v.dims(k).and_then(|d| d.get(1)),
    };
    let q = split(q, heads);
    let past = v.node.input_at(4);
    let keys = after(v, past, split(k, kv));
    let values = after(v, v.node.input_at(5), split(value, kv));

    let raw = scores(v, &q, &keys, shared, 0.0);
    let soft = capped(v, raw.clone());
    let masks: Vec<String> = [mask(v, &keys)?, window(v, &q, &keys)?].into_iter().flatten().collect();
    let total = masks.into_iter().reduce(|a, b| v.add(a, b));
    // Causality alone leaves each query a key; other masks may leave it none.
    let some_left = total.as_ref().filter(|_| !only_causal(v)).map(|total| {
        let best = v.op("ReduceMax", &[total, &v.ints(&[-1])], vec![]);
        v.greater(best, lowest(v))
    });
    let all = match (total, &some_left) {
        (None, _) => soft.clone(),
        (Some(total), None) => v.add(&soft, total),
        (Some(total), Some(some_left)) => v.add(&soft, v.select(some_left, total, v.c(0.0))),
    };
    let precise = v.node.attr_i("softmax_precision", 0);
    let weights = match (DataType::try_from(precise as i32), v.element()) {
        (Ok(wide), Some(element)) if precise != 0 && wide != element => {
            v.cast(softmax(v, &v.cast(&all, wide)), element)
        }
        _ => softmax(v, &all),
    };
    let weights = match some_left {
        Some(some_left) => v.mul(weights, v.mask(some_left)),
        None => weights,
    };
    let y = mixed(v, &weights, &values, &q, shared);
    let y = if flat { join_heads(v, &y) } else { y };
    let seen = match v.node.attr_i("qk_matmul_output_mode", 0) {
        0 => raw,
        1 => soft,
        2 => all,
        _ => weights,
    };
    Ok(vec![Some(y), Some(keys), Some(values), Some(seen)])
}

/// A mask's number that hides a key as -∞ does.
fn lowest(v: &Vjp) -> String {
    v.c(match v.element() {
        Some(DataType::Float16) => -65504.0,
        Some(DataType::Double) => f64::MIN,
        _ => f64::from(f32::MIN),
    })
}

/// Input 3 as what is added to the scores; a mask that is too short hides the keys that it does not reach.
fn mask(v: &Vjp, keys: &str) -> Result<Option<String>> {
    let Some(mask) = v.node.input_at(3) else { return Ok(None) };
    let rank = v.rank(mask)?;
    let added = match v.shapes.element(mask) {
        Some(DataType::Bool) => hiding(v, mask),
        _ => mask.to_string(),
    };
    let k = v.x(1)?;
    let fits = v.node.input_at(4).is_none()
        && v.dims(mask).is_some_and(|m| m.last() == v.dims(k).and_then(|d| d.get(d.len().checked_sub(2)?)));
    if rank == 0 || fits {
        return Ok(Some(added));
    }
    let missing = v.sub(v.size_of(keys, 2), v.size_of(mask, rank - 1));
    let widths = v.concat(&[v.ints(&vec![0; 2 * rank - 1]), missing], 0);
    Ok(Some(v.op("Pad", &[&added, &widths, &v.c(f64::NEG_INFINITY)], vec![])))
}

fn only_causal(v: &Vjp) -> bool {
    let bounded = ["left_window_size", "right_window_size"].iter().any(|side| v.node.attr_i(side, -1) >= 0);
    !bounded && v.node.input_at(3).is_none() && v.node.input_at(6).is_none()
}

/// Which keys each query sees by its place among them: the place is that in its block, behind the past ones; or, where
/// input 6 says how many keys of each sample are none of padding, the queries are the last of these.
fn window(v: &Vjp, q: &str, keys: &str) -> Result<Option<String>> {
    let lengths = v.node.input_at(6).map(|lengths| v.respec(lengths, &[-1, 1, 1, 1]));
    let past = v.node.input_at(4);
    let at = match &lengths {
        Some(lengths) if past.is_none() => {
            let first = v.sub(lengths, v.size_of(q, 2));
            v.add(v.unsqueeze(counting(v, &v.size_of(q, 2)), v.ints(&[1])), first)
        }
        _ => places(v, q, past),
    };
    let columns = counting(v, &v.size_of(keys, 2));
    let side = |name: &str| Some(v.node.attr_i(name, -1)).filter(|size| *size >= 0).map(|size| v.ints(&[size]));
    let bounds = [
        lengths.as_ref().map(|lengths| v.less(&columns, lengths)),
        (v.node.attr_i("is_causal", 0) != 0).then(|| v.less_or_equal(&columns, &at)),
        side("left_window_size").map(|size| v.less_or_equal(v.sub(&at, size), &columns)),
        side("right_window_size").map(|size| v.less_or_equal(&columns, v.add(&at, size))),
    ];
    let allowed = bounds.into_iter().flatten().reduce(|a, b| v.and(a, b));
    Ok(allowed.map(|allowed| hiding(v, &allowed)))
}
