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
use crate::model::decoder::{DecoderLayer, Projection};
use crate::model::rope::Rope;
use candle_core::{D, Tensor};
use candle_nn::ops::sigmoid;

/// ∂L/∂(output of q, k, v, o), each `[n_tokens, out]`.
#[derive(Clone, Debug)]
pub struct AttentionGradients {
    /// With respect to the queries before rotation.
    pub q: Tensor,
    /// With respect to the keys before rotation.
    pub k: Tensor,
    /// With respect to the values.
    pub v: Tensor,
    /// With respect to the attention output.
    pub o: Tensor,
}

/// ∂L/∂(output of gate, up, down), each `[n_tokens, out]`, and ∂L/∂y.
#[derive(Clone, Debug)]
pub struct MlpGradients {
    /// With respect to the gate before its activation.
    pub gate: Tensor,
    /// With respect to the up projection.
    pub up: Tensor,
    /// With respect to the down projection.
    pub down: Tensor,
    /// With respect to the residual stream between attention and MLP, `[n_tokens, hidden]`.
    pub y: Tensor,
}

/// Carries `d_o = ∂L/∂(output of o_proj)` `[n, hidden]` back through attention.
///
/// For L = ‖y_U − y_F‖² it is 2·(y_U − y_F).
///
/// # Errors
/// A tensor error if shapes disagree.
/// Source: arXiv:2508.03351 §3.2; checked against finite differences and automatic gradients.
pub fn attention(
    layer: &DecoderLayer,
    trace: &Attention,
    rope: &Rope,
    d_o: &Tensor,
) -> Result<AttentionGradients> {
    let d_heads = layer.split_heads(&d_o.matmul(layer.linear(Projection::O)?.weight())?)?;
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
        let d_s = ((a * d_a.broadcast_sub(&row_sums)?)? * trace.score_scale()?)?;
        let (heads, _, head_dim) = trace.queries.dims3()?;
        d_q.push(
            d_s.matmul(&seen.keys)?
                .reshape((heads, rows.len(), head_dim))?,
        );
        let queries = trace.rows(&trace.queries, &rows)?;
        d_k = add_rows(&d_k, &d_s.t()?.matmul(&queries)?)?;
    }
    Ok(AttentionGradients {
        q: merge_heads(&rope.rotate_back(&Tensor::cat(&d_q, 1)?)?)?,
        k: merge_heads(&rope.rotate_back(&d_k)?)?,
        v: merge_heads(&d_v)?,
        o: d_o.clone(),
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
    let gate = layer.linear(Projection::Gate)?.forward(&n2)?;
    let up = layer.linear(Projection::Up)?.forward(&n2)?;
    let s = sigmoid(&gate)?;
    let d_h = d_out.matmul(layer.linear(Projection::Down)?.weight())?;
    let d_up = (&d_h * (&gate * &s)?)?;
    // silu'(z) = σ(z)·(1 + z·(1 − σ(z)))
    let slope = (&s * ((&gate * (1.0 - &s)?)? + 1.0)?)?;
    let d_gate = ((&d_h * up)? * slope)?;
    let d_n2 = (d_gate.matmul(layer.linear(Projection::Gate)?.weight())?
        + d_up.matmul(layer.linear(Projection::Up)?.weight())?)?;
    Ok(MlpGradients {
        gate: d_gate,
        up: d_up,
        down: d_out.clone(),
        y: (d_out + layer.gate_up_norm_backward(y, &d_n2)?)?,
    })
}
