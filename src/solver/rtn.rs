//! Round to nearest: no calibration, the baseline of everything.

use super::{Clip, Grids, QuantizedWeight, assemble, check_weight};
use crate::plan::Scheme;
use crate::{Matrix, Result};
use rayon::prelude::*;

/// `w [out, in]` with every weight on the nearest point of its group's grid.
///
/// # Errors
/// [`crate::Error::Invalid`] if the group size does not divide the columns,
/// [`crate::Error::NotFinite`] for NaN or infinity; both name `module`.
pub fn rtn(module: &str, w: &Matrix, scheme: Scheme, clip: Clip) -> Result<QuantizedWeight> {
    let group_len = scheme.group_len(module, w.cols())?;
    check_weight(module, w)?;
    let grids = Grids::fit(w, scheme, clip, group_len);
    let grids = grids.rows(0..w.rows());
    let codes: Vec<u8> = (w.data().par_chunks(group_len).zip(grids))
        .flat_map_iter(|(group, grid)| group.iter().map(|weight| grid.code(*weight)))
        .collect();
    assemble(module, scheme, w.rows(), codes, grids)
}
