//! The one decoder: a pre-norm transformer layer with grouped-query attention, rotary positions
//! and a gated MLP, cut into the four stages at which its linears see their inputs.
//!
//! ```text
//!  x ──norm──► n₁ ─q,k,v─► attention ──► a ─o─► + x = y ──norm──► n₂ ─gate,up─► h ─down─► + y
//!              stage qkv                 stage o                  stage gate_up  stage down
//! ```
//! Calibration walks these stages one by one, so that no part of a forward is ever run twice.
//! All activations are `[n_tokens, width]`, one sample at a time; no padding exists.

use crate::checkpoint::Checkpoint;
use crate::model::attention::{Attention, CausalMask, block_len};
use crate::model::config::DecoderConfig;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::rope::Rope;
use crate::{Error, Matrix, Result};
use candle_core::{D, Device, Tensor};
use candle_nn::ops::{rms_norm, silu};

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

    fn has_bias(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V)
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
        let hidden = self.config.hidden_size;
        let norm = |name: &str| {
            let name = format!("{}.{name}.weight", self.prefix);
            load_tensor(self.checkpoint, &name, &[hidden], self.device)
        };
        Ok(DecoderLayer {
            linears: Default::default(),
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            n_heads: self.config.n_heads,
            head_dim: self.config.head_dim,
            rms_norm_eps: self.config.rms_norm_eps as f32,
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
        let bias = projection.has_bias().then(|| {
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
    input_norm: Tensor,
    post_attention_norm: Tensor,
    n_heads: usize,
    head_dim: usize,
    rms_norm_eps: f32,
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
        Ok(rms_norm(
            &x.contiguous()?,
            &self.input_norm,
            self.rms_norm_eps,
        )?)
    }

    /// Causal attention over one whole sample from n₁.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn attention(&self, n1: &Tensor, rope: &Rope) -> Result<Attention> {
        let mask = CausalMask::new(&[n1.dim(0)?]);
        self.attention_cached(n1, rope, &mask, &mut KvCache::default())
    }

    /// Attention of new tokens over `cache` and themselves; `rope` and `mask` belong to the new ones.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn attention_cached(
        &self,
        n1: &Tensor,
        rope: &Rope,
        mask: &CausalMask,
        cache: &mut KvCache,
    ) -> Result<Attention> {
        let queries = rope.rotate(&self.split_heads(&self.linear(Projection::Q)?.forward(n1)?)?)?;
        let keys = rope.rotate(&self.split_heads(&self.linear(Projection::K)?.forward(n1)?)?)?;
        let values = self.split_heads(&self.linear(Projection::V)?.forward(n1)?)?;
        let (keys, values) = cache.extend(keys, values)?;
        let block_len = block_len(self.n_heads, keys.dim(1)?);
        Attention::new(queries, keys, values, mask, block_len)
    }

    /// y, the residual stream after attention, from x and the input `a` of `o_proj`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_attention(&self, x: &Tensor, a: &Tensor) -> Result<Tensor> {
        Ok((x + self.linear(Projection::O)?.forward(a)?)?)
    }

    /// n₂, the input of gate and up, for `y [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn gate_up_input(&self, y: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(
            &y.contiguous()?,
            &self.post_attention_norm,
            self.rms_norm_eps,
        )?)
    }

    /// Carries `d = ∂L/∂n₂` `[n, hidden]` back through the norm to y:
    /// r·(γ∘d) − r³·y·mean(γ∘d∘y) with r = 1/√(mean y² + ε).
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn gate_up_norm_backward(&self, y: &Tensor, d: &Tensor) -> Result<Tensor> {
        let d = d.broadcast_mul(&self.post_attention_norm)?;
        let mean_square = y.sqr()?.mean_keepdim(D::Minus1)?;
        let r = (mean_square + f64::from(self.rms_norm_eps))?
            .sqrt()?
            .recip()?;
        let mean = (&d * y)?.mean_keepdim(D::Minus1)?;
        let pull = y.broadcast_mul(&(mean * r.powf(3.0)?)?)?;
        Ok((d.broadcast_mul(&r)? - pull)?)
    }

    /// h, the input of down, from n₂.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn down_input(&self, n2: &Tensor) -> Result<Tensor> {
        let gate = silu(&self.linear(Projection::Gate)?.forward(n2)?)?;
        Ok((gate * self.linear(Projection::Up)?.forward(n2)?)?)
    }

    /// The layer's output from y and h.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn after_mlp(&self, y: &Tensor, h: &Tensor) -> Result<Tensor> {
        Ok((y + self.linear(Projection::Down)?.forward(h)?)?)
    }

    /// The whole layer on new tokens `x [n, hidden]`, extending `cache`; `rope` and `mask` belong to
    /// the new ones.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn forward(
        &self,
        x: &Tensor,
        rope: &Rope,
        mask: &CausalMask,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let a = self
            .attention_cached(&self.qkv_input(x)?, rope, mask, cache)?
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
