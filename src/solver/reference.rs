//! The specification of [`gptq`](super::gptq()): the same method straight from its definition.
//!
//! No blocks, no triangular factor, no parallelism, all in f64, and the inverse of what is left
//! of H computed anew for every column. After column q is rounded with error e, the weights not
//! yet rounded move to the minimiser of the damped error given what is fixed:
//! δ = −e / (H⁻¹)_qq · (H⁻¹)_q,: with H cut down to the columns not yet rounded. GPTAQ adds
//! w_q · α · C_q,>q (H_>q,>q)⁻¹; with another target than [`Target::Pull`] what is rounded is
//! W + α (W C + S) H⁻¹ from the start. Sweeps and unit gain are left out: their tests are laws.
//! Cost: in⁵-ish for tiny layers, which is the point.
//!
//! Source: arXiv:2210.17323 §3.1 eqs. 2 and 3 (there after Optimal Brain Surgeon);
//! arXiv:2504.02692.

use super::grid::{Fitting, Grid};
use super::{SolverSettings, Target, check_weight};
use crate::plan::Scheme;
use crate::statistics::Statistics;
use crate::{Error, Matrix, QuantizedWeight, Result};

/// What [`gptq`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// The quantized weight, columns in their original order.
    pub weight: QuantizedWeight,
    /// Σ e² / (H⁻¹)_qq over rows and columns. Without GPTAQ's pull it equals
    /// tr((W − Q) H (W − Q)ᵀ) with the damped H.
    pub step_loss: f64,
}

/// `w` quantized by the definition, with [`SolverSettings::dampening_frac`] and no ladder.
///
/// Shapes: `w [out, in]`, statistics of the same `in`.
/// # Errors
/// As [`gptq`](super::gptq()).
pub fn gptq(
    module: &str,
    w: &Matrix,
    statistics: &Statistics,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Reference> {
    settings.check()?;
    check_weight(module, w)?;
    let group_len = scheme.group_len(module, w.cols())?;
    let n = w.cols();
    if statistics.in_features() != n {
        return Err(Error::Shape {
            module: format!("statistics of {module}"),
            expected: vec![n, n],
            found: vec![statistics.in_features(); 2],
        });
    }
    let singular = |pivot| Error::Singular {
        module: module.to_owned(),
        pivot,
        dampening_frac: settings.dampening_frac,
    };
    let hessian = damped(&statistics.hessian(), settings.dampening_frac).ok_or(singular(0))?;
    let mut order: Vec<usize> = (0..n).collect();
    if settings.act_order {
        let diagonal = statistics.hessian();
        order.sort_by(|a, b| diagonal[(*b, *b)].total_cmp(&diagonal[(*a, *a)]));
    }
    let is_pulled = settings.target == Target::Pull;
    let pull_alpha = if is_pulled { settings.alpha } else { 0.0 };
    let mut rows = in_f64(w);
    let mut first: Option<Vec<f64>> = None;
    let moments = (statistics.cross(), statistics.output_cross());
    if !is_pulled && moments != (None, None) {
        let drift = drift(&rows, moments);
        if settings.target == Target::Qronos {
            let energy = f64::from(statistics.hessian_lower()[(order[0], order[0])]);
            let value = |(row, drift): (&Vec<f64>, &Vec<f64>)| {
                row[order[0]] + f64::from(settings.alpha) * drift[order[0]] / energy
            };
            first = Some(rows.iter().zip(&drift).map(value).collect());
        }
        let target = least_squares(&rows, &drift, &hessian, settings.alpha);
        rows = target.ok_or(singular(0))?;
    }
    let column_weights = column_weights(statistics, &hessian, &order).ok_or(singular(0))?;
    let column_weights = to_power(&column_weights, settings.clip_power);
    let mut state = State::new(rows, scheme, settings, group_len, &column_weights);
    for position in 0..n {
        let rest = &order[position..];
        let inverse = inverse(&sub_matrix(&hessian, rest)).ok_or(singular(rest[0]))?;
        let later = inverse_of_later(&hessian, &rest[1..]).ok_or(singular(rest[0]))?;
        let pull = pull(statistics.cross(), rest, &later, pull_alpha);
        state.round_column(rest, first.take().as_deref(), &inverse[0], &pull);
    }
    state.into_reference(module)
}

struct State<'a> {
    rows: Vec<Vec<f64>>,
    scheme: Scheme,
    settings: &'a SolverSettings,
    group_len: usize,
    column_weights: &'a [f32],
    grids: Vec<Vec<Grid>>,
    codes: Vec<u8>,
    step_loss: f64,
}

