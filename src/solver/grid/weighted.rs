//! The grid of least weighted squared error.
//!
//! Rounding column q to q_q adds D_q (v_q − q_q)² to the loss, D being the pivots of H in solving
//! order: what columns later in the order cannot make up for. So a group's grid should be the one of
//! least Σ D_q (w_q − q_q)². Zero points beside the range's own are tried too: with the four codes of
//! 2 bits a range that is cut need not be cut alike at both ends. The scale of the best is then moved
//! to where least squares put it for these codes, as long as that helps.
//!
//! Source: ours. Weighing by diag H would take no account of what is made up for.

use super::{Grid, range, steps};
use crate::plan::Scheme;

/// Shrink factors tried are 1 − i/50 for i below this.
const N_SHRINKS: u32 = 36;

/// Times that the scale is moved.
const N_MOVES: usize = 3;

/// The grid of least Σ `column_weights` · error² among those tried; all columns count alike where
/// none does.
pub(super) fn search(weights: &[f32], column_weights: Option<&[f32]>, scheme: Scheme) -> Grid {
    let alike = vec![1.0; weights.len()];
    let counts = |c: &&[f32]| c.iter().any(|c| *c > 0.0);
    let column_weights = column_weights.filter(counts).unwrap_or(&alike);
    let group = Group {
        weights,
        column_weights,
        scheme,
    };
    let (low, high) = range(weights);
    let widest = Grid::of_range(low, high, scheme);
    let mut best = (widest, group.error_below(widest, f32::INFINITY));
    for zero_point in group.zero_points(widest) {
        for i in 0..N_SHRINKS {
            let scale = widest.scale * (1.0 - i as f32 / 50.0);
            group.keep_better(&mut best, scale, zero_point);
        }
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

    /// Σ D · error², or anything from `limit` on. The sum only grows, so it stops early.
    fn error_below(&self, grid: Grid, limit: f32) -> f32 {
        const STRIDE: usize = 64;
        let (zero, max_code) = (
            f32::from(grid.zero_point),
            f32::from(self.scheme.max_code()),
        );
        let mut sum = 0.0;
        let parts = self.weights.chunks(STRIDE);
        for (weights, counts) in parts.zip(self.column_weights.chunks(STRIDE)) {
            let mut errors = [0.0f32; STRIDE];
            for (error, (weight, count)) in errors.iter_mut().zip(weights.iter().zip(counts)) {
                let off = weight - steps(*weight, grid.scale, zero, max_code) * grid.scale;
                *error = count * off * off;
            }
            sum += errors.iter().sum::<f32>();
            if sum >= limit {
                break;
            }
        }
        sum
    }

    /// The scale of least error for the codes of `grid`: Σ D w c / Σ D c². `None` if all are zero.
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
