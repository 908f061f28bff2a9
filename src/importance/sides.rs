//! The two sides of each linear of a layer: what went into it, and the gradient with respect to
//! what came out.

use super::backward::{AttentionPass, LayerGradients, MlpGradients};
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
    /// The MLP's, in a mixture.
    experts: Option<ByExpert>,
}

/// The rows of an MLP's linears by expert, and which of them are each expert's.
struct ByExpert {
    runs: BTreeMap<usize, Range<usize>>,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    /// What goes into gate and up.
    n2: Tensor,
    /// What goes into down.
    h: Tensor,
}

impl ByExpert {
    fn new(routing: &Routing, mlp: &MlpGradients) -> Result<Self> {
        let runs = routing.runs();
        Ok(Self {
            runs: runs.map(|(expert, run)| (expert, run.clone())).collect(),
            gate: routing.by_expert(&mlp.gate)?,
            up: routing.by_expert(&mlp.up)?,
            down: routing.by_expert(&mlp.down)?,
            n2: routing.dispatch(&mlp.n2)?,
            h: routing.by_expert(&mlp.h)?,
        })
    }

    fn of(&self, expert: usize, projection: Projection) -> Result<Option<(Tensor, Tensor)>> {
        let Some(run) = self.runs.get(&expert) else {
            return Ok(None);
        };
        let (p, u) = match projection {
            Projection::Down => (&self.down, &self.h),
            Projection::Up => (&self.up, &self.n2),
            _ => (&self.gate, &self.n2),
        };
        let own = |rows: &Tensor| rows.narrow(0, run.start, run.len());
        Ok(Some((own(p)?, own(u)?)))
    }
}

impl<'a> Sides<'a> {
    /// Of a pass and its gradients.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn new(pass: &'a AttentionPass<'a>, gradients: &'a LayerGradients) -> Result<Self> {
        let routing = pass.layer().routing(&gradients.mlp.n2)?;
        let experts = routing.map(|routing| ByExpert::new(&routing, &gradients.mlp));
        Ok(Self {
            pass,
            gradients,
            experts: experts.transpose()?,
        })
    }

    /// P = ∂L/∂(output) `[n, out]` and the input u `[n, in]` of a linear, over the tokens that it
    /// saw; `None` for an expert that saw none.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn of(&self, slot: Slot) -> Result<Option<(Tensor, Tensor)>> {
        if let (Some(expert), Some(experts)) = (slot.expert, &self.experts) {
            return experts.of(expert, slot.projection);
        }
        let (p, u) = self.of_all(slot.projection);
        Ok(Some((p.clone(), u.clone())))
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
