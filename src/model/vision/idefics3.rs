//! The vision side of Idefics3 and SmolVLM: SigLIP over square tiles, whose patches look up their
//! learned positions by fractions of the tile's side, and a connector that lays each square of
//! neighbouring patches side by side and maps it to the decoder's width.
//!
//! Tiles are always full here, so no patch is masked.
//!
//! Source: arXiv:2408.12637 §3; transformers `Idefics3VisionTransformer`, `Idefics3Connector` and
//! their copies in SmolVLM.

use super::vit::{Vit, VitTower};
use super::{ImageFeatures, VisionConfig, VisionOutput, VisionSize, VisionTower};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::device::ModelDevice;
use crate::model::linear::Linear;
use crate::processor::VisionInput;
use candle_core::Tensor;

/// The tower and the connector as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Idefics3Vision {
    /// The tower.
    pub vit: Vit,
    /// Where the checkpoint keeps the connector's linear.
    pub projection: String,
    /// Patches on the side of a square that becomes one token; divides the side of a tile.
    pub scale_factor: usize,
    /// Width of the decoder.
    pub out_dim: usize,
}

impl Idefics3Vision {
    /// Shape of the connector's weight.
    fn projection_shape(&self) -> [usize; 2] {
        let n_joined = self.scale_factor * self.scale_factor;
        [self.out_dim, n_joined * self.vit.width]
    }
}

impl VisionConfig for Idefics3Vision {
    fn size(&self) -> VisionSize {
        self.vit.size(self.scale_factor * self.scale_factor)
    }

    fn outputs(&self) -> Vec<VisionOutput> {
        vec![VisionOutput::Linear(self.projection.clone())]
    }

    fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.vit.check_shapes(checkpoint)?;
        let weight = format!("{}.weight", self.projection);
        checkpoint.require_shape(&weight, &self.projection_shape())?;
        Ok(())
    }

    fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<Box<dyn VisionTower>> {
        let rows = position_rows(self.vit.tile_side);
        let shape = self.projection_shape();
        Ok(Box::new(Idefics3Tower {
            vit: self.vit.load(checkpoint, device)?.with_positions(&rows)?,
            projection: Linear::load(checkpoint, &self.projection, shape, false, device)?,
            tile_side: self.vit.tile_side,
            scale_factor: self.scale_factor,
        }))
    }
}

/// The weights of tower and connector.
#[derive(Debug)]
struct Idefics3Tower {
    vit: VitTower,
    projection: Linear,
    tile_side: usize,
    scale_factor: usize,
}

impl VisionTower for Idefics3Tower {
    fn forward(&self, image: &VisionInput) -> Result<ImageFeatures> {
        let patches = self.vit.forward(image)?;
        let joined = joined_squares(&patches, self.tile_side, self.scale_factor)?;
        Ok(ImageFeatures {
            embeddings: self.projection.forward(&joined)?,
            deepstack: Vec::new(),
        })
    }
}

/// Tiles `[n_tiles, tile_side², width]` as one row for each `side` × `side` square of patches, row
/// by row: `[n_tiles · (tile_side / side)², side² · width]`.
fn joined_squares(tiles: &Tensor, tile_side: usize, side: usize) -> Result<Tensor> {
    let (n_tiles, _, width) = tiles.dims3()?;
    let per_side = tile_side / side;
    let bands = tiles.reshape((n_tiles * per_side, side, per_side, side * width))?;
    let squares = bands.transpose(1, 2)?.contiguous()?;
    Ok(squares.reshape((n_tiles * per_side * per_side, side * side * width))?)
}

/// For each patch of a full tile, `side` patches wide and high, its row in the table of positions.
fn position_rows(side: usize) -> Vec<u32> {
    let places = places_on_axis(side);
    let of_row = |&row: &u32| {
        let cols = places.iter();
        cols.map(move |&col| row * side as u32 + col)
    };
    places.iter().flat_map(of_row).collect()
}

/// The place on one axis of the table that each of `side` patches looks up: the number of bounds
/// that do not exceed the patch's fraction of the side, both in f32.
///
/// In exact numbers the i-th patch takes the i-th place. Rounded, a fraction may fall just short of
/// its bound, and the patch takes the place before; of sides up to 32 patches those of 19, 25, 29
/// and 31 have such patches.
fn places_on_axis(side: usize) -> Vec<u32> {
    let bounds = bounds(side);
    let step = 1.0 / side as f32;
    let place = |i: usize| {
        let fraction = i as f32 * step;
        bounds.iter().filter(|&&bound| bound <= fraction).count() as u32
    };
    (0..side).map(place).collect()
}

/// The multiples of `1 / side` below 1 as `torch.arange` counts them on a CPU: in f64, but in
/// pairs of vectors of eight, the first of each of which is rounded to f32 before the other seven
/// are counted on from it.
fn bounds(side: usize) -> Vec<f32> {
    const VECTOR: usize = 8;
    let step = 1.0 / side as f64;
    let n_bounds = ((1.0 - step) / step).ceil() as usize;
    let n_in_vectors = n_bounds - n_bounds % (2 * VECTOR);
    let counted = |from: f64, n: usize| from + step * n as f64;
    let bound = |i: usize| match i < n_in_vectors {
        true => {
            let first = counted(step, i - i % VECTOR) as f32;
            counted(f64::from(first), i % VECTOR) as f32
        }
        false => counted(step, i) as f32,
    };
    (0..n_bounds).map(bound).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn squares_are_joined_row_by_row() {
        // Two tiles of 4 × 4 patches with one channel, numbered.
        let values: Vec<f32> = (0u8..32).map(f32::from).collect();
        let tiles = Tensor::from_vec(values, (2, 16, 1), &Device::Cpu).unwrap();
        let joined = joined_squares(&tiles, 4, 2).unwrap();
        let rows: Vec<Vec<f32>> = joined.to_vec2().unwrap();
        assert_eq!(rows.len(), 8);
        assert_eq!(rows[0], [0.0, 1.0, 4.0, 5.0]);
        assert_eq!(rows[1], [2.0, 3.0, 6.0, 7.0]);
        assert_eq!(rows[2], [8.0, 9.0, 12.0, 13.0]);
        assert_eq!(rows[7], [26.0, 27.0, 30.0, 31.0]);
    }

    /// What transformers 5.23 looks up with torch 2.15 on an x86 processor.
    #[test]
    fn fractions_that_fall_short_of_their_bound_take_the_place_before() {
        for side in [1, 2, 4, 14, 16, 24, 26, 27, 32] {
            let expected: Vec<u32> = (0..side as u32).collect();
            assert_eq!(places_on_axis(side), expected);
        }
        for (side, short) in [
            (19, &[12][..]),
            (25, &[5, 9, 10, 11, 12, 13, 15, 18, 20, 23]),
            (29, &[3, 6, 24]),
            (31, &[17, 21, 25, 29]),
            (54, &[44, 45]),
        ] {
            let places = places_on_axis(side);
            let taken = (0..side as u32).map(|i| i - u32::from(short.contains(&i)));
            assert_eq!(places, taken.collect::<Vec<_>>(), "{side}");
        }
        assert_eq!(position_rows(2), [0, 1, 2, 3]);
    }
}
