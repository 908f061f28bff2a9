//! The grid of least weighted error.
//!
//! Rounding column q to q_q adds D_q (v_q − q_q)² to the loss, D being the pivots of H in solving
//! order: what columns later in the order cannot make up for. So a group's grid should be the one of
//! least Σ D_q |w_q − q_q|², if the loss were all and v_q were w_q. A power of D below 1 keeps massive
//! channels from leaving the rest of their group uncounted, and a power of the error above 2 leaves
//! room for what v_q has beyond w_q. Zero points beside the range's own are tried too: with the four codes of
//! 2 bits a range that is cut need not be cut alike at both ends. The scale of the best is then moved
//! to where least squares put it for these codes, as long as that helps.
//!
//! Source: ours. Weighing by diag H would take no account of what is made up for.

use super::{ClipNorm, Grid, ROUND, range};
use crate::plan::Scheme;

/// Shrink factors are 1 − i/50 for i below this.
const N_SHRINKS: usize = 36;

/// Of the shrink factors each n-th is tried first, then those beside the best.
const STRIDE: usize = 3;

/// Columns between two looks at the sum so far.
const PART: usize = 64;

/// Times that the scale is moved.
const N_MOVES: usize = 3;

/// The grid of least Σ `column_weights` · |error|^`norm` among those tried; all columns count alike where
/// none does.
pub(super) fn search(
    weights: &[f32],
    column_weights: Option<&[f32]>,
    norm: ClipNorm,
    scheme: Scheme,
) -> Grid {
    let alike = vec![1.0; weights.len()];
    let counts = |c: &&[f32]| c.iter().any(|c| *c > 0.0);
    let column_weights = column_weights.filter(counts).unwrap_or(&alike);
    let group = Group {
        weights,
        column_weights,
        norm,
        scheme,
    };
    let (low, high) = range(weights);
    let widest = Grid::of_range(low, high, scheme);
    let mut best = (widest, group.error_below(widest, f32::INFINITY));
    let shrunk = |i: usize| widest.scale * (1.0 - i as f32 / 50.0);
    let mut least = 0;
    for zero_point in group.zero_points(widest) {
        for i in (0..N_SHRINKS).step_by(STRIDE) {
            if group.keep_better(&mut best, shrunk(i), zero_point) {
                least = i;
            }
        }
    }
    let zero_point = best.0.zero_point;
    let beside = least.saturating_sub(STRIDE - 1)..(least + STRIDE).min(N_SHRINKS);
    for i in beside.filter(|i| *i != least) {
        group.keep_better(&mut best, shrunk(i), zero_point);
    }
    for _ in 0..N_MOVES {
        let (grid, _) = best;
        let Some(scale) = group.least_squares(grid) else {
            break;
        };
        if !group.keep_better(&mut best, scale, grid.zero_point) {
            break;
        }
    }
    best.0
}

struct Group<'a> {
    weights: &'a [f32],
    column_weights: &'a [f32],
    norm: ClipNorm,
    scheme: Scheme,
}

