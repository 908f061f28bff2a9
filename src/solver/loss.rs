//! The error that a quantized weight makes on the calibration data.

use crate::Matrix;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Columns of H multiplied at once.
const BAND: usize = 256;

/// Rows of the weight handled by one thread.
const CHUNK_ROWS: usize = 64;

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
    let chunk_len = CHUNK_ROWS * n.max(1);
    let chunks = w.data().par_chunks(chunk_len);
    let losses: Vec<f64> = chunks
        .zip(q.data().par_chunks(chunk_len))
        .map(|(w, q)| {
            let difference: Vec<f32> = w.iter().zip(q).map(|(w, q)| w - q).collect();
            quadratic_form(&difference, n, hessian)
        })
        .collect();
    losses.iter().sum()
}

/// tr(D H Dᵀ) of the rows D: each band of H's rows meets the columns before it twice, by symmetry.
fn quadratic_form(d: &[f32], n: usize, hessian: &Matrix) -> f64 {
    let n_rows = d.len() / n;
    let d = MatRef::from_row_major_slice(d, n_rows, n);
    let mut sum = 0.0;
    let mut product = vec![0.0f32; n_rows * n];
    for start in (0..n).step_by(BAND) {
        let width = BAND.min(n - start);
        let own = d.subcols(start, width);
        let left = hessian.as_faer().submatrix(start, 0, width, start);
        sum += 2.0 * bilinear(own, left, d.subcols(0, start), &mut product);
        let corner = symmetric_corner(hessian, start, width);
        sum += bilinear(own, corner.as_faer(), own, &mut product);
    }
    sum
}

/// Σ (a · m) ∘ b.
fn bilinear(
    a: MatRef<'_, f32>,
    m: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    scratch: &mut [f32],
) -> f64 {
    let (n_rows, n_cols) = (a.nrows(), m.ncols());
    let scratch = &mut scratch[..n_rows * n_cols];
    let product = MatMut::from_row_major_slice_mut(scratch, n_rows, n_cols);
    matmul(product, Accum::Replace, a, m, 1.0, Par::Seq);
    let mut sum = 0.0;
    for (row, values) in scratch.chunks_exact(n_cols.max(1)).enumerate() {
        let pairs = values.iter().zip(b.row(row).iter());
        sum += pairs
            .map(|(p, b)| f64::from(*p) * f64::from(*b))
            .sum::<f64>();
    }
    sum
}

/// The square of H on the diagonal, both triangles filled from the lower.
fn symmetric_corner(hessian: &Matrix, start: usize, width: usize) -> Matrix {
    Matrix::from_fn(width, width, |i, j| {
        hessian[(start + i.max(j), start + i.min(j))]
    })
}
