//! Which width each group gets, so that the losses sum to as little as a budget allows: a knapsack
//! with one choice from each group, solved exactly by dynamic programming over what is spent.
//!
//! Spending is counted in units: the greatest common divisor of the groups' sizes, which is large
//! since shapes are made of few numbers, or a coarser unit where that would make the table long.
//! A coarser unit rounds each group's cost up, so the budget holds with any.

use crate::plan::Bits;

/// Columns of the table, at most.
const MAX_UNITS: u64 = 1 << 16;

const N_WIDTHS: usize = Bits::SHARED.len();

/// A group whose modules have the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Item {
    pub(super) n_weights: u64,
    /// By width, in order of [`Bits::SHARED`]. What more bits make worse counts as if they did not.
    pub(super) losses: [f64; N_WIDTHS],
}

/// Place of each item's width in [`Bits::SHARED`], for code bits of `budget` in all at most; of
/// equal sums the one with more bits in later items. `None` if the narrowest widths are above it.
pub(super) fn solve(items: &[Item], budget: u64) -> Option<Vec<usize>> {
    let total: u64 = items.iter().map(|item| item.n_weights).sum();
    let [least, .., most] = Bits::SHARED.map(u64::from);
    let spare = budget.checked_sub(least * total)?;
    let spare = spare.min((most - least) * total);
    let divisor = items
        .iter()
        .fold(0, |divisor, item| gcd(divisor, item.n_weights));
    let coarse = ((most - least) * total).div_ceil(MAX_UNITS);
    // A multiple of the divisor: sizes that it divides are rounded up no further than need be.
    let unit = divisor.max(1) * coarse.div_ceil(divisor.max(1)).max(1);
    let capacity = (spare / unit) as usize;
    let mut best = vec![0.0; capacity + 1];
    let mut choices: Vec<Vec<u8>> = Vec::with_capacity(items.len());
    for item in items {
        let (sums, own) = with_item(&best, item, unit);
        best = sums;
        choices.push(own);
    }
    let mut left = capacity;
    let mut widths = vec![0; items.len()];
    for (width, (item, own)) in widths.iter_mut().zip(items.iter().zip(&choices)).rev() {
        *width = own[left].into();
        left -= cost(item, *width, unit);
    }
    Some(widths)
}

/// Least sums by capacity once `item` is there, and its width for each.
fn with_item(best: &[f64], item: &Item, unit: u64) -> (Vec<f64>, Vec<u8>) {
    let mut losses = item.losses;
    for i in 1..N_WIDTHS {
        losses[i] = losses[i].min(losses[i - 1]);
    }
    let at = |capacity: usize| {
        let options = (0..N_WIDTHS).filter_map(|width| {
            let left = capacity.checked_sub(cost(item, width, unit))?;
            Some((best[left] + losses[width], width as u8))
        });
        // The narrowest costs nothing, so there is always one; the widest of equal ones.
        let start = (f64::INFINITY, 0);
        options.fold(
            start,
            |best, option| if option.0 <= best.0 { option } else { best },
        )
    };
    (0..best.len()).map(at).unzip()
}

/// Units above the narrowest width.
fn cost(item: &Item, width: usize, unit: u64) -> usize {
    let more = u64::from(Bits::SHARED[width] - Bits::SHARED[0]);
    (more * item.n_weights).div_ceil(unit) as usize
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spent(items: &[Item], widths: &[usize]) -> u64 {
        let pairs = items.iter().zip(widths);
        pairs
            .map(|(item, width)| item.n_weights * u64::from(Bits::SHARED[*width]))
            .sum()
    }

    fn loss(items: &[Item], widths: &[usize]) -> f64 {
        let pairs = items.iter().zip(widths);
        let of = |(item, width): (&Item, &usize)| {
            item.losses[..=*width]
                .iter()
                .copied()
                .fold(f64::INFINITY, f64::min)
        };
        pairs.map(of).sum()
    }

    fn by_brute_force(items: &[Item], budget: u64) -> f64 {
        let n = N_WIDTHS.pow(items.len() as u32);
        let all = (0..n).map(|code| {
            let digits = (0..items.len() as u32).map(|i| code / N_WIDTHS.pow(i) % N_WIDTHS);
            digits.collect::<Vec<usize>>()
        });
        let within = all.filter(|widths| spent(items, widths) <= budget);
        within
            .map(|widths| loss(items, &widths))
            .fold(f64::INFINITY, f64::min)
    }

    fn items(sizes: impl Strategy<Value = u64>) -> impl Strategy<Value = Vec<Item>> {
        let losses = proptest::array::uniform3(0.0f64..8.0);
        let item = (sizes, losses).prop_map(|(n_weights, losses)| Item { n_weights, losses });
        proptest::collection::vec(item, 1..7)
    }

    fn total(items: &[Item]) -> u64 {
        items.iter().map(|item| item.n_weights).sum()
    }

    proptest! {
        #[test]
        fn is_the_best_within_the_budget(items in items(1u64..40), share in 0.0f64..2.2) {
            let budget = ((2.0 + share) * total(&items) as f64) as u64;
            let widths = solve(&items, budget).unwrap();
            prop_assert!(spent(&items, &widths) <= budget);
            let best = by_brute_force(&items, budget);
            prop_assert!((loss(&items, &widths) - best).abs() < 1e-9);
        }

        #[test]
        fn more_budget_is_no_worse(items in items(1u64..40), shares in [0.0f64..2.0, 0.0..2.0]) {
            let n = total(&items) as f64;
            let budgets = shares.map(|share| ((2.0 + share) * n) as u64);
            let [low, high] = [budgets[0].min(budgets[1]), budgets[0].max(budgets[1])];
            let of = |budget| loss(&items, &solve(&items, budget).unwrap());
            prop_assert!(of(high) <= of(low) + 1e-9);
        }

        /// Sizes without a common divisor, whose table would have millions of columns.
        #[test]
        fn a_coarse_unit_stays_within(
            items in items(1_000_000u64..9_000_000),
            share in 0.0f64..2.0,
        ) {
            let budget = ((2.0 + share) * total(&items) as f64) as u64;
            let widths = solve(&items, budget).unwrap();
            prop_assert!(spent(&items, &widths) <= budget);
            // What rounding up takes away is a unit for each item at most.
            let units = items.len() as u64 * (2 * total(&items)).div_ceil(MAX_UNITS);
            let less = by_brute_force(&items, budget.saturating_sub(units).max(2 * total(&items)));
            prop_assert!(loss(&items, &widths) <= less + 1e-9);
        }
    }

    #[test]
    fn bounds_of_the_budget() {
        let item = |n_weights, losses| Item { n_weights, losses };
        let two = [item(64, [4.0, 1.0, 0.0]), item(128, [9.0, 3.0, 1.0])];
        assert_eq!(solve(&two, 2 * 192 - 1), None);
        assert_eq!(solve(&two, 2 * 192).unwrap(), [0, 0]);
        assert_eq!(solve(&two, 4 * 192).unwrap(), [2, 2]);
        assert_eq!(solve(&two, u64::MAX).unwrap(), [2, 2]);
        assert_eq!(solve(&two, 2 * 192 + 128).unwrap(), [0, 1]);
        // What more bits seem to make worse is noise, and what is left over is spent.
        let noisy = [item(64, [1.0, 2.0, 3.0])];
        assert_eq!(solve(&noisy, 3 * 64).unwrap(), [1]);
        assert_eq!(solve(&[], 0).unwrap(), [0; 0]);
    }
}
