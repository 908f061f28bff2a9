//! What a run did, as data: every module with its loss, every deviation from the plan, time and
//! memory. Written beside the model as JSON; nothing is decided from it.

pub mod card;
pub mod importance;
pub(crate) mod log;
mod memory;
mod notes;
pub mod page;

pub use memory::{free_memory_bytes, peak_memory_bytes};

use crate::allocation::AllocationReport;
use crate::engine::EngineReport;
use crate::importance::{Safeguarded, Uniform};
use crate::model::Projection;
use crate::pipeline::LayerOutcome;
use crate::plan::Scheme;
use crate::tuning::TuningReport;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of [`RunReport`]'s form.
pub const SCHEMA: u32 = 1;

/// Name of the report in an output folder.
pub const REPORT_FILE: &str = "vlmq_report.json";

/// A whole run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RunReport {
    /// Version of this form.
    pub schema: u32,
    /// Version of vlmq.
    pub vlmq: String,
    /// Method by its name on the command line.
    pub method: String,
    /// The command that was given, where it is known; of a folder's whole path its name alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// What was quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceReport>,
    /// The format by its name on the command line, and the bytes of all tensors in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputReport>,
    /// Every setting that had a part in it.
    pub settings: serde_json::Value,
    /// What was calibrated on; absent without calibration.
    pub calibration: Option<CalibrationReport>,
    /// How bits were shared out, where a mean was asked for; `settings.scheme` has other bits then
    /// than most modules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<AllocationReport>,
    /// Who took part, where there were several, and in how many shards samples were summed up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RanksReport>,
    /// What ran where; absent in reports of before it was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineReport>,
    /// Layers that an earlier run had finished.
    #[serde(default)]
    pub n_resumed_layers: usize,
    /// One entry per module, in solving order.
    pub modules: Vec<ModuleReport>,
    /// Scales of input channels that were searched for, layer by layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scales: Vec<ScaleReport>,
    /// Plain tensors that are not the source's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<ChangeReport>,
    /// Everything that went another way than planned.
    pub deviations: Vec<Deviation>,
    /// Wall time per layer and stage in seconds, by the run that solved the layer.
    #[serde(default)]
    pub layers: Vec<BTreeMap<String, f64>>,
    /// What tuning of scales did after the last layer, where it was asked for. The modules' losses
    /// are those before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<TuningReport>,
    /// Wall time per stage in seconds, over all layers; `check`, `processor`, `vision` (before the
    /// first layer) and `total` are this run's.
    pub seconds: BTreeMap<String, f64>,
    /// Highest resident memory of the process, where the system tells it.
    pub peak_memory_bytes: Option<u64>,
}

impl RunReport {
    /// Adds what a layer has to tell.
    pub fn add_layer(&mut self, layer: LayerOutcome) {
        self.modules.extend(layer.modules);
        self.scales.extend(layer.scales);
        self.changed.extend(layer.changed);
        self.deviations.extend(layer.deviations);
        for (stage, seconds) in &layer.seconds {
            *self.seconds.entry(stage.clone()).or_default() += seconds;
        }
        if let Some(ranks) = &mut self.ranks {
            ranks.bytes_exchanged.push(layer.bytes_exchanged);
        }
        self.layers.push(layer.seconds);
    }

    /// The report of a folder; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if it is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(REPORT_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, "read", e)),
        };
        let report = serde_json::from_slice(&bytes);
        report
            .map(Some)
            .map_err(|e| Error::format(&path, "JSON", e.to_string()))
    }

    /// Name and content of its file.
    pub fn to_file(&self) -> (String, Vec<u8>) {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a report has only text keys");
        bytes.push(b'\n');
        (REPORT_FILE.to_owned(), bytes)
    }

    /// Adds what tuning has to tell.
    pub fn add_tuning(&mut self, tuning: Option<TuningReport>) {
        if let Some(tuning) = &tuning {
            self.seconds.insert("tuning".into(), tuning.seconds);
            if tuning.best_step == 0 {
                self.deviations.push(Deviation::TuningUndone {
                    held_out_loss: tuning.held_out_before,
                });
            }
        }
        self.tuning = tuning;
    }
}

/// How a run was shared out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RanksReport {
    /// Processes that took part.
    pub n_ranks: usize,
    /// Shards that samples were summed up in: the same number gives the same codes.
    pub n_shards: usize,
    /// Bytes that all ranks sent each other for each layer, by the run that solved it.
    pub bytes_exchanged: Vec<u64>,
}

/// The model that a run quantized.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Name of its folder.
    pub name: String,
    /// `model_type` of its configuration.
    pub model_type: Option<String>,
    /// Bytes of all its tensors.
    pub tensor_bytes: u64,
}

/// What a run wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputReport {
    /// The format by its name on the command line.
    pub format: String,
    /// Bytes of all tensors, those that were not quantized included.
    pub tensor_bytes: u64,
}

