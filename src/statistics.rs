//! What a linear's solver needs to know of its inputs: H = Σ ω u uᵀ, and C = Σ ω (f − u) uᵀ.
//!
//! u is a token's input in the quantized stream, f the same token's input in the full-precision
//! stream, ω its weight. Rows are scaled by √ω, so H is the product of one matrix with its own
//! transpose, of which only the lower half is computed.
//!
//! Source: H, arXiv:2210.17323 §3; C, arXiv:2504.02692; ω, arXiv:2508.03351. Differs: plain sums,
//! because neither factor of a running mean changes the solution.

use crate::{Error, Matrix, Result};
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::{Accum, Par};

/// Sums over tokens for one linear, or for several that see the same inputs and weights.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Lower half of H `[in, in]`; what stands above the diagonal has no meaning.
    lower: Matrix,
    cross: Option<Matrix>,
    n_tokens: u64,
    weight_sum: f64,
    weight_square_sum: f64,
}

impl Statistics {
    /// Empty sums for linears of `in_features` inputs; `with_cross` asks for C.
    pub fn new(in_features: usize, with_cross: bool) -> Self {
        Self {
            lower: Matrix::zeros(in_features, in_features),
            cross: with_cross.then(|| Matrix::zeros(in_features, in_features)),
            n_tokens: 0,
            weight_sum: 0.0,
            weight_square_sum: 0.0,
        }
    }

    /// Adds tokens: `u [n_tokens, in]`, `f [n_tokens, in]` if C was asked for, and their weights
    /// (1 each if `None`).
    ///
    /// # Errors
    /// [`Error::Shape`] if the sides disagree or `f` is absent where it is needed,
    /// [`Error::NotFinite`] naming `module`, [`Error::Invalid`] for a negative weight.
    pub fn add(
        &mut self,
        module: &str,
        u: &Matrix,
        f: Option<&Matrix>,
        weights: Option<&[f32]>,
    ) -> Result<()> {
        self.check(module, u, f, weights)?;
        let root = |token: usize| weights.map_or(1.0, |w| w[token].sqrt());
        let mut scaled = u.clone();
        if weights.is_some() {
            scale_rows(&mut scaled, root);
        }
        let par = Par::rayon(0);
        triangular_matmul(
            self.lower.as_faer_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            scaled.as_faer().transpose(),
            BlockStructure::Rectangular,
            scaled.as_faer(),
            BlockStructure::Rectangular,
            1.0,
            par,
        );
        if let (Some(cross), Some(f)) = (&mut self.cross, f) {
            let mut drift = Matrix::from_vec(module, f.rows(), f.cols(), f.data().to_vec())?;
            let pairs = drift.data_mut().iter_mut().zip(u.data());
            pairs.for_each(|(d, u)| *d -= u);
            scale_rows(&mut drift, root);
            faer::linalg::matmul::matmul(
                cross.as_faer_mut(),
                Accum::Add,
                drift.as_faer().transpose(),
                scaled.as_faer(),
                1.0,
                par,
            );
        }
        self.n_tokens += u.rows() as u64;
        for token in 0..u.rows() {
            let weight = weights.map_or(1.0, |w| f64::from(w[token]));
            self.weight_sum += weight;
            self.weight_square_sum += weight * weight;
        }
        Ok(())
    }

    fn check(
        &self,
        module: &str,
        u: &Matrix,
        f: Option<&Matrix>,
        weights: Option<&[f32]>,
    ) -> Result<()> {
        let shape = |expected: Vec<usize>, found: Vec<usize>| Error::Shape {
            module: module.to_owned(),
            expected,
            found,
        };
        let found = vec![u.rows(), u.cols()];
        if u.cols() != self.in_features() {
            return Err(shape(vec![u.rows(), self.in_features()], found));
        }
        if self.cross.is_some() {
            let f_shape = f.map_or(vec![], |f| vec![f.rows(), f.cols()]);
            if f_shape != found {
                return Err(shape(found, f_shape));
            }
        }
        let count = u.count_not_finite() + f.map_or(0, Matrix::count_not_finite);
        if count > 0 {
            return Err(Error::NotFinite {
                module: module.to_owned(),
                stage: "its inputs".into(),
                count,
            });
        }
        let Some(weights) = weights else {
            return Ok(());
        };
        if weights.len() != u.rows() {
            return Err(shape(vec![u.rows()], vec![weights.len()]));
        }
        match weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
            Some(weight) => Err(Error::Invalid {
                what: format!("token weights of {module}"),
                why: format!("{weight} found, finite numbers of at least zero expected"),
            }),
            None => Ok(()),
        }
    }

    /// Adds the sums of other tokens of the same linear.
    ///
    /// # Errors
    /// [`Error::Shape`] if the linear has other inputs or only one of the two has C.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        let agree = self.cross.is_some() == other.cross.is_some();
        if self.in_features() != other.in_features() || !agree {
            return Err(Error::Shape {
                module: "statistics".into(),
                expected: vec![self.in_features(), usize::from(self.cross.is_some())],
                found: vec![other.in_features(), usize::from(other.cross.is_some())],
            });
        }
        let add = |into: &mut Matrix, from: &Matrix| {
            let pairs = into.data_mut().iter_mut().zip(from.data());
            pairs.for_each(|(a, b)| *a += b);
        };
        add(&mut self.lower, &other.lower);
        if let (Some(into), Some(from)) = (&mut self.cross, &other.cross) {
            add(into, from);
        }
        self.n_tokens += other.n_tokens;
        self.weight_sum += other.weight_sum;
        self.weight_square_sum += other.weight_square_sum;
        Ok(())
    }

    /// Inputs of the linear.
    pub fn in_features(&self) -> usize {
        self.lower.cols()
    }

    /// Tokens added so far.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// Σω.
    pub fn weight_sum(&self) -> f64 {
        self.weight_sum
    }

    /// (Σω)² / Σω²: as many tokens of equal weight would tell as much. Zero without tokens.
    pub fn effective_sample_size(&self) -> f64 {
        if self.weight_square_sum > 0.0 {
            self.weight_sum * self.weight_sum / self.weight_square_sum
        } else {
            0.0
        }
    }

    /// H `[in, in]`, both halves.
    pub fn hessian(&self) -> Matrix {
        let n = self.in_features();
        Matrix::from_fn(n, n, |i, j| self.lower[(i.max(j), i.min(j))])
    }

    /// C `[in, in]`, if it was asked for.
    pub fn cross(&self) -> Option<&Matrix> {
        self.cross.as_ref()
    }
}

