//! The end of a language model: final norm and the projection to the vocabulary.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::config::DecoderConfig;
use crate::model::linear::{Linear, load_tensor};
use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;

/// Final norm and head, in f32.
#[derive(Clone, Debug)]
pub struct Head {
    norm: Tensor,
    rms_norm_eps: f32,
    projection: Linear,
}

impl Head {
    /// Reads the norm `norm` and the matrix `weight` `[vocab, hidden]`, which is the embedding's
    /// where the head is tied.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        norm: &str,
        weight: &str,
        config: &DecoderConfig,
        device: &Device,
    ) -> Result<Self> {
        let shape = [config.vocab_size, config.hidden_size];
        Ok(Self {
            norm: load_tensor(checkpoint, norm, &shape[1..], device)?,
            rms_norm_eps: config.rms_norm_eps as f32,
            projection: Linear::new(load_tensor(checkpoint, weight, &shape, device)?, None),
        })
    }

    /// Logits `[n, vocab]` from the last layer's output `x [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(&x.contiguous()?, &self.norm, self.rms_norm_eps)?;
        self.projection.forward(&normed)
    }
}
