//! The factor that drives the column loop: U upper triangular with H⁻¹ = Uᵀ·U.
//!
//! The published chain inverts H from one Cholesky factor and factors the inverse again. With the
//! order of rows and columns reversed (J), one factor and one triangular inverse suffice: from
//! J·H·J = L·Lᵀ follows H = (J·L·J)·(J·L·J)ᵀ with J·L·J upper triangular, so U = J·L⁻¹·J.
//!
//! In f64: H of correlated inputs has condition numbers that f32 cannot hold.

use crate::solver::SolverSettings;
use crate::statistics::Statistics;
use crate::{Error, Matrix, Result};
use faer::linalg::matmul::triangular::{BlockStructure, matmul as triangular_matmul};
use faer::{Accum, Mat, Par};

/// Everything that the linears which share statistics share of the solution.
#[derive(Clone, Debug)]
pub struct Factor {
    /// `order[i]` is the file's column that is solved i-th.
    pub(crate) order: Vec<usize>,
    /// U `[in, in]`, rows and columns in solving order.
    pub(crate) upper: Matrix,
    /// P `[in, in]`, strictly upper: what column i's drift asks of the columns after it, if α > 0.
    pub(crate) drift: Option<Matrix>,
    /// H `[in, in]` undamped, in the file's order.
    pub(crate) hessian: Matrix,
    /// Whether columns are solved by falling diag H.
    pub(crate) act_order: bool,
    /// λ / mean(diag H) that was used.
    pub dampening_frac: f64,
    /// Smaller values that were tried first and left H indefinite.
    pub dampening_steps: Vec<f64>,
    /// Inputs that are always zero. Their weights are rounded to nearest: nothing depends on them
    /// in the calibration data, which is no reason to change what they do elsewhere.
    pub n_dead_columns: usize,
}

impl Factor {
    /// Factors the statistics of `module`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if H or C is not, [`Error::Singular`] if H stays indefinite after the
    /// whole ladder, [`Error::Missing`] if α > 0 without C.
    pub fn new(module: &str, statistics: &Statistics, settings: &SolverSettings) -> Result<Self> {
        let hessian = statistics.hessian();
        let cross = match (settings.alpha != 0.0, statistics.cross()) {
            (true, None) => {
                return Err(Error::Missing {
                    what: "the drift between the streams (C)".into(),
                    place: format!("statistics of {module}, with alpha {}", settings.alpha),
                });
            }
            (true, cross) => cross,
            (false, _) => None,
        };
        let bad = hessian.count_not_finite() + cross.map_or(0, Matrix::count_not_finite);
        if bad > 0 {
            return Err(Error::NotFinite {
                module: module.to_owned(),
                stage: "hessian".into(),
                count: bad,
            });
        }
        let diagonal = Diagonal::of(&hessian);
        let order = match settings.act_order {
            true => diagonal.descending(),
            false => (0..hessian.cols()).collect(),
        };
        let damped = Damped::solve(module, &hessian, &diagonal, &order, settings)?;
        let drift = cross.map(|c| drift(c, &order, &damped.upper, settings.alpha));
        Ok(Self {
            upper: matrix_from_mat(&damped.upper),
            drift,
            order,
            act_order: settings.act_order,
            dampening_frac: damped.dampening_frac,
            dampening_steps: damped.failed,
            n_dead_columns: diagonal.n_dead,
            hessian,
        })
    }
}

/// diag H with dead entries replaced by the mean of the others, so that scaling H changes nothing.
struct Diagonal {
    values: Vec<f64>,
    mean: f64,
    n_dead: usize,
}

impl Diagonal {
    fn of(hessian: &Matrix) -> Self {
        let raw: Vec<f64> = (0..hessian.cols())
            .map(|i| f64::from(hessian[(i, i)]))
            .collect();
        let n_live = raw.iter().filter(|d| **d > 0.0).count();
        let mean = match n_live {
            0 => 1.0,
            n => raw.iter().sum::<f64>() / n as f64,
        };
        let alive = |d: &f64| if *d > 0.0 { *d } else { mean };
        Self {
            values: raw.iter().map(alive).collect(),
            mean,
            n_dead: raw.len() - n_live,
        }
    }

