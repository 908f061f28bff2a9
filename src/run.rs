//! One run from a model folder to a quantized folder, and its plan beforehand.
//!
//! Everything that can be wrong is looked at before any work: names, group sizes, samples, the
//! place of the output.

mod journaled;
mod offline;
mod ranks;
mod samples;

pub use offline::{Calibrated, calibrate_folder, quantize_folder_from};
pub use samples::{Division, Room, SampleChoice, check_remaking, load_samples, load_share};

use crate::allocation::allocate;
use crate::calibration::{CalibrationSample, CalibrationSet};
use crate::conversion::folder_name;
use crate::distributed::{Alone, Communicator};
use crate::engine::Engine;
use crate::export::{Exported, Format, ModulePlan};
use crate::families::open_processor;
use crate::journal::{Fingerprint, Journal, Resume};
use crate::model::ModelSource;
use crate::pipeline::{self, LayerSink, Observer, ScaleSearch};
use crate::recipe::Recipe;
use crate::report::importance::{kept_samples, shown_samples};
use crate::report::{
    CalibrationReport, Deviation, RunReport, SCHEMA, SourceReport, peak_memory_bytes,
};
use crate::{Error, Result};
use journaled::{Journaled, Pictures, open_exporter};
use ranks::agree;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

/// What a run does otherwise than another of the same result.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// How the result is written.
    pub format: Format,
    /// What to do about the layers of an earlier run.
    pub resume: Resume,
    /// In how many shards samples are summed up ([`crate::shards`]). As many as an earlier run has
    /// finished layers with, else as there are ranks, if absent.
    pub n_shards: Option<usize>,
    /// What hidden states may take.
    pub room: Room,
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
    lead(&Alone, model, recipe, choice, output, options, observer)
}

/// As [`quantize_folder`], by several ranks, of which the first alone writes, and alone has something
/// to tell. All must be given the same.
///
/// # Errors
/// As there; [`Error::Rank`] if another rank is lost, ends the run or was started otherwise;
/// [`Error::Unsupported`] for a recipe that tunes scales.
pub fn quantize_folder_among(
    communicator: &dyn Communicator,
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    output: &Path,
    options: RunOptions,
    observer: &dyn Observer,
) -> Result<Option<(RunReport, Exported)>> {
    if recipe.tuning().is_some() && !communicator.is_alone() {
        let what = "tuning of scales by several ranks; start one, or leave the tuning out";
        return Err(Error::Unsupported { what: what.into() });
    }
    match communicator.rank() {
        0 => lead(
            communicator,
            model,
            recipe,
            choice,
            output,
            options,
            observer,
        )
        .map(Some),
        _ => {
            let room = options.room;
            follow(communicator, model, recipe, choice, room, observer).map(|()| None)
        }
    }
}

/// Rank 0's way.
fn lead(
    communicator: &dyn Communicator,
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
    if options.room.remakes_inputs {
        check_remaking(model, recipe)?;
    }
    let journal = Journal::open(output, options.resume)?;
    let mut exporter = open_exporter(model, &plan, &journal, options.format)?;
    check_copied(model, &plan)?;
    agree(communicator, model, recipe, &plan, choice)?;
    let n_shards = || journal.n_shards(options.n_shards, communicator.n_ranks());
    let division = Division {
        n_shards: communicator.broadcast_value(n_shards)?,
        communicator,
    };
    let checked = began.elapsed().as_secs_f64();
    let room = (options.room, journal.dir());
    let set = load_share(model, recipe, choice, division, room, observer)?;
    let prepared = began.elapsed().as_secs_f64();
    let allocated = allocate(model, recipe, &set, (communicator, observer))?;
    let recipe = allocated.recipe.as_ref();
    if allocated.report.is_some() {
        // Those before were of the formats that were to be expected.
        plan = module_plan(model, recipe)?;
        drop(exporter);
        exporter = open_exporter(model, &plan, &journal, options.format)?;
    }
    journal.bind(&fingerprint(recipe, &plan, &set, communicator)?)?;
    let mut report = begun_report(model, recipe, &options);
    let all = communicator.all_gather_value(&token_counts(&set.samples))?;
    report.calibration = calibration_report(recipe, choice, &set, all);
    report.n_resumed_layers = journal.n_finished()?;
    report.allocation = allocated.report;
    report.seconds = preparation_seconds(checked, prepared, set.seconds);
    report.ranks = division.report();
    report.engine = Some(engine.report(!set.store.keeps_down_inputs()));
    let mut sink = Journaled {
        model,
        exporter,
        journal,
        layer: None,
        kept: recipe.tuning().map(|_| Vec::new()),
        pictures: pictures(model, recipe, choice, &set, &options)?,
    };
    let some = Some(&mut sink as &mut dyn LayerSink);
    let layers = pipeline::quantize_among(communicator, model, set, recipe, observer, some)?;
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
    report.add_tuning(sink.tune(recipe, choice, options.room.memory_bytes, observer)?);
    let total = began.elapsed().as_secs_f64();
    report.seconds.insert("total".into(), total);
    report.peak_memory_bytes = peak_memory_bytes();
    let exported = sink.finish(&plan, options.format, &mut report, output)?;
    Ok((report, exported))
}

