//! Grouped-query softmax attention, a block of queries at a time: its memory grows with the number
//! of tokens, not with their square. A picture of full size is 16 000 tokens, and the scores of all
//! of them at once would be 29 GB in a 7B model.

use crate::Result;
use candle_core::{D, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use std::ops::Range;

/// Scores of a block, in all heads together: enough for full speed, 32 MB in f32.
const BLOCK_SCORES: usize = 1 << 23;

/// With fewer queries than this a block is no good matrix product.
const MIN_BLOCK: usize = 64;

/// Queries of a block, for `n_heads` heads over `n_keys` keys.
pub fn block_len(n_heads: usize, n_keys: usize) -> usize {
    (BLOCK_SCORES / (n_heads * n_keys).max(1)).max(MIN_BLOCK)
}

/// The blocks of `n_queries` queries.
pub fn blocks(n_queries: usize, block_len: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..n_queries).step_by(block_len.max(1));
    starts.map(move |start| start..n_queries.min(start + block_len))
}

/// What new tokens may see: all earlier ones, and of the new ones, which are sequences side by side,
/// those of their own sequence up to themselves.
#[derive(Clone, Debug)]
pub struct CausalMask {
    /// Of each new token, the new token with which its sequence begins.
    starts: Vec<usize>,
}

impl CausalMask {
    /// The mask of sequences of these many new tokens.
    pub fn new(lengths: &[usize]) -> Self {
        let mut starts = Vec::with_capacity(lengths.iter().sum());
        for &length in lengths {
            starts.resize(starts.len() + length, starts.len());
        }
        Self { starts }
    }

    /// 0 for what the new tokens `rows` may see and −∞ elsewhere, `[rows, n_past + rows.end]`: none
    /// of them sees a later token.
    fn block(&self, rows: Range<usize>, n_past: usize, device: &Device) -> Result<Tensor> {
        let (len, width) = (rows.len(), n_past + rows.end);
        let mut mask = vec![f32::NEG_INFINITY; len * width];
        for (row, i) in mask.chunks_exact_mut(width).zip(rows) {
            row[..n_past].fill(0.0);
            row[n_past..][self.starts[i]..=i].fill(0.0);
        }
        Ok(Tensor::from_vec(mask, (len, width), device)?)
    }
}

/// Attention of one layer over some new tokens, with everything that a backward pass needs.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Rotated queries of the new tokens, `[heads, n, head_dim]`.
    pub queries: Tensor,
    /// Rotated keys of all tokens, `[kv_heads, n_past + n, head_dim]`.
    pub keys: Tensor,
    /// Values of all tokens, `[kv_heads, n_past + n, head_dim]`.
    pub values: Tensor,
    /// Heads put together, the input of `o_proj`, `[n, heads · head_dim]`.
    pub output: Tensor,
    mask: CausalMask,
    block_len: usize,
    /// Those of the only block. Of several they are made again when they are asked for: that costs
    /// one product of the seven of forward and backward.
    probabilities: Option<Tensor>,
}

/// What the queries of a block are compared with, both `[kv_heads, n_past + rows.end, head_dim]`.
pub struct Visible {
    /// Their keys.
    pub keys: Tensor,
    /// Their values.
    pub values: Tensor,
}

impl Attention {
    /// Attends in blocks of `block_len` queries ([`block_len`]); shapes as in [`Attention`].
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn new(
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: &CausalMask,
        block_len: usize,
    ) -> Result<Self> {
        let mut attention = Self {
            output: queries.clone(),
            queries,
            keys,
            values,
            mask: mask.clone(),
            block_len,
            probabilities: None,
        };
        let (n_heads, n, head_dim) = attention.queries.dims3()?;
        let mut outputs = Vec::new();
        for rows in attention.blocks() {
            let probabilities = attention.probabilities(rows.clone())?;
            let heads = probabilities.matmul(&attention.visible(&rows)?.values)?;
            outputs.push(merge_heads(&heads.reshape((
                n_heads,
                rows.len(),
                head_dim,
            ))?)?);
            if rows.len() == n {
                attention.probabilities = Some(probabilities);
            }
        }
        attention.output = Tensor::cat(&outputs, 0)?;
        Ok(attention)
    }

    /// The blocks of queries.
    pub fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        blocks(self.mask.starts.len(), self.block_len)
    }

    /// Probabilities `[kv_heads, groups · rows, n_past + rows.end]` of a block.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn probabilities(&self, rows: Range<usize>) -> Result<Tensor> {
        if let Some(all) = &self.probabilities {
            return Ok(all.clone());
        }
        let n_past = self.keys.dim(1)? - self.mask.starts.len();
        let keys = self.visible(&rows)?.keys;
        // Grouped queries lie side by side, so one product per key head serves the whole group.
        let scores =
            (self.rows(&self.queries, &rows)?.matmul(&keys.t()?)? * self.score_scale()?)?;
        let mask = self.mask.block(rows.clone(), n_past, scores.device())?;
        let scores = scores
            .reshape(((), rows.len(), n_past + rows.end))?
            .broadcast_add(&mask)?;
        self.grouped(&softmax_last_dim(&scores)?)
    }

    /// The keys and values that a block may see.
    ///
    /// # Errors
    /// A tensor error if `rows` are not there.
    pub fn visible(&self, rows: &Range<usize>) -> Result<Visible> {
        let n_past = self.keys.dim(1)? - self.mask.starts.len();
        Ok(Visible {
            keys: self.keys.narrow(1, 0, n_past + rows.end)?,
            values: self.values.narrow(1, 0, n_past + rows.end)?,
        })
    }

    /// The rows of a block from `x [heads, n, m]`, as `[kv_heads, groups · rows, m]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn rows(&self, x: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
        self.grouped(&x.narrow(1, rows.start, rows.len())?)
    }

    /// `[heads, n, m]` → `[kv_heads, groups · n, m]`: the heads of a group are neighbours.
    fn grouped(&self, x: &Tensor) -> Result<Tensor> {
        let shape = (self.keys.dim(0)?, (), x.dim(D::Minus1)?);
        Ok(x.contiguous()?.reshape(shape)?)
    }

    /// 1/√head_dim, the factor on scores.
    ///
    /// # Errors
    /// None for three axes.
    pub fn score_scale(&self) -> Result<f64> {
        Ok(1.0 / (self.queries.dim(2)? as f64).sqrt())
    }
}

/// `[heads, n, head_dim]` → `[n, heads · head_dim]`.
///
/// # Errors
/// A tensor error if `x` has not three axes.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    let (heads, n, head_dim) = x.dims3()?;
    Ok(x.transpose(0, 1)?
        .contiguous()?
        .reshape((n, heads * head_dim))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_queries_once() {
        assert_eq!(blocks(7, 3).collect::<Vec<_>>(), [0..3, 3..6, 6..7]);
        assert_eq!(blocks(0, 3).count(), 0);
        assert_eq!(block_len(40, 16_384), MIN_BLOCK);
        assert_eq!(block_len(8, 64), BLOCK_SCORES / 512);
    }

    #[test]
    fn the_mask_keeps_sequences_apart_and_shows_what_is_past() {
        let mask = CausalMask::new(&[2, 3]).block(1..4, 1, &Device::Cpu);
        let seen: Vec<Vec<f32>> = mask.unwrap().to_vec2().unwrap();
        let seen: Vec<Vec<u8>> = (seen.iter())
            .map(|row| row.iter().map(|&v| u8::from(v == 0.0)).collect())
            .collect();
        assert_eq!(seen, [[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]);
    }
}
