//! Products of row-major matrices by routines that want columns one after the other: to them a
//! row-major matrix is its own transpose.

use super::array::{Array, Place};
use super::{Gemm, Gpu, Trsm};
use crate::Result;

/// A row-major matrix somewhere in an array.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    place: Place,
    rows: usize,
    cols: usize,
    /// How far the next row is.
    stride: usize,
}

impl View {
    /// All of `array`, `[rows, cols]`.
    pub(super) fn all(array: &Array<f32>, rows: usize, cols: usize) -> Self {
        assert!(rows * cols <= array.len(), "the matrix lies in the array");
        Self {
            place: array.place(),
            rows,
            cols,
            stride: cols,
        }
    }

    /// A matrix at `place`, which somebody answers for.
    pub(super) fn at(place: Place, rows: usize, cols: usize) -> Self {
        Self {
            place,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Some rows and columns of it.
    pub(super) fn part(self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Self {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "the part lies in the matrix"
        );
        let first = rows.start * self.stride + cols.start;
        Self {
            place: Place(self.place.0 + (first * size_of::<f32>()) as u64),
            rows: rows.len(),
            cols: cols.len(),
            stride: self.stride,
        }
    }

    fn operand(self) -> (Place, usize) {
        (self.place, self.stride.max(1))
    }
}

/// `out` ← `alpha` · op(`left`) `right` + `beta` · `out`, op transposing `left` where it is told to.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn product(
    gpu: &dyn Gpu,
    out: View,
    (left, is_left_transposed): (View, bool),
    right: View,
    (alpha, beta): (f32, f32),
) -> Result<()> {
    let (rows, inner) = match is_left_transposed {
        true => (left.cols, left.rows),
        false => (left.rows, left.cols),
    };
    let fits = [rows, inner, right.cols] == [out.rows, right.rows, out.cols];
    assert!(fits, "the shapes of a product fit");
    if out.rows == 0 || out.cols == 0 || inner == 0 {
        return Ok(());
    }
    let call = Gemm {
        is_transposed: [false, is_left_transposed],
        m: out.cols,
        n: out.rows,
        k: inner,
        alpha,
        a: right.operand(),
        b: left.operand(),
        beta,
        c: out.operand(),
        is_bf16: false,
    };
    // SAFETY: the views lie in their arrays, and their shapes fit.
    unsafe { gpu.gemm(call) }
}

/// The rows of `x` ← those of Y with Y R = X, or Y Rᵀ = X where R `is_transposed`.
///
/// Shapes: `unit [n, n]` is R, read above its diagonal; `x [rows, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn solve_unit(gpu: &dyn Gpu, unit: View, is_transposed: bool, x: View) -> Result<()> {
    assert!(
        unit.rows == x.cols && unit.cols == x.cols,
        "the shapes of a solution fit"
    );
    if x.rows == 0 || x.cols == 0 {
        return Ok(());
    }
    let call = Trsm {
        is_transposed,
        m: x.cols,
        n: x.rows,
        a: unit.operand(),
        b: x.operand(),
    };
    // SAFETY: the views lie in their arrays, and their shapes fit.
    unsafe { gpu.trsm(call) }
}

/// `out` ← `rows` · H, of which the lower triangle is read.
///
/// Shapes: `out` and `rows` `[n_rows, n]`, `hessian_lower [n, n]`.
///
/// # Errors
/// [`crate::Error::Device`].
pub(super) fn times_symmetric(
    gpu: &dyn Gpu,
    out: &mut Array<f32>,
    rows: &Array<f32>,
    hessian_lower: &Array<f32>,
    n_rows: usize,
    n: usize,
) -> Result<()> {
    let fits = out.len() >= n_rows * n && rows.len() >= n_rows * n && hessian_lower.len() >= n * n;
    assert!(fits, "the shapes of a product fit");
    if n_rows == 0 || n == 0 {
        return Ok(());
    }
    let (a, b, c) = (hessian_lower.place(), rows.place(), out.place());
    // SAFETY: the arrays are as large as that.
    unsafe { gpu.symm_upper(n, n_rows, a, b, c) }
}
