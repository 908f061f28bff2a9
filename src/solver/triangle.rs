//! H and the factor of its inverse in one square.
//!
//! On and below the diagonal lies H as it was summed up; above it, the factor is made, in place.
//! A second square would not fit: for the widest linear of a 32B model one has 3 GB.
//!
//! U needs neither H⁻¹ nor a second Cholesky: reverse the order of H's rows and columns, factor
//! that as LLᵀ, invert L, and reverse back; the result is upper triangular and its UᵀU is H⁻¹.
//! L is kept by columns, which is the upper half of a square kept by rows, so that every numeric
//! kernel runs along memory.
//!
//! Cost: n³/3 multiply-adds each for Cholesky and inverse, in f32. Rounding errors are those of the
//! matrix scaled to a unit diagonal, which the damping keeps far from singular.

use crate::Matrix;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::{
    solve_lower_triangular_in_place, solve_upper_triangular_in_place,
};
use faer::{Accum, Mat, MatMut, Par, Spec};
use rayon::prelude::*;

/// Rows gathered before they are written.
const BAND_ROWS: usize = 256;

/// Side of the tiles that are mirrored together.
const TILE: usize = 32;

/// Columns of a triangle that is factored and inverted out of place.
const SMALL: usize = 64;

/// A square whose lower half is H and whose upper half is being worked on.
pub(super) struct Halves {
    square: Matrix,
    /// H's, while its place is needed.
    diagonal: Vec<f32>,
}

impl Halves {
    /// Takes H, of which only the lower triangle is read.
    pub(super) fn new(hessian_lower: Matrix) -> Self {
        let diagonal = (0..hessian_lower.rows()).map(|i| hessian_lower[(i, i)]);
        Self {
            diagonal: diagonal.collect(),
            square: hessian_lower,
        }
    }

    /// diag(H).
    pub(super) fn diagonal(&self) -> &[f32] {
        &self.diagonal
    }

    /// H_ij, i ≠ j.
    pub(super) fn off_diagonal(&self, i: usize, j: usize) -> f32 {
        self.square[(i.max(j), i.min(j))]
    }

    /// Sets the triangle that is to be factored: entry (i, j), i ≥ j, is `entry(self, i, j)`.
    pub(super) fn fill(&mut self, entry: impl Fn(&Self, usize, usize) -> f32 + Sync) {
        let n = self.diagonal.len();
        for start in (0..n).step_by(BAND_ROWS) {
            let columns = (start..n.min(start + BAND_ROWS)).into_par_iter();
            let columns = columns.map(|j| (j..n).map(|i| entry(self, i, j)).collect());
            let columns: Vec<Vec<f32>> = columns.collect();
            for (j, column) in (start..).zip(&columns) {
                self.square.row_mut(j)[j..].copy_from_slice(column);
            }
        }
    }

    /// Factors the triangle into L; the index of the first pivot that is not sound otherwise.
    pub(super) fn factor(&mut self) -> Result<(), usize> {
        let n = self.diagonal.len();
        let before: Vec<f32> = (0..n).map(|i| self.square[(i, i)]).collect();
        factor_in_place(self.lower())?;
        // A pivot is a difference of up to n terms of the size of its diagonal, each with a
        // rounding error: below that it is noise.
        let noise = f32::EPSILON * (n as f32).sqrt();
        let is_sound = |i: usize| self.square[(i, i)].powi(2) > noise * before[i];
        (0..n).find(|i| !is_sound(*i)).map_or(Ok(()), Err)
    }

    /// L becomes L⁻¹.
    pub(super) fn invert(&mut self) {
        invert_in_place(self.lower());
    }

    /// L⁻¹ becomes U, its rows divided by their diagonal; gives U_ii² and puts H's diagonal back.
    pub(super) fn into_unit_upper(mut self) -> (Matrix, Vec<f32>) {
        mirror(&mut self.square);
        let n = self.diagonal.len().max(1);
        let rows = self.square.data_mut().par_chunks_mut(n);
        let rows = rows.zip(&self.diagonal).enumerate();
        let squares = rows.map(|(i, (row, diagonal))| {
            let pivot = std::mem::replace(&mut row[i], *diagonal);
            row[i + 1..].iter_mut().for_each(|value| *value /= pivot);
            pivot * pivot
        });
        let squares = squares.collect();
        (self.square, squares)
    }

    /// The upper half seen as a lower one, by columns.
    fn lower(&mut self) -> MatMut<'_, f32> {
        self.square.as_faer_mut().transpose_mut()
    }
}

/// L of a lower triangle, halves first: [A ·; B D] → [L 0; BL⁻ᵀ M] with LLᵀ = A and
/// MMᵀ = D − (BL⁻ᵀ)(BL⁻ᵀ)ᵀ. faer's own factorization uses the half above for its work.
fn factor_in_place(lower: MatMut<'_, f32>) -> Result<(), usize> {
    let n = lower.nrows();
    if n <= SMALL {
        return factor_small(lower);
    }
    let (mut a, _, mut b, mut d) = lower.split_at_mut(n / 2, n / 2);
    factor_in_place(a.as_mut())?;
    let parallelism = Par::rayon(0);
    solve_lower_triangular_in_place(a.as_ref(), b.as_mut().transpose_mut(), parallelism);
    triangular::matmul(
        d.as_mut(),
        BlockStructure::TriangularLower,
        Accum::Add,
        b.as_ref(),
        BlockStructure::Rectangular,
        b.as_ref().transpose(),
        BlockStructure::Rectangular,
        -1.0,
        parallelism,
    );
    factor_in_place(d).map_err(|pivot| n / 2 + pivot)
}

