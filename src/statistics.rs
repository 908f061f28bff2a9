//! Second moments of one linear's inputs, accumulated batch by batch: all that a solver knows of
//! the calibration data.
//!
//! With u_n the input of the linear in the quantized stream, f_n the input of the same token in
//! the full-precision stream and ω_n ≥ 0 the weight of the token's squared error:
//! - H = Σ ω_n u_n u_nᵀ is the Hessian of the layer's squared error (up to the factor 2);
//! - C = Σ ω_n (f_n − u_n) u_nᵀ is the drift between the streams, as seen by this linear.
//!
//! Nothing is divided by the number of tokens: solvers dampen relative to the mean diagonal, so a
//! constant factor cancels. Both weights enter as √ω on the rows, which keeps H exactly symmetric.
//! Cost per batch of t tokens: t·in² multiply-adds halved by symmetry for H, t·in² for C. The work
//! is cut into bands of rows whose height depends on `in` only, each summed by one thread, so the
//! same bytes come out for any number of threads.
//!
//! Source: arXiv:2508.03351 (token weights), arXiv:2504.02692 (C, there "dXXT").

use crate::{Error, Matrix, Result};
use faer::linalg::matmul::triangular::BlockStructure;
use faer::linalg::matmul::{matmul, triangular};
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;
use std::borrow::Cow;

/// H and, if asked for, C of one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// `[in, in]`; only the lower triangle is kept, the rest stays zero.
    hessian_lower: Matrix,
    cross: Option<Matrix>,
    n_tokens: u64,
    weight_sum: f64,
    weight_square_sum: f64,
}

impl Statistics {
    /// Empty statistics of a linear with `in_features` columns; `with_cross` also keeps C.
    pub fn new(in_features: usize, with_cross: bool) -> Self {
        Self {
            hessian_lower: Matrix::zeros(in_features, in_features),
            cross: with_cross.then(|| Matrix::zeros(in_features, in_features)),
            n_tokens: 0,
            weight_sum: 0.0,
            weight_square_sum: 0.0,
        }
    }

    /// Adds a batch of tokens.
    ///
    /// Shapes: `u [n_tokens, in]` of the quantized stream; `f` the same tokens in the
    /// full-precision stream, given exactly when C is kept; `weights` ω of each token, `None`
    /// for 1. A token of weight zero counts in [`Statistics::n_tokens`] only.
    ///
    /// # Errors
    /// [`Error::Shape`] for other shapes; [`Error::Missing`] or [`Error::Invalid`] if `f` is absent
    /// or superfluous; [`Error::Invalid`] for a negative, infinite or NaN weight;
    /// [`Error::NotFinite`] if an input is NaN or infinite. The statistics are then unchanged.
    pub fn add(
        &mut self,
        module: &str,
        u: &Matrix,
        f: Option<&Matrix>,
        weights: Option<&[f32]>,
    ) -> Result<()> {
        self.check(module, u, f, weights)?;
        let residual = f.map(|f| weighted_difference(f, u, weights));
        let scaled = match weights {
            Some(weights) => Cow::Owned(weighted(u, weights)),
            None => Cow::Borrowed(u),
        };
        add_gram_lower(&mut self.hessian_lower, &scaled);
        if let (Some(cross), Some(residual)) = (&mut self.cross, &residual) {
            add_product(cross, residual, &scaled);
        }
        self.n_tokens += u.rows() as u64;
        let ones = [1.0];
        let each = weights.unwrap_or(&ones);
        let n_each = if weights.is_some() { 1 } else { u.rows() };
        let sum = |power: i32| each.iter().map(|w| f64::from(*w).powi(power)).sum::<f64>();
        self.weight_sum += sum(1) * n_each as f64;
        self.weight_square_sum += sum(2) * n_each as f64;
        Ok(())
    }

