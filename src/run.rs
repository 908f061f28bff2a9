//! One run from a model folder to a quantized folder, and its plan beforehand.
//!
//! Everything that can be wrong is looked at before any work: names, group sizes, samples, the
//! place of the output.

use crate::allocation::allocate;
use crate::calibration::{self, CalibrationSample, CalibrationSet};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::MAX_SHARD_BYTES;
use crate::conversion::{base_card, export_gguf, folder_name};
use crate::dataset::{Sample, SampleSet};
use crate::engine::Engine;
use crate::export::gguf::imatrix_file;
use crate::export::{Exported, Exporter, Format, ModulePlan};
use crate::families::{open_model, open_processor};
use crate::gguf::IMATRIX_FILE;
use crate::hidden_states::Store;
use crate::journal::{Fingerprint, Journal, LayerWriter, Resume};
use crate::memory::plan_memory;
use crate::model::{ChangedTensor, ModelSource, Module};
use crate::pipeline::{self, FinishedLayer, LayerOutcome, LayerSink, Observer, ScaleSearch};
use crate::recipe::Recipe;
use crate::report::card::{CARD_FILE, Card};
use crate::report::importance::{
    self, ImportanceFile, KeptWeights, ShownSample, kept_samples, shown_samples,
};
use crate::report::page::{PAGE_FILE, Page};
use crate::report::{
    CalibrationReport, Deviation, OutputReport, RunReport, SCHEMA, SourceReport, peak_memory_bytes,
};
use crate::tuning::{self, TuningReport};
use crate::{Error, QuantizedWeight, Result};
use candle_core::Device;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

/// Which samples to calibrate on.
#[derive(Clone, Debug)]
pub struct SampleChoice {
    /// All there are.
    pub set: SampleSet,
    /// How many of them.
    pub n_samples: usize,
    /// Seed of the choice.
    pub seed: u64,
    /// Raw texts are read in pieces of at most so many tokens.
    pub max_tokens: usize,
}

/// What a run does otherwise than another of the same result.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// How the result is written.
    pub format: Format,
    /// What to do about the layers of an earlier run.
    pub resume: Resume,
    /// Bytes of memory to stay below, as far as it can be: hidden states that do not fit go to disk.
    pub memory_bytes: u64,
    /// Whether to leave the importance matrix for llama.cpp beside the model.
    pub imatrix: bool,
    /// Whether to leave the report as a page beside the model, and what its pictures are made of.
    pub report: bool,
    /// The command that was given, for the report.
    pub command: Option<String>,
}

/// The formats of all modules, those left as they are aside.
///
/// # Errors
/// [`Error::Invalid`] naming every module whose columns its group size does not divide;
/// [`Error::Invalid`] if no module is left; [`Error::Unsupported`] for a method that this model
/// cannot be quantized with, and for a model that is quantized already.
pub fn module_plan(model: &ModelSource, recipe: &Recipe) -> Result<Vec<ModulePlan>> {
    recipe.check()?;
    if let Some(quantization) = model.checkpoint().quantization() {
        let what = format!(
            "{}: quantizing weights that are quantized ({}) already; `vlmq export` changes their \
             format",
            model.checkpoint().dir().display(),
            quantization.name()
        );
        return Err(Error::Unsupported { what });
    }
    if recipe.method.is_scaled() {
        ScaleSearch::check(model)?;
    }
    let mut plan = Vec::new();
    let mut problems: Vec<Error> = Vec::new();
    for module in model.modules() {
        let Some(scheme) = recipe.scheme_of(&module.name) else {
            continue;
        };
        problems.extend(scheme.group_len(&module.name, module.shape[1]).err());
        plan.push(ModulePlan {
            name: module.name,
            scheme,
        });
    }
    let n_problems = problems.len();
    match problems.into_iter().next() {
        Some(Error::Invalid { what, why }) if n_problems > 1 => Err(Error::Invalid {
            what,
            why: format!("{why} (and {} modules more)", n_problems - 1),
        }),
        Some(first) => Err(first),
        None if plan.is_empty() => Err(Error::Invalid {
            what: "recipe".into(),
            why: "it leaves no module to quantize".into(),
        }),
        None => Ok(plan),
    }
}

