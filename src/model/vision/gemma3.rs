//! What joins SigLIP to the decoder of Gemma 3: the features of a square of patches become their
//! mean, which is normed and multiplied by a matrix.
//!
//! Source: arXiv:2503.19786 §2.1; transformers `Gemma3MultiModalProjector`.

use super::vit::{Vit, VitTower};
use super::{ImageFeatures, VisionConfig, VisionSize, VisionTower};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use crate::model::linear::load_tensor;
use crate::model::norm::RmsNorm;
use crate::processor::VisionInput;
use candle_core::Tensor;

/// Tower and projector as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemma3Vision {
    /// The tower.
    pub vit: Vit,
    /// Where the checkpoint keeps the projector.
    pub projector: String,
    /// Patches on a side of the square that becomes a token.
    pub pool: usize,
    /// Width of the decoder.
    pub out_dim: usize,
}

impl Gemma3Vision {
    fn matrix(&self) -> String {
        format!("{}.mm_input_projection_weight", self.projector)
    }
}

impl VisionConfig for Gemma3Vision {
    fn size(&self) -> VisionSize {
        self.vit.size(self.pool * self.pool)
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.vit.check_shapes(checkpoint)?;
        checkpoint.require_shape(&self.matrix(), &[self.vit.width, self.out_dim])?;
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        let norm = format!("{}.mm_soft_emb_norm.weight", self.projector);
        let norm = load_tensor(checkpoint, &norm, &[self.vit.width], device)?;
        let shape = [self.vit.width, self.out_dim];
        Ok(Box::new(Gemma3Tower {
            vit: self.vit.load(checkpoint, device)?,
            norm: RmsNorm::new((norm + 1.0)?, self.vit.norm_eps),
            matrix: load_tensor(checkpoint, &self.matrix(), &shape, device)?,
            config: self.clone(),
        }))
    }
}

#[derive(Clone, Debug)]
struct Gemma3Tower {
    config: Gemma3Vision,
    vit: VitTower,
    norm: RmsNorm,
    /// `[width, hidden]`: unlike a linear's weight it stands on the right as it is.
    matrix: Tensor,
}

impl VisionTower for Gemma3Tower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let features = self.vit.forward(image)?;
        let pooled = pooled(&features, self.config.vit.tile_side, self.config.pool)?;
        Ok(ImageFeatures {
            embeddings: self.norm.forward(&pooled)?.matmul(&self.matrix)?,
            deepstack: Vec::new(),
        })
    }
}

/// The means of squares of `pool`² neighbours in `features [n_tiles, side², width]`, row by row,
/// `[n_tiles · (side / pool)², width]`; `pool` divides `side`.
fn pooled(features: &Tensor, side: usize, pool: usize) -> Result<Tensor> {
    let (n_tiles, _, width) = features.dims3()?;
    let n = side / pool;
    let rows = features.contiguous()?;
    let rows = rows.reshape((n_tiles * n, pool, side * width))?.mean(1)?;
    Ok(rows.reshape((n_tiles * n * n, pool, width))?.mean(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_token_is_the_mean_of_its_square() {
        // Two tiles of 4 x 4 patches, one channel that counts them.
        let features = Tensor::arange(0f32, 32.0, &Device::Cpu).unwrap();
        let features = features.reshape((2, 16, 1)).unwrap();
        let means: Vec<Vec<f32>> = pooled(&features, 4, 2).unwrap().to_vec2().unwrap();
        let first = [2.5, 4.5, 10.5, 12.5];
        let expected: Vec<f32> = first
            .iter()
            .copied()
            .chain(first.map(|m| m + 16.0))
            .collect();
        assert_eq!(means.concat(), expected);
    }
}
