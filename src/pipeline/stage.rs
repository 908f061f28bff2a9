//! The four places of a layer at which its linears see their inputs.

use crate::model::projection::{Projection, Slot};
use crate::model::source::Module;

/// A group of linears with the same inputs, in solving order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// q, k and v see the normalised residual stream.
    Qkv,
    /// o sees the heads put together.
    O,
    /// gate and up see the residual stream normalised again.
    GateUp,
    /// down sees the gated product.
    Down,
}

impl Stage {
    pub(super) const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    pub(super) fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Self::O => &[Projection::O],
            Self::GateUp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }

    /// Those of a layer's modules that see their inputs here.
    pub(super) fn modules(self, layer: &[Module]) -> impl Iterator<Item = &Module> {
        let own = self.projections();
        layer.iter().filter(|m| own.contains(&m.slot.projection))
    }

    /// The linears between the stage before and this one.
    pub(super) fn crossed(self, layer: &[Module]) -> Vec<Slot> {
        let before = match self {
            Self::Qkv => return Vec::new(),
            Self::O => Self::Qkv,
            Self::GateUp => Self::O,
            Self::Down => Self::GateUp,
        };
        before.modules(layer).map(|m| m.slot).collect()
    }
}