fn factor_small(mut lower: MatMut<'_, f32>) -> Result<(), usize> {
    let n = lower.nrows();
    let mut factor = lower.to_owned();
    let scratch = cholesky_in_place_scratch::<f32>(n, Par::Seq, Spec::default());
    let outcome = cholesky_in_place(
        factor.as_mut(),
        Default::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    );
    if let Err(LltError::NonPositivePivot { index }) = outcome {
        return Err(index);
    }
    copy_lower(&mut lower, &factor);
    Ok(())
}

/// The inverse of a lower triangle, halves first: [A 0; B D]⁻¹ = [A⁻¹ 0; −D⁻¹BA⁻¹ D⁻¹].
fn invert_in_place(lower: MatMut<'_, f32>) {
    let n = lower.nrows();
    if n <= SMALL {
        return invert_small(lower);
    }
    let (mut a, _, mut b, mut d) = lower.split_at_mut(n / 2, n / 2);
    let parallelism = Par::rayon(0);
    solve_lower_triangular_in_place(d.as_ref(), b.as_mut(), parallelism);
    let transposed = b.as_mut().transpose_mut();
    solve_upper_triangular_in_place(a.as_ref().transpose(), transposed, parallelism);
    for column in b.col_iter_mut() {
        column.iter_mut().for_each(|value| *value = -*value);
    }
    invert_in_place(a.as_mut());
    invert_in_place(d.as_mut());
}

fn invert_small(mut lower: MatMut<'_, f32>) {
    let n = lower.nrows();
    let mut inverse = Mat::<f32>::zeros(n, n);
    invert_lower_triangular(inverse.as_mut(), lower.as_ref(), Par::Seq);
    copy_lower(&mut lower, &inverse);
}

fn copy_lower(lower: &mut MatMut<'_, f32>, source: &Mat<f32>) {
    for j in 0..source.ncols() {
        for i in j..source.nrows() {
            lower[(i, j)] = source[(i, j)];
        }
    }
}

/// Mirrors the upper triangle at the antidiagonal: (i, j) changes places with (n−1−j, n−1−i).
fn mirror(square: &mut Matrix) {
    let n = square.rows();
    for tile_i in (0..n).step_by(TILE) {
        for tile_j in (tile_i..n).step_by(TILE) {
            for i in tile_i..n.min(tile_i + TILE) {
                for j in tile_j.max(i)..n.min(tile_j + TILE).min(n - 1 - i) {
                    square
                        .data_mut()
                        .swap(i * n + j, (n - 1 - j) * n + n - 1 - i);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// U is what its definition says, UᵀU = H⁻¹, and H is left alone, at sizes around all blocks.
    #[test]
    fn the_factor_inverts_and_leaves_the_lower_half_alone() {
        for n in [1usize, 2, 31, 64, 65, 130, 300, 777] {
            let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
            let x = Matrix::from_fn(2 * n, n, |_, _| rng.random_range(-1.0f32..1.0));
            let gram = x.as_faer().transpose() * x.as_faer();
            let garbage = f32::NAN;
            let lower = |i: usize, j: usize| if j <= i { gram[(i, j)] } else { garbage };
            let lower = Matrix::from_fn(n, n, lower);
            let mut halves = Halves::new(lower.clone());
            let reversed = |i: usize| n - 1 - i;
            halves.fill(|halves, i, j| match i == j {
                true => halves.diagonal()[reversed(i)] + 1.0,
                false => halves.off_diagonal(reversed(i), reversed(j)),
            });
            halves.factor().unwrap();
            halves.invert();
            let (square, squares) = halves.into_unit_upper();
            for i in 0..n {
                assert_eq!(square.row(i)[..=i], lower.row(i)[..=i], "row {i} of {n}");
            }
            // H' UᵀU = 1, with H' damped by one.
            let upper = Mat::from_fn(n, n, |i, j| {
                let unit = if i < j {
                    square[(i, j)]
                } else {
                    f32::from(i == j)
                };
                f64::from(unit) * f64::from(squares[i]).sqrt()
            });
            let damped = Mat::from_fn(n, n, |i, j| {
                f64::from(gram[(i.max(j), i.min(j))]) + f64::from(u8::from(i == j))
            });
            let product = &damped * upper.transpose() * &upper;
            for i in 0..n {
                for j in 0..n {
                    let expected = f64::from(u8::from(i == j));
                    let error = (product[(i, j)] - expected).abs();
                    assert!(error < 1e-4, "({i}, {j}) of {n}: {error}");
                }
            }
        }
    }
}
