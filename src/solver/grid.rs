//! Grids: the scale and zero point of a group of weights, and rounding to it.

use crate::plan::Scheme;
use serde::{Deserialize, Serialize};

/// How far a grid reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clip {
    /// From the smallest weight to the largest.
    None,
    /// The share of that, from 1 down to 0.21, which loses least in |error|^2.4.
    Mse,
}

/// Exponent and steps of the search for a narrower grid: arXiv:2210.17323's published code.
const CLIP_NORM: f32 = 2.4;
const CLIP_STEPS: u32 = 80;

/// The grid of one group: a weight is (code − zero) · scale with codes 0..=max_code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Distance of two neighbours, as it will be stored.
    pub scale: f32,
    /// The code of the weight 0.
    pub zero: u8,
    max_code: u8,
}

impl Grid {
    /// The grid of `weights`, which share it. A group of zeros gets scale 1.
    pub fn fit(weights: &[f32], scheme: Scheme, clip: Clip) -> Self {
        let low = weights.iter().fold(0f32, |m, w| m.min(*w));
        let high = weights.iter().fold(0f32, |m, w| m.max(*w));
        let full = Self::from_range(low, high, scheme);
        if clip == Clip::None {
            return full;
        }
        let mut best = (full, full.error(weights, f32::INFINITY));
        for step in 1..CLIP_STEPS {
            let share = 1.0 - step as f32 / 100.0;
            let grid = Self::from_range(low * share, high * share, scheme);
            let error = grid.error(weights, best.1);
            if error < best.1 {
                best = (grid, error);
            }
        }
        best.0
    }

    /// The grid that covers `low..=high`, where `low ≤ 0 ≤ high`. The scale is rounded to its
    /// stored type first, and the zero point belongs to the rounded scale.
    fn from_range(low: f32, high: f32, scheme: Scheme) -> Self {
        let max_code = scheme.max_code();
        let steps = f32::from(max_code);
        let width = match scheme.symmetric() {
            true => 2.0 * high.max(-low),
            false => high - low,
        };
        let scale = scheme.scale_dtype().round(width / steps);
        let usable = scale.is_normal() && scale > 0.0;
        let scale = if usable { scale } else { 1.0 };
        let zero = match scheme.symmetric() {
            true => max_code / 2 + 1,
            false => (-low / scale).round_ties_even().clamp(0.0, steps) as u8,
        };
        Self {
            scale,
            zero,
            max_code,
        }
    }

    /// A grid read from a file.
    pub fn new(scale: f32, zero: u8, max_code: u8) -> Self {
        Self {
            scale,
            zero,
            max_code,
        }
    }

    /// The code nearest to `weight`, halves to even.
    pub fn code(self, weight: f32) -> u8 {
        let code = (weight / self.scale).round_ties_even() + f32::from(self.zero);
        code.clamp(0.0, f32::from(self.max_code)) as u8
    }

    /// The weight of a code.
    pub fn weight(self, code: u8) -> f32 {
        (f32::from(code) - f32::from(self.zero)) * self.scale
    }

    /// The grid's weight nearest to `weight`.
    pub fn round(self, weight: f32) -> f32 {
        self.weight(self.code(weight))
    }

    /// Σ|error|^2.4, given up once it reaches `limit`.
    fn error(self, weights: &[f32], limit: f32) -> f32 {
        let mut sum = 0.0;
        for chunk in weights.chunks(16) {
            let each = chunk
                .iter()
                .map(|w| (self.round(*w) - w).abs().powf(CLIP_NORM));
            sum += each.sum::<f32>();
            if sum >= limit {
                break;
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;
    use proptest::prelude::*;

    fn scheme(bits: u8, symmetric: bool, scale_dtype: ScaleDtype) -> Scheme {
        Scheme::new(bits, None, symmetric, scale_dtype).unwrap()
    }

    #[test]
    fn zeros_stay_zero() {
        for symmetric in [false, true] {
            let grid = Grid::fit(&[0.0; 8], scheme(3, symmetric, ScaleDtype::Bf16), Clip::Mse);
            assert_eq!((grid.scale, grid.round(0.0)), (1.0, 0.0));
        }
    }

    #[test]
    fn tiny_weights_never_divide_by_a_vanished_scale() {
        let grid = Grid::fit(
            &[1e-42, -1e-43],
            scheme(4, false, ScaleDtype::F16),
            Clip::None,
        );
        assert_eq!(grid.scale, 1.0);
        assert_eq!(grid.round(1e-42), 0.0);
    }

    #[test]
    fn known_grids() {
        let w = [-1.0, 0.5, 2.0];
        let asymmetric = Grid::fit(&w, scheme(2, false, ScaleDtype::F32), Clip::None);
        assert_eq!((asymmetric.scale, asymmetric.zero), (1.0, 1));
        let symmetric = Grid::fit(&w, scheme(4, true, ScaleDtype::F32), Clip::None);
        assert_eq!((symmetric.scale, symmetric.zero), (4.0 / 15.0, 8));
    }

    proptest! {
        #[test]
        fn errors_inside_the_range_are_half_a_step(
            weights in prop::collection::vec(-3f32..3.0, 1..40),
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        ) {
            let grid = Grid::fit(&weights, scheme(bits, false, ScaleDtype::F32), Clip::None);
            // The zero point is rounded, so the range may end half a step early on one side.
            for w in &weights {
                let low = grid.weight(0) - grid.scale / 2.0;
                let high = grid.weight(grid.max_code) + grid.scale / 2.0;
                prop_assert!(*w >= low - 1e-5 && *w <= high + 1e-5);
                let slack = 4.0 * f32::EPSILON * (w.abs() + grid.scale);
                prop_assert!((grid.round(*w) - w).abs() <= grid.scale / 2.0 + slack);
            }
        }

        #[test]
        fn clipping_never_loses_in_its_own_norm(
            weights in prop::collection::vec(-3f32..3.0, 1..40),
            symmetric: bool,
        ) {
            let scheme = scheme(2, symmetric, ScaleDtype::Bf16);
            let full = Grid::fit(&weights, scheme, Clip::None);
            let clipped = Grid::fit(&weights, scheme, Clip::Mse);
            let error = |g: Grid| g.error(&weights, f32::INFINITY);
            prop_assert!(error(clipped) <= error(full));
        }

        #[test]
        fn codes_come_back(bits in prop::sample::select(vec![2u8, 3, 4, 8]), scale in 0.01f32..9.0) {
            let max = scheme(bits, false, ScaleDtype::F32).max_code();
            let grid = Grid::new(scale, max / 3, max);
            for code in 0..=max {
                prop_assert_eq!(grid.code(grid.weight(code)), code);
            }
        }
    }
}
