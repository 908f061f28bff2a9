//! The error that a quantized weight makes on the calibration data.

use super::symmetric::corner;
use crate::{Matrix, QuantizedWeight};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

/// Columns of H multiplied at once.
const BAND: usize = 256;

/// Rows of the weight handled by one thread.
const CHUNK_ROWS: usize = 128;

/// tr((W − Q) H (W − Q)ᵀ) = Σ_n ω_n ‖(W − Q) u_n‖², the squared output error summed over rows and
/// weighted tokens, divided by nothing.
///
/// Shapes: `w` and `q` `[out, in]`, `hessian [in, in]` symmetric, of which only the lower triangle
/// is read. Products are f32, sums over products f64. NaN if the shapes disagree.
pub fn layer_loss(w: &Matrix, q: &Matrix, hessian: &Matrix) -> f64 {
    let n = w.cols();
    let fits = q.rows() == w.rows() && [q.cols(), hessian.rows(), hessian.cols()] == [n; 3];
    if !fits {
        return f64::NAN;
    }
    sum_over_chunks(w.rows(), n, hessian, |rows| {
        let pairs = rows.flat_map(|row| w.row(row).iter().zip(q.row(row)));
        pairs.map(|(w, q)| w - q).collect()
    })
}

/// [`layer_loss`] of a weight on its grid, which is never held as a whole.
pub(crate) fn quantization_loss(w: &Matrix, q: &QuantizedWeight, hessian_lower: &Matrix) -> f64 {
    sum_over_chunks(w.rows(), w.cols(), hessian_lower, |rows| {
        let mut difference = q.dequantize_rows(rows.clone()).into_vec();
        let original = rows.flat_map(|row| w.row(row));
        let pairs = difference.iter_mut().zip(original);
        pairs.for_each(|(q, w)| *q = w - *q);
        difference
    })
}

/// tr(W H Wᵀ), the squared output that a loss is to be compared with; units and layout of
/// [`layer_loss`].
pub(crate) fn weighted_energy(w: &Matrix, hessian_lower: &Matrix) -> f64 {
    sum_over_chunks(w.rows(), w.cols(), hessian_lower, |rows| {
        rows.flat_map(|row| w.row(row)).copied().collect()
    })
}

/// tr(D H Dᵀ), rows of D made when they are needed.
fn sum_over_chunks(
    n_rows: usize,
    n_cols: usize,
    hessian: &Matrix,
    rows: impl Fn(Range<usize>) -> Vec<f32> + Sync,
) -> f64 {
    if n_cols == 0 {
        return 0.0;
    }
    let starts: Vec<usize> = (0..n_rows).step_by(CHUNK_ROWS).collect();
    let sums = starts.into_par_iter().map(|start| {
        let chunk = rows(start..n_rows.min(start + CHUNK_ROWS));
        let forms = quadratic_forms(&chunk, n_cols, hessian);
        forms.iter().sum::<f64>()
    });
    let sums: Vec<f64> = sums.collect();
    sums.iter().sum()
}

/// d H dᵀ of each of the rows d: each band of H's rows meets the columns before it twice, by symmetry.
pub(super) fn quadratic_forms(rows: &[f32], n: usize, hessian_lower: &Matrix) -> Vec<f64> {
    let n_rows = rows.len() / n;
    let view = MatRef::from_row_major_slice(rows, n_rows, n);
    let mut sums = vec![0.0; n_rows];
    let mut product = vec![0.0f32; n_rows * n];
    for start in (0..n).step_by(BAND) {
        let width = BAND.min(n - start);
        let own = view.subcols(start, width);
        let mut add = |matrix: MatRef<'_, f32>, column: usize, times: f64| {
            let n_cols = matrix.ncols();
            let product = &mut product[..n_rows * n_cols];
            let target = MatMut::from_row_major_slice_mut(product, n_rows, n_cols);
            matmul(target, Accum::Replace, own, matrix, 1.0, Par::Seq);
            let pairs = product
                .chunks_exact(n_cols.max(1))
                .zip(rows.chunks_exact(n));
            for (sum, (product, row)) in sums.iter_mut().zip(pairs) {
                *sum += times * dot(product, &row[column..][..n_cols]);
            }
        };
        let before = hessian_lower.as_faer().submatrix(start, 0, width, start);
        add(before, 0, 2.0);
        add(corner(hessian_lower, start, width).as_faer(), start, 1.0);
    }
    sums
}

/// ‖W − Q‖² over the columns that some token of positive weight excited.
pub(crate) fn live_difference(w: &Matrix, q: &QuantizedWeight, hessian_lower: &Matrix) -> f64 {
    let n = w.cols();
    let live: Vec<f32> = (0..n)
        .map(|j| f32::from(hessian_lower[(j, j)] != 0.0))
        .collect();
    let starts: Vec<usize> = (0..w.rows()).step_by(CHUNK_ROWS).collect();
    let sums = starts.into_par_iter().map(|start| {
        let rows = start..w.rows().min(start + CHUNK_ROWS);
        let q = q.dequantize_rows(rows.clone());
        let row_sums = rows.zip(0..).map(|(row, own)| {
            let pairs = w.row(row).iter().zip(q.row(own)).zip(&live);
            let difference: Vec<f32> = pairs.map(|((w, q), live)| live * (w - q)).collect();
            dot(&difference, &difference)
        });
        row_sums.sum()
    });
    let sums: Vec<f64> = sums.collect();
    sums.iter().sum()
}

/// f64 sum of products, in eight interleaved sums so that it vectorises.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0f64; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    let rest = a_rest.iter().zip(b_rest);
    let rest: f64 = rest.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    sums.iter().sum::<f64>() + rest
}
