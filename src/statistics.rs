//! Second moments of one linear's inputs, accumulated batch by batch: all that a solver knows of
//! the calibration data.
//!
//! With u_n the input of the linear in the quantized stream, f_n the input of the same token in
//! the full-precision stream and ω_n ≥ 0 the weight of the token's squared error:
//! - H = Σ ω_n u_n u_nᵀ is the Hessian of the layer's squared error (up to the factor 2);
//! - C = Σ ω_n (f_n − u_n) u_nᵀ is the drift between the streams, as seen by this linear;
//! - S = Σ ω_n d_n u_nᵀ, with d_n what the linear's output should make up for beside what C tells:
//!   for one whose output is added to the residual stream the drift of that stream, full precision
//!   less quantized. Without C also W (f_n − u_n), W being the linear's weight: S is then all that
//!   least squares ask for, W C + S otherwise ([`is_output_cheaper`]).
//!
//! Nothing is divided by the number of tokens: solvers dampen relative to the mean diagonal, so a
//! constant factor cancels. Both weights enter as √ω on the rows, which keeps H exactly symmetric.
//! Cost per batch of t tokens: t·in² multiply-adds halved by symmetry for H, t·in² for C, t·out·in
//! for S. The work is cut into bands of rows whose height depends on `in` only, each summed by one thread, so the
//! same bytes come out for any number of threads.
//!
//! Source: arXiv:2508.03351 (token weights), arXiv:2504.02692 (C, there "dXXT"). S is ours.

pub(crate) mod bands;
mod bf16;
pub mod folder;
mod single;

use crate::{Error, Matrix, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Rows mirrored together, so that whole cache lines of the lower triangle are read.
const MIRROR_ROWS: usize = 32;

/// What a linear saw of a batch of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Inputs in the quantized stream, `[n_tokens, in]`.
    pub u: &'a Matrix,
    /// Inputs in the full-precision stream, `[n_tokens, in]`; given exactly when C is kept.
    pub f: Option<&'a Matrix>,
    /// d, what the output should make up for, `[n_tokens, out]`; given exactly when S is kept.
    pub output_drift: Option<&'a Matrix>,
    /// ω of each token; `None` for 1.
    pub weights: Option<&'a [f32]>,
}

/// What inputs are rounded to before their products are summed, which is in f32 either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatisticsDtype {
    /// Not at all.
    #[default]
    F32,
    /// bfloat16: twice as fast on processors with instructions for it, of no use on others.
    Bf16,
}

/// How large the inputs of some linears are, column by column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputSquares {
    /// The linears, by checkpoint name, which see the same inputs.
    pub modules: Vec<String>,
    /// Tokens seen, whatever their weight.
    pub n_tokens: u64,
    /// Bits of Σ ω u² / Σ ω as f32, `[in]`: as text a number might come back as its neighbour.
    pub mean_bits: Vec<u32>,
}

impl InputSquares {
    /// Σ ω u² / Σ ω, `[in]`.
    pub fn mean(&self) -> impl Iterator<Item = f32> {
        self.mean_bits.iter().map(|bits| f32::from_bits(*bits))
    }
}

/// H and, if asked for, C and S of one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// `[in, in]`; only the lower triangle is kept, the rest stays zero.
    hessian_lower: Matrix,
    cross: Option<Matrix>,
    /// S `[out, in]`.
    output_cross: Option<Matrix>,
    dtype: StatisticsDtype,
    n_tokens: u64,
    weight_sum: f64,
    weight_square_sum: f64,
}

/// [`Statistics`] in parts, of the same shapes.
pub(crate) struct Sums {
    /// Zero above the diagonal.
    pub(crate) hessian_lower: Matrix,
    pub(crate) cross: Option<Matrix>,
    pub(crate) output_cross: Option<Matrix>,
    pub(crate) dtype: StatisticsDtype,
    pub(crate) n_tokens: u64,
    pub(crate) weight_sum: f64,
    pub(crate) weight_square_sum: f64,
}