/// Quantizes `model` into the new folder `output`, from where an earlier run was ended.
///
/// # Errors
/// Those of every stage; nothing is left behind then but finished layers, in the [`Journal`].
pub fn quantize_folder(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    output: &Path,
    options: RunOptions,
    observer: &dyn Observer,
) -> Result<(RunReport, Exported)> {
    let began = Instant::now();
    let mut plan = module_plan(model, recipe)?;
    check_imatrix(recipe, &options)?;
    let engine = Engine::of(model.device())?;
    engine.check(model, recipe)?;
    let journal = Journal::open(output, options.resume)?;
    let mut exporter = open_exporter(model, &plan, &journal, options.format)?;
    check_copied(model, &plan)?;
    let checked = began.elapsed().as_secs_f64();
    let memory_bytes = options.memory_bytes;
    let set = load_samples(model, recipe, choice, memory_bytes, journal.dir(), observer)?;
    let prepared = began.elapsed().as_secs_f64();
    let allocated = allocate(model, recipe, &set, observer)?;
    let recipe = allocated.recipe.as_ref();
    if allocated.report.is_some() {
        // Those before were of the formats that were to be expected.
        plan = module_plan(model, recipe)?;
        drop(exporter);
        exporter = open_exporter(model, &plan, &journal, options.format)?;
    }
    journal.bind(&fingerprint(recipe, &plan, &set)?)?;
    let mut report = begun_report(model, recipe, choice, &set, &options);
    report.engine = Some(engine.report());
    report.n_resumed_layers = journal.n_finished()?;
    report.allocation = allocated.report;
    report.seconds = preparation_seconds(checked, prepared, set.seconds);
    let mut sink = Journaled {
        model,
        exporter,
        journal,
        layer: None,
        kept: recipe.tuning().map(|_| Vec::new()),
        pictures: pictures(model, recipe, choice, &set, &options)?,
    };
    let layers = pipeline::quantize(model, set, recipe, observer, &mut sink)?;
    if options.imatrix {
        sink.write_imatrix(&layers, &report)?;
    }
    for mut layer in layers {
        let weights = std::mem::take(&mut layer.kept_weights);
        if let Some(pictures) = &mut sink.pictures {
            pictures.layers.push(weights);
        }
        report.add_layer(layer);
    }
    report.add_tuning(sink.tune(recipe, choice, memory_bytes, observer)?);
    let total = began.elapsed().as_secs_f64();
    report.seconds.insert("total".into(), total);
    report.peak_memory_bytes = peak_memory_bytes();
    let exported = sink.finish(&plan, options.format, &mut report, output)?;
    Ok((report, exported))
}

/// What is known of a run before its first layer.
fn begun_report(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    set: &CalibrationSet,
    options: &RunOptions,
) -> RunReport {
    let calibration = choice.filter(|_| recipe.needs_calibration());
    RunReport {
        schema: SCHEMA,
        vlmq: env!("CARGO_PKG_VERSION").into(),
        method: recipe.method.name().into(),
        command: options.command.clone(),
        source: Some(source_report(model)),
        settings: settings(recipe),
        calibration: calibration.map(|c| calibration_report(c, &set.samples)),
        deviations: idle_rules(model, recipe),
        ..RunReport::default()
    }
}

/// The calibration samples that the report's pictures are of, without weights yet; none where all
/// tokens weigh alike. They are read before any work: the files may be gone after it. `None` where no
/// pictures are asked for.
fn pictures(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    set: &CalibrationSet,
    options: &RunOptions,
) -> Result<Option<Pictures>> {
    if !options.report {
        return Ok(None);
    }
    let mut pictures = Pictures::default();
    if let (Some(_), Some(choice)) = (recipe.importance, choice) {
        let processor = open_processor(model.checkpoint().dir())?;
        let chosen = choice.set.choose(choice.n_samples, choice.seed)?;
        let kept = kept_samples(&set.samples);
        pictures.samples =
            shown_samples(&processor, &chosen, &set.samples, &kept, choice.max_tokens)?;
        pictures.kept = kept;
    }
    Ok(Some(pictures))
}

fn source_report(model: &ModelSource) -> SourceReport {
    let checkpoint = model.checkpoint();
    let dir = checkpoint.dir();
    // A relative path such as `.` names nothing.
    let whole = dir.canonicalize();
    let model_type = checkpoint.config()["model_type"].as_str();
    SourceReport {
        name: folder_name(whole.as_deref().unwrap_or(dir)),
        model_type: model_type.map(str::to_owned),
        tensor_bytes: checkpoint.total_bytes(),
    }
}

