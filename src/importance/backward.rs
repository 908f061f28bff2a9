//! The one light backward pass of a layer, in closed form.
//!
//! The loss is local: the squared difference, summed, between what the layer gives for
//! the quantized stream U and what it gave for the full-precision stream F, with the same weights.
//! Its gradient with respect to the *outputs* of the linears says how much each token's error
//! matters. Nothing is differentiated automatically: every product below is one matrix product on
//! tensors that the forward pass already had, so the pass costs about as much as one attention.
//!
//! Notation, per key head with its group of query heads stacked by rows: A probabilities, P_j the
//! gradient with respect to the output of linear j, d· other gradients. Rotations are orthogonal,
//! so their transpose is the rotation by the opposite angle.
//!
//! Source: arXiv:2508.03351 §3.2 (loss and importance); the formulas are ours.

use crate::Result;
use crate::model::attention::{Attention, merge_heads};
use crate::model::context::TokenContext;
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::Activation;
use crate::model::experts::Router;
use crate::model::projection::{Projection, Slot};
use candle_core::{D, Tensor};
use candle_nn::ops::sigmoid;

/// One sample's way through a layer's attention, with everything that the way back needs.
#[derive(Clone, Debug)]
pub struct AttentionPass<'a> {
    layer: &'a DecoderLayer,
    context: &'a TokenContext,
    /// Input of the layer, `[n, hidden]`.
    x: Tensor,
    /// Input of q, k and v, `[n, hidden]`.
    pub n1: Tensor,
    pub(super) trace: Attention,
    /// Residual stream after attention, `[n, hidden]`.
    pub y: Tensor,
}

impl<'a> AttentionPass<'a> {
    /// Takes `x [n, hidden]` through attention.
    ///
    /// # Errors
    /// A tensor error if shapes disagree; [`crate::Error::Missing`] if `layer` lacks a linear.
    pub fn new(layer: &'a DecoderLayer, context: &'a TokenContext, x: &Tensor) -> Result<Self> {
        let n1 = layer.qkv_input(x)?;
        let trace = layer.attention(&n1, context)?;
        Ok(Self {
            y: layer.after_attention(x, &trace.output)?,
            layer,
            context,
            x: x.clone(),
            n1,
            trace,
        })
    }

    /// Input of o, `[n, heads · head_dim]`.
    pub fn o_input(&self) -> &Tensor {
        &self.trace.output
    }

    /// The layer's output, `[n, hidden]`.
    ///
    /// # Errors
    /// [`crate::Error::Missing`] if the layer lacks a linear; a tensor error.
    pub fn layer_output(&self) -> Result<Tensor> {
        let h = self.layer.down_input(&self.layer.gate_up_input(&self.y)?)?;
        self.layer.after_mlp(&self.y, &h)
    }

    /// The layer.
    pub fn layer(&self) -> &'a DecoderLayer {
        self.layer
    }
}

/// ∂L/∂(output of q, k, v, o), each `[n_tokens, out]`.
#[derive(Clone, Debug)]
pub struct AttentionGradients {
    /// With respect to the queries before norm and rotation.
    pub q: Tensor,
    /// With respect to the keys before norm and rotation.
    pub k: Tensor,
    /// With respect to the values.
    pub v: Tensor,
    /// With respect to the attention output, before its norm if it has one.
    pub o: Tensor,
}

/// ∂L/∂(output of gate, up, down), each `[n_tokens, out]`, and ∂L/∂y. In a mixture the rows are by
/// token: `[n_tokens, k·out]`, one part for each of the token's choices.
#[derive(Clone, Debug)]
pub struct MlpGradients {
    /// With respect to the gate before its activation.
    pub gate: Tensor,
    /// With respect to the up projection.
    pub up: Tensor,
    /// With respect to the down projection, before its norm if it has one.
    pub down: Tensor,
    /// With respect to the residual stream between attention and MLP, `[n_tokens, hidden]`.
    pub y: Tensor,
    /// Input of gate and up, `[n_tokens, hidden]`.
    pub n2: Tensor,
    /// Input of down, `[n_tokens, inter]`; in a mixture by token, `[n_tokens, k·width]`.
    pub h: Tensor,
}

/// ∂L/∂(output of every linear of a layer) and ∂L/∂(its input).
#[derive(Clone, Debug)]
pub struct LayerGradients {
    /// Of attention's linears.
    pub attention: AttentionGradients,
    /// Of the MLP's linears.
    pub mlp: MlpGradients,
    /// With respect to the layer's input, `[n_tokens, hidden]`.
    pub x: Tensor,
}

