//! Rotary position embedding: each pair (a, b) of a head turns by its angle, (a·cos - b·sin, a·sin + b·cos).
//! Default domain since operator set 23; ONNX Runtime's own form in `ContribOperators.md`.

use super::{MICROSOFT, Rule, Rules, Vjp};
use crate::Result;
use crate::onnx::AttributeProto;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("RotaryEmbedding", |v| v.through(|v| Ok(vec![Some(rotary(v)?)])));
    rules.insert(MICROSOFT, "RotaryEmbedding", Rule::vjp(|v| v.through(|v| Ok(vec![Some(contrib(v)?)]))));
}

/// X, cos, sin, and where these are tables the position of each token.
fn rotary(v: &Vjp) -> Result<String> {
    let (x, cos, sin) = (v.x(0)?, v.x(1)?, v.x(2)?);
    let at = |table: &str| v.node.input_at(3).map_or(table.to_string(), |at| v.op("Gather", &[table, at], vec![]));
    turn(v, x, &at(cos), &at(sin))
}

/// X, positions ([1]: that of the first token; [batch, length]: each), tables of cos and sin.
fn contrib(v: &Vjp) -> Result<String> {
    let (x, at, cos, sin) = (v.x(0)?, v.x(1)?, v.x(2)?, v.x(3)?);
    if v.node.attr_i("is_packed_batching", 0) != 0 {
        return Err(v.error("is_packed_batching is not supported"));
    }
    let at = match v.rank(at)? {
        1 => {
            let length = v.size_of(x, if v.rank(x)? == 4 { 2 } else { 1 });
            v.unsqueeze(v.add(counting(v, &length), at), v.ints(&[0]))
        }
        _ => at.to_string(),
    };
    turn(v, x, &v.op("Gather", &[cos, &at], vec![]), &v.op("Gather", &[sin, &at], vec![]))
}

/// 0, 1, … up to `length` (a 1-D int64 value of one element).
pub(super) fn counting(v: &Vjp, length: &str) -> String {
    v.op("Range", &[&v.int(0), &v.squeeze(length, v.ints(&[0])), &v.int(1)], vec![])
}

/// X as the operators take it, of rank 4 or 3; cos and sin of [batch, length, half].
fn turn(v: &Vjp, x: &str, cos: &str, sin: &str) -> Result<String> {
    let interleaved = v.node.attr_i("interleaved", 0) != 0;
    let partial = v.node.attr_i("rotary_embedding_dim", 0) != 0;
    let rank = v.rank(x)?;
    if rank == 4 {
        let [cos, sin] = [cos, sin].map(|t| v.unsqueeze(t, v.ints(&[1])));
        return Ok(rotate(v, x, &cos, &sin, interleaved, partial));
    }
    let heads = match v.node.attr_i("num_heads", 0) {
        // The tables are as wide as half a head.
        0 => {
            let size = v.mul(v.size_of(cos, 2), v.ints(&[2]));
            v.op("Reshape", &[x, &v.concat(&[v.ints(&[0, 0, -1]), size], 0)], vec![])
        }
        heads => v.respec(x, &[0, 0, heads, -1]),
    };
    let [cos, sin] = [cos, sin].map(|t| v.unsqueeze(t, v.ints(&[2])));
    Ok(v.respec(&rotate(v, &heads, &cos, &sin, interleaved, partial), &[0, 0, -1]))
}

/// `x` of rank 4, cos and sin broadcast to its first three axes. `partial`: the tables may be narrower than the head,
/// the rest of which stays as it is.
pub(super) fn rotate(v: &Vjp, x: &str, cos: &str, sin: &str, interleaved: bool, partial: bool) -> String {
    let last = || vec![AttributeProto::int("axis", -1)];
    let half = v.size_of(cos, 3);
    let (turned, rest) = match partial {
        false => (x.to_string(), None),
        true => {
            let both = v.mul(&half, v.ints(&[2]));
            let rest = v.sub(v.size_of(x, 3), &both);
            let mut parts = v.node("", "Split", &[x, &v.concat(&[both, rest], 0)], last(), 2);
            let rest = parts.pop();
            (parts.concat(), rest)
        }
    };
    let (a, b) = if interleaved {
        let pairs = v.respec(&turned, &[0, 0, 0, -1, 2]);
        let parts = v.node("", "Split", &[&pairs, &v.ints(&[1, 1])], last(), 2);
        (v.squeeze(&parts[0], v.ints(&[-1])), v.squeeze(&parts[1], v.ints(&[-1])))
    } else {
        let parts = v.node("", "Split", &[&turned, &v.concat(&[half.clone(), half], 0)], last(), 2);
        (parts[0].clone(), parts[1].clone())
    };
    let first = v.sub(v.mul(&a, cos), v.mul(&b, sin));
    let second = v.add(v.mul(&a, sin), v.mul(&b, cos));
    let mut parts = if interleaved {
        let [first, second] = [first, second].map(|p| v.unsqueeze(p, v.ints(&[-1])));
        vec![v.respec(&v.concat(&[first, second], -1), &[0, 0, 0, -1])]
    } else {
        vec![first, second]
    };
    parts.extend(rest);
    v.concat(&parts, -1)
}
