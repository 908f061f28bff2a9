//! Images of any resolution in tiles (LLaVA-NeXT, LLaVA-OneVision): which grid of tiles an image is
//! brought to, and which of the features of that grid are of the image and not of its margins.
//!
//! Source: LLaVA-NeXT (2024-01), arXiv:2408.03326 §3.2; transformers `select_best_resolution`,
//! `unpad_image`, `LlavaOnevisionProcessor`.

use crate::processor::Tiling;
use crate::processor::settings::Size;

/// The one of `candidates` that keeps most of an image of `size`, and of those the one that wastes
/// least; `None` if there are none.
pub fn best_resolution(size: Size, candidates: &[Size]) -> Option<Size> {
    let (height, width) = (size.height as f64, size.width as f64);
    let mut best: Option<(usize, usize, Size)> = None;
    for &candidate in candidates {
        let scale = (candidate.width as f64 / width).min(candidate.height as f64 / height);
        let kept = (width * scale) as usize * (height * scale) as usize;
        let kept = kept.min(size.width * size.height);
        let wasted = candidate.width * candidate.height - kept;
        // Nothing kept is no candidate.
        let is_better = match best {
            None => kept > 0,
            Some((most, least, _)) => kept > most || (kept == most && wasted < least),
        };
        if is_better {
            best = Some((kept, wasted, candidate));
        }
    }
    best.map(|(_, _, size)| size)
}

/// The size of an image within `target`, its aspect ratio kept.
pub fn size_within(size: Size, target: Size) -> Size {
    let scale_w = target.width as f64 / size.width as f64;
    let scale_h = target.height as f64 / size.height as f64;
    if scale_w < scale_h {
        let height = (size.height as f64 * scale_w).ceil() as usize;
        Size {
            height: height.min(target.height),
            width: target.width,
        }
    } else {
        let width = (size.width as f64 * scale_h).ceil() as usize;
        Size {
            height: target.height,
            width: width.min(target.width),
        }
    }
}

/// How the features of an image's tiles are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Features on a side of a tile.
    pub side: usize,
    /// Tiles' worth of features above which they are shrunk.
    pub max_tiles: Option<usize>,
}

/// What is left of a grid of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Rows left out above and below.
    pub top: usize,
    /// Columns left out on either side.
    pub left: usize,
    /// What is left between them.
    pub kept: Size,
    /// What that is shrunk to.
    pub shrunk: Size,
}

impl Packed {
    /// Tokens, with one at the end of each row.
    pub fn n_tokens(&self) -> usize {
        self.shrunk.height * (self.shrunk.width + 1)
    }
}

impl Packing {
    /// What is left of the features of an image's tiles, the whole view aside.
    pub fn of(&self, tiling: &Tiling) -> Packed {
        let (rows, cols) = (tiling.rows * self.side, tiling.cols * self.side);
        let aspect = tiling.width as f64 / tiling.height as f64;
        let (mut top, mut left) = (0, 0);
        if aspect > cols as f64 / rows as f64 {
            let scale = cols as f64 / tiling.width as f64;
            let kept = rounded_down(tiling.height as f64 * scale);
            top = rows.saturating_sub(kept) / 2;
        } else {
            let scale = rows as f64 / tiling.height as f64;
            let kept = rounded_down(tiling.width as f64 * scale);
            left = cols.saturating_sub(kept) / 2;
        }
        let kept = Size {
            height: rows - 2 * top,
            width: cols - 2 * left,
        };
        Packed {
            top,
            left,
            kept,
            shrunk: self.shrunk(kept),
        }
    }

    fn shrunk(&self, kept: Size) -> Size {
        let Some(max_tiles) = self.max_tiles else {
            return kept;
        };
        let limit = (max_tiles * self.side * self.side) as f64;
        let ratio = ((kept.height * kept.width) as f64 / limit).sqrt();
        if ratio <= 1.1 {
            return kept;
        }
        Size {
            height: (kept.height as f64 / ratio).floor() as usize,
            width: (kept.width as f64 / ratio).floor() as usize,
        }
    }
}

/// The whole part of a number of pixels, after seven decimals: a rounding error below a whole number
/// does not lose one.
fn rounded_down(x: f64) -> usize {
    ((x * 1e7).round_ties_even() / 1e7) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize) -> Size {
        Size { height, width }
    }

    #[test]
    fn the_resolution_that_keeps_most_and_wastes_least() {
        let candidates = [size(336, 672), size(672, 336), size(672, 672)];
        let best = |h, w| best_resolution(size(h, w), &candidates);
        assert_eq!(best(100, 300), Some(size(336, 672)));
        assert_eq!(best(900, 300), Some(size(672, 336)));
        assert_eq!(best(1000, 1000), Some(size(672, 672)));
        assert_eq!(best_resolution(size(10, 10), &[]), None);
    }

    #[test]
    fn margins_are_left_out() {
        let packing = Packing {
            side: 24,
            max_tiles: None,
        };
        let packed = packing.of(&Tiling {
            rows: 1,
            cols: 2,
            height: 100,
            width: 300,
        });
        assert_eq!((packed.top, packed.left), (4, 0));
        assert_eq!(packed.kept, size(16, 48));
        assert_eq!(packed.n_tokens(), 16 * 49);
    }

    #[test]
    fn too_many_features_are_shrunk() {
        let packing = Packing {
            side: 27,
            max_tiles: Some(9),
        };
        let packed = packing.of(&Tiling {
            rows: 6,
            cols: 6,
            height: 2304,
            width: 2304,
        });
        // 162 features on a side, of which 81 may be.
        assert_eq!(packed.kept, size(162, 162));
        assert_eq!(packed.shrunk, size(81, 81));
    }
}
