//! From H to the order of columns and the coefficients that pass a column's error on.
//!
//! With H damped and its columns in solving order, H⁻¹ = UᵀU, U upper triangular. Column q passes
//! −(w_q − q_q) / U_qq · U_qj on to column j > q, so all that is needed are the rows of U divided
//! by their diagonal: a unit upper triangle, invariant under H → cH.
//!
//! U needs neither H⁻¹ nor a second Cholesky: reverse the order of H's rows and columns, factor
//! that as LLᵀ, invert L, and reverse back; the result is upper triangular and its UᵀU is H⁻¹.
//! Everything up to here is f64, because n is moderate and H can be nearly singular; H is divided
//! by its mean diagonal first, so scaling it by a power of two changes no bit.
//!
//! GPTAQ adds, for each column q, its own share of the drift between the streams,
//! w_q · P_qj with P_q,>q = α · C_q,>q (H_>q,>q)⁻¹, which is α · triu(C Uᵀ, 1) · U for all q at once.
//!
//! Dead columns (a zero on H's diagonal) are cut loose from all others and get the mean diagonal:
//! they neither give nor take errors, and so end up rounded to nearest. The reference sets such
//! weights to zero instead, and thereby wipes out a layer whose token weights vanish.
//!
//! Cost: n³/3 multiply-adds each for Cholesky and inverse (f64), n³·5/6 for P (f32).
//! Source: IST-DASLab/gptq@2d65066 gptq.py; arXiv:2504.02692 for P.

use super::SolverSettings;
use crate::statistics::Statistics;
use crate::{Error, Matrix, Result};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, Par, Spec};
use rayon::prelude::*;

/// Rows of U gathered together, so that reads of the column-major inverse fill cache lines.
const BAND: usize = 16;

/// What the linears that share statistics share of the solution: how columns pass on errors.
pub struct Factor<'a> {
    /// Original index of the column solved at each position.
    pub(crate) order: Vec<usize>,
    /// U with each row divided by its diagonal, `[in, in]`; zero below the diagonal.
    pub(crate) unit_upper: Matrix,
    /// P `[in, in]`, strictly upper triangular; absent if α = 0.
    pub(crate) pull: Option<Matrix>,
    /// H undamped, lower triangle, in original order.
    pub(crate) hessian_lower: &'a Matrix,
    pub(crate) act_order: bool,
    /// The damping that worked, as a fraction of the mean of H's nonzero diagonal entries.
    pub dampening_frac: f64,
    /// Dampings that failed before it, in order.
    pub dampening_steps: Vec<f64>,
    /// Columns that no token of positive weight excited. Their weights are rounded to nearest.
    pub n_dead_columns: usize,
}

impl<'a> Factor<'a> {
    /// Factors the damped H, trying the settings' dampings one after the other.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a setting outside its range; [`Error::Singular`] if no damping makes
    /// H positive definite, or H is zero because no token had a positive weight: such a layer is
    /// never rounded or zeroed on the quiet; [`Error::NotFinite`]; [`Error::Missing`] if α > 0 and
    /// there are no cross moments.
    pub fn new(
        module: &str,
        statistics: &'a Statistics,
        settings: &SolverSettings,
    ) -> Result<Self> {
        settings.check()?;
        check_moments(module, statistics)?;
        let cross = match (settings.alpha > 0.0, statistics.cross()) {
            (false, _) => None,
            (true, Some(cross)) => Some(cross),
            (true, None) => {
                return Err(Error::Missing {
                    what: "the cross moments of both streams, which alpha > 0 needs".into(),
                    place: format!("the statistics of {module}"),
                });
            }
        };
        let hessian = OrderedHessian::new(module, statistics, settings)?;
        let (inverse, dampening_steps, dampening_frac) = hessian.invert(module, settings)?;
        let (unit_upper, inverse_pivots) = unit_upper(&inverse);
        drop(inverse);
        let pull = cross.map(|cross| {
            let factors: Vec<f32> = inverse_pivots
                .iter()
                .map(|p| (p * f64::from(settings.alpha)) as f32)
                .collect();
            hessian.pull(cross, &unit_upper, &factors)
        });
        Ok(Self {
            n_dead_columns: hessian.n_dead_columns(),
            order: hessian.order,
            unit_upper,
            pull,
            hessian_lower: statistics.hessian_lower(),
            act_order: settings.act_order,
            dampening_frac,
            dampening_steps,
        })
    }
}

