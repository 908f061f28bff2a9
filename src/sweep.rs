//! Methods × formats × seeds on one model, scored against the original: what a table is made of.
//!
//! A sweep keeps what its runs share: the original's distributions on every right answer, image
//! features, and the samples of each seed. Its models live in memory; nothing is written.

use crate::eval::{AnswerScore, Divergence, Reference, Task, score_answers};
use crate::model::LoadedModel;
use crate::model::decoder::DecoderLayer;
use crate::model::{ModelSource, Module};
use crate::pipeline::{self, LayerSink, Observer};
use crate::plan::{ScaleDtype, Scheme};
use crate::recipe::{Method, Recipe};
use crate::run::{SampleChoice, load_samples};
use crate::{Error, QuantizedWeight, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What to run; paths are relative to the file that it is read from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// Model folder.
    pub model: PathBuf,
    /// Samples.
    pub calibration: PathBuf,
    /// File or folder of questions.
    pub tasks: PathBuf,
    /// Samples per run.
    #[serde(default = "default_samples")]
    pub samples: usize,
    /// Seeds of the choice of samples; methods without calibration run once.
    pub seeds: Vec<u64>,
    /// Methods by their names on the command line.
    pub methods: Vec<String>,
    /// Bits per weight.
    pub bits: Vec<u8>,
    /// Columns that share a scale.
    pub group_sizes: Vec<usize>,
    /// Settings as after `--set`, for all methods that know them.
    #[serde(default)]
    pub set: Vec<String>,
    /// Questions of each task.
    pub limit: Option<usize>,
}

fn default_samples() -> usize {
    128
}

impl Sweep {
    /// Reads a sweep.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] for a faulty file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
        let mut sweep: Self = toml::from_str(&text)
            .map_err(|e| Error::format(path, "sweep", e.message().to_owned()))?;
        let home = path.parent().unwrap_or(Path::new("."));
        for file in [&mut sweep.model, &mut sweep.calibration, &mut sweep.tasks] {
            *file = home.join(&*file);
        }
        Ok(sweep)
    }

    /// All runs, the cheapest statistics first; `None` is the seed of a run without calibration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a method that does not exist, [`Error::Invalid`] for a format.
    pub fn runs(&self, scale_dtype: ScaleDtype) -> Result<Vec<(Recipe, Option<u64>)>> {
        let mut runs = Vec::new();
        for name in &self.methods {
            let method: Method = name.parse()?;
            for (&bits, &group) in self
                .bits
                .iter()
                .flat_map(|b| self.group_sizes.iter().map(move |g| (b, g)))
            {
                let scheme = Scheme::new(bits, Some(group), false, scale_dtype)?;
                let mut recipe = Recipe::new(method, scheme);
                for assignment in &self.set {
                    recipe.set(assignment)?;
                }
                match recipe.needs_calibration() {
                    true => runs.extend(self.seeds.iter().map(|s| (recipe.clone(), Some(*s)))),
                    false => runs.push((recipe, None)),
                }
            }
        }
        Ok(runs)
    }
}

/// One line of a sweep's result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepRow {
    /// Method by its name, or `original`.
    pub method: String,
    /// Bits per weight; absent for the original.
    pub bits: Option<u8>,
    /// Columns that share a scale.
    pub group_size: Option<usize>,
    /// Seed of the samples, for methods with calibration.
    pub seed: Option<u64>,
    /// Scores by task.
    pub tasks: BTreeMap<String, TaskScore>,
    /// Seconds that quantizing took, samples prepared.
    pub seconds: f64,
}

impl SweepRow {
    /// The line of a run.
    pub fn new(
        recipe: &Recipe,
        seed: Option<u64>,
        tasks: BTreeMap<String, TaskScore>,
        seconds: f64,
    ) -> Self {
        Self {
            method: recipe.method.name().into(),
            bits: Some(recipe.scheme().bits()),
            group_size: recipe.scheme().group_size(),
            seed,
            tasks,
            seconds,
        }
    }

    /// Whether this is the line of such a run.
    pub fn is_of(&self, recipe: &Recipe, seed: Option<u64>) -> bool {
        self.method == recipe.method.name()
            && self.bits == Some(recipe.scheme().bits())
            && self.group_size == recipe.scheme().group_size()
            && self.seed == seed
    }
}

