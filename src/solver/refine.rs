//! Sweeps of coordinate descent over codes and scales.
//!
//! GPTQ decides each code once, knowing what the columns before it became and trusting that those
//! after it can make up for it on a continuum. When all are on the grid, each code can be decided
//! again, given all others: with T the target and E = T − Q, the damped loss tr(E H Eᵀ) is least in
//! q_j at q_j + G_j / H_jj, G = E H, and the nearest point of the grid is the least on the grid. A
//! scale with its codes c fixed is least at s + G·c / (c H cᵀ), which is again rounded to the nearest
//! that can be stored. No step can raise the loss.
//!
//! G is kept up to date as codes change: in a range of columns one by one, for all other columns
//! as one matrix product per range. Rows never meet, so chunks of rows go side by side, whatever the
//! number of threads.
//!
//! Cost: 2 · out · in² multiply-adds per sweep, twice that with scales, and as much once for G.
//! Source: coordinate descent on codes is that of arXiv:2309.01885 (QuantEase); scales with it, ours.

use super::grid::steps;
use super::symmetric::{self, add_outside};
use super::{Factor, SolverSettings};
use crate::plan::Scheme;
use crate::{Matrix, QuantizedWeight, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

/// Columns whose codes change before the others hear of it.
const RANGE_COLS: usize = 128;

/// `weight` after [`SolverSettings::sweeps`] sweeps towards `target`, in chunks of `height` rows.
///
/// Shapes: `target` and `weight` `[out, in]`, a factor of the same `in`.
/// # Errors
/// [`Error::NotFinite`](crate::Error::NotFinite) if a scale overflows its storage type.
pub(super) fn refine(
    module: &str,
    target: &Matrix,
    weight: QuantizedWeight,
    (factor, height): (&Factor, usize),
    settings: &SolverSettings,
) -> Result<QuantizedWeight> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let n_groups = weight.n_groups();
    let problem = Problem {
        target,
        weight: &weight,
        hessian: factor.hessian_lower(),
        damping: factor.damping as f32,
        group_len: cols / n_groups.max(1),
        settings,
    };
    let starts: Vec<usize> = (0..rows).step_by(height).collect();
    let chunks = starts
        .into_par_iter()
        .map(|start| problem.refine_chunk(start..rows.min(start + height)));
    let chunks: Vec<Chunk> = chunks.collect();
    let mut codes = Vec::with_capacity(rows * cols);
    let mut scales = Vec::with_capacity(rows * n_groups);
    for chunk in &chunks {
        for row in 0..chunk.n_rows {
            let zeros = &weight.zero_points()[scales.len()..][..n_groups];
            let steps = chunk.steps.iter().skip(row).step_by(chunk.n_rows);
            let zeros = zeros.iter().flat_map(|z| vec![*z; problem.group_len]);
            codes.extend(steps.zip(zeros).map(|(c, z)| (c + f32::from(z)) as u8));
            scales.extend(chunk.scales.iter().skip(row).step_by(chunk.n_rows));
        }
    }
    let scales = Matrix::from_vec(module, rows, n_groups, scales)?;
    let zero_points = weight.zero_points().to_vec();
    QuantizedWeight::new(
        module,
        weight.scheme(),
        [rows, cols],
        codes,
        scales,
        zero_points,
    )
}

/// What all chunks share.
struct Problem<'a> {
    target: &'a Matrix,
    weight: &'a QuantizedWeight,
    /// H undamped, read on and below the diagonal.
    hessian: &'a Matrix,
    /// What is added to H's diagonal.
    damping: f32,
    group_len: usize,
    settings: &'a SolverSettings,
}

/// Some rows. Buffers run down the rows first, columns in original order.
struct Chunk {
    n_rows: usize,
    /// Q, `[in]` columns.
    values: Vec<f32>,
    /// Codes less zero points, `[in]` columns.
    steps: Vec<f32>,
    /// G = (T − Q) H, `[in]` columns.
    gradient: Vec<f32>,
    /// Products that are on their way into G.
    product: Vec<f32>,
    /// `[n_groups]` columns.
    scales: Vec<f32>,
    zero_points: Vec<f32>,
}

impl Problem<'_> {
    fn refine_chunk(&self, rows: Range<usize>) -> Chunk {
        let mut chunk = Chunk::new(self, rows);
        let n_cols = self.target.cols();
        for _ in 0..self.settings.sweeps {
            for start in (0..n_cols).step_by(self.group_len) {
                let group = start..start + self.group_len;
                for start in group.clone().step_by(RANGE_COLS) {
                    chunk.descend(self, start..group.end.min(start + RANGE_COLS));
                }
                if self.settings.refit_scales {
                    chunk.refit(self, group);
                }
            }
        }
        // All chunks are held until the last is done; what only descending needs is not.
        (chunk.values, chunk.gradient, chunk.product) = (Vec::new(), Vec::new(), Vec::new());
        chunk
    }

    /// H's square of these columns, damped.
    fn corner(&self, range: &Range<usize>) -> Matrix {
        let mut corner = symmetric::corner(self.hessian, range.start, range.len());
        (0..range.len()).for_each(|i| corner[(i, i)] += self.damping);
        corner
    }

    fn is_dead(&self, column: usize) -> bool {
        self.hessian[(column, column)] == 0.0
    }
}

