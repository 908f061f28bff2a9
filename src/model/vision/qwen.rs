//! The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one transformer over patches under axial
//! rotary positions, and a merger that turns each 2×2 neighbourhood into one embedding of the
//! decoder's width. Where they differ is data ([`QwenVision`]).
//!
//! Source: arXiv:2409.12191 §2.1, arXiv:2502.13923 §2.1; transformers
//! `Qwen2VisionTransformerPretrainedModel`, `Qwen2_5_VisionTransformerPretrainedModel`,
//! `Qwen3VLVisionModel`.

use super::{ImageFeatures, VisionConfig, VisionSize, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::model::attention::{block_len, blocks, merge_heads};
use crate::model::config::ConfigNode;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::{LayerNorm, RmsNorm};
use crate::model::rope::Rope;
use crate::processor::VisionInput;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::ops::{sigmoid, silu, softmax_last_dim};
use std::ops::Range;

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

/// The norm of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// With mean and bias.
    Layer,
    /// Without.
    Rms,
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

/// The activation of a plain MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisionActivation {
    /// z·σ(1.702 z).
    QuickGelu,
    /// GELU.
    Gelu,
    /// GELU in its tanh form.
    GeluTanh,
}

impl VisionActivation {
    /// Reads `hidden_act`, which is `default` where it is absent.
    ///
    /// # Errors
    /// [`Error::Format`] if it is no string, [`Error::Unsupported`] for another activation.
    pub fn read(node: &ConfigNode, default: &str) -> Result<Self> {
        Ok(match node.text_or("hidden_act", default)? {
            "quick_gelu" => Self::QuickGelu,
            "gelu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" => Self::GeluTanh,
            other => {
                let what = format!(
                    "hidden_act {other:?} of the vision tower; quick_gelu, gelu or gelu_pytorch_tanh"
                );
                return Err(Error::Unsupported { what });
            }
        })
    }

    /// The activation of every value.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::QuickGelu => (x * sigmoid(&(x * 1.702)?)?)?,
            Self::Gelu => x.gelu_erf()?,
            Self::GeluTanh => x.gelu()?,
        })
    }
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

    /// The convolution over patches has its stride equal to its kernel, so it is a linear map.
    fn load_patch_embed(&self, checkpoint: &Checkpoint, device: &Device) -> Result<Linear> {
        let (name, shape) = self.patch_embed_shape(checkpoint)?;
        let weight = Tensor::from_vec(
            checkpoint.load(&name, &shape)?,
            (self.width, self.patch_dim),
            device,
        )?;
        let bias = self.patch_bias.then(|| {
            let name = self.name("patch_embed.proj.bias");
            load_tensor(checkpoint, &name, &[self.width], device)
        });
        Ok(Linear::new(weight, bias.transpose()?))
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

    fn load(&self, checkpoint: &Checkpoint, device: &Device) -> Result<Box<dyn VisionTower>> {
        let part = Part {
            checkpoint,
            config: self,
            device,
        };
        let layers = (0..self.depth).map(|i| part.layer(i));
        let deepstack = (0..self.deepstack_layers.len())
            .map(|i| part.merger(&format!("deepstack_merger_list.{i}"), true));
        let positions = self.positions_side.map(|side| {
            let name = self.name("pos_embed.weight");
            load_tensor(checkpoint, &name, &[side * side, self.width], device)
        });
        Ok(Box::new(QwenTower {
            patch_embed: self.load_patch_embed(checkpoint, device)?,
            positions: positions.transpose()?,
            layers: layers.collect::<Result<_>>()?,
            merger: part.merger("merger", false)?,
            deepstack: deepstack.collect::<Result<_>>()?,
            config: self.clone(),
        }))
    }
}

/// What the parts of a tower are read with.
struct Part<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a QwenVision,
    device: &'a Device,
}

impl Part<'_> {
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
struct QwenTower {
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
pub(super) enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
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

impl Norm {
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
        }
    }
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

/// The order in which patches go through the layers, and which of them see each other.
struct Layout {
    /// For each token, in the order of the layers, its place in the order of the image.
    order: Vec<u32>,
    /// Patches of a frame.
    frames: Vec<Range<usize>>,
    /// Patches of a window, and the layers that see whole frames nevertheless.
    windows: Option<(Vec<Range<usize>>, Vec<usize>)>,
}

