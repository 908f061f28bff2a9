//! Who takes what a run makes of each layer, and what each has to tell.

use crate::model::changed::ChangedTensor;
use crate::model::source::Module;
use crate::report::importance::KeptWeights;
use crate::report::{ChangeReport, Deviation, ModuleReport, ScaleReport};
use crate::statistics::InputSquares;
use crate::{QuantizedWeight, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a layer has to tell besides its weights.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LayerOutcome {
    /// One entry per module, in solving order.
    pub modules: Vec<ModuleReport>,
    /// Scales that were searched for.
    #[serde(default)]
    pub scales: Vec<ScaleReport>,
    /// Plain tensors that are not the source's.
    #[serde(default)]
    pub changed: Vec<ChangeReport>,
    /// Everything that went another way than planned.
    pub deviations: Vec<Deviation>,
    /// How large the inputs of its linears are, where statistics of them were kept.
    #[serde(default)]
    pub input_squares: Vec<InputSquares>,
    /// Token weights of a few samples, where the sink wants them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_weights: Vec<KeptWeights>,
    /// What ranks sent each other for it, all together.
    #[serde(default)]
    pub bytes_exchanged: u64,
    /// Wall time per stage in seconds; `exchange` is what ranks waited for each other's bytes.
    pub seconds: BTreeMap<String, f64>,
}

/// A layer that an earlier run finished.
pub struct FinishedLayer {
    /// Modules by name, in solving order.
    pub weights: Vec<(String, QuantizedWeight)>,
    /// Plain tensors that are not the source's, by name.
    pub tensors: Vec<(String, Vec<f32>)>,
    /// What it had to tell.
    pub outcome: LayerOutcome,
}

/// Who takes the layers as they are finished, and may have some of them already.
pub trait LayerSink {
    /// The layer, if an earlier run finished it; its modules are then not handed over again.
    ///
    /// # Errors
    /// The sink's own, which end the run.
    fn finished(&mut self, _layer_idx: usize) -> Result<Option<FinishedLayer>> {
        Ok(None)
    }

    /// The samples whose token weights are to be kept for the report, for which the loss of rounding
    /// to nearest is measured as well; `None` where there will be no report.
    fn kept_samples(&self) -> Option<Vec<usize>> {
        None
    }

    /// Takes a module as soon as it is solved.
    ///
    /// # Errors
    /// The sink's own, which end the run.
    fn module(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()>;

    /// Takes a plain tensor that is not the source's.
    ///
    /// # Errors
    /// The sink's own, which end the run.
    fn tensor(&mut self, tensor: &ChangedTensor) -> Result<()>;

    /// All modules of a layer were taken.
    ///
    /// # Errors
    /// The sink's own, which end the run.
    fn layer(&mut self, _layer_idx: usize, _outcome: &LayerOutcome) -> Result<()> {
        Ok(())
    }
}
