//! Rows brought back to unit gain.
//!
//! The weight of least squared error is a shrunken one: its error is at right angles to itself, so
//! its output has less energy than the original's and points the same way in all tokens, layer
//! after layer. Grids that cut their range shrink more. A row whose scales are multiplied by
//! γ = (w H wᵀ) / (q H wᵀ) has an output whose projection on the original's is the original: it errs
//! more in the square and no more in the mean.
//!
//! Source: ours.

use super::loss::dot;
use super::symmetric::{add_outside, corner};
use crate::{Matrix, QuantizedWeight, Result};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

/// Rows handled by one thread.
const CHUNK_ROWS: usize = 128;

/// Columns of H multiplied at once.
const BAND: usize = 256;

/// A gain beyond this factor, either way, is one of a row that is lost; it stays as it is.
const MAX_GAIN: f64 = 2.0;

/// `weight` with every row's scales multiplied by γ.
///
/// Shapes: `w` and `weight` `[out, in]`, `hessian_lower [in, in]` read on and below the diagonal.
/// # Errors
/// [`Error::NotFinite`](crate::Error::NotFinite) if a scale overflows its storage type.
pub(super) fn to_unit_gain(
    module: &str,
    w: &Matrix,
    weight: &QuantizedWeight,
    hessian_lower: &Matrix,
) -> Result<QuantizedWeight> {
    let starts: Vec<usize> = (0..w.rows()).step_by(CHUNK_ROWS).collect();
    let gains = starts.into_par_iter().flat_map_iter(|start| {
        let rows = start..w.rows().min(start + CHUNK_ROWS);
        gains(w, weight, hessian_lower, rows)
    });
    let gains: Vec<f64> = gains.collect();
    let dtype = weight.scheme().scale_dtype();
    let (rows, n_groups) = (weight.rows(), weight.n_groups());
    let scale = |row: usize, group: usize| {
        let scale = weight.scales()[(row, group)];
        dtype.round((f64::from(scale) * gains[row]) as f32)
    };
    QuantizedWeight::new(
        module,
        weight.scheme(),
        [rows, weight.cols()],
        weight.codes().to_vec(),
        Matrix::from_fn(rows, n_groups, scale),
        weight.zero_points().to_vec(),
    )
}

/// γ of some rows.
fn gains(w: &Matrix, weight: &QuantizedWeight, hessian: &Matrix, rows: Range<usize>) -> Vec<f64> {
    let n = w.cols();
    let q = weight.dequantize_rows(rows.clone());
    let own = &w.data()[rows.start * n..rows.end * n];
    let view = MatRef::from_row_major_slice(own, rows.len(), n);
    let mut product = vec![0.0f32; own.len()];
    let mut product_view = MatMut::from_row_major_slice_mut(&mut product, rows.len(), n);
    for start in (0..n).step_by(BAND) {
        let range = start..n.min(start + BAND);
        let band = view.subcols(start, range.len());
        add_outside(hessian, band, range.clone(), 1.0, product_view.as_mut());
        let own = product_view.as_mut().subcols_mut(start, range.len());
        let corner = corner(hessian, start, range.len());
        matmul(own, Accum::Add, band, corner.as_faer(), 1.0, Par::Seq);
    }
    let rows = own.chunks_exact(n).zip(product.chunks_exact(n)).zip(0..);
    let gain = |((w, product), i)| {
        let gain = dot(w, product) / dot(q.row(i), product);
        match gain > 1.0 / MAX_GAIN && gain < MAX_GAIN {
            true => gain,
            false => 1.0,
        }
    };
    rows.map(gain).collect()
}
