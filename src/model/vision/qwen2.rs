//! The Qwen2-VL vision tower: patches attend within their frame under axial rotary positions, and
//! a merger turns each 2×2 neighbourhood into one embedding of the decoder's width.
//!
//! Source: arXiv:2409.12191 §2.1; transformers `Qwen2VisionTransformerPretrainedModel`.

use crate::checkpoint::Checkpoint;
use crate::model::attention::{block_len, blocks, merge_heads};
use crate::model::config::ConfigNode;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::rope::Rope;
use crate::processor::VisionInput;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::ops::{layer_norm, sigmoid, softmax_last_dim};
use std::ops::Range;

/// Epsilon of every layer norm of the tower; no configuration key changes it.
const LAYER_NORM_EPS: f32 = 1e-6;

/// Bound of what sizes may multiply to, so that every product of them fits.
const MAX_WIDTH: usize = 1 << 31;

/// Sizes of the tower.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Transformer layers.
    pub depth: usize,
    /// Width of the tower.
    pub embed_dim: usize,
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
    activation: Activation,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    QuickGelu,
    Gelu,
}

impl VisionConfig {
    /// Reads `vision_config`.
    ///
    /// # Errors
    /// [`Error::Format`] for an ill-typed or contradictory key, [`Error::Unsupported`] for another
    /// activation.
    pub fn read(root: &ConfigNode, decoder_hidden_size: usize) -> Result<Self> {
        let node = root.nested("vision_config")?;
        let embed_dim = node.size_or("embed_dim", 1280)?;
        let n_heads = node.size_or("num_heads", 16)?;
        if embed_dim % n_heads != 0 || (embed_dim / n_heads) % 4 != 0 {
            let why =
                format!("{n_heads} heads do not cut embed_dim {embed_dim} into multiples of 4");
            return Err(node.invalid("num_heads", why));
        }
        let channels = node.size_or("in_channels", node.size_or("in_chans", 3)?)?;
        let patch = node.size_or("patch_size", 14)?;
        let frames = node.size_or("temporal_patch_size", 2)?;
        let merge_size = node.size_or("spatial_merge_size", 2)?;
        let product = |key: &str, sizes: &[usize]| {
            let product = sizes
                .iter()
                .try_fold(1usize, |n, size| n.checked_mul(*size));
            let bounded = product.filter(|n| *n < MAX_WIDTH);
            bounded.ok_or_else(|| node.invalid(key, format!("{sizes:?} multiply beyond 2^31")))
        };
        product("spatial_merge_size", &[embed_dim, merge_size, merge_size])?;
        let out_dim = node.size_or("hidden_size", 3584)?;
        if out_dim != decoder_hidden_size {
            let why = format!("{out_dim}, but the decoder's hidden_size is {decoder_hidden_size}");
            return Err(node.invalid("hidden_size", why));
        }
        let activation = match node.text_or("hidden_act", "quick_gelu")? {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            other => {
                let what = format!("hidden_act {other:?} of the vision tower; quick_gelu or gelu");
                return Err(Error::Unsupported { what });
            }
        };
        Ok(Self {
            depth: node.size_or("depth", 32)?,
            embed_dim,
            n_heads,
            mlp_dim: (embed_dim as f64 * node.positive_or("mlp_ratio", 4.0)?) as usize,
            patch_dim: product("patch_size", &[channels, frames, patch, patch])?,
            merge_size,
            out_dim,
            activation,
        })
    }

    /// Looks at the shapes of the first linear of the tower under `prefix`, and of those of each layer
    /// that tell its widths.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`].
    pub fn check_shapes(&self, checkpoint: &Checkpoint, prefix: &str) -> Result<()> {
        self.patch_embed_shape(checkpoint, prefix)?;
        for i in 0..self.depth {
            let qkv = format!("{prefix}.blocks.{i}.attn.qkv.weight");
            checkpoint.require_shape(&qkv, &[3 * self.embed_dim, self.embed_dim])?;
            let fc1 = format!("{prefix}.blocks.{i}.mlp.fc1.weight");
            checkpoint.require_shape(&fc1, &[self.mlp_dim, self.embed_dim])?;
        }
        Ok(())
    }

