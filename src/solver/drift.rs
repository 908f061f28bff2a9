//! The drift of the inputs, C = (F − U) Ω Uᵀ, made into what a solver corrects it with.
//!
//! The error that counts is ‖Q U − W F‖², the layer's output against what it was in full precision.
//! Two ways to it:
//! - **pull** (GPTAQ): column q hands on w_q · P_qj to each later column j, with
//!   P_q,>q = C_q,>q (H_>q,>q)⁻¹. For all q at once, with H = R D Rᵀ: solve X Rᵀ = C, drop X's lower
//!   triangle and diagonal, divide its columns by D, solve P R = X.
//! - **shift**: the weight that full-precision inputs would ask for is known in closed form,
//!   W* = W + W C H⁻¹, and ‖Q U − W F‖² = ‖(Q − W*) U‖² + what no Q changes. So W* is what is
//!   rounded. M = C H⁻¹ is the same two triangular solves with nothing dropped.
//!
//! A row needs no other row of C, so bands of rows are solved one by one; a second square would
//! not fit beside H and C of a wide linear.
//!
//! Cost: n³/3 multiply-adds for the pull, n³ for the shift. Source: arXiv:2504.02692 §3 for the
//! pull; the shift is the normal equation of the same objective.

use crate::Matrix;
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::{
    solve_unit_lower_triangular_in_place, solve_unit_upper_triangular_in_place,
};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows that are solved together.
const BAND_ROWS: usize = 128;

/// R and D of H = R D Rᵀ in solving order, and what H was divided by.
pub(super) struct Triangle<'a> {
    /// R, read strictly above the diagonal.
    pub(super) unit_upper: &'a Matrix,
    /// D.
    pub(super) pivots: &'a [f32],
    /// Original index of the column at each position.
    pub(super) order: &'a [usize],
    pub(super) mean: f64,
}

/// P for α = 1 in solving order, above the diagonal of the result; what lies elsewhere is of no
/// meaning.
///
/// Shapes: `cross [in, in]` in original order.
pub(super) fn pull(mut cross: Matrix, triangle: &Triangle<'_>) -> Matrix {
    bring_into_order(&mut cross, triangle.order, triangle.mean);
    let n = triangle.order.len();
    let bands = cross
        .data_mut()
        .par_chunks_mut(BAND_ROWS * n.max(1))
        .enumerate();
    bands.for_each(|(index, band)| {
        let start = index * BAND_ROWS;
        let n_rows = band.len() / n;
        let band = MatMut::from_row_major_slice_mut(band, n_rows, n).subcols_mut(start, n - start);
        triangle.solve(start, band, |i, j| j > i);
    });
    cross
}

/// M = C H⁻¹ for α = 1 in original order.
///
/// Shapes: `cross [in, in]` in original order.
pub(super) fn shift(mut cross: Matrix, triangle: &Triangle<'_>) -> Matrix {
    bring_into_order(&mut cross, triangle.order, triangle.mean);
    let n = triangle.order.len();
    let bands = cross.data_mut().par_chunks_mut(BAND_ROWS * n.max(1));
    bands.for_each(|band| {
        let n_rows = band.len() / n;
        let band = MatMut::from_row_major_slice_mut(band, n_rows, n);
        triangle.solve(0, band, |_, _| true);
    });
    let mut positions = vec![0; n];
    let places = triangle.order.iter().zip(0..);
    places.for_each(|(column, position)| positions[*column] = position);
    bring_into_order(&mut cross, &positions, 1.0);
    cross
}

/// W + α W M.
///
/// Shapes: `w [out, in]`, `shift [in, in]`.
pub(super) fn shifted(w: &Matrix, shift: &Matrix, alpha: f32) -> Matrix {
    let n = w.cols().max(1);
    let mut target = w.clone();
    let bands = target.data_mut().par_chunks_mut(BAND_ROWS * n);
    let bands = bands.zip(w.data().par_chunks(BAND_ROWS * n));
    bands.for_each(|(target, w)| {
        let n_rows = w.len() / n;
        let w = MatRef::from_row_major_slice(w, n_rows, n);
        let target = MatMut::from_row_major_slice_mut(target, n_rows, n);
        matmul(target, Accum::Add, w, shift.as_faer(), alpha, Par::Seq);
    });
    target
}

impl Triangle<'_> {
    /// The rows of `band`, X, become Y with Y R D Rᵀ = X, where R and D are those of the columns from
    /// `start` on. Half-way, entries (row, column) that `is_kept` does not want become zero.
    fn solve(
        &self,
        start: usize,
        mut band: MatMut<'_, f32>,
        is_kept: impl Fn(usize, usize) -> bool,
    ) {
        let n = self.order.len() - start;
        let unit = self.unit_upper.as_faer().submatrix(start, start, n, n);
        solve_unit_upper_triangular_in_place(unit, band.as_mut().transpose_mut(), Par::Seq);
        for (i, row) in band.as_mut().row_iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = match is_kept(i, j) {
                    true => *value / self.pivots[start + j],
                    false => 0.0,
                };
            }
        }
        let columns = band.transpose_mut();
        solve_unit_lower_triangular_in_place(unit.transpose(), columns, Par::Seq);
    }
}

/// Entry (i, j) becomes C[order[i], order[j]] / mean.
fn bring_into_order(cross: &mut Matrix, order: &[usize], mean: f64) {
    let n = order.len().max(1);
    let rows = cross.data_mut().par_chunks_mut(n);
    rows.for_each_init(
        || vec![0.0; n],
        |source, row| {
            source.copy_from_slice(row);
            for (value, column) in row.iter_mut().zip(order) {
                *value = (f64::from(source[*column]) / mean) as f32;
            }
        },
    );
    permute_rows(cross, order);
}

/// Row i becomes row order[i], along the cycles of the permutation.
fn permute_rows(matrix: &mut Matrix, order: &[usize]) {
    let n = matrix.cols();
    let mut is_done = vec![false; order.len()];
    for start in 0..order.len() {
        if is_done[start] {
            continue;
        }
        let first = matrix.row(start).to_vec();
        let mut row = start;
        loop {
            is_done[row] = true;
            let source = order[row];
            if source == start {
                break;
            }
            matrix
                .data_mut()
                .copy_within(source * n..(source + 1) * n, row * n);
            row = source;
        }
        matrix.row_mut(row).copy_from_slice(&first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_follow_the_order() {
        let order = [3, 1, 0, 2, 5, 4];
        let mut matrix = Matrix::from_fn(6, 2, |i, j| (10 * i + j) as f32);
        permute_rows(&mut matrix, &order);
        for (i, source) in order.iter().enumerate() {
            assert_eq!(
                matrix.row(i),
                [10.0 * *source as f32, 10.0 * *source as f32 + 1.0]
            );
        }
    }
}