/// A model's scores on one task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    /// Share of right answers in percent.
    pub accuracy: f64,
    /// Mean KL(original ‖ model) per answer token, in nats.
    pub kl: f64,
    /// Share of answer tokens with the original's most likely token, in percent.
    pub same_top: f64,
    /// Questions.
    pub n: usize,
}

/// The original's distributions, task by task, question by question.
pub struct References(Vec<Vec<Reference>>);

/// Scores the original on all tasks and keeps its distributions.
///
/// # Errors
/// As [`score_answers`].
pub fn score_original(model: &LoadedModel, tasks: &[Task]) -> Result<(SweepRow, References)> {
    let mut row = SweepRow {
        method: "original".into(),
        bits: None,
        group_size: None,
        seed: None,
        tasks: BTreeMap::new(),
        seconds: 0.0,
    };
    let mut references = Vec::new();
    for task in tasks {
        let scored = score_answers(model, task, None)?;
        let (scores, kept): (Vec<_>, Vec<_>) = scored.into_iter().unzip();
        row.tasks.insert(task.name.clone(), task_score(&scores));
        references.push(kept);
    }
    Ok((row, References(references)))
}

/// Scores another model on the same tasks.
///
/// # Errors
/// As [`score_answers`].
pub fn score_tasks(
    model: &LoadedModel,
    tasks: &[Task],
    references: &References,
) -> Result<BTreeMap<String, TaskScore>> {
    let one = |(task, kept): (&Task, &Vec<Reference>)| {
        let scored = score_answers(model, task, Some(kept))?;
        let scores: Vec<AnswerScore> = scored.into_iter().map(|(score, _)| score).collect();
        Ok((task.name.clone(), task_score(&scores)))
    };
    tasks.iter().zip(&references.0).map(one).collect()
}

fn task_score(scores: &[AnswerScore]) -> TaskScore {
    let n = scores.len().max(1) as f64;
    let total = total_divergence(scores.iter().filter_map(|s| s.divergence));
    let n_tokens = total.n_tokens.max(1) as f64;
    let original = total.n_tokens == 0;
    TaskScore {
        accuracy: 100.0 * scores.iter().filter(|s| s.exact).count() as f64 / n,
        kl: total.kl_sum / n_tokens,
        same_top: if original {
            100.0
        } else {
            100.0 * total.n_same_top as f64 / n_tokens
        },
        n: scores.len(),
    }
}

fn total_divergence(parts: impl Iterator<Item = Divergence>) -> Divergence {
    let zero = Divergence {
        kl_sum: 0.0,
        n_same_top: 0,
        n_tokens: 0,
    };
    parts.fold(zero, |a, b| Divergence {
        kl_sum: a.kl_sum + b.kl_sum,
        n_same_top: a.n_same_top + b.n_same_top,
        n_tokens: a.n_tokens + b.n_tokens,
    })
}

/// How far `model` is from `original` over the right answers of a task.
///
/// # Errors
/// As [`score_answers`].
pub fn compare_with_reference(
    original: &LoadedModel,
    model: &LoadedModel,
    task: &Task,
) -> Result<Divergence> {
    let scored = score_answers(original, task, None)?;
    let references: Vec<Reference> = scored.into_iter().map(|(_, kept)| kept).collect();
    let scored = score_answers(model, task, Some(&references))?;
    Ok(total_divergence(
        scored.iter().filter_map(|(score, _)| score.divergence),
    ))
}

/// Quantizes in memory: the decoder layers as a reader of the written folder would have them.
///
/// # Errors
/// Those of [`pipeline::quantize`].
pub fn quantize_in_memory(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    observer: &dyn Observer,
) -> Result<Vec<DecoderLayer>> {
    let n_layers = model.decoder().n_layers;
    let layers = (0..n_layers)
        .map(|i| model.load_layer(i))
        .collect::<Result<Vec<_>>>()?;
    let dir = std::env::temp_dir();
    let samples = load_samples(model, recipe, choice, u64::MAX, &dir, observer)?;
    let mut layers = InMemory(layers);
    pipeline::quantize(model, samples, recipe, observer, &mut layers)?;
    Ok(layers.0)
}

/// Takes each module to its place in the layers.
struct InMemory(Vec<DecoderLayer>);

impl LayerSink for InMemory {
    fn module(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        let layer = &mut self.0[module.layer_idx];
        let linear = layer.linear(module.slot)?;
        let linear = linear.with_weight(weight.dequantize())?;
        layer.replace(module.slot, linear);
        Ok(())
    }
}
