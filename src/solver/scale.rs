//! Scales of input channels: what a linear reads is divided by them, its columns are multiplied,
//! and channels that carry more are rounded more finely.
//!
//! The searched scales are powers of the mean absolute input, s = mean|x|^r, with r on a grid; the
//! caller judges each r by the output error of [`rounded_in_scale`]. Taken out of a stored tensor,
//! scales would be rounded with it; [`exact_quotients`] moves them by less than that rounding, so
//! that the quotient is exact and the model's function is kept.
//!
//! Source: arXiv:2306.00978 §3.2; mit-han-lab/llm-awq@d6e797a auto_scale.py. Differs: the grid is
//! the one that is written (range widened to hold 0, scales in their storage type), quotients are
//! exact.

use super::{Clip, rtn};
use crate::plan::Scheme;
use crate::{Matrix, Result};
use rayon::prelude::*;

/// Exponents tried: i / 20 for i below this.
pub const N_RATIOS: usize = 20;

/// Least value of mean|x|^r.
const LEAST: f64 = 1e-4;

/// The exponent of a step of the search.
pub fn ratio(step: usize) -> f64 {
    step as f64 / N_RATIOS as f64
}

/// max(mean|x|^ratio, 1e-4), divided by √(largest · smallest).
///
/// Shapes: `mean_abs [in]`, the mean absolute input of each channel; the result is `[in]`.
pub fn channel_scales(mean_abs: &[f64], ratio: f64) -> Vec<f32> {
    let powers: Vec<f64> = mean_abs.iter().map(|m| m.powf(ratio).max(LEAST)).collect();
    let least = powers.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = powers.iter().copied().fold(0.0, f64::max);
    let middle = (least * greatest).sqrt();
    powers.iter().map(|p| (p / middle) as f32).collect()
}

/// diag(1/rows) · W · diag(columns); `None` leaves a side as it is.
///
/// Shapes: `w [out, in]`, `rows [out]`, `columns [in]`.
#[must_use]
pub fn scaled(mut w: Matrix, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Matrix {
    let n_cols = w.cols().max(1);
    let all = w.data_mut().par_chunks_mut(n_cols).enumerate();
    all.for_each(|(row, values)| {
        if let Some(columns) = columns {
            values.iter_mut().zip(columns).for_each(|(w, s)| *w *= s);
        }
        if let Some(rows) = rows {
            values.iter_mut().for_each(|w| *w /= rows[row]);
        }
    });
    w
}

/// What the linear comes to if its weight is rounded in these scales: Q(W · diag(s)) · diag(1/s).
///
/// Shapes: `w [out, in]`, `scales [in]`.
/// # Errors
/// Those of [`rtn()`](super::rtn()).
pub fn rounded_in_scale(
    module: &str,
    w: &Matrix,
    scales: &[f32],
    scheme: Scheme,
    clip: Clip,
) -> Result<Matrix> {
    let rounded = rtn(module, &scaled(w.clone(), None, Some(scales)), scheme, clip)?;
    let inverse: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
    Ok(scaled(rounded.dequantize(), None, Some(&inverse)))
}

/// Takes `scales` out of a stored tensor, and returns the values to be stored.
///
/// What counts is `offset + value`. Each scale is moved to the quotient of the old and the rounded
/// new one, so that their product is the old to an f32 rounding; where rounding leaves nothing
/// to divide by, the channel keeps its value and has scale 1.
///
/// Shapes: `values` and `scales` `[in]`. `round` gives one value as it is stored.
pub fn exact_quotients(
    values: &[f32],
    offset: f32,
    scales: &mut [f32],
    round: impl Fn(f32) -> f32,
) -> Vec<f32> {
    let offset = f64::from(offset);
    let pairs = values.iter().zip(scales);
    let quotient = |(value, scale): (&f32, &mut f32)| {
        let old = f64::from(*value) + offset;
        if old == 0.0 {
            return *value;
        }
        let new = round((old / f64::from(*scale) - offset) as f32);
        let moved = (old / (f64::from(new) + offset)) as f32;
        match moved.is_normal() && moved > 0.0 {
            true => {
                *scale = moved;
                new
            }
            false => {
                *scale = 1.0;
                *value
            }
        }
    };
    pairs.map(quotient).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;

    #[test]
    fn scales_are_powers_around_one() {
        let found = channel_scales(&[4.0, 1.0, 0.0, 0.25], 0.5);
        // Powers 2, 1, 1e-4 (the least) and 0.5; the middle of largest and smallest is √2e-4.
        let middle = 2e-4f64.sqrt();
        for (found, power) in found.iter().zip([2.0, 1.0, 1e-4, 0.5]) {
            assert!((f64::from(*found) * middle / power - 1.0).abs() < 1e-6);
        }
        assert_eq!(channel_scales(&[4.0, 1.0, 0.0], 0.0), [1.0; 3]);
    }

    #[test]
    fn both_sides_are_scaled() {
        let w = Matrix::from_fn(2, 2, |row, col| (1 + 2 * row + col) as f32);
        let found = scaled(w, Some(&[1.0, 2.0]), Some(&[10.0, 100.0]));
        assert_eq!(found.data(), [10.0, 200.0, 15.0, 200.0]);
    }

    #[test]
    fn scales_of_one_round_as_without() {
        let scheme = Scheme::new(3, Some(8), false, ScaleDtype::Bf16).unwrap();
        let w = Matrix::from_fn(4, 16, |row, col| ((row * 7 + col * 5) % 13) as f32 - 6.0);
        let found = rounded_in_scale("m", &w, &[1.0; 16], scheme, Clip::None).unwrap();
        let expected = rtn("m", &w, scheme, Clip::None).unwrap().dequantize();
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_stored_times_its_scale_is_what_was() {
        let round = |v: f32| half::bf16::from_f32(v).to_f32();
        let values: Vec<f32> = (-40..40).map(|i| round(i as f32 * 0.037)).collect();
        for offset in [0.0, 1.0] {
            let wanted: Vec<f32> = (0..80).map(|i| 0.1 * 1.09f32.powi(i)).collect();
            let mut scales = wanted.clone();
            let stored = exact_quotients(&values, offset, &mut scales, round);
            let all = values.iter().zip(&stored).zip(scales.iter().zip(&wanted));
            for ((value, stored), (scale, wanted)) in all {
                assert_eq!(round(*stored), *stored);
                let old = value + offset;
                assert!((scale * (stored + offset) - old).abs() <= 4e-7 * old.abs());
                // bf16 rounds by 2^-9; beside an offset of 1 that is more of a small sum.
                let sum = (old / wanted).abs().max(1e-3);
                let slack = (1.0 + offset / sum) / 256.0;
                assert!((scale / wanted - 1.0).abs() < slack || *scale == 1.0);
            }
        }
        // −0.996 / 64 + … rounds to −1, of which nothing is left beside the offset.
        let mut scales = [4096.0];
        let value = round(-0.996);
        let stored = exact_quotients(&[value], 1.0, &mut scales, round);
        assert_eq!((stored[0], scales[0]), (value, 1.0));
    }
}
