//! The weights of a Qwen tower, and its forward.

use super::layout::{Layout, patch_positions, resampled};
use super::{MlpKind, NORM_EPS, QwenVision};
use crate::checkpoint::Checkpoint;
use crate::model::attention::{block_len, blocks, merge_heads};
use crate::model::device::ModelDevice;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::{LayerNorm, Norm, NormKind, RmsNorm};
use crate::model::rope::Rope;
use crate::model::vision::activation::VisionActivation;
use crate::model::vision::{ImageFeatures, VisionTower};
use crate::processor::VisionInput;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::ops::{silu, softmax_last_dim};
use std::ops::Range;

/// What the parts of a tower are read with.
struct Part<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a QwenVision,
    device: &'a ModelDevice,
}

impl Part<'_> {
    /// The convolution over patches has its stride equal to its kernel, so it is a linear map.
    fn patch_embed(&self) -> Result<Linear> {
        let (config, checkpoint, device) = (self.config, self.checkpoint, self.device);
        let (name, shape) = config.patch_embed_shape(checkpoint)?;
        let weight = Tensor::from_vec(
            checkpoint.load(&name, &shape)?,
            (config.width, config.patch_dim),
            device,
        )?;
        let bias = config.patch_bias.then(|| {
            let name = config.name("patch_embed.proj.bias");
            load_tensor(checkpoint, &name, &[config.width], device)
        });
        Ok(Linear::new(weight, bias.transpose()?))
    }

    fn linear(&self, part: &str, shape: [usize; 2]) -> Result<Linear> {
        let name = self.config.name(part);
        Linear::load(self.checkpoint, &name, shape, true, self.device)
    }

    fn norm(&self, part: &str, dim: usize) -> Result<Norm> {
        let name = self.config.name(part);
        Ok(match self.config.norm {
            NormKind::Layer => Norm::Layer(LayerNorm::load(
                self.checkpoint,
                &name,
                dim,
                NORM_EPS,
                self.device,
            )?),
            NormKind::Rms => {
                let name = format!("{name}.weight");
                let weight = load_tensor(self.checkpoint, &name, &[dim], self.device)?;
                Norm::Rms(RmsNorm::new(weight, NORM_EPS))
            }
        })
    }

    fn layer(&self, i: usize) -> Result<TowerLayer> {
        let (dim, mlp_dim) = (self.config.width, self.config.mlp_dim);
        let linear =
            |part: &str, shape: [usize; 2]| self.linear(&format!("blocks.{i}.{part}"), shape);
        let mlp = match self.config.mlp {
            MlpKind::Plain {
                fc1,
                fc2,
                activation,
            } => Mlp::Plain {
                fc1: linear(fc1, [mlp_dim, dim])?,
                fc2: linear(fc2, [dim, mlp_dim])?,
                activation,
            },
            MlpKind::Gated => Mlp::Gated {
                gate: linear("mlp.gate_proj", [mlp_dim, dim])?,
                up: linear("mlp.up_proj", [mlp_dim, dim])?,
                down: linear("mlp.down_proj", [dim, mlp_dim])?,
            },
        };
        Ok(TowerLayer {
            norm1: self.norm(&format!("blocks.{i}.norm1"), dim)?,
            qkv: linear("attn.qkv", [3 * dim, dim])?,
            proj: linear("attn.proj", [dim, dim])?,
            norm2: self.norm(&format!("blocks.{i}.norm2"), dim)?,
            mlp,
        })
    }

    fn merger(&self, part: &str, norm_after: bool) -> Result<Merger> {
        let (merged, names) = (self.config.merged(), self.config.merger);
        let dim = if norm_after {
            merged
        } else {
            self.config.width
        };
        Ok(Merger {
            norm: self.norm(&format!("{part}.{}", names.norm), dim)?,
            norm_after,
            merged,
            fc1: self.linear(&format!("{part}.{}", names.fc1), [merged, merged])?,
            fc2: self.linear(
                &format!("{part}.{}", names.fc2),
                [self.config.out_dim, merged],
            )?,
        })
    }
}

/// The tower's weights in f32.
#[derive(Clone, Debug)]
pub(super) struct QwenTower {
    config: QwenVision,
    patch_embed: Linear,
    /// Learned positions, `[side², width]`.
    positions: Option<Tensor>,
    layers: Vec<TowerLayer>,
    merger: Merger,
    deepstack: Vec<Merger>,
}

#[derive(Clone, Debug)]
struct TowerLayer {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    mlp: Mlp,
}

#[derive(Clone, Debug)]
enum Mlp {
    Plain {
        fc1: Linear,
        fc2: Linear,
        activation: VisionActivation,
    },
    Gated {
        gate: Linear,
        up: Linear,
        down: Linear,
    },
}