    /// Name and five sides of the convolution over patches, whose product alone is known.
    fn patch_embed_shape(
        &self,
        checkpoint: &Checkpoint,
        prefix: &str,
    ) -> Result<(String, Vec<usize>)> {
        let name = format!("{prefix}.patch_embed.proj.weight");
        let info = checkpoint.info(&name).ok_or_else(|| Error::Missing {
            what: format!("tensor {name}"),
            place: checkpoint.dir().display().to_string(),
        })?;
        let shape = info.shape.clone();
        let is_known = shape.len() == 5
            && shape[0] == self.embed_dim
            && shape[1..].iter().product::<usize>() == self.patch_dim;
        match is_known {
            true => Ok((name, shape)),
            false => Err(Error::Shape {
                module: name,
                expected: vec![self.embed_dim, self.patch_dim],
                found: shape,
            }),
        }
    }
}

/// The tower's weights in f32.
#[derive(Clone, Debug)]
pub struct VisionTower {
    config: VisionConfig,
    patch_embed: Linear,
    layers: Vec<TowerLayer>,
    merger_norm: LayerNorm,
    merger_in: Linear,
    merger_out: Linear,
}

#[derive(Clone, Debug)]
struct TowerLayer {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

#[derive(Clone, Debug)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    fn load(checkpoint: &Checkpoint, name: &str, dim: usize, device: &Device) -> Result<Self> {
        Ok(Self {
            weight: load_tensor(checkpoint, &format!("{name}.weight"), &[dim], device)?,
            bias: load_tensor(checkpoint, &format!("{name}.bias"), &[dim], device)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(
            &x.contiguous()?,
            &self.weight,
            &self.bias,
            LAYER_NORM_EPS,
        )?)
    }
}

impl VisionTower {
    /// Reads the tower under `prefix`, e.g. `visual`.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        config: &VisionConfig,
        device: &Device,
    ) -> Result<Self> {
        let dim = config.embed_dim;
        let merged = dim * config.merge_size * config.merge_size;
        let layers = (0..config.depth)
            .map(|i| TowerLayer::load(checkpoint, &format!("{prefix}.blocks.{i}"), config, device))
            .collect::<Result<_>>()?;
        let linear = |name: &str, shape| {
            Linear::load(checkpoint, &format!("{prefix}.{name}"), shape, true, device)
        };
        Ok(Self {
            patch_embed: load_patch_embed(checkpoint, prefix, config, device)?,
            layers,
            merger_norm: LayerNorm::load(
                checkpoint,
                &format!("{prefix}.merger.ln_q"),
                dim,
                device,
            )?,
            merger_in: linear("merger.mlp.0", [merged, merged])?,
            merger_out: linear("merger.mlp.2", [config.out_dim, merged])?,
            config: config.clone(),
        })
    }

    /// Embeddings of one image, `[n_patches / merge², hidden]`, in the order of its tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] if the patches have another size than this tower takes.
    pub fn forward(&self, image: &VisionInput) -> Result<Tensor> {
        let [t, h, w] = image.grid_thw;
        let merge = self.config.merge_size;
        let expected = [t * h * w, self.config.patch_dim];
        let found = [image.patches.rows(), image.patches.cols()];
        if expected != found || h % merge != 0 || w % merge != 0 {
            return Err(Error::Shape {
                module: "patches of an image".into(),
                expected: expected.to_vec(),
                found: found.to_vec(),
            });
        }
        let device = self.patch_embed.weight().device();
        let rope = Rope::axial(
            self.config.embed_dim / self.config.n_heads,
            &patch_positions(image.grid_thw, merge),
            device,
        )?;
        let mut x = self
            .patch_embed
            .forward(&tensor_from_matrix(image.patches.clone(), device)?)?;
        for layer in &self.layers {
            x = layer.forward(&x, &rope, t, &self.config)?;
        }
        let merged = self
            .merger_norm
            .forward(&x)?
            .reshape(((), self.config.embed_dim * merge * merge))?;
        self.merger_out
            .forward(&self.merger_in.forward(&merged)?.gelu_erf()?)
    }
}

