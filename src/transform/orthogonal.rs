//! Orthogonal matrices Q as something to multiply rows by, never stored where that can be avoided.
//!
//! For n = 2^k · m with m odd, the Hadamard kind is Q = diag(σ) · (H ⊗ O) with random signs σ, the
//! normalised Hadamard matrix H of order 2^k and, where m > 1, a random orthogonal O of order m:
//! n·(k + m) operations a row. The random kind is k = 0: O of order n, uniform over the orthogonal
//! group. All in f64.
//!
//! Source: arXiv:2404.00456 (QuaRot) §4. Differs: O is random where m > 1, not another Hadamard
//! matrix, of which not every order has one.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// How Q is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotationKind {
    /// Random signs and a Hadamard matrix.
    Hadamard,
    /// Uniform over all orthogonal matrices; as many operations a row as Q has entries.
    Random,
}

/// An orthogonal matrix Q of order n.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// σ, `[n]`.
    signs: Vec<f64>,
    /// O `[m, m]`, row after row.
    odd: Vec<f64>,
    m: usize,
}

impl Rotation {
    /// The Q of order `n` that `seed` gives.
    pub fn new(kind: RotationKind, n: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let m = match kind {
            RotationKind::Hadamard => n >> n.trailing_zeros().min(usize::BITS - 1),
            RotationKind::Random => n,
        };
        let sign = |rng: &mut ChaCha8Rng| if rng.random() { 1.0 } else { -1.0 };
        Self {
            signs: (0..n).map(|_| sign(&mut rng)).collect(),
            odd: random_orthogonal(m, &mut rng),
            m,
        }
    }

    /// The order n.
    pub fn order(&self) -> usize {
        self.signs.len()
    }

    /// Multiplies each row of `rows [n_rows, n]` by Q from the right.
    pub fn apply(&self, rows: &mut [f64]) {
        let n = self.order().max(1);
        rows.par_chunks_exact_mut(n).for_each(|x| self.apply_row(x));
    }

    fn apply_row(&self, x: &mut [f64]) {
        let m = self.m.max(1);
        x.iter_mut().zip(&self.signs).for_each(|(x, s)| *x *= s);
        let order = x.len() / m;
        let mut half = 1;
        while half < order {
            for pair in x.chunks_exact_mut(2 * half * m) {
                let (low, high) = pair.split_at_mut(half * m);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let norm = 1.0 / (order as f64).sqrt();
        let mut product = vec![0.0; m];
        for part in x.chunks_exact_mut(m) {
            product.fill(0.0);
            for (x, row) in part.iter().zip(self.odd.chunks_exact(m)) {
                let terms = product.iter_mut().zip(row);
                terms.for_each(|(sum, o)| *sum += x * o);
            }
            let parts = part.iter_mut().zip(&product);
            parts.for_each(|(x, sum)| *x = norm * sum);
        }
    }
}

/// Uniform over the orthogonal matrices of order `m`: Gaussian rows made orthonormal one after the
/// other, each twice, which leaves nothing but rounding errors.
fn random_orthogonal(m: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    if m == 1 {
        return vec![1.0];
    }
    let mut rows: Vec<f64> = (0..m * m).map(|_| gaussian(rng)).collect();
    for i in 0..m {
        let (done, rest) = rows.split_at_mut(i * m);
        let row = &mut rest[..m];
        for _ in 0..2 {
            let parts = done.par_chunks_exact(m).map(|d| dot(d, row));
            let parts: Vec<f64> = parts.collect();
            for (other, part) in done.chunks_exact(m).zip(parts) {
                let pairs = row.iter_mut().zip(other);
                pairs.for_each(|(x, o)| *x -= part * o);
            }
        }
        let norm = dot(row, row).sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    rows
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A standard normal number, by Box and Muller.
fn gaussian(rng: &mut ChaCha8Rng) -> f64 {
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Q itself: what it makes of the identity's rows.
    fn matrix(rotation: &Rotation) -> Vec<f64> {
        let n = rotation.order();
        let mut rows: Vec<f64> = (0..n * n).map(|i| f64::from(i % (n + 1) == 0)).collect();
        rotation.apply(&mut rows);
        rows
    }

    #[test]
    fn rotations_are_orthogonal_and_mix_everything() {
        for kind in [RotationKind::Hadamard, RotationKind::Random] {
            for n in [1, 2, 7, 16, 24, 96] {
                let q = matrix(&Rotation::new(kind, n, 3));
                for (i, a) in q.chunks_exact(n).enumerate() {
                    for (j, b) in q.chunks_exact(n).enumerate() {
                        let expected = f64::from(i == j);
                        assert!((dot(a, b) - expected).abs() < 1e-12, "{kind:?} {n}");
                    }
                }
                assert!(q.iter().all(|x| *x != 0.0), "{kind:?} {n}");
            }
        }
    }

    #[test]
    fn powers_of_two_have_entries_of_one_size() {
        let q = matrix(&Rotation::new(RotationKind::Hadamard, 64, 1));
        assert!(q.iter().all(|x| (x.abs() - 0.125).abs() < 1e-15));
        let other = matrix(&Rotation::new(RotationKind::Hadamard, 64, 2));
        assert_ne!(q, other);
    }
}
