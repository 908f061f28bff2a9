//! The one decoder: a pre-norm transformer layer with grouped-query attention, rotary positions
//! and a gated MLP, cut into the four stages at which its linears see their inputs.
//!
//! ```text
//!  x ──norm──► n₁ ─q,k,v─► attention ──► a ─o─► + x = y ──norm──► n₂ ─gate,up─► h ─down─► + y
//!              stage qkv                 stage o                  stage gate_up  stage down
//! ```
//! Where an architecture has them ([`DecoderConfig`]), queries and keys are normed head by head
//! before rotation, and the outputs of o and down are normed before they are added.
//!
//! Calibration walks these stages one by one, so that no part of a forward is ever run twice.
//! All activations are `[n_tokens, width]`, one sample at a time; no padding exists.

use crate::checkpoint::Checkpoint;
use crate::model::attention::{Attention, Mask, Scoring, block_len};
use crate::model::context::TokenContext;
use crate::model::decoder_config::{Activation, Ahead, DecoderConfig};
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::RmsNorm;
use crate::model::rope::Rope;
use crate::{Error, Matrix, Result};
use candle_core::{Device, Tensor};
use candle_nn::ops::silu;

/// The linears of a layer, in the order in which they are solved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl Projection {
    /// All of a layer, in solve order.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Name inside a layer of a checkpoint.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Shape `[out, in]` of the weight.
    pub fn shape(self, config: &DecoderConfig) -> [usize; 2] {
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
        );
        match self {
            Self::Q => [q, hidden],
            Self::K | Self::V => [kv, hidden],
            Self::O => [hidden, q],
            Self::Gate | Self::Up => [inter, hidden],
            Self::Down => [hidden, inter],
        }
    }

    fn has_bias(self, config: &DecoderConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => config.qkv_bias,
            Self::O => config.o_bias,
            Self::Gate | Self::Up | Self::Down => false,
        }
    }
}

/// Where the parts of one layer are read from, each when it is needed: of a 32B model, the linears
/// of one layer have 2 GB in f32.
#[derive(Clone)]
pub struct LayerSource<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Name of the layer in it, e.g. `model.layers.3`.
    pub prefix: String,
    /// Its place among the layers.
    pub layer_idx: usize,
    /// Shapes.
    pub config: &'a DecoderConfig,
    /// Where the weights go.
    pub device: &'a Device,
}

impl LayerSource<'_> {
    /// The layer with its norms, and none of its linears.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`]: absent tensors, wrong shapes, values that are not finite.
    pub fn norms(&self) -> Result<DecoderLayer> {
        let config = self.config;
        let norm = |name: &str, dim: usize| {
            let name = format!("{}.{name}.weight", self.prefix);
            RmsNorm::load(self.checkpoint, &name, dim, config, self.device)
        };
        let when = |is_there: bool, name: &str, dim: usize| is_there.then(|| norm(name, dim));
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let sandwich = config.sandwich_norms;
        // A sandwiched layer calls the norm before its MLP by another name.
        let before_mlp = match sandwich {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        };
        Ok(DecoderLayer {
            linears: Default::default(),
            before_attention: norm("input_layernorm", hidden)?,
            after_attention: when(sandwich, "post_attention_layernorm", hidden).transpose()?,
            before_mlp: norm(before_mlp, hidden)?,
            after_mlp: when(sandwich, "post_feedforward_layernorm", hidden).transpose()?,
            queries: when(config.qk_norm, "self_attn.q_norm", head_dim).transpose()?,
            keys: when(config.qk_norm, "self_attn.k_norm", head_dim).transpose()?,
            n_heads: config.n_heads,
            head_dim,
            scoring: Scoring {
                scale: config.score_scale,
                cap: config.score_cap,
            },
            activation: config.activation,
            ahead: config.ahead,
            window: config.window(self.layer_idx),
        })
    }

    /// The whole layer.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn whole(&self) -> Result<DecoderLayer> {
        let mut layer = self.norms()?;
        self.complete(&mut layer, &Projection::ALL)?;
        Ok(layer)
    }

    /// Reads those of the linears that `layer` does not hold.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn complete(&self, layer: &mut DecoderLayer, projections: &[Projection]) -> Result<()> {
        for &projection in projections {
            if layer.linears[projection as usize].is_none() {
                let weight = self.weight(projection)?;
                layer.replace(projection, self.linear(projection, weight)?);
            }
        }
        Ok(())
    }

    /// The weight `[out, in]` of a linear in f32.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear_weight`].
    pub fn weight(&self, projection: Projection) -> Result<Matrix> {
        let [out, inp] = projection.shape(self.config);
        let name = self.name(projection);
        self.checkpoint.linear_weight(&name, out, inp)
    }

    /// A linear of the layer with this weight and the bias that it has there.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn linear(&self, projection: Projection, weight: Matrix) -> Result<Linear> {
        let bias = projection.has_bias(self.config).then(|| {
            let name = format!("{}.bias", self.name(projection));
            let [out, _] = projection.shape(self.config);
            load_tensor(self.checkpoint, &name, &[out], self.device)
        });
        let weight = tensor_from_matrix(weight, self.device)?;
        Ok(Linear::new(weight, bias.transpose()?))
    }

    fn name(&self, projection: Projection) -> String {
        format!("{}.{}", self.prefix, projection.name())
    }
}

