//! A dense row-major f32 matrix: the one carrier of weights, activations and statistics between
//! modules. It owns plain memory, so every numeric library can borrow it; heavy products go
//! through [`faer`] views, which cost nothing to make.

use crate::{Error, Result};

/// Row-major `[rows, cols]` matrix of f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![0.0; rows * cols],
        }
    }

    /// Takes `data`, which holds the rows one after the other.
    ///
    /// # Errors
    /// [`Error::Shape`] naming `name` if `data` has not `rows * cols` values.
    pub fn from_vec(name: &str, rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        if rows.checked_mul(cols) != Some(data.len()) {
            return Err(Error::Shape {
                module: name.to_owned(),
                expected: vec![rows, cols],
                found: vec![data.len()],
            });
        }
        Ok(Self { rows, cols, data })
    }

    /// A matrix whose entry `(row, col)` is `f(row, col)`.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> f32) -> Self {
        let data = (0..rows * cols).map(|i| f(i / cols, i % cols)).collect();
        Self { rows, cols, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row after row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All values for writing, row after row.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The values, giving up the matrix.
    pub fn into_vec(self) -> Vec<f32> {
        self.data
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// One row for writing.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// A copy of some rows.
    pub(crate) fn copy_rows(&self, rows: std::ops::Range<usize>) -> Self {
        Self {
            rows: rows.len(),
            cols: self.cols,
            data: self.data[rows.start * self.cols..rows.end * self.cols].to_vec(),
        }
    }

    /// A borrowed view for faer's products and factorizations.
    pub fn as_faer(&self) -> faer::MatRef<'_, f32> {
        faer::MatRef::from_row_major_slice(&self.data, self.rows, self.cols)
    }

    /// A mutable borrowed view for faer.
    pub fn as_faer_mut(&mut self) -> faer::MatMut<'_, f32> {
        faer::MatMut::from_row_major_slice_mut(&mut self.data, self.rows, self.cols)
    }

    /// How many values are NaN or infinite.
    pub fn count_not_finite(&self) -> usize {
        self.data.iter().filter(|v| !v.is_finite()).count()
    }
}

impl std::ops::Index<(usize, usize)> for Matrix {
    type Output = f32;
    fn index(&self, (row, col): (usize, usize)) -> &f32 {
        &self.data[row * self.cols + col]
    }
}

impl std::ops::IndexMut<(usize, usize)> for Matrix {
    fn index_mut(&mut self, (row, col): (usize, usize)) -> &mut f32 {
        &mut self.data[row * self.cols + col]
    }
}
