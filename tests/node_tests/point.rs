//! Points to differentiate at.

use bone_onnx::onnx::Tensor;

use super::case::{Case, Feeds, with_values};
use super::runner::Runner;

/// Numbers of SplitMix64, the same on every machine.
pub struct Random(pub u64);

impl Random {
    /// In [-1, 1).
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// Moves each input a little, so that no two elements are equal and none sits on a step or kink by construction. An
/// input that would leave the domain or change a shape is moved another way or left as it is.
pub fn into_general_position(
    case: &Case,
    wrt: &[String],
    forward: &mut Runner,
    random: &mut Random,
) -> Result<Feeds, String> {
    let mut feeds = case.feeds.clone();
    let unfit = |outputs: &[Tensor]| outputs.iter().flat_map(|t| t.to_f64()).filter(|v| !v.is_finite()).count();
    let shapes = |outputs: &[Tensor]| outputs.iter().map(|t| t.dims().to_vec()).collect::<Vec<_>>();
    let before = forward.run(&feeds)?;
    for name in wrt {
        let at = feeds[name].clone();
        let point = at.to_f64();
        let scale = point.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs())).max(1e-2);
        let noise: Vec<f64> = point.iter().map(|_| random.uniform()).collect();
        type Nudge = fn(f64, f64, f64) -> f64;
        let ways: [Nudge; 4] = [
            |x, u, scale| x * (1.0 + 0.02 * u) + 0.03 * scale * u,
            |x, u, _| x * (0.97 + 0.02 * u),
            |x, u, _| x * (1.03 + 0.02 * u),
            |x, u, scale| x + 0.02 * scale * (1.2 + u),
        ];
        let moves = ways.iter().map(|way| {
            let there: Vec<f64> = point.iter().zip(&noise).map(|(x, u)| way(*x, *u, scale)).collect();
            with_values(at.data_type(), at.dims(), &there)
        });
        // Where equal values decide a shape (and no input decides it by its own value), there is no other way off them.
        let alone = wrt.len() == 1;
        for (there, free) in moves.clone().map(|m| (m, false)).chain(moves.filter(|_| alone).map(|m| (m, true))) {
            let mut moved = feeds.clone();
            moved.insert(name.clone(), there);
            let fits =
                |after: Vec<Tensor>| (free || shapes(&after) == shapes(&before)) && unfit(&after) <= unfit(&before);
            if forward.run(&moved).is_ok_and(fits) {
                feeds = moved;
                break;
            }
        }
    }
    Ok(feeds)
}
