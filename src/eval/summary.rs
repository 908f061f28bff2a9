//! Scores with intervals, and two models' answers held against each other question by question.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use statrs::distribution::{Binomial, DiscreteCDF};
use std::collections::BTreeMap;

/// Times that questions are drawn anew for an interval.
const N_RESAMPLES: usize = 2000;
/// A score that counts as a right answer where right and wrong are told apart. Only similarities
/// and shares of annotators lie between 0 and 1.
pub const RIGHT_FROM: f64 = 0.5;

/// A mean score with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Questions.
    pub n: usize,
    /// Mean, in percent.
    pub percent: f64,
    /// Bootstrap interval at 95 %, in percent: percentiles of the mean over questions drawn with
    /// replacement.
    pub interval: [f64; 2],
}

impl Score {
    /// The mean of scores from 0 to 1; the same interval for the same scores and seed.
    pub fn of(scores: &[f64], seed: u64) -> Self {
        Self {
            n: scores.len(),
            percent: 100.0 * mean(scores),
            interval: interval(scores, seed),
        }
    }

    /// Means by group; a question counts in all of its groups.
    pub fn by_group<'a>(
        questions: impl Iterator<Item = (&'a [String], f64)>,
        seed: u64,
    ) -> BTreeMap<String, Self> {
        let mut scores: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (groups, score) in questions {
            for group in groups {
                scores.entry(group).or_default().push(score);
            }
        }
        let of = |(name, scores): (&str, Vec<f64>)| (name.to_owned(), Self::of(&scores, seed));
        scores.into_iter().map(of).collect()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Bounds of the middle 95 % of resampled means, in percent.
fn interval(values: &[f64], seed: u64) -> [f64; 2] {
    if values.is_empty() {
        return [0.0; 2];
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n = values.len() as u64;
    let mut means: Vec<f64> = (0..N_RESAMPLES)
        .map(|_| {
            let draw = |_| values[rng.random_range(0..n) as usize];
            (0..n).map(draw).sum::<f64>() / n as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    // 2.5 % of the means lie below the first, as many above the second.
    let outside = N_RESAMPLES / 40;
    [outside, N_RESAMPLES - 1 - outside].map(|i| 100.0 * means[i])
}

/// Two models' scores on the same questions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pairs {
    /// Both right.
    pub n_both: usize,
    /// Only the first right.
    pub n_only_first: usize,
    /// Only the second right.
    pub n_only_second: usize,
    /// Both wrong.
    pub n_neither: usize,
    /// McNemar's exact test, two-sided: how likely questions flip so unevenly, or more so, between
    /// models that are equally good.
    pub p_value: f64,
    /// Mean score of the first less that of the second, in points.
    pub difference: f64,
    /// Bootstrap interval of it at 95 %, questions drawn in pairs.
    pub difference_interval: [f64; 2],
}

impl Pairs {
    /// Pairs of scores from 0 to 1.
    ///
    /// Source: McNemar, Psychometrika 12 (1947), with the binomial distribution in place of its
    /// limit.
    pub fn of(pairs: &[(f64, f64)], seed: u64) -> Self {
        let count = |first: bool, second: bool| {
            let is_so = |p: &&(f64, f64)| (is_right(p.0), is_right(p.1)) == (first, second);
            pairs.iter().filter(is_so).count()
        };
        let (n_only_first, n_only_second) = (count(true, false), count(false, true));
        let differences: Vec<f64> = pairs.iter().map(|(a, b)| a - b).collect();
        Self {
            n_both: count(true, true),
            n_only_first,
            n_only_second,
            n_neither: count(false, false),
            p_value: exact_p_value(n_only_first, n_only_second),
            difference: 100.0 * mean(&differences),
            difference_interval: interval(&differences, seed),
        }
    }
}

/// Whether a score counts as a right answer.
pub fn is_right(score: f64) -> bool {
    score >= RIGHT_FROM
}

fn exact_p_value(b: usize, c: usize) -> f64 {
    let (n, fewer) = ((b + c) as u64, b.min(c) as u64);
    // Without a flip nothing speaks against equality, and there is no distribution to ask.
    match Binomial::new(0.5, n) {
        Ok(binomial) if n > 0 => (2.0 * binomial.cdf(fewer)).min(1.0),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mcnemar_is_exact() {
        // 2 · (1 + 10 + 45) ÷ 2¹⁰.
        assert!((exact_p_value(2, 8) - 112.0 / 1024.0).abs() < 1e-12);
        assert!((exact_p_value(0, 6) - 2.0 / 64.0).abs() < 1e-12);
        assert_eq!(exact_p_value(5, 5), 1.0);
        assert_eq!(exact_p_value(0, 0), 1.0);
    }

    #[test]
    fn pairs_are_counted_on_both_sides_of_a_half() {
        let pairs = [(1.0, 0.0), (0.5, 1.0), (0.0, 0.3), (0.9, 0.4), (0.2, 0.6)];
        let found = Pairs::of(&pairs, 1);
        let counts = (
            found.n_both,
            found.n_only_first,
            found.n_only_second,
            found.n_neither,
        );
        assert_eq!(counts, (1, 2, 1, 1));
        assert!((found.difference - 6.0).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn intervals_hold_the_mean_and_narrow_with_more_questions() {
        let scores =
            |n: usize| -> Vec<f64> { (0..n).map(|i| f64::from(u8::from(i % 4 != 0))).collect() };
        let (few, many) = (Score::of(&scores(40), 0), Score::of(&scores(4000), 0));
        for found in [few, many] {
            assert_eq!(found.percent, 75.0);
            assert!(
                found.interval[0] < 75.0 && found.interval[1] > 75.0,
                "{found:?}"
            );
        }
        let width = |s: Score| s.interval[1] - s.interval[0];
        // Normal: 2 · 1.96 · sqrt(0.75 · 0.25 ÷ 4000) = 2.68 points, ten times that for a
        // hundredth.
        assert!((width(many) - 2.68).abs() < 0.3 && (width(few) - 26.8).abs() < 4.0);
        assert_eq!(few, Score::of(&scores(40), 0));
        assert_eq!(Score::of(&[], 0).interval, [0.0; 2]);
    }
}
