//! How the sequences of a run are cut: into batches, and batches into shards.
//!
//! A *batch* is walked as one matrix: consecutive sequences of together at most [`BATCH_TOKENS`]
//! tokens, or one longer one. A *shard* is a run of batches whose statistics are summed from zero,
//! before shards are added up in their order. Floating-point sums depend on their order, so the
//! number of shards has a part in the result, in its last bits; how many processes share the shards
//! out has none. Both are cut by the lengths of the sequences alone. A shard begins with a batch,
//! so the batches are the same however many shards there are.

use std::ops::Range;

/// Tokens that one matrix product takes: enough for full speed, few enough to stay small.
pub const BATCH_TOKENS: usize = 1024;

/// The batches of sequences of these many tokens.
pub fn batches(n_tokens: &[usize]) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut sum = 0;
    for (index, n) in n_tokens.iter().enumerate() {
        sum += n;
        match batches.last_mut() {
            Some(batch) if sum <= BATCH_TOKENS => batch.end = index + 1,
            _ => {
                sum = *n;
                batches.push(index..index + 1);
            }
        }
    }
    batches
}

/// The sequences of a run, and how they are cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shards {
    n_tokens: Vec<usize>,
    ranges: Vec<Range<usize>>,
}

impl Shards {
    /// Sequences of these many tokens in so many shards.
    pub fn cut(n_tokens: Vec<usize>, n_shards: usize) -> Self {
        let ranges = shards(&n_tokens, n_shards);
        Self { n_tokens, ranges }
    }

    /// The tokens of every sequence of the run.
    pub fn n_tokens(&self) -> &[usize] {
        &self.n_tokens
    }

    /// The sequences of each shard, by their place in the run.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.ranges
    }

    /// Whether a sequence is in a shard of this rank.
    pub fn is_of_rank(&self, sequence: usize, rank: usize, n_ranks: usize) -> bool {
        of_rank(self.ranges.len(), rank, n_ranks)
            .any(|shard| self.ranges[shard].contains(&sequence))
    }
}

/// `n_shards` runs of sequences of about as many tokens each, the last of them empty where there are
/// fewer batches. One shard has all of them.
fn shards(n_tokens: &[usize], n_shards: usize) -> Vec<Range<usize>> {
    let batches = batches(n_tokens);
    let n_filled = n_shards.min(batches.len());
    let total: usize = n_tokens.iter().sum();
    let (mut before, mut place) = (0, None);
    let mut shards: Vec<Range<usize>> = Vec::with_capacity(n_shards);
    for batch in batches {
        let own: usize = n_tokens[batch.clone()].iter().sum();
        // Of equal parts, that in which the middle of the batch lies.
        let part = (2 * before + own) * n_filled / (2 * total).max(1);
        before += own;
        match shards.last_mut() {
            Some(shard) if place == Some(part) => shard.end = batch.end,
            _ => shards.push(batch),
        }
        place = Some(part);
    }
    shards.resize(n_shards, n_tokens.len()..n_tokens.len());
    shards
}

/// The shards that a rank has, in their order: each n-th of them, so that whatever is summed over
/// shards in their order can be summed by all ranks in turns.
pub fn of_rank(n_shards: usize, rank: usize, n_ranks: usize) -> impl Iterator<Item = usize> {
    (rank..n_shards).step_by(n_ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_as_large_as_may_be() {
        assert!(batches(&[]).is_empty());
        let n_tokens = [1024, 1, 1023, 1, 3000, 5, 600, 600];
        assert_eq!(batches(&n_tokens), [0..1, 1..3, 3..4, 4..5, 5..7, 7..8]);
    }

    #[test]
    fn shards_have_all_batches_in_order_and_are_alike() {
        let n_tokens: Vec<usize> = (0..97).map(|i| 100 + i * 37 % 900).collect();
        let batches = batches(&n_tokens);
        let total: usize = n_tokens.iter().sum();
        for n_shards in [1, 2, 3, 8, 40, 200] {
            let shards = shards(&n_tokens, n_shards);
            assert_eq!(shards.len(), n_shards);
            assert!(shards.is_sorted_by_key(|shard| shard.is_empty()));
            let mut end = 0;
            for shard in &shards {
                assert_eq!(shard.start, end);
                end = shard.end;
                let is_border = |at: usize| batches.iter().any(|b| b.start == at);
                assert!(shard.is_empty() || is_border(shard.start));
                let own: usize = n_tokens[shard.clone()].iter().sum();
                let even = total / n_shards.min(batches.len());
                let is_even = own.abs_diff(even) <= BATCH_TOKENS;
                assert!(shard.is_empty() || is_even, "{own} tokens");
                // Cut alone, its batches are those of all.
                let alone = super::batches(&n_tokens[shard.clone()]).into_iter();
                let alone = alone.map(|b| b.start + shard.start..b.end + shard.start);
                let own = batches.iter().filter(|b| shard.contains(&b.start)).cloned();
                assert!(alone.eq(own));
            }
            assert_eq!(end, n_tokens.len());
        }
    }

    #[test]
    fn ranks_share_all_shards_out() {
        for n_ranks in [1, 2, 3, 7] {
            let ranks = (0..n_ranks).flat_map(|rank| of_rank(7, rank, n_ranks));
            let mut all: Vec<usize> = ranks.collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..7));
        }
    }
}
