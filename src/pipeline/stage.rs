//! The four places of a layer at which its linears see their inputs.

use crate::model::decoder::Projection;

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

    /// The linears between the stage before and this one.
    pub(super) fn crossed(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[],
            Self::O => Self::Qkv.projections(),
            Self::GateUp => Self::O.projections(),
            Self::Down => Self::GateUp.projections(),
        }
    }
}
