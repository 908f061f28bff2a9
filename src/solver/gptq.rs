//! GPTQ and GPTAQ: round column by column, and let the columns still to come make up for it.
//!
//! At column q of the solving order, with e = (w_q − round(w_q)) / U_qq,
//! `w_{>q} ← w_{>q} − e·U_{q,>q} + w_q·P_{q,>q}`. The first term is GPTQ's optimal correction of
//! the rounding error; the second, with α > 0, is GPTAQ's answer to the inputs having drifted from
//! the full-precision stream. w_q is the weight *before* rounding in both of the loops below.
//!
//! Corrections reach the columns of the same `col_block` at once, and all later ones as one matrix
//! product per block. Rows are cut into chunks of fixed size that threads take: the result has the
//! same bits for any number of threads.
//!
//! Source: arXiv:2210.17323 §3.3, arXiv:2504.02692. Differs: the published GPTAQ code uses the
//! rounded weight in the product between blocks, so its result depends on the block size.

use super::{Factor, Grid, Grids, QuantizedWeight, ROW_CHUNK, Solved, SolverSettings};
use super::{assemble, check_weight, layer_loss, quadratic_form};
use crate::plan::Scheme;
use crate::statistics::Statistics;
use crate::{Error, Matrix, Result};
use rayon::prelude::*;

/// Solves one linear: [`Factor::new`], then [`solve`].
///
/// # Errors
/// Those of the two.
pub fn gptq(
    module: &str,
    w: &Matrix,
    statistics: &Statistics,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    let factor = Factor::new(module, statistics, settings)?;
    solve(module, w, &factor, scheme, settings)
}

/// Solves one linear `w [out, in]` with a factor that other linears may share.
///
/// # Errors
/// [`Error::Invalid`] if the group size does not divide the columns, [`Error::Shape`] if the
/// factor belongs to other inputs, [`Error::NotFinite`] for NaN or infinity in the weight.
pub fn solve(
    module: &str,
    w: &Matrix,
    factor: &Factor,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    let group_len = scheme.group_len(module, w.cols())?;
    check_weight(module, w)?;
    if factor.order.len() != w.cols() {
        return Err(Error::Shape {
            module: module.to_owned(),
            expected: vec![w.rows(), factor.order.len()],
            found: vec![w.rows(), w.cols()],
        });
    }
    let plan = Plan {
        factor,
        scheme,
        clip: settings.clip,
        group_len,
        col_block: block_len(settings.col_block, group_len),
        fixed: factor
            .act_order
            .then(|| Grids::fit(w, scheme, settings.clip, group_len)),
    };
    let chunks: Vec<Chunk> = w
        .data()
        .par_chunks(ROW_CHUNK * w.cols())
        .enumerate()
        .map(|(i, rows)| plan.solve_rows(i * ROW_CHUNK, rows))
        .collect();
    let codes = chunks
        .iter()
        .flat_map(|c| c.codes.iter().copied())
        .collect();
    let grids: Vec<Grid> = chunks
        .iter()
        .flat_map(|c| c.grids.iter().copied())
        .collect();
    let weight = assemble(module, scheme, w.rows(), codes, &grids)?;
    Ok(report(w, weight, &factor.hessian))
}

fn report(w: &Matrix, weight: QuantizedWeight, hessian: &Matrix) -> Solved {
    Solved {
        loss: layer_loss(w, &weight.dequantize(), hessian),
        energy: quadratic_form(w.data(), w.cols(), hessian),
        weight,
    }
}

/// Columns per block: near the wish, and never across a group that is fitted on the way.
fn block_len(wish: usize, group_len: usize) -> usize {
    match wish.max(1) / group_len {
        0 => group_len,
        groups => groups * group_len,
    }
}

struct Plan<'a> {
    factor: &'a Factor,
    scheme: Scheme,
    clip: super::Clip,
    group_len: usize,
    col_block: usize,
    /// Grids fitted before the loop, if columns are not taken in the file's order.
    fixed: Option<Grids>,
}

/// Codes `[rows, in]` and grids `[rows, n_groups]` of some rows, in the file's order of columns.
struct Chunk {
    codes: Vec<u8>,
    grids: Vec<Grid>,
}

/// What a block of columns leaves to the columns after it, each `[rows, block]`.
struct Block {
    errors: Matrix,
    before: Matrix,
}

impl Plan<'_> {
    fn solve_rows(&self, first_row: usize, rows: &[f32]) -> Chunk {
        let cols = self.factor.order.len();
        let n = rows.len() / cols;
        let mut w = Matrix::from_fn(n, cols, |i, j| rows[i * cols + self.factor.order[j]]);
        let mut chunk = Chunk {
            codes: vec![0; n * cols],
            grids: match &self.fixed {
                Some(fixed) => fixed.rows(first_row..first_row + n).to_vec(),
                None => vec![Grid::new(1.0, 0, 0); n * cols / self.group_len],
            },
        };
        for start in (0..cols).step_by(self.col_block) {
            let end = (start + self.col_block).min(cols);
            let block = self.solve_block(start, end, &mut w, &mut chunk);
            self.correct_later(start, end, &block, &mut w);
        }
        chunk
    }

    fn solve_block(&self, start: usize, end: usize, w: &mut Matrix, chunk: &mut Chunk) -> Block {
        let cols = w.cols();
        let n_groups = cols / self.group_len;
        let mut block = Block {
            errors: Matrix::zeros(w.rows(), end - start),
            before: Matrix::zeros(w.rows(), end - start),
        };
        for row in 0..w.rows() {
            let weights = &mut w.row_mut(row)[start..end];
            for i in 0..weights.len() {
                let col = self.factor.order[start + i];
                let grid = &mut chunk.grids[row * n_groups + col / self.group_len];
                if self.fixed.is_none() && col % self.group_len == 0 {
                    *grid = Grid::fit(&weights[i..i + self.group_len], self.scheme, self.clip);
                }
                let code = grid.code(weights[i]);
                chunk.codes[row * cols + col] = code;
                let upper = &self.factor.upper.row(start + i)[start..end];
                let before = weights[i];
                let error = (before - grid.weight(code)) / upper[i];
                block.before[(row, i)] = before;
                block.errors[(row, i)] = error;
                let later = weights[i + 1..].iter_mut().zip(&upper[i + 1..]);
                later.for_each(|(w, u)| *w -= error * u);
                if let Some(drift) = &self.factor.drift {
                    let drift = &drift.row(start + i)[start..end];
                    let later = weights[i + 1..].iter_mut().zip(&drift[i + 1..]);
                    later.for_each(|(w, p)| *w += before * p);
                }
            }
        }
        block
    }

    fn correct_later(&self, start: usize, end: usize, block: &Block, w: &mut Matrix) {
        let cols = w.cols();
        if end == cols {
            return;
        }
        let mut add = |amount: f32, left: &Matrix, right: &Matrix| {
            faer::linalg::matmul::matmul(
                w.as_faer_mut()
                    .submatrix_mut(0, end, left.rows(), cols - end),
                faer::Accum::Add,
                left.as_faer(),
                right
                    .as_faer()
                    .submatrix(start, end, end - start, cols - end),
                amount,
                faer::Par::Seq,
            );
        };
        add(-1.0, &block.errors, &self.factor.upper);
        if let Some(drift) = &self.factor.drift {
            add(1.0, &block.before, drift);
        }
    }
}
