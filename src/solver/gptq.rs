//! GPTQ and GPTAQ, blocked and parallel.
//!
//! Rows of W never meet, so chunks of rows are solved side by side; the height of a chunk depends
//! on the number of rows only, hence the same bytes for any number of threads. A chunk is held
//! column after column, each column contiguous over its rows, so that rounding and passing on
//! errors run along vectors.
//!
//! Within a chunk column q is rounded to q_q from v_q = t_q + s_q: its target t_q, the weight moved
//! by the pull, and its shift s_q, which makes up for earlier columns. For all j > q it passes on
//! s_j ← s_j + (t_q − q_q) R_qj and t_j ← t_j + v_q P_qj. GPTQ is told with the inverse of H
//! instead, w_j ← w_j − (v_q − q_q) U_qj / U_qq; both are the same numbers, and R needs no inverse
//! (see [`Factor`]). The recurrence is solved by halving: solve the left half of a range of
//! columns, add what it passes on to the right half as one matrix product, solve the right half.
//! All but the smallest ranges are then products. The outermost ranges are `col_block` wide and
//! update everything after them.
//!
//! Differs from the references: (1) GPTAQ's code uses the rounded w_q in the update of later
//! blocks and the unrounded one within a block; here it is the unrounded one throughout, so that
//! the width of a block changes nothing. (2) Without `act_order` each group's grid is fitted when
//! the group is reached, on weights that have received *all* earlier updates; the reference misses
//! those of the current block. (3) With `act_order` grids are fitted on the original weight
//! ("static groups"). (4) Dead columns are rounded to nearest, see [`Factor`].
//!
//! Source: arXiv:2210.17323 §3.4, IST-DASLab/gptq@2d65066 gptq.py; arXiv:2504.02692,
//! Intelligent-Computing-Lab-Yale/GPTAQ@883afc6 gptaq_utils.py; arXiv:2307.13304 §3, where the form
//! without the inverse is called LDLQ.

use super::factor::Factor;
use super::gain::to_unit_gain;
use super::grid::{Fitting, Grids, steps};
use super::loss::{dot, live_difference, quantization_loss, weighted_energy};
use super::refine::refine;
use super::rows::Rows;
use super::target;
use super::{Clip, Solved, SolverSettings, Target, check_weight};
use crate::plan::Scheme;
use crate::statistics::Statistics;
use crate::{Error, Matrix, QuantizedWeight, Result};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::solve_unit_lower_triangular_in_place;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use std::ops::Range;

/// Columns solved without a matrix product.
const LEAF_COLS: usize = 16;

/// How far the loss may be off before H itself is asked for it.
pub(crate) const MAX_LOSS_ERROR: f64 = 2e-4;

/// `w` quantized so that its outputs on the calibration data change least: GPTQ, or GPTAQ if
/// [`SolverSettings::alpha`] is positive. [`Factor::new`], then [`solve`].
///
/// Shapes: `w [out, in]`, statistics of the same `in`.
/// # Errors
/// Those of the two.
pub fn gptq(
    module: &str,
    w: &Matrix,
    statistics: &Statistics,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    // Before the factor, which costs more than all else.
    check_fit(module, w, statistics.in_features(), scheme)?;
    let output_cross = statistics.output_cross();
    let output_cross = output_cross.filter(|_| settings.target != Target::Pull);
    if settings.alpha > 0.0 && statistics.cross().or(output_cross).is_none() {
        return Err(no_cross_moments(module));
    }
    let factor = Factor::new(module, statistics.clone(), settings)?;
    solve(module, w, &factor, scheme, settings)
}

/// [`solve_rows`] of all rows.
///
/// # Errors
/// As there.
pub fn solve(
    module: &str,
    w: &Matrix,
    factor: &Factor,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    solve_rows(module, w, 0..w.rows(), factor, scheme, settings)
}