    /// Columns by falling value, earlier columns first among equals.
    fn descending(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.values.len()).collect();
        order.sort_by(|a, b| self.values[*b].total_cmp(&self.values[*a]));
        order
    }
}

struct Damped {
    upper: Mat<f64>,
    dampening_frac: f64,
    failed: Vec<f64>,
}

impl Damped {
    /// Climbs the ladder until the damped H has a Cholesky factor.
    fn solve(
        module: &str,
        hessian: &Matrix,
        diagonal: &Diagonal,
        order: &[usize],
        settings: &SolverSettings,
    ) -> Result<Self> {
        let higher = settings.dampening_ladder.iter().copied();
        let higher = higher.filter(|frac| *frac > settings.dampening_frac);
        let mut failed = Vec::new();
        let mut pivot = 0;
        for frac in std::iter::once(settings.dampening_frac).chain(higher) {
            match inverse_factor(hessian, diagonal, order, frac) {
                Ok(upper) => {
                    return Ok(Self {
                        upper,
                        dampening_frac: frac,
                        failed,
                    });
                }
                Err(at) => {
                    pivot = at;
                    failed.push(frac);
                }
            }
        }
        Err(Error::Singular {
            module: module.to_owned(),
            pivot,
            dampening_frac: failed.last().copied().unwrap_or(settings.dampening_frac),
        })
    }
}

/// U of the damped H in solving order, or the index of a pivot that is not positive.
fn inverse_factor(
    hessian: &Matrix,
    diagonal: &Diagonal,
    order: &[usize],
    dampening_frac: f64,
) -> std::result::Result<Mat<f64>, usize> {
    let n = order.len();
    let lambda = dampening_frac * diagonal.mean;
    let reversed = Mat::from_fn(n, n, |i, j| {
        let (row, col) = (order[n - 1 - i], order[n - 1 - j]);
        match row == col {
            true => diagonal.values[row] + lambda,
            false => f64::from(hessian[(row, col)]),
        }
    });
    let llt = reversed.llt(faer::Side::Lower).map_err(|error| {
        let faer::linalg::cholesky::llt::factor::LltError::NonPositivePivot { index } = error;
        n.saturating_sub(1 + index)
    })?;
    let mut inverse = Mat::zeros(n, n);
    faer::linalg::triangular_inverse::invert_lower_triangular(
        inverse.as_mut(),
        llt.L(),
        Par::rayon(0),
    );
    Ok(Mat::from_fn(n, n, |i, j| {
        if j >= i {
            inverse[(n - 1 - i, n - 1 - j)]
        } else {
            0.0
        }
    }))
}

/// P = α · triu(C·Uᵀ, 1)·U, whose row q is α · C[q, q+1:]·(H[q+1:, q+1:])⁻¹.
///
/// Source: arXiv:2504.02692; the published code's α of 0.25 is the preset's.
fn drift(cross: &Matrix, order: &[usize], upper: &Mat<f64>, alpha: f32) -> Matrix {
    let n = order.len();
    let par = Par::rayon(0);
    let cross = Mat::from_fn(n, n, |i, j| f64::from(cross[(order[i], order[j])]));
    let mut product = Mat::zeros(n, n);
    triangular_matmul(
        product.as_mut(),
        BlockStructure::StrictTriangularUpper,
        Accum::Replace,
        cross.as_ref(),
        BlockStructure::Rectangular,
        upper.transpose(),
        BlockStructure::TriangularLower,
        f64::from(alpha),
        par,
    );
    let mut drift = Mat::zeros(n, n);
    triangular_matmul(
        drift.as_mut(),
        BlockStructure::StrictTriangularUpper,
        Accum::Replace,
        product.as_ref(),
        BlockStructure::StrictTriangularUpper,
        upper.as_ref(),
        BlockStructure::TriangularUpper,
        1.0,
        par,
    );
    matrix_from_mat(&drift)
}

fn matrix_from_mat(mat: &Mat<f64>) -> Matrix {
    Matrix::from_fn(mat.nrows(), mat.ncols(), |i, j| mat[(i, j)] as f32)
}
