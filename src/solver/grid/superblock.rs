//! Symmetric grids whose scales are whole multiples of one half-precision number in each 256
//! columns.
//!
//! The scales that were fitted one by one are the wish; of a few numbers whose largest multiple
//! meets the largest wish, the one is taken under which rounding to nearest errs least, with the
//! better of the two neighbouring multiples for each group. This happens before any column is
//! rounded, so what the solver makes up for are the errors of the very grid that is written.
//!
//! Source: the idea of a shared number is llama.cpp's Q2_K and Q3_K; the fit is ours.

use super::{Fitting, Grid};
use crate::plan::super_block::{GROUP, N_GROUPS, SUPER, max_multiple};
use crate::{Error, Result};
use half::f16;

/// Numbers tried: the largest wish divided by the largest multiple, by one less, and so on.
const N_UNITS: u8 = 8;

/// Puts the grids of one row of `weights` `[in]` on super-blocks.
///
/// # Errors
/// [`Error::Unsupported`] naming `module` for weights whose number half precision does not have.
pub(super) fn snap(
    module: &str,
    weights: &[f32],
    grids: &mut [Grid],
    fitting: Fitting<'_>,
) -> Result<()> {
    let blocks = weights
        .chunks_exact(SUPER)
        .zip(grids.chunks_exact_mut(N_GROUPS));
    for (index, (weights, grids)) in blocks.enumerate() {
        let column_weights = fitting.column_weights.map(|c| &c[index * SUPER..][..SUPER]);
        let best = best_scales(weights, grids, fitting, column_weights);
        let scales = best.ok_or_else(|| Error::Unsupported {
            what: format!("{module}: scale_dtype superblock for weights so small or so large"),
        })?;
        for (grid, scale) in grids.iter_mut().zip(scales) {
            grid.scale = scale;
        }
    }
    Ok(())
}

/// The scales of least error on a grid of one number; `None` if half precision has none.
fn best_scales(
    weights: &[f32],
    grids: &[Grid],
    fitting: Fitting<'_>,
    column_weights: Option<&[f32]>,
) -> Option<[f32; N_GROUPS]> {
    let max = max_multiple(fitting.scheme.bits());
    let groups: Vec<&[f32]> = weights.chunks_exact(GROUP).collect();
    // A group of which every weight is rounded to zero has no wish.
    let has_wish = |(group, grid): (&&[f32], &Grid)| {
        let is_moved = group.iter().any(|w| w.abs() > grid.scale / 2.0);
        is_moved.then_some(grid.scale)
    };
    let wishes: Vec<Option<f32>> = groups.iter().zip(grids).map(has_wish).collect();
    let Some(largest) = wishes.iter().flatten().copied().reduce(f32::max) else {
        return Some([1.0; N_GROUPS]);
    };
    let mut best: Option<(f64, [f32; N_GROUPS])> = None;
    for top in max - N_UNITS + 1..=max {
        let unit = f16::from_f32(largest / f32::from(top));
        // Q2_K also stores twice the number.
        let is_stored = unit > f16::ZERO && f16::from_f32(2.0 * unit.to_f32()).is_finite();
        if !is_stored {
            continue;
        }
        let unit = unit.to_f32();
        let (mut total, mut scales) = (0.0, [unit; N_GROUPS]);
        for (index, scale) in scales.iter_mut().enumerate() {
            let own = column_weights.map(|c| &c[index * GROUP..][..GROUP]);
            let wish = wishes[index].unwrap_or(unit) / unit;
            let (error, found) = [wish.floor(), wish.ceil()]
                .map(|multiple| unit * multiple.clamp(1.0, max.into()))
                .map(|scale| (error(groups[index], scale, fitting, own), scale))
                .into_iter()
                .min_by(|a, b| a.0.total_cmp(&b.0))?;
            total += error;
            *scale = found;
        }
        if best.is_none_or(|(least, _)| total < least) {
            best = Some((total, scales));
        }
    }
    best.map(|(_, scales)| scales)
}

/// What rounding a group to nearest costs.
fn error(weights: &[f32], scale: f32, fitting: Fitting<'_>, column_weights: Option<&[f32]>) -> f64 {
    let max_code = fitting.scheme.max_code();
    let grid = Grid {
        scale,
        zero_point: max_code / 2 + 1,
    };
    let cost = |(column, weight): (usize, &f32)| {
        let error = f64::from(weight - scale * grid.steps(*weight, max_code));
        error * error * column_weights.map_or(1.0, |c| f64::from(c[column]))
    };
    weights.iter().enumerate().map(cost).sum()
}

#[cfg(test)]
mod tests {
    use crate::Matrix;
    use crate::plan::super_block::{common_unit, max_multiple};
    use crate::plan::{ScaleDtype, Scheme};
    use crate::solver::{Clip, rtn};
    use proptest::prelude::*;

    fn rounded(bits: u8, w: &Matrix, dtype: ScaleDtype) -> (crate::QuantizedWeight, f64) {
        let scheme = Scheme::new(bits, Some(16), true, dtype).unwrap();
        let q = rtn("m", w, scheme, Clip::Mse).unwrap();
        let back = q.dequantize();
        let pairs = w.data().iter().zip(back.data());
        let error = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
        (q, error)
    }

    proptest! {
        #[test]
        fn scales_are_multiples_and_cost_little(seed: u64, bits in 2u8..=3) {
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / 16_777_216.0 - 0.5
            };
            let w = Matrix::from_fn(2, 512, |_, _| 0.1 * next() * next());
            let (free, least) = rounded(bits, &w, ScaleDtype::F32);
            let (tied, error) = rounded(bits, &w, ScaleDtype::Superblock);
            for scales in tied.scales().data().chunks(16) {
                prop_assert!(common_unit(scales, max_multiple(bits)).is_some());
            }
            prop_assert!(free.scales().data() != tied.scales().data());
            // Scales of about equal groups are within 1/(2·15) of their wishes.
            prop_assert!(error < 1.2 * least, "{error} {least}");
        }
    }

    #[test]
    fn zeros_and_small_groups_have_grids_too() {
        let w = Matrix::from_fn(2, 256, |row, col| match (row, col) {
            (0, _) => 0.0,
            (_, 0..16) => 0.5,
            _ => 1e-30,
        });
        let (q, _) = rounded(3, &w, ScaleDtype::Superblock);
        assert!(q.dequantize().row(0).iter().all(|v| *v == 0.0));
        assert!(q.dequantize().row(1)[16..].iter().all(|v| *v == 0.0));
        for scales in q.scales().data().chunks(16) {
            assert!(common_unit(scales, 31).is_some());
        }
        let huge = Matrix::from_fn(1, 256, |_, _| 1e30);
        let scheme = Scheme::new(2, Some(16), true, ScaleDtype::Superblock).unwrap();
        assert!(rtn("layer.q", &huge, scheme, Clip::None).is_err());
    }

    #[test]
    fn other_formats_do_not_have_them() {
        let new =
            |bits, group, symmetric| Scheme::new(bits, group, symmetric, ScaleDtype::Superblock);
        for bad in [
            new(4, Some(16), true),
            new(3, Some(32), true),
            new(3, Some(16), false),
        ] {
            assert!(bad.unwrap_err().to_string().contains("superblock"));
        }
        let error = new(3, Some(16), true)
            .unwrap()
            .group_len("layer.q", 128)
            .unwrap_err();
        assert!(error.to_string().contains("layer.q"));
    }
}
