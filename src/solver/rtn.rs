//! Rounding to nearest: every weight goes to the closest value of its group's grid, with no look
//! at calibration data. The baseline, and what solvers fall back on for columns never excited.

use super::grid::{Fitting, Grid, Grids};
use super::{Clip, ClipNorm, check_weight};
use crate::plan::Scheme;
use crate::{Matrix, QuantizedWeight, Result};
use rayon::prelude::*;

/// `w` rounded to nearest.
///
/// Shapes: `w [out, in]`.
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if the group size does not divide the columns,
/// [`Error::NotFinite`](crate::Error::NotFinite) for NaN or infinity among the weights, or a scale
/// too large for its storage type.
pub fn rtn(module: &str, w: &Matrix, scheme: Scheme, clip: Clip) -> Result<QuantizedWeight> {
    let group_len = scheme.group_len(module, w.cols())?;
    check_weight(module, w)?;
    let fitting = Fitting {
        scheme,
        clip,
        clip_norm: ClipNorm::default(),
        column_weights: None,
    };
    let grids = Grids::fit(module, w, group_len, fitting)?;
    let mut codes = vec![0; w.data().len()];
    let groups = codes.par_chunks_mut(group_len);
    let groups = groups.zip(w.data().par_chunks(group_len)).enumerate();
    groups.for_each(|(index, (codes, weights))| {
        let grid = Grid {
            scale: grids.scales.data()[index],
            zero_point: grids.zero_points[index],
        };
        for (code, weight) in codes.iter_mut().zip(weights) {
            *code = grid.code(*weight, scheme.max_code());
        }
    });
    QuantizedWeight::new(
        module,
        scheme,
        [w.rows(), w.cols()],
        codes,
        grids.scales,
        grids.zero_points,
    )
}
