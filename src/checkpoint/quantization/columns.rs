//! Which column of a weight belongs to which group.
//!
//! GPTQ with `desc_act` and without `static_groups` makes groups of columns as it visits them, so
//! that a group's columns lie anywhere; `g_idx` has the group of each. Such a weight is read as one
//! whose columns were brought together, and put back when it is dequantized.

use crate::Matrix;

/// Where columns are that a weight has group by group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Columns {
    /// Groups are runs of neighbouring columns.
    InOrder,
    /// Place `i` of the weight is column `order[i]` of the linear.
    Scattered(Vec<usize>),
}

impl Columns {
    /// From the group of each column; `None` if the groups, of which there are `n_groups`, have not
    /// one size.
    pub(super) fn from_groups(g_idx: &[i64], n_groups: usize) -> Option<Self> {
        if n_groups == 0 || !g_idx.len().is_multiple_of(n_groups) {
            return None;
        }
        let len = g_idx.len() / n_groups;
        let mut order: Vec<usize> = (0..g_idx.len()).collect();
        order.sort_by_key(|column| g_idx[*column]);
        let is_even = order
            .iter()
            .enumerate()
            .all(|(place, column)| g_idx[*column] == (place / len) as i64);
        let is_sorted = order.iter().enumerate().all(|(place, col)| place == *col);
        is_even.then_some(match is_sorted {
            true => Self::InOrder,
            false => Self::Scattered(order),
        })
    }

    /// Codes `[rows, cols]` of the linear, group by group.
    pub(super) fn gather(&self, codes: Vec<u8>, cols: usize) -> Vec<u8> {
        let Self::Scattered(order) = self else {
            return codes;
        };
        let rows = codes.chunks_exact(cols);
        rows.flat_map(|row| order.iter().map(|column| row[*column]))
            .collect()
    }

    /// The linear's weight, from one that is group by group.
    pub(super) fn restore(&self, weight: Matrix) -> Matrix {
        let Self::Scattered(order) = self else {
            return weight;
        };
        let mut restored = Matrix::zeros(weight.rows(), weight.cols());
        let cols = weight.cols();
        for row in 0..weight.rows() {
            let target = &mut restored.data_mut()[row * cols..(row + 1) * cols];
            for (value, column) in weight.row(row).iter().zip(order) {
                target[*column] = *value;
            }
        }
        restored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_columns_come_back_to_their_places() {
        assert_eq!(
            Columns::from_groups(&[0, 0, 1, 1], 2),
            Some(Columns::InOrder)
        );
        for bad in [&[0, 0, 0, 1], &[0, 0, 2, 2], &[-1, -1, 0, 0]] {
            assert_eq!(Columns::from_groups(bad, 2), None);
        }
        assert_eq!(Columns::from_groups(&[0, 0, 1], 2), None);
        let columns = Columns::from_groups(&[1, 0, 1, 0], 2).unwrap();
        assert_eq!(columns.gather(vec![10, 11, 12, 13], 4), [11, 13, 10, 12]);
        let weight = Matrix::from_vec("w", 1, 4, vec![11., 13., 10., 12.]).unwrap();
        assert_eq!(columns.restore(weight).data(), [10., 11., 12., 13.]);
    }
}
