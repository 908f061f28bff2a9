//! From H to the order of columns and the coefficients that pass a column's error on.
//!
//! With H damped and its columns in solving order, H = R D Rᵀ, R unit upper triangular and D
//! diagonal. Column q passes (t_q − q_q) · R_qj on to column j > q, t_q being what it should have
//! become. GPTQ is written with H⁻¹ = UᵀU and passes −(v_q − q_q) / U_qq · U_qj on, v_q being the
//! value that was rounded. As U is the inverse of R √D, the one follows from the other by solving
//! for v, in any order of columns and for any rounding; R costs half as much, and R and D are all
//! that is needed. R is invariant under H → cH. [`super::triangle`] makes it. H is divided by its
//! mean diagonal first, so scaling it by a power of two changes no bit.
//!
//! Dead columns (a zero on H's diagonal) are cut loose from all others and get the mean diagonal:
//! they neither give nor take errors, and so end up rounded to nearest. The reference sets such
//! weights to zero instead, and thereby wipes out a layer whose token weights vanish.
//!
//! Source: IST-DASLab/gptq@2d65066 gptq.py; arXiv:2307.13304 §3 for R and D.

use super::drift::{Triangle, pull};
use super::triangle::Halves;
use super::{DampeningUnit, SolverSettings, Target, target};
use crate::statistics::Statistics;
use crate::{Error, Matrix, Result};
use faer::MatRef;
use serde::{Deserialize, Serialize};

/// What the linears that share statistics share of the solution: how columns pass on errors.
pub struct Factor {
    /// Original index of the column solved at each position.
    pub(crate) order: Vec<usize>,
    /// `[in, in]`: H undamped, in original order, on and below the diagonal; above it R, in solving
    /// order.
    square: Matrix,
    /// D.
    pivots: Vec<f32>,
    /// What C and S were made into; absent without cross moments.
    drift: Option<Drift>,
    /// The factor of a part of the samples, which α is found with.
    pub(super) part: Option<Box<Self>>,
    /// What a squared error of one adds to the damped loss at each position, in units of H:
    /// D_q, zero for dead columns.
    pub(crate) step_losses: Vec<f64>,
    /// What the damping added to the diagonal, in units of H.
    pub(crate) damping: f64,
    pub(crate) act_order: bool,
    /// The damping that worked, as a fraction of the mean of H's nonzero diagonal entries.
    pub dampening_frac: f64,
    /// Dampings that failed before it, in order.
    pub dampening_steps: Vec<f64>,
    /// Columns that no token of positive weight excited. Their weights are rounded to nearest.
    pub n_dead_columns: usize,
}

/// What factoring comes to, without the moments that it was made of: R and D in solving order, D in units
/// of H's mean diagonal.
pub(crate) struct HandedTriangle {
    /// Of R what is right of the diagonal, row after row.
    pub(crate) unit_upper: Vec<f32>,
    pub(crate) pivots: Vec<f32>,
    pub(crate) damped: Damped,
}

impl HandedTriangle {
    /// R of a square that has it above its diagonal.
    pub(crate) fn of(square: &[f32], pivots: &[f32], damped: Damped) -> Self {
        let rows = square.chunks_exact(pivots.len().max(1)).enumerate();
        Self {
            unit_upper: rows.flat_map(|(i, row)| &row[i + 1..]).copied().collect(),
            pivots: pivots.to_vec(),
            damped,
        }
    }

    /// Puts R above the diagonal of a square as large.
    pub(crate) fn put_above_diagonal(&self, square: &mut [f32]) {
        let mut rest = &self.unit_upper[..];
        let rows = square.chunks_exact_mut(self.pivots.len().max(1));
        for (i, row) in rows.enumerate() {
            let right = &mut row[i + 1..];
            let (own, others) = rest.split_at(right.len());
            right.copy_from_slice(own);
            rest = others;
        }
    }
}

/// Moments that are to be factored.
pub(crate) struct Unfactored {
    hessian: OrderedHessian,
    cross: Option<Matrix>,
    output_cross: Option<Matrix>,
}