/// Some rows of `w` quantized with a factor that other linears of the same inputs may share, to the
/// bits that they have when all are. Dampings and the order of columns are the factor's; `settings`
/// give α, the clip and the column block. Losses are of these rows alone.
///
/// Shapes: `w [out, in]`, factor of the same `in`.
/// # Panics
/// If `rows` are not rows of `w`, or do not begin at a multiple of [`super::ROW_UNIT`].
/// # Errors
/// [`Error::Shape`] if they differ; [`Error::Invalid`] for a setting outside its range or a group
/// size that does not divide; [`Error::Missing`] if α > 0 and the statistics kept no cross moments;
/// [`Error::NotFinite`] for NaN or infinity among the weights, or a
/// scale too large for its storage type.
pub fn solve_rows(
    module: &str,
    w: &Matrix,
    rows: Range<usize>,
    factor: &Factor,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    settings.check_scheme(scheme)?;
    let group_len = check_fit(module, w, factor.in_features(), scheme)?;
    let pull = factor.pull().filter(|_| settings.alpha > 0.0);
    let drift = factor.drift_moments().filter(|_| settings.alpha > 0.0);
    if settings.alpha > 0.0 && pull.is_none() && drift.is_none() {
        return Err(no_cross_moments(module));
    }
    let rows = Rows::new(w, rows);
    let w = &*rows.w;
    let moved = drift.map(|drift| target::target(&rows, factor, drift, settings.alpha));
    let (target, alpha) = match &moved {
        Some((target, alpha)) => (target, *alpha),
        None => (w, settings.alpha),
    };
    let first_values = drift.filter(|_| settings.target == Target::Qronos);
    let first_values =
        first_values.map(|drift| target::first_values(&rows, factor, drift, settings.alpha));
    let is_weighted = settings.clip == Clip::Weighted;
    let column_weights = is_weighted.then(|| factor.column_weights(settings.clip_power));
    let fitting = Fitting {
        scheme,
        clip: settings.clip,
        clip_norm: settings.clip_norm,
        column_weights: column_weights.as_deref(),
    };
    let grids = match factor.act_order {
        true => Some(Grids::fit(module, target, group_len, fitting)?),
        false => None,
    };
    let problem = Problem {
        w: target,
        chunk_height: rows.chunk_height(16),
        first_values: first_values.as_deref(),
        settings,
        group_len,
        factor,
        pull,
        fitting,
        grids: grids.as_ref(),
    };
    let (mut weight, damped_loss) = problem.solve(module)?;
    if settings.sweeps > 0 {
        weight = refine(
            module,
            target,
            weight,
            (factor, rows.chunk_height(16)),
            settings,
        )?;
    }
    if settings.unit_gain {
        weight = to_unit_gain(module, target, &weight, factor.hessian_lower())?;
    }
    Ok(Solved {
        loss: match settings.sweeps == 0 && !settings.unit_gain && moved.is_none() {
            true => problem.undamped_loss(&weight, damped_loss),
            false => quantization_loss(w, &weight, factor.hessian_lower()),
        },
        energy: weighted_energy(w, factor.hessian_lower()),
        weight,
        alpha,
        dampening_frac: factor.dampening_frac,
        dampening_steps: factor.dampening_steps.clone(),
        n_dead_columns: factor.n_dead_columns,
    })
}

pub(crate) fn no_cross_moments(module: &str) -> Error {
    Error::Missing {
        what: "the cross moments of both streams, which alpha > 0 needs".into(),
        place: format!("the statistics of {module}"),
    }
}

/// Columns per group, if weight, inputs and scheme fit together.
pub(crate) fn check_fit(
    module: &str,
    w: &Matrix,
    in_features: usize,
    scheme: Scheme,
) -> Result<usize> {
    let group_len = scheme.group_len(module, w.cols())?;
    if in_features != w.cols() {
        return Err(Error::Shape {
            module: format!("statistics of {module}"),
            expected: vec![w.cols(), w.cols()],
            found: vec![in_features, in_features],
        });
    }
    check_weight(module, w)?;
    Ok(group_len)
}

/// What all chunks share.
struct Problem<'a> {
    /// The target of every column before any is rounded.
    w: &'a Matrix,
    chunk_height: usize,
    /// What the first column is rounded from instead, by row, for [`Target::Qronos`].
    first_values: Option<&'a [f32]>,
    settings: &'a SolverSettings,
    group_len: usize,
    factor: &'a Factor,
    /// P for α = 1, if α is not zero.
    pull: Option<&'a Matrix>,
    fitting: Fitting<'a>,
    /// Grids fitted beforehand; absent if they are fitted on the way.
    grids: Option<&'a Grids>,
}

