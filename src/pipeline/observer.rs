//! Who watches a run, and may end it.

use crate::model::source::Module;
use crate::statistics::Statistics;

/// What happens around a run.
pub trait Observer: Sync {
    /// A layer is about to be done.
    fn on_layer(&self, layer_idx: usize, n_layers: usize);
    /// A stage of it begins: one of the keys of [`super::LayerOutcome::seconds`]. They come in turns, some
    /// of them several times a layer.
    fn on_stage(&self, _name: &str) {}
    /// What some linears see was summed up; they are solved next.
    fn on_statistics(&self, _found: &GroupStatistics<'_>) {}
    /// Whether the user asked to stop.
    fn is_cancelled(&self) -> bool;
}

/// What linears see that share their inputs and their token weights.
pub struct GroupStatistics<'a> {
    /// Their layer.
    pub layer_idx: usize,
    /// They themselves; at least one.
    pub modules: &'a [Module],
    /// H, and C where a correction for drift is asked for.
    pub statistics: &'a Statistics,
    /// ω, `[sample][token]`; `None` where all tokens weigh alike.
    pub weights: Option<&'a [Vec<f32>]>,
    /// g, `[sample][token]`, that ω is made of; `None` where there is no importance.
    pub factors: Option<&'a [Vec<f32>]>,
}

/// An observer that looks away.
pub struct Unobserved;

impl Observer for Unobserved {
    fn on_layer(&self, _: usize, _: usize) {}

    fn is_cancelled(&self) -> bool {
        false
    }
}