fn check_moments(module: &str, statistics: &Statistics) -> Result<()> {
    let moments = [
        ("hessian", Some(statistics.hessian_lower())),
        ("cross moments", statistics.cross()),
    ];
    for (stage, matrix) in moments {
        let count = matrix.map_or(0, Matrix::count_not_finite);
        if count > 0 {
            return Err(Error::NotFinite {
                module: module.to_owned(),
                stage: stage.into(),
                count,
            });
        }
    }
    Ok(())
}

/// H seen in solving order and in units of its mean diagonal.
struct OrderedHessian<'a> {
    statistics: &'a Statistics,
    is_dead: Vec<bool>,
    mean: f64,
    order: Vec<usize>,
}

impl<'a> OrderedHessian<'a> {
    fn new(module: &str, statistics: &'a Statistics, settings: &SolverSettings) -> Result<Self> {
        let lower = statistics.hessian_lower();
        let diagonal = |i: &usize| lower[(*i, *i)];
        let mut order: Vec<usize> = (0..lower.rows()).collect();
        let live = order.iter().map(diagonal).filter(|d| *d != 0.0);
        let mean = live.clone().map(f64::from).sum::<f64>() / live.count() as f64;
        if mean.is_nan() || mean <= 0.0 {
            return Err(Error::Singular {
                module: module.to_owned(),
                pivot: 0,
                dampening_frac: settings.dampening_frac,
            });
        }
        if settings.act_order {
            order.sort_by(|a, b| diagonal(b).total_cmp(&diagonal(a)));
        }
        Ok(Self {
            statistics,
            is_dead: (0..lower.rows()).map(|i| lower[(i, i)] == 0.0).collect(),
            mean,
            order,
        })
    }

    fn n_dead_columns(&self) -> usize {
        self.is_dead.iter().filter(|is_dead| **is_dead).count()
    }

    /// The reversed damped H, lower triangle only.
    fn reversed(&self, dampening_frac: f64) -> Mat<f64> {
        let n = self.order.len();
        let hessian = self.statistics.hessian();
        let mut reversed = Mat::<f64>::zeros(n, n);
        let columns = reversed.par_col_iter_mut().enumerate();
        columns.for_each(|(j, column)| {
            let own = self.order[n - 1 - j];
            let source = hessian.row(own);
            for (i, value) in column.iter_mut().enumerate().skip(j) {
                let other = self.order[n - 1 - i];
                let is_loose = self.is_dead[own] || self.is_dead[other];
                *value = match (i == j, is_loose) {
                    (true, true) => 1.0 + dampening_frac,
                    (true, false) => f64::from(source[own]) / self.mean + dampening_frac,
                    (false, true) => 0.0,
                    (false, false) => f64::from(source[other]) / self.mean,
                };
            }
        });
        reversed
    }

    /// L⁻¹ of the reversed damped H, the dampings that failed, and the one that did not.
    fn invert(&self, module: &str, settings: &SolverSettings) -> Result<(Mat<f64>, Vec<f64>, f64)> {
        let mut failed = Vec::new();
        let mut dampening_frac = settings.dampening_frac;
        let mut ladder = settings.dampening_ladder.iter();
        loop {
            let pivot = match self.inverse_of_reversed(dampening_frac) {
                Ok(inverse) => return Ok((inverse, failed, dampening_frac)),
                Err(pivot) => pivot,
            };
            failed.push(dampening_frac);
            dampening_frac = *ladder.next().ok_or_else(|| Error::Singular {
                module: module.to_owned(),
                pivot: self.order[self.order.len() - 1 - pivot],
                dampening_frac,
            })?;
        }
    }

