//! Attention: softmax(cap(Q·Kᵀ·scale) + mask)·V. The scores and their softmax are computed again from Q and K, as flash
//! attention does. Definitions: ONNX's `Attention` (operator set 23), ONNX Runtime's `ContribOperators.md`.

use super::rotary::{counting, rotate};
use super::{MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Attention", |v| v.through(attention));
    rules.insert(MICROSOFT, "MultiHeadAttention", Rule::vjp(|v| v.through(multi_head)));
    rules.insert(MICROSOFT, "GroupQueryAttention", Rule::vjp(|v| v.through(group_query)));
}

fn permuted(v: &Vjp, x: &str, perm: &[i64]) -> String {
    v.op("Transpose", &[x], vec![AttributeProto::ints("perm", perm)])
}

/// [batch, length, heads·size] as [batch, heads, length, size].
fn split_heads(v: &Vjp, x: &str, heads: i64) -> String {
    permuted(v, &v.respec(x, &[0, 0, heads, -1]), &[0, 2, 1, 3])
}

fn join_heads(v: &Vjp, x: &str) -> String {
    v.respec(&permuted(v, x, &[0, 2, 1, 3]), &[0, 0, -1])
}

/// Past keys or values before the present ones.
fn after(v: &Vjp, past: Option<&str>, x: String) -> String {
    past.map_or(x.clone(), |past| v.concat(&[past.to_string(), x], 2))
}

