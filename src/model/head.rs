//! The end of a language model: final norm and the projection to the vocabulary.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::decoder_config::DecoderConfig;
use crate::model::device::ModelDevice;
use crate::model::linear::{Linear, load_tensor};
use crate::model::norm::RmsNorm;
use candle_core::Tensor;

/// Final norm and head, in f32.
#[derive(Clone, Debug)]
pub struct Head {
    norm: RmsNorm,
    projection: Linear,
    /// The cap c of c·tanh(logit / c), if there is one.
    cap: Option<f64>,
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
        device: &ModelDevice,
    ) -> Result<Self> {
        let shape = [config.vocab_size, config.hidden_size];
        Ok(Self {
            norm: RmsNorm::load(checkpoint, norm, config.hidden_size, config, device)?,
            projection: Linear::on(
                device,
                load_tensor(checkpoint, weight, &shape, device)?,
                None,
            )?,
            cap: config.logit_cap,
        })
    }

    /// Logits `[n, vocab]` from the last layer's output `x [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let logits = self.projection.forward(&self.norm.forward(x)?)?;
        Ok(match self.cap {
            None => logits,
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        })
    }

    /// Carries `d = ∂L/∂logits` `[n, vocab]` back to the last layer's output `x [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn backward(&self, x: &Tensor, d: &Tensor) -> Result<Tensor> {
        let d = match self.cap {
            None => d.clone(),
            Some(cap) => {
                // c·tanh(z/c) has the slope 1 − tanh²(z/c).
                let bent = (self.logits(x)? / cap)?;
                (d * (1.0 - bent.sqr()?)?)?
            }
        };
        self.norm.backward(x, &self.projection.backward(&d)?)
    }
}
