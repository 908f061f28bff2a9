//! What joins a vision transformer to the decoder in the LLaVA families: two linears on every feature
//! of one of the tower's layers; where an image comes in tiles, their features are put side by side
//! as the image was, its margins are left out, and every row ends with a learned token.
//!
//! Source: arXiv:2310.03744 (LLaVA-1.5), arXiv:2408.03326 (OneVision); transformers
//! `LlavaMultiModalProjector`, `LlavaNextModel.pack_image_features`.

use super::vit::{Vit, VitTower};
use super::{ImageFeatures, VisionConfig, VisionOutput, VisionSize, VisionTower};
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use crate::model::linear::{Linear, load_tensor};
use crate::processor::anyres::{Packed, Packing};
use crate::processor::settings::Size;
use crate::processor::{Tiling, VisionInput};
use crate::{Error, Result};
use candle_core::Tensor;

/// Tower and projector as data.
#[derive(Clone, Debug, PartialEq)]
pub struct LlavaVision {
    /// The tower, its depth that of the layer whose output is taken.
    pub vit: Vit,
    /// Whether the class token is left out of the features.
    pub drops_class: bool,
    /// Where the checkpoint keeps the projector.
    pub projector: String,
    /// Whether its linears have a bias.
    pub has_bias: bool,
    /// Width of the decoder.
    pub out_dim: usize,
    /// How tiles are put together, with the name of the token at the end of a row.
    pub tiles: Option<TileFeatures>,
}

/// How the features of tiles are put together.
#[derive(Clone, Debug, PartialEq)]
pub struct TileFeatures {
    /// Which of them.
    pub packing: Packing,
    /// The learned token at the end of a row.
    pub newline: String,
}

impl VisionConfig for LlavaVision {
    fn size(&self) -> VisionSize {
        self.vit.size(1)
    }

    fn outputs(&self) -> Vec<VisionOutput> {
        let last = VisionOutput::Linear(format!("{}.linear_2", self.projector));
        let newline = self.tiles.as_ref();
        let newline = newline.map(|tiles| VisionOutput::Row(tiles.newline.clone()));
        std::iter::once(last).chain(newline).collect()
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.vit.check_shapes(checkpoint)?;
        let first = format!("{}.linear_1.weight", self.projector);
        checkpoint.require_shape(&first, &[self.out_dim, self.vit.width])?;
        if let Some(tiles) = &self.tiles {
            checkpoint.require_shape(&tiles.newline, &[self.out_dim])?;
        }
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        let linear = |name: &str, inp: usize| {
            let name = format!("{}.{name}", self.projector);
            Linear::load(
                checkpoint,
                &name,
                [self.out_dim, inp],
                self.has_bias,
                device,
            )
        };
        let newline = self.tiles.as_ref().map(|tiles| {
            let row = load_tensor(checkpoint, &tiles.newline, &[self.out_dim], device)?;
            Ok::<_, Error>(row.reshape((1, self.out_dim))?)
        });
        Ok(Box::new(LlavaTower {
            vit: self.vit.load(checkpoint, device)?,
            first: linear("linear_1", self.vit.width)?,
            second: linear("linear_2", self.out_dim)?,
            newline: newline.transpose()?,
            config: self.clone(),
        }))
    }
}

#[derive(Clone, Debug)]
struct LlavaTower {
    config: LlavaVision,
    vit: VitTower,
    first: Linear,
    second: Linear,
    /// `[1, hidden]`.
    newline: Option<Tensor>,
}

impl VisionTower for LlavaTower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let features = self.vit.forward(image)?;
        let n_class = match self.config.drops_class {
            true => self.config.vit.n_class_tokens(),
            false => 0,
        };
        let (n_tiles, n_tokens, width) = features.dims3()?;
        let n_kept = n_tokens - n_class;
        let features = features.narrow(1, n_class, n_kept)?.contiguous()?;
        let features = features.reshape((n_tiles * n_kept, width))?;
        let hidden = self
            .second
            .forward(&self.first.forward(&features)?.gelu_erf()?)?;
        let tiles = hidden.reshape((n_tiles, n_kept, self.config.out_dim))?;
        Ok(ImageFeatures {
            embeddings: self.packed(&tiles, image.tiling.as_ref())?,
            deepstack: Vec::new(),
        })
    }
}