/// Scores of [batch, heads, length, total]; heads of Q may share those of K.
fn scores(v: &Vjp, q: &str, k: &str, shared: bool, default_scale: f32) -> String {
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

fn capped(v: &Vjp, scores: String) -> String {
    match f64::from(v.node.attr_f("softcap", 0.0)) {
        cap if cap > 0.0 => v.mul(v.tanh(v.mul(scores, v.c(1.0 / cap))), v.c(cap)),
        _ => scores,
    }
}

fn softmax(v: &Vjp, scores: &str) -> String {
    v.op("Softmax", &[scores], vec![AttributeProto::int("axis", -1)])
}

/// Weights times values.
fn mixed(v: &Vjp, weights: &str, values: &str, q: &str, shared: bool) -> String {
    if !shared {
        return v.matmul(weights, values);
    }
    let spec = v.concat(&[v.ints(&[0]), v.size_of(values, 1), v.ints(&[-1]), v.size_of(values, 2)], 0);
    let rows = v.matmul(v.op("Reshape", &[weights, &spec], vec![]), values);
    let spec = v.concat(&[v.ints(&[0]), v.size_of(q, 1), v.size_of(q, 2), v.size_of(values, 3)], 0);
    v.op("Reshape", &[&rows, &spec], vec![])
}

/// `scores` where `allowed`, so low elsewhere that nothing is left of them.
fn masked(v: &Vjp, allowed: String, scores: String) -> String {
    let low = if v.element() == Some(DataType::Float16) { -65504.0 } else { -1e30 };
    v.select(allowed, scores, v.c(low))
}

/// Which keys each query sees that sees none behind it: [length, total], the past ones first.
fn causal(v: &Vjp, q: &str, k: &str, past: Option<&str>) -> String {
    let first = past.map_or(v.ints(&[0]), |past| v.size_of(past, 2));
    let rows = v.unsqueeze(v.add(counting(v, &v.size_of(q, 2)), first), v.ints(&[1]));
    v.less_or_equal(counting(v, &v.size_of(k, 2)), rows)
}

/// Q, K, V, mask, past key, past value, number of keys that are none of padding.
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
    let mut all = soft.clone();
    if let Some(mask) = v.node.input_at(3) {
        // A mask that is too short hides the keys that it does not reach.
        let rank = v.rank(mask)?;
        if rank < 2 {
            return Err(v.error("its mask has to be a matrix or more"));
        }
        let missing = v.sub(v.size_of(&keys, 2), v.size_of(mask, rank - 1));
        let widths = v.concat(&[v.ints(&vec![0; 2 * rank - 1]), missing], 0);
        let fits = v.dims(mask).and_then(|d| d.last()) == v.dims(k).and_then(|d| d.get(d.len() - 2)) && past.is_none();
        let truth = v.shapes.element(mask) == Some(DataType::Bool);
        let padded = match (fits, truth) {
            (true, _) => mask.to_string(),
            (false, true) => {
                let whole = v.op("Pad", &[&v.cast(mask, DataType::Int32), &widths], vec![]);
                v.cast(whole, DataType::Bool)
            }
            (false, false) => v.op("Pad", &[mask, &widths, &v.c(-1e30)], vec![]),
        };
        all = if truth { masked(v, padded, all) } else { v.add(all, padded) };
    }
    if v.node.attr_i("is_causal", 0) != 0 {
        if v.node.input_at(6).is_some() {
            return Err(v.error("is_causal together with nonpad_kv_seqlen is not supported"));
        }
        all = masked(v, causal(v, &q, &keys, past), all);
    }
    if let Some(lengths) = v.node.input_at(6) {
        let allowed = v.less(counting(v, &v.size_of(&keys, 2)), v.respec(lengths, &[-1, 1, 1, 1]));
        all = masked(v, allowed, all);
    }
    let precise = v.node.attr_i("softmax_precision", 0);
    let weights = match (DataType::try_from(precise as i32), v.element()) {
        (Ok(wide), Some(element)) if precise != 0 && wide != element => {
            v.cast(softmax(v, &v.cast(&all, wide)), element)
        }
        _ => softmax(v, &all),
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

/// Query, key, value, bias, key padding mask, attention bias, past key, past value.
fn multi_head(v: &Vjp) -> Result<Vec<Option<String>>> {
    let q = v.x(0)?;
    let heads = v.node.attr_i("num_heads", 1);
    let (Some(k), Some(value), 3) = (v.node.input_at(1), v.node.input_at(2), v.rank(q)?) else {
        return Err(v.error("packed queries, keys and values are not supported"));
    };
    if v.node.input_at(8).is_some() || v.node.input_at(9).is_some() {
        return Err(v.error("a shared buffer of past keys is not supported"));
    }
    let mut parts = [q, k, value].map(String::from);
    if let Some(bias) = v.node.input_at(3) {
        let width = |x: &str| v.size_of(x, 2);
        if v.rank(k)? != 3 {
            return Err(v.error("a bias is supported for keys of rank 3 only"));
        }
        let sizes = v.concat(&[width(q), width(k), width(value)], 0);
        let biases = v.node("", "Split", &[bias, &sizes], vec![AttributeProto::int("axis", 0)], 3);
        parts.iter_mut().zip(biases).for_each(|(part, bias)| *part = v.add(&*part, bias));
    }
    let split = |x: &str, of: &str| -> Result<String> {
        Ok(if v.rank(of)? == 4 { x.to_string() } else { split_heads(v, x, heads) })
    };
    let past = v.node.input_at(6);
    let q = split(&parts[0], q)?;
    let keys = after(v, past, split(&parts[1], k)?);
    let values = after(v, v.node.input_at(7), split(&parts[2], value)?);
    let mut all = scores(v, &q, &keys, false, 0.0);
    if let Some(bias) = v.node.input_at(5) {
        all = v.add(all, bias);
    }
    if let Some(mask) = v.node.input_at(4) {
        let axes: &[i64] = match v.rank(mask)? {
            2 => &[1, 2],
            3 => &[1],
            _ => return Err(v.error("a key padding mask of rank 1 is not supported; give one of [batch, total]")),
        };
        let filter = v.c(f64::from(v.node.attr_f("mask_filter_value", -10000.0)));
        let seen = v.cast(v.unsqueeze(mask, v.ints(axes)), DataType::Bool);
        all = v.add(all, v.select(seen, v.c(0.0), filter));
    }
    if v.node.attr_i("unidirectional", 0) != 0 {
        all = masked(v, causal(v, &q, &keys, past), all);
    }
    let y = mixed(v, &softmax(v, &all), &values, &q, false);
    Ok(vec![Some(join_heads(v, &y)), Some(keys), Some(values)])
}

/// Query (or all three packed), key, value, past key, past value, index of each sample's last token, total length,
/// tables of cos and sin, positions. A token sees the past ones of its sample (the first of its buffer) and those of
/// its own block before it.
fn group_query(v: &Vjp) -> Result<Vec<Option<String>>> {
    let query = v.x(0)?;
    let (heads, kv) = (v.node.attr_i("num_heads", 1), v.node.attr_i("kv_num_heads", 1));
    for (i, what) in [(10, "attention_bias"), (11, "head_sink"), (12, "k_scale"), (13, "v_scale")] {
        if v.node.input_at(i).is_some() {
            return Err(v.error(format!("its input {what} is not supported")));
        }
    }
    if v.node.input_at(3).is_some() {
        return Err(v.error("past keys and values are not supported; train with the graph that has none"));
    }
    if v.node.attr_i("smooth_softmax", 0) == 1 || v.node.attr_i("qk_output", 0) != 0 {
        return Err(v.error("smooth_softmax and qk_output are not supported"));
    }
    let parts = match (v.node.input_at(1), v.node.input_at(2)) {
        (Some(k), Some(value)) => [(query, heads), (k, kv), (value, kv)].map(|(x, n)| v.respec(x, &[0, 0, n, -1])),
        _ => {
            let all = v.respec(query, &[0, 0, heads + 2 * kv, -1]);
            let axis = vec![AttributeProto::int("axis", 2)];
            let parts = v.node("", "Split", &[&all, &v.ints(&[heads, kv, kv])], axis, 3);
            [parts[0].clone(), parts[1].clone(), parts[2].clone()]
        }
    };
    let [mut q, mut k, value] = parts;
    // Tokens before this block: none where the block is all there is.
    let length = v.size_of(query, 1);
    let total = v.cast(v.respec(v.x(6)?, &[1]), DataType::Int64);
    let last = v.cast(v.respec(v.x(5)?, &[-1, 1]), DataType::Int64);
    let before = v.sub(v.add(last, v.ints(&[1])), &length);
    let before = v.select(v.equal(total, &length), v.ints(&[0]), before);
    let places = v.add(&before, counting(v, &length));
    if v.node.attr_i("do_rotary", 0) != 0 {
        let at = v.node.input_at(9).unwrap_or(&places);
        let table =
            |i: usize| -> Result<String> { Ok(v.unsqueeze(v.op("Gather", &[v.x(i)?, at], vec![]), v.ints(&[2]))) };
        let (cos, sin) = (table(7)?, table(8)?);
        let interleaved = v.node.attr_i("rotary_interleaved", 0) != 0;
        q = rotate(v, &q, &cos, &sin, interleaved, true);
        k = rotate(v, &k, &cos, &sin, interleaved, true);
    }
    let [q, k, value] = [q, k, value].map(|x| permuted(v, &x, &[0, 2, 1, 3]));
    let (past, shared) = (v.node.input_at(3), heads != kv);
    let keys = after(v, past, k);
    let values = after(v, v.node.input_at(4), value);
    let mut at = v.unsqueeze(&places, v.ints(&[1, 2]));
    let rows = v.unsqueeze(&places, v.ints(&[1, 3]));
    if let Some(past) = past {
        let buffer = v.unsqueeze(counting(v, &v.size_of(past, 2)), v.ints(&[0]));
        let filled = v.less(&buffer, &before);
        // What the buffer holds beyond the past lies behind every query.
        let far = v.select(filled, &buffer, v.ints(&[i64::from(i32::MAX)]));
        at = v.unsqueeze(v.concat(&[far, places.clone()], 1), v.ints(&[1, 2]));
    }
    let mut allowed = v.less_or_equal(&at, &rows);
    let window = v.node.attr_i("local_window_size", -1);
    if window > 0 {
        allowed = v.and(allowed, v.less(v.sub(rows, at), v.ints(&[window])));
    }
    let all = masked(v, allowed, capped(v, scores(v, &q, &keys, shared, 0.0)));
    let y = mixed(v, &softmax(v, &all), &values, &q, shared);
    // With a past, where a key lies in the buffer depends on the sample: its adjoint is not given.
    Ok(vec![Some(join_heads(v, &y)), past.is_none().then_some(keys), past.is_none().then_some(values)])
}