/// Carries `d_out = ∂L/∂(output of the layer)` `[n, hidden]` back through the whole layer.
///
/// # Errors
/// A tensor error if shapes disagree; [`crate::Error::Missing`] if the layer lacks a linear.
pub fn layer(pass: &AttentionPass, d_out: &Tensor) -> Result<LayerGradients> {
    let mlp = mlp(pass.layer, &pass.y, d_out)?;
    let attention = attention(pass, &mlp.y)?;
    let x = input(pass, &attention, &mlp.y)?;
    Ok(LayerGradients { attention, mlp, x })
}

/// Carries the gradients with respect to q, k and v, and `d_y = ∂L/∂y`, back to the layer's input
/// `[n, hidden]`: dn₁ = P_q·W_q + P_k·W_k + P_v·W_v through the norm, and d_y past attention.
///
/// # Errors
/// A tensor error if shapes disagree.
pub fn input(pass: &AttentionPass, gradients: &AttentionGradients, d_y: &Tensor) -> Result<Tensor> {
    let layer = pass.layer;
    let back = |projection, p: &Tensor| -> Result<Tensor> { layer.linear(projection)?.backward(p) };
    let d_n1 = (back(Projection::Q, &gradients.q)? + back(Projection::K, &gradients.k)?)?;
    let d_n1 = (d_n1 + back(Projection::V, &gradients.v)?)?;
    Ok((d_y + layer.qkv_norm_backward(&pass.x, &d_n1)?)?)
}

/// Carries `d_y = ∂L/∂y` `[n, hidden]` back through attention.
///
/// For L = ‖y_U − y_F‖² it is 2·(y_U − y_F).
///
/// # Errors
/// A tensor error if shapes disagree.
/// Source: arXiv:2508.03351 §3.2; checked against finite differences and automatic gradients.
pub fn attention(pass: &AttentionPass, d_y: &Tensor) -> Result<AttentionGradients> {
    let (layer, trace) = (pass.layer, &pass.trace);
    let rope = layer.rope(pass.context);
    let d_o = layer.after_attention_backward(&trace.output, d_y)?;
    let d_heads = layer.split_heads(&layer.linear(Projection::O)?.backward(&d_o)?)?;
    let mut d_q = Vec::new();
    let (mut d_k, mut d_v) = (trace.keys.zeros_like()?, trace.values.zeros_like()?);
    for rows in trace.blocks() {
        let a = trace.probabilities(rows.clone())?;
        let seen = trace.visible(&rows)?;
        let d_heads = trace.rows(&d_heads, &rows)?;
        d_v = add_rows(&d_v, &a.t()?.matmul(&d_heads)?)?;
        let d_a = d_heads.matmul(&seen.values.t()?)?;
        // Softmax: dS = A ∘ (dA − rowsum(A ∘ dA)).
        let row_sums = (&a * &d_a)?.sum_keepdim(D::Minus1)?;
        let d_s = (a * d_a.broadcast_sub(&row_sums)?)?;
        let d_s = trace.scores_backward(&rows, d_s)?;
        let (heads, _, head_dim) = trace.queries.dims3()?;
        d_q.push(
            d_s.matmul(&seen.keys)?
                .reshape((heads, rows.len(), head_dim))?,
        );
        let queries = trace.rows(&trace.queries, &rows)?;
        d_k = add_rows(&d_k, &d_s.t()?.matmul(&queries)?)?;
    }
    let before_norm = |projection, d: &Tensor| -> Result<Tensor> {
        let d = layer.head_norm_backward(projection, &pass.n1, rope.rotate_back(d)?)?;
        merge_heads(&d)
    };
    Ok(AttentionGradients {
        q: before_norm(Projection::Q, &Tensor::cat(&d_q, 1)?)?,
        k: before_norm(Projection::K, &d_k)?,
        v: merge_heads(&d_v)?,
        o: d_o,
    })
}

/// `sum [heads, n, m]` with `rows [heads, fewer, m]` added to its first rows.
fn add_rows(sum: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let n_more = sum.dim(1)? - rows.dim(1)?;
    Ok((sum + rows.pad_with_zeros(1, 0, n_more)?)?)
}

/// Carries `d_out = ∂L/∂(output of the layer)` `[n, hidden]` back through the MLP to y.
///
/// # Errors
/// A tensor error if shapes disagree.
pub fn mlp(layer: &DecoderLayer, y: &Tensor, d_out: &Tensor) -> Result<MlpGradients> {
    let n2 = layer.gate_up_input(y)?;
    let (h, (gradients, d_n2)) = match layer.router() {
        None => {
            let pass = GatedPass::new(layer, None, n2.clone())?;
            let d_down = layer.after_mlp_backward(y, &pass.h, d_out)?;
            (pass.h.clone(), pass.backward(layer, &d_down)?)
        }
        Some(router) => {
            let h = layer.down_input(&n2)?;
            let d_sum = layer.after_mlp_backward(y, &h, d_out)?;
            (h, mixture(layer, router, &n2, &d_sum)?)
        }
    };
    let [gate, up, down] = gradients;
    let y = (d_out + layer.gate_up_norm_backward(y, &d_n2)?)?;
    Ok(MlpGradients {
        gate,
        up,
        down,
        y,
        n2,
        h,
    })
}

