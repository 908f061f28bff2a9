//! Methods × formats × seeds on one model, scored against the original: what a table is made of.
//!
//! A sweep keeps what its runs share: the original's distributions on every right answer, its
//! hidden states on every text, image features, and the samples of each seed. Its models live in
//! memory; nothing is written.

pub mod paired;

use crate::allocation::{AllocationReport, allocate};
use crate::calibration::CalibrationSet;
use crate::distributed::Alone;
use crate::eval::{
    AnswerScore, Divergence, EvalItem, Reference, Task, TaskItems, TextReference, TextScore,
    perplexity, score_answers, score_texts,
};
use crate::model::LoadedModel;
use crate::model::decoder::DecoderLayer;
use crate::model::{ChangedTensor, ModelSource, Module};
use crate::pipeline::{self, LayerSink, Observer};
use crate::plan::{Bits, ScaleDtype, Scheme};
use crate::processor::MAX_TEXT_TOKENS;
use crate::recipe::Recipe;
use crate::run::{SampleChoice, load_samples};
use crate::tuning::{self, TuningReport};
use crate::{Error, QuantizedWeight, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
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
    #[serde(default)]
    pub methods: Vec<String>,
    /// Methods with settings of their own, under a name of their own.
    #[serde(default, rename = "variant")]
    pub variants: Vec<Variant>,
    /// Bits per weight, or a mean that is shared out, as `2.5`.
    pub bits: Vec<Bits>,
    /// Columns that share a scale; −1 for one scale per row.
    pub group_sizes: Vec<i64>,
    /// Method or variant that all others are compared with; the first one if absent.
    pub baseline: Option<String>,
    /// Settings as after `--set`, for all runs.
    #[serde(default)]
    pub set: Vec<String>,
    /// Questions or texts of each task that are left out before the first: what is tuned on some is
    /// reported on others.
    #[serde(default)]
    pub skip: usize,
    /// Questions or texts of each task.
    pub limit: Option<usize>,
    /// Raw texts, samples and tasks, are read in pieces of at most so many tokens.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: usize,
}

/// A method with settings, by a name that rows bear.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Name.
    pub name: String,
    /// Method by its name on the command line.
    pub method: String,
    /// Settings as after `--set`.
    #[serde(default)]
    pub set: Vec<String>,
}

/// One run of a sweep.
#[derive(Clone, Debug)]
pub struct SweepRun {
    /// Name of its method or variant.
    pub name: String,
    /// What it does.
    pub recipe: Recipe,
    /// Seed of the samples; `None` for a run without calibration.
    pub seed: Option<u64>,
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

    /// All runs, seed by seed, so that whoever goes through them needs the samples of one seed at a
    /// time; first those without calibration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a method that does not exist, [`Error::Invalid`] for a format, a
    /// setting, or a name that two variants have.
    pub fn runs(&self, scale_dtype: ScaleDtype) -> Result<Vec<SweepRun>> {
        let mut runs = Vec::new();
        for variant in self.all_variants()? {
            for (&bits, &group) in self
                .bits
                .iter()
                .flat_map(|b| self.group_sizes.iter().map(move |g| (b, g)))
            {
                let recipe = variant.recipe(bits, group, &self.set, scale_dtype)?;
                let run = |seed| SweepRun {
                    name: variant.name.clone(),
                    recipe: recipe.clone(),
                    seed,
                };
                match recipe.needs_calibration() {
                    true => runs.extend(self.seeds.iter().map(|seed| run(Some(*seed)))),
                    false => runs.push(run(None)),
                }
            }
        }
        runs.sort_by_key(|run| run.seed);
        Ok(runs)
    }

    fn all_variants(&self) -> Result<Vec<Variant>> {
        let plain = self.methods.iter().map(|name| Variant {
            name: name.clone(),
            method: name.clone(),
            set: Vec::new(),
        });
        let all: Vec<Variant> = plain.chain(self.variants.iter().cloned()).collect();
        let mut names = BTreeSet::from(["original"]);
        match all.iter().find(|variant| !names.insert(&variant.name)) {
            None => Ok(all),
            Some(twice) => Err(Error::Invalid {
                what: format!("variant {:?}", twice.name),
                why: "another one has this name; rows are told apart by it".into(),
            }),
        }
    }
}

