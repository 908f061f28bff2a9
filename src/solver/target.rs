//! The weight that least squares ask for, which is then rounded instead of W.
//!
//! What a linear's output should be is known: W f, what it is in full precision, and where the output
//! is added to the residual stream also what is missing there, d. The error ‖Q u − (W f + d)‖²
//! summed over tokens is ‖(Q − W*) u‖² plus what no Q changes, with
//!
//! ```text
//! W* = W + E H⁻¹        E = Σ ω (W f + d − W u) uᵀ = W C + S
//! ```
//!
//! E H⁻¹ is a regression, with as many coefficients in a row as the linear has inputs, and fits the
//! calibration's accidents as well. So W + α E H⁻¹ is what is rounded, α in [0, 1], either given or found
//! on samples that were held out ([`HeldOut`]).
//!
//! Cost: out · in² multiply-adds to solve, as many again where E is made of C; with α found on held-out
//! samples twice that, half as many more, and the factor of a second Hessian. Source: the normal equations of GPTAQ's objective (arXiv:2504.02692 eq. 3);
//! S and α by row are ours.

use super::drift::Triangle;
use super::factor::Factor;
use super::loss::{dot, quadratic_forms};
use super::rows::Rows;
use crate::Matrix;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

/// C and S, and what is needed to solve with H.
pub(super) struct DriftMoments {
    /// C, original order; absent where S holds all.
    pub(super) cross: Option<Matrix>,
    /// S `[out, in]`, original order; absent where C holds all.
    pub(super) output_cross: Option<Matrix>,
    /// D of H = R D Rᵀ, in units of H's mean.
    pub(super) pivots: Vec<f32>,
    pub(super) mean: f64,
}

/// W + α E H⁻¹, and the mean of α over rows.
///
/// Shapes: rows of a `w [out, in]`, a factor of the same `in`.
pub(super) fn target(
    rows: &Rows<'_>,
    factor: &Factor,
    drift: &DriftMoments,
    alpha: f32,
) -> (Matrix, f32) {
    let w = &*rows.w;
    let n = w.cols();
    let part = factor.part.as_deref();
    let part = part.and_then(|part| Some((part, part.drift_moments()?)));
    let mut target = w.clone();
    let height = rows.chunk_height(64);
    let bands = target.data_mut().par_chunks_mut(height * n.max(1));
    let alphas = bands.enumerate().map(|(index, band)| {
        let start = index * height;
        let own = start..start + band.len() / n;
        let mut correction = drift.of_rows(rows, own.clone());
        let alphas = match part {
            Some((part, part_drift)) => {
                let in_part = part_drift.of_rows(rows, own);
                let held_out = HeldOut {
                    whole: factor,
                    part,
                    part_drift,
                };
                held_out.alphas(&correction, &in_part, n)
            }
            None => vec![alpha; own.len()],
        };
        // What noise would make of a row is not asked for.
        let corrected: Vec<usize> = (0..alphas.len()).filter(|i| alphas[*i] > 0.0).collect();
        for (to, from) in corrected.iter().enumerate() {
            correction.copy_within(from * n..(from + 1) * n, to * n);
        }
        correction.truncate(corrected.len() * n);
        drift.solve(factor, &mut correction, n);
        for (row, correction) in corrected.iter().zip(correction.chunks_exact(n)) {
            let pairs = band[row * n..][..n].iter_mut().zip(correction);
            pairs.for_each(|(target, correction)| *target += alphas[*row] * correction);
        }
        alphas
    });
    let alphas = alphas.collect::<Vec<_>>().concat();
    let mean = alphas.iter().sum::<f32>() / alphas.len().max(1) as f32;
    (target, mean)
}

/// Where the first column in solving order alone would make up for the drift: w + α E_q / H_qq, by row.
/// Qronos rounds it from there (arXiv:2505.11695, first step).
pub(super) fn first_values(
    rows: &Rows<'_>,
    factor: &Factor,
    drift: &DriftMoments,
    alpha: f32,
) -> Vec<f32> {
    let Some(first) = factor.order.first().copied() else {
        return Vec::new();
    };
    let energy = f64::from(factor.hessian_lower()[(first, first)]);
    let value = |row: usize| {
        let gain = match energy > 0.0 {
            true => drift.of_entry(rows, row, first) / energy,
            false => 0.0,
        };
        (f64::from(rows.w[(row, first)]) + f64::from(alpha) * gain) as f32
    };
    (0..rows.w.rows()).into_par_iter().map(value).collect()
}