impl Problem<'_> {
    /// Without pull the errors of the steps add up to the loss with the damped H: tr(D H Dᵀ) is
    /// that less what the damping added. The factor is that of an H whose diagonal is off by about
    /// an epsilon of its mean, which weighs as much as that share of the damping. Where this is too
    /// much for what is left, and with pull, H itself is asked.
    fn undamped_loss(&self, weight: &QuantizedWeight, damped_loss: f64) -> f64 {
        let hessian_lower = self.factor.hessian_lower();
        if self.pull.is_none() {
            let added = self.factor.damping * live_difference(self.w, weight, hessian_lower);
            let error = added * f64::from(f32::EPSILON) / self.factor.dampening_frac;
            if error < MAX_LOSS_ERROR * (damped_loss - added) {
                return damped_loss - added;
            }
        }
        quantization_loss(self.w, weight, hessian_lower)
    }

    /// The weight on its grid, and Σ D_q (v_q − q_q)² over rows and live columns in units of H.
    fn solve(&self, module: &str) -> Result<(QuantizedWeight, f64)> {
        let (rows, cols) = (self.w.rows(), self.w.cols());
        let n_groups = cols / self.group_len;
        let height = self.chunk_height;
        let starts: Vec<usize> = (0..rows).step_by(height).collect();
        let chunks: Vec<Chunk> = starts
            .into_par_iter()
            .map(|start| self.solve_chunk(start..rows.min(start + height)))
            .collect();
        let count = chunks.iter().map(|chunk| chunk.n_not_finite).sum();
        if count > 0 {
            return Err(Error::NotFinite {
                module: module.to_owned(),
                stage: "weights after compensation".into(),
                count,
            });
        }
        let mut codes = Vec::with_capacity(rows * cols);
        let mut scales = Vec::with_capacity(rows * n_groups);
        let mut zero_points = Vec::with_capacity(rows * n_groups);
        for chunk in &chunks {
            codes.extend_from_slice(&chunk.codes);
            for row in 0..chunk.n_rows {
                let column = chunk.scales.iter().skip(row).step_by(chunk.n_rows);
                scales.extend(column.copied());
                let column = chunk.zero_points.iter().skip(row).step_by(chunk.n_rows);
                zero_points.extend(column.map(|zero| *zero as u8));
            }
        }
        let scales = Matrix::from_vec(module, rows, n_groups, scales)?;
        let shape = [rows, cols];
        let weight = QuantizedWeight::new(
            module,
            self.fitting.scheme,
            shape,
            codes,
            scales,
            zero_points,
        )?;
        Ok((weight, chunks.iter().map(|chunk| chunk.damped_loss).sum()))
    }

    fn solve_chunk(&self, rows: Range<usize>) -> Chunk {
        let n_cols = self.w.cols();
        let mut chunk = Chunk::new(self, rows);
        let mut start = 0;
        while start < n_cols {
            let end = self.block_end(start);
            let starts_group = start.is_multiple_of(self.group_len);
            if self.grids.is_none() && starts_group && end - start < self.group_len {
                chunk.fit_group(self, start);
            }
            chunk.solve(self, start..end, start);
            chunk.pass_on(self, start..end, end..n_cols, start);
            start = end;
        }
        chunk.finish(self);
        chunk
    }

    /// End of the outermost range that begins at `start`: whole groups if a group fits into
    /// `col_block`, else at most `col_block` columns of one group.
    fn block_end(&self, start: usize) -> usize {
        let (group_len, block) = (self.group_len, self.settings.col_block);
        if group_len <= block {
            return self.w.cols().min(start + block / group_len * group_len);
        }
        let group_end = (start / group_len + 1) * group_len;
        group_end.min(start + block)
    }
}

/// Some rows being solved. All buffers but the final codes run down the rows first.
struct Chunk {
    first_row: usize,
    n_rows: usize,
    /// Targets, `[in]` columns in solving order; a solved column keeps the value that was rounded.
    targets: Vec<f32>,
    /// Shifts, likewise; a solved column keeps its rounding error.
    shifts: Vec<f32>,
    /// Targets less what they became, of the columns of the current outermost range.
    differences: Vec<f32>,
    /// `[n_groups]` columns.
    scales: Vec<f32>,
    zero_points: Vec<f32>,
    /// `[in]` columns in solving order; after [`Chunk::finish`] `[rows, in]` in original order.
    codes: Vec<u8>,
    n_not_finite: usize,
    /// Σ D_q (v_q − q_q)² over live columns, in units of H.
    damped_loss: f64,
}

