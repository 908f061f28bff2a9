//! The factors of one sample in one layer, from whatever source.

use super::backward::{self, AttentionGradients, AttentionPass, LayerGradients, MlpGradients};
use super::settings::{ImportanceLoss, ImportanceSettings, ImportanceSource, TokenNorm};
use super::{attention_scores, draw, linear_loss};
use crate::model::context::TokenContext;
use crate::model::decoder::DecoderLayer;
use crate::model::projection::Projection;
use crate::processor::TokenClass;
use crate::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// A sample that is about to enter a layer in the quantized stream, and what its factors may be
/// made of.
#[derive(Clone, Copy, Debug)]
pub struct SampleInLayer<'a> {
    /// The layer as it is.
    pub layer: &'a DecoderLayer,
    /// The layer with weights rounded to nearest, where [`ImportanceSettings::needs_rounded`].
    pub rounded: Option<&'a DecoderLayer>,
    /// Positions and images.
    pub context: &'a TokenContext,
    /// The quantized stream, `[n_tokens, hidden]`.
    pub x: &'a Tensor,
    /// Where the full-precision stream went, if it is followed.
    pub full: Option<&'a FullPass>,
    /// What its tokens are.
    pub classes: &'a [TokenClass],
    /// The layer's place in the decoder.
    pub layer_idx: usize,
    /// The sample's place among all.
    pub sample_idx: usize,
}

/// The full-precision stream's way through attention.
#[derive(Clone, Debug)]
pub struct FullPass {
    /// Input of q, k and v, `[n_tokens, hidden]`.
    pub n1: Tensor,
    /// Input of o, `[n_tokens, heads · head_dim]`.
    pub a: Tensor,
    /// Residual stream after attention, `[n_tokens, hidden]`.
    pub y: Tensor,
}

/// The factors of one sample.
#[derive(Clone, Debug)]
pub struct SampleFactors {
    pub(super) factors: Vec<(Projection, Vec<f32>)>,
    pub(super) classes: Vec<TokenClass>,
    /// How far the quantized stream has drifted, where factors are made of that.
    pub(super) drift: Option<Drift>,
}

/// Squared norms of a stream's error and of the stream, summed over tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Drift {
    pub residual_energy: f64,
    pub output_energy: f64,
}

impl Drift {
    pub(super) fn of(residual: &Tensor, output: &Tensor) -> Result<Self> {
        Ok(Self {
            residual_energy: energy(residual)?,
            output_energy: energy(output)?,
        })
    }
}

/// ∂L/∂(output of each linear that the loss has factors for), `[n_tokens, out]`, in a mixture by
/// token.
pub(super) type Gradients = Vec<(Projection, Tensor)>;

impl SampleInLayer<'_> {
    /// The way of the full-precision stream.
    pub(super) fn full(&self) -> Result<&FullPass> {
        self.full
            .ok_or_else(|| missing("the full-precision stream"))
    }

    /// The layer that rounding makes, where that is what the source asks for.
    pub(super) fn rounded_for(&self, source: ImportanceSource) -> Result<Option<&DecoderLayer>> {
        match source {
            ImportanceSource::Rounding => match self.rounded {
                Some(rounded) => Ok(Some(rounded)),
                None => Err(missing("the layer rounded to nearest")),
            },
            _ => Ok(None),
        }
    }

    /// The same factors for all linears.
    fn shared(&self, factors: Vec<f32>) -> SampleFactors {
        SampleFactors {
            factors: Projection::ALL.map(|p| (p, factors.clone())).to_vec(),
            classes: self.classes.to_vec(),
            drift: None,
        }
    }
}

impl SampleFactors {
    /// The factors of one sample by a loss that has no residual; `classes` are its tokens'.
    ///
    /// # Errors
    /// A tensor error.
    pub fn of_gradients(
        norm: TokenNorm,
        classes: &[TokenClass],
        layer: &LayerGradients,
    ) -> Result<Self> {
        Ok(Self {
            factors: per_token(norm, &gradients(&layer.attention, Some(&layer.mlp)))?,
            classes: classes.to_vec(),
            drift: None,
        })
    }
}

