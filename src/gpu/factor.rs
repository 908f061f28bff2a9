//! The factor of H on a GPU: [`crate::solver::Factor`] tells what it is.
//!
//! H stays as it was beside R, since losses are asked of it, so a factor takes two squares, three
//! while it is made and one more for P.

use super::Gpu;
use super::array::Array;
use super::kernels::{Ordered, diagonal, divide_columns, fill_reversed, order_square, unit_upper};
use super::products::{View, solve_unit, times_symmetric};
use super::target::DriftMoments;
use crate::solver::{
    Columns, Damped, DampeningUnit, HandedTriangle, SolverSettings, Target, check_moments,
    pivot_noise,
};
use crate::statistics::Statistics;
use crate::{Matrix, Result};
use std::sync::Arc;

/// What the linears that share statistics share of the solution, on a GPU.
#[derive(Debug)]
pub(crate) struct Factor {
    pub(super) gpu: Arc<dyn Gpu>,
    /// Original index of the column solved at each position.
    pub(super) order: Vec<usize>,
    pub(super) order_on_gpu: Array<i32>,
    /// H undamped `[in, in]`, read on and below the diagonal.
    pub(super) hessian: Array<f32>,
    /// R `[in, in]`.
    pub(super) unit_upper: Array<f32>,
    /// D, in units of H's mean diagonal.
    pivots: Vec<f32>,
    /// What corrects the drift; absent without cross moments.
    pub(super) drift: Option<Drift>,
    /// The factor of a part of the samples, which α is found with.
    pub(super) part: Option<Box<Self>>,
    pub(super) step_losses: Vec<f64>,
    pub(super) step_losses_on_gpu: Array<f64>,
    /// What the damping added to the diagonal, in units of H.
    pub(super) damping: f64,
    pub(super) act_order: bool,
    /// The damping that worked, as a fraction of the mean of H's nonzero diagonal entries.
    pub(crate) dampening_frac: f64,
    /// Dampings that failed before it, in order.
    pub(crate) dampening_steps: Vec<f64>,
    /// Columns that no token of positive weight excited.
    pub(crate) n_dead_columns: usize,
}

/// As the CPU's, on the GPU.
#[derive(Debug)]
pub(super) enum Drift {
    /// P for α = 1 in solving order, above the diagonal.
    Pull(Array<f32>),
    Target(DriftMoments),
}

/// H on the GPU, and what is decided about its columns.
struct Ordering {
    gpu: Arc<dyn Gpu>,
    hessian: Array<f32>,
    columns: Columns,
    order: Array<i32>,
    is_dead: Array<u8>,
}

/// Moments that are to be factored: H on the GPU, C and S where they are from.
pub(crate) struct Unfactored {
    ordering: Ordering,
    moments: [Option<Matrix>; 2],
}

/// R and D.
struct Triangle {
    unit_upper: Array<f32>,
    pivots: Vec<f32>,
}

impl Unfactored {
    /// As [`crate::solver::Factor::new`], up to what costs more than looking at every number. The statistics
    /// are given up as they reach the GPU.
    ///
    /// # Errors
    /// As there; [`crate::Error::Device`].
    pub(crate) fn new(
        gpu: &Arc<dyn Gpu>,
        module: &str,
        statistics: Statistics,
        settings: &SolverSettings,
    ) -> Result<Self> {
        settings.check()?;
        check_moments(module, &statistics)?;
        let (hessian, cross, output_cross) = statistics.into_moments();
        Ok(Self {
            ordering: Ordering::new(gpu, module, hessian, settings)?,
            moments: [cross, output_cross],
        })
    }

    /// Makes R and D.
    ///
    /// # Errors
    /// As [`crate::solver::Factor::new`]; [`crate::Error::Device`].
    pub(crate) fn factor(self, module: &str, settings: &SolverSettings) -> Result<Factor> {
        let ordering = &self.ordering;
        let unit = match settings.dampening_unit {
            DampeningUnit::MeanDiagonal => 1.0,
            DampeningUnit::LargestEigenvalue => {
                ordering.largest_eigenvalue()? / ordering.columns.mean
            }
        };
        let mut triangle = None;
        let damped = ordering.columns.damp(module, settings, unit, |damping| {
            Ok(ordering
                .factor(damping)?
                .map(|found| triangle = Some(found)))
        })?;
        let triangle = triangle.expect("a damping that works leaves its triangle");
        Factor::of(self.ordering, (triangle, damped), self.moments, settings)
    }

