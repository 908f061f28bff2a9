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
//! on samples that were held out ([`row_alphas`]).
//!
//! Cost: 2 · out · in² multiply-adds; with α found on held-out samples three times that, and the factor of
//! a second Hessian. Source: the normal equations of GPTAQ's objective (arXiv:2504.02692 eq. 3);
//! S and α by row are ours.

use super::drift::Triangle;
use super::factor::Factor;
use super::loss::{dot, quadratic_forms};
use crate::Matrix;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

/// Rows that are solved together.
const BAND_ROWS: usize = 64;

/// C and S, and what is needed to solve with H.
pub(super) struct Drift {
    /// C, original order.
    pub(super) cross: Matrix,
    /// S `[out, in]`, original order; absent for a linear whose output is not added to the stream, or
    /// whose stream does not count.
    pub(super) stream_cross: Option<Matrix>,
    /// D of H = R D Rᵀ, in units of H's mean.
    pub(super) pivots: Vec<f32>,
    pub(super) mean: f64,
}

/// W + α E H⁻¹, and the mean of α over rows.
///
/// Shapes: `w [out, in]`, a factor of the same `in`.
pub(super) fn target(w: &Matrix, factor: &Factor, drift: &Drift, alpha: f32) -> (Matrix, f32) {
    let n = w.cols();
    let chosen = factor.part.as_deref().and_then(|part| {
        let part_drift = part.drift_moments()?;
        Some(row_alphas(w, (factor, drift), (part, part_drift)))
    });
    let alphas = chosen.unwrap_or_else(|| vec![alpha; w.rows()]);
    let mut target = w.clone();
    let bands = target.data_mut().par_chunks_mut(BAND_ROWS * n.max(1));
    bands.enumerate().for_each(|(index, band)| {
        let start = index * BAND_ROWS;
        let rows = start..start + band.len() / n;
        let mut correction = drift.of_rows(w, rows.clone());
        drift.solve(factor, &mut correction, n);
        let pairs = band.chunks_exact_mut(n).zip(correction.chunks_exact(n));
        for ((target, correction), alpha) in pairs.zip(&alphas[rows]) {
            let pairs = target.iter_mut().zip(correction);
            pairs.for_each(|(target, correction)| *target += alpha * correction);
        }
    });
    let mean = alphas.iter().sum::<f32>() / alphas.len().max(1) as f32;
    (target, mean)
}

/// Where the first column in solving order alone would make up for the drift: w + α E_q / H_qq, by row.
/// Qronos rounds it from there (arXiv:2505.11695, first step).
pub(super) fn first_values(w: &Matrix, factor: &Factor, drift: &Drift, alpha: f32) -> Vec<f32> {
    let Some(first) = factor.order.first().copied() else {
        return Vec::new();
    };
    let energy = f64::from(factor.hessian_lower()[(first, first)]);
    let value = |row: usize| {
        let weights = w.row(row).iter().enumerate();
        let products = weights.map(|(i, w)| f64::from(*w) * f64::from(drift.cross[(i, first)]));
        let gain = if energy > 0.0 {
            products.sum::<f64>() / energy
        } else {
            0.0
        };
        (f64::from(w[(row, first)]) + f64::from(alpha) * gain) as f32
    };
    (0..w.rows()).into_par_iter().map(value).collect()
}

/// α of each row, by how far a correction found on a part of the samples serves the rest.
///
/// With T = E H⁻¹ of the part, the rest's error is least at a = ⟨T, E⟩ / (T H Tᵀ), E and H those of the
/// rest. All samples together estimate T better than a part did. A correction of which a share a/(1 − a)
/// is signal for each share of noise has twice that with twice the samples: α = 2a / (1 + a).
fn row_alphas(
    w: &Matrix,
    (whole, whole_drift): (&Factor, &Drift),
    (part, part_drift): (&Factor, &Drift),
) -> Vec<f32> {
    let n = w.cols();
    let starts: Vec<usize> = (0..w.rows()).step_by(BAND_ROWS).collect();
    let bands = starts.into_par_iter().map(|start| {
        let rows = start..w.rows().min(start + BAND_ROWS);
        let in_part = part_drift.of_rows(w, rows.clone());
        let in_whole = whole_drift.of_rows(w, rows);
        let mut correction = in_part.clone();
        part_drift.solve(part, &mut correction, n);
        let energies = |factor: &Factor| quadratic_forms(&correction, n, factor.hessian_lower());
        let (in_all, in_own) = (energies(whole), energies(part));
        let alpha = |row: usize| {
            let of = |values: &[f32]| dot(&correction[row * n..][..n], &values[row * n..][..n]);
            row_alpha(of(&in_whole) - of(&in_part), in_all[row] - in_own[row])
        };
        (0..in_all.len()).map(alpha).collect::<Vec<f32>>()
    });
    bands.collect::<Vec<_>>().concat()
}

/// α from what a whole correction gains on held-out samples and what it costs there.
fn row_alpha(gain: f64, energy: f64) -> f32 {
    if !(gain > 0.0 && energy > 0.0) {
        return 0.0;
    }
    let half = (gain / energy).min(1.0);
    (2.0 * half / (1.0 + half)) as f32
}

impl Drift {
    /// The rows' E = W C + S, one after the other.
    fn of_rows(&self, w: &Matrix, rows: Range<usize>) -> Vec<f32> {
        let n = w.cols();
        let mut drift = match &self.stream_cross {
            Some(stream) => stream.data()[rows.start * n..rows.end * n].to_vec(),
            None => vec![0.0; rows.len() * n],
        };
        let w = &w.data()[rows.start * n..rows.end * n];
        let w = MatRef::from_row_major_slice(w, rows.len(), n);
        let out = MatMut::from_row_major_slice_mut(&mut drift, rows.len(), n);
        matmul(out, Accum::Add, w, self.cross.as_faer(), 1.0, Par::Seq);
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
        let mut ordered = vec![0.0; rows.len()];
        for (ordered, row) in ordered.chunks_exact_mut(n).zip(rows.chunks_exact(n)) {
            for (value, column) in ordered.iter_mut().zip(order) {
                *value = (f64::from(row[*column]) / self.mean) as f32;
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