impl Unfactored {
    /// As [`Factor::new`], up to what costs more than looking at every number.
    ///
    /// # Errors
    /// As there, but for pivots.
    pub(crate) fn new(
        module: &str,
        statistics: Statistics,
        settings: &SolverSettings,
    ) -> Result<Self> {
        settings.check()?;
        check_moments(module, &statistics)?;
        let (hessian_lower, cross, output_cross) = statistics.into_moments();
        Ok(Self {
            hessian: OrderedHessian::new(module, hessian_lower, settings)?,
            cross,
            output_cross,
        })
    }

    /// Makes R and D.
    ///
    /// # Errors
    /// [`Error::Singular`] as [`Factor::new`].
    pub(crate) fn factor(mut self, module: &str, settings: &SolverSettings) -> Result<Factor> {
        let damped = self.hessian.factor(module, settings)?;
        let OrderedHessian {
            halves, columns, ..
        } = self.hessian;
        let (square, pivots) = halves.into_unit_upper();
        let drift = [self.cross, self.output_cross];
        Ok(Factor::of(
            square,
            columns,
            (pivots, damped),
            drift,
            settings,
        ))
    }

    /// Takes R and D that somebody else has made of the same moments.
    pub(crate) fn with_triangle(
        self,
        triangle: HandedTriangle,
        settings: &SolverSettings,
    ) -> Factor {
        let OrderedHessian {
            halves, columns, ..
        } = self.hessian;
        let mut square = halves.into_hessian();
        triangle.put_above_diagonal(square.data_mut());
        let made = (triangle.pivots, triangle.damped);
        let drift = [self.cross, self.output_cross];
        Factor::of(square, columns, made, drift, settings)
    }
}

/// What corrects the drift.
enum Drift {
    /// P `[in, in]` for α = 1 in solving order, meaningful above the diagonal ([`super::drift`]).
    Pull(Matrix),
    /// What the target is made with.
    Target(target::DriftMoments),
}

impl Factor {
    /// Of H and R in one square, D and what H's diagonal has decided.
    fn of(
        square: Matrix,
        columns: Columns,
        (pivots, damped): (Vec<f32>, Damped),
        [cross, output_cross]: [Option<Matrix>; 2],
        settings: &SolverSettings,
    ) -> Self {
        let mean = columns.mean;
        let triangle = Triangle {
            unit_upper: &square,
            pivots: &pivots,
            order: &columns.order,
            mean,
        };
        let drift = match (settings.target, cross, output_cross) {
            (_, None, None) | (Target::Pull, None, _) => None,
            (Target::Pull, Some(cross), _) => Some(Drift::Pull(pull(cross, &triangle))),
            (_, cross, output_cross) => Some(Drift::Target(target::DriftMoments {
                cross,
                output_cross,
                pivots: pivots.clone(),
                mean,
            })),
        };
        Self {
            step_losses: columns.step_losses(&pivots),
            damping: mean * damped.used,
            drift,
            part: None,
            square,
            pivots,
            act_order: settings.act_order,
            dampening_frac: damped.used,
            dampening_steps: damped.tried,
            n_dead_columns: columns.is_dead.iter().filter(|is_dead| **is_dead).count(),
            order: columns.order,
        }
    }

    /// Factors the damped H, trying the settings' dampings one after the other. The statistics are
    /// used up: nothing as large as H is made beside them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a setting outside its range; [`Error::Singular`] if no damping makes
    /// H positive definite, or H is zero because no token had a positive weight: such a layer is
    /// never rounded or zeroed on the quiet; [`Error::NotFinite`].
    pub fn new(module: &str, statistics: Statistics, settings: &SolverSettings) -> Result<Self> {
        Unfactored::new(module, statistics, settings)?.factor(module, settings)
    }

    /// The same, with α of each row found by how well what a part of the samples asks for serves the
    /// others. `part` are the statistics of about half of them.
    ///
    /// # Errors
    /// As [`Factor::new`], about the part.
    pub fn with_part(
        self,
        module: &str,
        part: Statistics,
        settings: &SolverSettings,
    ) -> Result<Self> {
        let part = Self::new(module, part, settings)?;
        Ok(self.with_part_factor(part))
    }

