//! The columns of GPTQ and GPTAQ on a GPU: [`crate::solver::gptq`](mod@crate::solver::gptq) tells the
//! recurrence.
//!
//! Inside a block of columns one warp solves one row; what a block passes on to the columns after
//! it is one product of matrices. Differs from the CPU: a block never holds more than
//! [`BLOCK_COLS`] columns, and without `act_order` never more than one group, whose grid is fitted
//! when all earlier columns are solved. Both change the order of sums only.

use super::array::Array;
use super::factor::Factor;
use super::kernels::{
    BLOCK_COLS, Found, GridArrays, GridFormat, Solving, fit_grids, order_columns, rounding_errors,
    solve_block,
};
use super::products::{View, product, solve_unit};
use super::target::{self, Moved, Rows};
use crate::plan::{ScaleDtype, Scheme};
use crate::solver::gptq::{MAX_LOSS_ERROR, check_fit, no_cross_moments};
use crate::solver::{Clip, ClipNorm, Solved, SolverSettings, Target, check_scales, column_weights};
use crate::{Error, Matrix, QuantizedWeight, Result};
use std::ops::Range;

/// What of the settings a GPU does not do.
///
/// # Errors
/// [`Error::Unsupported`] naming the first such setting.
pub(crate) fn check(settings: &SolverSettings, scheme: Scheme) -> Result<()> {
    let missing = [
        (settings.sweeps > 0, "sweeps > 0"),
        (settings.unit_gain, "unit_gain=true"),
        (
            scheme.scale_dtype() == ScaleDtype::Superblock,
            "scales in super-blocks (GGUF)",
        ),
    ];
    match missing.iter().find(|(is_asked, _)| *is_asked) {
        Some((_, setting)) => Err(Error::Unsupported {
            what: format!("{setting} on a GPU; --device cpu does it"),
        }),
        None => Ok(()),
    }
}

/// As [`crate::solver::gptq::solve_rows`], on the factor's GPU.
///
/// # Errors
/// As there; [`Error::Unsupported`] of [`check`]; [`Error::Device`].
pub(crate) fn solve(
    module: &str,
    w: &Matrix,
    rows: Range<usize>,
    factor: &Factor,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    settings.check_scheme(scheme)?;
    check(settings, scheme)?;
    let group_len = check_fit(module, w, factor.in_features(), scheme)?;
    let drift = factor.drift_moments().filter(|_| settings.alpha > 0.0);
    let pull = factor.pull().filter(|_| settings.alpha > 0.0);
    if settings.alpha > 0.0 && pull.is_none() && drift.is_none() {
        return Err(no_cross_moments(module));
    }
    let own = &w.data()[rows.start * w.cols()..rows.end * w.cols()];
    let w_on_gpu = Array::of(&factor.gpu, own)?;
    let own = Rows {
        w: &w_on_gpu,
        first: rows.start,
        len: rows.len(),
    };
    let moved = drift.map(|drift| target::target(own, factor, drift, settings.alpha));
    let moved = moved.transpose()?;
    let first_values = drift.filter(|_| settings.target == Target::Qronos);
    let first_values = first_values
        .map(|drift| target::first_values(own, factor, drift, settings.alpha))
        .transpose()?;
    let problem = Problem {
        target: moved.as_ref().map_or(&w_on_gpu, |moved| &moved.target),
        first_values: first_values.as_ref(),
        factor,
        pull,
        settings,
        scheme,
        shape: [rows.len(), w.cols(), group_len],
    };
    let outcome = problem.solve(module)?;
    let loss = problem.loss(&outcome, &w_on_gpu, moved.as_ref())?;
    let energy = factor.quadratic_forms(&w_on_gpu, rows.len())?;
    Ok(Solved {
        weight: problem.weight(module, &outcome)?,
        loss,
        energy: energy.iter().sum(),
        alpha: moved.map_or(settings.alpha, |moved| moved.alpha),
        dampening_frac: factor.dampening_frac,
        dampening_steps: factor.dampening_steps.clone(),
        n_dead_columns: factor.n_dead_columns,
    })
}

/// tr((W − Q) H (W − Q)ᵀ) of a weight on its grid.
///
/// # Errors
/// [`Error::Device`].
pub(crate) fn loss_of(w: &Matrix, q: &QuantizedWeight, factor: &Factor) -> Result<f64> {
    let gpu = &factor.gpu;
    let zeros: Vec<f32> = q
        .zero_points()
        .iter()
        .map(|zero| f32::from(*zero))
        .collect();
    let grids = GridArrays {
        scales: Array::of_matrix(gpu, q.scales())?,
        zeros: Array::of(gpu, &zeros)?,
    };
    let group_len = q.cols() / q.n_groups().max(1);
    let shape = [q.rows(), q.cols(), group_len.max(1)];
    let codes = Array::of(gpu, q.codes())?;
    let w = Array::of_matrix(gpu, w)?;
    error_energy(&w, &codes, &grids, factor, shape)
}