    /// Takes R and D that somebody else has made of the same moments.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn with_triangle(
        self,
        handed: HandedTriangle,
        settings: &SolverSettings,
    ) -> Result<Factor> {
        let n = self.ordering.n();
        let mut square = vec![0.0; n * n];
        square.iter_mut().step_by(n + 1).for_each(|one| *one = 1.0);
        handed.put_above_diagonal(&mut square);
        let triangle = Triangle {
            unit_upper: Array::of(&self.ordering.gpu, &square)?,
            pivots: handed.pivots,
        };
        let made = (triangle, handed.damped);
        Factor::of(self.ordering, made, self.moments, settings)
    }
}

impl Factor {
    fn of(
        ordering: Ordering,
        (triangle, damped): (Triangle, Damped),
        moments: [Option<Matrix>; 2],
        settings: &SolverSettings,
    ) -> Result<Self> {
        let drift = drift(&ordering, &triangle, settings, moments)?;
        let Ordering {
            gpu,
            hessian,
            columns,
            order,
            ..
        } = ordering;
        let step_losses = columns.step_losses(&triangle.pivots);
        Ok(Self {
            step_losses_on_gpu: Array::of(&gpu, &step_losses)?,
            step_losses,
            order_on_gpu: order,
            hessian,
            unit_upper: triangle.unit_upper,
            pivots: triangle.pivots,
            drift,
            part: None,
            damping: columns.mean * damped.used,
            act_order: settings.act_order,
            dampening_frac: damped.used,
            dampening_steps: damped.tried,
            n_dead_columns: columns.is_dead.iter().filter(|is_dead| **is_dead).count(),
            order: columns.order,
            gpu,
        })
    }

    /// As [`crate::solver::Factor::with_part_factor`].
    pub(crate) fn with_part_factor(mut self, part: Self) -> Self {
        self.part = Some(Box::new(part));
        self
    }

    /// As [`crate::solver::Factor::triangle`].
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(crate) fn triangle(&self) -> Result<HandedTriangle> {
        let damped = Damped {
            tried: self.dampening_steps.clone(),
            used: self.dampening_frac,
        };
        let square = self.unit_upper.values()?;
        Ok(HandedTriangle::of(&square, &self.pivots, damped))
    }

    /// The factor, and that of the part where there is one; of each, whether it is the part's.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&Self, bool)> {
        let part = self.part.as_deref().map(|part| (part, true));
        std::iter::once((self, false)).chain(part)
    }

    /// Number of input columns.
    pub(crate) fn in_features(&self) -> usize {
        self.order.len()
    }

    pub(super) fn pull(&self) -> Option<&Array<f32>> {
        match &self.drift {
            Some(Drift::Pull(pull)) => Some(pull),
            _ => None,
        }
    }

    pub(super) fn drift_moments(&self) -> Option<&DriftMoments> {
        match &self.drift {
            Some(Drift::Target(drift)) => Some(drift),
            _ => None,
        }
    }

    /// x H xᵀ of each row of `x [n_rows, in]`.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub(super) fn quadratic_forms(&self, x: &Array<f32>, n_rows: usize) -> Result<Vec<f64>> {
        let n = self.in_features();
        let mut product = Array::zeros(&self.gpu, n_rows * n)?;
        times_symmetric(&*self.gpu, &mut product, x, &self.hessian, n_rows, n)?;
        super::kernels::row_dots(&self.gpu, x, &product, [n_rows, n])
    }
}

impl Ordering {
    fn new(
        gpu: &Arc<dyn Gpu>,
        module: &str,
        hessian: Matrix,
        settings: &SolverSettings,
    ) -> Result<Self> {
        let on_host: Vec<f32> = (0..hessian.rows()).map(|i| hessian[(i, i)]).collect();
        let columns = Columns::of_diagonal(module, &on_host, settings)?;
        let order: Vec<i32> = columns.order.iter().map(|column| *column as i32).collect();
        let is_dead: Vec<u8> = columns.is_dead.iter().map(|d| u8::from(*d)).collect();
        Ok(Self {
            hessian: Array::of_matrix(gpu, &hessian)?,
            order: Array::of(gpu, &order)?,
            is_dead: Array::of(gpu, &is_dead)?,
            columns,
            gpu: gpu.clone(),
        })
    }

