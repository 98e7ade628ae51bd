//! `GroupQueryAttention` of ONNX Runtime's domain, as its CPU kernel runs it (`ContribOperators.md`): heads of Q share
//! those of K, tokens see the ones before them, keys and values are kept in a buffer.

use super::attention::{capped, hiding, join_heads, mixed, permuted, scores, softmax};
use super::rotary::{counting, rotate};
use super::{MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.insert(MICROSOFT, "GroupQueryAttention", Rule::vjp(|v| v.through(group_query)));
}

/// Query (or all three packed), key, value, buffers of past keys and values, index of each sample's last token, total
/// length, tables of cos and sin, positions, scores' bias, sinks. Outputs: the result, the buffers filled, the scores.
fn group_query(v: &Vjp) -> Result<Vec<Option<String>>> {
    let query = v.x(0)?;
    let (heads, kv) = (v.node.attr_i("num_heads", 1), v.node.attr_i("kv_num_heads", 1));
    for (i, what) in [(12, "k_scale"), (13, "v_scale"), (14, "q_norm_weight"), (15, "k_norm_weight")] {
        if v.node.input_at(i).is_some() {
            return Err(v.error(format!("its input {what} is not supported")));
        }
    }
    if v.node.attr_i("sliding_window_cache", 0) != 0 {
        return Err(v.error("sliding_window_cache is not supported"));
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
    let block = Block::new(v, query)?;
    if v.node.attr_i("do_rotary", 0) != 0 {
        let at = block.positions(v.node.input_at(9));
        let table =
            |i: usize| -> Result<String> { Ok(v.unsqueeze(v.op("Gather", &[v.x(i)?, &at], vec![]), v.ints(&[2]))) };
        let (cos, sin) = (table(7)?, table(8)?);
        let interleaved = v.node.attr_i("rotary_interleaved", 0) != 0;
        q = rotate(v, &q, &cos, &sin, interleaved, true);
        k = rotate(v, &k, &cos, &sin, interleaved, true);
    }
    let [q, k, value] = [q, k, value].map(|x| permuted(v, &x, &[0, 2, 1, 3]));
    let shared = heads != kv;
    let past = (v.node.input_at(3), v.node.input_at(4));
    let (keys, values) = (block.filled(past.0, k), block.filled(past.1, value));
    // The buffers may be longer than what is in them.
    let used = |x: &String| match past.0 {
        Some(_) => v.op("Slice", &[x, &v.ints(&[0]), &block.total, &v.ints(&[2])], vec![]),
        None => x.clone(),
    };
    let (seen_keys, seen_values) = (used(&keys), used(&values));

    let mut all = capped(v, scores(v, &q, &seen_keys, shared, 0.0));
    if let Some(bias) = v.node.input_at(10) {
        all = v.add(all, bias);
    }
    let allowed = block.allowed();
    let masked = v.add(&all, hiding(v, &allowed));
    let weights = match (v.node.input_at(11), v.node.attr_i("smooth_softmax", 0) == 1) {
        (None, false) => softmax(v, &masked),
        (sink, _) => with_sink(v, &masked, sink),
    };
    let y = mixed(v, &weights, &seen_values, &q, shared);
    let seen = match v.node.attr_i("qk_output", 0) {
        1 => v.select(allowed, all, v.c(0.0)),
        _ => weights,
    };
    Ok(vec![Some(join_heads(v, &y)), Some(keys), Some(values), Some(seen)])
}

/// Softmax with a score more for each head that no key has: its sink, or 0.
fn with_sink(v: &Vjp, scores: &str, sink: Option<&str>) -> String {
    let sizes: Vec<String> = (0..3).map(|axis| v.size_of(scores, axis)).chain([v.ints(&[1])]).collect();
    let sink = sink.map_or(v.c(0.0), |sink| v.respec(sink, &[1, -1, 1, 1]));
    let more = v.concat(&[scores.to_string(), v.expand(sink, v.concat(&sizes, 0))], -1);
    v.op("Slice", &[&softmax(v, &more), &v.ints(&[0]), &v.ints(&[-1]), &v.ints(&[-1])], vec![])
}

/// The tokens of this run: where they lie behind those of the past.
struct Block<'v, 'a> {
    v: &'v Vjp<'a>,
    /// Tokens in the block, and the most there are with those of the past: 1-D, of one element.
    length: String,
    total: String,
    /// Whether the block is all there is.
    first: String,
    /// Index of the last token, number of tokens before this block: [batch, 1].
    last: String,
    before: String,
    /// Index of each token of the block: [batch, length].
    places: String,
}

impl<'v, 'a> Block<'v, 'a> {
    fn new(v: &'v Vjp<'a>, query: &str) -> Result<Self> {
        let length = v.size_of(query, 1);
        let total = v.cast(v.respec(v.x(6)?, &[1]), DataType::Int64);
        let last = v.cast(v.respec(v.x(5)?, &[-1, 1]), DataType::Int64);
        let first = v.equal(&total, &length);
        let before = v.select(&first, v.ints(&[0]), v.sub(v.add(&last, v.ints(&[1])), &length));
        let places = v.add(&before, counting(v, &length));
        Ok(Self { v, length, total, first, last, before, places })
    }

    /// Where the tables of cos and sin are read. Of positions given, the first block takes the first alone and counts.
    fn positions(&self, given: Option<&str>) -> String {
        let v = self.v;
        let Some(given) = given else { return self.places.clone() };
        let zero = v.ints(&[0]);
        let start = v.op("Slice", &[&v.respec(given, &[-1]), &zero, &v.ints(&[1]), &zero], vec![]);
        let counted = v.unsqueeze(v.add(counting(v, &self.length), start), &zero);
        v.select(&self.first, counted, given)
    }

    /// The buffer `past` of [batch, heads, capacity, size] with `x` behind what was in it, and zeros to its end.
    fn filled(&self, past: Option<&str>, x: String) -> String {
        let v = self.v;
        let Some(past) = past else { return x };
        let held = v.size_of(past, 2);
        let capacity = v.op("Max", &[&held, &self.total], vec![]);
        let columns = v.unsqueeze(counting(v, &capacity), v.ints(&[0]));
        let used = v.less(&columns, v.add(&self.before, &self.length));
        // Index of each token in the old buffer and the block side by side.
        let fresh = v.add(v.sub(&columns, &self.before), held);
        let from = v.select(v.less(&columns, &self.before), &columns, fresh);
        let from = v.select(&used, from, v.ints(&[0]));
        let shape = v.concat(&[v.size_of(&x, 0), v.size_of(&x, 1), capacity, v.size_of(&x, 3)], 0);
        let across = |value: String| v.unsqueeze(value, v.ints(&[1, 3]));
        let both = v.concat(&[past.to_string(), x], 2);
        let index = v.expand(across(from), shape);
        let tokens = v.op("GatherElements", &[&both, &index], vec![AttributeProto::int("axis", 2)]);
        v.select(across(used), tokens, v.c(0.0))
    }

    /// Which tokens each one sees, [batch, 1, length, total]: those that there are, up to itself unless `causal` is 0, of
    /// them the last `local_window_size`.
    fn allowed(&self) -> String {
        let v = self.v;
        let columns = counting(v, &self.total);
        let rows = v.unsqueeze(&self.places, v.ints(&[1, 3]));
        let mut allowed = v.less_or_equal(&columns, v.unsqueeze(&self.last, v.ints(&[1, 2])));
        if v.node.attr_i("causal", 1) != 0 {
            allowed = v.and(allowed, v.less_or_equal(&columns, &rows));
        }
        let window = v.node.attr_i("local_window_size", -1);
        if window > 0 {
            allowed = v.and(allowed, v.less(v.sub(rows, columns), v.ints(&[window])));
        }
        allowed
    }
}