impl Chunk {
    fn new(problem: &Problem<'_>, rows: Range<usize>) -> Self {
        let (n_rows, n_cols) = (rows.len(), problem.w.cols());
        let n_groups = n_cols / problem.group_len;
        let mut targets = vec![0.0; n_rows * n_cols];
        for (position, column) in problem.factor.order.iter().enumerate() {
            for (i, row) in rows.clone().enumerate() {
                targets[position * n_rows + i] = problem.w[(row, *column)];
            }
        }
        let mut chunk = Self {
            first_row: rows.start,
            n_rows,
            targets,
            shifts: vec![0.0; n_rows * n_cols],
            differences: vec![0.0; n_rows * problem.settings.col_block.min(n_cols)],
            scales: vec![1.0; n_rows * n_groups],
            zero_points: vec![0.0; n_rows * n_groups],
            codes: vec![0; n_rows * n_cols],
            n_not_finite: 0,
            damped_loss: 0.0,
        };
        if let Some(grids) = problem.grids {
            for (i, row) in rows.enumerate() {
                for group in 0..n_groups {
                    let index = row * n_groups + group;
                    chunk.scales[group * n_rows + i] = grids.scales.data()[index];
                    chunk.zero_points[group * n_rows + i] = grids.zero_points[index].into();
                }
            }
        }
        chunk
    }

    /// Fits the grids of the group that begins at `start`, all earlier columns being solved.
    ///
    /// To the weights as GPTQ has them at this point: all columns that are left make up for the
    /// errors so far together. They are moved by X with X R = S.
    fn fit_group(&mut self, problem: &Problem<'_>, start: usize) {
        let (n, len) = (self.n_rows, problem.group_len);
        let group = start / len;
        let mut moved = self.shifts[start * n..][..len * n].to_vec();
        let columns = MatMut::from_column_major_slice_mut(&mut moved, n, len);
        let unit = problem.factor.unit_upper();
        let unit = unit.submatrix(start, start, len, len).transpose();
        solve_unit_lower_triangular_in_place(unit, columns.transpose_mut(), Par::Seq);
        let mut values = vec![0.0; len];
        for row in 0..n {
            let targets = self.targets[start * n + row..].iter().step_by(n);
            let moved = moved[row..].iter().step_by(n);
            for (value, (target, moved)) in values.iter_mut().zip(targets.zip(moved)) {
                *value = target + moved;
            }
            let grid = problem.fitting.fit(&values, start);
            self.scales[group * n + row] = grid.scale;
            self.zero_points[group * n + row] = grid.zero_point.into();
        }
    }

    /// Solves `range`, which has received all updates from columns before it. `base` is the
    /// column that the first column of `differences` belongs to.
    fn solve(&mut self, problem: &Problem<'_>, range: Range<usize>, base: usize) {
        let group_len = problem.group_len;
        let is_group = range.len() == group_len && range.start.is_multiple_of(group_len);
        if is_group && problem.grids.is_none() {
            self.fit_group(problem, range.start);
        }
        if range.len() <= LEAF_COLS && range.len() <= group_len {
            for column in range.clone() {
                self.round(problem, column, base);
                self.pass_on_one(problem, column, range.end, base);
            }
            return;
        }
        let middle = range.start
            + if range.len() > group_len {
                (range.len() / group_len).div_ceil(2) * group_len
            } else {
                range.len() / 2
            };
        self.solve(problem, range.start..middle, base);
        self.pass_on(problem, range.start..middle, middle..range.end, base);
        self.solve(problem, middle..range.end, base);
    }

