//! From gradients to token weights.

use crate::importance::backward::{
    self, AttentionGradients, AttentionPass, LayerGradients, MlpGradients,
};
use crate::model::projection::Projection;
use crate::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Below this share of the output's energy a residual is rounding noise, not an error to rank
/// tokens by: (f32 epsilon)², generously.
const VANISHING_RESIDUAL: f64 = 1e-12;

/// The norm over channels that makes one number of a token's gradient. In a mixture the channels are
/// those of all the experts that the token went through: which they are may differ between the
/// pass that the gradient is of and the quantized layer that the weight is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenNorm {
    /// Mean of absolute values, the paper's.
    MeanAbs,
    /// Root of the mean square, which no rotation of the channels changes.
    Rms,
}

/// Which output the local loss compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLoss {
    /// The residual stream after attention, the paper's: weights for q, k, v and o.
    Attention,
    /// The layer's output: weights for the MLP's linears too. Not in the paper.
    Layer,
    /// The cross-entropy of the answers at the end of the model ([`super::end_loss`]): weights for
    /// all linears of all layers. Not in the paper.
    Answer,
}

/// How token weights are made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImportanceSettings {
    /// The exponent p in ω = (g / mean g)^p.
    pub power: f64,
    /// The norm over channels.
    pub norm: TokenNorm,
    /// The local loss.
    pub loss: ImportanceLoss,
}

/// Why a layer has uniform weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Uniform {
    /// Both streams agree here, so there is no gradient: the first layer.
    VanishingResidual,
    /// Some gradient overflowed.
    NotFinite,
}

impl std::fmt::Display for Uniform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::VanishingResidual => "nothing is quantized before them",
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
    residual_energy: f64,
    output_energy: f64,
}

/// The factors of one sample.
#[derive(Clone, Debug)]
pub struct SampleFactors {
    factors: Vec<(Projection, Vec<f32>)>,
    residual_energy: f64,
    output_energy: f64,
}

impl ImportanceSettings {
    /// Whether the backward pass goes through the MLP.
    pub fn needs_mlp(&self) -> bool {
        self.loss == ImportanceLoss::Layer
    }

    /// The factors of one sample from the quantized stream's pass through the full-precision layer;
    /// `y_full` is what the full-precision stream came to, `[n_tokens, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn sample_factors(&self, pass: &AttentionPass, y_full: &Tensor) -> Result<SampleFactors> {
        let (layer, y) = (pass.layer(), &pass.y);
        let (residual, output, mlp) = match self.loss {
            // The answers' loss is not one of a layer, and asks for no factors here.
            ImportanceLoss::Attention | ImportanceLoss::Answer => {
                ((y - y_full)?, y_full.clone(), None)
            }
            ImportanceLoss::Layer => {
                let out =
                    |y: &Tensor| layer.after_mlp(y, &layer.down_input(&layer.gate_up_input(y)?)?);
                let (out, out_full) = (out(y)?, out(y_full)?);
                let residual = (out - &out_full)?;
                let mlp = backward::mlp(layer, y, &(&residual * 2.0)?)?;
                (residual, out_full, Some(mlp))
            }
        };
        let d_y = match &mlp {
            Some(mlp) => mlp.y.clone(),
            None => (&residual * 2.0)?,
        };
        let attention = backward::attention(pass, &d_y)?;
        let factors = gradients(&attention, mlp.as_ref())
            .into_iter()
            .map(|(projection, g)| Ok((projection, self.norm.per_token(g)?)));
        Ok(SampleFactors {
            factors: factors.collect::<Result<_>>()?,
            residual_energy: energy(&residual)?,
            output_energy: energy(&output)?,
        })
    }
}

impl SampleFactors {
    /// The factors of one sample by a loss that has no residual.
    ///
    /// # Errors
    /// A tensor error.
    pub fn of_gradients(norm: TokenNorm, layer: &LayerGradients) -> Result<Self> {
        let factors = gradients(&layer.attention, Some(&layer.mlp)).into_iter();
        let factors = factors.map(|(projection, g)| Ok((projection, norm.per_token(g)?)));
        Ok(Self {
            factors: factors.collect::<Result<_>>()?,
            residual_energy: 1.0,
            output_energy: 1.0,
        })
    }
}

fn gradients<'a>(
    attention: &'a AttentionGradients,
    mlp: Option<&'a MlpGradients>,
) -> Vec<(Projection, &'a Tensor)> {
    let mut all = vec![
        (Projection::Q, &attention.q),
        (Projection::K, &attention.k),
        (Projection::V, &attention.v),
        (Projection::O, &attention.o),
    ];
    if let Some(mlp) = mlp {
        all.extend([
            (Projection::Gate, &mlp.gate),
            (Projection::Up, &mlp.up),
            (Projection::Down, &mlp.down),
        ]);
    }
    all
}

impl TokenNorm {
    /// The norm of each row of `gradient [n_tokens, channels]`.
    ///
    /// # Errors
    /// A tensor error if it has not two axes.
    pub fn per_token(self, gradient: &Tensor) -> Result<Vec<f32>> {
        Ok(match self {
            Self::MeanAbs => gradient.abs()?.mean(1)?,
            Self::Rms => gradient.sqr()?.mean(1)?.sqrt()?,
        }
        .to_vec1()?)
    }
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
            residual_energy: 0.0,
            output_energy: 0.0,
        };
        for sample in samples {
            all.residual_energy += sample.residual_energy;
            all.output_energy += sample.output_energy;
            for (projection, g) in sample.factors {
                all.factors[projection as usize].push(g);
            }
        }
        Ok(all)
    }

    /// ‖residual‖² / ‖output‖² over all tokens: how far the quantized stream has drifted.
    pub fn relative_drift(&self) -> f64 {
        self.residual_energy / self.output_energy.max(f64::MIN_POSITIVE)
    }

    /// Token weights ω of a linear, `[sample][token]`, with mean g brought to 1 before the power.
    /// `Ok(None)` for a linear that the loss gives no weights for.
    ///
    /// # Errors
    /// The reason for which this linear must have uniform weights.
    pub fn token_weights(
        &self,
        projection: Projection,
    ) -> std::result::Result<Option<Vec<Vec<f32>>>, Uniform> {
        let factors = &self.factors[projection as usize];
        if factors.is_empty() {
            return Ok(None);
        }
        // NaN compares false, so it passes to the check on the mean.
        if self.relative_drift() <= VANISHING_RESIDUAL {
            return Err(Uniform::VanishingResidual);
        }
        let all = || factors.iter().flatten().map(|&g| f64::from(g));
        let mean = all().sum::<f64>() / all().count() as f64;
        if !mean.is_finite() {
            return Err(Uniform::NotFinite);
        }
        if mean <= 0.0 {
            return Err(Uniform::VanishingResidual);
        }
        let weight = |g: &f32| (f64::from(*g) / mean).powf(self.settings.power) as f32;
        let weights = factors
            .iter()
            .map(|sample| sample.iter().map(weight).collect());
        Ok(Some(weights.collect()))
    }
}

fn energy(x: &Tensor) -> Result<f64> {
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    Ok(values.iter().map(|&v| f64::from(v).powi(2)).sum())
}
