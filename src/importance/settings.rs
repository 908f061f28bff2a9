//! How tokens are weighted, as data: where factors come from, which loss they are of, which linears
//! they are for, how fine they are, and what keeps them from resting on a few tokens.

use super::safeguards::Safeguards;
use crate::model::projection::Projection;
use crate::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// What the factors of tokens are made of. The first three are norms of gradients of the local
/// loss ([`ImportanceLoss`]) and differ in what is carried back; the others look at no loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSource {
    /// The error that the layer receives: the drift of the quantized stream, the paper's.
    Drift,
    /// The error that the layer is about to make: its output with weights rounded to nearest, of
    /// their own number formats, against its output as it is, both for the quantized stream.
    Rounding,
    /// How much the layer's output moves whatever the error is: vectors of random signs are carried
    /// back, and the squares of what arrives average to squared norms of the Jacobian's columns.
    Curvature {
        /// Random vectors for each sample.
        n_probes: usize,
    },
    /// How much attention a token receives, summed over heads and queries, brought to [min, 1] and
    /// then to mean 1 in each sequence; one factor for all linears of a layer.
    /// Source: RSQ (ylsung/rsq@1a7cf31, AttnCon). Its upper end is 1 here, since only ratios count.
    Attention {
        /// Factor of the token that receives least, before the mean is brought to 1.
        min: f64,
    },
    /// Some of the vision tokens of each sample, drawn once for all layers, against all others: the
    /// paper's pilot.
    Random {
        /// Share of the vision tokens that is drawn.
        share: f64,
        /// Their factor; that of all others is 1.
        weight: f64,
    },
}

impl ImportanceSource {
    /// Whether factors are norms of gradients.
    pub fn is_gradient(self) -> bool {
        match self {
            Self::Drift | Self::Rounding | Self::Curvature { .. } => true,
            Self::Attention { .. } | Self::Random { .. } => false,
        }
    }
}

/// Which loss gradients are of: by default a local one, which compares an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLoss {
    /// Each linear's own output, with nothing carried back: the paper's ablation "layer MSE".
    Linear,
    /// The residual stream after attention, the paper's: weights for q, k, v and o.
    Attention,
    /// The layer's output: weights for the MLP's linears too. Not in the paper.
    Layer,
    /// The cross-entropy of the answers at the end of the model ([`super::end_loss`]): weights for
    /// all linears of all layers. Not in the paper.
    Answer,
}

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

/// Which linears get weights, of those that the source has factors for; tokens weigh alike in the
/// others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceModules {
    /// Queries, keys and values.
    Qkv,
    /// Attention's output.
    O,
    /// The four of attention.
    Qkvo,
    /// The MLP's.
    Mlp,
    /// Every one that the source has factors for: under the attention loss the four of attention.
    All,
}

impl ImportanceModules {
    /// Whether linears with this role get weights.
    pub fn contains(self, projection: Projection) -> bool {
        use Projection::{Down, Gate, K, O, Q, Up, V};
        match self {
            Self::Qkv => matches!(projection, Q | K | V),
            Self::O => projection == O,
            Self::Qkvo => matches!(projection, Q | K | V | O),
            Self::Mlp => matches!(projection, Gate | Up | Down),
            Self::All => true,
        }
    }
}

/// How fine weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// Each token has its own, as in the paper.
    Token,
    /// All vision tokens have their mean factor, all of answers theirs, all others theirs: close
    /// to MBQ, and a control of whether single tokens matter.
    Modality,
}

/// How token weights are made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImportanceSettings {
    /// What factors are made of.
    pub source: ImportanceSource,
    /// The loss that gradients are of.
    pub loss: ImportanceLoss,
    /// The norm over the channels of a gradient.
    pub norm: TokenNorm,
    /// The exponent p in ω = (g / mean g)^p.
    pub power: f64,
    /// Which linears get weights.
    pub modules: ImportanceModules,
    /// How fine weights are.
    pub granularity: Granularity,
    /// What keeps weights from resting on a few tokens.
    pub safeguards: Safeguards,
    /// Seed of all that is drawn.
    pub seed: u64,
}

impl ImportanceSettings {
    /// The paper's, with this exponent: 1 is its first version, 2 its second.
    pub fn paper(power: f64) -> Self {
        Self {
            source: ImportanceSource::Drift,
            loss: ImportanceLoss::Attention,
            norm: TokenNorm::MeanAbs,
            power,
            modules: ImportanceModules::All,
            granularity: Granularity::Token,
            safeguards: Safeguards::default(),
            seed: 0,
        }
    }

    /// Whether ω is a power of g times what is the same for all tokens.
    pub fn is_power_of_factors(&self) -> bool {
        !self.safeguards.is_on() && self.granularity == Granularity::Token
    }

    /// Whether factors are made before the first layer, of the loss at the end of the model.
    pub fn is_end_loss(&self) -> bool {
        self.source.is_gradient() && self.loss == ImportanceLoss::Answer
    }

    /// Whether the MLP's linears are needed to make factors layer by layer.
    pub fn needs_mlp(&self) -> bool {
        let is_of_mlp = matches!(self.loss, ImportanceLoss::Linear | ImportanceLoss::Layer);
        self.source.is_gradient() && is_of_mlp
    }

    /// Whether the full-precision stream is needed to make factors layer by layer.
    pub fn needs_full_stream(&self) -> bool {
        self.source == ImportanceSource::Drift && !self.is_end_loss()
    }

    /// Whether the layer with its weights rounded to nearest is needed to make factors.
    pub fn needs_rounded(&self) -> bool {
        self.source == ImportanceSource::Rounding
    }

    /// Whether the settings go together.
    ///
    /// # Errors
    /// [`Error::Invalid`] for settings that contradict each other.
    pub fn check(&self) -> Result<()> {
        let invalid = |what: &str, why: &str| {
            Err(Error::Invalid {
                what: what.into(),
                why: why.into(),
            })
        };
        if self.loss == ImportanceLoss::Answer && self.source != ImportanceSource::Drift {
            let why = "its gradients are those of the loss itself; leave importance_source at \
                       drift";
            return invalid("importance_loss=answer", why);
        }
        let is_attention_loss = self.source.is_gradient() && self.loss == ImportanceLoss::Attention;
        if is_attention_loss && self.modules == ImportanceModules::Mlp {
            let why = "the attention loss has no factors for the MLP; use importance_loss=layer \
                       or importance_loss=linear";
            return invalid("importance_modules=mlp", why);
        }
        let is_curvature = matches!(self.source, ImportanceSource::Curvature { .. });
        if is_curvature && self.loss == ImportanceLoss::Linear {
            let why = "the curvature of a linear's own error is the same for all tokens; use \
                       importance_loss=attention or importance_loss=layer";
            return invalid("importance_source=curvature", why);
        }
        Ok(())
    }
}
