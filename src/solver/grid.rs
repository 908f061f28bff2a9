//! The grid that a group of weights is rounded to: w ≈ (code − zero_point) · scale.
//!
//! Asymmetric: the range of the group, widened to hold 0, is spread over the 2^b codes and the
//! zero point is an integer among them, so that 0 stays exactly 0. Symmetric: the zero point is
//! 2^(b−1) and the scale is max|w| / ((2^b − 1) / 2), compressed-tensors' convention: codes use the
//! full range, and the largest weight is half a step beyond the largest code.
//!
//! The scale is rounded to its storage type first and everything else follows from the rounded
//! one. A group whose scale would be zero or subnormal (all weights zero, or too small for the
//! storage type) gets scale 1 and thus only zeros: no division can overflow.
//!
//! Source: IST-DASLab/gptq@2d65066 quant.py. Differs: rounded scales, the symmetric convention.

mod superblock;
mod weighted;

use super::{Clip, ClipNorm};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Matrix, Result};
use rayon::prelude::*;

/// Adding and subtracting 1.5 · 2^23 rounds a small f32 to the nearest integer, ties to even, with
/// two additions that vectorise on every CPU; codes are far below the 2^22 where this ends.
const ROUND: f32 = 12_582_912.0;

/// Shrink factors tried by [`Clip::Mse`] are 1 − i/100 for i below this.
const N_SHRINKS: u32 = 80;

/// Scale and zero point of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    pub(crate) scale: f32,
    pub(crate) zero_point: u8,
}

/// Scales and zero points `[rows, n_groups]`.
pub(crate) struct Grids {
    pub(crate) scales: Matrix,
    pub(crate) zero_points: Vec<u8>,
}

/// How grids are fitted.
#[derive(Clone, Copy)]
pub(crate) struct Fitting<'a> {
    pub(crate) scheme: Scheme,
    pub(crate) clip: Clip,
    pub(crate) clip_norm: ClipNorm,
    /// What a squared error counts in each column, for [`Clip::Weighted`]; absent: all alike.
    pub(crate) column_weights: Option<&'a [f32]>,
}

impl Fitting<'_> {
    /// The grid of one group of finite weights, which begins at column `start`.
    pub(crate) fn fit(self, weights: &[f32], start: usize) -> Grid {
        let (low, high) = range(weights);
        match self.clip {
            Clip::None => Grid::of_range(low, high, self.scheme),
            Clip::Mse => Grid::search(weights, low, high, self.scheme),
            Clip::Weighted => {
                let own = self.column_weights.map(|c| &c[start..][..weights.len()]);
                weighted::search(weights, own, self.clip_norm, self.scheme)
            }
        }
    }
}

impl Grid {
    /// Code of `weight`: clamp(round(weight / scale) + zero_point), ties to even.
    pub(crate) fn code(self, weight: f32, max_code: u8) -> u8 {
        let zero = f32::from(self.zero_point);
        (self.steps(weight, max_code) + zero) as u8
    }

    /// Signed number of steps from zero, within the codes.
    fn steps(self, weight: f32, max_code: u8) -> f32 {
        steps(weight, self.scale, self.zero_point.into(), max_code.into())
    }

    fn of_range(low: f32, high: f32, scheme: Scheme) -> Self {
        let n_steps = f32::from(scheme.max_code());
        let middle = scheme.max_code() / 2 + 1;
        let raw = if scheme.symmetric() {
            high.max(-low) / (n_steps / 2.0)
        } else {
            high / n_steps - low / n_steps
        };
        let scale = scheme.scale_dtype().round(raw);
        if scale < f32::MIN_POSITIVE {
            let zero_point = if scheme.symmetric() { middle } else { 0 };
            return Self {
                scale: 1.0,
                zero_point,
            };
        }
        let zero_point = if scheme.symmetric() {
            middle
        } else {
            (-low / scale).round_ties_even().clamp(0.0, n_steps) as u8
        };
        Self { scale, zero_point }
    }

    /// Shrinks the range step by step and keeps the first factor of least Σ|error|^2.4.
    fn search(weights: &[f32], low: f32, high: f32, scheme: Scheme) -> Self {
        let mut best = Self::of_range(low, high, scheme);
        let mut least = f64::INFINITY;
        for i in 0..N_SHRINKS {
            let factor = 1.0 - i as f32 / 100.0;
            let grid = Self::of_range(low * factor, high * factor, scheme);
            if let Some(error) = grid.error_below(weights, scheme.max_code(), least) {
                (best, least) = (grid, error);
            }
        }
        best
    }