/// Whether what least squares ask for is cheaper summed up over tokens as S, from W (f − u), than as
/// C: 2·out·in multiply-adds a token against in², and out·in more for a drift of the residual
/// stream, which S holds at no cost. It also takes the memory of out·in instead of in² numbers.
pub fn is_output_cheaper([out, inp]: [usize; 2], with_stream: bool) -> bool {
    let of_stream = if with_stream { out } else { 0 };
    2 * out <= inp + of_stream
}

impl Statistics {
    /// Empty statistics of a linear with `in_features` columns; `with_cross` also keeps C.
    pub fn new(in_features: usize, with_cross: bool) -> Self {
        Self {
            hessian_lower: Matrix::zeros(in_features, in_features),
            cross: with_cross.then(|| Matrix::zeros(in_features, in_features)),
            output_cross: None,
            dtype: StatisticsDtype::F32,
            n_tokens: 0,
            weight_sum: 0.0,
            weight_square_sum: 0.0,
        }
    }

    /// The same, with √ω u and √ω (f − u) rounded to `dtype` from now on.
    #[must_use]
    pub fn rounded_to(mut self, dtype: StatisticsDtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// The same, with S of `out_features` rows kept as well.
    #[must_use]
    pub fn with_output(mut self, out_features: usize) -> Self {
        self.output_cross = Some(Matrix::zeros(out_features, self.in_features()));
        self
    }

    /// [`Statistics::add_batch`] of a linear that keeps no S.
    ///
    /// # Errors
    /// As there.
    pub fn add(
        &mut self,
        module: &str,
        u: &Matrix,
        f: Option<&Matrix>,
        weights: Option<&[f32]>,
    ) -> Result<()> {
        let batch = Batch {
            u,
            f,
            output_drift: None,
            weights,
        };
        self.add_batch(module, &batch)
    }

    /// Adds a batch of tokens. A token of weight zero counts in [`Statistics::n_tokens`] only.
    ///
    /// # Errors
    /// [`Error::Shape`] for shapes other than [`Batch`] tells; [`Error::Missing`] or
    /// [`Error::Invalid`] if something is absent or superfluous; [`Error::Invalid`] for a negative,
    /// infinite or NaN weight; [`Error::NotFinite`] if an input is NaN or infinite. The statistics
    /// are then unchanged.
    pub fn add_batch(&mut self, module: &str, batch: &Batch<'_>) -> Result<()> {
        self.check(module, batch)?;
        let Batch { u, f, weights, .. } = *batch;
        let residual = f.map(|f| weighted_difference(f, u, weights));
        let scaled = match weights {
            Some(weights) => Cow::Owned(weighted(u, weights)),
            None => Cow::Borrowed(u),
        };
        let cross = self.cross.as_mut().zip(residual.as_ref());
        match self.dtype {
            StatisticsDtype::F32 => {
                single::add_gram_lower(&mut self.hessian_lower, &scaled);
                if let Some((cross, residual)) = cross {
                    single::add_product(cross, residual, &scaled);
                }
            }
            StatisticsDtype::Bf16 => bf16::add(&mut self.hessian_lower, cross, &scaled),
        }
        if let Some((output_cross, drift)) = self.output_cross.as_mut().zip(batch.output_drift) {
            let drift = match weights {
                Some(weights) => Cow::Owned(weighted(drift, weights)),
                None => Cow::Borrowed(drift),
            };
            // Some channels of the stream are far larger than the rest: always in f32.
            single::add_product(output_cross, &drift, &scaled);
        }
        self.n_tokens += u.rows() as u64;
        self.weight_sum += weight_power_sum(weights, u.rows(), 1);
        self.weight_square_sum += weight_power_sum(weights, u.rows(), 2);
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
        let shape = |m: &Option<Matrix>| m.as_ref().map(Matrix::rows);
        let kept = |s: &Self| (shape(&s.cross), shape(&s.output_cross));
        if kept(self) != kept(other) {
            return Err(Error::Invalid {
                what: "statistics to merge".into(),
                why: "one keeps cross moments that the other does not".into(),
            });
        }
        let pairs = [
            (&mut self.cross, &other.cross),
            (&mut self.output_cross, &other.output_cross),
        ];
        for (mine, theirs) in pairs {
            if let (Some(mine), Some(theirs)) = (mine, theirs) {
                add_elements(mine, theirs);
            }
        }
        add_elements(&mut self.hessian_lower, &other.hessian_lower);
        self.n_tokens += other.n_tokens;
        self.weight_sum += other.weight_sum;
        self.weight_square_sum += other.weight_square_sum;
        Ok(())
    }

    /// Every weight ω multiplied by `factor`; C and S are not kept here.
    pub(crate) fn scale(&mut self, factor: f64) {
        for value in self.hessian_lower.data_mut() {
            *value = (f64::from(*value) * factor) as f32;
        }
        self.weight_sum *= factor;
        self.weight_square_sum *= factor * factor;
    }

    /// The mean square of each input of `modules`, weighted as H is; all zero before the first
    /// token of positive weight.
    pub fn input_squares(&self, modules: Vec<String>) -> InputSquares {
        let mean = |j: usize| match self.weight_sum > 0.0 {
            true => (f64::from(self.hessian_lower.row(j)[j]) / self.weight_sum) as f32,
            false => 0.0,
        };
        InputSquares {
            modules,
            n_tokens: self.n_tokens,
            mean_bits: (0..self.in_features()).map(|j| mean(j).to_bits()).collect(),
        }
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
        let lower = &self.hessian_lower;
        let n = lower.cols();
        let mut full = lower.clone();
        let bands = full
            .data_mut()
            .par_chunks_mut(MIRROR_ROWS * n.max(1))
            .enumerate();
        bands.for_each(|(index, band)| {
            let start = index * MIRROR_ROWS;
            for col in start + 1..n {
                let source = &lower.row(col)[start..];
                for (i, row) in band.chunks_exact_mut(n).enumerate().take(col - start) {
                    row[col] = source[i];
                }
            }
        });
        full
    }

    /// C `[in, in]`, if it is kept: entry (a, b) is Σ ω (f − u)_a u_b.
    pub fn cross(&self) -> Option<&Matrix> {
        self.cross.as_ref()
    }

    /// S `[out, in]`, if it is kept: entry (a, b) is Σ ω d_a u_b.
    pub fn output_cross(&self) -> Option<&Matrix> {
        self.output_cross.as_ref()
    }

    /// What somebody else has summed up.
    pub(crate) fn of_sums(sums: Sums) -> Self {
        Self {
            hessian_lower: sums.hessian_lower,
            cross: sums.cross,
            output_cross: sums.output_cross,
            dtype: sums.dtype,
            n_tokens: sums.n_tokens,
            weight_sum: sums.weight_sum,
            weight_square_sum: sums.weight_square_sum,
        }
    }

    /// H with its upper triangle left zero, C and S.
    pub(crate) fn into_moments(self) -> (Matrix, Option<Matrix>, Option<Matrix>) {
        (self.hessian_lower, self.cross, self.output_cross)
    }

    /// H with its upper triangle left zero, without a copy.
    pub(crate) fn hessian_lower(&self) -> &Matrix {
        &self.hessian_lower
    }

    fn check(&self, module: &str, batch: &Batch<'_>) -> Result<()> {
        let u = batch.u;
        check_shape(module, u, [u.rows(), self.in_features()])?;
        check_finite(module, "inputs of the quantized stream", u)?;
        check_companion(
            module,
            "inputs of the full-precision stream",
            (batch.f, self.cross.as_ref()),
            u.rows(),
        )?;
        check_companion(
            module,
            "drift of the output",
            (batch.output_drift, self.output_cross.as_ref()),
            u.rows(),
        )?;
        check_weights(module, u.rows(), batch.weights)
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
            output_cross: None,
            dtype: StatisticsDtype::F32,
            n_tokens: 1,
            weight_sum: 1.0,
            weight_square_sum: 1.0,
        }
    }
}