impl ImportanceSettings {
    /// The factors g of one sample's tokens by a loss that is local.
    ///
    /// # Errors
    /// [`Error::Missing`] without what the source needs; a tensor error if shapes disagree.
    pub fn sample_factors(&self, sample: &SampleInLayer) -> Result<SampleFactors> {
        let pass = || AttentionPass::new(sample.layer, sample.context, sample.x);
        let (gradients, drift) = match self.source {
            ImportanceSource::Random { share, weight } => {
                let (seed, sample_idx) = (self.seed, sample.sample_idx);
                let factors = draw::pilot(seed, sample_idx, sample.classes, (share, weight));
                return Ok(sample.shared(factors));
            }
            ImportanceSource::Attention { min } => {
                let factors = attention_scores::received(&pass()?.trace, min)?;
                return Ok(sample.shared(factors));
            }
            ImportanceSource::Curvature { n_probes } => {
                (self.column_norms(sample, &pass()?, n_probes)?, None)
            }
            ImportanceSource::Drift | ImportanceSource::Rounding => {
                let (gradients, drift) = self.of_error(sample, &pass()?)?;
                let is_drift = self.source == ImportanceSource::Drift;
                (gradients, is_drift.then_some(drift))
            }
        };
        Ok(SampleFactors {
            factors: per_token(self.norm, &gradients)?,
            classes: sample.classes.to_vec(),
            drift,
        })
    }

    /// The gradients of ‖output − what it should be‖²: what the full-precision stream comes to, or
    /// what the rounded layer makes of the quantized stream. In the latter case the paper's sign is
    /// turned round, which no norm sees.
    pub(super) fn of_error(
        &self,
        sample: &SampleInLayer,
        pass: &AttentionPass,
    ) -> Result<(Gradients, Drift)> {
        let rounded = sample.rounded_for(self.source)?;
        if self.loss == ImportanceLoss::Linear {
            return linear_loss::gradients(sample, pass, rounded);
        }
        let (layer, y) = match rounded {
            None => (sample.layer, sample.full()?.y.clone()),
            Some(rounded) => {
                let pass = AttentionPass::new(rounded, sample.context, sample.x)?;
                (rounded, pass.y)
            }
        };
        let output = |layer: &DecoderLayer, y: &Tensor| match self.loss {
            ImportanceLoss::Layer => {
                layer.after_mlp(y, &layer.down_input(&layer.gate_up_input(y)?)?)
            }
            _ => Ok(y.clone()),
        };
        let wanted = output(layer, &y)?;
        let residual = (output(sample.layer, &pass.y)? - &wanted)?;
        let gradients = self.carry_back(pass, &(&residual * 2.0)?)?;
        Ok((gradients, Drift::of(&residual, &wanted)?))
    }

    /// Estimates of the norms of the columns of the Jacobian J of the loss's output, in the shape
    /// of gradients: E[(Jᵀv)²] is their square if the entries of v are independent signs.
    pub(super) fn column_norms(
        &self,
        sample: &SampleInLayer,
        pass: &AttentionPass,
        n_probes: usize,
    ) -> Result<Gradients> {
        let mut squares: Option<Gradients> = None;
        for probe in 0..n_probes {
            let place = [sample.layer_idx, sample.sample_idx, probe];
            let v = draw::signs(self.seed, place, pass.y.dims2()?, pass.y.device())?;
            let mut own = self.carry_back(pass, &v)?;
            for (i, (_, g)) in own.iter_mut().enumerate() {
                *g = match &squares {
                    None => g.sqr()?,
                    Some(sums) => (g.sqr()? + &sums[i].1)?,
                };
            }
            squares = Some(own);
        }
        let root = |(p, sum): (Projection, Tensor)| Ok((p, (sum / n_probes as f64)?.sqrt()?));
        squares.into_iter().flatten().map(root).collect()
    }

    /// Carries `d`, the gradient with respect to the output that the loss compares, back to the
    /// outputs of the linears.
    fn carry_back(&self, pass: &AttentionPass, d: &Tensor) -> Result<Gradients> {
        let mlp = match self.loss {
            ImportanceLoss::Layer => Some(backward::mlp(pass.layer(), &pass.y, d)?),
            _ => None,
        };
        let attention = backward::attention(pass, mlp.as_ref().map_or(d, |mlp| &mlp.y))?;
        Ok(gradients(&attention, mlp.as_ref()))
    }
}

/// Those of all linears that a pass went through; tensors share their data.
fn gradients(attention: &AttentionGradients, mlp: Option<&MlpGradients>) -> Gradients {
    let of_attention = [&attention.q, &attention.k, &attention.v, &attention.o];
    let of_mlp = mlp.map(|mlp| [&mlp.gate, &mlp.up, &mlp.down]);
    let all = of_attention.into_iter().chain(of_mlp.into_iter().flatten());
    Projection::ALL.into_iter().zip(all.cloned()).collect()
}

/// The norms of gradients over channels.
fn per_token(norm: TokenNorm, gradients: &Gradients) -> Result<Vec<(Projection, Vec<f32>)>> {
    let all = gradients.iter();
    all.map(|(projection, g)| Ok((*projection, norm.per_token(g)?)))
        .collect()
}

fn missing(what: &str) -> Error {
    Error::Missing {
        what: what.into(),
        place: "what importance is made of".into(),
    }
}

fn energy(x: &Tensor) -> Result<f64> {
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    Ok(values.iter().map(|&v| f64::from(v).powi(2)).sum())
}
