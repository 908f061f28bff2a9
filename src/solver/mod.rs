//! Solvers: from a weight and what its inputs look like to codes, scales and zero points.
//!
//! Letters, here and below: W `[out, in]` the weight, Q its quantized form, H = Σ ω u uᵀ the
//! Hessian of the layer problem min ‖(Q − W)·U‖², C = Σ ω (f − u) uᵀ the drift between the two
//! streams, U the upper triangular factor with H⁻¹ = Uᵀ·U.
//!
//! Rows are independent throughout, which is what makes the importance-weighted problem as cheap
//! as the plain one: the weights of tokens are inside H, and every row shares it.

pub mod factor;
pub mod gptq;
pub mod grid;
pub mod reference;
pub mod rtn;

pub use factor::Factor;
pub use gptq::gptq;
pub use grid::{Clip, Grid};
pub use rtn::rtn;

use crate::plan::Scheme;
use crate::{Error, Matrix, Result};
use rayon::prelude::*;

/// Rows that one task works on; fixed, so that results do not depend on the number of threads.
pub(crate) const ROW_CHUNK: usize = 32;

/// What a solver may be told.
#[derive(Clone, Debug, PartialEq)]
pub struct SolverSettings {
    /// λ / mean(diag H): what is added to the diagonal.
    pub dampening_frac: f64,
    /// Tried in turn where H is still not positive definite; every use is reported.
    pub dampening_ladder: Vec<f64>,
    /// Whether columns are taken by falling diag H. Grids are then fitted before, on the columns
    /// of the file's order, so that no output format needs an index of groups.
    pub act_order: bool,
    /// Share of the drift between the streams that is corrected (GPTAQ); 0 is GPTQ.
    pub alpha: f32,
    /// How grids are fitted.
    pub clip: Clip,
    /// Columns whose later corrections are gathered into one product.
    pub col_block: usize,
}

impl Default for SolverSettings {
    fn default() -> Self {
        Self {
            dampening_frac: 0.01,
            dampening_ladder: vec![0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
            act_order: true,
            alpha: 0.0,
            clip: Clip::None,
            col_block: 128,
        }
    }
}

/// A quantized weight: w = (code − zero point) · scale, one scale per row and group of columns.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    scheme: Scheme,
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Matrix,
    zero_points: Vec<u8>,
}

/// What a solver found.
#[derive(Clone, Debug)]
pub struct Solved {
    /// The quantized weight.
    pub weight: QuantizedWeight,
    /// tr((W − Q)·H·(W − Q)ᵀ) with the undamped H: weighted squared output error, summed over
    /// tokens and rows.
    pub loss: f64,
    /// tr(W·H·Wᵀ), what the loss is to be compared with.
    pub energy: f64,
}

impl QuantizedWeight {
    /// Takes `codes [rows, cols]`, `scales [rows, n_groups]` and `zero_points [rows, n_groups]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if their sizes disagree, [`Error::Invalid`] for a code or zero point above
    /// the largest code, or a group size that does not divide; both name `module`.
    pub fn new(
        module: &str,
        scheme: Scheme,
        codes: Vec<u8>,
        scales: Matrix,
        zero_points: Vec<u8>,
    ) -> Result<Self> {
        let rows = scales.rows();
        let cols = codes.len().checked_div(rows).unwrap_or(0);
        let n_groups = cols / scheme.group_len(module, cols)?;
        let found = vec![codes.len(), scales.cols(), zero_points.len()];
        let expected = vec![rows * cols, n_groups, rows * n_groups];
        if found != expected {
            return Err(Error::Shape {
                module: module.to_owned(),
                expected,
                found,
            });
        }
        let values = codes.iter().chain(&zero_points);
        if let Some(value) = values.into_iter().find(|v| **v > scheme.max_code()) {
            return Err(Error::Invalid {
                what: module.to_owned(),
                why: format!("code {value}, at most {} expected", scheme.max_code()),
            });
        }
        Ok(Self {
            scheme,
            rows,
            cols,
            codes,
            scales,
            zero_points,
        })
    }