    fn n(&self) -> usize {
        self.columns.order.len()
    }

    /// R and D with this damping; otherwise the first pivot that is not sound, in reversed order.
    fn factor(&self, damping: f64) -> Result<std::result::Result<Triangle, usize>> {
        let (gpu, n) = (&self.gpu, self.n());
        let ordered = Ordered {
            order: &self.order,
            is_dead: &self.is_dead,
            mean: self.columns.mean,
        };
        let mut square = Array::zeros(gpu, n * n)?;
        fill_reversed(&**gpu, &mut square, &self.hessian, &ordered, damping)?;
        let before = diagonal(gpu, &square, n)?;
        // What is the lower triangle by rows is the upper one by columns.
        // SAFETY: the square is [n, n].
        if let Err(pivot) = unsafe { gpu.potrf_upper(n, square.place())? } {
            return Ok(Err(pivot));
        }
        let roots = diagonal(gpu, &square, n)?;
        let noise = pivot_noise(n);
        let is_sound = |i: &usize| roots[*i].powi(2) > noise * before[*i];
        if let Some(pivot) = (0..n).find(|i| !is_sound(i)) {
            return Ok(Err(pivot));
        }
        let mut unit = Array::zeros(gpu, n * n)?;
        unit_upper(&**gpu, &mut unit, &square, n)?;
        Ok(Ok(Triangle {
            unit_upper: unit,
            pivots: roots.iter().rev().map(|root| root * root).collect(),
        }))
    }

    /// H's largest eigenvalue by power iteration, as on the CPU but with products in f32.
    fn largest_eigenvalue(&self) -> Result<f64> {
        const N_STEPS: usize = 30;
        let n = self.n();
        let mut vector = vec![(1.0 / (n as f64).sqrt()) as f32; n];
        let mut value = 0.0;
        for _ in 0..N_STEPS {
            let from = Array::of(&self.gpu, &vector)?;
            let mut product = Array::zeros(&self.gpu, n)?;
            times_symmetric(&*self.gpu, &mut product, &from, &self.hessian, 1, n)?;
            let product = product.values()?;
            value = product
                .iter()
                .map(|v| f64::from(*v).powi(2))
                .sum::<f64>()
                .sqrt();
            if !(value > 0.0 && value.is_finite()) {
                return Ok(value);
            }
            vector = product
                .iter()
                .map(|v| (f64::from(*v) / value) as f32)
                .collect();
        }
        Ok(value)
    }
}

/// What corrects the drift, of C and S.
fn drift(
    ordering: &Ordering,
    triangle: &Triangle,
    settings: &SolverSettings,
    [cross, output_cross]: [Option<Matrix>; 2],
) -> Result<Option<Drift>> {
    let gpu = &ordering.gpu;
    match (settings.target, cross, output_cross) {
        (_, None, None) | (Target::Pull, None, _) => Ok(None),
        (Target::Pull, Some(cross), _) => {
            let cross = Array::of_matrix(gpu, &cross)?;
            Ok(Some(Drift::Pull(pull(ordering, triangle, cross)?)))
        }
        (_, cross, output_cross) => Ok(Some(Drift::Target(DriftMoments {
            cross: cross.map(|c| Array::of_matrix(gpu, &c)).transpose()?,
            output_cross,
            pivots: Array::of(gpu, &triangle.pivots)?,
            mean: ordering.columns.mean,
        }))),
    }
}

/// P for α = 1: X Rᵀ = C, X without what is not above its diagonal, divided by D, P R = X. All rows
/// at once: what the CPU leaves out, columns before a row's own, comes to zero by itself.
fn pull(ordering: &Ordering, triangle: &Triangle, cross: Array<f32>) -> Result<Array<f32>> {
    let (gpu, n) = (&ordering.gpu, ordering.n());
    let mut pull = Array::zeros(gpu, n * n)?;
    order_square(
        &**gpu,
        &mut pull,
        &cross,
        &ordering.order,
        ordering.columns.mean,
    )?;
    drop(cross);
    let (unit, rows) = (
        View::all(&triangle.unit_upper, n, n),
        View::all(&pull, n, n),
    );
    solve_unit(&**gpu, unit, true, rows)?;
    let pivots = Array::of(gpu, &triangle.pivots)?;
    divide_columns(&**gpu, &mut pull, &pivots, n, true)?;
    solve_unit(&**gpu, unit, false, rows)?;
    Ok(pull)
}
