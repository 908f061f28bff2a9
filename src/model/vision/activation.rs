//! Activations of vision towers.

use crate::model::config::ConfigNode;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::ops::sigmoid;

/// The activation of an MLP of two linears, or of the gate of one of three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisionActivation {
    /// z·σ(1.702 z).
    QuickGelu,
    /// GELU.
    Gelu,
    /// GELU in its tanh form.
    GeluTanh,
    /// z·σ(z).
    Silu,
}

impl VisionActivation {
    /// Reads `hidden_act`, which is `default` where it is absent.
    ///
    /// # Errors
    /// [`Error::Format`] if it is no string, [`Error::Unsupported`] for another activation.
    pub fn read(node: &ConfigNode, default: &str) -> Result<Self> {
        Ok(match node.text_or("hidden_act", default)? {
            "quick_gelu" => Self::QuickGelu,
            "gelu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" => Self::GeluTanh,
            "silu" | "swish" => Self::Silu,
            other => {
                let what = format!(
                    "hidden_act {other:?} of the vision tower; quick_gelu, gelu, \
                     gelu_pytorch_tanh or silu"
                );
                return Err(Error::Unsupported { what });
            }
        })
    }

    /// The activation of every value.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::QuickGelu => (x * sigmoid(&(x * 1.702)?)?)?,
            Self::Gelu => x.gelu_erf()?,
            Self::GeluTanh => x.gelu()?,
            Self::Silu => x.silu()?,
        })
    }
}
