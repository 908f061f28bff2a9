//! The weights of Pixtral's tower and projector, and their forward.

use super::{NORM_EPS, PatchMerger, PixtralVision};
use crate::checkpoint::Checkpoint;
use crate::model::attention::{block_len, blocks, merge_heads};
use crate::model::device::ModelDevice;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::RmsNorm;
use crate::model::rope::Rope;
use crate::model::vision::{ImageFeatures, VisionTower};
use crate::processor::VisionInput;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::ops::softmax_last_dim;

/// What the parts of a tower are read with.
struct Part<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a PixtralVision,
    device: &'a ModelDevice,
}

impl Part<'_> {
    /// The convolution over patches has its stride equal to its kernel, so it is a linear map.
    fn patch_conv(&self) -> Result<Linear> {
        let config = self.config;
        let name = config.name("patch_conv.weight");
        let weight = self.checkpoint.load(&name, &config.patch_shape())?;
        let shape = (config.width, config.patch_dim());
        let weight = Tensor::from_vec(weight, shape, self.device)?;
        Ok(Linear::new(weight, None))
    }

    fn norm(&self, name: &str, eps: f32) -> Result<RmsNorm> {
        let (name, width) = (format!("{name}.weight"), self.config.width);
        let scale = load_tensor(self.checkpoint, &name, &[width], self.device)?;
        Ok(RmsNorm::new(scale, eps))
    }

    fn linear(&self, name: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear> {
        Linear::load(self.checkpoint, name, shape, has_bias, self.device)
    }

    fn layer(&self, i: usize) -> Result<TowerLayer> {
        let (dim, mlp) = (self.config.width, self.config.mlp_dim);
        let linear = |part: &str, shape: [usize; 2]| {
            self.linear(&self.config.layer_name(i, part), shape, false)
        };
        let norm = |part: &str| self.norm(&self.config.layer_name(i, part), NORM_EPS);
        Ok(TowerLayer {
            norm1: norm("attention_norm")?,
            q: linear("attention.q_proj", [dim, dim])?,
            k: linear("attention.k_proj", [dim, dim])?,
            v: linear("attention.v_proj", [dim, dim])?,
            out: linear("attention.o_proj", [dim, dim])?,
            norm2: norm("ffn_norm")?,
            gate: linear("feed_forward.gate_proj", [mlp, dim])?,
            up: linear("feed_forward.up_proj", [mlp, dim])?,
            down: linear("feed_forward.down_proj", [dim, mlp])?,
        })
    }

    fn merger(&self, merger: PatchMerger) -> Result<Merger> {
        let config = self.config;
        let name = config.projector_name("patch_merger.merging_layer");
        Ok(Merger {
            norm: self.norm(&config.projector_name("norm"), merger.norm_eps)?,
            linear: self.linear(&name, [config.width, config.merged()], false)?,
            merge_size: merger.merge_size,
        })
    }

    fn projection(&self, name: &str, inp: usize) -> Result<Linear> {
        let (config, name) = (self.config, self.config.projector_name(name));
        self.linear(&name, [config.out_dim, inp], config.projector_bias)
    }
}

/// The weights of tower and projector in f32.
#[derive(Clone, Debug)]
pub(super) struct PixtralTower {
    config: PixtralVision,
    patch_conv: Linear,
    pre_norm: RmsNorm,
    layers: Vec<TowerLayer>,
    merger: Option<Merger>,
    first: Linear,
    second: Linear,
}

#[derive(Clone, Debug)]
struct TowerLayer {
    norm1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Clone, Debug)]
struct Merger {
    norm: RmsNorm,
    linear: Linear,
    merge_size: usize,
}

impl PixtralTower {
    /// Reads the tower that `config` describes.
    pub(super) fn load(
        config: &PixtralVision,
        checkpoint: &Checkpoint,
        device: &ModelDevice,
    ) -> Result<Self> {
        let part = Part {
            checkpoint,
            config,
            device,
        };
        let layers = (0..config.depth).map(|i| part.layer(i));
        let merger = config.merger.map(|merger| part.merger(merger));
        Ok(Self {
            patch_conv: part.patch_conv()?,
            pre_norm: part.norm(&config.name("ln_pre"), NORM_EPS)?,
            layers: layers.collect::<Result<_>>()?,
            merger: merger.transpose()?,
            first: part.projection("linear_1", config.width)?,
            second: part.projection("linear_2", config.out_dim)?,
            config: config.clone(),
        })
    }