    /// Σ|rounding error|^2.4 if it is below `limit`. The sum only grows, so it stops early.
    fn error_below(self, weights: &[f32], max_code: u8, limit: f64) -> Option<f64> {
        const STRIDE: usize = 64;
        let unit = f64::from(power_2_4(self.scale));
        let (zero, max_code) = (f32::from(self.zero_point), f32::from(max_code));
        let mut sum = 0.0f64;
        for part in weights.chunks(STRIDE) {
            let mut errors = [0.0f32; STRIDE];
            for (error, weight) in errors.iter_mut().zip(part) {
                let distance = weight / self.scale - steps(*weight, self.scale, zero, max_code);
                *error = power_2_4(distance);
            }
            sum += unit * f64::from(errors.iter().sum::<f32>());
            if sum >= limit {
                return None;
            }
        }
        Some(sum)
    }
}

impl Grids {
    /// One grid for each row and each `group_len` consecutive columns of `w`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a scale does not fit its storage type; [`Error::Unsupported`] if
    /// super-blocks cannot hold one.
    pub(crate) fn fit(
        module: &str,
        w: &Matrix,
        group_len: usize,
        fitting: Fitting<'_>,
    ) -> Result<Self> {
        let n_groups = (w.cols() / group_len).max(1);
        let groups = w.data().par_chunks(group_len).enumerate();
        let grid = |(index, group)| fitting.fit(group, index % n_groups * group_len);
        let mut grids: Vec<Grid> = groups.map(grid).collect();
        if fitting.scheme.scale_dtype() == ScaleDtype::Superblock {
            let rows = w.data().par_chunks(w.cols());
            let rows = rows.zip(grids.par_chunks_mut(n_groups));
            rows.try_for_each(|(row, grids)| superblock::snap(module, row, grids, fitting))?;
        }
        let scales = grids.iter().map(|g| g.scale).collect();
        let scales = Matrix::from_vec(module, w.rows(), w.cols() / group_len, scales)?;
        check_scales(module, &scales)?;
        Ok(Self {
            scales,
            zero_points: grids.iter().map(|g| g.zero_point).collect(),
        })
    }
}

/// # Errors
/// [`Error::NotFinite`] if a scale overflowed its storage type.
pub(crate) fn check_scales(module: &str, scales: &Matrix) -> Result<()> {
    let count = scales.count_not_finite();
    if count == 0 {
        return Ok(());
    }
    Err(Error::NotFinite {
        module: module.to_owned(),
        stage: "scales, after rounding to their storage type".into(),
        count,
    })
}

/// round(weight / scale), clamped so that adding `zero` stays within `[0, max_code]`. Clamping
/// before rounding gives the same, since the bounds are integers, and bounds what is rounded.
pub(crate) fn steps(weight: f32, scale: f32, zero: f32, max_code: f32) -> f32 {
    ((weight / scale).max(-zero).min(max_code - zero) + ROUND) - ROUND
}

/// Least and greatest weight, widened to hold zero.
fn range(weights: &[f32]) -> (f32, f32) {
    weights
        .iter()
        .fold((0.0, 0.0), |(low, high), w| (w.min(low), w.max(high)))
}

