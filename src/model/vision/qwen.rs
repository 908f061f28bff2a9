//! The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one transformer over patches under axial
//! rotary positions, and a merger that turns each 2×2 neighbourhood into one embedding of the
//! decoder's width. Where they differ is data ([`QwenVision`]).
//!
//! Source: arXiv:2409.12191 §2.1, arXiv:2502.13923 §2.1; transformers
//! `Qwen2VisionTransformerPretrainedModel`, `Qwen2_5_VisionTransformerPretrainedModel`,
//! `Qwen3VLVisionModel`.

mod layout;
mod tower;

use super::activation::VisionActivation;
use super::{VisionConfig, VisionOutput, VisionSize, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::model::config::ConfigNode;
use crate::model::device::ModelDevice;
use crate::model::norm::NormKind;
use crate::{Error, Result};
use tower::QwenTower;

/// Epsilon of every norm of these towers; no configuration key changes it.
const NORM_EPS: f32 = 1e-6;

/// Bound of what sizes may multiply to, so that every product of them fits.
const MAX_WIDTH: usize = 1 << 31;

/// A tower as data.
#[derive(Clone, Debug, PartialEq)]
pub struct QwenVision {
    /// Where the checkpoint keeps it, e.g. `visual`.
    pub prefix: String,
    /// Transformer layers.
    pub depth: usize,
    /// Width of the tower.
    pub width: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Values of one patch: channels · frames · height · width.
    pub patch_dim: usize,
    /// Patches per side that become one token.
    pub merge_size: usize,
    /// Width of the decoder.
    pub out_dim: usize,
    /// The norm before attention, before the MLP and, if it is an RMS norm, before the merger.
    pub norm: NormKind,
    /// The MLP of a layer.
    pub mlp: MlpKind,
    /// Whether the convolution over patches has a bias.
    pub patch_bias: bool,
    /// Side of the square table of learned positions, which is resampled to each image.
    pub positions_side: Option<usize>,
    /// Attention within windows.
    pub windows: Option<Windows>,
    /// Layers after which a merger of its own gives features for the decoder's first layers.
    pub deepstack_layers: Vec<usize>,
    /// Names inside the merger.
    pub merger: MergerNames,
}

/// The MLP of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// Two linears with an activation between.
    Plain {
        /// Name of the first.
        fc1: &'static str,
        /// Name of the second.
        fc2: &'static str,
        /// Between them.
        activation: VisionActivation,
    },
    /// gate, up and down with SiLU, with biases.
    Gated,
}

/// Attention within windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens (merged patches) on a window's side.
    pub side: usize,
    /// Layers whose patches see the whole frame.
    pub full_layers: Vec<usize>,
}

/// Names inside a merger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergerNames {
    /// The norm.
    pub norm: &'static str,
    /// The first linear.
    pub fc1: &'static str,
    /// The second.
    pub fc2: &'static str,
}

/// What the three configurations have in common.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// Width of the tower.
    pub width: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Width of what it gives, which must be that of the decoder.
    pub out_dim: usize,
}

impl QwenVision {
    /// Reads the keys that all three families share; the rest is that of Qwen2-VL.
    ///
    /// # Errors
    /// [`Error::Format`] for an ill-typed or contradictory key.
    pub fn read(node: &ConfigNode, prefix: &str, widths: Widths, patch: usize) -> Result<Self> {
        let Widths { width, mlp_dim, .. } = widths;
        let n_heads = node.size_or("num_heads", 16)?;
        if width % n_heads != 0 || (width / n_heads) % 4 != 0 {
            let why = format!("{n_heads} heads do not cut the width {width} into multiples of 4");
            return Err(node.invalid("num_heads", why));
        }
        let channels = node.size_or("in_channels", node.size_or("in_chans", 3)?)?;
        let patch = node.size_or("patch_size", patch)?;
        let frames = node.size_or("temporal_patch_size", 2)?;
        let merge_size = node.size_or("spatial_merge_size", 2)?;
        bounded_product(node, "spatial_merge_size", &[width, merge_size, merge_size])?;
        Ok(Self {
            prefix: prefix.to_owned(),
            depth: node.size_or("depth", 32)?,
            width,
            n_heads,
            mlp_dim,
            patch_dim: bounded_product(node, "patch_size", &[channels, frames, patch, patch])?,
            merge_size,
            out_dim: widths.out_dim,
            norm: NormKind::Layer,
            mlp: MlpKind::Plain {
                fc1: "mlp.fc1",
                fc2: "mlp.fc2",
                activation: VisionActivation::QuickGelu,
            },
            patch_bias: false,
            positions_side: None,
            windows: None,
            deepstack_layers: Vec::new(),
            merger: MergerNames {
                norm: "ln_q",
                fc1: "mlp.0",
                fc2: "mlp.2",
            },
        })
    }

