//! Methods × formats × seeds on one model, scored against the original: what a table is made of.
//!
//! A sweep keeps what its runs share: the original's distributions on every right answer, its
//! hidden states on every text, image features, and the samples of each seed. Its models live in
//! memory; nothing is written.

use crate::eval::{
    AnswerScore, Divergence, EvalItem, Reference, Task, TaskItems, TextReference, TextScore,
    perplexity, score_answers, score_texts,
};
use crate::model::LoadedModel;
use crate::model::decoder::DecoderLayer;
use crate::model::{ModelSource, Module};
use crate::pipeline::{self, LayerSink, Observer};
use crate::plan::{ScaleDtype, Scheme};
use crate::processor::MAX_TEXT_TOKENS;
use crate::recipe::{Method, Recipe};
use crate::run::{SampleChoice, load_samples};
use crate::tuning::{self, TuningReport};
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
    /// File or folder of questions and texts.
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
    /// Questions or texts of each task.
    pub limit: Option<usize>,
    /// Raw texts, samples and tasks, are read in pieces of at most so many tokens.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: usize,
}

fn default_max_tokens() -> usize {
    MAX_TEXT_TOKENS
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
    /// Seconds that quantizing took, samples prepared and scales tuned.
    pub seconds: f64,
    /// What tuning did, where scales were tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<TuningReport>,
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
            tuning: None,
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
    /// Share of right answers in percent, of questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// exp of the mean −log probability per token, of texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Mean KL(original ‖ model) per token of the answers or texts, in nats.
    pub kl: f64,
    /// Share of these tokens with the original's most likely token, in percent.
    pub same_top: f64,
    /// Questions or texts.
    pub n: usize,
    /// Tokens that were predicted, of texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n_tokens: Option<usize>,
}

/// What the original makes of all tasks.
pub struct References(Vec<TaskReference>);

enum TaskReference {
    /// Its distributions, question by question.
    Questions(Vec<Reference>),
    Texts(TextReference),
}

/// Scores the original on all tasks and keeps what others are compared with.
///
/// # Errors
/// As [`score_answers`] and [`score_texts`].
pub fn score_original(model: &LoadedModel, tasks: &[Task]) -> Result<(SweepRow, References)> {
    let mut row = SweepRow {
        method: "original".into(),
        bits: None,
        group_size: None,
        seed: None,
        tasks: BTreeMap::new(),
        seconds: 0.0,
        tuning: None,
    };
    let mut references = Vec::new();
    for task in tasks {
        let (score, reference) = match &task.items {
            TaskItems::Questions(items) => {
                let scored = score_answers(model, items, None)?;
                let (scores, kept): (Vec<_>, Vec<_>) = scored.into_iter().unzip();
                (task_score(&scores), TaskReference::Questions(kept))
            }
            TaskItems::Texts(items) => {
                let reference = TextReference::read(model, items)?;
                let score = text_task_score(&reference.scores(items)?);
                (score, TaskReference::Texts(reference))
            }
        };
        row.tasks.insert(task.name.clone(), score);
        references.push(reference);
    }
    Ok((row, References(references)))
}

/// Scores another model on the same tasks.
///
/// # Errors
/// As [`score_answers`] and [`score_texts`]; [`Error::Invalid`] if the references are of other
/// tasks.
pub fn score_tasks(
    model: &LoadedModel,
    tasks: &[Task],
    references: &References,
) -> Result<BTreeMap<String, TaskScore>> {
    let one = |(task, kept): (&Task, &TaskReference)| {
        let score = match (&task.items, kept) {
            (TaskItems::Questions(items), TaskReference::Questions(kept)) => {
                let scored = score_answers(model, items, Some(kept))?;
                let scores: Vec<AnswerScore> = scored.into_iter().map(|(score, _)| score).collect();
                task_score(&scores)
            }
            (TaskItems::Texts(items), TaskReference::Texts(kept)) => {
                text_task_score(&score_texts(model, items, Some(kept), &|| ())?)
            }
            _ => {
                return Err(Error::Invalid {
                    what: task.name.clone(),
                    why: "the references are of another kind of task".into(),
                });
            }
        };
        Ok((task.name.clone(), score))
    };
    tasks.iter().zip(&references.0).map(one).collect()
}