/// Whether what goes with u is there exactly if the moments made of it are kept, and fits.
fn check_companion(
    module: &str,
    name: &str,
    (given, kept): (Option<&Matrix>, Option<&Matrix>),
    n_tokens: usize,
) -> Result<()> {
    match (given, kept) {
        (Some(given), Some(kept)) => {
            check_shape(module, given, [n_tokens, kept.rows()])?;
            check_finite(module, name, given)
        }
        (None, None) => Ok(()),
        (None, Some(_)) => Err(Error::Missing {
            what: format!("the {name}"),
            place: format!("a batch of {module}, whose cross moments are kept"),
        }),
        (Some(_), None) => Err(Error::Invalid {
            what: format!("a batch of {module}"),
            why: format!("{name} given, but no cross moments of it are kept"),
        }),
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

/// Σ ω^power of a batch.
pub(crate) fn weight_power_sum(weights: Option<&[f32]>, n_tokens: usize, power: i32) -> f64 {
    match weights {
        Some(weights) => weights.iter().map(|w| f64::from(*w).powi(power)).sum(),
        None => n_tokens as f64,
    }
}

pub(crate) fn check_weights(module: &str, n_tokens: usize, weights: Option<&[f32]>) -> Result<()> {
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

fn add_elements(target: &mut Matrix, other: &Matrix) {
    let pairs = target.data_mut().iter_mut().zip(other.data());
    pairs.for_each(|(target, other)| *target += other);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
    }

    fn filled(u: &Matrix, f: &Matrix, weights: Option<&[f32]>) -> Statistics {
        let mut statistics = Statistics::new(u.cols(), true);
        statistics.add("layer", u, Some(f), weights).unwrap();
        statistics
    }

    /// Largest difference over the largest entry.
    fn distance(a: &Matrix, b: &Matrix) -> f32 {
        let pairs = a.data().iter().zip(b.data());
        let largest = a
            .data()
            .iter()
            .fold(f32::MIN_POSITIVE, |m, v| m.max(v.abs()));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
    }

    /// f32 sums over `n` tokens in another order.
    fn tolerance(n: usize) -> f32 {
        f32::EPSILON * n as f32
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn moments_follow_their_definition(
            seed: u64,
            n_tokens in 1usize..40,
            cols in prop::sample::select(vec![1usize, 3, 31, 70, 150]),
            is_weighted: bool,
        ) {
            let (u, f) = (random(n_tokens, cols, seed), random(n_tokens, cols, seed ^ 1));
            let omega: Vec<f32> = (0..n_tokens).map(|t| (t % 4) as f32 * 0.7).collect();
            let statistics = filled(&u, &f, is_weighted.then_some(&omega[..]));
            // The moment, and the sum of its terms' sizes, which rounding is relative to.
            let moment = |left: &dyn Fn(usize, usize) -> f32, size: fn(f64) -> f64| {
                Matrix::from_fn(cols, cols, |a, b| {
                    let term = |t: usize| {
                        let weight = if is_weighted { omega[t] } else { 1.0 };
                        size(f64::from(weight) * f64::from(left(t, a)) * f64::from(u[(t, b)]))
                    };
                    (0..n_tokens).map(term).sum::<f64>() as f32
                })
            };
            let is_close = |found: &Matrix, left: &dyn Fn(usize, usize) -> f32| {
                let (expected, sizes) = (moment(left, |term| term), moment(left, f64::abs));
                let entries = found.data().iter().zip(expected.data()).zip(sizes.data());
                let largest = tolerance(n_tokens + 4);
                entries.into_iter().all(|((a, b), size)| (a - b).abs() <= largest * size)
            };
            prop_assert!(is_close(&statistics.hessian(), &|t, a| u[(t, a)]));
            prop_assert!(is_close(statistics.cross().unwrap(), &|t, a| f[(t, a)] - u[(t, a)]));
            prop_assert_eq!(statistics.n_tokens(), n_tokens as u64);
        }

        #[test]
        fn weight_two_is_the_token_twice(seed: u64) {
            let (u, f) = (random(20, 33, seed), random(20, 33, seed ^ 1));
            let weights: Vec<f32> = (0..20).map(|t| if t < 10 { 2.0 } else { 1.0 }).collect();
            let weighted = filled(&u, &f, Some(&weights));
            let twice = |m: &Matrix| Matrix::from_fn(30, 33, |t, j| m[(t % 20, j)]);
            let twice = filled(&twice(&u), &twice(&f), None);
            prop_assert!(distance(&weighted.hessian(), &twice.hessian()) < tolerance(30));
            let crosses = (weighted.cross().unwrap(), twice.cross().unwrap());
            prop_assert!(distance(crosses.0, crosses.1) < tolerance(30));
            prop_assert_eq!(weighted.weight_sum(), twice.weight_sum());
        }

        #[test]
        fn merging_is_adding(seed: u64) {
            let (u, f) = (random(20, 33, seed), random(20, 33, seed ^ 1));
            let part = |m: &Matrix, rows: std::ops::Range<usize>| {
                Matrix::from_fn(rows.len(), 33, |t, j| m[(rows.start + t, j)])
            };
            let mut merged = filled(&part(&u, 0..7), &part(&f, 0..7), None);
            merged.merge(&filled(&part(&u, 7..20), &part(&f, 7..20), None)).unwrap();
            let whole = filled(&u, &f, None);
            prop_assert!(distance(&merged.hessian(), &whole.hessian()) < tolerance(20));
            prop_assert_eq!(merged.n_tokens(), 20);
            prop_assert_eq!(merged.effective_sample_size(), 20.0);
        }

        /// ‖ŵU − wF‖² has its minimum at w* = w + w C H⁻¹, and rises from there by δHδᵀ: this ties
        /// the orientation of C to the objective that GPTAQ serves.
        #[test]
        fn cross_moments_point_at_the_least_squares_target(seed: u64) {
            const N: usize = 6;
            let (u, f) = (random(40, N, seed), random(40, N, seed ^ 1));
            let statistics = filled(&u, &f, None);
            let (w, delta) = (random(1, N, seed ^ 2), random(1, N, seed ^ 3));
            let hessian = statistics.hessian();
            let share = |a: usize, b: usize| f64::from(w[(0, a)]) * cross_entry(&statistics, a, b);
            let drift = |b: usize| (0..N).map(|a| share(a, b)).sum();
            let drift: Vec<f64> = (0..N).map(drift).collect();
            let shift = solve_symmetric(&hessian, drift);
            let target: Vec<f64> =
                w.row(0).iter().zip(&shift).map(|(w, s)| f64::from(*w) + s).collect();
            let objective = |row: &[f64]| -> f64 {
                let dot = |row: &[f64], x: &[f32]| -> f64 {
                    row.iter().zip(x).map(|(r, x)| r * f64::from(*x)).sum()
                };
                let w: Vec<f64> = w.row(0).iter().map(|v| f64::from(*v)).collect();
                (0..40).map(|t| (dot(row, u.row(t)) - dot(&w, f.row(t))).powi(2)).sum()
            };
            let moved: Vec<f64> =
                target.iter().zip(delta.row(0)).map(|(t, d)| t + f64::from(*d)).collect();
            let rise = objective(&moved) - objective(&target);
            let expected = {
                let term = |i: usize, j: usize| {
                    f64::from(delta[(0, i)]) * f64::from(hessian[(i, j)]) * f64::from(delta[(0, j)])
                };
                (0..N * N).map(|k| term(k / N, k % N)).sum::<f64>()
            };
            // f32 moments of 40 tokens; the objective itself is of the order of tens.
            prop_assert!((rise - expected).abs() < 1e-3 * (1.0 + expected), "{rise} {expected}");
        }
    }

    fn cross_entry(statistics: &Statistics, a: usize, b: usize) -> f64 {
        statistics.cross().unwrap()[(a, b)].into()
    }

    /// x with x H = `right`, by elimination.
    fn solve_symmetric(hessian: &Matrix, mut right: Vec<f64>) -> Vec<f64> {
        let n = right.len();
        let mut rows: Vec<Vec<f64>> = (0..n)
            .map(|i| hessian.row(i).iter().map(|v| f64::from(*v)).collect())
            .collect();
        for pivot in 0..n {
            for row in (0..n).filter(|row| *row != pivot) {
                let factor = rows[row][pivot] / rows[pivot][pivot];
                let source = rows[pivot].clone();
                rows[row]
                    .iter_mut()
                    .zip(&source)
                    .for_each(|(v, s)| *v -= factor * s);
                right[row] -= factor * right[pivot];
            }
        }
        (0..n).map(|i| right[i] / rows[i][i]).collect()
    }

    #[test]
    fn effective_sample_size_counts_even_weights() {
        let u = random(4, 2, 0);
        let size = |weights: [f32; 4]| filled(&u, &u, Some(&weights)).effective_sample_size();
        assert_eq!(size([3.0; 4]), 4.0);
        assert_eq!(size([1.0, 1.0, 0.0, 0.0]), 2.0);
        assert_eq!(size([0.0; 4]), 0.0);
        assert_eq!(filled(&u, &u, None).effective_sample_size(), 4.0);
    }

    #[test]
    fn bad_batches_are_errors_and_change_nothing() {
        let mut statistics = Statistics::new(3, true);
        let good = random(4, 3, 0);
        let mut bad = good.clone();
        bad[(2, 1)] = f32::NAN;
        let add = |s: &mut Statistics, u: &Matrix, f: Option<&Matrix>, w: Option<&[f32]>| {
            s.add("layer", u, f, w).unwrap_err()
        };
        let error = add(&mut statistics, &bad, Some(&good), None);
        assert!(matches!(error, Error::NotFinite { count: 1, .. }));
        let error = add(&mut statistics, &good, Some(&bad), None);
        assert!(matches!(error, Error::NotFinite { .. }));
        let error = add(&mut statistics, &good, None, None);
        assert!(matches!(error, Error::Missing { .. }));
        let error = add(&mut statistics, &random(4, 2, 0), Some(&good), None);
        assert!(matches!(error, Error::Shape { .. }));
        let error = add(&mut statistics, &good, Some(&random(5, 3, 0)), None);
        assert!(matches!(error, Error::Shape { .. }));
        let error = add(&mut statistics, &good, Some(&good), Some(&[1.0; 3]));
        assert!(matches!(error, Error::Shape { .. }));
        for weight in [-1.0, f32::NAN, f32::INFINITY] {
            let weights = [1.0, 1.0, weight, 1.0];
            let error = add(&mut statistics, &good, Some(&good), Some(&weights));
            assert!(matches!(error, Error::Invalid { .. }));
        }
        let error = Statistics::new(3, false).add("layer", &good, Some(&good), None);
        assert!(matches!(error, Err(Error::Invalid { .. })));
        let error = statistics.merge(&Statistics::new(4, true));
        assert!(matches!(error, Err(Error::Shape { .. })));
        let error = statistics.merge(&Statistics::new(3, false));
        assert!(matches!(error, Err(Error::Invalid { .. })));
        assert_eq!(statistics, Statistics::new(3, true));
    }
}