/// The calibration data of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// Number of samples.
    pub n_samples: usize,
    /// Sequences that they make: a long text is several.
    #[serde(default)]
    pub n_sequences: usize,
    /// Seed of their choice.
    pub seed: u64,
    /// Tokens by class.
    pub n_tokens: BTreeMap<String, u64>,
}

/// One module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModuleReport {
    /// Checkpoint name.
    pub name: String,
    /// Layer it belongs to.
    pub layer_idx: usize,
    /// `[out, in]`, absent in reports of before it was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<[usize; 2]>,
    /// Number format; absent if it was left as it was.
    pub scheme: Option<Scheme>,
    /// tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ): the share of the weighted output energy that is lost.
    pub relative_loss: Option<f64>,
    /// The numerator: squared output error, summed over weighted tokens and rows.
    pub loss: Option<f64>,
    /// What `loss` would be had the weight been rounded to nearest, by a run that keeps this for its
    /// report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest_loss: Option<f64>,
    /// λ / mean(diag H) that was used.
    pub dampening_frac: Option<f64>,
    /// α that was used.
    pub alpha: Option<f64>,
    /// Inputs that were zero in all tokens.
    pub n_dead_columns: Option<usize>,
    /// (Σω)² / Σω² over tokens.
    pub effective_sample_size: Option<f64>,
    /// Share of Σω by token class, where tokens are weighted; of an expert over its own tokens.
    pub weight_share: Option<BTreeMap<String, f64>>,
}

/// A search for the scales of some linears' input channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScaleReport {
    /// Layer.
    pub layer_idx: usize,
    /// What they are taken out of: a norm, or the rows of a linear.
    pub source: String,
    /// The linears whose columns they are put into.
    pub modules: Vec<String>,
    /// The exponent that was best.
    pub ratio: f64,
    /// The loss of each exponent, evenly spaced from 0, which is no scales at all.
    pub losses: Vec<f64>,
}

/// A plain tensor that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeReport {
    /// Checkpoint name.
    pub name: String,
    /// What changed it.
    pub by: String,
}

/// Why the inputs of some linears have no scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotScaled {
    /// Several heads of queries read the same values, whose rows cannot be scaled for each.
    GroupedQueries,
    /// A rule leaves one of the linears, or the one before them, as it is.
    LeftAsItIs,
}

impl std::fmt::Display for NotScaled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::GroupedQueries => "several heads of queries share their values",
            Self::LeftAsItIs => "a rule leaves a linear as it is that would have to change",
        })
    }
}

/// Something that went another way than planned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Deviation {
    /// A module's Hessian needed more damping.
    DampingRaised {
        /// Module.
        module: String,
        /// Values that failed.
        tried: Vec<f64>,
        /// Value that was used.
        used: f64,
        /// Whether that Hessian is of the part of the samples that α is found with, and not of all.
        #[serde(default)]
        of_part: bool,
    },
    /// A layer's tokens could not be weighted.
    UniformWeights {
        /// Layer.
        layer_idx: usize,
        /// Role of the module.
        projection: String,
        /// Why.
        reason: Uniform,
    },
    /// Safeguards had a part in the weights of a layer's tokens.
    Safeguarded {
        /// Layer.
        layer_idx: usize,
        /// Role of the module.
        projection: String,
        /// What they did.
        changes: Safeguarded,
    },
    /// A rule left a module as it was.
    Skipped {
        /// Module.
        module: String,
    },
    /// Fewer effective tokens than inputs: the solution rests on damping.
    FewTokens {
        /// Module.
        module: String,
        /// Effective sample size.
        effective_sample_size: f64,
        /// Input features.
        in_features: usize,
    },
    /// Its tokens come from too few samples to hold any out: its drift was not corrected.
    UnjudgedAlpha {
        /// Module.
        module: String,
    },
    /// The inputs of some linears were not scaled.
    NotScaled {
        /// Layer.
        layer_idx: usize,
        /// Roles of the linears.
        modules: String,
        /// Why.
        reason: NotScaled,
    },
    /// No token was sent to an expert, whose weight was rounded to nearest.
    Unreached {
        /// Module.
        module: String,
    },
    /// Tuning made no held-out loss smaller, and the scales are those of before it.
    TuningUndone {
        /// Mean KL(original ‖ quantized) per place on the held-out samples, in nats.
        held_out_loss: f64,
    },
    /// A rule of the recipe matched no module.
    IdleRule {
        /// Its pattern.
        pattern: String,
    },
}

impl Deviation {
    /// [`Deviation::UniformWeights`] of one module.
    pub fn uniform(layer_idx: usize, projection: Projection, reason: Uniform) -> Self {
        Self::UniformWeights {
            layer_idx,
            projection: projection.name().to_owned(),
            reason,
        }
    }

    /// [`Deviation::Safeguarded`] of one module.
    pub fn safeguarded(layer_idx: usize, projection: Projection, changes: Safeguarded) -> Self {
        Self::Safeguarded {
            layer_idx,
            projection: projection.name().to_owned(),
            changes,
        }
    }
}
