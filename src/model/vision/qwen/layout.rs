//! Where the patches of an image stand: their order through the layers, which of them see each other,
//! and the learned positions of a tower that has any.

use super::QwenVision;
use crate::Result;
use candle_core::Tensor;
use std::ops::Range;

/// The order in which patches go through the layers, and which of them see each other.
pub(super) struct Layout {
    /// For each token, in the order of the layers, its place in the order of the image.
    order: Vec<u32>,
    /// Patches of a frame.
    frames: Vec<Range<usize>>,
    /// Patches of a window, and the layers that see whole frames nevertheless.
    windows: Option<(Vec<Range<usize>>, Vec<usize>)>,
}

impl Layout {
    pub(super) fn new(config: &QwenVision, [t, h, w]: [usize; 3]) -> Self {
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

    pub(super) fn segments(&self, layer_idx: usize) -> &[Range<usize>] {
        match &self.windows {
            Some((windows, full)) if !full.contains(&layer_idx) => windows,
            _ => &self.frames,
        }
    }

    /// Values of patches, in the order of the layers.
    pub(super) fn in_order<T: Copy>(&self, patches: &[T], merge: usize) -> Vec<T> {
        let unit = merge * merge;
        let tokens = self.order.iter().map(|&token| token as usize * unit);
        tokens
            .flat_map(|start| patches[start..start + unit].iter().copied())
            .collect()
    }

    /// Rows of patches, brought into the order of the layers.
    pub(super) fn permute(&self, x: &Tensor, merge: usize) -> Result<Tensor> {
        if self.windows.is_none() {
            return Ok(x.clone());
        }
        let (n, width) = x.dims2()?;
        let order = Tensor::from_slice(&self.order, self.order.len(), x.device())?;
        let tokens = x.reshape(((), merge * merge * width))?;
        Ok(tokens.index_select(&order, 0)?.reshape((n, width))?)
    }

    /// Rows of tokens, brought back into the order of the image.
    pub(super) fn restore(&self, x: &Tensor) -> Result<Tensor> {
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
pub(super) fn resampled(table: &Tensor, grid_thw: [usize; 3], merge: usize) -> Result<Tensor> {
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
pub(super) fn patch_positions([t, h, w]: [usize; 3], merge: usize) -> Vec<(u32, u32)> {
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
