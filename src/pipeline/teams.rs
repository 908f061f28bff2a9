//! Which ranks solve which linears.
//!
//! Linears that share statistics share a factor, or two, which costs about as much as solving all their
//! rows: as few ranks as may be should make it. Where there are as many groups as ranks or more, each
//! group goes to one rank, the costly ones first, always to the rank that has least to do. Where
//! there are fewer, each has a *team*: the ranks left over go one by one to the group that would take
//! longest, and rows are shared out within it; each of a team makes one factor ([`super::prepared`]).

use crate::solver::ROW_UNIT;
use std::ops::Range;

/// Multiply-adds, about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    /// Of one factor.
    pub(super) factor: f64,
    /// How many there are: that of all samples, and that of a part of them. Each of a team makes one.
    pub(super) n_factors: usize,
    /// What they share.
    pub(super) rows: f64,
    /// Into how many shares the rows can be cut.
    pub(super) n_units: usize,
}

impl Cost {
    /// Of linears `[out, in]` of the same `in`; with a target that moves them, whose sweeps and
    /// held-out samples cost more.
    pub(super) fn of(shapes: &[[usize; 2]], with_target: bool) -> Self {
        let inp = shapes.first().map_or(0, |shape| shape[1]) as f64;
        let out: usize = shapes.iter().map(|shape| shape[0]).sum();
        let (n_factors, passes) = match with_target {
            true => (2, 4.0),
            false => (1, 0.5),
        };
        let units = shapes.iter().map(|shape| shape[0].div_ceil(ROW_UNIT));
        Self {
            factor: inp * inp * inp / 3.0,
            n_factors,
            rows: passes * inp * inp * out as f64,
            n_units: units.max().unwrap_or(1).max(1),
        }
    }

    fn each(&self, n_ranks: usize) -> f64 {
        let n_factors = self.n_factors.div_ceil(n_ranks);
        self.factor * n_factors as f64 + self.rows / n_ranks.min(self.n_units) as f64
    }
}

/// The ranks that solve each group.
pub(super) fn teams(costs: &[Cost], n_ranks: usize) -> Vec<Vec<usize>> {
    match costs.len() < n_ranks {
        true => in_teams(costs, n_ranks),
        false => one_by_one(costs, n_ranks),
    }
}

fn in_teams(costs: &[Cost], n_ranks: usize) -> Vec<Vec<usize>> {
    let mut sizes = vec![1; costs.len()];
    for _ in costs.len()..n_ranks {
        // More ranks than shares would find nothing to do.
        let can_grow = (0..costs.len()).filter(|group| sizes[*group] < costs[*group].n_units);
        let longest = can_grow.max_by(|a, b| {
            let [a, b] = [*a, *b].map(|group| costs[group].each(sizes[group]));
            a.total_cmp(&b)
        });
        match longest {
            Some(group) => sizes[group] += 1,
            None => break,
        }
    }
    let mut first = 0;
    let ranks = sizes.into_iter().map(|size| {
        first += size;
        (first - size..first).collect()
    });
    ranks.collect()
}

fn one_by_one(costs: &[Cost], n_ranks: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|a, b| costs[*b].each(1).total_cmp(&costs[*a].each(1)));
    let mut loads = vec![0.0; n_ranks];
    let mut teams = vec![Vec::new(); costs.len()];
    for group in order {
        let ranks = loads.iter().enumerate();
        let (rank, _) = ranks
            .min_by(|a: &(usize, &f64), b| a.1.total_cmp(b.1))
            .expect("there is at least one rank");
        loads[rank] += costs[group].each(1);
        teams[group] = vec![rank];
    }
    teams
}

/// The rows of a linear that one of a team of `size` solves; none for some where there are few.
pub(super) fn rows_of(n_rows: usize, index: usize, size: usize) -> Range<usize> {
    let n_units = n_rows.div_ceil(ROW_UNIT);
    let start = |index: usize| n_rows.min(n_units * index / size * ROW_UNIT);
    start(index)..start(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shared_out_in_whole_units() {
        for (n_rows, size) in [(1, 1), (100, 3), (3584, 4), (18944, 7), (130, 2)] {
            let mut end = 0;
            for index in 0..size {
                let rows = rows_of(n_rows, index, size);
                assert_eq!(rows.start, end);
                assert!(rows.is_empty() || rows.start.is_multiple_of(ROW_UNIT));
                end = rows.end;
            }
            assert_eq!(end, n_rows);
        }
        assert_eq!(rows_of(130, 1, 2), 128..130);
    }

    #[test]
    fn a_wide_linear_has_many_ranks_and_small_ones_share_one() {
        let q = Cost::of(&[[3584, 3584]], true);
        let k = Cost::of(&[[512, 3584]], true);
        let found = teams(&[q, k, k], 8);
        assert_eq!(found.iter().map(Vec::len).sum::<usize>(), 8);
        assert!(found[0].len() > found[1].len());
        let mut all: Vec<usize> = found.concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..8), "nobody solves two and waits");
        assert_eq!(teams(&[q], 1), [[0]]);
        // A linear of one share has one rank, however many there are.
        let tiny = Cost::of(&[[64, 64]], false);
        assert_eq!(teams(&[tiny], 4), [[0]]);
        // Experts: by turns, and all ranks have something to do.
        let experts = vec![k; 10];
        let found = teams(&experts, 4);
        for rank in 0..4 {
            let own = found.iter().filter(|team| team[..] == [rank]).count();
            assert!((2..=3).contains(&own));
        }
        let mut costs = vec![k; 3];
        costs.push(q);
        assert_eq!(teams(&costs, 3)[3], [0], "the costly one goes first");
    }
}