/// Carries `d_sum`, the gradient with respect to the weighted sum of the experts' outputs, back to
/// their linears and to n₂: through the experts, and through the weights of the sum.
fn mixture(
    layer: &DecoderLayer,
    router: &Router,
    n2: &Tensor,
    d_sum: &Tensor,
) -> Result<([Tensor; 3], Tensor)> {
    let routing = router.route(n2)?;
    let (rows, d_rows) = (routing.dispatch(n2)?, routing.dispatch(d_sum)?);
    let mut parts: [Vec<Tensor>; 5] = Default::default();
    for (expert, run) in routing.runs() {
        let run = |all: &Tensor| all.narrow(0, run.start, run.len());
        let pass = GatedPass::new(layer, Some(expert), run(&rows)?)?;
        let d_rows = run(&d_rows)?;
        // out = w·down(h): d wrt w is ⟨d_out, down(h)⟩, wrt down(h) w·d_out.
        let d_weight = (pass.output(layer)? * &d_rows)?.sum(D::Minus1)?;
        let d_down = d_rows.broadcast_mul(&run(routing.weights())?)?;
        let ([gate, up, down], d_x) = pass.backward(layer, &d_down)?;
        for (part, own) in parts.iter_mut().zip([gate, up, down, d_x, d_weight]) {
            part.push(own);
        }
    }
    let [gate, up, down, d_x, d_weight] = parts.map(|part| Tensor::cat(&part, 0));
    let d_n2 = (routing.sum(&d_x?)? + router.backward(&routing, &d_weight?)?)?;
    let by_token = |rows: candle_core::Result<Tensor>| routing.by_token(&rows?);
    Ok(([by_token(gate)?, by_token(up)?, by_token(down)?], d_n2))
}

/// The way of tokens through one gated MLP, with what the way back needs.
struct GatedPass {
    expert: Option<usize>,
    up: Tensor,
    activated: Activated,
    h: Tensor,
}

impl GatedPass {
    fn new(layer: &DecoderLayer, expert: Option<usize>, x: Tensor) -> Result<Self> {
        let linear = |projection| layer.linear(Slot { projection, expert });
        let gate = linear(Projection::Gate)?.forward(&x)?;
        let up = linear(Projection::Up)?.forward(&x)?;
        let activated = activated(layer.activation(), &gate)?;
        Ok(Self {
            expert,
            h: (&activated.value * &up)?,
            up,
            activated,
        })
    }

    fn output(&self, layer: &DecoderLayer) -> Result<Tensor> {
        let (projection, expert) = (Projection::Down, self.expert);
        layer.linear(Slot { projection, expert })?.forward(&self.h)
    }

    /// From the gradient with respect to down's output to those of gate, up and down, and to that
    /// of the input.
    fn backward(self, layer: &DecoderLayer, d_down: &Tensor) -> Result<([Tensor; 3], Tensor)> {
        let expert = self.expert;
        let back = |projection, d: &Tensor| -> Result<Tensor> {
            layer.linear(Slot { projection, expert })?.backward(d)
        };
        let d_h = back(Projection::Down, d_down)?;
        let d_up = (&d_h * self.activated.value)?;
        let d_gate = ((d_h * self.up)? * self.activated.slope)?;
        let d_x = (back(Projection::Gate, &d_gate)? + back(Projection::Up, &d_up)?)?;
        Ok(([d_gate, d_up, d_down.clone()], d_x))
    }
}

/// An activation's values and its derivatives.
struct Activated {
    value: Tensor,
    slope: Tensor,
}

fn activated(activation: Activation, z: &Tensor) -> Result<Activated> {
    match activation {
        Activation::Silu => {
            let s = sigmoid(z)?;
            // silu'(z) = σ(z)·(1 + z·(1 − σ(z)))
            let slope = (&s * ((z * (1.0 - &s)?)? + 1.0)?)?;
            Ok(Activated {
                value: (z * s)?,
                slope,
            })
        }
        Activation::GeluTanh => {
            // gelu(z) = z·(1 + t)/2 with t = tanh(c·(z + a·z³)).
            const C: f64 = 0.797_884_560_802_865_4;
            const A: f64 = 0.044_715;
            let square = z.sqr()?;
            let t = ((z * ((&square * A)? + 1.0)?)? * C)?.tanh()?;
            let half = ((&t + 1.0)? * 0.5)?;
            let inner = ((square * (3.0 * A))? + 1.0)?;
            let bend = (((1.0 - t.sqr()?)? * inner)? * (0.5 * C))?;
            Ok(Activated {
                value: (z * &half)?,
                slope: (half + (z * bend)?)?,
            })
        }
    }
}