    /// As [`Factor::with_part`], of the part's factor.
    pub(crate) fn with_part_factor(mut self, part: Self) -> Self {
        self.part = Some(Box::new(part));
        self
    }

    /// What others need to have this factor who have its moments.
    pub(crate) fn triangle(&self) -> HandedTriangle {
        let damped = Damped {
            tried: self.dampening_steps.clone(),
            used: self.dampening_frac,
        };
        HandedTriangle::of(self.square.data(), &self.pivots, damped)
    }

    /// The factor, and that of the part where there is one; of each, whether it is the part's.
    pub fn all(&self) -> impl Iterator<Item = (&Self, bool)> {
        let part = self.part.as_deref().map(|part| (part, true));
        std::iter::once((self, false)).chain(part)
    }

    /// Number of input columns.
    pub fn in_features(&self) -> usize {
        self.order.len()
    }

    /// R, to be read above the diagonal only.
    pub(crate) fn unit_upper(&self) -> MatRef<'_, f32> {
        self.square.as_faer()
    }

    /// One row of [`Factor::unit_upper`] right of the diagonal.
    pub(crate) fn unit_row(&self, row: usize) -> &[f32] {
        &self.square.row(row)[row + 1..]
    }

    /// P for α = 1, to be read above the diagonal only; absent without cross moments, and where the
    /// target is another.
    pub(crate) fn pull(&self) -> Option<&Matrix> {
        match &self.drift {
            Some(Drift::Pull(pull)) => Some(pull),
            _ => None,
        }
    }

    /// What the target is made with; absent without cross moments, and where they were made into a pull.
    pub(super) fn drift_moments(&self) -> Option<&target::DriftMoments> {
        match &self.drift {
            Some(Drift::Target(drift)) => Some(drift),
            _ => None,
        }
    }

    /// What a squared rounding error adds to the loss when all later columns have made up for it,
    /// by original column: D in units of its greatest, to a power; zero for dead columns.
    pub(crate) fn column_weights(&self, power: f32) -> Vec<f32> {
        column_weights(&self.order, &self.step_losses, power)
    }

    /// H undamped in original order, to be read on and below the diagonal only.
    pub(crate) fn hessian_lower(&self) -> &Matrix {
        &self.square
    }
}

/// As [`Factor::column_weights`], from what a squared error adds at each position.
pub(crate) fn column_weights(order: &[usize], step_losses: &[f64], power: f32) -> Vec<f32> {
    let mut weights = vec![0.0; order.len()];
    let greatest = step_losses.iter().copied().fold(0.0, f64::max);
    for (column, loss) in order.iter().zip(step_losses) {
        weights[*column] = match *loss > 0.0 {
            true => (loss / greatest).powf(power.into()) as f32,
            false => 0.0,
        };
    }
    weights
}

