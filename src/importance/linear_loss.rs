//! The loss of a linear's own output: nothing is carried back, and a token's factor is the norm of
//! the error that it meets there.
//!
//! For the drift of the stream that error is W(u − f), u and f being the inputs with which the two
//! streams reach the linear through full-precision weights; for rounding it is (W − Ŵ)u.
//! Source: arXiv:2508.03351, ablation of the loss ("layer MSE").

use super::backward::AttentionPass;
use super::factors::{Drift, Gradients, SampleInLayer};
use crate::Result;
use crate::model::decoder::DecoderLayer;
use crate::model::experts::Routing;
use crate::model::projection::{Projection, Slot};
use candle_core::Tensor;

/// Gradients of ‖W(u − f)‖² with respect to the output Wu, or of ‖(W − Ŵ)u‖² with `rounded`, and
/// how far the stream has drifted.
///
/// # Errors
/// [`crate::Error::Missing`] without a linear or the full-precision stream; a tensor error if shapes
/// disagree.
pub(super) fn gradients(
    sample: &SampleInLayer,
    pass: &AttentionPass,
    rounded: Option<&DecoderLayer>,
) -> Result<(Gradients, Drift)> {
    let layer = sample.layer;
    let errors = Errors { layer, rounded };
    let (n1, a) = (&pass.n1, &pass.trace.output);
    let (full_n1, full_a, full_y) = match rounded {
        Some(_) => (n1, a, &pass.y),
        None => {
            let full = sample.full()?;
            (&full.n1, &full.a, &full.y)
        }
    };
    let mut all = Vec::new();
    for projection in [Projection::Q, Projection::K, Projection::V] {
        all.push((projection, errors.of(projection.into(), n1, full_n1)?));
    }
    all.push((Projection::O, errors.of(Projection::O.into(), a, full_a)?));
    let (n2, full_n2) = (layer.gate_up_input(&pass.y)?, layer.gate_up_input(full_y)?);
    all.extend(errors.of_mlp(&n2, &full_n2)?);
    Ok((all, Drift::of(&(n1 - full_n1)?, full_n1)?))
}

/// What is made wrong at each linear: by its inputs, or by rounding.
struct Errors<'a> {
    layer: &'a DecoderLayer,
    rounded: Option<&'a DecoderLayer>,
}

impl Errors<'_> {
    /// Twice the error of a linear's output for inputs `u [n, in]` that should be `f`.
    fn of(&self, slot: Slot, u: &Tensor, f: &Tensor) -> Result<Tensor> {
        let linear = self.layer.linear(slot)?;
        let error = match self.rounded {
            None => linear.without_bias(&(u - f)?)?,
            Some(rounded) => {
                let (w, q) = (linear.weight_f32()?, rounded.linear(slot)?.weight_f32()?);
                u.matmul(&(w - q)?.t()?)?
            }
        };
        Ok((error * 2.0)?)
    }

    fn of_mlp(&self, n2: &Tensor, full_n2: &Tensor) -> Result<Gradients> {
        let (h, full_h) = (self.layer.down_input(n2)?, self.layer.down_input(full_n2)?);
        let routings = (self.layer.routing(n2)?, self.layer.routing(full_n2)?);
        if let (Some(routing), Some(full)) = routings {
            let f = Matched::new(&routing, &full, n2)?;
            let n2 = f.missing_as(&routing.dispatch(n2)?, &routing.dispatch(full_n2)?)?;
            let h = f.missing_as(&routing.by_expert(&h)?, &f.rows(&full_h)?)?;
            return self.of_mixture(&routing, n2, h);
        }
        let roles = [
            (Projection::Gate, n2, full_n2),
            (Projection::Up, n2, full_n2),
            (Projection::Down, &h, &full_h),
        ];
        let of_role = |(p, u, f): (Projection, _, _)| Ok((p, self.of(p.into(), u, f)?));
        roles.into_iter().map(of_role).collect()
    }

    /// Of u and f by expert.
    fn of_mixture(&self, routing: &Routing, n2: Inputs, h: Inputs) -> Result<Gradients> {
        let roles = [
            (Projection::Gate, &n2),
            (Projection::Up, &n2),
            (Projection::Down, &h),
        ];
        let of_role = |(projection, inputs): (Projection, &Inputs)| {
            let mut parts = Vec::new();
            for (expert, run) in routing.runs() {
                let rows = |x: &Tensor| x.narrow(0, run.start, run.len());
                let expert = Some(expert);
                let slot = Slot { projection, expert };
                parts.push(self.of(slot, &rows(&inputs.u)?, &rows(&inputs.f)?)?);
            }
            Ok((projection, routing.by_token(&Tensor::cat(&parts, 0)?)?))
        };
        roles.into_iter().map(of_role).collect()
    }
}

/// Inputs of a mixture's linears by expert.
struct Inputs {
    u: Tensor,
    f: Tensor,
}

/// Which rows of the full-precision stream belong to those of the quantized stream, by expert.
struct Matched {
    /// For each row its place by token in the full-precision stream.
    places: Tensor,
    /// 1 where there is one, 0 where that stream sends the token elsewhere, `[n·k, 1]`.
    is_there: Tensor,
}

impl Matched {
    fn new(routing: &Routing, full: &Routing, like: &Tensor) -> Result<Self> {
        let n_tokens = like.dim(0)?;
        let n_chosen = routing.weights().dim(0)? / n_tokens.max(1);
        let (mut places, mut is_there) = (Vec::new(), Vec::new());
        for (expert, _) in routing.runs() {
            for (token, _) in routing.of_expert(expert) {
                let choice = full.choice(token, expert);
                places.push((token * n_chosen + choice.unwrap_or(0)) as u32);
                is_there.push(f32::from(u8::from(choice.is_some())));
            }
        }
        let n = places.len();
        Ok(Self {
            places: Tensor::from_vec(places, n, like.device())?,
            is_there: Tensor::from_vec(is_there, (n, 1), like.device())?,
        })
    }

    /// Rows by token of the full-precision stream, `[n, k·width]`, in the order of the other's by
    /// expert.
    fn rows(&self, by_token: &Tensor) -> Result<Tensor> {
        let n = self.places.dim(0)?;
        Ok(by_token.reshape((n, ()))?.index_select(&self.places, 0)?)
    }

    /// As for the statistics: what the full-precision stream sends elsewhere meets no error here.
    fn missing_as(&self, u: &Tensor, f: &Tensor) -> Result<Inputs> {
        let gap = (u - f)?.broadcast_mul(&self.is_there)?;
        Ok(Inputs {
            f: (u - gap)?,
            u: u.clone(),
        })
    }
}
