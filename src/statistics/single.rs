//! Sums of products in f32.

use crate::Matrix;
use faer::linalg::matmul::triangular::BlockStructure;
use faer::linalg::matmul::{matmul, triangular};
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

/// Rows of the result that one thread sums: enough bands for many cores, each high enough for a
/// product to run at full speed. Depends on the shape only, never on the number of threads.
pub(super) fn band_rows(n_rows: usize) -> usize {
    n_rows.div_ceil(8).clamp(32, 256)
}

/// `target` += lower triangle of `x`ᵀ`x`, x `[n_tokens, in]`.
pub(super) fn add_gram_lower(target: &mut Matrix, x: &Matrix) {
    let n = target.cols();
    if n == 0 || x.rows() == 0 {
        return;
    }
    let band = band_rows(n);
    let x = x.as_faer();
    let bands = target.data_mut().par_chunks_mut(band * n).enumerate();
    bands.for_each(|(index, data)| {
        let (start, height) = (index * band, data.len() / n);
        let rows = MatMut::from_row_major_slice_mut(data, height, n);
        let (left, right) = rows.split_at_col_mut(start);
        let own = x.subcols(start, height);
        let before = x.subcols(0, start);
        matmul(left, Accum::Add, own.transpose(), before, 1.0, Par::Seq);
        triangular::matmul(
            right.subcols_mut(0, height),
            BlockStructure::TriangularLower,
            Accum::Add,
            own.transpose(),
            BlockStructure::Rectangular,
            own,
            BlockStructure::Rectangular,
            1.0,
            Par::Seq,
        );
    });
}

/// `target` += `left`ᵀ`right`, both `[n_tokens, in]`.
pub(super) fn add_product(target: &mut Matrix, left: &Matrix, right: &Matrix) {
    let n = target.cols();
    if n == 0 || left.rows() == 0 {
        return;
    }
    let band = band_rows(n);
    let (left, right) = (left.as_faer(), right.as_faer());
    let bands = target.data_mut().par_chunks_mut(band * n).enumerate();
    bands.for_each(|(index, data)| {
        let height = data.len() / n;
        let rows = MatMut::from_row_major_slice_mut(data, height, n);
        let own = left.subcols(index * band, height).transpose();
        matmul(rows, Accum::Add, own, right, 1.0, Par::Seq);
    });
}
