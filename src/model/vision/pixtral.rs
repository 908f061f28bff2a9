//! Pixtral's tower: one transformer over the patches of an image of any size, whose queries and
//! keys turn by row and column, and two linears that bring its features to the decoder's width.
//! Mistral Small 3 norms the features first and joins squares of neighbours.
//!
//! Every image is looked at by itself, which is what the block mask of transformers comes to.
//!
//! Source: arXiv:2410.07073 §2.2; transformers `PixtralVisionModel`, `Mistral3MultiModalProjector`.

mod tower;

use super::activation::VisionActivation;
use super::{VisionConfig, VisionOutput, VisionSize, VisionTower};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use tower::PixtralTower;

/// Epsilon of every norm of the tower; no configuration key changes it.
const NORM_EPS: f32 = 1e-5;

/// Tower and projector as data.
#[derive(Clone, Debug, PartialEq)]
pub struct PixtralVision {
    /// Where the checkpoint keeps the tower.
    pub prefix: String,
    /// Layers that are run; the checkpoint may hold more.
    pub depth: usize,
    /// Width of the tower.
    pub width: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Of the gate of the MLP.
    pub activation: VisionActivation,
    /// Where the checkpoint keeps the projector.
    pub projector: String,
    /// Whether the projector's two linears have a bias.
    pub projector_bias: bool,
    /// What joins neighbouring patches, if anything does.
    pub merger: Option<PatchMerger>,
    /// Width of the decoder.
    pub out_dim: usize,
}

/// A norm of the tower's features, and a linear from squares of them to one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PatchMerger {
    /// Patches per side that become one token.
    pub merge_size: usize,
    /// Epsilon of the norm.
    pub norm_eps: f32,
}

impl PixtralVision {
    /// Patches per side that become one token.
    pub fn merge_size(&self) -> usize {
        self.merger.map_or(1, |merger| merger.merge_size)
    }

    /// Width of a square of joined patches.
    fn merged(&self) -> usize {
        self.width * self.merge_size() * self.merge_size()
    }

    /// Values of a patch.
    fn patch_dim(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    fn patch_shape(&self) -> [usize; 4] {
        [self.width, 3, self.patch_size, self.patch_size]
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }

    fn layer_name(&self, i: usize, part: &str) -> String {
        format!("{}.transformer.layers.{i}.{part}", self.prefix)
    }

    fn projector_name(&self, part: &str) -> String {
        format!("{}.{part}", self.projector)
    }
}

impl VisionConfig for PixtralVision {
    fn size(&self) -> VisionSize {
        VisionSize {
            depth: self.depth,
            width: self.width,
            n_heads: self.n_heads,
            mlp_dim: self.mlp_dim,
            patches_per_token: self.merge_size() * self.merge_size(),
            patches_per_tile: None,
        }
    }

    fn outputs(&self) -> Vec<VisionOutput> {
        vec![VisionOutput::Linear(self.projector_name("linear_2"))]
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.require_shape(&self.name("patch_conv.weight"), &self.patch_shape())?;
        for i in 0..self.depth {
            let gate = self.layer_name(i, "feed_forward.gate_proj.weight");
            checkpoint.require_shape(&gate, &[self.mlp_dim, self.width])?;
        }
        if self.merger.is_some() {
            let merger = self.projector_name("patch_merger.merging_layer.weight");
            checkpoint.require_shape(&merger, &[self.width, self.merged()])?;
        }
        let first = self.projector_name("linear_1.weight");
        checkpoint.require_shape(&first, &[self.out_dim, self.width])?;
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        Ok(Box::new(PixtralTower::load(self, checkpoint, device)?))
    }
}