impl Variant {
    fn recipe(
        &self,
        bits: Bits,
        group_size: i64,
        settings: &[String],
        scale_dtype: ScaleDtype,
    ) -> Result<Recipe> {
        let group_size = match group_size {
            -1 => None,
            n => Some(usize::try_from(n).map_err(|_| Error::Invalid {
                what: format!("group size {n}"),
                why: "a number of columns, or -1 for one scale per row, expected".into(),
            })?),
        };
        let scheme = Scheme::new(bits.ceil(), group_size, false, scale_dtype)?;
        let mut recipe = Recipe::new(self.method.parse()?, scheme).with_bits(bits);
        let settings = settings.iter().chain(&self.set);
        settings.into_iter().try_for_each(|s| recipe.set(s))?;
        recipe.check()?;
        Ok(recipe)
    }
}

/// One line of a sweep's result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepRow {
    /// Method or variant by its name, or `original`.
    pub method: String,
    /// Bits per weight; absent for the original.
    pub bits: Option<Bits>,
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
    /// Bits of the codes on average, where a mean was shared out, and those of each group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated: Option<AllocatedBits>,
}

/// What became of a mean of bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocatedBits {
    /// Mean bits of the codes.
    pub code_bits_per_weight: f64,
    /// Bytes of codes, scales and zero points.
    pub stored_bytes: u64,
    /// By group, in order of layers.
    pub bits: Vec<u8>,
}

impl From<AllocationReport> for AllocatedBits {
    fn from(report: AllocationReport) -> Self {
        Self {
            code_bits_per_weight: report.code_bits_per_weight,
            stored_bytes: report.stored_bytes,
            bits: report.groups.iter().map(|group| group.bits).collect(),
        }
    }
}

impl SweepRow {
    /// The line of a run.
    pub fn new(run: &SweepRun, tasks: BTreeMap<String, TaskScore>, seconds: f64) -> Self {
        Self {
            method: run.name.clone(),
            bits: Some(run.recipe.bits()),
            group_size: run.recipe.scheme().group_size(),
            seed: run.seed,
            tasks,
            seconds,
            tuning: None,
            allocated: None,
        }
    }

    /// Mean accuracy over tasks with questions, in percent.
    pub fn mean_accuracy(&self) -> Option<f64> {
        let values: Vec<f64> = self.tasks.values().filter_map(|t| t.accuracy).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }

    /// Mean KL over tasks, in nats.
    pub fn mean_kl(&self) -> f64 {
        self.tasks.values().map(|t| t.kl).sum::<f64>() / self.tasks.len().max(1) as f64
    }

