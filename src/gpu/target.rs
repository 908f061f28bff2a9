//! The weight that least squares ask for, on a GPU: the CPU's `solver/target.rs` tells what it is.

use super::array::Array;
use super::factor::Factor;
use super::kernels::{add_rows, divide_columns, order_columns, restore_columns, row_dots};
use super::products::{View, product, solve_unit};
use crate::solver::row_alpha;
use crate::{Matrix, Result};

/// C and S, and what is needed to solve with H.
#[derive(Debug)]
pub(super) struct DriftMoments {
    /// C `[in, in]`, original order; absent where S holds all.
    pub(super) cross: Option<Array<f32>>,
    /// S `[out, in]`, original order; absent where C holds all. In the CPU's memory, since of its rows
    /// only those that are solved are wanted, and each is once.
    pub(super) output_cross: Option<Matrix>,
    /// D in solving order, in units of H's mean.
    pub(super) pivots: Array<f32>,
    pub(super) mean: f64,
}

/// W + α E H⁻¹.
pub(super) struct Moved {
    /// `[out, in]`.
    pub(super) target: Array<f32>,
    /// The mean of α over rows.
    pub(super) alpha: f32,
}

/// Some rows of W.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    /// `[len, in]`.
    pub(super) w: &'a Array<f32>,
    /// The first of them in W.
    pub(super) first: usize,
    pub(super) len: usize,
}

/// W + α E H⁻¹ of some rows, α given or found on the samples held out.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn target(
    rows: Rows<'_>,
    factor: &Factor,
    drift: &DriftMoments,
    alpha: f32,
) -> Result<Moved> {
    let (gpu, n) = (&factor.gpu, factor.in_features());
    let in_whole = drift.of_rows(rows, factor)?;
    let part = factor.part.as_deref();
    let part = part.and_then(|part| Some((part, part.drift_moments()?)));
    let alphas = match part {
        Some((part, part_drift)) => held_out_alphas(rows, &in_whole, factor, (part, part_drift))?,
        None => vec![alpha; rows.len],
    };
    let correction = drift.solve(factor, &in_whole, rows.len)?;
    let mut target = Array::zeros(gpu, rows.len * n)?;
    let on_gpu = Array::of(gpu, &alphas)?;
    add_rows(&**gpu, &mut target, rows.w, &correction, &on_gpu, n)?;
    let alpha = alphas.iter().sum::<f32>() / alphas.len().max(1) as f32;
    Ok(Moved { target, alpha })
}

/// α of each row; `in_whole` is E of all samples.
fn held_out_alphas(
    rows: Rows<'_>,
    in_whole: &Array<f32>,
    factor: &Factor,
    (part, part_drift): (&Factor, &DriftMoments),
) -> Result<Vec<f32>> {
    let (gpu, n) = (&factor.gpu, factor.in_features());
    let in_part = part_drift.of_rows(rows, part)?;
    let correction = part_drift.solve(part, &in_part, rows.len)?;
    let shape = [rows.len, n];
    let of_part = row_dots(gpu, &correction, &in_part, shape)?;
    let of_whole = row_dots(gpu, &correction, in_whole, shape)?;
    let squares = row_dots(gpu, &correction, &correction, shape)?;
    let in_all = factor.quadratic_forms(&correction, rows.len)?;
    let alpha = |row: usize| {
        let in_own = of_part[row] - part.damping * squares[row];
        row_alpha(of_whole[row] - of_part[row], in_all[row] - in_own)
    };
    Ok((0..rows.len).map(alpha).collect())
}

/// Where the first column in solving order alone would make up for the drift, by row.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn first_values(
    rows: Rows<'_>,
    factor: &Factor,
    drift: &DriftMoments,
    alpha: f32,
) -> Result<Array<f32>> {
    let (gpu, n) = (&factor.gpu, factor.in_features());
    let Some(first) = factor.order.first().copied() else {
        return Array::zeros(gpu, rows.len);
    };
    let first_alone = Array::of(gpu, &[first as i32])?;
    let column = |x: &Array<f32>| -> Result<Vec<f32>> {
        let mut out = Array::zeros(gpu, rows.len)?;
        order_columns(&**gpu, &mut out, x, &first_alone, [rows.len, n], 1.0)?;
        out.values()
    };
    let energy = f64::from(super::kernels::diagonal(gpu, &factor.hessian, n)?[first]);
    let drift = drift.of_rows(rows, factor)?;
    let (drift, w) = (column(&drift)?, column(rows.w)?);
    let value = |(w, drift): (&f32, &f32)| {
        let gain = match energy > 0.0 {
            true => f64::from(*drift) / energy,
            false => 0.0,
        };
        (f64::from(*w) + f64::from(alpha) * gain) as f32
    };
    let values: Vec<f32> = w.iter().zip(&drift).map(value).collect();
    Array::of(gpu, &values)
}

impl DriftMoments {
    /// E = W C + S of some rows `[len, in]`.
    fn of_rows(&self, rows: Rows<'_>, factor: &Factor) -> Result<Array<f32>> {
        let (gpu, n) = (&factor.gpu, factor.in_features());
        let (first, end) = (rows.first * n, (rows.first + rows.len) * n);
        let output = self.output_cross.as_ref().map(|s| &s.data()[first..end]);
        let output = output.map(|s| Array::of(gpu, s)).transpose()?;
        let Some(cross) = &self.cross else {
            return output.map_or_else(|| Array::zeros(gpu, rows.len * n), Ok);
        };
        let drift = Array::zeros(gpu, rows.len * n)?;
        let left = (View::all(rows.w, rows.len, n), false);
        let (out, right) = (View::all(&drift, rows.len, n), View::all(cross, n, n));
        product(&**gpu, out, left, right, (1.0, 0.0))?;
        let Some(output) = output else {
            return Ok(drift);
        };
        let mut sum = Array::zeros(gpu, rows.len * n)?;
        let ones = Array::of(gpu, &vec![1.0; rows.len])?;
        add_rows(&**gpu, &mut sum, &output, &drift, &ones, n)?;
        Ok(sum)
    }

    /// E H⁻¹ of E `[rows, in]`.
    fn solve(&self, factor: &Factor, drift: &Array<f32>, rows: usize) -> Result<Array<f32>> {
        let (gpu, n) = (&factor.gpu, factor.in_features());
        let order = &factor.order_on_gpu;
        let mut ordered = Array::zeros(gpu, rows * n)?;
        order_columns(
            &**gpu,
            &mut ordered,
            drift,
            order,
            [rows, n],
            1.0 / self.mean,
        )?;
        let unit = View::all(&factor.unit_upper, n, n);
        solve_unit(&**gpu, unit, true, View::all(&ordered, rows, n))?;
        divide_columns(&**gpu, &mut ordered, &self.pivots, rows, false)?;
        solve_unit(&**gpu, unit, false, View::all(&ordered, rows, n))?;
        let mut solved = Array::zeros(gpu, rows * n)?;
        restore_columns(&**gpu, &mut solved, &ordered, order, rows)?;
        Ok(solved)
    }
}
