//! The weights of a plain vision transformer, and its forward.

use super::{QkvNames, Vit};
use crate::checkpoint::Checkpoint;
use crate::model::attention::{block_len, blocks, merge_heads};
use crate::model::device::ModelDevice;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::{LayerNorm, Norm, NormKind, RmsNorm};
use crate::processor::VisionInput;
use crate::{Error, Matrix, Result};
use candle_core::Tensor;
use candle_nn::ops::softmax_last_dim;

/// What the parts of a tower are read with.
struct Part<'a> {
    checkpoint: &'a Checkpoint,
    vit: &'a Vit,
    device: &'a ModelDevice,
}

impl Part<'_> {
    /// A tensor of `n` values, whatever axes of length one it has, as `shape`.
    fn flat(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let n: usize = shape.iter().product();
        let info = self.checkpoint.info(name).ok_or_else(|| Error::Missing {
            what: format!("tensor {name}"),
            place: self.checkpoint.dir().display().to_string(),
        })?;
        let found = info.shape.clone();
        if found.iter().product::<usize>() != n {
            return Err(Error::Shape {
                module: name.to_owned(),
                expected: shape.to_vec(),
                found,
            });
        }
        Ok(load_tensor(self.checkpoint, name, &found, self.device)?.reshape(shape)?)
    }

    fn class(&self, name: &str) -> Result<Tensor> {
        self.flat(&self.vit.name(name), &[1, self.vit.width])
    }

    /// The convolution over patches has its stride equal to its kernel, so it is a linear map.
    fn patch_embed(&self) -> Result<Linear> {
        let name = self.vit.name(self.vit.names.patch);
        let weight = self
            .checkpoint
            .load(&format!("{name}.weight"), &self.vit.patch_shape())?;
        let shape = (self.vit.width, self.vit.patch_dim());
        let weight = Tensor::from_vec(weight, shape, self.device)?;
        let bias = self.vit.names.patch_bias.then(|| {
            let name = format!("{name}.bias");
            load_tensor(self.checkpoint, &name, &[self.vit.width], self.device)
        });
        Ok(Linear::new(weight, bias.transpose()?))
    }

    /// One row for each token of a tile.
    fn positions(&self) -> Result<Tensor> {
        let (vit, n_class) = (self.vit, self.vit.n_class_tokens());
        let n_table = vit.table_side * vit.table_side;
        let name = vit.name(vit.names.positions);
        let table = self.flat(&name, &[n_class + n_table, vit.width])?;
        if vit.table_side == vit.tile_side {
            return Ok(table);
        }
        let patches = table.narrow(0, n_class, n_table)?;
        let patches = resampled(&patches, vit.table_side, vit.tile_side)?;
        Ok(Tensor::cat(&[table.narrow(0, 0, n_class)?, patches], 0)?)
    }

    fn norm(&self, name: &str) -> Result<LayerNorm> {
        let (dim, eps) = (self.vit.width, self.vit.norm_eps);
        LayerNorm::load(self.checkpoint, name, dim, eps, self.device)
    }

    fn layer_norm(&self, i: usize, part: &str) -> Result<Norm> {
        let name = self.vit.layer_name(i, part);
        Ok(match self.vit.names.layer_norms {
            NormKind::Layer => Norm::Layer(self.norm(&name)?),
            NormKind::Rms => Norm::Rms(self.rms_norm(i, part)?),
        })
    }

    fn rms_norm(&self, i: usize, part: &str) -> Result<RmsNorm> {
        let scale = self.vector(i, &format!("{part}.weight"))?;
        Ok(RmsNorm::new(scale, self.vit.norm_eps))
    }

    /// A value for each channel.
    fn vector(&self, i: usize, part: &str) -> Result<Tensor> {
        let name = self.vit.layer_name(i, part);
        load_tensor(self.checkpoint, &name, &[self.vit.width], self.device)
    }

    fn linear(&self, i: usize, part: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear> {
        let name = self.vit.layer_name(i, part);
        Linear::load(self.checkpoint, &name, shape, has_bias, self.device)
    }

    fn layer(&self, i: usize) -> Result<VitLayer> {
        let (vit, names) = (self.vit, &self.vit.names);
        let (dim, mlp) = (vit.width, vit.mlp_dim);
        let qkv = match names.qkv {
            QkvNames::Fused(name) => vec![self.linear(i, name, [3 * dim, dim], vit.qkv_bias)?],
            QkvNames::Separate(names) => names
                .iter()
                .map(|name| self.linear(i, name, [dim, dim], vit.qkv_bias))
                .collect::<Result<_>>()?,
        };
        let qk_norm = names.qk_norm.map(|[q, k]| {
            let both = [self.rms_norm(i, q)?, self.rms_norm(i, k)?];
            Ok::<_, Error>(both)
        });
        let scales = names.scales.map(|[first, second]| {
            let both = [self.vector(i, first)?, self.vector(i, second)?];
            Ok::<_, Error>(both)
        });
        Ok(VitLayer {
            norm1: self.layer_norm(i, names.norm1)?,
            qkv,
            qk_norm: qk_norm.transpose()?,
            out: self.linear(i, names.out, [dim, dim], true)?,
            norm2: self.layer_norm(i, names.norm2)?,
            fc1: self.linear(i, names.fc1, [mlp, dim], true)?,
            fc2: self.linear(i, names.fc2, [dim, mlp], true)?,
            scales: scales.transpose()?,
        })
    }
}

