//! GPTAQ's pull towards the full-precision stream, in the place of C.
//!
//! Column q hands on w_q · P_qj to each later column j, with P_q,>q = C_q,>q (H_>q,>q)⁻¹. For all q
//! at once, with H = R D Rᵀ: solve X Rᵀ = C, drop X's lower triangle and diagonal, divide its columns
//! by D, solve P R = X. A row of P needs no other row of C, so bands of rows become P one by one; a
//! second square would not fit beside H and C of a wide linear.
//!
//! Cost: n³/3 multiply-adds. Source: arXiv:2504.02692 §3.

use crate::Matrix;
use faer::linalg::triangular_solve::{
    solve_unit_lower_triangular_in_place, solve_unit_upper_triangular_in_place,
};
use faer::{MatMut, Par};
use rayon::prelude::*;

/// Rows that become P together.
const BAND_ROWS: usize = 128;

/// P for α = 1 above the diagonal of the result; what lies elsewhere is of no meaning.
///
/// Shapes: `cross [in, in]` in original order; `unit_upper [in, in]` read strictly above its
/// diagonal: R in solving `order`, with D in `pivots`. `mean` is what H was divided by.
pub(super) fn pull(
    mut cross: Matrix,
    order: &[usize],
    mean: f64,
    unit_upper: &Matrix,
    pivots: &[f32],
) -> Matrix {
    bring_into_order(&mut cross, order, mean);
    let n = order.len().max(1);
    let bands = cross.data_mut().par_chunks_mut(BAND_ROWS * n).enumerate();
    bands.for_each(|(index, band)| {
        let start = index * BAND_ROWS;
        let n_rows = band.len() / n;
        let unit = unit_upper
            .as_faer()
            .submatrix(start, start, n - start, n - start);
        let mut band =
            MatMut::from_row_major_slice_mut(band, n_rows, n).subcols_mut(start, n - start);
        let columns = band.as_mut().transpose_mut();
        solve_unit_upper_triangular_in_place(unit, columns, Par::Seq);
        for (i, row) in band.as_mut().row_iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = if j > i {
                    *value / pivots[start + j]
                } else {
                    0.0
                };
            }
        }
        let columns = band.as_mut().transpose_mut();
        solve_unit_lower_triangular_in_place(unit.transpose(), columns, Par::Seq);
    });
    cross
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