/// What α of a row is found with: how far a correction found on a part of the samples serves the rest.
///
/// With T = E H⁻¹ of the part, the rest's error is least at a = ⟨T, E⟩ / (T H Tᵀ), E and H those of the
/// rest. All samples together estimate T better than a part did. A correction of which a share a/(1 − a)
/// is signal for each share of noise has twice that with twice the samples: α = 2a / (1 + a).
struct HeldOut<'a> {
    whole: &'a Factor,
    part: &'a Factor,
    part_drift: &'a DriftMoments,
}

impl HeldOut<'_> {
    /// α of some rows, given their E of all samples and of the part.
    ///
    /// T is E (H + λ)⁻¹ of the part, so T H Tᵀ is ⟨T, E⟩ − λ‖T‖² there and needs no product: where H
    /// has nothing but zeros, in dead columns, E and T have too.
    fn alphas(&self, in_whole: &[f32], in_part: &[f32], n: usize) -> Vec<f32> {
        let mut correction = in_part.to_vec();
        self.part_drift.solve(self.part, &mut correction, n);
        let in_all = quadratic_forms(&correction, n, self.whole.hessian_lower());
        let alpha = |row: usize| {
            let [t, in_whole, in_part] =
                [&correction[..], in_whole, in_part].map(|rows| &rows[row * n..][..n]);
            let of_part = dot(t, in_part);
            let in_own = of_part - self.part.damping * dot(t, t);
            row_alpha(dot(t, in_whole) - of_part, in_all[row] - in_own)
        };
        (0..in_all.len()).map(alpha).collect()
    }
}

/// α from what a whole correction gains on held-out samples and what it costs there.
pub(crate) fn row_alpha(gain: f64, energy: f64) -> f32 {
    if !(gain > 0.0 && energy > 0.0) {
        return 0.0;
    }
    let half = (gain / energy).min(1.0);
    (2.0 * half / (1.0 + half)) as f32
}

impl DriftMoments {
    /// E at `row` of some and `column`.
    fn of_entry(&self, rows: &Rows<'_>, row: usize, column: usize) -> f64 {
        let own = |s: &Matrix| f64::from(s[(rows.first + row, column)]);
        let product = |cross: &Matrix| {
            let weights = rows.w.row(row).iter().enumerate();
            let products = weights.map(|(i, w)| f64::from(*w) * f64::from(cross[(i, column)]));
            products.sum::<f64>()
        };
        self.output_cross.as_ref().map_or(0.0, own) + self.cross.as_ref().map_or(0.0, product)
    }

    /// E = W C + S of `own` of some rows, one after the other.
    fn of_rows(&self, rows: &Rows<'_>, own: Range<usize>) -> Vec<f32> {
        let n = rows.w.cols();
        let n_own = own.len();
        let own = own.start * n..own.end * n;
        let mut drift = match &self.output_cross {
            Some(output) => output.data()[rows.first * n..][own.clone()].to_vec(),
            None => vec![0.0; own.len()],
        };
        if let Some(cross) = &self.cross {
            let w = MatRef::from_row_major_slice(&rows.w.data()[own], n_own, n);
            let out = MatMut::from_row_major_slice_mut(&mut drift, n_own, n);
            matmul(out, Accum::Add, w, cross.as_faer(), 1.0, Par::Seq);
        }
        drift
    }

    /// `rows` of E become those of E H⁻¹.
    fn solve(&self, factor: &Factor, rows: &mut [f32], n: usize) {
        let order = &factor.order;
        let triangle = Triangle {
            unit_upper: factor.hessian_lower(),
            pivots: &self.pivots,
            order,
            mean: self.mean,
        };
        let unit = 1.0 / self.mean;
        let mut ordered = vec![0.0; rows.len()];
        for (ordered, row) in ordered.chunks_exact_mut(n).zip(rows.chunks_exact(n)) {
            for (value, column) in ordered.iter_mut().zip(order) {
                *value = (f64::from(row[*column]) * unit) as f32;
            }
        }
        let band = MatMut::from_row_major_slice_mut(&mut ordered, rows.len() / n, n);
        triangle.solve(0, band, |_, _| true);
        for (ordered, row) in ordered.chunks_exact(n).zip(rows.chunks_exact_mut(n)) {
            for (value, column) in ordered.iter().zip(order) {
                row[*column] = *value;
            }
        }
    }
}
