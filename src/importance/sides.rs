//! The two sides of each linear of a layer: what went into it, and the gradient with respect to
//! what came out.

use super::backward::{AttentionPass, LayerGradients};
use crate::Result;
use crate::model::experts::Routing;
use crate::model::projection::{Projection, Slot};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::ops::Range;

/// One sequence's way through a layer and back.
pub struct Sides<'a> {
    pass: &'a AttentionPass<'a>,
    gradients: &'a LayerGradients,
    /// Where tokens were sent, in a mixture, and which rows are each expert's.
    routing: Option<(Routing, BTreeMap<usize, Range<usize>>)>,
}

impl<'a> Sides<'a> {
    /// Of a pass and its gradients.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn new(pass: &'a AttentionPass<'a>, gradients: &'a LayerGradients) -> Result<Self> {
        let routing = pass.layer().routing(&gradients.mlp.n2)?.map(|routing| {
            let runs = routing.runs();
            let runs = runs.map(|(expert, run)| (expert, run.clone())).collect();
            (routing, runs)
        });
        Ok(Self {
            pass,
            gradients,
            routing,
        })
    }

    /// P = ∂L/∂(output) `[n, out]` and the input u `[n, in]` of a linear, over the tokens that it
    /// saw; `None` for an expert that saw none.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn of(&self, slot: Slot) -> Result<Option<(Tensor, Tensor)>> {
        let (p, u) = self.of_all(slot.projection);
        let (Some(expert), Some((routing, runs))) = (slot.expert, &self.routing) else {
            return Ok(Some((p.clone(), u.clone())));
        };
        let Some(run) = runs.get(&expert) else {
            return Ok(None);
        };
        let u = match slot.projection {
            Projection::Down => routing.by_expert(u)?,
            _ => routing.dispatch(u)?,
        };
        let own = |rows: &Tensor| rows.narrow(0, run.start, run.len());
        Ok(Some((own(&routing.by_expert(p)?)?, own(&u)?)))
    }

    /// The same of all experts together, by token.
    fn of_all(&self, projection: Projection) -> (&Tensor, &Tensor) {
        let (pass, attention, mlp) = (self.pass, &self.gradients.attention, &self.gradients.mlp);
        match projection {
            Projection::Q => (&attention.q, &pass.n1),
            Projection::K => (&attention.k, &pass.n1),
            Projection::V => (&attention.v, &pass.n1),
            Projection::O => (&attention.o, pass.o_input()),
            Projection::Gate => (&mlp.gate, &mlp.n2),
            Projection::Up => (&mlp.up, &mlp.n2),
            Projection::Down => (&mlp.down, &mlp.h),
        }
    }
}