    /// Whether this is the line of such a run.
    pub fn is_of(&self, run: &SweepRun) -> bool {
        self.method == run.name
            && self.bits == Some(run.recipe.bits())
            && self.group_size == run.recipe.scheme().group_size()
            && self.seed == run.seed
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
        allocated: None,
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
                text_task_score(&score_texts(model, items, Some(kept), &|| Ok(()))?)
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

/// The samples of one run.
#[derive(Debug)]
pub struct RunSamples {
    /// Those that layers are solved with, which a run uses up.
    pub layers: CalibrationSet,
    /// Those that scales are tuned on, where they are tuned.
    pub tuning: Option<CalibrationSet>,
}

/// The samples of one seed, brought to the first layer once for all runs with that seed.
#[derive(Default)]
pub struct PreparedSamples {
    seed: u64,
    /// By how many were chosen.
    sets: BTreeMap<usize, CalibrationSet>,
}

impl PreparedSamples {
    /// The samples of a run; those of the run before if it had the same seed.
    ///
    /// # Errors
    /// As [`load_samples`].
    pub fn of(
        &mut self,
        model: &ModelSource,
        run: &SweepRun,
        choice: impl Fn(u64) -> SampleChoice,
        observer: &dyn Observer,
    ) -> Result<RunSamples> {
        let Some(seed) = run.seed else {
            return Ok(RunSamples {
                layers: CalibrationSet::none(),
                tuning: None,
            });
        };
        let choice = choice(seed);
        let tuning = run.recipe.tuning().map(|settings| settings.choice(&choice));
        let tuning = tuning.map(|more| self.copy(model, &run.recipe, &more, observer));
        Ok(RunSamples {
            tuning: tuning.transpose()?,
            layers: self.copy(model, &run.recipe, &choice, observer)?,
        })
    }

    fn copy(
        &mut self,
        model: &ModelSource,
        recipe: &Recipe,
        choice: &SampleChoice,
        observer: &dyn Observer,
    ) -> Result<CalibrationSet> {
        if self.seed != choice.seed {
            self.sets.clear();
            self.seed = choice.seed;
        }
        if let Some(set) = self.sets.get(&choice.n_samples) {
            return set.copied();
        }
        let dir = std::env::temp_dir();
        let set = load_samples(model, recipe, Some(choice), u64::MAX, &dir, observer)?;
        let copy = set.copied();
        self.sets.insert(choice.n_samples, set);
        copy
    }
}

/// What [`quantize_in_memory`] makes.
#[derive(Debug)]
pub struct QuantizedLayers {
    /// The decoder layers as a reader of the written folder would have them.
    pub layers: Vec<DecoderLayer>,
    /// What tuning did, where scales were tuned.
    pub tuning: Option<TuningReport>,
    /// How bits were shared out, where a mean was asked for.
    pub allocation: Option<AllocationReport>,
}

/// Quantizes in memory.
///
/// # Errors
/// Those of [`allocate`], [`pipeline::quantize`] and [`tuning::tune`]; [`Error::Missing`] without samples for
/// the latter.
pub fn quantize_in_memory(
    model: &ModelSource,
    recipe: &Recipe,
    samples: RunSamples,
    observer: &dyn Observer,
) -> Result<QuantizedLayers> {
    let allocated = allocate(model, recipe, &samples.layers, (&Alone, observer))?;
    let recipe = allocated.recipe.as_ref();
    let n_layers = model.decoder().n_layers;
    let layers = (0..n_layers)
        .map(|i| model.load_layer(i))
        .collect::<Result<Vec<_>>>()?;
    let mut sink = InMemory {
        model,
        layers,
        kept: recipe.tuning().map(|_| Vec::new()),
    };
    pipeline::quantize(model, samples.layers, recipe, observer, &mut sink)?;
    let mut tuning = None;
    if let (Some(settings), Some(weights)) = (recipe.tuning(), sink.kept.take()) {
        let set = samples.tuning.ok_or_else(|| Error::Missing {
            what: "samples to tune scales on".into(),
            place: "those of the run".into(),
        })?;
        let tuned = tuning::tune(model, &set, weights, settings, observer)?;
        for (module, weight) in &tuned.weights {
            sink.module(module, weight)?;
        }
        tuning = Some(tuned.report);
    }
    let layers = sink.layers;
    Ok(QuantizedLayers {
        layers,
        tuning,
        allocation: allocated.report,
    })
}

/// Takes each module and each changed tensor to its place in the layers.
struct InMemory<'a> {
    model: &'a ModelSource,
    layers: Vec<DecoderLayer>,
    /// All modules, where their scales are going to be tuned.
    kept: Option<Vec<(Module, QuantizedWeight)>>,
}

impl LayerSink for InMemory<'_> {
    fn tensor(&mut self, tensor: &ChangedTensor) -> Result<()> {
        let layer = &mut self.layers[tensor.layer_idx];
        let source = self.model.layer_source(tensor.layer_idx);
        source.put(layer, tensor.part, &tensor.values)
    }

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
