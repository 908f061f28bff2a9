//! Norms over the last axis, forward and backward.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::decoder_config::{DecoderConfig, NormScale};
use crate::model::linear::load_tensor;
use candle_core::{D, Device, Tensor};
use candle_nn::ops::{layer_norm, rms_norm};

/// x·γ / √(mean x² + ε) over the last axis.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[dim]`.
    scale: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// Reads the weight `name` of a decoder's norm over `dim` channels.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        dim: usize,
        config: &DecoderConfig,
        device: &Device,
    ) -> Result<Self> {
        let weight = load_tensor(checkpoint, name, &[dim], device)?;
        Self::of_weight(weight, config)
    }

    /// A decoder's norm with this `weight [dim]`, as a checkpoint has it.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn of_weight(weight: Tensor, config: &DecoderConfig) -> Result<Self> {
        let scale = match config.norm_scale {
            NormScale::Weight => weight,
            NormScale::OnePlusWeight => (weight + 1.0)?,
        };
        Ok(Self::new(scale, config.rms_norm_eps as f32))
    }

    /// The norm that multiplies by `scale [dim]`.
    pub fn new(scale: Tensor, eps: f32) -> Self {
        Self { scale, eps }
    }

    /// The norm of `x [.., dim]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(&x.contiguous()?, &self.scale, self.eps)?)
    }

    /// Carries `d`, the gradient with respect to the normed values, back to `x`:
    /// r·(γ∘d) − r³·x·mean(γ∘d∘x) with r = 1/√(mean x² + ε).
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn backward(&self, x: &Tensor, d: &Tensor) -> Result<Tensor> {
        let d = d.broadcast_mul(&self.scale)?;
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let r = (mean_square + f64::from(self.eps))?.sqrt()?.recip()?;
        let mean = (&d * x)?.mean_keepdim(D::Minus1)?;
        let pull = x.broadcast_mul(&(mean * r.powf(3.0)?)?)?;
        Ok((d.broadcast_mul(&r)? - pull)?)
    }
}

/// (x − mean)·γ / √(variance + ε) + β over the last axis.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f32,
}

impl LayerNorm {
    /// Reads `name.weight` and `name.bias`, `[dim]` each.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        dim: usize,
        eps: f32,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self {
            weight: load_tensor(checkpoint, &format!("{name}.weight"), &[dim], device)?,
            bias: load_tensor(checkpoint, &format!("{name}.bias"), &[dim], device)?,
            eps,
        })
    }

    /// The norm of `x [.., dim]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(
            &x.contiguous()?,
            &self.weight,
            &self.bias,
            self.eps,
        )?)
    }
}

/// The two kinds of norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// With mean and bias.
    Layer,
    /// Without.
    Rms,
}

/// A norm of either kind.
#[derive(Clone, Debug)]
pub enum Norm {
    /// With mean and bias.
    Layer(LayerNorm),
    /// Without.
    Rms(RmsNorm),
}

impl Norm {
    /// The norm of `x [.., dim]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
}
