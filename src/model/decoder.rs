//! The one decoder: a pre-norm transformer layer with grouped-query attention, rotary positions
//! and a gated MLP, cut into the four stages at which its linears see their inputs.
//!
//! ```text
//!  x ──norm──► n₁ ─q,k,v─► attention ──► a ─o─► + x = y ──norm──► n₂ ─gate,up─► h ─down─► + y
//!              stage qkv                 stage o                  stage gate_up  stage down
//! ```
//! Where an architecture has them ([`crate::model::DecoderConfig`]), queries and keys are normed
//! head by head before rotation, and the outputs of o and down are normed before they are added.
//! The MLP may be a mixture of experts ([`crate::model::experts`]): gate, up and down then work on
//! the tokens that are sent to each.
//!
//! Calibration walks these stages one by one, so that no part of a forward is ever run twice.
//! All activations are `[n_tokens, width]`, one sample at a time; no padding exists.

use crate::model::attention::{Attention, Mask, Scoring, attend_last, block_len};
use crate::model::context::TokenContext;
use crate::model::decoder_config::{Activation, Ahead};
use crate::model::experts::{Router, Routing};
use crate::model::linear::Linear;
use crate::model::norm::RmsNorm;
use crate::model::projection::{Projection, Slot};
use crate::model::rope::Rope;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::ops::silu;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// One transformer layer's weights in f32, or those of them that are needed.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    pub(super) linears: BTreeMap<Slot, Linear>,
    /// What sends tokens to experts, where the MLP is a mixture.
    pub(super) router: Option<Router>,
    pub(super) before_attention: RmsNorm,
    /// Of attention's output, where the architecture norms it.
    pub(super) after_attention: Option<RmsNorm>,
    pub(super) before_mlp: RmsNorm,
    /// Of the MLP's output, where the architecture norms it.
    pub(super) after_mlp: Option<RmsNorm>,
    /// Of each head's queries, where the architecture norms them.
    pub(super) queries: Option<RmsNorm>,
    pub(super) keys: Option<RmsNorm>,
    pub(super) n_heads: usize,
    pub(super) head_dim: usize,
    pub(super) scoring: Scoring,
    pub(super) activation: Activation,
    pub(super) ahead: Ahead,
    pub(super) window: Option<usize>,
}

/// Keys and values of the tokens seen so far, `[kv_heads, n, head_dim]`, keys rotated.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    keys_values: Option<(Tensor, Tensor)>,
}

/// Keys and values of one sequence that is being continued token by token, with room for some that are
/// to come: adding a token copies what is there once in many steps only.
#[derive(Debug)]
pub struct DecodeCache {
    keys: Tensor,
    values: Tensor,
    n_tokens: usize,
}

impl DecodeCache {
    /// A copy of what `cache` holds, with room for more.
    ///
    /// # Errors
    /// [`Error::Missing`] for a cache without any token; a tensor error if its shape is another.
    pub fn new(cache: &KvCache) -> Result<Self> {
        let (keys, values) = cache.keys_values.as_ref().ok_or_else(|| Error::Missing {
            what: "a first token".into(),
            place: "the cache of keys and values".into(),
        })?;
        Ok(Self {
            keys: with_room(keys)?,
            values: with_room(values)?,
            n_tokens: keys.dim(1)?,
        })
    }

    /// Adds a token's `[kv_heads, 1, head_dim]`; gives those of the last `window` tokens, or of all.
    fn push(&mut self, k: &Tensor, v: &Tensor, window: Option<usize>) -> Result<[Tensor; 2]> {
        if self.keys.dim(1)? == self.n_tokens {
            self.keys = with_room(&self.keys)?;
            self.values = with_room(&self.values)?;
        }
        self.keys.slice_set(&k.contiguous()?, 1, self.n_tokens)?;
        self.values.slice_set(&v.contiguous()?, 1, self.n_tokens)?;
        self.n_tokens += 1;
        let n = window.map_or(self.n_tokens, |window| window.min(self.n_tokens));
        let start = self.n_tokens - n;
        Ok([
            self.keys.narrow(1, start, n)?,
            self.values.narrow(1, start, n)?,
        ])
    }
}

/// A copy of `past [heads, n, head_dim]` with room for a quarter more tokens, and some.
fn with_room(past: &Tensor) -> Result<Tensor> {
    let (heads, n_tokens, head_dim) = past.dims3()?;
    let shape = (heads, n_tokens + n_tokens / 4 + 16, head_dim);
    let whole = Tensor::zeros(shape, past.dtype(), past.device())?;
    whole.slice_set(&past.contiguous()?, 1, 0)?;
    Ok(whole)
}

impl KvCache {
    fn extend(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let (k, v) = match &self.keys_values {
            Some((past_k, past_v)) => (
                Tensor::cat(&[past_k, &k], 1)?,
                Tensor::cat(&[past_v, &v], 1)?,
            ),
            None => (k, v),
        };
        self.keys_values = Some((k.clone(), v.clone()));
        Ok((k, v))
    }
}