    /// L⁻¹, or the index of the first pivot that is not positive.
    fn inverse_of_reversed(&self, dampening_frac: f64) -> std::result::Result<Mat<f64>, usize> {
        let n = self.order.len();
        let mut lower = self.reversed(dampening_frac);
        let diagonal: Vec<f64> = (0..n).map(|i| lower[(i, i)]).collect();
        let parallelism = Par::rayon(0);
        let scratch = cholesky_in_place_scratch::<f64>(n, parallelism, Spec::default());
        let outcome = cholesky_in_place(
            lower.as_mut(),
            Default::default(),
            parallelism,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Spec::default(),
        );
        if let Err(LltError::NonPositivePivot { index }) = outcome {
            return Err(index);
        }
        // H was summed in f32: a pivot below that rounding error of its diagonal is noise.
        let is_sound = |i: usize| lower[(i, i)].powi(2) > f64::from(f32::EPSILON) * diagonal[i];
        if let Some(index) = (0..n).find(|i| !is_sound(*i)) {
            return Err(index);
        }
        let mut inverse = Mat::<f64>::zeros(n, n);
        invert_lower_triangular(inverse.as_mut(), lower.as_ref(), parallelism);
        Ok(inverse)
    }

    /// P = triu(C U'ᵀ, 1) · diag(`factors`) · U', with U' the unit factor and `factors` = α U_jj².
    fn pull(&self, cross: &Matrix, unit_upper: &Matrix, factors: &[f32]) -> Matrix {
        let n = self.order.len();
        let mut ordered = Matrix::zeros(n, n);
        let rows = ordered.data_mut().par_chunks_mut(n).enumerate();
        rows.for_each(|(i, row)| {
            let source = cross.row(self.order[i]);
            for (value, column) in row.iter_mut().zip(&self.order) {
                *value = (f64::from(source[*column]) / self.mean) as f32;
            }
        });
        let mut shares = Matrix::zeros(n, n);
        let parallelism = Par::rayon(0);
        triangular::matmul(
            shares.as_faer_mut(),
            BlockStructure::StrictTriangularUpper,
            Accum::Replace,
            ordered.as_faer(),
            BlockStructure::Rectangular,
            unit_upper.as_faer().transpose(),
            BlockStructure::UnitTriangularLower,
            1.0,
            parallelism,
        );
        shares.data_mut().par_chunks_mut(n).for_each(|row| {
            row.iter_mut().zip(factors).for_each(|(s, f)| *s *= f);
        });
        let mut pull = ordered;
        pull.data_mut().fill(0.0);
        triangular::matmul(
            pull.as_faer_mut(),
            BlockStructure::StrictTriangularUpper,
            Accum::Replace,
            shares.as_faer(),
            BlockStructure::StrictTriangularUpper,
            unit_upper.as_faer(),
            BlockStructure::UnitTriangularUpper,
            1.0,
            parallelism,
        );
        pull
    }
}

/// The reversed inverse with rows divided by their diagonal, and the squares U_jj².
fn unit_upper(inverse: &Mat<f64>) -> (Matrix, Vec<f64>) {
    let n = inverse.nrows();
    let pivots: Vec<f64> = (0..n).map(|i| inverse[(n - 1 - i, n - 1 - i)]).collect();
    let mut unit = Matrix::zeros(n, n);
    let bands = unit.data_mut().par_chunks_mut(BAND * n).enumerate();
    bands.for_each(|(band, data)| {
        let start = band * BAND;
        for j in start..n {
            let column = inverse.col(n - 1 - j);
            for (k, row) in data.chunks_exact_mut(n).enumerate() {
                let i = start + k;
                if i <= j {
                    row[j] = (column[n - 1 - i] / pivots[i]) as f32;
                }
            }
        }
    });
    let squares = pivots.iter().map(|p| p * p).collect();
    (unit, squares)
}