    /// Number format.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Codes `[rows, cols]`.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Scales `[rows, n_groups]`.
    pub fn scales(&self) -> &Matrix {
        &self.scales
    }

    /// Zero points `[rows, n_groups]`; all 2^(bits−1) if the scheme is symmetric.
    pub fn zero_points(&self) -> &[u8] {
        &self.zero_points
    }

    /// The weight `[rows, cols]` that every reader of the codes will compute with.
    pub fn dequantize(&self) -> Matrix {
        let n_groups = self.scales.cols();
        let group_len = self.cols / n_groups.max(1);
        Matrix::from_fn(self.rows, self.cols, |row, col| {
            let group = row * n_groups + col / group_len;
            let zero = self.zero_points[group];
            let scale = self.scales.data()[group];
            Grid::new(scale, zero, self.scheme.max_code()).weight(self.codes[row * self.cols + col])
        })
    }
}

/// Rows of grids, one per group of columns.
pub(crate) struct Grids {
    /// `[rows, n_groups]`.
    grids: Vec<Grid>,
    n_groups: usize,
}

impl Grids {
    /// Fits the grid of every row and group of `w`, `group_len` columns each.
    pub(crate) fn fit(w: &Matrix, scheme: Scheme, clip: Clip, group_len: usize) -> Self {
        let groups = w.data().par_chunks(group_len);
        Self {
            grids: groups.map(|group| Grid::fit(group, scheme, clip)).collect(),
            n_groups: w.cols() / group_len,
        }
    }

    /// The grids of some rows, row after row.
    pub(crate) fn rows(&self, rows: std::ops::Range<usize>) -> &[Grid] {
        &self.grids[rows.start * self.n_groups..rows.end * self.n_groups]
    }
}

/// Puts codes and grids together; both are ours, so only the caller's module can be at fault.
pub(crate) fn assemble(
    module: &str,
    scheme: Scheme,
    rows: usize,
    codes: Vec<u8>,
    grids: &[Grid],
) -> Result<QuantizedWeight> {
    let n_groups = grids.len().checked_div(rows).unwrap_or(0);
    let scales = grids.iter().map(|grid| grid.scale).collect();
    let scales = Matrix::from_vec(module, rows, n_groups, scales)?;
    let zeros = grids.iter().map(|grid| grid.zero).collect();
    QuantizedWeight::new(module, scheme, codes, scales, zeros)
}

/// tr((W − Q)·H·(W − Q)ᵀ) for `w` and `q` `[out, in]` and the symmetric `hessian [in, in]`.
pub fn layer_loss(w: &Matrix, q: &Matrix, hessian: &Matrix) -> f64 {
    let difference: Vec<f32> = w.data().iter().zip(q.data()).map(|(w, q)| w - q).collect();
    quadratic_form(&difference, w.cols(), hessian)
}

/// tr(X·H·Xᵀ) for the rows of `x`, in a fixed order of sums.
pub(crate) fn quadratic_form(x: &[f32], cols: usize, hessian: &Matrix) -> f64 {
    let chunks = x.par_chunks(ROW_CHUNK * cols.max(1)).map(|rows| {
        let n = rows.len() / cols;
        let mut product = Matrix::zeros(n, cols);
        let rows_view = faer::MatRef::from_row_major_slice(rows, n, cols);
        faer::linalg::matmul::matmul(
            product.as_faer_mut(),
            faer::Accum::Replace,
            rows_view,
            hessian.as_faer(),
            1.0,
            faer::Par::Seq,
        );
        let pairs = rows.iter().zip(product.data());
        pairs
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    });
    chunks.collect::<Vec<_>>().into_iter().sum()
}

pub(crate) fn check_weight(module: &str, w: &Matrix) -> Result<()> {
    match w.count_not_finite() {
        0 => Ok(()),
        count => Err(Error::NotFinite {
            module: module.to_owned(),
            stage: "weights".into(),
            count,
        }),
    }
}

#[cfg(test)]
mod tests;
