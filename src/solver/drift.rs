//! GPTAQ's pull: the drift of the inputs, C = (F − U) Ω Uᵀ, handed on by each column as it is rounded.
//!
//! Column q hands on w_q · P_qj to each later column j, with P_q,>q = C_q,>q (H_>q,>q)⁻¹. For all q
//! at once, with H = R D Rᵀ: solve X Rᵀ = C, drop X's lower triangle and diagonal, divide its columns
//! by D, solve P R = X. ([`super::target`] corrects the same drift without the detour.)
//!
//! A row needs no other row of C, so bands of rows are solved one by one; a second square would
//! not fit beside H and C of a wide linear.
//!
//! Cost: n³/3 multiply-adds. Source: arXiv:2504.02692 §3.

use crate::Matrix;
use faer::linalg::triangular_solve::{
    solve_unit_lower_triangular_in_place, solve_unit_upper_triangular_in_place,
};
use faer::{MatMut, Par};
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

impl Triangle<'_> {
    /// The rows of `band`, X, become Y with Y R D Rᵀ = X, where R and D are those of the columns from
    /// `start` on. Half-way, entries (row, column) that `is_kept` does not want become zero.
    pub(super) fn solve(
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