impl LlavaTower {
    /// `tiles [n_tiles, n_tokens, hidden]` as they stand in the prompt.
    fn packed(&self, tiles: &Tensor, tiling: Option<&Tiling>) -> Result<Tensor> {
        let whole = tiles.get(0)?;
        match (&self.config.tiles, &self.newline, tiling) {
            (Some(features), Some(newline), Some(tiling)) => {
                let packed = features.packing.of(tiling);
                let rest = tiles.narrow(0, 1, tiles.dim(0)? - 1)?;
                let map = side_by_side(&rest, tiling, features.packing.side)?;
                let map = shrunk(&kept(&map, &packed)?, packed.shrunk)?;
                Ok(Tensor::cat(&[&whole, &with_ends(&map, newline)?], 0)?)
            }
            (Some(_), Some(newline), None) => Ok(Tensor::cat(&[&whole, newline], 0)?),
            _ => Ok(whole),
        }
    }
}

/// `tiles [rows · cols, side², hidden]` → `[rows · side, cols · side, hidden]`.
fn side_by_side(tiles: &Tensor, tiling: &Tiling, side: usize) -> Result<Tensor> {
    let hidden = tiles.dim(2)?;
    let map = tiles
        .contiguous()?
        .reshape(vec![tiling.rows, tiling.cols, side, side, hidden])?;
    let map = map.permute(vec![0, 2, 1, 3, 4])?.contiguous()?;
    Ok(map.reshape((tiling.rows * side, tiling.cols * side, hidden))?)
}

/// The features between the margins.
fn kept(map: &Tensor, packed: &Packed) -> Result<Tensor> {
    let rows = map.narrow(0, packed.top, packed.kept.height)?;
    Ok(rows
        .narrow(1, packed.left, packed.kept.width)?
        .contiguous()?)
}

/// `map [rows, cols, hidden]` resampled to `size`: bilinear, half-pixel centres.
fn shrunk(map: &Tensor, size: Size) -> Result<Tensor> {
    let (rows, cols, hidden) = map.dims3()?;
    if (rows, cols) == (size.height, size.width) {
        return Ok(map.clone());
    }
    let device = map.device();
    let axis = |from: usize, to: usize| -> Result<Tensor> {
        let mut weights = vec![0f32; to * from];
        for (at, row) in weights.chunks_exact_mut(from).enumerate() {
            let source = ((at as f32 + 0.5) * (from as f32 / to as f32) - 0.5).max(0.0);
            let first = (source as usize).min(from - 1);
            let share = source - first as f32;
            row[first] += 1.0 - share;
            row[(first + 1).min(from - 1)] += share;
        }
        Ok(Tensor::from_vec(weights, (to, from), device)?)
    };
    let by_rows = axis(rows, size.height)?.matmul(&map.reshape((rows, cols * hidden))?)?;
    let by_rows = by_rows.reshape((size.height, cols, hidden))?;
    let weights = axis(cols, size.width)?.unsqueeze(0)?;
    let weights = weights.broadcast_as((size.height, size.width, cols))?;
    Ok(weights.contiguous()?.matmul(&by_rows)?)
}

/// `map [rows, cols, hidden]` row by row, each followed by the token that ends it.
fn with_ends(map: &Tensor, newline: &Tensor) -> Result<Tensor> {
    let (rows, cols, hidden) = map.dims3()?;
    let ends = newline.unsqueeze(0)?.broadcast_as((rows, 1, hidden))?;
    let map = Tensor::cat(&[map, &ends.contiguous()?], 1)?;
    Ok(map.reshape((rows * (cols + 1), hidden))?)
}
