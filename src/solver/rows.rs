//! Rows of a linear, solved as if all were.
//!
//! Rows never meet, so some of them can be solved here and the others elsewhere. Products of
//! matrices of other heights may round otherwise, so heights of chunks follow from the rows of the
//! whole linear, and shares begin where chunks do ([`ROW_UNIT`]): the bits are those of all rows
//! solved together.

use crate::Matrix;
use std::borrow::Cow;
use std::ops::Range;

/// Shares of a linear begin at multiples of so many rows.
pub const ROW_UNIT: usize = 128;

/// Some rows of a weight `[out, in]`.
pub(super) struct Rows<'a> {
    /// They themselves.
    pub(super) w: Cow<'a, Matrix>,
    /// The first one's place in the linear.
    pub(super) first: usize,
    /// How many the linear has.
    n_all: usize,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// If `rows` are not rows of `w`, or begin elsewhere than a share may.
    pub(super) fn new(w: &'a Matrix, rows: Range<usize>) -> Self {
        assert!(rows.start.is_multiple_of(ROW_UNIT) && rows.end <= w.rows());
        let own = match rows.len() == w.rows() {
            true => Cow::Borrowed(w),
            false => Cow::Owned(w.copy_rows(rows.clone())),
        };
        Self {
            w: own,
            first: rows.start,
            n_all: w.rows(),
        }
    }

    /// Rows of a chunk, at least `least`: enough chunks for the threads of most machines, of a
    /// height that divides [`ROW_UNIT`].
    pub(super) fn chunk_height(&self, least: usize) -> usize {
        let height = self.n_all.div_ceil(16).next_power_of_two();
        height.clamp(least, ROW_UNIT)
    }
}
