//! How messages name a model's layers.

use std::collections::{BTreeMap, HashSet};

use super::Linear;
use crate::did_you_mean;

/// How many entries a message lists before it counts the rest.
const LISTED: usize = 12;

pub fn listed<T: AsRef<str>>(entries: &[T], separator: &str) -> String {
    let mut text = entries.iter().take(LISTED).map(AsRef::as_ref).collect::<Vec<_>>().join(separator);
    if entries.len() > LISTED {
        text.push_str(&format!("{separator}and {} more", entries.len() - LISTED));
    }
    text
}

/// A hint at names like `wanted`: whole paths for a path, last segments for a single name.
pub fn nearest(wanted: &str, linears: &[Linear]) -> String {
    let whole = wanted.contains(['.', '/']);
    did_you_mean(
        wanted,
        linears.iter().map(|l| if whole || l.module.is_none() { l.key() } else { named_tail(l.key()) }),
    )
}

/// The layers' names, shortened: distinct last segments with their number, unless they are few.
pub fn kinds(linears: &[Linear]) -> Vec<String> {
    if linears.len() <= LISTED {
        let mut seen = HashSet::new();
        return linears.iter().map(Linear::key).filter(|key| seen.insert(*key)).map(str::to_string).collect();
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut order = Vec::new();
    for linear in linears {
        let kind = match &linear.module {
            Some(module) => named_tail(module),
            None => linear.key(),
        };
        let count = counts.entry(kind).or_default();
        if *count == 0 {
            order.push(kind);
        }
        *count += 1;
    }
    order
        .into_iter()
        .map(|kind| match counts.get(kind) {
            Some(n) if *n > 1 => format!("{kind} ×{n}"),
            _ => kind.to_string(),
        })
        .collect()
}

/// The last segment, and before it what a number needs: `q_proj` of `a.q_proj`, `block.0` of `a.block.0`.
fn named_tail(path: &str) -> &str {
    let mut start = path.len();
    while let Some(dot) = path[..start].rfind('.') {
        let segment = &path[dot + 1..start];
        if !segment.bytes().all(|b| b.is_ascii_digit()) {
            return &path[dot + 1..];
        }
        start = dot;
    }
    path
}