impl Chunk {
    fn new(problem: &Problem<'_>, rows: Range<usize>) -> Self {
        let (n, n_cols) = (rows.len(), problem.target.cols());
        let (weight, group_len) = (problem.weight, problem.group_len);
        let n_groups = weight.n_groups();
        let mut chunk = Self {
            n_rows: n,
            values: vec![0.0; n * n_cols],
            steps: vec![0.0; n * n_cols],
            gradient: vec![0.0; n * n_cols],
            product: vec![0.0; n * n_cols],
            scales: vec![0.0; n * n_groups],
            zero_points: vec![0.0; n * n_groups],
        };
        let mut errors = vec![0.0; n * n_cols];
        for (i, row) in rows.enumerate() {
            for group in 0..n_groups {
                chunk.scales[group * n + i] = weight.scales()[(row, group)];
                let zero = weight.zero_points()[row * n_groups + group];
                chunk.zero_points[group * n + i] = zero.into();
            }
            let codes = &weight.codes()[row * n_cols..][..n_cols];
            for (column, code) in codes.iter().enumerate() {
                let (at, group) = (column * n + i, column / group_len * n + i);
                chunk.steps[at] = f32::from(*code) - chunk.zero_points[group];
                chunk.values[at] = chunk.steps[at] * chunk.scales[group];
                errors[at] = problem.target[(row, column)] - chunk.values[at];
            }
        }
        for start in (0..n_cols).step_by(RANGE_COLS) {
            let range = start..n_cols.min(start + RANGE_COLS);
            let own = &errors[start * n..range.end * n];
            add_product(problem, own, range, 1.0, &mut chunk.gradient, true);
        }
        chunk
    }

    /// Decides the codes of `range`, which lies in one group, anew.
    fn descend(&mut self, problem: &Problem<'_>, range: Range<usize>) {
        let n = self.n_rows;
        let group = range.start / problem.group_len * n;
        let max_code = f32::from(problem.weight.scheme().max_code());
        let corner = problem.corner(&range);
        let mut changes = vec![0.0; range.len() * n];
        let gradient = &mut self.gradient[range.start * n..][..range.len() * n];
        for (local, column) in range.clone().enumerate() {
            if problem.is_dead(column) {
                continue;
            }
            let curvature = corner[(local, local)];
            let own = &gradient[local * n..][..n];
            let values = &mut self.values[column * n..][..n];
            let codes = &mut self.steps[column * n..][..n];
            let change = &mut changes[local * n..][..n];
            for i in 0..n {
                let (scale, zero) = (self.scales[group + i], self.zero_points[group + i]);
                let best = values[i] + own[i] / curvature;
                codes[i] = steps(best, scale, zero, max_code);
                change[i] = codes[i] * scale - values[i];
                values[i] += change[i];
            }
            let factors = corner.row(local);
            for (gradient, factor) in gradient.chunks_exact_mut(n).zip(factors) {
                for (gradient, change) in gradient.iter_mut().zip(&*change) {
                    *gradient -= change * factor;
                }
            }
        }
        add_product(problem, &changes, range, -1.0, &mut self.gradient, false);
    }

    /// Moves the scales of a group to the least loss for its codes.
    fn refit(&mut self, problem: &Problem<'_>, group: Range<usize>) {
        let n = self.n_rows;
        let own = group.start * n..group.end * n;
        let scheme: Scheme = problem.weight.scheme();
        self.product.fill(0.0);
        for start in group.clone().step_by(RANGE_COLS) {
            let range = start..group.end.min(start + RANGE_COLS);
            let steps = &self.steps[start * n..range.end * n];
            add_product(problem, steps, range, 1.0, &mut self.product, true);
        }
        let (mut slopes, mut curvatures) = (vec![0.0f32; n], vec![0.0f32; n]);
        let columns = self.steps[own.clone()].chunks_exact(n);
        let columns = columns.zip(self.gradient[own.clone()].chunks_exact(n));
        let columns = columns.zip(self.product[own.clone()].chunks_exact(n));
        for ((steps, gradient), product) in columns {
            for i in 0..n {
                slopes[i] += steps[i] * gradient[i];
                curvatures[i] += steps[i] * product[i];
            }
        }
        let scales = &mut self.scales[group.start / problem.group_len * n..][..n];
        let mut moves = vec![0.0f32; n];
        for i in 0..n {
            let scale = scheme
                .scale_dtype()
                .round(scales[i] + slopes[i] / curvatures[i]);
            // Codes that are all zero give 0/0; scales stay positive and finite.
            if curvatures[i] > 0.0 && scale >= f32::MIN_POSITIVE && scale.is_finite() {
                moves[i] = scale - scales[i];
                scales[i] = scale;
            }
        }
        for (column, scale_move) in self.values[own.clone()]
            .chunks_exact_mut(n)
            .zip(self.steps[own].chunks_exact(n))
        {
            for i in 0..n {
                column[i] = scale_move[i] * scales[i];
            }
        }
        let columns = self.gradient.chunks_exact_mut(n);
        for (gradient, product) in columns.zip(self.product.chunks_exact(n)) {
            for i in 0..n {
                gradient[i] -= moves[i] * product[i];
            }
        }
    }
}

/// `out` += `factor` · `own` · H of these columns, `own` being the columns `range` of the chunk: for
/// all columns, or for all but the range's own.
fn add_product(
    problem: &Problem<'_>,
    own: &[f32],
    range: Range<usize>,
    factor: f32,
    out: &mut [f32],
    with_own: bool,
) {
    let (n_cols, len) = (problem.target.cols(), range.len());
    let n = own.len() / len;
    let own = MatRef::from_column_major_slice(own, n, len);
    let mut out = MatMut::from_column_major_slice_mut(out, n, n_cols);
    add_outside(problem.hessian, own, range.clone(), factor, out.as_mut());
    if with_own {
        let out = out.subcols_mut(range.start, len);
        let corner = problem.corner(&range);
        matmul(out, Accum::Add, own, corner.as_faer(), factor, Par::Seq);
    }
}
