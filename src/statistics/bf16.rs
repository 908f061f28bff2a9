//! Sums of products of inputs that are rounded to bf16.
//!
//! Where the processor has AVX-512 BF16 (detected at run time), one instruction takes 32 products of
//! bf16 numbers to 16 f32 sums. Elsewhere the rounded numbers go through the f32 products: the same
//! up to the order of summation.

use super::single;
use crate::Matrix;

/// `hessian` += lower triangle of `x`ᵀ`x`, and with `cross` its C += `residual`ᵀ`x`; inputs
/// `[n_tokens, in]`.
pub(super) fn add(hessian: &mut Matrix, cross: Option<(&mut Matrix, &Matrix)>, x: &Matrix) {
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = avx512::Instructions::detect() {
        return avx512::add(instructions, hessian, cross, x);
    }
    let x = rounded(x);
    single::add_gram_lower(hessian, &x);
    if let Some((cross, residual)) = cross {
        single::add_product(cross, &rounded(residual), &x);
    }
}

fn rounded(x: &Matrix) -> Matrix {
    let round = |value: f32| half::bf16::from_f32(value).to_f32();
    Matrix::from_fn(x.rows(), x.cols(), |i, j| round(x[(i, j)]))
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::single::band_rows;
    use crate::Matrix;
    use rayon::prelude::*;
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps,
    };
    use std::mem::transmute;

    /// Columns that lie side by side for each pair of tokens: one register.
    const LANES: usize = 16;

    /// Rows of a tile. With [`PANELS`] panels it takes 24 of 32 registers for its sums.
    const ROWS: usize = 8;

    /// Panels of a tile.
    const PANELS: usize = 3;

    /// Sums of a tile.
    type Tile = [[[f32; LANES]; PANELS]; ROWS];

    /// Proof that the processor has them.
    #[derive(Clone, Copy)]
    pub(super) struct Instructions(());

    impl Instructions {
        pub(super) fn detect() -> Option<Self> {
            let has_all =
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
            has_all.then_some(Self(()))
        }
    }

    /// As [`super::add`].
    pub(super) fn add(
        instructions: Instructions,
        hessian: &mut Matrix,
        cross: Option<(&mut Matrix, &Matrix)>,
        x: &Matrix,
    ) {
        let n = x.cols();
        let right = Packed::new(x);
        add_tiles(instructions, hessian, &right, &right, |row| row + 1);
        if let Some((cross, residual)) = cross {
            add_tiles(instructions, cross, &Packed::new(residual), &right, |_| n);
        }
    }

    /// Panels of [`LANES`] columns, token pair after token pair: the even token's number in the low
    /// half, the odd one's in the high half. What is missing is zero.
    struct Packed {
        pairs: Vec<[u32; LANES]>,
        n_pairs: usize,
    }

    impl Packed {
        fn new(x: &Matrix) -> Self {
            let n_pairs = x.rows().div_ceil(2);
            let mut pairs = vec![[0; LANES]; x.cols().div_ceil(LANES) * n_pairs];
            let panels = pairs.par_chunks_mut(n_pairs.max(1)).enumerate();
            panels.for_each(|(panel, pairs)| {
                let columns = panel * LANES..x.cols().min((panel + 1) * LANES);
                for token in 0..x.rows() {
                    let shift = 16 * (token % 2);
                    let values = &x.row(token)[columns.clone()];
                    for (pair, value) in pairs[token / 2].iter_mut().zip(values) {
                        *pair |= u32::from(half::bf16::from_f32(*value).to_bits()) << shift;
                    }
                }
            });
            Self { pairs, n_pairs }
        }

        fn panel(&self, index: usize) -> &[[u32; LANES]] {
            &self.pairs[index * self.n_pairs..][..self.n_pairs]
        }
    }

    /// `target` += `left`ᵀ`right`, of each row the first `n_wanted(row)` columns.
    fn add_tiles(
        instructions: Instructions,
        target: &mut Matrix,
        left: &Packed,
        right: &Packed,
        n_wanted: impl Fn(usize) -> usize + Sync,
    ) {
        let n = target.cols();
        if n == 0 {
            return;
        }
        let band = band_rows(n).next_multiple_of(LANES);
        let bands = target.data_mut().par_chunks_mut(band * n).enumerate();
        bands.for_each(|(index, rows)| {
            let (above, height) = (index * band, rows.len() / n);
            let n_cols = n_wanted(above + height - 1);
            for start in (0..n_cols).step_by(PANELS * LANES) {
                let n_panels = (n_cols - start).div_ceil(LANES).min(PANELS);
                for top in (0..height).step_by(ROWS) {
                    let below = height.min(top + ROWS);
                    if n_wanted(above + below - 1) <= start {
                        continue;
                    }
                    let mut sums: Tile = [[[0.0; LANES]; PANELS]; ROWS];
                    let octet = left.panel((above + top) / LANES);
                    let lane = (above + top) % LANES;
                    let panel = |i: usize| right.panel(start / LANES + i);
                    let (a, b, c) = (panel(0), panel(1.min(n_panels - 1)), panel(n_panels - 1));
                    // SAFETY: the processor has the instructions, or there were no `instructions`.
                    unsafe {
                        match n_panels {
                            1 => tile(octet, lane, [a], &mut sums),
                            2 => tile(octet, lane, [a, b], &mut sums),
                            _ => tile(octet, lane, [a, b, c], &mut sums),
                        }
                    }
                    let Instructions(()) = instructions;
                    for (sums, row) in sums.iter().zip(top..below) {
                        let n_wanted = n_wanted(above + row).saturating_sub(start);
                        let target = &mut rows[row * n + start..(row + 1) * n];
                        let pairs = target.iter_mut().zip(sums.as_flattened()).take(n_wanted);
                        pairs.for_each(|(target, sum)| *target += sum);
                    }
                }
            }
        });
    }

    /// Sums over token pairs of [`ROWS`] columns of one panel, from `lane` on, times all of `right`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn tile<const N: usize>(
        left: &[[u32; LANES]],
        lane: usize,
        right: [&[[u32; LANES]]; N],
        sums: &mut Tile,
    ) {
        let mut totals = [[_mm512_setzero_ps(); N]; ROWS];
        let n_pairs = left.len();
        let right = right.map(|panel| &panel[..n_pairs]);
        for pair in 0..n_pairs {
            let own: &[u32; ROWS] = left[pair][lane..]
                .first_chunk()
                .expect("two octets a panel");
            let mut others = [_mm512_setzero_si512(); N];
            for (other, panel) in others.iter_mut().zip(right) {
                // SAFETY: a panel's row has as many bytes as the register; no alignment is asked.
                *other = unsafe { _mm512_loadu_si512(panel[pair].as_ptr().cast()) };
            }
            for (totals, own) in totals.iter_mut().zip(own) {
                let own = bf16s(_mm512_set1_epi32(own.cast_signed()));
                for (total, other) in totals.iter_mut().zip(others) {
                    *total = _mm512_dpbf16_ps(*total, own, bf16s(other));
                }
            }
        }
        for (sums, totals) in sums.iter_mut().zip(totals) {
            for (sums, total) in sums.iter_mut().zip(totals) {
                // SAFETY: sixteen f32 are the size of the register; no alignment is asked.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), total) };
            }
        }
    }

    /// The same bits.
    fn bf16s(register: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits, any of which are numbers.
        unsafe { transmute(register) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
    }

    /// Whatever the processor does is what f32 products of rounded numbers do, at sizes around all
    /// blocks; nothing is written above H's diagonal.
    #[test]
    fn products_are_those_of_rounded_inputs() {
        for (n_tokens, n) in [(1, 1), (2, 15), (7, 16), (33, 49), (64, 131), (130, 300)] {
            let (x, residual) = (random(n_tokens, n, 0), random(n_tokens, n, 1));
            let mut found = [Matrix::zeros(n, n), Matrix::zeros(n, n)];
            let mut expected = found.clone();
            for _ in 0..2 {
                let [hessian, cross] = &mut found;
                add(hessian, Some((cross, &residual)), &x);
                single::add_gram_lower(&mut expected[0], &rounded(&x));
                single::add_product(&mut expected[1], &rounded(&residual), &rounded(&x));
            }
            for (found, expected) in found.iter().zip(&expected) {
                for (found, expected) in found.data().iter().zip(expected.data()) {
                    let error = (found - expected).abs();
                    assert!(
                        error <= 2.0 * n_tokens as f32 * f32::EPSILON,
                        "{n}: {error}"
                    );
                }
            }
            let above = (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j)));
            assert!(above.into_iter().all(|place| found[0][place] == 0.0));
        }
    }
}
