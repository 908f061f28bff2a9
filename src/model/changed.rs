//! Tensors of a layer that are no quantized linears, and that a run changes all the same: what a
//! transform that keeps the layer's function takes out of a linear, it puts into one of these.

use crate::model::projection::Slot;

/// A tensor of a decoder layer besides the weights of its linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerPart {
    /// Weight of the norm whose outputs q, k and v read.
    BeforeAttention,
    /// Weight of the norm whose outputs gate and up read.
    BeforeMlp,
    /// Bias of a linear.
    Bias(Slot),
}

/// A tensor that takes the place of the source's.
#[derive(Clone, Debug, PartialEq)]
pub struct ChangedTensor {
    /// Layer that it belongs to.
    pub layer_idx: usize,
    /// What it is there.
    pub part: LayerPart,
    /// Checkpoint name.
    pub name: String,
    /// Values as they will be stored: rounded to the source's type, in the source's shape.
    pub values: Vec<f32>,
    /// What changed it, for the report.
    pub by: String,
}