impl Group<'_> {
    fn zero_points(&self, widest: Grid) -> std::ops::RangeInclusive<u8> {
        match self.scheme.symmetric() {
            true => widest.zero_point..=widest.zero_point,
            false => {
                let last = self.scheme.max_code().min(widest.zero_point + 1);
                widest.zero_point.saturating_sub(1)..=last
            }
        }
    }

    /// Whether the grid is better than `best`, and has taken its place.
    fn keep_better(&self, best: &mut (Grid, f32), scale: f32, zero_point: u8) -> bool {
        let scale = self.scheme.scale_dtype().round(scale);
        if !(scale >= f32::MIN_POSITIVE && scale.is_finite()) {
            return false;
        }
        let grid = Grid { scale, zero_point };
        let error = self.error_below(grid, best.1);
        let is_better = error < best.1;
        if is_better {
            *best = (grid, error);
        }
        is_better
    }

    /// Σ D · |error|^norm, or anything from `limit` on.
    fn error_below(&self, grid: Grid, limit: f32) -> f32 {
        match self.norm {
            ClipNorm::Square => self.sum_below(grid, limit, |off| off * off),
            ClipNorm::Between => self.sum_below(grid, limit, |off| off * off * off.abs().sqrt()),
            ClipNorm::Cube => self.sum_below(grid, limit, |off| off * off * off.abs()),
        }
    }

    /// Σ D · `power`(error), or anything from `limit` on. The sum only grows, so it stops early.
    ///
    /// Weights are multiplied by 1 / scale: next to a tie that may give the other code, whose error
    /// is the same.
    fn sum_below(&self, grid: Grid, limit: f32, power: impl Fn(f32) -> f32) -> f32 {
        let (scale, inverse) = (grid.scale, 1.0 / grid.scale);
        let least = -f32::from(grid.zero_point);
        let most = f32::from(self.scheme.max_code()) + least;
        let error = |weight: f32, count: f32| {
            let steps = ((weight * inverse).max(least).min(most) + ROUND) - ROUND;
            let off = weight - steps * scale;
            count * power(off)
        };
        let mut sum = 0.0;
        let parts = self.weights.chunks(PART);
        for (weights, counts) in parts.zip(self.column_weights.chunks(PART)) {
            let (eights, rest) = weights.as_chunks::<8>();
            let (eight_counts, rest_counts) = counts.as_chunks::<8>();
            let mut sums = [0.0f32; 8];
            for (weights, counts) in eights.iter().zip(eight_counts) {
                for (sum, (weight, count)) in sums.iter_mut().zip(weights.iter().zip(counts)) {
                    *sum += error(*weight, *count);
                }
            }
            let rest = rest.iter().zip(rest_counts);
            sum += sums.iter().sum::<f32>() + rest.map(|(w, c)| error(*w, *c)).sum::<f32>();
            if sum >= limit {
                break;
            }
        }
        sum
    }

    /// The scale of least squared error for the codes of `grid`: Σ D w c / Σ D c². `None` if all are zero.
    fn least_squares(&self, grid: Grid) -> Option<f32> {
        let max_code = self.scheme.max_code();
        let (mut above, mut below) = (0.0f64, 0.0f64);
        for (weight, count) in self.weights.iter().zip(self.column_weights) {
            let code = f64::from(grid.steps(*weight, max_code));
            above += f64::from(*count) * f64::from(*weight) * code;
            below += f64::from(*count) * code * code;
        }
        (below > 0.0).then_some((above / below) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// A sum of three draws, which has tails as weights have them.
    fn groups(n: usize) -> Vec<[Vec<f32>; 2]> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut draw = || (0..3).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>();
        let group = |_| {
            let weights = (0..128).map(|_| draw() * 0.02).collect();
            let counts = (0..128).map(|_| draw().exp()).collect();
            [weights, counts]
        };
        (0..n).map(group).collect()
    }

    const NORMS: [(ClipNorm, f64); 3] = [
        (ClipNorm::Square, 2.0),
        (ClipNorm::Between, 2.5),
        (ClipNorm::Cube, 3.0),
    ];

    fn error(grid: Grid, [weights, counts]: &[Vec<f32>; 2], scheme: Scheme, power: f64) -> f64 {
        let pairs = weights.iter().zip(counts);
        let off = |w: f32| f64::from(w - grid.steps(w, scheme.max_code()) * grid.scale);
        pairs
            .map(|(w, c)| f64::from(*c) * off(*w).abs().powf(power))
            .sum()
    }

    /// Of all that the search may try.
    fn least_error(group: &[Vec<f32>; 2], scheme: Scheme, power: f64) -> f64 {
        let (low, high) = range(&group[0]);
        let widest = Grid::of_range(low, high, scheme);
        let last = scheme.max_code().min(widest.zero_point + 1);
        let zero_points = match scheme.symmetric() {
            true => widest.zero_point..=widest.zero_point,
            false => widest.zero_point.saturating_sub(1)..=last,
        };
        let all = (0..N_SHRINKS).flat_map(|i| {
            let scale = widest.scale * (1.0 - i as f32 / 50.0);
            let scale = scheme.scale_dtype().round(scale);
            zero_points
                .clone()
                .map(move |zero_point| Grid { scale, zero_point })
        });
        let errors = all.map(|grid| error(grid, group, scheme, power));
        errors.fold(f64::INFINITY, f64::min)
    }

    /// Not all shrink factors are tried; what that misses is next to nothing.
    #[test]
    fn the_error_is_that_of_trying_everything() {
        for (bits, symmetric) in [(2, false), (3, false), (4, false), (3, true), (4, true)] {
            let scheme = Scheme::new(bits, None, symmetric, ScaleDtype::Bf16).unwrap();
            for (norm, power) in NORMS {
                let (mut found, mut least) = (0.0, 0.0);
                for group in groups(200) {
                    let grid = search(&group[0], Some(&group[1]), norm, scheme);
                    found += error(grid, &group, scheme, power);
                    least += least_error(&group, scheme, power);
                }
                assert!(
                    found < 1.003 * least,
                    "{bits} bits, {norm:?}: {found} {least}"
                );
            }
        }
    }

    /// A higher power of the error cuts less off.
    #[test]
    fn higher_norms_make_wider_grids() {
        let scheme = Scheme::new(3, None, false, ScaleDtype::F32).unwrap();
        let scales = NORMS.map(|(norm, _)| {
            let of_group = |g: &[Vec<f32>; 2]| search(&g[0], Some(&g[1]), norm, scheme).scale;
            groups(200).iter().map(of_group).sum::<f32>()
        });
        assert!(scales[0] < scales[1] && scales[1] < scales[2], "{scales:?}");
    }
}