    fn merged(&self) -> usize {
        self.width * self.merge_size * self.merge_size
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }

    /// Names and shapes of the linears of a layer that tell its widths.
    fn layer_shapes(&self, i: usize) -> [(String, [usize; 2]); 2] {
        let first = match self.mlp {
            MlpKind::Plain { fc1, .. } => fc1,
            MlpKind::Gated => "mlp.gate_proj",
        };
        let name = |part: &str| self.name(&format!("blocks.{i}.{part}.weight"));
        [
            (name("attn.qkv"), [3 * self.width, self.width]),
            (name(first), [self.mlp_dim, self.width]),
        ]
    }

    /// Name and five sides of the convolution over patches, whose product alone is known.
    fn patch_embed_shape(&self, checkpoint: &Checkpoint) -> Result<(String, Vec<usize>)> {
        let name = self.name("patch_embed.proj.weight");
        let info = checkpoint.info(&name).ok_or_else(|| Error::Missing {
            what: format!("tensor {name}"),
            place: checkpoint.dir().display().to_string(),
        })?;
        let shape = info.shape.clone();
        let is_known = shape.len() == 5
            && shape[0] == self.width
            && shape[1..].iter().product::<usize>() == self.patch_dim;
        match is_known {
            true => Ok((name, shape)),
            false => Err(Error::Shape {
                module: name,
                expected: vec![self.width, self.patch_dim],
                found: shape,
            }),
        }
    }
}

/// A product of sizes that is below 2³¹, or an error about `key`.
///
/// # Errors
/// [`Error::Format`].
pub fn bounded_product(node: &ConfigNode, key: &str, sizes: &[usize]) -> Result<usize> {
    let product = sizes
        .iter()
        .try_fold(1usize, |n, size| n.checked_mul(*size));
    let bounded = product.filter(|n| *n < MAX_WIDTH);
    bounded.ok_or_else(|| node.invalid(key, format!("{sizes:?} multiply beyond 2^31")))
}

/// `found`, which must be the decoder's width.
///
/// # Errors
/// [`Error::Format`] about `key`.
pub fn decoder_width(node: &ConfigNode, key: &str, found: usize, hidden: usize) -> Result<usize> {
    if found == hidden {
        return Ok(found);
    }
    let why = format!("{found}, but the decoder's hidden_size is {hidden}");
    Err(node.invalid(key, why))
}

impl VisionConfig for QwenVision {
    fn size(&self) -> VisionSize {
        VisionSize {
            depth: self.depth,
            width: self.width,
            n_heads: self.n_heads,
            mlp_dim: self.mlp_dim,
            patches_per_token: self.merge_size * self.merge_size,
            patches_per_tile: None,
        }
    }

    fn n_deepstack(&self) -> usize {
        self.deepstack_layers.len()
    }

    fn outputs(&self) -> Vec<VisionOutput> {
        let last = |merger: &str| {
            let name = self.name(&format!("{merger}.{}", self.merger.fc2));
            VisionOutput::Linear(name)
        };
        let deepstack = 0..self.deepstack_layers.len();
        let deepstack = deepstack.map(|i| last(&format!("deepstack_merger_list.{i}")));
        std::iter::once(last("merger")).chain(deepstack).collect()
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.patch_embed_shape(checkpoint)?;
        for (name, shape) in (0..self.depth).flat_map(|i| self.layer_shapes(i)) {
            checkpoint.require_shape(&name, &shape)?;
        }
        if let Some(side) = self.positions_side {
            let table = [side * side, self.width];
            checkpoint.require_shape(&self.name("pos_embed.weight"), &table)?;
        }
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        Ok(Box::new(QwenTower::load(self, checkpoint, device)?))
    }
}