fn error_energy(
    w: &Array<f32>,
    codes: &Array<u8>,
    grids: &GridArrays,
    factor: &Factor,
    shape: [usize; 3],
) -> Result<f64> {
    let [rows, n, _] = shape;
    let mut errors = Array::zeros(&factor.gpu, rows * n)?;
    rounding_errors(&*factor.gpu, &mut errors, w, codes, grids, shape)?;
    Ok(factor.quadratic_forms(&errors, rows)?.iter().sum())
}

struct Problem<'a> {
    /// Original order.
    target: &'a Array<f32>,
    first_values: Option<&'a Array<f32>>,
    factor: &'a Factor,
    pull: Option<&'a Array<f32>>,
    settings: &'a SolverSettings,
    scheme: Scheme,
    /// Rows, columns, columns of a group.
    shape: [usize; 3],
}

/// A solution on the GPU.
struct Outcome {
    codes: Array<u8>,
    grids: GridArrays,
    /// Σ D_q (v_q − q_q)² over rows and live columns.
    damped_loss: f64,
    /// ‖target − Q‖² over live columns.
    live_square: f64,
}

impl Problem<'_> {
    fn solve(&self, module: &str) -> Result<Outcome> {
        let [rows, n, group_len] = self.shape;
        let gpu = &self.factor.gpu;
        let order = &self.factor.order_on_gpu;
        let mut targets = Array::zeros(gpu, rows * n)?;
        order_columns(&**gpu, &mut targets, self.target, order, [rows, n], 1.0)?;
        let shifts = Array::zeros(gpu, rows * n)?;
        let mut grids = GridArrays {
            scales: Array::zeros(gpu, rows * (n / group_len))?,
            zeros: Array::zeros(gpu, rows * (n / group_len))?,
        };
        let counts = (self.settings.clip == Clip::Weighted).then(|| {
            let power = self.settings.clip_power;
            column_weights(&self.factor.order, &self.factor.step_losses, power)
        });
        let counts = counts.map(|counts| Array::of(gpu, &counts)).transpose()?;
        if self.factor.act_order {
            let groups = 0..n / group_len;
            self.fit(&mut grids, self.target, [None, counts.as_ref()], groups)?;
        }
        let mut found = Found {
            differences: Array::zeros(gpu, rows * BLOCK_COLS)?,
            values: Array::zeros(gpu, rows * BLOCK_COLS)?,
            codes: Array::zeros(gpu, rows * n)?,
            losses: Array::zeros(gpu, rows)?,
            live_squares: Array::zeros(gpu, rows)?,
            n_bad: Array::zeros(gpu, rows)?,
        };
        let mut start = 0;
        while start < n {
            let block = start..self.block_end(start);
            if !self.factor.act_order && start.is_multiple_of(group_len) {
                self.fit_group(&mut grids, &targets, &shifts, counts.as_ref(), start)?;
            }
            let solving = self.solving(&targets, &shifts, &grids);
            solve_block(&**gpu, &mut found, &solving, block.clone())?;
            self.pass_on(&found, &targets, &shifts, block.clone())?;
            start = block.end;
        }
        outcome(module, found, grids)
    }

    /// End of the block that begins at `start`.
    fn block_end(&self, start: usize) -> usize {
        let [_, n, group_len] = self.shape;
        let end = n.min(start + self.settings.col_block.min(BLOCK_COLS));
        match self.factor.act_order {
            true => end,
            false => end.min((start / group_len + 1) * group_len),
        }
    }

    fn solving<'a>(
        &'a self,
        targets: &'a Array<f32>,
        shifts: &'a Array<f32>,
        grids: &'a GridArrays,
    ) -> Solving<'a> {
        let [rows, _, group_len] = self.shape;
        Solving {
            targets,
            shifts,
            unit_upper: &self.factor.unit_upper,
            pull: self.pull,
            alpha: self.settings.alpha,
            grids,
            first_values: self.first_values,
            step_losses: &self.factor.step_losses_on_gpu,
            order: &self.factor.order_on_gpu,
            rows,
            group_len,
            max_code: self.scheme.max_code().into(),
        }
    }

    fn fit(
        &self,
        grids: &mut GridArrays,
        weights: &Array<f32>,
        extra: [Option<&Array<f32>>; 2],
        groups: Range<usize>,
    ) -> Result<()> {
        let format = format(self.scheme, self.settings);
        fit_grids(
            &*self.factor.gpu,
            grids,
            weights,
            extra,
            self.shape,
            groups,
            format,
        )
    }

    /// Fits the grids of the group that begins at `start` to the weights as GPTQ has them there.
    fn fit_group(
        &self,
        grids: &mut GridArrays,
        targets: &Array<f32>,
        shifts: &Array<f32>,
        counts: Option<&Array<f32>>,
        start: usize,
    ) -> Result<()> {
        let [rows, n, group_len] = self.shape;
        let gpu = &self.factor.gpu;
        let own: Vec<i32> = (start..start + group_len)
            .map(|column| column as i32)
            .collect();
        let mut moved = Array::zeros(gpu, rows * group_len)?;
        let own = Array::of(gpu, &own)?;
        order_columns(&**gpu, &mut moved, shifts, &own, [rows, n], 1.0)?;
        let unit = View::all(&self.factor.unit_upper, n, n);
        let columns = start..start + group_len;
        let unit = unit.part(columns.clone(), columns);
        solve_unit(&**gpu, unit, false, View::all(&moved, rows, group_len))?;
        let group = start / group_len;
        self.fit(grids, targets, [Some(&moved), counts], group..group + 1)
    }

    /// Updates the columns after the solved block.
    fn pass_on(
        &self,
        found: &Found,
        targets: &Array<f32>,
        shifts: &Array<f32>,
        block: Range<usize>,
    ) -> Result<()> {
        let [rows, n, _] = self.shape;
        let gpu = &*self.factor.gpu;
        let after = block.end..n;
        let to = |array| View::all(array, rows, n).part(0..rows, after.clone());
        let of = |square| View::all(square, n, n).part(block.clone(), after.clone());
        let solved = |buffer: &Array<f32>| View::at(buffer.place(), rows, block.len());
        let left = (solved(&found.differences), false);
        product(
            gpu,
            to(shifts),
            left,
            of(&self.factor.unit_upper),
            (1.0, 1.0),
        )?;
        if let Some(pull) = self.pull {
            let left = (solved(&found.values), false);
            product(gpu, to(targets), left, of(pull), (self.settings.alpha, 1.0))?;
        }
        Ok(())
    }

    /// The loss with H undamped, of `w` or of what was rounded in its place.
    fn loss(&self, outcome: &Outcome, w: &Array<f32>, moved: Option<&Moved>) -> Result<f64> {
        if self.pull.is_none() && moved.is_none() {
            // As the CPU: the errors of the steps add up, where rounding leaves enough of them.
            let added = self.factor.damping * outcome.live_square;
            let error = added * f64::from(f32::EPSILON) / self.factor.dampening_frac;
            if error < MAX_LOSS_ERROR * (outcome.damped_loss - added) {
                return Ok(outcome.damped_loss - added);
            }
        }
        error_energy(w, &outcome.codes, &outcome.grids, self.factor, self.shape)
    }

    fn weight(&self, module: &str, outcome: &Outcome) -> Result<QuantizedWeight> {
        let [rows, n, group_len] = self.shape;
        let scales = outcome.grids.scales.matrix(module, rows, n / group_len)?;
        let zeros = outcome.grids.zeros.values()?;
        let zeros = zeros.iter().map(|zero| *zero as u8).collect();
        let codes = outcome.codes.values()?;
        QuantizedWeight::new(module, self.scheme, [rows, n], codes, scales, zeros)
    }
}

