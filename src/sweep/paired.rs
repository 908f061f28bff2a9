//! Methods compared seed by seed: the samples that are drawn move all methods alike, so pairs tell
//! more than means.

use super::SweepRow;
use crate::plan::Bits;
use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};
use std::cmp::Reverse;

/// A mean over seeds with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Mean; of ratios the geometric one.
    pub mean: f64,
    /// Lowest and highest by Student's t; absent with fewer than two pairs.
    pub bounds: Option<[f64; 2]>,
}

/// One method against the baseline in one format.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paired {
    /// Method or variant.
    pub method: String,
    /// What it is compared with.
    pub baseline: String,
    /// Bits per weight.
    pub bits: Bits,
    /// Columns that share a scale; `None`: all of a row.
    pub group_size: Option<usize>,
    /// Seeds that both have.
    pub n_pairs: usize,
    /// Mean KL over tasks as a share of the baseline's.
    pub kl_ratio: Interval,
    /// Mean accuracy over tasks less the baseline's, in points; absent without questions.
    pub accuracy_difference: Option<Interval>,
    /// Time to quantize as a share of the baseline's, geometric mean.
    pub seconds_ratio: f64,
}

/// All methods but the baseline, format by format in order of the rows. The baseline is the one
/// named, or the first that was calibrated; a row without seed pairs with every seed.
pub fn paired(rows: &[SweepRow], baseline: Option<&str>) -> Vec<Paired> {
    let first = || rows.iter().find(|row| row.seed.is_some());
    let Some(baseline) = baseline.or_else(|| first().map(|row| row.method.as_str())) else {
        return Vec::new();
    };
    let mut keys: Vec<(&str, Bits, Option<usize>)> = Vec::new();
    for row in rows {
        if let Some(bits) = row.bits.filter(|_| row.method != baseline) {
            let key = (row.method.as_str(), bits, row.group_size);
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
    }
    keys.sort_by_key(|(_, bits, group_size)| (Reverse(*bits), *group_size));
    let of = |method, bits, group_size| {
        let own = move |row: &&SweepRow| {
            (row.method.as_str(), row.bits, row.group_size) == (method, Some(bits), group_size)
        };
        rows.iter().filter(own)
    };
    let pair = |(method, bits, group_size)| {
        let meets =
            |a: &SweepRow, b: &SweepRow| a.seed == b.seed || a.seed.is_none() || b.seed.is_none();
        let pairs: Vec<(&SweepRow, &SweepRow)> = of(method, bits, group_size)
            .flat_map(|a| of(baseline, bits, group_size).map(move |b| (a, b)))
            .filter(|(a, b)| meets(a, b))
            .collect();
        Paired::new(baseline, &pairs)
    };
    keys.into_iter().filter_map(pair).collect()
}

impl Paired {
    /// `None` without a pair.
    fn new(baseline: &str, pairs: &[(&SweepRow, &SweepRow)]) -> Option<Self> {
        let (first, _) = pairs.first()?;
        let log_ratios = |value: fn(&SweepRow) -> f64| -> Vec<f64> {
            let logs = pairs.iter().map(|(a, b)| (value(a) / value(b)).ln());
            logs.collect()
        };
        let differences = pairs
            .iter()
            .map(|(a, b)| Some(a.mean_accuracy()? - b.mean_accuracy()?));
        let differences: Option<Vec<f64>> = differences.collect();
        Some(Self {
            method: first.method.clone(),
            baseline: baseline.to_owned(),
            bits: first.bits?,
            group_size: first.group_size,
            n_pairs: pairs.len(),
            kl_ratio: interval(&log_ratios(SweepRow::mean_kl)).map(f64::exp),
            accuracy_difference: differences.map(|differences| interval(&differences)),
            seconds_ratio: mean(&log_ratios(|row| row.seconds)).exp(),
        })
    }
}

impl Interval {
    fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self {
            mean: f(self.mean),
            bounds: self.bounds.map(|bounds| bounds.map(f)),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn interval(values: &[f64]) -> Interval {
    let (n, mean) = (values.len() as f64, mean(values));
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let student = StudentsT::new(0.0, 1.0, n - 1.0).ok();
    let bounds = student.map(|student| {
        let half = student.inverse_cdf(0.975) * (squares / (n - 1.0) / n).sqrt();
        [mean - half, mean + half]
    });
    Interval { mean, bounds }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::TaskScore;
    use std::collections::BTreeMap;

    fn row(method: &str, seed: Option<u64>, kl: f64, accuracy: f64) -> SweepRow {
        let score = TaskScore {
            accuracy: Some(accuracy),
            perplexity: None,
            kl,
            same_top: 0.0,
            n: 1,
            n_tokens: None,
        };
        SweepRow {
            method: method.into(),
            bits: Some(Bits::Each(3)),
            group_size: Some(64),
            seed,
            tasks: BTreeMap::from([("task".to_owned(), score)]),
            seconds: kl,
            tuning: None,
            allocated: None,
        }
    }

    /// Worked out by hand with t = 4.302652729911 for two degrees of freedom.
    #[test]
    fn intervals_are_students() {
        let rows = [
            row("rtn", None, 4.0, 10.0),
            row("gptq", Some(0), 1.0, 50.0),
            row("gptq", Some(1), 2.0, 48.0),
            row("gptq", Some(2), 4.0, 40.0),
            row("new", Some(0), 0.5, 51.0),
            row("new", Some(1), 0.8, 50.0),
            row("new", Some(2), 2.4, 43.0),
            row("new", Some(3), 9.0, 0.0),
        ];
        let all = paired(&rows, None);
        assert_eq!(all.len(), 2);
        let (nearest, new) = (&all[0], &all[1]);
        assert_eq!((nearest.method.as_str(), nearest.n_pairs), ("rtn", 3));
        assert!((nearest.kl_ratio.mean - 2.0).abs() < 1e-12);
        assert_eq!((new.method.as_str(), new.n_pairs), ("new", 3));
        let close = |found: Interval, mean: f64, low: f64, high: f64| {
            let bounds = found.bounds.unwrap();
            let pairs = [(found.mean, mean), (bounds[0], low), (bounds[1], high)];
            for (found, expected) in pairs {
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
        };
        close(new.kl_ratio, 0.493242415, 0.297833647, 0.816858950);
        let difference = new.accuracy_difference.unwrap();
        close(difference, 2.0, -0.484137712, 4.484137712);
        assert!((new.seconds_ratio - new.kl_ratio.mean).abs() < 1e-12);
    }

    #[test]
    fn one_pair_has_no_interval() {
        let rows = [
            row("gptq", Some(0), 1.0, 50.0),
            row("new", Some(0), 0.5, 51.0),
        ];
        assert_eq!(paired(&rows, Some("gptq"))[0].kl_ratio.bounds, None);
        assert!(paired(&rows, Some("awq")).is_empty());
    }
}