fn scale_rows(matrix: &mut Matrix, factor: impl Fn(usize) -> f32) {
    for row in 0..matrix.rows() {
        let factor = factor(row);
        matrix.row_mut(row).iter_mut().for_each(|v| *v *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Sums of a few dozen products of numbers up to 1.
    const TOLERANCE: f32 = 64.0 * f32::EPSILON;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
    }

    fn close(a: &Matrix, b: &Matrix) -> bool {
        let pairs = a.data().iter().zip(b.data());
        a.rows() == b.rows() && pairs.fold(0f32, |m, (a, b)| m.max((a - b).abs())) <= TOLERANCE
    }

    fn sums(u: &Matrix, f: &Matrix, weights: Option<&[f32]>) -> Statistics {
        let mut s = Statistics::new(u.cols(), true);
        s.add("m", u, Some(f), weights).unwrap();
        s
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        let (u, f) = (random(23, 9, 1), random(23, 9, 2));
        let weights: Vec<f32> = (0..23).map(|i| 0.1 * i as f32).collect();
        let s = sums(&u, &f, Some(&weights));
        let sum = |term: &dyn Fn(usize) -> f32| (0..23).map(term).sum::<f32>();
        let h = Matrix::from_fn(9, 9, |i, j| sum(&|n| weights[n] * u[(n, i)] * u[(n, j)]));
        let c = Matrix::from_fn(9, 9, |i, j| {
            sum(&|n| weights[n] * (f[(n, i)] - u[(n, i)]) * u[(n, j)])
        });
        assert!(close(&s.hessian(), &h));
        assert!(close(s.cross().unwrap(), &c));
        assert_eq!(s.n_tokens(), 23);
    }

    #[test]
    fn weight_two_is_the_token_twice() {
        let (u, f) = (random(5, 4, 3), random(5, 4, 4));
        let twice = |m: &Matrix| Matrix::from_fn(10, 4, |i, j| m[(i / 2, j)]);
        let weighted = sums(&u, &f, Some(&[2.0; 5]));
        let doubled = sums(&twice(&u), &twice(&f), None);
        assert!(close(&weighted.hessian(), &doubled.hessian()));
        assert!(close(weighted.cross().unwrap(), doubled.cross().unwrap()));
    }

    #[test]
    fn equal_streams_have_no_cross_term() {
        let u = random(7, 4, 5);
        assert_eq!(sums(&u, &u, None).cross(), Some(&Matrix::zeros(4, 4)));
    }

    #[test]
    fn merging_is_adding() {
        let (u, f) = (random(8, 4, 6), random(8, 4, 7));
        let part = |m: &Matrix, at: usize| Matrix::from_fn(4, 4, |i, j| m[(at + i, j)]);
        let mut first = sums(&part(&u, 0), &part(&f, 0), None);
        first
            .merge(&sums(&part(&u, 4), &part(&f, 4), None))
            .unwrap();
        let whole = sums(&u, &f, None);
        assert!(close(&first.hessian(), &whole.hessian()));
        assert_eq!(first.n_tokens(), 8);
        assert!(first.merge(&Statistics::new(4, false)).is_err());
    }

    #[test]
    fn effective_sample_size_counts_what_tells() {
        let mut s = Statistics::new(2, false);
        let u = random(4, 2, 8);
        s.add("m", &u, None, Some(&[1.0, 1.0, 0.0, 0.0])).unwrap();
        assert!((s.effective_sample_size() - 2.0).abs() < 1e-12);
        assert_eq!(Statistics::new(2, false).effective_sample_size(), 0.0);
    }

    #[test]
    fn bad_input_is_refused() {
        let u = random(3, 4, 9);
        let mut s = Statistics::new(4, true);
        assert!(matches!(
            s.add("m", &u, None, None),
            Err(Error::Shape { .. })
        ));
        let wide = random(3, 5, 9);
        assert!(s.add("m", &wide, Some(&wide), None).is_err());
        assert!(s.add("m", &u, Some(&u), Some(&[1.0])).is_err());
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(s.add("m", &u, Some(&u), Some(&[1.0, bad, 1.0])).is_err());
        }
        let mut broken = u.clone();
        broken[(1, 1)] = f32::NAN;
        let result = s.add("m", &broken, Some(&u), None);
        assert!(matches!(result, Err(Error::NotFinite { count: 1, .. })));
        assert_eq!(s.n_tokens(), 0);
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let (u, f) = (random(700, 130, 10), random(700, 130, 11));
        let on = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap();
            pool.install(|| sums(&u, &f, None))
        };
        let (one, three) = (on(1), on(3));
        assert_eq!(one.hessian(), three.hessian());
        assert_eq!(one.cross(), three.cross());
    }
}