impl<'a> State<'a> {
    fn new(
        rows: Vec<Vec<f64>>,
        scheme: Scheme,
        settings: &'a SolverSettings,
        group_len: usize,
        column_weights: &'a [f32],
    ) -> Self {
        let (n_rows, n_cols) = (rows.len(), column_weights.len());
        let mut state = Self {
            rows,
            scheme,
            settings,
            group_len,
            column_weights,
            grids: vec![Vec::new(); n_rows],
            codes: vec![0; n_rows * n_cols],
            step_loss: 0.0,
        };
        if settings.act_order {
            for start in (0..n_cols).step_by(group_len) {
                state.fit_group(start);
            }
        }
        state
    }

    fn fit_group(&mut self, start: usize) {
        for (row, grids) in self.rows.iter().zip(&mut self.grids) {
            let group = &row[start..start + self.group_len];
            let group: Vec<f32> = group.iter().map(|v| *v as f32).collect();
            let fitting = Fitting {
                scheme: self.scheme,
                clip: self.settings.clip,
                clip_norm: self.settings.clip_norm,
                column_weights: Some(self.column_weights),
            };
            grids.push(fitting.fit(&group, start));
        }
    }

    /// Rounds column `rest[0]`, from other values if there are `instead`, and moves the others of `rest`.
    fn round_column(
        &mut self,
        rest: &[usize],
        instead: Option<&[f64]>,
        inverse_row: &[f64],
        pull: &[f64],
    ) {
        let column = rest[0];
        let group = column / self.group_len;
        if !self.settings.act_order && column.is_multiple_of(self.group_len) {
            self.fit_group(column);
        }
        let n_cols = self.rows[0].len();
        let max_code = f64::from(self.scheme.max_code());
        for (index, row) in self.rows.iter_mut().enumerate() {
            let grid = self.grids[index][group];
            let (scale, zero) = (f64::from(grid.scale), f64::from(grid.zero_point));
            let weight = row[column];
            let rounded_from = instead.map_or(weight, |values| values[index]);
            let code = ((rounded_from / scale).round_ties_even() + zero).clamp(0.0, max_code);
            let error = weight - (code - zero) * scale;
            self.codes[index * n_cols + column] = code as u8;
            self.step_loss += error * error / inverse_row[0];
            for (k, later) in rest.iter().enumerate().skip(1) {
                row[*later] += weight * pull[k - 1] - error * inverse_row[k] / inverse_row[0];
            }
        }
    }

    fn into_reference(self, module: &str) -> Result<Reference> {
        let n_rows = self.rows.len();
        let n_cols = self.codes.len() / n_rows.max(1);
        let grids: Vec<Grid> = self.grids.into_iter().flatten().collect();
        let n_groups = n_cols / self.group_len;
        let scales = grids.iter().map(|grid| grid.scale).collect();
        let weight = QuantizedWeight::new(
            module,
            self.scheme,
            [n_rows, n_cols],
            self.codes,
            Matrix::from_vec(module, n_rows, n_groups, scales)?,
            grids.iter().map(|grid| grid.zero_point).collect(),
        )?;
        Ok(Reference {
            weight,
            step_loss: self.step_loss,
        })
    }
}

/// H with dead columns cut loose and the diagonal damped, by the rules of the solver.
pub(crate) fn damped(hessian: &Matrix, dampening_frac: f64) -> Option<Vec<Vec<f64>>> {
    let n = hessian.rows();
    let diagonal: Vec<f64> = (0..n).map(|i| hessian[(i, i)].into()).collect();
    let n_live = diagonal.iter().filter(|d| **d != 0.0).count();
    if n_live == 0 {
        return None;
    }
    let mean = diagonal.iter().sum::<f64>() / n_live as f64;
    let entry = |i: usize, j: usize| {
        let value = match (diagonal[i] == 0.0 || diagonal[j] == 0.0, i == j) {
            (true, true) => mean,
            (true, false) => 0.0,
            (false, _) => f64::from(hessian[(i, j)]),
        };
        if i == j {
            value + dampening_frac * mean
        } else {
            value
        }
    };
    Some(
        (0..n)
            .map(|i| (0..n).map(|j| entry(i, j)).collect())
            .collect(),
    )
}

fn in_f64(w: &Matrix) -> Vec<Vec<f64>> {
    let as_f64 = |row| w.row(row).iter().map(|v| f64::from(*v)).collect();
    (0..w.rows()).map(as_f64).collect()
}