#[derive(Clone, Debug)]
struct Merger {
    norm: Norm,
    /// Whether patches are joined before they are normed.
    norm_after: bool,
    merged: usize,
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain {
                fc1,
                fc2,
                activation,
            } => fc2.forward(&activation.apply(&fc1.forward(x)?)?),
            Self::Gated { gate, up, down } => {
                down.forward(&(silu(&gate.forward(x)?)? * up.forward(x)?)?)
            }
        }
    }
}

impl Merger {
    /// `x [n_patches, width]` → `[n_patches / merge², hidden]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = match self.norm_after {
            true => self.norm.forward(&x.reshape(((), self.merged))?)?,
            false => self.norm.forward(x)?.reshape(((), self.merged))?,
        };
        self.fc2.forward(&self.fc1.forward(&x)?.gelu_erf()?)
    }
}

impl QwenTower {
    /// Reads the tower that `config` describes.
    pub(super) fn load(
        config: &QwenVision,
        checkpoint: &Checkpoint,
        device: &ModelDevice,
    ) -> Result<Self> {
        let part = Part {
            checkpoint,
            config,
            device,
        };
        let layers = (0..config.depth).map(|i| part.layer(i));
        let deepstack = (0..config.deepstack_layers.len())
            .map(|i| part.merger(&format!("deepstack_merger_list.{i}"), true));
        let positions = config.positions_side.map(|side| {
            let name = config.name("pos_embed.weight");
            load_tensor(checkpoint, &name, &[side * side, config.width], device)
        });
        Ok(Self {
            patch_embed: part.patch_embed()?,
            positions: positions.transpose()?,
            layers: layers.collect::<Result<_>>()?,
            merger: part.merger("merger", false)?,
            deepstack: deepstack.collect::<Result<_>>()?,
            config: config.clone(),
        })
    }
}

impl VisionTower for QwenTower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let config = &self.config;
        let [t, h, w] = image.grid_thw;
        let merge = config.merge_size;
        let expected = [t * h * w, config.patch_dim];
        let found = [image.patches.rows(), image.patches.cols()];
        if expected != found || h % merge != 0 || w % merge != 0 {
            return Err(Error::Shape {
                module: "patches of an image".into(),
                expected: expected.to_vec(),
                found: found.to_vec(),
            });
        }
        let device = self.patch_embed.weight().device();
        let layout = Layout::new(config, image.grid_thw);
        let places = layout.in_order(&patch_positions(image.grid_thw, merge), merge);
        let rope = Rope::axial(config.width / config.n_heads, &places, device)?;
        let patches = tensor_from_matrix(image.patches.clone(), device)?;
        let mut x = self.patch_embed.forward(&patches)?;
        if let Some(table) = &self.positions {
            x = (x + resampled(table, image.grid_thw, merge)?)?;
        }
        x = layout.permute(&x, merge)?;
        let mut deepstack = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &rope, layout.segments(i), config)?;
            if let Some(at) = config.deepstack_layers.iter().position(|&l| l == i) {
                deepstack.push(layout.restore(&self.deepstack[at].forward(&x)?)?);
            }
        }
        Ok(ImageFeatures {
            embeddings: layout.restore(&self.merger.forward(&x)?)?,
            deepstack,
        })
    }
}

impl TowerLayer {
    /// `x [n_patches, width]`; patches of the same segment see each other.
    fn forward(
        &self,
        x: &Tensor,
        rope: &Rope,
        segments: &[Range<usize>],
        config: &QwenVision,
    ) -> Result<Tensor> {
        let a = self.attention(&self.norm1.forward(x)?, rope, segments, config)?;
        let x = (x + self.proj.forward(&a)?)?;
        Ok((&x + self.mlp.forward(&self.norm2.forward(&x)?)?)?)
    }

    fn attention(
        &self,
        x: &Tensor,
        rope: &Rope,
        segments: &[Range<usize>],
        config: &QwenVision,
    ) -> Result<Tensor> {
        let (n, n_heads) = (x.dim(0)?, config.n_heads);
        let head_dim = config.width / n_heads;
        let qkv = self.qkv.forward(x)?.reshape((n, 3, n_heads, head_dim))?;
        let part = |i: usize| -> Result<Tensor> {
            let part = qkv.narrow(1, i, 1)?.squeeze(1)?;
            Ok(part.transpose(0, 1)?.contiguous()?)
        };
        let (q, k, v) = (rope.rotate(&part(0)?)?, rope.rotate(&part(1)?)?, part(2)?);
        let mut heads = Vec::new();
        for segment in segments {
            let k = k.narrow(1, segment.start, segment.len())?.contiguous()?;
            let v = v.narrow(1, segment.start, segment.len())?.contiguous()?;
            for rows in blocks(segment.len(), block_len(n_heads, segment.len())) {
                let q = q.narrow(1, segment.start + rows.start, rows.len())?;
                let scores = (q.contiguous()?.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
                heads.push(softmax_last_dim(&scores)?.matmul(&v)?);
            }
        }
        merge_heads(&Tensor::cat(&heads, 1)?)
    }
}
