//! The plain vision transformer of CLIP, SigLIP, InternViT and DINOv2: tiles of one size, each a
//! sequence of patches with learned positions, of which every token sees all of its tile. In what
//! these differ, their names above all, is data ([`Vit`]).
//!
//! Source: arXiv:2010.11929; transformers `CLIPVisionModel`, `SiglipVisionModel`,
//! `InternVLVisionModel`, `Dinov2Model`.

use super::VisionSize;
use super::qwen::{Norm, NormKind, VisionActivation};
use crate::checkpoint::Checkpoint;
use crate::model::attention::{block_len, blocks};
use crate::model::config::ConfigNode;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::{LayerNorm, RmsNorm};
use crate::processor::VisionInput;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use serde_json::Value;

/// A vision transformer as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Vit {
    /// Where the checkpoint keeps it, e.g. `vision_tower.vision_model`.
    pub prefix: String,
    /// Names inside it.
    pub names: VitNames,
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
    /// Patches on a side of a tile.
    pub tile_side: usize,
    /// Patches on a side of the table of learned positions.
    pub table_side: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Of the MLP.
    pub activation: VisionActivation,
    /// Whether the linears of q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the norm after the last layer is run: not for features of an inner layer.
    pub with_post_norm: bool,
}

/// Names inside a vision transformer; what is `None` is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VitNames {
    /// The token before the patches.
    pub class: Option<&'static str>,
    /// The convolution over patches, without `.weight`.
    pub patch: &'static str,
    /// Whether it has a bias.
    pub patch_bias: bool,
    /// The learned positions, the class token's first.
    pub positions: &'static str,
    /// The norm before the first layer.
    pub pre_norm: Option<&'static str>,
    /// The list of layers.
    pub layers: &'static str,
    /// Queries, keys and values.
    pub qkv: QkvNames,
    /// The norms of whole queries and keys, before they are cut into heads.
    pub qk_norm: Option<[&'static str; 2]>,
    /// Output of attention.
    pub out: &'static str,
    /// The norm before attention.
    pub norm1: &'static str,
    /// The norm before the MLP.
    pub norm2: &'static str,
    /// Of which kind both are.
    pub layer_norms: NormKind,
    /// First linear of the MLP.
    pub fc1: &'static str,
    /// Second linear of the MLP.
    pub fc2: &'static str,
    /// Factors on the outputs of attention and MLP, channel by channel.
    pub scales: Option<[&'static str; 2]>,
    /// The norm after the last layer.
    pub post_norm: Option<&'static str>,
}

/// Names of the linears of queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvNames {
    /// One for each.
    Separate([&'static str; 3]),
    /// One for all, their outputs side by side.
    Fused(&'static str),
}

/// The names in transformers' CLIP, whose class token comes first.
pub const CLIP: VitNames = VitNames {
    class: Some("embeddings.class_embedding"),
    patch: "embeddings.patch_embedding",
    patch_bias: false,
    positions: "embeddings.position_embedding.weight",
    pre_norm: Some("pre_layrnorm"),
    layers: "encoder.layers",
    qkv: QkvNames::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norm: None,
    out: "self_attn.out_proj",
    norm1: "layer_norm1",
    norm2: "layer_norm2",
    layer_norms: NormKind::Layer,
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    scales: None,
    post_norm: Some("post_layernorm"),
};

/// The names in transformers' SigLIP.
pub const SIGLIP: VitNames = VitNames {
    class: None,
    patch_bias: true,
    pre_norm: None,
    ..CLIP
};

/// The names in the files of DINOv2, and of transformers up to 5.
pub const DINOV2: VitNames = VitNames {
    class: Some("embeddings.cls_token"),
    patch: "embeddings.patch_embeddings.projection",
    patch_bias: true,
    positions: "embeddings.position_embeddings",
    pre_norm: None,
    layers: "encoder.layer",
    qkv: QkvNames::Separate([
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ]),
    qk_norm: None,
    out: "attention.output.dense",
    norm1: "norm1",
    norm2: "norm2",
    layer_norms: NormKind::Layer,
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    scales: Some(["layer_scale1.lambda1", "layer_scale2.lambda1"]),
    post_norm: Some("layernorm"),
};

/// What transformers takes where a tower's configuration says nothing.
#[derive(Clone, Copy, Debug)]
pub struct VitDefaults {
    /// Width of the tower.
    pub width: usize,
    /// Transformer layers.
    pub n_layers: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Pixels on a side of a tile.
    pub image_size: usize,
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Of the MLP.
    pub activation: &'static str,
}

/// The defaults of transformers' SigLIP.
pub const SIGLIP_DEFAULTS: VitDefaults = VitDefaults {
    width: 768,
    n_layers: 12,
    n_heads: 12,
    mlp_dim: 3072,
    image_size: 224,
    patch_size: 16,
    norm_eps: 1e-6,
    activation: "gelu_pytorch_tanh",
};

/// The defaults of transformers' CLIP.
pub const CLIP_DEFAULTS: VitDefaults = VitDefaults {
    patch_size: 32,
    norm_eps: 1e-5,
    activation: "quick_gelu",
    ..SIGLIP_DEFAULTS
};

/// Bounds of what a configuration may ask for, far above every published tower.
const MAX_PATCH: usize = 256;
const MAX_SIDE: usize = 256;

impl Vit {
    /// Reads the keys that all towers of this kind share: all layers of it, biases for q, k and v, and
    /// no norm after the last layer.
    ///
    /// # Errors
    /// [`Error::Format`] for an ill-typed or contradictory key, [`Error::Unsupported`] for an unknown
    /// activation.
    pub fn read(
        node: &ConfigNode,
        prefix: &str,
        names: VitNames,
        defaults: VitDefaults,
    ) -> Result<Self> {
        let width = node.size_or("hidden_size", defaults.width)?;
        let n_heads = node.size_or("num_attention_heads", defaults.n_heads)?;
        if width % n_heads != 0 {
            let why = format!("{n_heads} does not divide hidden_size {width}");
            return Err(node.invalid("num_attention_heads", why));
        }
        let patch_size = side(node, "patch_size", defaults.patch_size)?;
        if patch_size > MAX_PATCH {
            let why = format!("{patch_size} pixels, at most {MAX_PATCH} expected");
            return Err(node.invalid("patch_size", why));
        }
        let tile_side = patches_on(node, "image_size", defaults.image_size, patch_size)?;
        Ok(Self {
            prefix: prefix.to_owned(),
            names,
            depth: node.size_or("num_hidden_layers", defaults.n_layers)?,
            width,
            n_heads,
            mlp_dim: node.size_or("intermediate_size", defaults.mlp_dim)?,
            patch_size,
            tile_side,
            table_side: tile_side,
            norm_eps: node.positive_or("layer_norm_eps", defaults.norm_eps)? as f32,
            activation: VisionActivation::read(node, defaults.activation)?,
            qkv_bias: true,
            with_post_norm: false,
        })
    }

    /// Patches of a tile.
    pub fn n_patches(&self) -> usize {
        self.tile_side * self.tile_side
    }

    /// Values of a patch.
    pub fn patch_dim(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// Tokens before the patches of a tile.
    pub fn n_class_tokens(&self) -> usize {
        usize::from(self.names.class.is_some())
    }

    /// Sizes, where `patches_per_token` patches become a token.
    pub fn size(&self, patches_per_token: usize) -> VisionSize {
        VisionSize {
            depth: self.depth,
            width: self.width,
            n_heads: self.n_heads,
            mlp_dim: self.mlp_dim,
            patches_per_token,
            patches_per_tile: Some(self.n_patches()),
        }
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }

    fn layer_name(&self, i: usize, part: &str) -> String {
        format!("{}.{}.{i}.{part}", self.prefix, self.names.layers)
    }

    fn patch_shape(&self) -> [usize; 4] {
        [self.width, 3, self.patch_size, self.patch_size]
    }

    /// Looks at the shapes that tell the tower's sizes.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`].
    pub fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        let patch = self.name(&format!("{}.weight", self.names.patch));
        checkpoint.require_shape(&patch, &self.patch_shape())?;
        for i in 0..self.depth {
            let fc1 = self.layer_name(i, &format!("{}.weight", self.names.fc1));
            checkpoint.require_shape(&fc1, &[self.mlp_dim, self.width])?;
        }
        Ok(())
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(&self, checkpoint: &Checkpoint, device: &Device) -> Result<VitTower> {
        let part = Part {
            checkpoint,
            vit: self,
            device,
        };
        let names = &self.names;
        let norm = |name: Option<&str>| name.map(|n| part.norm(&self.name(n))).transpose();
        let layers = (0..self.depth).map(|i| part.layer(i));
        Ok(VitTower {
            class: names.class.map(|name| part.class(name)).transpose()?,
            patch_embed: part.patch_embed()?,
            positions: part.positions()?,
            pre_norm: norm(names.pre_norm)?,
            layers: layers.collect::<Result<_>>()?,
            post_norm: norm(names.post_norm.filter(|_| self.with_post_norm))?,
            vit: self.clone(),
        })
    }
}

/// Patches on the side of a tile whose pixels stand under `key`.
///
/// # Errors
/// [`Error::Format`] if there is room for none, or for more than any tower has.
pub fn patches_on(
    node: &ConfigNode,
    key: &str,
    default_pixels: usize,
    patch_size: usize,
) -> Result<usize> {
    let pixels = side(node, key, default_pixels)?;
    let n = pixels / patch_size;
    if (1..=MAX_SIDE).contains(&n) {
        return Ok(n);
    }
    let why = format!("{pixels} pixels, room for 1 to {MAX_SIDE} patches of {patch_size} expected");
    Err(node.invalid(key, why))
}

/// A side in pixels under `key`: a number, or two that are equal.
fn side(node: &ConfigNode, key: &str, default: usize) -> Result<usize> {
    match node.get(key).and_then(Value::as_array).map(Vec::as_slice) {
        Some([height, width]) if height == width => {
            let side = height.as_u64().filter(|side| (1..1 << 31).contains(side));
            side.map(|side| side as usize).ok_or_else(|| {
                node.invalid(key, format!("sides in pixels expected, found {height}"))
            })
        }
        Some(other) => {
            let why = format!("two equal sides expected, found {other:?}");
            Err(node.invalid(key, why))
        }
        None => node.size_or(key, default),
    }
}

/// What the parts of a tower are read with.
struct Part<'a> {
    checkpoint: &'a Checkpoint,
    vit: &'a Vit,
    device: &'a Device,
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
            let patches =
                crate::Matrix::from_vec("tile", vit.n_patches(), vit.patch_dim(), values)?;
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
        crate::model::attention::merge_heads(&Tensor::cat(&heads, 1)?)
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