impl Layout {
    fn new(config: &QwenVision, [t, h, w]: [usize; 3]) -> Self {
        let merge = config.merge_size;
        let (rows, cols, unit) = (h / merge, w / merge, merge * merge);
        let n = rows * cols;
        let frames = (0..t).map(|i| i * n * unit..(i + 1) * n * unit).collect();
        let Some(windows) = &config.windows else {
            return Self {
                order: (0..(t * n) as u32).collect(),
                frames,
                windows: None,
            };
        };
        let (mut order, mut ranges) = (Vec::new(), Vec::new());
        for frame in 0..t {
            for top in (0..rows).step_by(windows.side) {
                for left in (0..cols).step_by(windows.side) {
                    let start = order.len() * unit;
                    for row in top..rows.min(top + windows.side) {
                        let own = left..cols.min(left + windows.side);
                        order.extend(own.map(|col| (frame * n + row * cols + col) as u32));
                    }
                    ranges.push(start..order.len() * unit);
                }
            }
        }
        Self {
            order,
            frames,
            windows: Some((ranges, windows.full_layers.clone())),
        }
    }

    fn segments(&self, layer_idx: usize) -> &[Range<usize>] {
        match &self.windows {
            Some((windows, full)) if !full.contains(&layer_idx) => windows,
            _ => &self.frames,
        }
    }

    /// Values of patches, in the order of the layers.
    fn in_order<T: Copy>(&self, patches: &[T], merge: usize) -> Vec<T> {
        let unit = merge * merge;
        let tokens = self.order.iter().map(|&token| token as usize * unit);
        tokens
            .flat_map(|start| patches[start..start + unit].iter().copied())
            .collect()
    }

    /// Rows of patches, brought into the order of the layers.
    fn permute(&self, x: &Tensor, merge: usize) -> Result<Tensor> {
        if self.windows.is_none() {
            return Ok(x.clone());
        }
        let (n, width) = x.dims2()?;
        let order = Tensor::from_slice(&self.order, self.order.len(), x.device())?;
        let tokens = x.reshape(((), merge * merge * width))?;
        Ok(tokens.index_select(&order, 0)?.reshape((n, width))?)
    }

    /// Rows of tokens, brought back into the order of the image.
    fn restore(&self, x: &Tensor) -> Result<Tensor> {
        if self.windows.is_none() {
            return Ok(x.clone());
        }
        let mut back = vec![0u32; self.order.len()];
        let places = self.order.iter().zip(0..);
        places.for_each(|(&token, place)| back[token as usize] = place);
        let back = Tensor::from_vec(back, self.order.len(), x.device())?;
        Ok(x.index_select(&back, 0)?)
    }
}

/// The learned positions of every patch: the square table resampled to the grid, corner on corner.
fn resampled(table: &Tensor, grid_thw: [usize; 3], merge: usize) -> Result<Tensor> {
    let side = table.dim(0)?.isqrt();
    let [_, h, w] = grid_thw;
    let taps = |at: u32, n: usize| {
        let source = at as f32 * (side - 1) as f32 / (n - 1).max(1) as f32;
        let floor = source.floor();
        let share = source - floor;
        let first = (floor as usize).min(side - 1);
        [(first, 1.0 - share), ((first + 1).min(side - 1), share)]
    };
    let places = patch_positions(grid_thw, merge);
    let corner = |of_rows: usize, of_cols: usize| -> Result<Tensor> {
        let both = places.iter().map(|&(row, col)| {
            let (row, row_share) = taps(row, h)[of_rows];
            let (col, col_share) = taps(col, w)[of_cols];
            ((row * side + col) as u32, row_share * col_share)
        });
        let (rows, shares): (Vec<u32>, Vec<f32>) = both.unzip();
        let n = rows.len();
        let rows = Tensor::from_vec(rows, n, table.device())?;
        let shares = Tensor::from_vec(shares, (n, 1), table.device())?;
        Ok(table.index_select(&rows, 0)?.broadcast_mul(&shares)?)
    };
    let upper = (corner(0, 0)? + corner(0, 1)?)?;
    Ok((upper + (corner(1, 0)? + corner(1, 1)?)?)?)
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