impl DecoderLayer {
    /// One of the layer's linears.
    ///
    /// # Errors
    /// [`Error::Missing`] if it is not held.
    pub fn linear(&self, slot: impl Into<Slot>) -> Result<&Linear> {
        let slot = slot.into();
        self.linears.get(&slot).ok_or_else(|| Error::Missing {
            what: slot.name(),
            place: "the part of the layer that is in memory".into(),
        })
    }

    /// Puts a linear in its place.
    pub fn replace(&mut self, slot: Slot, linear: Linear) {
        self.linears.insert(slot, linear);
    }

    /// Gives up linears that are not needed any more.
    pub fn release(&mut self, slots: &[Slot]) {
        for slot in slots {
            self.linears.remove(slot);
        }
    }

    /// Gives up all linears.
    pub fn release_all(&mut self) {
        self.linears.clear();
    }

    /// n₁, the input of q, k and v, for `x [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn qkv_input(&self, x: &Tensor) -> Result<Tensor> {
        self.before_attention.forward(x)
    }

    /// Carries `d = ∂L/∂n₁` `[n, hidden]` back through the norm to x.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn qkv_norm_backward(&self, x: &Tensor, d: &Tensor) -> Result<Tensor> {
        self.before_attention.backward(x, d)
    }

    /// Attention over one whole sample from n₁.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn attention(&self, n1: &Tensor, context: &TokenContext) -> Result<Attention> {
        self.attention_cached(n1, context, &[n1.dim(0)?], &mut KvCache::default())
    }

    /// Attention of new tokens, which are sequences of `lengths` side by side, over `cache` and
    /// themselves; `context` is that of the new ones.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn attention_cached(
        &self,
        n1: &Tensor,
        context: &TokenContext,
        lengths: &[usize],
        cache: &mut KvCache,
    ) -> Result<Attention> {
        let [queries, keys, values] = self.queries_keys_values(n1, context)?;
        let (keys, values) = cache.extend(keys, values)?;
        let mask = Mask::new(lengths, context.groups(), self.ahead, self.window);
        let block_len = block_len(self.n_heads, keys.dim(1)?);
        Attention::new(queries, keys, values, &mask, self.scoring, block_len)
    }

    /// Queries, keys and values of the tokens n₁, `[heads, n, head_dim]`, normed and rotated.
    fn queries_keys_values(&self, n1: &Tensor, context: &TokenContext) -> Result<[Tensor; 3]> {
        let rope = context.rope(self.window.is_some());
        let queries = self.heads(Projection::Q, n1)?;
        let keys = self.heads(Projection::K, n1)?;
        let values = self.heads(Projection::V, n1)?;
        Ok([
            rope.rotate(&normed(&self.queries, queries)?)?,
            rope.rotate(&normed(&self.keys, keys)?)?,
            values,
        ])
    }

    /// The angles that the layer turns by.
    pub fn rope<'a>(&self, context: &'a TokenContext) -> &'a Rope {
        context.rope(self.window.is_some())
    }

    /// Queries, keys or values before norm and rotation, `[heads, n, head_dim]`.
    fn heads(&self, projection: Projection, n1: &Tensor) -> Result<Tensor> {
        self.split_heads(&self.linear(projection)?.forward(n1)?)
    }

    /// Carries the gradient with respect to normed queries or keys `d [heads, n, head_dim]` back
    /// through their norm, where the layer has one; `n1` is what they were made of.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn head_norm_backward(
        &self,
        projection: Projection,
        n1: &Tensor,
        d: Tensor,
    ) -> Result<Tensor> {
        let norm = match projection {
            Projection::Q => &self.queries,
            _ => &self.keys,
        };
        match norm {
            Some(norm) => norm.backward(&self.heads(projection, n1)?, &d),
            None => Ok(d),
        }
    }

    /// y, the residual stream after attention, from x and the input `a` of `o_proj`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_attention(&self, x: &Tensor, a: &Tensor) -> Result<Tensor> {
        let out = self.linear(Projection::O)?.forward(a)?;
        Ok((x + normed(&self.after_attention, out)?)?)
    }

    /// Carries `d = ∂L/∂y` back to the output of `o_proj`, whose input is `a`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_attention_backward(&self, a: &Tensor, d: &Tensor) -> Result<Tensor> {
        match &self.after_attention {
            Some(norm) => norm.backward(&self.linear(Projection::O)?.forward(a)?, d),
            None => Ok(d.clone()),
        }
    }

    /// n₂, the input of gate and up, for `y [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn gate_up_input(&self, y: &Tensor) -> Result<Tensor> {
        self.before_mlp.forward(y)
    }

    /// Carries `d = ∂L/∂n₂` `[n, hidden]` back through the norm to y.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn gate_up_norm_backward(&self, y: &Tensor, d: &Tensor) -> Result<Tensor> {
        self.before_mlp.backward(y, d)
    }

    /// Which experts tokens go to from n₂; `None` where the MLP is one for all.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn routing(&self, n2: &Tensor) -> Result<Option<Routing>> {
        let router = self.router.as_ref();
        router.map(|router| router.route(n2)).transpose()
    }

    /// h, the input of down, from n₂: `[n, inter]`, in a mixture by token, `[n, k·width]`
    /// ([`crate::model::experts`]).
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn down_input(&self, n2: &Tensor) -> Result<Tensor> {
        match self.routing(n2)? {
            None => self.gated(None, n2),
            Some(routing) => {
                let gated = |expert, rows: &Tensor| self.gated(Some(expert), rows);
                routing.by_token(&routing.each(&routing.dispatch(n2)?, gated)?)
            }
        }
    }

    /// The gated product of an MLP, or of one of its experts.
    fn gated(&self, expert: Option<usize>, x: &Tensor) -> Result<Tensor> {
        let linear = |projection| self.linear(Slot { projection, expert });
        let gate = linear(Projection::Gate)?.forward(x)?;
        let gate = match self.activation {
            Activation::Silu => silu(&gate)?,
            Activation::GeluTanh => gate.gelu()?,
        };
        Ok((gate * linear(Projection::Up)?.forward(x)?)?)
    }

    /// The gate's activation.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// What sends tokens to experts, where the MLP is a mixture.
    pub fn router(&self) -> Option<&Router> {
        self.router.as_ref()
    }

    /// The MLP's output before its norm, from y and h.
    fn mlp_output(&self, y: &Tensor, h: &Tensor) -> Result<Tensor> {
        let Some(router) = &self.router else {
            return self.linear(Projection::Down)?.forward(h);
        };
        let routing = router.route(&self.gate_up_input(y)?)?;
        let down = |expert, rows: &Tensor| {
            let (projection, expert) = (Projection::Down, Some(expert));
            self.linear(Slot { projection, expert })?.forward(rows)
        };
        let out = routing.each(&routing.by_expert(h)?, down)?;
        routing.sum(&out.broadcast_mul(routing.weights())?)
    }

    /// The layer's output from y and h.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_mlp(&self, y: &Tensor, h: &Tensor) -> Result<Tensor> {
        let out = self.mlp_output(y, h)?;
        Ok((y + normed(&self.after_mlp, out)?)?)
    }

    /// Carries `d`, the gradient with respect to the layer's output, back to the output of the MLP
    /// before its norm; y and h are what it was made of.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_mlp_backward(&self, y: &Tensor, h: &Tensor, d: &Tensor) -> Result<Tensor> {
        match &self.after_mlp {
            Some(norm) => norm.backward(&self.mlp_output(y, h)?, d),
            None => Ok(d.clone()),
        }
    }

    /// The whole layer on new tokens `x [n, hidden]`, which are sequences of `lengths` side by side,
    /// extending `cache`; `context` is that of the new ones.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn forward(
        &self,
        x: &Tensor,
        context: &TokenContext,
        lengths: &[usize],
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let a = self
            .attention_cached(&self.qkv_input(x)?, context, lengths, cache)?
            .output;
        let y = self.after_attention(x, &a)?;
        let h = self.down_input(&self.gate_up_input(&y)?)?;
        self.after_mlp(&y, &h)
    }

    /// The whole layer on the next token of each of n sequences, `x [n, hidden]`, extending their
    /// `caches`; `context` is that of these tokens. The weights are read once for all of them.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn decode(
        &self,
        x: &Tensor,
        context: &TokenContext,
        caches: &mut [DecodeCache],
    ) -> Result<Tensor> {
        let [queries, keys, values] = self.queries_keys_values(&self.qkv_input(x)?, context)?;
        let one = |(token, cache): (usize, &mut DecodeCache)| {
            let of = |all: &Tensor| all.narrow(1, token, 1);
            let seen = cache.push(&of(&keys)?, &of(&values)?, self.window)?;
            attend_last(&of(&queries)?, &seen, self.scoring)
        };
        let outputs = caches.par_iter_mut().enumerate().map(one);
        let a = Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?;
        let y = self.after_attention(x, &a)?;
        let h = self.down_input(&self.gate_up_input(&y)?)?;
        self.after_mlp(&y, &h)
    }

    /// `[n, heads · head_dim]` → `[heads, n, head_dim]`, for queries or for keys and values.
    pub fn split_heads(&self, x: &Tensor) -> Result<Tensor> {
        let n = x.dim(0)?;
        Ok(x.reshape((n, (), self.head_dim))?
            .transpose(0, 1)?
            .contiguous()?)
    }
}

fn normed(norm: &Option<RmsNorm>, x: Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}
