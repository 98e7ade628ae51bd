//! Range: yᵢ = start + i·delta, so d start = Σ dy and d delta = Σ i·dy. The limit only sets how many there are, a step
//! function.

use super::{Adjoints, Rules, Vjp};
use crate::Result;

pub(super) fn add(rules: &mut Rules) {
    rules.vjp("Range", range);
}

fn range(v: &Vjp) -> Result<Adjoints> {
    let (start, delta, dy) = (v.x(0)?, v.x(2)?, v.dy()?);
    let element = v.element().ok_or_else(|| v.error("its element type is not known"))?;
    let as_input = |g: String, x: &str| v.reshape_like(g, Some(&[]), x);
    let d_start = v.wants(0).then(|| as_input(v.sum_all(dy), start));
    let d_delta = v.wants(2).then(|| {
        let counted = v.op("Range", &[&v.int(0), &v.size(dy), &v.int(1)], vec![]);
        as_input(v.sum_all(v.mul(v.cast(counted, element), dy)), delta)
    });
    Ok(vec![d_start, None, d_delta])
}
