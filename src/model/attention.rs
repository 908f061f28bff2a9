//! Grouped-query softmax attention, a block of queries at a time: its memory grows with the number
//! of tokens, not with their square. A picture of full size is 16 000 tokens, and the scores of all
//! of them at once would be 29 GB in a 7B model.

use crate::Result;
use crate::model::decoder_config::Ahead;
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

/// What new tokens may see. They are sequences side by side after what is past, which all of them
/// share; a token sees its own sequence up to itself, or to the end of its image or the prompt
/// ([`Ahead`]), and of all that nothing before its window where the layer has one.
#[derive(Clone, Debug)]
pub struct Mask {
    tokens: Vec<Token>,
}

/// A new token among the new ones.
#[derive(Clone, Copy, Debug)]
struct Token {
    /// Where its sequence begins.
    sequence: usize,
    /// Where what it sees of its sequence ends: after itself, its image or the prompt.
    end: usize,
    /// How many tokens up to itself it sees.
    window: Option<usize>,
}

impl Mask {
    /// The mask of sequences of these many new tokens, each of which sees what is before it.
    pub fn causal(lengths: &[usize]) -> Self {
        let n = lengths.iter().sum();
        Self::new(lengths, &vec![0; n], Ahead::Nothing, None)
    }

    /// The mask of a layer with this `window` for tokens of `groups`: images, or the prompt as one,
    /// and 0 for what is in none.
    ///
    /// Source: transformers 5.23 `create_masks_for_vision_model`, `blockwise_overlay`.
    pub fn new(lengths: &[usize], groups: &[u32], ahead: Ahead, window: Option<usize>) -> Self {
        let mut tokens = Vec::with_capacity(groups.len());
        let mut start = 0;
        for &length in lengths {
            let own = &groups[start..start + length];
            tokens.extend((0..length).map(|i| Token {
                sequence: start,
                end: match ahead {
                    Ahead::Image | Ahead::Prompt if own[i] != 0 => start + end_of_run(own, i),
                    _ => start + i + 1,
                },
                window: window.filter(|_| ahead != Ahead::Prompt || own[i] == 0),
            }));
            start += length;
        }
        Self { tokens }
    }

    /// The keys that a new token may see, of `n_past` past ones and the new ones after them: two
    /// ranges, of which the first lies in the past.
    fn seen(&self, token: usize, n_past: usize) -> [Range<usize>; 2] {
        let Token {
            sequence,
            end,
            window,
        } = self.tokens[token];
        let n_before = n_past + token - sequence;
        let hidden = window.map_or(0, |w| (n_before + 1).saturating_sub(w));
        let start = sequence + hidden.saturating_sub(n_past);
        [hidden.min(n_past)..n_past, n_past + start..n_past + end]
    }

    /// Keys that the new tokens `rows` may see at most, of `n_past` and the new ones.
    fn n_visible(&self, rows: &Range<usize>, n_past: usize) -> usize {
        let ends = rows.clone().map(|token| self.seen(token, n_past)[1].end);
        ends.max().unwrap_or(n_past)
    }

    /// 0 for what the new tokens `rows` may see and −∞ elsewhere, `[rows, n_visible]`.
    fn block(&self, rows: &Range<usize>, n_past: usize, device: &Device) -> Result<Tensor> {
        let (len, width) = (rows.len(), self.n_visible(rows, n_past));
        let mut mask = vec![f32::NEG_INFINITY; len * width];
        for (row, token) in mask.chunks_exact_mut(width).zip(rows.clone()) {
            for range in self.seen(token, n_past) {
                row[range].fill(0.0);
            }
        }
        Ok(Tensor::from_vec(mask, (len, width), device)?)
    }
}

/// The end of the run of equal values that `at` is in.
fn end_of_run(values: &[u32], at: usize) -> usize {
    let end = values[at..].iter().position(|v| *v != values[at]);
    end.map_or(values.len(), |n| at + n)
}

/// From products of queries and keys to scores: times a factor, then bent towards a cap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scoring {
    /// The factor.
    pub scale: f64,
    /// The cap c of c·tanh(score / c), if there is one.
    pub cap: Option<f64>,
}

impl Scoring {
    /// Scores of `products`, of whatever shape.
    fn forward(self, products: &Tensor) -> Result<Tensor> {
        Ok(match self.cap {
            None => (products * self.scale)?,
            Some(cap) => ((products * (self.scale / cap))?.tanh()? * cap)?,
        })
    }
}

/// Attention of the last token of a sequence, which sees all `seen` keys and values
/// `[kv_heads, n, head_dim]`: its queries are `[heads, 1, head_dim]`, the result
/// `[1, heads · head_dim]`.
///
/// # Errors
/// A tensor error if shapes disagree.
pub fn attend_last(queries: &Tensor, seen: &[Tensor; 2], scoring: Scoring) -> Result<Tensor> {
    let [keys, values] = seen;
    let (n_heads, _, head_dim) = queries.dims3()?;
    let grouped = queries.reshape((keys.dim(0)?, (), head_dim))?;
    let scores = scoring.forward(&grouped.matmul(&keys.t()?)?)?;
    let heads = softmax_last_dim(&scores)?.matmul(values)?;
    Ok(heads.reshape((1, n_heads * head_dim))?)
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
    mask: Mask,
    scoring: Scoring,
    block_len: usize,
    /// Those of the only block. Of several they are made again when they are asked for: that costs
    /// one product of the seven of forward and backward.
    probabilities: Option<Tensor>,
}