/// |x|^2.4 to a few f32 roundings: x² times its fifth root, found by Newton's method from a guess
/// that divides the exponent bits by five. `powf` would take most of the clip search's time.
fn power_2_4(x: f32) -> f32 {
    const BIAS: u32 = 852_282_573; // 4/5 of the bits of 1.0
    let square = x * x;
    let mut root = f32::from_bits(square.to_bits() / 5 + BIAS);
    for _ in 0..3 {
        let root2 = root * root;
        root = 0.8 * root + 0.2 * square / (root2 * root2);
    }
    square * root
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;
    use proptest::prelude::*;

    fn fit(weights: &[f32], scheme: Scheme, clip: Clip) -> Grid {
        let fitting = Fitting {
            scheme,
            clip,
            clip_norm: ClipNorm::default(),
            column_weights: None,
        };
        fitting.fit(weights, 0)
    }

    fn any_scheme() -> impl Strategy<Value = Scheme> {
        let bits = prop::sample::select(Scheme::BITS.to_vec());
        let dtype = prop::sample::select(vec![ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32]);
        (bits, dtype, any::<bool>())
            .prop_map(|(bits, dtype, symmetric)| Scheme::new(bits, None, symmetric, dtype).unwrap())
    }

    fn value(grid: Grid, code: u8) -> f32 {
        (f32::from(code) - f32::from(grid.zero_point)) * grid.scale
    }

    proptest! {
        #[test]
        fn rounding_errs_by_half_a_step_inside_the_range(
            scheme in any_scheme(),
            weights in prop::collection::vec(-3.0f32..3.0, 1..40),
            exponent in -12i32..4,
        ) {
            let weights: Vec<f32> = weights.iter().map(|w| w * 2f32.powi(exponent)).collect();
            let grid = fit(&weights, scheme, Clip::None);
            let max_code = scheme.max_code();
            prop_assert_eq!(scheme.scale_dtype().round(grid.scale), grid.scale);
            prop_assert_eq!(grid.code(0.0, max_code), grid.zero_point);
            let (low, high) = (value(grid, 0), value(grid, max_code));
            for weight in weights {
                let code = grid.code(weight, max_code);
                prop_assert!(code <= max_code);
                let error = (weight - value(grid, code)).abs();
                let beyond = (weight - high).max(low - weight).max(0.0);
                // One f32 rounding of the quotient, which is at most 2^8.
                let slack = 256.0 * f32::EPSILON * grid.scale;
                prop_assert!(error <= (grid.scale / 2.0).max(beyond) + slack);
            }
        }

        /// Nothing is clipped by more than half a step, the rounding of the scale (at most 2^-8 of
        /// the range) and, asymmetric, the rounding of the zero point.
        #[test]
        fn unclipped_ranges_hold_all_weights(
            scheme in any_scheme(),
            weights in prop::collection::vec(-3.0f32..3.0, 1..40),
        ) {
            let grid = fit(&weights, scheme, Clip::None);
            let reach = f32::from(scheme.max_code()) * grid.scale;
            for weight in weights {
                let error = (weight - value(grid, grid.code(weight, scheme.max_code()))).abs();
                prop_assert!(error <= 0.5001 * grid.scale + reach / 256.0, "{weight} {grid:?}");
            }
        }

        #[test]
        fn clip_search_minimises_its_norm(
            scheme in any_scheme(),
            weights in prop::collection::vec(-3.0f32..3.0, 1..150),
        ) {
            let found = fit(&weights, scheme, Clip::Mse);
            let norm = |grid: Grid| -> f64 {
                let distance = |w: f32| value(grid, grid.code(w, scheme.max_code())) - w;
                weights.iter().map(|w| f64::from(distance(*w)).abs().powf(2.4)).sum()
            };
            let (low, high) = range(&weights);
            let tried = (0..N_SHRINKS).map(|i| 1.0 - i as f32 / 100.0);
            let least = tried.map(|p| norm(Grid::of_range(low * p, high * p, scheme)));
            let least = least.fold(f64::INFINITY, f64::min);
            // f32 errors of the distances, which 8-bit grids make small against the weights.
            prop_assert!(norm(found) <= least * 1.001 + 1e-15);
        }
    }

    #[test]
    fn ties_round_to_even() {
        let grid = Grid {
            scale: 0.5,
            zero_point: 3,
        };
        let codes = [-0.75, -0.25, 0.25, 0.75, 1.25].map(|w| grid.code(w, 15));
        assert_eq!(codes, [1, 3, 3, 5, 5]);
    }

    #[test]
    fn groups_too_small_for_a_scale_become_zero() {
        for symmetric in [true, false] {
            let scheme = Scheme::new(4, None, symmetric, ScaleDtype::F16).unwrap();
            for weights in [[0.0; 8], [1e-9; 8], [-1e-40; 8]] {
                for clip in [Clip::None, Clip::Mse] {
                    let grid = fit(&weights, scheme, clip);
                    let zero_point = if symmetric { 8 } else { 0 };
                    assert_eq!(
                        grid,
                        Grid {
                            scale: 1.0,
                            zero_point
                        }
                    );
                    assert_eq!(grid.code(weights[0], 15), zero_point);
                }
            }
        }
    }

    #[test]
    fn symmetric_scale_spans_the_full_range() {
        let scheme = Scheme::new(2, None, true, ScaleDtype::F32).unwrap();
        let grid = fit(&[-3.0, 1.0], scheme, Clip::None);
        assert_eq!(
            grid,
            Grid {
                scale: 2.0,
                zero_point: 2
            }
        );
        assert_eq!(
            [-3.0f32, -2.0, 1.5, 3.0].map(|w| grid.code(w, 3)),
            [0, 1, 3, 3]
        );
    }

    #[test]
    fn power_is_accurate() {
        for exponent in -30..30 {
            for mantissa in [1.0f32, 1.1, 1.4, 1.9] {
                let x = mantissa * 2f32.powi(exponent);
                let exact = f64::from(x).powf(2.4);
                // A handful of f32 roundings and Newton's last step.
                let tolerance = 8.0 * f64::from(f32::EPSILON) * exact;
                assert!((f64::from(power_2_4(-x)) - exact).abs() < tolerance, "{x}");
            }
        }
        assert_eq!(power_2_4(0.0), 0.0);
    }
}