/// E = W C + S.
fn drift(rows: &[Vec<f64>], (cross, output): (Option<&Matrix>, Option<&Matrix>)) -> Vec<Vec<f64>> {
    let of_row = |(index, row): (usize, &Vec<f64>)| {
        let mut drift = match cross {
            Some(cross) => times(row, |i, j| f64::from(cross[(i, j)])),
            None => vec![0.0; row.len()],
        };
        if let Some(output) = output {
            let pairs = drift.iter_mut().zip(output.row(index));
            pairs.for_each(|(drift, s)| *drift += f64::from(*s));
        }
        drift
    };
    rows.iter().enumerate().map(of_row).collect()
}

/// W + α E H⁻¹.
fn least_squares(
    rows: &[Vec<f64>],
    drift: &[Vec<f64>],
    hessian: &[Vec<f64>],
    alpha: f32,
) -> Option<Vec<Vec<f64>>> {
    let inverse = inverse(hessian)?;
    let moved = |(row, drift): (&Vec<f64>, &Vec<f64>)| {
        let shift = times(drift, |i, j| inverse[i][j]);
        let pairs = row.iter().zip(&shift);
        pairs.map(|(w, s)| w + f64::from(alpha) * s).collect()
    };
    Some(rows.iter().zip(drift).map(moved).collect())
}

/// A row times a square matrix.
fn times(row: &[f64], entry: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let column = |j| row.iter().enumerate().map(|(i, v)| v * entry(i, j)).sum();
    (0..row.len()).map(column).collect()
}

/// 1 / (H⁻¹)_qq with H cut down to q and the columns after it; zero for dead columns.
fn column_weights(
    statistics: &Statistics,
    hessian: &[Vec<f64>],
    order: &[usize],
) -> Option<Vec<f32>> {
    let mut weights = vec![0.0; order.len()];
    for position in 0..order.len() {
        let rest = &order[position..];
        if statistics.hessian_lower()[(rest[0], rest[0])] != 0.0 {
            weights[rest[0]] = (1.0 / inverse(&sub_matrix(hessian, rest))?[0][0]) as f32;
        }
    }
    Some(weights)
}

/// Zeroes stay zeroes, whatever the power.
fn to_power(weights: &[f32], power: f32) -> Vec<f32> {
    let to_power = |w: &f32| if *w > 0.0 { w.powf(power) } else { 0.0 };
    weights.iter().map(to_power).collect()
}

fn sub_matrix(matrix: &[Vec<f64>], kept: &[usize]) -> Vec<Vec<f64>> {
    let row = |i: &usize| kept.iter().map(|j| matrix[*i][*j]).collect();
    kept.iter().map(row).collect()
}

fn inverse_of_later(hessian: &[Vec<f64>], later: &[usize]) -> Option<Vec<Vec<f64>>> {
    inverse(&sub_matrix(hessian, later))
}

/// α · C_q,>q (H_>q,>q)⁻¹ for q = `rest[0]`, in the order of `rest[1..]`.
fn pull(cross: Option<&Matrix>, rest: &[usize], later: &[Vec<f64>], alpha: f32) -> Vec<f64> {
    let Some(cross) = cross else {
        return vec![0.0; later.len()];
    };
    let drift = |k: usize| f64::from(cross[(rest[0], rest[k + 1])]);
    let share = |j: usize| {
        (0..later.len())
            .map(|k| drift(k) * later[k][j])
            .sum::<f64>()
    };
    (0..later.len())
        .map(|j| f64::from(alpha) * share(j))
        .collect()
}

/// Gauss–Jordan without pivoting, which positive definite matrices do not need.
fn inverse(matrix: &[Vec<f64>]) -> Option<Vec<Vec<f64>>> {
    let n = matrix.len();
    let mut left = matrix.to_vec();
    let mut right: Vec<Vec<f64>> = (0..n)
        .map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect())
        .collect();
    for pivot in 0..n {
        let head = left[pivot][pivot];
        if head.is_nan() || head <= 0.0 {
            return None;
        }
        for matrix in [&mut left, &mut right] {
            matrix[pivot].iter_mut().for_each(|v| *v /= head);
        }
        for row in (0..n).filter(|row| *row != pivot) {
            let factor = left[row][pivot];
            for matrix in [&mut left, &mut right] {
                let source = matrix[pivot].clone();
                let pairs = matrix[row].iter_mut().zip(&source);
                pairs.for_each(|(v, s)| *v -= factor * s);
            }
        }
    }
    Some(right)
}