    /// Adds everything that `other` has seen.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of columns, [`Error::Invalid`] if only one keeps C.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.in_features() != other.in_features() {
            return Err(Error::Shape {
                module: "statistics to merge".into(),
                expected: vec![self.in_features(), self.in_features()],
                found: vec![other.in_features(), other.in_features()],
            });
        }
        match (&mut self.cross, &other.cross) {
            (None, None) => {}
            (Some(mine), Some(theirs)) => add_elements(mine, theirs),
            _ => {
                return Err(Error::Invalid {
                    what: "statistics to merge".into(),
                    why: "one keeps the cross moments and the other does not".into(),
                });
            }
        }
        add_elements(&mut self.hessian_lower, &other.hessian_lower);
        self.n_tokens += other.n_tokens;
        self.weight_sum += other.weight_sum;
        self.weight_square_sum += other.weight_square_sum;
        Ok(())
    }

    /// Number of input columns.
    pub fn in_features(&self) -> usize {
        self.hessian_lower.cols()
    }

    /// Number of tokens seen, whatever their weight.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Σ ω.
    pub fn weight_sum(&self) -> f64 {
        self.weight_sum
    }

    /// Kish's effective sample size (Σω)² / Σω²: the number of equally weighted tokens that would
    /// estimate H as well; 0 before the first token of positive weight.
    pub fn effective_sample_size(&self) -> f64 {
        if self.weight_square_sum == 0.0 {
            return 0.0;
        }
        self.weight_sum * self.weight_sum / self.weight_square_sum
    }

    /// H `[in, in]`, both triangles filled.
    pub fn hessian(&self) -> Matrix {
        let mut full = self.hessian_lower.clone();
        for row in 0..full.rows() {
            for col in row + 1..full.cols() {
                full[(row, col)] = self.hessian_lower[(col, row)];
            }
        }
        full
    }

    /// C `[in, in]`, if it is kept: entry (a, b) is Σ ω (f − u)_a u_b.
    pub fn cross(&self) -> Option<&Matrix> {
        self.cross.as_ref()
    }

    /// H with its upper triangle left zero, without a copy.
    pub(crate) fn hessian_lower(&self) -> &Matrix {
        &self.hessian_lower
    }

    fn check(
        &self,
        module: &str,
        u: &Matrix,
        f: Option<&Matrix>,
        weights: Option<&[f32]>,
    ) -> Result<()> {
        check_shape(module, u, [u.rows(), self.in_features()])?;
        check_finite(module, "inputs of the quantized stream", u)?;
        match (f, &self.cross) {
            (Some(f), Some(_)) => {
                check_shape(module, f, [u.rows(), u.cols()])?;
                check_finite(module, "inputs of the full-precision stream", f)?;
            }
            (None, None) => {}
            (None, Some(_)) => {
                return Err(Error::Missing {
                    what: "the inputs of the full-precision stream".into(),
                    place: format!("a batch of {module}, whose cross moments are kept"),
                });
            }
            (Some(_), None) => {
                return Err(Error::Invalid {
                    what: format!("a batch of {module}"),
                    why: "full-precision inputs given, but no cross moments are kept".into(),
                });
            }
        }
        check_weights(module, u.rows(), weights)
    }
}

#[cfg(test)]
impl Statistics {
    /// Statistics with a given H, for laws about H itself.
    pub(crate) fn from_moments(hessian: &Matrix, cross: Option<&Matrix>) -> Self {
        let n = hessian.rows();
        let lower = |i, j| if j <= i { hessian[(i, j)] } else { 0.0 };
        Self {
            hessian_lower: Matrix::from_fn(n, n, lower),
            cross: cross.cloned(),
            n_tokens: 1,
            weight_sum: 1.0,
            weight_square_sum: 1.0,
        }
    }
}

fn check_shape(module: &str, found: &Matrix, expected: [usize; 2]) -> Result<()> {
    if [found.rows(), found.cols()] == expected {
        return Ok(());
    }
    Err(Error::Shape {
        module: module.to_owned(),
        expected: expected.to_vec(),
        found: vec![found.rows(), found.cols()],
    })
}

fn check_finite(module: &str, stage: &str, matrix: &Matrix) -> Result<()> {
    let count = matrix.count_not_finite();
    if count == 0 {
        return Ok(());
    }
    Err(Error::NotFinite {
        module: module.to_owned(),
        stage: stage.to_owned(),
        count,
    })
}

fn check_weights(module: &str, n_tokens: usize, weights: Option<&[f32]>) -> Result<()> {
    let Some(weights) = weights else {
        return Ok(());
    };
    if weights.len() != n_tokens {
        return Err(Error::Shape {
            module: format!("token weights of {module}"),
            expected: vec![n_tokens],
            found: vec![weights.len()],
        });
    }
    let is_bad = |w: &f32| !(w.is_finite() && *w >= 0.0);
    match weights.iter().position(is_bad) {
        None => Ok(()),
        Some(token) => Err(Error::Invalid {
            what: format!("weight of token {token} of {module}"),
            why: format!("{} given, a finite number >= 0 expected", weights[token]),
        }),
    }
}

/// Rows of `u` times √ω.
fn weighted(u: &Matrix, weights: &[f32]) -> Matrix {
    let mut scaled = u.clone();
    let n_cols = u.cols().max(1);
    let rows = scaled.data_mut().par_chunks_mut(n_cols);
    rows.zip(weights).for_each(|(row, weight)| {
        let root = weight.sqrt();
        row.iter_mut().for_each(|v| *v *= root);
    });
    scaled
}

/// Rows of `f − u` times √ω.
fn weighted_difference(f: &Matrix, u: &Matrix, weights: Option<&[f32]>) -> Matrix {
    let mut difference = f.clone();
    let n_cols = u.cols().max(1);
    let rows = difference.data_mut().par_chunks_mut(n_cols);
    rows.enumerate().for_each(|(token, row)| {
        let root = weights.map_or(1.0, |weights| weights[token].sqrt());
        for (f, u) in row.iter_mut().zip(u.row(token)) {
            *f = (*f - u) * root;
        }
    });
    difference
}

/// Rows of the result that one thread sums: enough bands for many cores, each high enough for a
/// product to run at full speed. Depends on the shape only, never on the number of threads.
fn band_rows(n_rows: usize) -> usize {
    n_rows.div_ceil(16).clamp(32, 256)
}

/// `target` += lower triangle of `x`ᵀ`x`, x `[n_tokens, in]`.
fn add_gram_lower(target: &mut Matrix, x: &Matrix) {
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
fn add_product(target: &mut Matrix, left: &Matrix, right: &Matrix) {
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

fn add_elements(target: &mut Matrix, other: &Matrix) {
    let pairs = target.data_mut().iter_mut().zip(other.data());
    pairs.for_each(|(target, other)| *target += other);
}