/// A tower's weights in f32.
#[derive(Clone, Debug)]
pub struct VitTower {
    vit: Vit,
    class: Option<Tensor>,
    patch_embed: Linear,
    positions: Tensor,
    pre_norm: Option<LayerNorm>,
    layers: Vec<VitLayer>,
    post_norm: Option<LayerNorm>,
}

#[derive(Clone, Debug)]
struct VitLayer {
    norm1: Norm,
    /// One linear, or three.
    qkv: Vec<Linear>,
    qk_norm: Option<[RmsNorm; 2]>,
    out: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    scales: Option<[Tensor; 2]>,
}

impl VitTower {
    /// Reads the tower that `vit` describes.
    pub(super) fn load(vit: &Vit, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Self> {
        let part = Part {
            checkpoint,
            vit,
            device,
        };
        let names = &vit.names;
        let norm = |name: Option<&str>| name.map(|n| part.norm(&vit.name(n))).transpose();
        let layers = (0..vit.depth).map(|i| part.layer(i));
        Ok(Self {
            class: names.class.map(|name| part.class(name)).transpose()?,
            patch_embed: part.patch_embed()?,
            positions: part.positions()?,
            pre_norm: norm(names.pre_norm)?,
            layers: layers.collect::<Result<_>>()?,
            post_norm: norm(names.post_norm.filter(|_| vit.with_post_norm))?,
            vit: vit.clone(),
        })
    }

    /// The same tower, the i-th token of whose tiles has the learned position `rows[i]`.
    ///
    /// # Errors
    /// A tensor error if there is no such row.
    pub fn with_positions(mut self, rows: &[u32]) -> Result<Self> {
        let rows = Tensor::new(rows, self.positions.device())?;
        self.positions = self.positions.index_select(&rows, 0)?;
        Ok(self)
    }

    /// What the tower makes of an image's tiles, `[n_tiles, n_tokens, width]`, class tokens first.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tiles have another size than this tower takes.
    pub fn forward(&self, image: &VisionInput) -> Result<Tensor> {
        let vit = &self.vit;
        let [n_tiles, rows, cols] = image.grid_thw;
        let expected = [
            vit.tile_side,
            vit.tile_side,
            n_tiles * vit.n_patches(),
            vit.patch_dim(),
        ];
        let found = [rows, cols, image.patches.rows(), image.patches.cols()];
        if expected != found {
            return Err(Error::Shape {
                module: "patches of an image".into(),
                expected: expected.to_vec(),
                found: found.to_vec(),
            });
        }
        let device = self.patch_embed.weight().device();
        let tiles = (0..n_tiles).map(|tile| {
            let n = vit.n_patches() * vit.patch_dim();
            let values = image.patches.data()[tile * n..(tile + 1) * n].to_vec();
            let patches = Matrix::from_vec("tile", vit.n_patches(), vit.patch_dim(), values)?;
            self.tile(&tensor_from_matrix(patches, device)?)
        });
        Ok(Tensor::stack(&tiles.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// One tile `[n_patches, patch_dim]`.
    fn tile(&self, patches: &Tensor) -> Result<Tensor> {
        let x = self.patch_embed.forward(patches)?;
        let x = match &self.class {
            Some(class) => Tensor::cat(&[class, &x], 0)?,
            None => x,
        };
        let mut x = (x + &self.positions)?;
        if let Some(norm) = &self.pre_norm {
            x = norm.forward(&x)?;
        }
        for layer in &self.layers {
            x = layer.forward(&x, &self.vit)?;
        }
        match &self.post_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

impl VitLayer {
    fn forward(&self, x: &Tensor, vit: &Vit) -> Result<Tensor> {
        let scaled = |y: Tensor, which: usize| -> Result<Tensor> {
            Ok(match &self.scales {
                Some(scales) => y.broadcast_mul(&scales[which])?,
                None => y,
            })
        };
        let a = self.attention(&self.norm1.forward(x)?, vit)?;
        let x = (x + scaled(self.out.forward(&a)?, 0)?)?;
        let h = vit
            .activation
            .apply(&self.fc1.forward(&self.norm2.forward(&x)?)?)?;
        Ok((&x + scaled(self.fc2.forward(&h)?, 1)?)?)
    }

    fn attention(&self, x: &Tensor, vit: &Vit) -> Result<Tensor> {
        let (n, dim) = x.dims2()?;
        let head_dim = dim / vit.n_heads;
        let projected = self.qkv.iter().map(|linear| linear.forward(x));
        let projected = projected.collect::<Result<Vec<_>>>()?;
        let part = |i: usize| -> Result<Tensor> {
            let part = match &projected[..] {
                [fused] => fused.narrow(1, i * dim, dim)?,
                separate => separate[i].clone(),
            };
            let part = match (&self.qk_norm, i) {
                (Some(norms), 0 | 1) => norms[i].forward(&part)?,
                _ => part,
            };
            let heads = part.reshape((n, vit.n_heads, head_dim))?;
            Ok(heads.transpose(0, 1)?.contiguous()?)
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let heads = blocks(n, block_len(vit.n_heads, n)).map(|rows| {
            let q = q.narrow(1, rows.start, rows.len())?.contiguous()?;
            let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
            Ok(softmax_last_dim(&scores)?.matmul(&v)?)
        });
        let heads = heads.collect::<Result<Vec<_>>>()?;
        merge_heads(&Tensor::cat(&heads, 1)?)
    }
}

/// A square table `[from², width]` resampled to `to²` rows: bicubic with a = −0.75, half-pixel
/// centres, as torch interpolates.
fn resampled(table: &Tensor, from: usize, to: usize) -> Result<Tensor> {
    let device = table.device();
    let axis = |at: usize| {
        let source = (at as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let floor = source.floor();
        (-1i64..3).map(move |offset| {
            let distance = (source - floor - offset as f64).abs();
            let tap = (floor as i64 + offset).clamp(0, from as i64 - 1) as usize;
            (tap, keys(distance))
        })
    };
    let mut weights = vec![0f32; to * to * from * from];
    for (row, col) in (0..to).flat_map(|row| (0..to).map(move |col| (row, col))) {
        let own = &mut weights[(row * to + col) * from * from..][..from * from];
        for (tap_row, weight_row) in axis(row) {
            for (tap_col, weight_col) in axis(col) {
                own[tap_row * from + tap_col] += (weight_row * weight_col) as f32;
            }
        }
    }
    let weights = Tensor::from_vec(weights, (to * to, from * from), device)?;
    Ok(weights.matmul(&table.contiguous()?)?)
}

/// Keys' cubic kernel with a = −0.75.
fn keys(x: f64) -> f64 {
    const A: f64 = -0.75;
    if x <= 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}
