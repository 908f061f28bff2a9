//! What keeps weights from resting on a few tokens. Gradients have heavy tails, and squares heavier
//! ones: a handful of tokens may own Σω, and the Hessian then has fewer effective tokens than
//! columns. All of this is off in the paper's presets, and told in the report where it is on.

use serde::{Deserialize, Serialize};

/// Limits on factors g and weights ω, in the order in which they are applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Safeguards {
    /// Factors are cut down to this quantile of them.
    pub quantile: Option<f64>,
    /// Factors are raised to this share of their mean.
    pub floor: Option<f64>,
    /// Effective sample size over all tokens to be reached, as a multiple of a linear's inputs:
    /// weights are mixed with equal ones as far as that takes.
    pub min_ess: Option<f64>,
}

/// What safeguards did to the weights of one linear.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Safeguarded {
    /// Tokens whose factor was cut down.
    pub n_clipped: usize,
    /// Tokens whose factor was raised.
    pub n_raised: usize,
    /// μ in ω ← (1 − μ)·ω + μ, ω of mean 1.
    pub tempering: f64,
    /// Effective sample size that was asked for.
    pub wanted: Option<f64>,
    /// What it is; less than `wanted` only where there are fewer tokens than that.
    pub effective_sample_size: f64,
}

impl Safeguards {
    /// Whether any is on.
    pub fn is_on(&self) -> bool {
        *self != Self::default()
    }

    /// Cuts down the largest of the finite `factors` and says how many: to the smallest of them that
    /// at least the share `quantile` of all do not exceed.
    pub(super) fn clip(&self, factors: &mut [f64]) -> usize {
        let Some(quantile) = self.quantile.filter(|_| !factors.is_empty()) else {
            return 0;
        };
        let mut sorted = factors.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = (quantile * sorted.len() as f64).ceil() as usize;
        let highest = sorted[rank.clamp(1, sorted.len()) - 1];
        let above = factors.iter_mut().filter(|g| **g > highest);
        above.map(|g| *g = highest).count()
    }

    /// Raises the smallest of `factors` and says how many.
    pub(super) fn raise(&self, factors: &mut [f64]) -> usize {
        let Some(floor) = self.floor else {
            return 0;
        };
        let lowest = floor * mean(factors);
        let below = factors.iter_mut().filter(|g| **g < lowest);
        below.map(|g| *g = lowest).count()
    }

    /// The effective sample size that a linear of `in_features` is to have.
    pub(super) fn wanted(&self, in_features: usize) -> Option<f64> {
        self.min_ess.map(|multiple| multiple * in_features as f64)
    }
}

/// Mixes `weights` with equal ones, by the smallest share μ that brings their effective sample size
/// to `wanted`, and gives μ; 1 where that is no less than their number. Weights come to mean 1.
///
/// With ω of mean 1 and S = Σω², the mixture has Σ = n and Σ² = n + (1 − μ)²·(S − n), so μ has a
/// closed form.
pub(super) fn temper(weights: &mut [f64], wanted: f64) -> f64 {
    let n = weights.len() as f64;
    if effective_sample_size(weights) >= wanted {
        return 0.0;
    }
    let mean = mean(weights);
    weights.iter_mut().for_each(|w| *w /= mean);
    let excess = weights.iter().map(|w| w * w).sum::<f64>() - n;
    let kept = if wanted < n && excess > 0.0 {
        ((n * n / wanted - n) / excess).sqrt().min(1.0)
    } else {
        0.0
    };
    (weights.iter_mut()).for_each(|w| *w = kept * *w + (1.0 - kept));
    1.0 - kept
}

/// (Σω)² / Σω².
pub(super) fn effective_sample_size(weights: &[f64]) -> f64 {
    let (sum, squares) = (weights.iter()).fold((0.0, 0.0), |(s, q), w| (s + w, q + w * w));
    sum * sum / squares
}

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heavy() -> Vec<f64> {
        (1..=200).map(|i| 1.0 / f64::from(i)).collect()
    }

    #[test]
    fn tempering_reaches_the_effective_sample_size_and_goes_no_further() {
        for wanted in [20.0, 60.0, 150.0, 199.0] {
            let (before, mut weights) = (effective_sample_size(&heavy()), heavy());
            let mu = temper(&mut weights, wanted);
            let after = effective_sample_size(&weights);
            if before >= wanted {
                assert_eq!((mu, &weights), (0.0, &heavy()));
            } else {
                assert!((after / wanted - 1.0).abs() < 1e-9, "{after} for {wanted}");
                // The definition, written out.
                let mean = mean(&heavy());
                let pairs = heavy().into_iter().zip(&weights);
                pairs.for_each(|(w, t)| {
                    assert!(((1.0 - mu) * w / mean + mu - t).abs() < 1e-12);
                });
            }
        }
        for too_many in [200.0, 1e6] {
            let mut weights = heavy();
            assert_eq!(temper(&mut weights, too_many), 1.0);
            assert!(weights.iter().all(|w| *w == 1.0));
        }
    }

    #[test]
    fn factors_are_cut_at_a_quantile_and_raised_to_a_floor() {
        let mut factors = vec![0.0, 1.0, 2.0, 3.0, 94.0];
        let safeguards = Safeguards {
            quantile: Some(0.8),
            floor: Some(0.5),
            min_ess: None,
        };
        assert_eq!(safeguards.clip(&mut factors), 1);
        assert_eq!(factors, [0.0, 1.0, 2.0, 3.0, 3.0]);
        assert_eq!(safeguards.raise(&mut factors), 1);
        assert_eq!(factors, [0.9, 1.0, 2.0, 3.0, 3.0].map(|g: f64| g.max(0.9)));
        let mut same = factors.clone();
        let off = Safeguards::default();
        assert_eq!((off.clip(&mut same), off.raise(&mut same)), (0, 0));
        assert_eq!(same, factors);
        assert!(!off.is_on() && safeguards.is_on());
    }
}
