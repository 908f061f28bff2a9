//! Limits of weights: how far the largest weights of a group are cut off before it is rounded.
//!
//! For each row and each group of columns, the limit among 1, 0.95 … 0.55 of the largest absolute
//! weight that makes the smallest squared error of the group's part of the output, Σ_n (Δw · x_n)²,
//! over some tokens; of equal ones the widest. A group of few columns is judged by X ᵀX, a long one
//! by X itself, whichever is less work.
//!
//! Source: arXiv:2306.00978; mit-han-lab/llm-awq@d6e797a auto_clip.py. Differs: the grid is the one
//! that is written.

use super::grid::Fitting;
use super::{Clip, ClipNorm, loss::dot};
use crate::plan::Scheme;
use crate::{Matrix, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use rayon::prelude::*;
use std::ops::Range;

/// Limits are 1 − i / 20 of the largest weight, for i below [`N_LIMITS`].
const STEPS: f32 = 20.0;

/// Limits tried.
const N_LIMITS: usize = 10;

/// The best limit of each row and group.
///
/// Shapes: `w [out, in]`, `inputs [n_tokens, in]`; the result is `[out, n_groups]`.
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if the group size does not divide the columns.
pub fn search_limits(
    module: &str,
    w: &Matrix,
    inputs: &Matrix,
    scheme: Scheme,
    clip: Clip,
) -> Result<Matrix> {
    let group_len = scheme.group_len(module, w.cols())?;
    let n_groups = w.cols() / group_len;
    let groups = (0..n_groups).into_par_iter().map(|group| {
        let columns = group * group_len..(group + 1) * group_len;
        limits_of_group(w, inputs, columns, scheme, clip)
    });
    let groups: Vec<Vec<f32>> = groups.collect();
    Ok(Matrix::from_fn(w.rows(), n_groups, |row, group| {
        groups[group][row]
    }))
}

/// Cuts weights off at `limits [out, n_groups]`.
#[must_use]
pub fn limited(mut w: Matrix, limits: &Matrix) -> Matrix {
    let group_len = (w.cols() / limits.cols().max(1)).max(1);
    let groups = w.data_mut().par_chunks_mut(group_len);
    groups.zip(limits.data()).for_each(|(weights, limit)| {
        let cut = |w: &mut f32| *w = w.clamp(-limit, *limit);
        weights.iter_mut().for_each(cut);
    });
    w
}

fn limits_of_group(
    w: &Matrix,
    inputs: &Matrix,
    columns: Range<usize>,
    scheme: Scheme,
    clip: Clip,
) -> Vec<f32> {
    let own = |row| &w.row(row)[columns.clone()];
    let largest = |row| own(row).iter().fold(0.0f32, |most, w| most.max(w.abs()));
    let largest: Vec<f32> = (0..w.rows()).map(largest).collect();
    let measure = Measure::new(inputs, columns.clone());
    let mut best = largest.clone();
    let mut least = vec![f64::INFINITY; w.rows()];
    let mut errors = Matrix::zeros(w.rows(), columns.len());
    for step in 0..N_LIMITS {
        let limit = |row: usize| largest[row] * (1.0 - step as f32 / STEPS);
        for row in 0..w.rows() {
            put_errors(own(row), limit(row), scheme, clip, errors.row_mut(row));
        }
        for (row, loss) in measure.losses(&errors).into_iter().enumerate() {
            if loss < least[row] {
                (best[row], least[row]) = (limit(row), loss);
            }
        }
    }
    best
}

/// What weights lose by being cut off at `limit` and rounded.
fn put_errors(weights: &[f32], limit: f32, scheme: Scheme, clip: Clip, errors: &mut [f32]) {
    for (error, weight) in errors.iter_mut().zip(weights) {
        *error = weight.clamp(-limit, limit);
    }
    let fitting = Fitting {
        scheme,
        clip,
        clip_norm: ClipNorm::default(),
        column_weights: None,
    };
    let grid = fitting.fit(errors, 0);
    let zero = f32::from(grid.zero_point);
    for (error, weight) in errors.iter_mut().zip(weights) {
        let code = f32::from(grid.code(*error, scheme.max_code()));
        *error = (code - zero) * grid.scale - weight;
    }
}

/// Sums of (e · x)² over tokens.
enum Measure {
    /// XᵀX `[columns, columns]`.
    Moments(Matrix),
    /// Xᵀ `[columns, n_tokens]`.
    Tokens(Matrix),
}

impl Measure {
    fn new(inputs: &Matrix, columns: Range<usize>) -> Self {
        let (n, len) = (inputs.rows(), columns.len());
        let turned = Matrix::from_fn(len, n, |col, token| inputs.row(token)[columns.start + col]);
        if len >= n {
            return Self::Tokens(turned);
        }
        let mut moments = Matrix::zeros(len, len);
        let (x, to) = (turned.as_faer(), moments.as_faer_mut());
        matmul(to, Accum::Replace, x, x.transpose(), 1.0, Par::Seq);
        Self::Moments(moments)
    }

    /// Of each row of `errors [rows, columns]`.
    fn losses(&self, errors: &Matrix) -> Vec<f64> {
        let (Self::Moments(right) | Self::Tokens(right)) = self;
        let mut products = Matrix::zeros(errors.rows(), right.cols());
        let (e, to) = (errors.as_faer(), products.as_faer_mut());
        matmul(to, Accum::Replace, e, right.as_faer(), 1.0, Par::Seq);
        let rows = 0..errors.rows();
        match self {
            Self::Moments(_) => rows.map(|r| dot(products.row(r), errors.row(r))).collect(),
            Self::Tokens(_) => rows
                .map(|r| dot(products.row(r), products.row(r)))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;
    use crate::solver::rtn;

    fn noise(rows: usize, cols: usize, seed: u64) -> Matrix {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0).powi(3))
    }

    /// The sum of squares, group by group, of one row's output errors.
    fn loss(w: &[f32], cut: &[f32], inputs: &Matrix, start: usize) -> f64 {
        let one = |token: usize| -> f64 {
            let x = &inputs.row(token)[start..];
            let terms = w.iter().zip(cut).zip(x);
            terms.map(|((w, q), x)| f64::from((q - w) * x)).sum()
        };
        (0..inputs.rows()).map(|t| one(t).powi(2)).sum()
    }

    #[test]
    fn the_best_limit_of_each_group_is_found() {
        for (n_tokens, group_len) in [(100, 16), (5, 32)] {
            let scheme = Scheme::new(2, Some(group_len), false, ScaleDtype::Bf16).unwrap();
            let (w, x) = (noise(6, 64, 1), noise(n_tokens, 64, 2));
            let limits = search_limits("m", &w, &x, scheme, Clip::None).unwrap();
            for row in 0..w.rows() {
                for group in 0..64 / group_len {
                    let start = group * group_len;
                    let own = &w.row(row)[start..start + group_len];
                    let most = own.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                    let of = |limit: f32| {
                        let one = Matrix::from_vec("w", 1, group_len, own.to_vec()).unwrap();
                        let limit = Matrix::from_vec("limit", 1, 1, vec![limit]).unwrap();
                        let cut = rtn("m", &limited(one, &limit), scheme, Clip::None).unwrap();
                        loss(own, cut.dequantize().row(0), &x, start)
                    };
                    let found = of(limits[(row, group)]);
                    let all = (0..10).map(|i| of(most * (1.0 - i as f32 / 20.0)));
                    let best = all.fold(f64::INFINITY, f64::min);
                    assert!(found <= best * (1.0 + 1e-4), "{found} {best}");
                }
            }
        }
    }

    #[test]
    fn weights_are_cut_off_within_their_group() {
        let w = Matrix::from_vec("w", 1, 4, vec![3.0, -3.0, 3.0, -3.0]).unwrap();
        let limits = Matrix::from_vec("limits", 1, 2, vec![2.0, 5.0]).unwrap();
        assert_eq!(limited(w, &limits).data(), [2.0, -2.0, 3.0, -3.0]);
    }
}
