//! Attention in ONNX Runtime's domain: `Attention` and `MultiHeadAttention` as its CPU kernels run them
//! (`ContribOperators.md`). Layouts that these refuse (queries, keys and values in one tensor) are refused here too.

use super::attention::{after, hiding, join_heads, mixed, places, scores, softmax, split_heads};
use super::rotary::counting;
use super::{MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::{AttributeProto, DataType};

pub(super) fn add(rules: &mut Rules) {
    rules.insert(MICROSOFT, "Attention", Rule::vjp(|v| v.through(attention)));
    rules.insert(MICROSOFT, "MultiHeadAttention", Rule::vjp(|v| v.through(multi_head)));
}

fn split(v: &Vjp, x: &str, sizes: &str, axis: i64) -> [String; 3] {
    let parts = v.node("", "Split", &[x, sizes], vec![AttributeProto::int("axis", axis)], 3);
    [parts[0].clone(), parts[1].clone(), parts[2].clone()]
}

/// Input, its weights and bias for Q, K and V side by side, mask, past keys and values in one, scores' bias. Outputs: the
/// result, and all keys and values in one.
fn attention(v: &Vjp) -> Result<Vec<Option<String>>> {
    if v.node.attr_i("do_rotary", 0) != 0 || v.node.attr_i("past_present_share_buffer", 0) != 0 {
        return Err(v.error("do_rotary and past_present_share_buffer are not supported"));
    }
    let (x, weights) = (v.x(0)?, v.x(1)?);
    let heads = v.node.attr_i("num_heads", 1);
    let product = v.matmul(x, weights);
    let product = v.node.input_at(2).map_or(product.clone(), |bias| v.add(&product, bias));
    let sizes = match v.node.attr_ints("qkv_hidden_sizes") {
        Some(sizes) if sizes.len() == 3 => v.ints(sizes),
        _ => {
            let third = v.div(v.size_of(weights, 1), v.ints(&[3]));
            v.concat(&[third.clone(), third.clone(), third], 0)
        }
    };
    let [q, k, value] = split(v, &product, &sizes, 2).map(|part| split_heads(v, &part, heads));
    let past = v.node.input_at(4).map(|past| {
        let halves = v.node("", "Split", &[past, &v.ints(&[1, 1])], vec![AttributeProto::int("axis", 0)], 2);
        halves.iter().map(|half| v.squeeze(half, v.ints(&[0]))).collect::<Vec<_>>()
    });
    let past = |i: usize| past.as_ref().and_then(|past| past.get(i)).map(String::as_str);
    let (keys, values) = (after(v, past(0), k), after(v, past(1), value));
    let masks = Masks { padding: v.node.input_at(3), bias: v.node.input_at(5), starts: true };
    let all = masks.added(v, scores(v, &q, &keys, false, 0.0), &q, &keys, past(0))?;
    let y = mixed(v, &softmax(v, &all), &values, &q, false);
    let present = v.concat(&[keys, values].map(|part| v.unsqueeze(part, v.ints(&[0]))), 0);
    Ok(vec![Some(join_heads(v, &y)), Some(present)])
}

/// Query, key, value, bias, key padding mask, scores' bias, past key, past value. Outputs: the result, all keys, all
/// values, the scores.
fn multi_head(v: &Vjp) -> Result<Vec<Option<String>>> {
    let q = v.x(0)?;
    let heads = v.node.attr_i("num_heads", 1);
    let (Some(k), Some(value), 3) = (v.node.input_at(1), v.node.input_at(2), v.rank(q)?) else {
        return Err(v.error("packed queries, keys and values are not supported"));
    };
    if v.node.input_at(8).is_some() || v.node.input_at(9).is_some() {
        return Err(v.error("a shared buffer of past keys is not supported"));
    }
    // Keys and values of rank 4 are those of another attention: heads already, without a bias.
    let ready = v.rank(k)? == 4;
    let mut parts = [q, k, value].map(String::from);
    if let Some(bias) = v.node.input_at(3) {
        let width = v.size_of(q, 2);
        let rest = v.sub(v.size_of(bias, 0), v.mul(&width, v.ints(&[2])));
        let biases = split(v, bias, &v.concat(&[width.clone(), width, rest], 0), 0);
        let biased = if ready { 1 } else { 3 };
        parts.iter_mut().zip(biases).take(biased).for_each(|(part, bias)| *part = v.add(&*part, bias));
    }
    let [q, k, value] = parts;
    let heads_of = |x: String| if ready { x } else { split_heads(v, &x, heads) };
    let past = v.node.input_at(6);
    let q = split_heads(v, &q, heads);
    let keys = after(v, past, heads_of(k));
    let values = after(v, v.node.input_at(7), heads_of(value));
    let masks = Masks { padding: v.node.input_at(4), bias: v.node.input_at(5), starts: false };
    let all = masks.added(v, scores(v, &q, &keys, false, 0.0), &q, &keys, past)?;
    let y = mixed(v, &softmax(v, &all), &values, &q, false);
    Ok(vec![Some(join_heads(v, &y)), Some(keys), Some(values), Some(all)])
}

/// What is added to the scores.
struct Masks<'a> {
    /// Which keys of each sample are none of padding: [batch] how many there are ([2·batch]: and how many before them
    /// are padding), [batch, total] or [batch, length, total] each.
    padding: Option<&'a str>,
    bias: Option<&'a str>,
    /// Whether a mask of rank 1 may also say where the keys start.
    starts: bool,
}

impl Masks<'_> {
    fn added(&self, v: &Vjp, scores: String, q: &str, keys: &str, past: Option<&str>) -> Result<String> {
        let mut all = scores;
        if let Some(bias) = self.bias {
            all = v.add(all, bias);
        }
        if let Some(mask) = self.padding {
            let seen = match v.rank(mask)? {
                1 => self.between(v, mask, &v.size_of(q, 0), keys),
                2 => v.unsqueeze(v.cast(mask, DataType::Bool), v.ints(&[1, 2])),
                3 => v.unsqueeze(v.cast(mask, DataType::Bool), v.ints(&[1])),
                _ => return Err(v.error("a mask of rank 4 is not supported; give one of [batch, total]")),
            };
            // A padding key is lowered, not hidden: in a row of padding alone the keys still differ.
            let filter = v.c(f64::from(v.node.attr_f("mask_filter_value", -10000.0)));
            all = v.add(all, v.select(seen, v.c(0.0), filter));
        }
        if v.node.attr_i("unidirectional", 0) != 0 {
            let allowed = v.less_or_equal(counting(v, &v.size_of(keys, 2)), places(v, q, past));
            all = v.add(all, hiding(v, &allowed));
        }
        Ok(all)
    }

    /// [batch, 1, 1, total]: the keys before each sample's end (and from its start on).
    fn between(&self, v: &Vjp, mask: &str, batch: &str, keys: &str) -> String {
        let zero = v.ints(&[0]);
        let mask = v.cast(mask, DataType::Int64);
        let part = |x: &str, from: &str, to: &str| {
            let part = v.op("Slice", &[x, from, to, &zero], vec![]);
            v.unsqueeze(part, v.ints(&[1, 2, 3]))
        };
        let columns = counting(v, &v.size_of(keys, 2));
        let seen = v.less(&columns, part(&mask, &zero, batch));
        if !self.starts {
            return seen;
        }
        // Where no starts are given, zeros.
        let longer = v.concat(&[mask, v.expand(&zero, batch)], 0);
        let starts = part(&longer, batch, &v.mul(batch, v.ints(&[2])));
        v.and(seen, v.less_or_equal(starts, columns))
    }
}