/// # Errors
/// [`Error::Invalid`] if an importance matrix is asked for of a method that has none.
fn check_imatrix(recipe: &Recipe, options: &RunOptions) -> Result<()> {
    let sums_up = recipe.needs_calibration() && !recipe.method.is_scaled();
    if sums_up || !options.imatrix {
        return Ok(());
    }
    Err(Error::Invalid {
        what: "--imatrix".into(),
        why: format!(
            "{} keeps no statistics of inputs; gptq, gptaq, qronos and vlmq do",
            recipe.method.name()
        ),
    })
}

/// Turns the finished folder of codes in the journal into the output; returns the bytes of tensors.
fn write_gguf(journal: &Journal, output: &Path) -> Result<u64> {
    let codes = Checkpoint::open(&journal.codes())?;
    let model = open_model(codes, Device::Cpu)?;
    let written = export_gguf(&model, output, None)?;
    let files = [Some(written.model), written.mmproj];
    Ok(files.iter().flatten().map(|file| file.tensor_bytes).sum())
}

/// The card of the output, beside that of the model it is made of.
fn write_card(
    exporter: &Exporter,
    model: &ModelSource,
    plan: &[ModulePlan],
    format: Format,
    report: &RunReport,
    output: &Path,
) -> Result<()> {
    let card = Card {
        name: &folder_name(output),
        source: model.checkpoint(),
        decoder: model.decoder(),
        plan,
        format,
        report: Some(report),
        evaluation: None,
    };
    exporter.write_file(CARD_FILE, card.text().as_bytes())?;
    match base_card(model.checkpoint(), false)? {
        Some((name, bytes)) => exporter.write_file(&name, &bytes),
        None => Ok(()),
    }
}

/// The output folder in the making, in the journal's hands.
fn open_exporter<'a>(
    model: &'a ModelSource,
    plan: &[ModulePlan],
    journal: &Journal,
    format: Format,
) -> Result<Exporter<'a>> {
    let pending = match format == format.folder() {
        true => journal.pending()?,
        false => journal.pending_codes()?,
    };
    let format = format.folder();
    Exporter::create(model.checkpoint(), format, plan, pending, MAX_SHARD_BYTES)
}

/// Modules go to the output folder and to the journal at once.
struct Journaled<'a> {
    model: &'a ModelSource,
    exporter: Exporter<'a>,
    journal: Journal,
    /// The layer at work.
    layer: Option<LayerWriter>,
    /// All modules, where their scales are going to be tuned before they go to the folder.
    kept: Option<Vec<(Module, QuantizedWeight)>>,
    /// Where the report is to be a page too.
    pictures: Option<Pictures>,
}

/// What the pictures of the report are made of.
#[derive(Default)]
struct Pictures {
    /// Places of the samples among all.
    kept: Vec<usize>,
    samples: Vec<ShownSample>,
    layers: Vec<Vec<KeptWeights>>,
}

impl Pictures {
    fn into_file(self) -> Option<ImportanceFile> {
        (!self.samples.is_empty()).then_some(ImportanceFile {
            schema: importance::SCHEMA,
            samples: self.samples,
            layers: self.layers,
        })
    }
}

impl Journaled<'_> {
    fn export(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        match &mut self.kept {
            Some(kept) => {
                kept.push((module.clone(), weight.clone()));
                Ok(())
            }
            None => self.exporter.write_module(&module.name, weight),
        }
    }

    /// Tunes the scales of all modules, where the recipe says so, and writes them. The samples,
    /// which the layers used up, are made again; the journal keeps the untuned layers, so a run that
    /// is ended here comes back to here.
    fn tune(
        &mut self,
        recipe: &Recipe,
        choice: Option<&SampleChoice>,
        memory_bytes: u64,
        observer: &dyn Observer,
    ) -> Result<Option<TuningReport>> {
        let (Some(settings), Some(weights)) = (recipe.tuning(), self.kept.take()) else {
            return Ok(None);
        };
        let dir = self.journal.dir();
        let choice = choice.map(|choice| settings.choice(choice));
        let choice = choice.as_ref();
        let set = load_samples(self.model, recipe, choice, memory_bytes, dir, observer)?;
        let tuned = tuning::tune(self.model, &set, weights, settings, observer)?;
        for (module, weight) in &tuned.weights {
            self.exporter.write_module(&module.name, weight)?;
        }
        Ok(Some(tuned.report))
    }
}