impl TowerLayer {
    fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        config: &VisionConfig,
        device: &Device,
    ) -> Result<Self> {
        let (dim, mlp) = (config.embed_dim, config.mlp_dim);
        let norm =
            |name: &str| LayerNorm::load(checkpoint, &format!("{prefix}.{name}"), dim, device);
        let linear = |name: &str, shape| {
            Linear::load(checkpoint, &format!("{prefix}.{name}"), shape, true, device)
        };
        Ok(Self {
            norm1: norm("norm1")?,
            qkv: linear("attn.qkv", [3 * dim, dim])?,
            proj: linear("attn.proj", [dim, dim])?,
            norm2: norm("norm2")?,
            fc1: linear("mlp.fc1", [mlp, dim])?,
            fc2: linear("mlp.fc2", [dim, mlp])?,
        })
    }

    /// `x [n_patches, dim]` of `n_frames` frames of equal size.
    fn forward(
        &self,
        x: &Tensor,
        rope: &Rope,
        n_frames: usize,
        config: &VisionConfig,
    ) -> Result<Tensor> {
        let a = self.attention(&self.norm1.forward(x)?, rope, n_frames, config)?;
        let x = (x + self.proj.forward(&a)?)?;
        let h = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let h = match config.activation {
            Activation::QuickGelu => (&h * sigmoid(&(&h * 1.702)?)?)?,
            Activation::Gelu => h.gelu_erf()?,
        };
        Ok((&x + self.fc2.forward(&h)?)?)
    }

    fn attention(
        &self,
        x: &Tensor,
        rope: &Rope,
        n_frames: usize,
        config: &VisionConfig,
    ) -> Result<Tensor> {
        let n = x.dim(0)?;
        let head_dim = config.embed_dim / config.n_heads;
        let qkv = self
            .qkv
            .forward(x)?
            .reshape((n, 3, config.n_heads, head_dim))?;
        let part = |i: usize| -> Result<Tensor> {
            Ok(qkv
                .narrow(1, i, 1)?
                .squeeze(1)?
                .transpose(0, 1)?
                .contiguous()?)
        };
        // Patches of one frame are neighbours, so a frame is one more batch dimension.
        let frames = |x: Tensor| x.reshape((config.n_heads * n_frames, n / n_frames, head_dim));
        let q = frames(rope.rotate(&part(0)?)?)?;
        let k = frames(rope.rotate(&part(1)?)?)?;
        let v = frames(part(2)?)?;
        let n_keys = n / n_frames;
        let attend = |rows: Range<usize>| -> Result<Tensor> {
            let q = q.narrow(1, rows.start, rows.len())?;
            let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
            Ok(softmax_last_dim(&scores)?.matmul(&v)?)
        };
        let heads = blocks(n_keys, block_len(config.n_heads * n_frames, n_keys))
            .map(attend)
            .collect::<Result<Vec<_>>>()?;
        merge_heads(&Tensor::cat(&heads, 1)?.reshape((config.n_heads, n, head_dim))?)
    }
}

/// The convolution over patches has its stride equal to its kernel, so it is a linear map.
fn load_patch_embed(
    checkpoint: &Checkpoint,
    prefix: &str,
    config: &VisionConfig,
    device: &Device,
) -> Result<Linear> {
    let (name, shape) = config.patch_embed_shape(checkpoint, prefix)?;
    let weight = Tensor::from_vec(
        checkpoint.load(&name, &shape)?,
        (config.embed_dim, config.patch_dim),
        device,
    )?;
    Ok(Linear::new(weight, None))
}

/// Row and column of every patch, in the order of the processor: merge group by merge group.
fn patch_positions([t, h, w]: [usize; 3], merge: usize) -> Vec<(u32, u32)> {
    let mut positions = Vec::with_capacity(t * h * w);
    for _ in 0..t {
        for (group_row, group_col) in
            (0..h / merge).flat_map(|r| (0..w / merge).map(move |c| (r, c)))
        {
            for (row, col) in (0..merge).flat_map(|r| (0..merge).map(move |c| (r, c))) {
                positions.push((
                    (group_row * merge + row) as u32,
                    (group_col * merge + col) as u32,
                ));
            }
        }
    }
    positions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_numbered_group_by_group() {
        let p = patch_positions([1, 2, 4], 2);
        assert_eq!(
            p,
            [
                (0, 0),
                (0, 1),
                (1, 0),
                (1, 1),
                (0, 2),
                (0, 3),
                (1, 2),
                (1, 3)
            ]
        );
        assert_eq!(patch_positions([2, 2, 2], 2).len(), 8);
    }
}
