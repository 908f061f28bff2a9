//! H and its triangular factor in one square.
//!
//! On and below the diagonal lies H as it was summed up; above it, the factor is made, in place.
//! A second square would not fit: for the widest linear of a 32B model one has 3 GB.
//!
//! H = R D Rᵀ with an *upper* R: reverse the order of H's rows and columns, factor that as LLᵀ, and
//! reverse back; each column divided by its diagonal is one of R, the diagonal squared is D.
//! L is kept by columns, which is the upper half of a square kept by rows, so that every numeric
//! kernel runs along memory.
//!
//! Cost: n³/6 multiply-adds, in f32. Rounding errors are those of the matrix scaled to a unit
//! diagonal, which the damping keeps far from singular.

use super::factor::pivot_noise;
use crate::Matrix;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Accum, Mat, MatMut, Par, Spec};
use rayon::prelude::*;

/// Columns gathered before they are written.
const BAND_COLS: usize = 256;

/// Side of the tiles that are mirrored together.
const TILE: usize = 32;

/// Columns of a triangle that is factored out of place.
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

    /// H's largest eigenvalue, by power iteration from a vector of ones. From below: a start at right angles
    /// to the eigenvector would miss it, which entries of one sign, as second moments mostly have, make
    /// unlikely.
    pub(super) fn largest_eigenvalue(&self) -> f64 {
        const N_STEPS: usize = 30;
        let n = self.diagonal.len();
        let mut vector = vec![1.0 / (n as f64).sqrt(); n];
        let mut value = 0.0;
        for _ in 0..N_STEPS {
            let product = self.times(&vector);
            value = product.iter().map(|v| v * v).sum::<f64>().sqrt();
            if !(value > 0.0 && value.is_finite()) {
                return value;
            }
            vector = product.iter().map(|v| v / value).collect();
        }
        value
    }

    /// H x.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let n = x.len();
        let mut product = vec![0.0; n];
        for (i, row) in self.square.data().chunks_exact(n.max(1)).enumerate() {
            let (own, above) = (x[i], &mut product[..i]);
            let mut sum = f64::from(self.diagonal[i]) * own;
            for ((above, x), value) in above.iter_mut().zip(x).zip(row) {
                *above += f64::from(*value) * own;
                sum += f64::from(*value) * x;
            }
            product[i] += sum;
        }
        product
    }

    /// Sets the triangle that is to be factored to H in `order`: entry (i, j), i ≥ j, becomes
    /// `entry(a, b, H_ab)` with a and b the original indices at i and j.
    pub(super) fn fill(
        &mut self,
        order: &[usize],
        entry: impl Fn(usize, usize, f32) -> f32 + Sync,
    ) {
        let n = order.len();
        let mut positions = vec![0; n];
        order.iter().zip(0..).for_each(|(a, i)| positions[*a] = i);
        let mut band = vec![0.0; n * BAND_COLS.min(n)];
        for start in (0..n).step_by(BAND_COLS) {
            let own = &order[start..n.min(start + BAND_COLS)];
            let rows = band.par_chunks_mut(own.len()).zip(&positions).enumerate();
            let rows = rows.filter(|(_, (_, position))| **position >= start);
            rows.for_each(|(a, (row, _))| self.gather(a, own, row));
            let columns = self.square.data_mut()[start * n..].par_chunks_mut(n * TILE);
            let columns = columns.zip(own.par_chunks(TILE)).enumerate();
            columns.for_each(|(tile, (columns, tile_own))| {
                let first = tile * TILE;
                for (i, a) in order.iter().enumerate().skip(start + first) {
                    let values = &band[a * own.len() + first..];
                    let n_below = tile_own.len().min(i + 1 - start - first);
                    let values = values.iter().zip(&tile_own[..n_below]).enumerate();
                    values.for_each(|(k, (value, b))| columns[k * n + i] = entry(*a, *b, *value));
                }
            });
        }
        for (column, index) in order.iter().enumerate() {
            self.square[(column, column)] = entry(*index, *index, self.diagonal[*index]);
        }
    }

    /// H's entries in row `a` and the columns `own`, but for its diagonal. Row after row, so that
    /// what is read down a column of the lower half stays in the cache while its line is used.
    fn gather(&self, a: usize, own: &[usize], values: &mut [f32]) {
        let (n, square) = (self.square.cols(), self.square.data());
        let values = values.iter_mut().zip(own);
        // No branches: either side of the diagonal is as likely.
        values.for_each(|(value, b)| *value = square[a.max(*b) * n + a.min(*b)]);
    }

    /// Factors the triangle into L; the index of the first pivot that is not sound otherwise.
    pub(super) fn factor(&mut self) -> Result<(), usize> {
        let n = self.diagonal.len();
        let before: Vec<f32> = (0..n).map(|i| self.square[(i, i)]).collect();
        factor_in_place(self.lower())?;
        let noise = pivot_noise(n);
        let is_sound = |i: usize| self.square[(i, i)].powi(2) > noise * before[i];
        (0..n).find(|i| !is_sound(*i)).map_or(Ok(()), Err)
    }

    /// L becomes R; gives D and puts H's diagonal back.
    pub(super) fn into_unit_upper(mut self) -> (Matrix, Vec<f32>) {
        mirror(&mut self.square);
        let n = self.diagonal.len().max(1);
        let roots: Vec<f32> = (0..self.diagonal.len())
            .map(|i| self.square[(i, i)])
            .collect();
        let rows = self.square.data_mut().par_chunks_mut(n);
        let rows = rows.zip(&self.diagonal).enumerate();
        rows.for_each(|(i, (row, diagonal))| {
            row[i] = *diagonal;
            let values = row.iter_mut().zip(&roots).skip(i + 1);
            values.for_each(|(value, root)| *value /= root);
        });
        (self.square, roots.iter().map(|root| root * root).collect())
    }

    /// H as it was taken, where nothing was filled in; what lies above the diagonal is of no meaning.
    pub(super) fn into_hessian(self) -> Matrix {
        self.square
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

    #[test]
    fn the_largest_eigenvalue_is_found() {
        for n in [1usize, 5, 40] {
            let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
            let x = Matrix::from_fn(2 * n, n, |_, _| rng.random_range(-0.2f32..1.0));
            let gram = x.as_faer().transpose() * x.as_faer();
            let halves = Halves::new(Matrix::from_fn(n, n, |i, j| gram[(i, j)]));
            let exact = gram.self_adjoint_eigenvalues(faer::Side::Lower).unwrap();
            let largest = f64::from(exact[n - 1]);
            let found = halves.largest_eigenvalue();
            // f32 entries; the second eigenvalue is far below, as the entries have a mean.
            assert!(
                (found - largest).abs() < 1e-5 * largest,
                "{found} {largest}"
            );
        }
    }

    /// R D Rᵀ = H, and H is left alone, at sizes around all blocks.
    #[test]
    fn the_factor_is_of_h_and_leaves_the_lower_half_alone() {
        for n in [1usize, 2, 31, 64, 65, 130, 300, 777] {
            let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
            let x = Matrix::from_fn(2 * n, n, |_, _| rng.random_range(-1.0f32..1.0));
            let gram = x.as_faer().transpose() * x.as_faer();
            let garbage = f32::NAN;
            let lower = |i: usize, j: usize| if j <= i { gram[(i, j)] } else { garbage };
            let lower = Matrix::from_fn(n, n, lower);
            let mut halves = Halves::new(lower.clone());
            let reversed: Vec<usize> = (0..n).rev().collect();
            halves.fill(&reversed, |i, j, value| match i == j {
                true => value + 1.0,
                false => value,
            });
            halves.factor().unwrap();
            let (square, pivots) = halves.into_unit_upper();
            for i in 0..n {
                assert_eq!(square.row(i)[..=i], lower.row(i)[..=i], "row {i} of {n}");
            }
            // R √D, and H' = R D Rᵀ with H' damped by one.
            let upper = Mat::from_fn(n, n, |i, j| {
                let unit = if i < j {
                    square[(i, j)]
                } else {
                    f32::from(i == j)
                };
                f64::from(unit) * f64::from(pivots[j]).sqrt()
            });
            let product = &upper * upper.transpose();
            for i in 0..n {
                for j in 0..n {
                    let damped =
                        f64::from(gram[(i.max(j), i.min(j))]) + f64::from(u8::from(i == j));
                    let error = (product[(i, j)] - damped).abs();
                    assert!(error < 1e-5 * n as f64, "({i}, {j}) of {n}: {error}");
                }
            }
        }
    }
}