/// One transformer layer's weights in f32, or those of them that are needed.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    linears: [Option<Linear>; 7],
    before_attention: RmsNorm,
    /// Of attention's output, where the architecture norms it.
    after_attention: Option<RmsNorm>,
    before_mlp: RmsNorm,
    /// Of the MLP's output, where the architecture norms it.
    after_mlp: Option<RmsNorm>,
    /// Of each head's queries, where the architecture norms them.
    queries: Option<RmsNorm>,
    keys: Option<RmsNorm>,
    n_heads: usize,
    head_dim: usize,
    scoring: Scoring,
    activation: Activation,
    ahead: Ahead,
    window: Option<usize>,
}

/// Keys and values of the tokens seen so far, `[kv_heads, n, head_dim]`, keys rotated.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    keys_values: Option<(Tensor, Tensor)>,
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
    pub fn linear(&self, projection: Projection) -> Result<&Linear> {
        let linear = self.linears[projection as usize].as_ref();
        linear.ok_or_else(|| Error::Missing {
            what: projection.name().into(),
            place: "the part of the layer that is in memory".into(),
        })
    }

    /// Puts a linear in its place.
    pub fn replace(&mut self, projection: Projection, linear: Linear) {
        self.linears[projection as usize] = Some(linear);
    }

    /// Gives up linears that are not needed any more.
    pub fn release(&mut self, projections: &[Projection]) {
        for &projection in projections {
            self.linears[projection as usize] = None;
        }
    }

    /// n₁, the input of q, k and v, for `x [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn qkv_input(&self, x: &Tensor) -> Result<Tensor> {
        self.before_attention.forward(x)
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
        let rope = context.rope(self.window.is_some());
        let queries = self.heads(Projection::Q, n1)?;
        let keys = self.heads(Projection::K, n1)?;
        let values = self.heads(Projection::V, n1)?;
        let queries = rope.rotate(&normed(&self.queries, queries)?)?;
        let keys = rope.rotate(&normed(&self.keys, keys)?)?;
        let (keys, values) = cache.extend(keys, values)?;
        let mask = Mask::new(lengths, context.groups(), self.ahead, self.window);
        let block_len = block_len(self.n_heads, keys.dim(1)?);
        Attention::new(queries, keys, values, &mask, self.scoring, block_len)
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

    /// h, the input of down, from n₂.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn down_input(&self, n2: &Tensor) -> Result<Tensor> {
        let gate = self.linear(Projection::Gate)?.forward(n2)?;
        let gate = match self.activation {
            Activation::Silu => silu(&gate)?,
            Activation::GeluTanh => gate.gelu()?,
        };
        Ok((gate * self.linear(Projection::Up)?.forward(n2)?)?)
    }

    /// The gate's activation.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// The layer's output from y and h.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_mlp(&self, y: &Tensor, h: &Tensor) -> Result<Tensor> {
        let out = self.linear(Projection::Down)?.forward(h)?;
        Ok((y + normed(&self.after_mlp, out)?)?)
    }

    /// Carries `d`, the gradient with respect to the layer's output, back to the output of
    /// `down_proj`, whose input is `h`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_mlp_backward(&self, h: &Tensor, d: &Tensor) -> Result<Tensor> {
        match &self.after_mlp {
            Some(norm) => norm.backward(&self.linear(Projection::Down)?.forward(h)?, d),
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
