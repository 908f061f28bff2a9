//! From the factors of all samples to token weights.

use super::factors::{Drift, SampleFactors};
use super::safeguards::{self, Safeguarded, mean};
use super::settings::{Granularity, ImportanceSettings};
use crate::model::projection::Projection;
use crate::processor::TokenClass;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Below this share of the output's energy a residual is rounding noise, not an error to rank
/// tokens by: (f32 epsilon)², generously.
const VANISHING_RESIDUAL: f64 = 1e-12;

/// Why a layer has uniform weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Uniform {
    /// Both streams agree here, so there is no gradient: the first layer.
    VanishingResidual,
    /// Every factor is zero, though not for want of drift.
    AllZero,
    /// Some gradient overflowed.
    NotFinite,
}

impl std::fmt::Display for Uniform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::VanishingResidual => "nothing is quantized before them",
            Self::AllZero => "every token's factor is zero",
            Self::NotFinite => "a gradient overflowed",
        })
    }
}

/// The factors g of one layer, collected sample by sample.
#[derive(Clone, Debug)]
pub struct LayerImportance {
    settings: ImportanceSettings,
    /// `[projection][sample][token]`.
    factors: [Vec<Vec<f32>>; 7],
    /// Of all tokens, sample by sample.
    classes: Vec<TokenClass>,
    drift: Option<Drift>,
}

/// Token weights of one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenWeights {
    /// ω, `[sample][token]`.
    pub weights: Vec<Vec<f32>>,
    /// What safeguards did, where they are on.
    pub safeguarded: Option<Safeguarded>,
}

impl LayerImportance {
    /// Puts the samples' factors together, in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are none.
    pub fn new(settings: ImportanceSettings, samples: Vec<SampleFactors>) -> Result<Self> {
        if samples.is_empty() {
            return Err(Error::Invalid {
                what: "calibration".into(),
                why: "importance needs at least one sample".into(),
            });
        }
        let mut all = Self {
            settings,
            factors: Default::default(),
            classes: Vec::new(),
            drift: None,
        };
        for sample in samples {
            if let Some(own) = sample.drift {
                let sum = all.drift.get_or_insert_default();
                sum.residual_energy += own.residual_energy;
                sum.output_energy += own.output_energy;
            }
            all.classes.extend(sample.classes);
            for (projection, g) in sample.factors {
                if settings.modules.contains(projection) {
                    all.factors[projection as usize].push(g);
                }
            }
        }
        Ok(all)
    }

    /// g of the linears with this role, `[sample][token]`, as the backward pass gave them; `None`
    /// where they have none.
    pub fn factors(&self, projection: Projection) -> Option<&[Vec<f32>]> {
        let factors = &self.factors[projection as usize];
        (!factors.is_empty()).then_some(factors)
    }

    /// ‖residual‖² / ‖output‖² over all tokens: how far the quantized stream has drifted, where
    /// factors are made of that.
    pub fn relative_drift(&self) -> Option<f64> {
        let drift = self.drift?;
        Some(drift.residual_energy / drift.output_energy.max(f64::MIN_POSITIVE))
    }

    /// Token weights ω of the linears with this role, which have `in_features` inputs, with mean g
    /// brought to 1 before the power. `Ok(None)` where tokens are to weigh alike.
    ///
    /// # Errors
    /// The reason for which these linears must have uniform weights.
    pub fn token_weights(
        &self,
        projection: Projection,
        in_features: usize,
    ) -> std::result::Result<Option<TokenWeights>, Uniform> {
        let factors = &self.factors[projection as usize];
        if factors.is_empty() {
            return Ok(None);
        }
        // NaN compares false, so it passes to the check on the mean.
        let drift = self.relative_drift();
        if drift.is_some_and(|drift| drift <= VANISHING_RESIDUAL) {
            return Err(Uniform::VanishingResidual);
        }
        let mut g: Vec<f64> = factors.iter().flatten().map(|&g| f64::from(g)).collect();
        let mean_factor = mean(&g);
        if !mean_factor.is_finite() {
            return Err(Uniform::NotFinite);
        }
        if mean_factor <= 0.0 {
            return Err(match drift {
                Some(_) => Uniform::VanishingResidual,
                None => Uniform::AllZero,
            });
        }
        let guards = self.settings.safeguards;
        let n_clipped = guards.clip(&mut g);
        if self.settings.granularity == Granularity::Modality {
            self.level(&mut g);
        }
        let n_raised = guards.raise(&mut g);
        let mut weights = self.powers(g).ok_or(Uniform::AllZero)?;
        let wanted = guards.wanted(in_features);
        let tempering = wanted.map_or(0.0, |wanted| safeguards::temper(&mut weights, wanted));
        let effective_sample_size = safeguards::effective_sample_size(&weights);
        let safeguarded = guards.is_on().then_some(Safeguarded {
            n_clipped,
            n_raised,
            tempering,
            wanted,
            effective_sample_size,
        });
        let mut rest = weights.into_iter().map(|w| w as f32);
        let by_sample = factors
            .iter()
            .map(|f| rest.by_ref().take(f.len()).collect());
        Ok(Some(TokenWeights {
            weights: by_sample.collect(),
            safeguarded,
        }))
    }

    /// (g / mean g)^p; `None` if that is zero for all tokens, as after a clip at a low quantile.
    fn powers(&self, mut g: Vec<f64>) -> Option<Vec<f64>> {
        let mean = mean(&g);
        if mean <= 0.0 {
            return None;
        }
        let power = self.settings.power;
        g.iter_mut().for_each(|g| *g = (*g / mean).powf(power));
        Some(g)
    }

    /// Gives all tokens of a modality their mean.
    fn level(&self, g: &mut [f64]) {
        let mut sums = [(0.0, 0usize); 3];
        for (g, class) in g.iter().zip(&self.classes) {
            let (sum, n) = &mut sums[modality(*class)];
            *sum += g;
            *n += 1;
        }
        for (g, class) in g.iter_mut().zip(&self.classes) {
            let (sum, n) = sums[modality(*class)];
            *g = sum / n as f64;
        }
    }
}

/// 0 for vision, 1 for answers, 2 for all that only asks or frames.
fn modality(class: TokenClass) -> usize {
    match class {
        TokenClass::Vision => 0,
        TokenClass::Answer => 1,
        TokenClass::Prompt | TokenClass::Special | TokenClass::Text => 2,
    }
}
