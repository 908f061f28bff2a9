//! The same solution by definition: f64, no blocks, no shared factor, every inverse taken anew.
//!
//! It exists to be read and to be compared with; it is far too slow for a real layer.

use super::{Grid, SolverSettings};
use crate::plan::Scheme;
use crate::{Matrix, Result};
use faer::prelude::Solve;
use faer::{Mat, Side};

/// A dense f64 matrix as rows.
pub type Rows = Vec<Vec<f64>>;

/// What the reference found: codes `[out, in]` in the file's order, and Σ ((w − q) / U_qq)².
#[derive(Clone, Debug)]
pub struct ReferenceSolution {
    /// Codes.
    pub codes: Vec<Vec<u8>>,
    /// Dequantized weights.
    pub weights: Rows,
    /// Each weight as it stood just before it was rounded.
    pub before: Rows,
    /// The grid that each weight was rounded to.
    pub grids: Vec<Vec<Grid>>,
    /// The loss that the column loop gathers; without drift it is tr(ΔW·H·ΔWᵀ), H damped.
    pub gathered_loss: f64,
}

/// Solves `w [out, in]` for the damped `hessian` and, if α is not zero, the drift `cross`.
///
/// With the columns still free F after column q: removing q from the problem leaves the inverse of
/// the free part of H, the rounding error is corrected by −(w_q − r_q)·(H_F⁻¹)_{q,·}/(H_F⁻¹)_{qq},
/// and the drift of q is answered by α·w_q·C_{q,F}·H_F⁻¹.
///
/// # Errors
/// As [`super::gptq()`] for a group size that does not divide.
pub fn solve(
    w: &Rows,
    hessian: &Rows,
    cross: Option<&Rows>,
    order: &[usize],
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<ReferenceSolution> {
    let cols = order.len();
    let group_len = scheme.group_len("reference", cols)?;
    let mut solution = ReferenceSolution {
        codes: vec![vec![0; cols]; w.len()],
        weights: w.clone(),
        before: w.clone(),
        grids: vec![vec![Grid::new(1.0, 0, 0); cols]; w.len()],
        gathered_loss: 0.0,
    };
    for (row, original) in w.iter().enumerate() {
        let mut now = original.clone();
        let mut grid = Grid::new(1.0, 0, 0);
        for (step, &col) in order.iter().enumerate() {
            let group = col / group_len * group_len..(col / group_len + 1) * group_len;
            if settings.act_order {
                grid = fit(&original[group], scheme, settings);
            } else if col % group_len == 0 {
                grid = fit(&now[group], scheme, settings);
            }
            let code = code_of(grid, now[col]);
            let rounded = (f64::from(code) - f64::from(grid.zero)) * f64::from(grid.scale);
            solution.codes[row][col] = code;
            solution.before[row][col] = now[col];
            solution.grids[row][col] = grid;
            solution.weights[row][col] = rounded;

            let with_col = inverse(hessian, &order[step..]);
            let (error, curvature) = (now[col] - rounded, with_col[0][0]);
            solution.gathered_loss += error * error / curvature;
            let before = now[col];
            for (i, &later) in order[step..].iter().enumerate().skip(1) {
                now[later] -= error * with_col[0][i] / curvature;
            }
            if let (Some(cross), true) = (cross, step + 1 < cols) {
                let free = &order[step + 1..];
                let inverse = inverse(hessian, free);
                for (j, &later) in free.iter().enumerate() {
                    let pull = free
                        .iter()
                        .zip(&inverse)
                        .map(|(&k, row)| cross[col][k] * row[j]);
                    now[later] += f64::from(settings.alpha) * before * pull.sum::<f64>();
                }
            }
        }
    }
    Ok(solution)
}

fn fit(weights: &[f64], scheme: Scheme, settings: &SolverSettings) -> Grid {
    let weights: Vec<f32> = weights.iter().map(|w| *w as f32).collect();
    Grid::fit(&weights, scheme, settings.clip)
}

fn code_of(grid: Grid, weight: f64) -> u8 {
    let code = (weight / f64::from(grid.scale)).round_ties_even() + f64::from(grid.zero);
    let highest = f64::from(grid.code(f32::MAX));
    code.clamp(0.0, highest) as u8
}

/// The inverse of the part of a symmetric positive definite matrix that `kept` names.
fn inverse(matrix: &Rows, kept: &[usize]) -> Rows {
    let n = kept.len();
    let part = Mat::from_fn(n, n, |i, j| matrix[kept[i]][kept[j]]);
    let factor = part
        .llt(Side::Lower)
        .expect("a damped Hessian is positive definite");
    let inverse = factor.solve(Mat::<f64>::identity(n, n));
    (0..n)
        .map(|i| (0..n).map(|j| inverse[(i, j)]).collect())
        .collect()
}

/// A matrix in f64.
pub fn rows_from_matrix(matrix: &Matrix) -> Rows {
    let row = |i: usize| matrix.row(i).iter().map(|v| f64::from(*v)).collect();
    (0..matrix.rows()).map(row).collect()
}
