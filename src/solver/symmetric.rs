//! Products with H, of which only the lower triangle is kept: above it another matrix may lie.

use crate::Matrix;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use std::ops::Range;

/// The square of H on the diagonal, both triangles filled from the lower.
pub(super) fn corner(hessian_lower: &Matrix, start: usize, width: usize) -> Matrix {
    Matrix::from_fn(width, width, |i, j| {
        hessian_lower[(start + i.max(j), start + i.min(j))]
    })
}

/// `out` += `factor` · `own` · H of the columns `range`, for all columns but these; the range's own are
/// left to [`corner`].
///
/// Shapes: `own [rows, range]`, `out [rows, in]`.
pub(super) fn add_outside(
    hessian_lower: &Matrix,
    own: MatRef<'_, f32>,
    range: Range<usize>,
    factor: f32,
    mut out: MatMut<'_, f32>,
) {
    let (n, len) = (hessian_lower.cols(), range.len());
    let hessian = hessian_lower.as_faer();
    let mut add = |columns: Range<usize>, h: MatRef<'_, f32>| {
        let out = out.as_mut().subcols_mut(columns.start, columns.len());
        matmul(out, Accum::Add, own, h, factor, Par::Seq);
    };
    let before = hessian.submatrix(range.start, 0, len, range.start);
    add(0..range.start, before);
    let after = hessian.submatrix(range.end, range.start, n - range.end, len);
    add(range.end..n, after.transpose());
}
