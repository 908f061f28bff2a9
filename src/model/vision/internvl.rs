//! InternViT and what joins it to the decoder in InternVL: neighbouring patches of a tile are put
//! together to one token, normed, and brought to the decoder's width by two linears.
//!
//! Source: arXiv:2404.16821 §3.1, arXiv:2504.10479; transformers `InternVLModel`; OpenGVLab's
//! `InternVLChatModel` in the form that its configurations call v2.

use super::vit::{QkvNames, Vit, VitNames, VitTower};
use super::{ImageFeatures, VisionConfig, VisionOutput, VisionSize, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use crate::model::linear::Linear;
use crate::model::norm::LayerNorm;
use crate::model::norm::NormKind;
use crate::processor::VisionInput;
use crate::{Error, Result};
use candle_core::Tensor;

/// Epsilon of the projector's norm; no configuration key changes it.
const PROJECTOR_EPS: f32 = 1e-5;

/// The names in transformers' InternVL.
pub const TRANSFORMERS: VitNames = VitNames {
    class: Some("embeddings.cls_token"),
    patch: "embeddings.patch_embeddings.projection",
    patch_bias: true,
    positions: "embeddings.position_embeddings",
    pre_norm: None,
    layers: "encoder.layer",
    qkv: QkvNames::Separate(["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
    qk_norm: Some(["attention.q_norm", "attention.k_norm"]),
    out: "attention.projection_layer",
    norm1: "layernorm_before",
    norm2: "layernorm_after",
    layer_norms: NormKind::Layer,
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    scales: Some(["lambda_1", "lambda_2"]),
    post_norm: Some("layernorm"),
};

/// The names in OpenGVLab's own files.
pub const OPENGVLAB: VitNames = VitNames {
    class: Some("embeddings.class_embedding"),
    patch: "embeddings.patch_embedding",
    positions: "embeddings.position_embedding",
    layers: "encoder.layers",
    qkv: QkvNames::Fused("attn.qkv"),
    qk_norm: Some(["attn.q_norm", "attn.k_norm"]),
    out: "attn.proj",
    norm1: "norm1",
    norm2: "norm2",
    scales: Some(["ls1", "ls2"]),
    post_norm: None,
    ..TRANSFORMERS
};

/// Names inside the projector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectorNames {
    /// The norm.
    pub norm: &'static str,
    /// The first linear.
    pub fc1: &'static str,
    /// The second.
    pub fc2: &'static str,
}

/// Tower and projector as data.
#[derive(Clone, Debug, PartialEq)]
pub struct InternVlVision {
    /// The tower, its depth that of the layer whose output is taken.
    pub vit: Vit,
    /// Patches per side that become one token; divides the patches on a side of a tile.
    pub merge_size: usize,
    /// Where the checkpoint keeps the projector.
    pub projector: String,
    /// Names inside it.
    pub names: ProjectorNames,
    /// Width of the decoder.
    pub out_dim: usize,
}

impl InternVlVision {
    fn merged(&self) -> usize {
        self.vit.width * self.merge_size * self.merge_size
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.projector)
    }
}

impl VisionConfig for InternVlVision {
    fn size(&self) -> VisionSize {
        self.vit.size(self.merge_size * self.merge_size)
    }

    fn outputs(&self) -> Vec<VisionOutput> {
        vec![VisionOutput::Linear(self.name(self.names.fc2))]
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.vit.check_shapes(checkpoint)?;
        let n_positions = self.vit.n_class_tokens() + self.vit.table_side * self.vit.table_side;
        let table = format!("{}.{}", self.vit.prefix, self.vit.names.positions);
        checkpoint.require_shape(&table, &[1, n_positions, self.vit.width])?;
        let first = self.name(&format!("{}.weight", self.names.fc1));
        checkpoint.require_shape(&first, &[self.out_dim, self.merged()])?;
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        let linear = |part: &str, inp: usize| {
            let shape = [self.out_dim, inp];
            Linear::load(checkpoint, &self.name(part), shape, true, device)
        };
        let norm = self.name(self.names.norm);
        Ok(Box::new(InternVlTower {
            vit: self.vit.load(checkpoint, device)?,
            norm: LayerNorm::load(checkpoint, &norm, self.merged(), PROJECTOR_EPS, device)?,
            fc1: linear(self.names.fc1, self.merged())?,
            fc2: linear(self.names.fc2, self.out_dim)?,
            config: self.clone(),
        }))
    }
}

#[derive(Clone, Debug)]
struct InternVlTower {
    config: InternVlVision,
    vit: VitTower,
    norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl VisionTower for InternVlTower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let features = self.vit.forward(image)?;
        let (n_class, n_patches) = (
            self.config.vit.n_class_tokens(),
            self.config.vit.n_patches(),
        );
        let patches = features.narrow(1, n_class, n_patches)?;
        let merged = merged(&patches, self.config.vit.tile_side, self.config.merge_size)?;
        let hidden = self.fc1.forward(&self.norm.forward(&merged)?)?;
        Ok(ImageFeatures {
            embeddings: self.fc2.forward(&hidden.gelu_erf()?)?,
            deepstack: Vec::new(),
        })
    }
}

/// `patches [n_tiles, side², width]` → `[n_tiles · (side / merge)², merge² · width]`: the patches of
/// each `merge`² square behind each other, row by row.
fn merged(patches: &Tensor, side: usize, merge: usize) -> Result<Tensor> {
    let (n_tiles, n_patches, width) = patches.dims3()?;
    let n = side / merge.max(1);
    if n * merge != side || side * side != n_patches {
        return Err(Error::Shape {
            module: "patches of a tile".into(),
            expected: vec![n * merge, n * merge],
            found: vec![side, n_patches / side.max(1)],
        });
    }
    let squares = patches
        .contiguous()?
        .reshape(vec![n_tiles, n, merge, n, merge * width])?;
    let squares = squares.permute(vec![0, 1, 3, 2, 4])?.contiguous()?;
    Ok(squares.reshape((n_tiles * n * n, merge * merge * width))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_token_is_a_square_of_patches() {
        let patches = Tensor::arange(0f32, 64.0, &Device::Cpu).unwrap();
        let tokens = merged(&patches.reshape((2, 16, 2)).unwrap(), 4, 2).unwrap();
        let rows: Vec<Vec<f32>> = tokens.to_vec2().unwrap();
        assert_eq!(rows.len(), 8);
        // Patches 2 and 3 of the first row, then 6 and 7 below them, two values each.
        assert_eq!(rows[1], [4., 5., 6., 7., 12., 13., 14., 15.]);
        assert_eq!(rows[4][..2], [32., 33.]);
        assert!(merged(&patches.reshape((2, 16, 2)).unwrap(), 4, 3).is_err());
    }
}