/// The way of every other rank: the same steps, of which nothing is kept. Hidden states that do not
/// fit into memory go to a file among the system's temporary ones.
fn follow(
    communicator: &dyn Communicator,
    model: &ModelSource,
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    room: Room,
    observer: &dyn Observer,
) -> Result<()> {
    let plan = module_plan(model, recipe)?;
    agree(communicator, model, recipe, &plan, choice)?;
    let division = Division {
        n_shards: communicator.broadcast_value(|| Ok(1))?,
        communicator,
    };
    let dir = std::env::temp_dir();
    let set = load_share(model, recipe, choice, division, (room, &dir), observer)?;
    let allocated = allocate(model, recipe, &set, (communicator, observer))?;
    let recipe = allocated.recipe.as_ref();
    let plan = module_plan(model, recipe)?;
    fingerprint(recipe, &plan, &set, communicator)?;
    communicator.all_gather_value(&token_counts(&set.samples))?;
    pipeline::quantize_among(communicator, model, set, recipe, observer, None).map(drop)
}

/// What is known of a run before its first layer.
fn begun_report(model: &ModelSource, recipe: &Recipe, options: &RunOptions) -> RunReport {
    RunReport {
        schema: SCHEMA,
        vlmq: env!("CARGO_PKG_VERSION").into(),
        method: recipe.method.name().into(),
        command: options.command.clone(),
        source: Some(source_report(model)),
        settings: settings(recipe),
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
        pictures.kept = kept.iter().map(|i| set.samples[*i].index).collect();
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

/// Of method, formats and settings.
fn settings_digest(recipe: &Recipe, plan: &[ModulePlan]) -> String {
    blake3::hash(format!("{recipe:?} {plan:?}").as_bytes()).to_string()
}

fn fingerprint(
    recipe: &Recipe,
    plan: &[ModulePlan],
    set: &CalibrationSet,
    communicator: &dyn Communicator,
) -> Result<Fingerprint> {
    Ok(Fingerprint {
        vlmq: env!("CARGO_PKG_VERSION").into(),
        settings: settings_digest(recipe, plan),
        samples: set.digest(communicator)?,
        n_shards: set.shards.ranges().len().max(1),
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

/// Tokens by class.
fn token_counts(samples: &[CalibrationSample]) -> BTreeMap<String, u64> {
    let mut n_tokens = BTreeMap::new();
    for class in samples.iter().flat_map(|s| &s.classes) {
        *n_tokens.entry(class.name().to_owned()).or_insert(0) += 1;
    }
    n_tokens
}

/// Of what all ranks have counted.
fn calibration_report(
    recipe: &Recipe,
    choice: Option<&SampleChoice>,
    set: &CalibrationSet,
    counts: Vec<BTreeMap<String, u64>>,
) -> Option<CalibrationReport> {
    let choice = choice.filter(|_| recipe.needs_calibration())?;
    let mut n_tokens = BTreeMap::new();
    for (class, n) in counts.into_iter().flatten() {
        *n_tokens.entry(class).or_insert(0) += n;
    }
    Some(CalibrationReport {
        n_samples: choice.n_samples,
        n_sequences: set.n_sequences(),
        seed: choice.seed,
        n_tokens,
    })
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