    /// Rounds one column to its grid and notes its code, difference, value and error.
    fn round(&mut self, problem: &Problem<'_>, column: usize, base: usize) {
        let n = self.n_rows;
        let group = problem.factor.order[column] / problem.group_len;
        let max_code = f32::from(problem.fitting.scheme.max_code());
        let targets = &mut self.targets[column * n..][..n];
        let shifts = &mut self.shifts[column * n..][..n];
        let scales = &self.scales[group * n..][..n];
        let zero_points = &self.zero_points[group * n..][..n];
        let codes = &mut self.codes[column * n..][..n];
        let differences = &mut self.differences[(column - base) * n..][..n];
        let first_values = problem.first_values.filter(|_| column == 0);
        if let Some(values) = first_values {
            // Its target stays, so that the others make up for the difference from it.
            let pairs = shifts.iter_mut().zip(&values[self.first_row..]);
            pairs.zip(&*targets).for_each(|((s, v), t)| *s = v - t);
        }
        for i in 0..n {
            let value = targets[i] + shifts[i];
            let steps = steps(value, scales[i], zero_points[i], max_code);
            let rounded = steps * scales[i];
            differences[i] = targets[i] - rounded;
            targets[i] = value;
            shifts[i] = value - rounded;
            codes[i] = (steps + zero_points[i]) as u8;
        }
        self.damped_loss += problem.factor.step_losses[column] * dot(shifts, shifts);
    }

    /// Updates the columns after `column` and before `end`.
    fn pass_on_one(&mut self, problem: &Problem<'_>, column: usize, end: usize, base: usize) {
        let n = self.n_rows;
        let differences = &self.differences[(column - base) * n..][..n];
        let shifts = &mut self.shifts[(column + 1) * n..];
        let factors = &problem.factor.unit_row(column)[..end - column - 1];
        for (shifts, factor) in shifts.chunks_exact_mut(n).zip(factors) {
            for (shift, difference) in shifts.iter_mut().zip(differences) {
                *shift += difference * factor;
            }
        }
        let Some(pull) = problem.pull else {
            return;
        };
        let alpha = problem.settings.alpha;
        let (before, after) = self.targets.split_at_mut((column + 1) * n);
        let values = &before[column * n..];
        let factors = &pull.row(column)[column + 1..end];
        for (targets, factor) in after.chunks_exact_mut(n).zip(factors) {
            let factor = alpha * factor;
            for (target, value) in targets.iter_mut().zip(values) {
                *target += value * factor;
            }
        }
    }

    /// Updates the columns `to`, all after the solved columns `from`.
    fn pass_on(
        &mut self,
        problem: &Problem<'_>,
        from: Range<usize>,
        to: Range<usize>,
        base: usize,
    ) {
        let n = self.n_rows;
        if to.is_empty() {
            return;
        }
        let view = |values| MatRef::from_column_major_slice(values, n, from.len());
        let differences = &self.differences[(from.start - base) * n..][..from.len() * n];
        let shifts = &mut self.shifts[to.start * n..][..to.len() * n];
        let shifts = MatMut::from_column_major_slice_mut(shifts, n, to.len());
        let unit = problem.factor.unit_upper();
        let unit = unit.submatrix(from.start, to.start, from.len(), to.len());
        matmul(shifts, Accum::Add, view(differences), unit, 1.0, Par::Seq);
        if let Some(pull) = problem.pull {
            let (before, after) = self.targets.split_at_mut(to.start * n);
            let values = &before[from.start * n..][..from.len() * n];
            let targets = &mut after[..to.len() * n];
            let targets = MatMut::from_column_major_slice_mut(targets, n, to.len());
            let alpha = problem.settings.alpha;
            let pull = pull.as_faer();
            let pull = pull.submatrix(from.start, to.start, from.len(), to.len());
            matmul(targets, Accum::Add, view(values), pull, alpha, Par::Seq);
        }
    }

    /// Puts the codes into rows of original order and counts what is not a number.
    fn finish(&mut self, problem: &Problem<'_>) {
        let n_cols = problem.w.cols();
        let mut codes = vec![0; self.codes.len()];
        let columns = self.codes.chunks_exact(self.n_rows);
        for (column, original) in columns.zip(&problem.factor.order) {
            for (row, code) in column.iter().enumerate() {
                codes[row * n_cols + original] = *code;
            }
        }
        self.codes = codes;
        self.n_not_finite = self.shifts.iter().filter(|e| !e.is_finite()).count();
        // All chunks are held until the last is done; what only solving needs is not.
        self.targets = Vec::new();
        self.shifts = Vec::new();
        self.differences = Vec::new();
    }
}