impl Journaled<'_> {
    /// Leaves the importance of input columns beside the model.
    fn write_imatrix(&self, layers: &[LayerOutcome], report: &RunReport) -> Result<()> {
        let squares = layers.iter().flat_map(|layer| &layer.input_squares);
        let n_sequences = report.calibration.as_ref().map_or(0, |c| c.n_sequences);
        let prefix = self.model.decoder_prefix();
        let bytes = imatrix_file(prefix, squares, "calibration", n_sequences)?;
        self.exporter.write_file(IMATRIX_FILE, &bytes)
    }

    /// Adds report and card, and gives the output its name.
    fn finish(
        mut self,
        plan: &[ModulePlan],
        format: Format,
        report: &mut RunReport,
        output: &Path,
    ) -> Result<Exported> {
        let folder = folder_name(output);
        report.output = Some(OutputReport {
            format: format.name().into(),
            tensor_bytes: self.exporter.tensor_bytes(),
        });
        let (name, bytes) = report.to_file();
        self.exporter.write_file(&name, &bytes)?;
        if let Some(pictures) = self.pictures.take() {
            let importance = pictures.into_file();
            let page = Page::new(&folder, report, importance.as_ref());
            self.exporter
                .write_file(PAGE_FILE, page.html().as_bytes())?;
            if let Some((name, bytes)) = importance.map(|file| file.to_file()) {
                self.exporter.write_file(&name, &bytes)?;
            }
        }
        write_card(&self.exporter, self.model, plan, format, report, output)?;
        let mut exported = self.exporter.finish()?;
        if format == Format::Gguf {
            exported.tensor_bytes = write_gguf(&self.journal, output)?;
            let written = report.output.as_mut();
            written
                .into_iter()
                .for_each(|w| w.tensor_bytes = exported.tensor_bytes);
        }
        self.journal.discard()?;
        Ok(exported)
    }

    /// The file of the layer at work.
    fn layer_writer(&mut self, layer_idx: usize) -> Result<&mut LayerWriter> {
        match &mut self.layer {
            Some(layer) => Ok(layer),
            none => {
                let path = self.journal.layer_path(layer_idx);
                Ok(none.insert(LayerWriter::create(path)?))
            }
        }
    }
}

impl LayerSink for Journaled<'_> {
    fn finished(&mut self, layer_idx: usize) -> Result<Option<FinishedLayer>> {
        let digest = || self.model.layer_digest(layer_idx);
        let Some(layer) = self.journal.finished(layer_idx, digest)? else {
            return Ok(None);
        };
        let modules = self.model.layer_modules(layer_idx);
        for (name, weight) in &layer.weights {
            let module = modules.iter().find(|module| module.name == *name);
            let module = module.ok_or_else(|| Error::Missing {
                what: name.clone(),
                place: format!("layer {layer_idx} of the model"),
            })?;
            self.export(module, weight)?;
        }
        for (name, values) in &layer.tensors {
            self.exporter.write_tensor(name, values)?;
        }
        Ok(Some(layer))
    }

    fn kept_samples(&self) -> Option<Vec<usize>> {
        let pictures = self.pictures.as_ref()?;
        Some(pictures.kept.clone())
    }

    fn module(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        let layer = self.layer_writer(module.layer_idx)?;
        layer.module(&module.name, weight)?;
        self.export(module, weight)
    }

    fn tensor(&mut self, tensor: &ChangedTensor) -> Result<()> {
        let layer = self.layer_writer(tensor.layer_idx)?;
        layer.tensor(&tensor.name, &tensor.values);
        self.exporter.write_tensor(&tensor.name, &tensor.values)
    }

    fn layer(&mut self, layer_idx: usize, outcome: &LayerOutcome) -> Result<()> {
        let path = self.journal.layer_path(layer_idx);
        let layer = self.layer.take();
        let layer = layer.map_or_else(|| LayerWriter::create(path), Ok)?;
        layer.finish(layer_idx, &self.model.layer_digest(layer_idx)?, outcome)
    }
}

/// Wall time before the first layer: until all was `checked`, and then by what the threads did.
fn preparation_seconds(checked: f64, prepared: f64, threads: [f64; 2]) -> BTreeMap<String, f64> {
    let samples = prepared - checked;
    let processor = samples * threads[0] / (threads[0] + threads[1]).max(f64::MIN_POSITIVE);
    BTreeMap::from([
        ("check".into(), checked),
        ("processor".into(), processor),
        ("vision".into(), samples - processor),
    ])
}