/// What the queries of a block are compared with, both `[kv_heads, n_visible, head_dim]`.
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
        mask: &Mask,
        scoring: Scoring,
        block_len: usize,
    ) -> Result<Self> {
        let mut attention = Self {
            output: queries.clone(),
            queries,
            keys,
            values,
            mask: mask.clone(),
            scoring,
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
        blocks(self.mask.tokens.len(), self.block_len)
    }

    /// Probabilities `[kv_heads, groups · rows, n_visible]` of a block.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn probabilities(&self, rows: Range<usize>) -> Result<Tensor> {
        if let Some(all) = &self.probabilities {
            return Ok(all.clone());
        }
        let n_past = self.keys.dim(1)? - self.mask.tokens.len();
        let keys = self.visible(&rows)?.keys;
        let scores = self.scoring.forward(&self.products(&rows, &keys)?)?;
        let mask = self.mask.block(&rows, n_past, scores.device())?;
        let scores = scores
            .reshape(((), rows.len(), keys.dim(1)?))?
            .broadcast_add(&mask)?;
        self.grouped(&softmax_last_dim(&scores)?)
    }

    /// Products of a block's queries with `keys`. Grouped queries lie side by side, so one matrix
    /// product per key head serves the whole group.
    fn products(&self, rows: &Range<usize>, keys: &Tensor) -> Result<Tensor> {
        Ok(self.rows(&self.queries, rows)?.matmul(&keys.t()?)?)
    }

    /// Carries `d [kv_heads, groups · rows, n_visible]`, the gradient with respect to a block's
    /// scores, back to the products of queries and keys.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn scores_backward(&self, rows: &Range<usize>, d: Tensor) -> Result<Tensor> {
        let d = (d * self.scoring.scale)?;
        let Some(cap) = self.scoring.cap else {
            return Ok(d);
        };
        let products = self.products(rows, &self.visible(rows)?.keys)?;
        let bent = (products * (self.scoring.scale / cap))?.tanh()?;
        Ok((d * (1.0 - bent.sqr()?)?)?)
    }

    /// The keys and values that a block may see.
    ///
    /// # Errors
    /// A tensor error if `rows` are not there.
    pub fn visible(&self, rows: &Range<usize>) -> Result<Visible> {
        let n_past = self.keys.dim(1)? - self.mask.tokens.len();
        let n_visible = self.mask.n_visible(rows, n_past);
        Ok(Visible {
            keys: self.keys.narrow(1, 0, n_visible)?,
            values: self.values.narrow(1, 0, n_visible)?,
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

    /// How scores are made.
    pub fn scoring(&self) -> Scoring {
        self.scoring
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

    fn seen(mask: &Mask, rows: Range<usize>, n_past: usize) -> Vec<Vec<u8>> {
        let mask = mask.block(&rows, n_past, &Device::Cpu);
        let rows: Vec<Vec<f32>> = mask.unwrap().to_vec2().unwrap();
        (rows.iter())
            .map(|row| row.iter().map(|&v| u8::from(v == 0.0)).collect())
            .collect()
    }

    #[test]
    fn the_mask_keeps_sequences_apart_and_shows_what_is_past() {
        let mask = Mask::causal(&[2, 3]);
        let expected = [[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]];
        assert_eq!(seen(&mask, 1..4, 1), expected);
    }

    #[test]
    fn a_window_counts_from_the_token_back_into_the_past() {
        let mask = Mask::new(&[1, 3], &[0; 4], Ahead::Nothing, Some(3));
        let expected = [[1, 1, 0, 1, 0, 0], [0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]];
        assert_eq!(seen(&mask, 1..4, 2), expected);
        assert_eq!(seen(&mask, 0..1, 2), [[1, 1, 1]]);
    }

    #[test]
    fn an_image_sees_all_of_itself_that_no_window_hides() {
        let mask = Mask::new(&[5], &[0, 1, 1, 1, 0], Ahead::Image, Some(2));
        let expected = [
            [1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 0, 1, 1],
        ];
        assert_eq!(seen(&mask, 0..5, 0), expected);
        let global = Mask::new(&[5], &[0, 1, 1, 2, 2], Ahead::Image, None);
        let expected = [
            [1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1],
        ];
        assert_eq!(seen(&global, 0..5, 0), expected);
        // A block ends where its last image does.
        assert_eq!(seen(&mask, 0..2, 0), [[1, 0, 0, 0], [1, 1, 1, 1]]);
    }

    #[test]
    fn a_prompt_sees_all_of_itself_and_the_answer_what_its_window_leaves() {
        let mask = Mask::new(&[6], &[1, 1, 1, 1, 0, 0], Ahead::Prompt, Some(2));
        let expected = [
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 1, 1],
        ];
        assert_eq!(seen(&mask, 0..6, 0), expected);
        // Generated after it.
        let mask = Mask::new(&[1], &[0], Ahead::Prompt, Some(3));
        assert_eq!(seen(&mask, 0..1, 4), [[0, 0, 1, 1, 1]]);
    }
}