pub(crate) fn check_moments(module: &str, statistics: &Statistics) -> Result<()> {
    let moments = [
        ("hessian", Some(statistics.hessian_lower())),
        ("cross moments", statistics.cross()),
        ("cross moments of the output", statistics.output_cross()),
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

/// What H's diagonal decides.
pub(crate) struct Columns {
    /// Original index of the column solved at each position.
    pub(crate) order: Vec<usize>,
    /// By original column.
    pub(crate) is_dead: Vec<bool>,
    /// The mean of the nonzero entries, which H is divided by.
    pub(crate) mean: f64,
}

impl Columns {
    /// # Errors
    /// [`Error::Singular`] if no token had a positive weight.
    pub(crate) fn of_diagonal(
        module: &str,
        diagonal: &[f32],
        settings: &SolverSettings,
    ) -> Result<Self> {
        let live = diagonal.iter().filter(|d| **d != 0.0);
        let mean = live.clone().map(|d| f64::from(*d)).sum::<f64>() / live.count() as f64;
        if mean.is_nan() || mean <= 0.0 {
            return Err(Error::Singular {
                module: module.to_owned(),
                pivot: 0,
                dampening_frac: settings.dampening_frac,
            });
        }
        let mut order: Vec<usize> = (0..diagonal.len()).collect();
        if settings.act_order {
            order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
        }
        Ok(Self {
            is_dead: diagonal.iter().map(|d| *d == 0.0).collect(),
            mean,
            order,
        })
    }

    /// What a squared error of one adds to the damped loss at each position, from the pivots there.
    pub(crate) fn step_losses(&self, pivots: &[f32]) -> Vec<f64> {
        let step_loss = |(column, pivot): (&usize, &f32)| match self.is_dead[*column] {
            true => 0.0,
            false => self.mean * f64::from(*pivot),
        };
        self.order.iter().zip(pivots).map(step_loss).collect()
    }

    /// Factors with the first damping that works; `attempt` gives the first pivot that is not sound,
    /// in reversed order. `unit` is what dampings are fractions of, in units of the mean.
    ///
    /// # Errors
    /// [`Error::Singular`] if none does; those of `attempt`.
    pub(crate) fn damp(
        &self,
        module: &str,
        settings: &SolverSettings,
        unit: f64,
        mut attempt: impl FnMut(f64) -> Result<std::result::Result<(), usize>>,
    ) -> Result<Damped> {
        let mut tried = Vec::new();
        let mut used = settings.dampening_frac * unit;
        let mut ladder = settings.dampening_ladder.iter();
        loop {
            let pivot = match attempt(used)? {
                Ok(()) => return Ok(Damped { tried, used }),
                Err(pivot) => pivot,
            };
            tried.push(used);
            used = unit
                * *ladder.next().ok_or_else(|| Error::Singular {
                    module: module.to_owned(),
                    pivot: self.order[self.order.len() - 1 - pivot],
                    dampening_frac: used,
                })?;
        }
    }
}

/// Dampings as fractions of the mean.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Damped {
    /// Those that failed, in order.
    pub(crate) tried: Vec<f64>,
    /// The one that worked.
    pub(crate) used: f64,
}

/// The part of the mean diagonal below which a pivot of a matrix of `n` columns is noise: it is a
/// difference of up to n terms of the size of its diagonal, each with a rounding error.
pub(crate) fn pivot_noise(n: usize) -> f32 {
    f32::EPSILON * (n as f32).sqrt()
}

/// H seen in solving order and in units of its mean diagonal.
struct OrderedHessian {
    halves: Halves,
    columns: Columns,
    /// What dampings are fractions of, in units of the mean.
    unit: f64,
}

impl OrderedHessian {
    fn new(module: &str, hessian_lower: Matrix, settings: &SolverSettings) -> Result<Self> {
        let halves = Halves::new(hessian_lower);
        let columns = Columns::of_diagonal(module, halves.diagonal(), settings)?;
        let unit = match settings.dampening_unit {
            DampeningUnit::MeanDiagonal => 1.0,
            DampeningUnit::LargestEigenvalue => halves.largest_eigenvalue() / columns.mean,
        };
        Ok(Self {
            halves,
            columns,
            unit,
        })
    }

    /// Sets the triangle to the reversed damped H.
    fn fill(halves: &mut Halves, columns: &Columns, dampening_frac: f64) {
        let (is_dead, mean) = (&columns.is_dead, columns.mean);
        let reversed: Vec<usize> = columns.order.iter().rev().copied().collect();
        halves.fill(&reversed, |a, b, value| {
            let value = match (a == b, is_dead[a] || is_dead[b]) {
                (true, true) => 1.0 + dampening_frac,
                (true, false) => f64::from(value) / mean + dampening_frac,
                (false, true) => 0.0,
                (false, false) => f64::from(value) / mean,
            };
            value as f32
        });
    }

    fn factor(&mut self, module: &str, settings: &SolverSettings) -> Result<Damped> {
        let Self {
            halves,
            columns,
            unit,
        } = self;
        columns.damp(module, settings, *unit, |dampening_frac| {
            Self::fill(halves, columns, dampening_frac);
            Ok(halves.factor())
        })
    }
}
