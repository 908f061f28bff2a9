//! Vision towers: from the patches of an image to the embeddings that stand in the prompt.
//!
//! A tower is known as data first ([`VisionConfig`]), so that a plan can be made and shapes be
//! looked at before anything is loaded.

pub mod activation;
pub mod gemma3;
pub mod idefics3;
pub mod internvl;
pub mod llava;
pub mod paligemma;
pub mod pixtral;
pub mod qwen;
pub mod vit;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use crate::processor::VisionInput;
use candle_core::Tensor;
use std::fmt::Debug;

/// What a tower makes of one image.
#[derive(Clone, Debug)]
pub struct ImageFeatures {
    /// One row for each of the image's tokens, in their order, `[n_tokens, hidden]`.
    pub embeddings: Tensor,
    /// What is added to the same rows after the first layers of the decoder, one for each layer.
    pub deepstack: Vec<Tensor>,
}

/// Sizes of a tower, for plans and overviews.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisionSize {
    /// Transformer layers.
    pub depth: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Patches that become one token.
    pub patches_per_token: usize,
    /// Patches that see each other, if an image is cut into tiles of a fixed size.
    pub patches_per_tile: Option<usize>,
}

/// What writes into the decoder's residual stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VisionOutput {
    /// A linear by its checkpoint name, without `.weight`.
    Linear(String),
    /// A tensor that is one row.
    Row(String),
}

/// A tower as data.
pub trait VisionConfig: Debug + Send + Sync {
    /// Its sizes.
    fn size(&self) -> VisionSize;

    /// Layers of the decoder after which something of the image is added.
    fn n_deepstack(&self) -> usize {
        0
    }

    /// What gives the rows that stand in the prompt, and what is added to them on the way; none
    /// where that is not known by name.
    fn outputs(&self) -> Vec<VisionOutput> {
        Vec::new()
    }

    /// Looks at the shapes that tell the tower's sizes, so that none is believed before it is used.
    ///
    /// # Errors
    /// [`crate::Error::Missing`] or [`crate::Error::Shape`].
    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()>;

    /// Reads the weights.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>>;
}

/// A tower's weights, with what joins them to the decoder.
pub trait VisionTower: Debug + Send + Sync {
    /// The features of one image.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the patches have another size than this tower takes.
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures>;
}