fn fingerprint(recipe: &Recipe, plan: &[ModulePlan], set: &CalibrationSet) -> Result<Fingerprint> {
    let settings = blake3::hash(format!("{recipe:?} {plan:?}").as_bytes());
    Ok(Fingerprint {
        vlmq: env!("CARGO_PKG_VERSION").into(),
        settings: settings.to_string(),
        samples: set.digest()?,
    })
}

fn idle_rules(model: &ModelSource, recipe: &Recipe) -> Vec<Deviation> {
    let names: Vec<String> = model.modules().into_iter().map(|m| m.name).collect();
    let idle = recipe.idle_rules(&names).map(str::to_owned);
    idle.map(|pattern| Deviation::IdleRule { pattern })
        .collect()
}

/// What is copied as it is would else be looked at by nobody.
fn check_copied(model: &ModelSource, plan: &[ModulePlan]) -> Result<()> {
    let quantized: BTreeSet<&str> = plan.iter().map(|module| module.name.as_str()).collect();
    let is_copied = |name: &&str| {
        let module = name.strip_suffix(".weight");
        !module.is_some_and(|module| quantized.contains(module))
    };
    let checkpoint = model.checkpoint();
    checkpoint
        .names()
        .filter(is_copied)
        .try_for_each(|name| checkpoint.check_finite(name))
}

/// The samples of a run, ready for the first layer; none for a method without calibration. Of their
/// hidden states, those that do not fit into `memory_bytes` with the rest of the work go to a file
/// in `dir`.
///
/// # Errors
/// [`Error::Missing`] if the method needs samples and no choice is given; else as
/// [`calibration::prepare`].
pub fn load_samples(
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    memory_bytes: u64,
    dir: &Path,
    observer: &dyn Observer,
) -> Result<CalibrationSet> {
    if !recipe.needs_calibration() {
        return Ok(CalibrationSet::none());
    }
    let choice = choice.ok_or_else(|| Error::Missing {
        what: "--calibration DATA".into(),
        place: format!("the arguments; {} needs samples", recipe.method.name()),
    })?;
    let processor = open_processor(model.checkpoint().dir())?;
    let chosen: Vec<&Sample> = choice.set.choose(choice.n_samples, choice.seed)?;
    if let Some(tuning) = recipe.tuning() {
        // All that scales will be tuned on must be there before the first layer.
        let all = tuning.choice(choice);
        all.set.choose(all.n_samples, all.seed)?;
    }
    let max_tokens = choice.max_tokens;
    let n_tokens = calibration::count_tokens(&processor, &chosen, max_tokens)?;
    let plan = plan_memory(model, recipe, &n_tokens);
    let on_device = Engine::of(model.device())?.state_bytes(model)?;
    let store = Store::new(plan.room(memory_bytes), dir, model.device()).on_device(on_device);
    let tower = model.load_tower()?;
    let tower = tower.as_ref();
    calibration::prepare(
        model, tower, &processor, &chosen, max_tokens, store, observer,
    )
}

fn calibration_report(choice: &SampleChoice, samples: &[CalibrationSample]) -> CalibrationReport {
    let mut n_tokens = BTreeMap::new();
    for class in samples.iter().flat_map(|s| &s.classes) {
        *n_tokens.entry(class.name().to_owned()).or_insert(0) += 1;
    }
    CalibrationReport {
        n_samples: choice.n_samples,
        n_sequences: samples.len(),
        seed: choice.seed,
        n_tokens,
    }
}

/// Every setting. The solver's are all of them, as they are told by it.
fn settings(recipe: &Recipe) -> serde_json::Value {
    let mut settings = serde_json::json!(recipe.solver);
    let others = serde_json::json!({
        "bits": recipe.bits(),
        "scheme": recipe.scheme(),
        "alpha": recipe.alpha(recipe.scheme()),
        "importance": recipe.importance,
        "statistics_dtype": recipe.statistics_dtype,
        "tuning": recipe.tuning(),
    });
    let own = others.as_object().into_iter().flatten();
    for (key, value) in own {
        // α is decided by number format: the solver's own is not what was used.
        settings[key.as_str()] = value.clone();
    }
    settings
}
