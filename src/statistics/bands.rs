//! Moments as one flat run of numbers, cut into bands: what several processes sum up together.
//!
//! The run is H's lower triangle row after row, then C, then S. Every number is summed alone, so
//! bands can be summed by different processes and put together again, to the same bits.

use super::Statistics;
use crate::{Matrix, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What statistics count beside their moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    n_tokens: u64,
    weight_sum: f64,
    weight_square_sum: f64,
}

impl Counts {
    /// Adds what others have counted.
    pub(crate) fn add(&mut self, other: Self) {
        self.n_tokens += other.n_tokens;
        self.weight_sum += other.weight_sum;
        self.weight_square_sum += other.weight_square_sum;
    }
}

/// One matrix of moments in the flat run.
struct Part<'a> {
    matrix: &'a Matrix,
    is_lower: bool,
}

impl Statistics {
    /// Counts of tokens and weights.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            n_tokens: self.n_tokens,
            weight_sum: self.weight_sum,
            weight_square_sum: self.weight_square_sum,
        }
    }

    /// How many numbers the flat run has.
    pub(crate) fn n_moments(&self) -> usize {
        self.parts().map(|part| part.len()).sum()
    }

    /// The numbers of one of `n_bands` about equal bands.
    pub(crate) fn band(&self, band: usize, n_bands: usize) -> Vec<f32> {
        let range = band_range(self.n_moments(), band, n_bands);
        let mut values = Vec::with_capacity(range.len());
        let mut start = 0;
        for part in self.parts() {
            let end = start + part.len();
            let own = range.start.clamp(start, end) - start..range.end.clamp(start, end) - start;
            for (row, columns) in part.slices(own) {
                values.extend_from_slice(&part.matrix.row(row)[columns]);
            }
            start = end;
        }
        values
    }

    /// The same, which are empty, with the moments of `bands`, which are all there are.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if they are not as many numbers as there should be.
    pub(crate) fn filled(mut self, counts: Counts, bands: &[Vec<f32>]) -> Result<Self> {
        let n_found: usize = bands.iter().map(Vec::len).sum();
        if n_found != self.n_moments() {
            return Err(crate::Error::Shape {
                module: "moments summed up by several ranks".into(),
                expected: vec![self.n_moments()],
                found: vec![n_found],
            });
        }
        let mut values = bands.iter().flatten().copied();
        let mut take = |own: &mut [f32]| own.iter_mut().zip(&mut values).for_each(|(o, v)| *o = v);
        for row in 0..self.hessian_lower.rows() {
            take(&mut self.hessian_lower.row_mut(row)[..=row]);
        }
        for matrix in [&mut self.cross, &mut self.output_cross] {
            matrix.iter_mut().for_each(|matrix| take(matrix.data_mut()));
        }
        self.n_tokens = counts.n_tokens;
        self.weight_sum = counts.weight_sum;
        self.weight_square_sum = counts.weight_square_sum;
        Ok(self)
    }

    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let others = [&self.cross, &self.output_cross].into_iter().flatten();
        [Part::lower(&self.hessian_lower)]
            .into_iter()
            .chain(others.map(Part::whole))
    }
}

impl<'a> Part<'a> {
    fn lower(matrix: &'a Matrix) -> Self {
        Self {
            matrix,
            is_lower: true,
        }
    }

    fn whole(matrix: &'a Matrix) -> Self {
        Self {
            matrix,
            is_lower: false,
        }
    }

    fn len(&self) -> usize {
        self.before(self.matrix.rows())
    }

    /// Numbers before a row.
    fn before(&self, row: usize) -> usize {
        match self.is_lower {
            true => row * (row + 1) / 2,
            false => row * self.matrix.cols(),
        }
    }

    /// The pieces of rows that a range of the part's numbers is made of.
    fn slices(&self, range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
        let rows = 0..self.matrix.rows();
        rows.filter_map(move |row| {
            let (first, end) = (self.before(row), self.before(row + 1));
            let own = range.start.max(first)..range.end.min(end);
            (own.start < own.end).then(|| (row, own.start - first..own.end - first))
        })
    }
}

/// The numbers of one of `n_bands` about equal bands of `n`.
pub(crate) fn band_range(n: usize, band: usize, n_bands: usize) -> Range<usize> {
    let start = |band: usize| (n as u128 * band as u128 / n_bands as u128) as usize;
    start(band)..start(band + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(seed: usize, with_cross: bool, n_out: Option<usize>) -> Statistics {
        let value = |i: usize, j: usize| ((i * 31 + j * 17 + seed * 7) % 23) as f32 / 7.0 - 1.5;
        let u = Matrix::from_fn(9, 13, value);
        let f = Matrix::from_fn(9, 13, |i, j| value(j, i));
        let drift = n_out.map(|n| Matrix::from_fn(9, n, |i, j| value(i + 3, j)));
        let mut statistics = Statistics::new(13, with_cross);
        if let Some(n) = n_out {
            statistics = statistics.with_output(n);
        }
        let batch = super::super::Batch {
            u: &u,
            f: with_cross.then_some(&f),
            output_drift: drift.as_ref(),
            weights: None,
        };
        statistics.add_batch("m", &batch).unwrap();
        statistics
    }

    #[test]
    fn bands_summed_apart_are_the_sum() {
        for (with_cross, n_out) in [
            (false, None),
            (true, None),
            (true, Some(5)),
            (false, Some(4)),
        ] {
            let [a, b] = [0, 1].map(|seed| statistics(seed, with_cross, n_out));
            let mut merged = a.clone();
            merged.merge(&b).unwrap();
            for n_bands in [1, 2, 3, 7, 400] {
                let bands = (0..n_bands).map(|band| {
                    let pairs = a.band(band, n_bands).into_iter().zip(b.band(band, n_bands));
                    pairs.map(|(a, b)| a + b).collect()
                });
                let bands: Vec<Vec<f32>> = bands.collect();
                let longest = bands.iter().map(Vec::len).max().unwrap();
                assert!(longest <= a.n_moments().div_ceil(n_bands));
                let mut counts = a.counts();
                counts.add(b.counts());
                let empty = || {
                    let empty = Statistics::new(13, with_cross);
                    match n_out {
                        Some(n) => empty.with_output(n),
                        None => empty,
                    }
                };
                assert_eq!(empty().filled(counts, &bands).unwrap(), merged);
                let more = [&bands[..], &[vec![0.0]]].concat();
                assert!(empty().filled(counts, &more).is_err());
            }
        }
    }
}