fn outcome(module: &str, found: Found, grids: GridArrays) -> Result<Outcome> {
    let scales = grids.scales.values()?;
    check_scales(module, &Matrix::from_vec(module, 1, scales.len(), scales)?)?;
    let n_bad = found.n_bad.values()?.iter().map(|n| *n as usize).sum();
    if n_bad > 0 {
        return Err(Error::NotFinite {
            module: module.to_owned(),
            stage: "weights after compensation".into(),
            count: n_bad,
        });
    }
    Ok(Outcome {
        damped_loss: found.losses.values()?.iter().sum(),
        live_square: found.live_squares.values()?.iter().sum(),
        codes: found.codes,
        grids,
    })
}

/// The numbers that `cuda/kernels/number.cu` and `grid.cu` have for them.
fn format(scheme: Scheme, settings: &SolverSettings) -> GridFormat {
    GridFormat {
        max_code: scheme.max_code().into(),
        is_symmetric: scheme.symmetric(),
        scale_type: match scheme.scale_dtype() {
            ScaleDtype::Bf16 => 0,
            ScaleDtype::F16 => 1,
            ScaleDtype::F32 | ScaleDtype::Superblock => 2,
        },
        clip: match settings.clip {
            Clip::None => 0,
            Clip::Mse => 1,
            Clip::Weighted => 2,
        },
        norm: match settings.clip_norm {
            ClipNorm::Square => 0,
            ClipNorm::Between => 1,
            ClipNorm::Cube => 2,
        },
    }
}
