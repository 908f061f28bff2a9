//! What joins SigLIP to the decoder of PaliGemma: one linear on every feature.
//!
//! Source: arXiv:2407.07726 §3.1; transformers `PaliGemmaMultiModalProjector`.

use super::vit::{Vit, VitTower};
use super::{ImageFeatures, VisionConfig, VisionSize, VisionTower};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use crate::model::linear::Linear;
use crate::processor::VisionInput;

/// Tower and projector as data.
#[derive(Clone, Debug, PartialEq)]
pub struct PaliGemmaVision {
    /// The tower.
    pub vit: Vit,
    /// Where the checkpoint keeps the linear.
    pub projector: String,
    /// Width of the decoder.
    pub out_dim: usize,
}

impl VisionConfig for PaliGemmaVision {
    fn size(&self) -> VisionSize {
        self.vit.size(1)
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.vit.check_shapes(checkpoint)?;
        let weight = format!("{}.weight", self.projector);
        checkpoint.require_shape(&weight, &[self.out_dim, self.vit.width])?;
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        let shape = [self.out_dim, self.vit.width];
        Ok(Box::new(PaliGemmaTower {
            vit: self.vit.load(checkpoint, device)?,
            linear: Linear::load(checkpoint, &self.projector, shape, true, device)?,
        }))
    }
}

#[derive(Clone, Debug)]
struct PaliGemmaTower {
    vit: VitTower,
    linear: Linear,
}

impl VisionTower for PaliGemmaTower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let features = self.vit.forward(image)?;
        let (n_tiles, n_tokens, width) = features.dims3()?;
        let rows = features
            .contiguous()?
            .reshape((n_tiles * n_tokens, width))?;
        Ok(ImageFeatures {
            embeddings: self.linear.forward(&rows)?,
            deepstack: Vec::new(),
        })
    }
}