    /// Features `[rows · cols, width]` of the tower.
    fn features(&self, image: &VisionInput) -> Result<Tensor> {
        let [_, rows, cols] = image.grid_thw;
        let device = self.patch_conv.weight().device();
        let rows_cols =
            (0..rows as u32).flat_map(|row| (0..cols as u32).map(move |col| (row, col)));
        let head_dim = self.config.width / self.config.n_heads;
        let places: Vec<(u32, u32)> = rows_cols.collect();
        let rope = Rope::axial_in_turns(head_dim, self.config.rope_theta, &places, device)?;
        let patches = tensor_from_matrix(image.patches.clone(), device)?;
        let mut x = self.pre_norm.forward(&self.patch_conv.forward(&patches)?)?;
        for layer in &self.layers {
            x = layer.forward(&x, &rope, &self.config)?;
        }
        Ok(x)
    }
}

impl VisionTower for PixtralTower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let [frames, rows, cols] = image.grid_thw;
        let expected = [1, rows * cols, self.config.patch_dim()];
        let found = [frames, image.patches.rows(), image.patches.cols()];
        if expected != found || rows.min(cols) < self.config.merge_size() {
            return Err(Error::Shape {
                module: "patches of an image".into(),
                expected: expected.to_vec(),
                found: found.to_vec(),
            });
        }
        let features = self.features(image)?;
        let features = match &self.merger {
            Some(merger) => merger.forward(&features, [rows, cols])?,
            None => features,
        };
        let hidden = self.first.forward(&features)?.gelu_erf()?;
        Ok(ImageFeatures {
            embeddings: self.second.forward(&hidden)?,
            deepstack: Vec::new(),
        })
    }
}

impl Merger {
    /// `x [rows · cols, width]` → `[rows / merge · cols / merge, width]`.
    fn forward(&self, x: &Tensor, grid: [usize; 2]) -> Result<Tensor> {
        let squares = squares(&self.norm.forward(x)?, grid, self.merge_size)?;
        self.linear.forward(&squares)
    }
}

/// The squares of `n`² neighbours in `x [rows · cols, width]`, row by row, each as one row in which
/// a channel's values stand together, `[rows / n · cols / n, width · n²]`. What fills no square is
/// left out.
fn squares(x: &Tensor, [rows, cols]: [usize; 2], n: usize) -> Result<Tensor> {
    let width = x.dim(1)?;
    let (down, across) = (rows / n, cols / n);
    let x = x.contiguous()?.reshape((rows, cols, width))?;
    let x = x.narrow(0, 0, down * n)?.narrow(1, 0, across * n)?;
    let x = x.contiguous()?.reshape(vec![down, n, across, n, width])?;
    let x = x.permute(vec![0, 2, 4, 1, 3])?.contiguous()?;
    Ok(x.reshape((down * across, width * n * n))?)
}

impl TowerLayer {
    /// `x [n_patches, width]`.
    fn forward(&self, x: &Tensor, rope: &Rope, config: &PixtralVision) -> Result<Tensor> {
        let attended = self.attention(&self.norm1.forward(x)?, rope, config)?;
        let x = (x + self.out.forward(&attended)?)?;
        let normed = self.norm2.forward(&x)?;
        let gate = config.activation.apply(&self.gate.forward(&normed)?)?;
        let hidden = (gate * self.up.forward(&normed)?)?;
        Ok((&x + self.down.forward(&hidden)?)?)
    }

    fn attention(&self, x: &Tensor, rope: &Rope, config: &PixtralVision) -> Result<Tensor> {
        let (n, dim) = x.dims2()?;
        let head_dim = dim / config.n_heads;
        let part = |linear: &Linear| -> Result<Tensor> {
            let heads = linear.forward(x)?.reshape((n, config.n_heads, head_dim))?;
            Ok(heads.transpose(0, 1)?.contiguous()?)
        };
        let (q, k) = (rope.rotate(&part(&self.q)?)?, rope.rotate(&part(&self.k)?)?);
        let v = part(&self.v)?;
        let heads = blocks(n, block_len(config.n_heads, n)).map(|rows| {
            let q = q.narrow(1, rows.start, rows.len())?.contiguous()?;
            let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
            Ok(softmax_last_dim(&scores)?.matmul(&v)?)
        });
        let heads = heads.collect::<Result<Vec<_>>>()?;
        merge_heads(&Tensor::cat(&heads, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_square_keeps_the_values_of_a_channel_together() {
        // 3 x 5 patches of two channels: 10 · patch and 10 · patch + 1.
        let values: Vec<f32> = (0..15u8)
            .flat_map(|patch| [f32::from(patch) * 10.0, f32::from(patch) * 10.0 + 1.0])
            .collect();
        let x = Tensor::from_vec(values, (15, 2), &Device::Cpu).unwrap();
        let found: Vec<Vec<f32>> = squares(&x, [3, 5], 2).unwrap().to_vec2().unwrap();
        let of = |patches: [f32; 4]| {
            let channel = |c: f32| patches.map(|patch| patch * 10.0 + c);
            [channel(0.0), channel(1.0)].concat()
        };
        assert_eq!(found, [of([0.0, 1.0, 5.0, 6.0]), of([2.0, 3.0, 7.0, 8.0])]);
    }
}