fn task_score(scores: &[AnswerScore]) -> TaskScore {
    let n = scores.len().max(1) as f64;
    let total = Divergence::total(scores.iter().filter_map(|s| s.divergence));
    TaskScore {
        accuracy: Some(100.0 * scores.iter().filter(|s| s.exact).count() as f64 / n),
        perplexity: None,
        kl: total.kl_per_token(),
        same_top: same_top(total),
        n: scores.len(),
        n_tokens: None,
    }
}

fn text_task_score(scores: &[TextScore]) -> TaskScore {
    let total = Divergence::total(scores.iter().filter_map(|s| s.divergence));
    TaskScore {
        accuracy: None,
        perplexity: Some(perplexity(scores)),
        kl: total.kl_per_token(),
        same_top: same_top(total),
        n: scores.len(),
        n_tokens: Some(scores.iter().map(|s| s.n_tokens).sum()),
    }
}

/// The original, which is compared with nothing, agrees with itself.
fn same_top(total: Divergence) -> f64 {
    match total.n_tokens {
        0 => 100.0,
        _ => total.same_top_percent(),
    }
}

/// How far `model` is from `original` over the right answers to questions.
///
/// # Errors
/// As [`score_answers`].
pub fn compare_with_reference(
    original: &LoadedModel,
    model: &LoadedModel,
    items: &[EvalItem],
) -> Result<Divergence> {
    let scored = score_answers(original, items, None)?;
    let references: Vec<Reference> = scored.into_iter().map(|(_, kept)| kept).collect();
    let scored = score_answers(model, items, Some(&references))?;
    Ok(Divergence::total(
        scored.iter().filter_map(|(score, _)| score.divergence),
    ))
}

/// What [`quantize_in_memory`] makes.
#[derive(Debug)]
pub struct QuantizedLayers {
    /// The decoder layers as a reader of the written folder would have them.
    pub layers: Vec<DecoderLayer>,
    /// What tuning did, where scales were tuned.
    pub tuning: Option<TuningReport>,
}

/// Quantizes in memory.
///
/// # Errors
/// Those of [`pipeline::quantize`] and [`tuning::tune`].
pub fn quantize_in_memory(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    observer: &dyn Observer,
) -> Result<QuantizedLayers> {
    let n_layers = model.decoder().n_layers;
    let layers = (0..n_layers)
        .map(|i| model.load_layer(i))
        .collect::<Result<Vec<_>>>()?;
    let dir = std::env::temp_dir();
    let samples = |choice| load_samples(model, recipe, choice, u64::MAX, &dir, observer);
    let mut sink = InMemory {
        layers,
        kept: recipe.tuning().map(|_| Vec::new()),
    };
    pipeline::quantize(model, samples(choice)?, recipe, observer, &mut sink)?;
    let mut tuning = None;
    if let (Some(settings), Some(weights)) = (recipe.tuning(), sink.kept.take()) {
        // The samples were used up: they are made again.
        let set = samples(choice.map(|choice| settings.choice(choice)).as_ref())?;
        let tuned = tuning::tune(model, &set, weights, settings, observer)?;
        for (module, weight) in &tuned.weights {
            sink.module(module, weight)?;
        }
        tuning = Some(tuned.report);
    }
    let layers = sink.layers;
    Ok(QuantizedLayers { layers, tuning })
}

/// Takes each module to its place in the layers.
struct InMemory {
    layers: Vec<DecoderLayer>,
    /// All modules, where their scales are going to be tuned.
    kept: Option<Vec<(Module, QuantizedWeight)>>,
}

impl LayerSink for InMemory {
    fn module(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        if let Some(kept) = &mut self.kept {
            kept.push((module.clone(), weight.clone()));
            return Ok(());
        }
        let layer = &mut self.layers[module.layer_idx];
        let linear = layer.linear(module.slot)?;
        let linear = linear.with_weight(weight.dequantize())?;
        layer.replace(module.slot, linear);
        Ok(())
    }
}
