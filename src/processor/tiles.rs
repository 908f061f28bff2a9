//! Cutting images into tiles, and tiles into patches.

use crate::processor::image::RgbImage;
use crate::processor::settings::{CHANNELS, Size, ValueTable};
use crate::{Error, Matrix, Result};

/// Values of one image's patches, 8 GiB of them.
const MAX_VALUES: usize = 1 << 31;

/// The part of `image` that begins `left` pixels from the left and `top` from above; what is beyond
/// its edges is black.
pub fn crop(image: &RgbImage, left: isize, top: isize, size: Size) -> RgbImage {
    let mut data = vec![0; size.height * size.width * CHANNELS];
    let from = left.clamp(0, image.width as isize);
    let to = (left + size.width as isize).clamp(from, image.width as isize);
    for (y, row) in (top..).zip(data.chunks_exact_mut(size.width * CHANNELS)) {
        if !(0..image.height as isize).contains(&y) {
            continue;
        }
        let start = (y as usize * image.width + from as usize) * CHANNELS;
        let n = (to - from) as usize * CHANNELS;
        let into = (from - left) as usize * CHANNELS;
        row[into..into + n].copy_from_slice(&image.data[start..start + n]);
    }
    RgbImage {
        width: size.width,
        height: size.height,
        data,
    }
}

/// `image` in the middle of a canvas of `size` in one colour.
pub fn on_canvas(image: &RgbImage, size: Size, colour: [u8; CHANNELS]) -> RgbImage {
    let mut data = colour.repeat(size.height * size.width);
    let left = size.width.saturating_sub(image.width) / 2;
    let top = size.height.saturating_sub(image.height) / 2;
    let n = image.width.min(size.width) * CHANNELS;
    for (y, row) in image.data.chunks_exact(image.width * CHANNELS).enumerate() {
        let start = ((top + y) * size.width + left) * CHANNELS;
        if let Some(place) = data.get_mut(start..start + n) {
            place.copy_from_slice(&row[..n]);
        }
    }
    RgbImage {
        width: size.width,
        height: size.height,
        data,
    }
}

/// `image` cut into tiles of `side`², row by row; its sides are multiples of it.
pub fn cut(image: &RgbImage, side: usize) -> Vec<RgbImage> {
    let size = Size {
        height: side,
        width: side,
    };
    let places =
        (0..image.height / side).flat_map(|r| (0..image.width / side).map(move |c| (r, c)));
    places
        .map(|(row, col)| crop(image, (col * side) as isize, (row * side) as isize, size))
        .collect()
}

/// The patches of tiles of one size, `[n_tiles · rows · cols, 3 · patch²]`: channel, row, column
/// within a patch; patches row by row, tile after tile. The rest of a side that no patch fills is
/// left out, as a convolution does.
///
/// # Errors
/// [`Error::Invalid`] if there are more values than 2³¹.
pub fn patches(tiles: &[RgbImage], patch: usize, values: &ValueTable) -> Result<Matrix> {
    let (rows, cols) = grid_of(tiles, patch);
    let n_patches = tiles.len() * rows * cols;
    let width = CHANNELS * patch * patch;
    let n_values = n_patches.checked_mul(width);
    let Some(n_values) = n_values.filter(|n| *n <= MAX_VALUES) else {
        return Err(Error::Invalid {
            what: format!("an image in {} tiles", tiles.len()),
            why: format!("its patches are more than {MAX_VALUES} values"),
        });
    };
    let table = values.channels();
    let mut data = Vec::with_capacity(n_values);
    for tile in tiles {
        for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
            for (channel, values) in table.iter().enumerate() {
                for y in row * patch..(row + 1) * patch {
                    let start = (y * tile.width + col * patch) * CHANNELS;
                    let pixels = tile.data[start..start + patch * CHANNELS].chunks_exact(CHANNELS);
                    data.extend(pixels.map(|p| values[usize::from(p[channel])]));
                }
            }
        }
    }
    Matrix::from_vec("image patches", n_patches, width, data)
}

/// Rows and columns of patches of a tile.
pub fn grid_of(tiles: &[RgbImage], patch: usize) -> (usize, usize) {
    tiles.first().map_or((0, 0), |tile| {
        (tile.height / patch.max(1), tile.width / patch.max(1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::image::lcg_image;

    fn size(height: usize, width: usize) -> Size {
        Size { height, width }
    }

    #[test]
    fn a_crop_beyond_the_edge_is_black_there() {
        let image = lcg_image(3, 2);
        let whole = crop(&image, 0, 0, size(2, 3));
        assert_eq!(whole, image);
        let moved = crop(&image, -1, 1, size(2, 3));
        assert_eq!(moved.data[..3], [0; 3]);
        assert_eq!(moved.data[3..9], image.data[9..15]);
        assert_eq!(moved.data[9..], [0; 9]);
    }

    #[test]
    fn a_canvas_has_the_image_in_its_middle() {
        let image = lcg_image(2, 1);
        let canvas = on_canvas(&image, size(2, 2), [7, 8, 9]);
        assert_eq!(canvas.data[..6], image.data[..]);
        assert_eq!(canvas.data[6..], [7, 8, 9, 7, 8, 9]);
    }

    #[test]
    fn tiles_are_cut_row_by_row() {
        let image = lcg_image(4, 2);
        let tiles = cut(&image, 2);
        assert_eq!(tiles.len(), 2);
        assert_eq!(tiles[1].data[..6], image.data[6..12]);
    }
}
