//! Calibration and quantization apart: statistics made once, in shards if need be, and solved from as
//! often as one likes.

use super::journaled::{Journaled, open_exporter};
use super::ranks::samples_digest;
use super::samples::{Part, Room, SampleChoice, load_part};
use super::{RunOptions, begun_report, check_copied, check_imatrix, module_plan, settings_digest};
use crate::export::Exported;
use crate::journal::{Fingerprint, Journal};
use crate::model::{ModelSource, Module};
use crate::pipeline::{self, GroupStatistics, Observer};
use crate::recipe::Recipe;
use crate::report::{RunReport, peak_memory_bytes};
use crate::statistics::folder::{MeanFactor, Origin, StatisticsFolder, StatisticsWriter};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

/// What a calibration has made.
#[derive(Clone, Copy, Debug)]
pub struct Calibrated {
    /// Layers.
    pub n_layers: usize,
    /// Groups of linears with statistics of their own.
    pub n_groups: usize,
    /// Sequences that were walked through the model.
    pub n_sequences: usize,
}

/// Sums up what the linears of `model` see in full precision of one shard of the samples, `shard` from
/// 0 of `n_shards`, into the new folder `output`.
///
/// # Errors
/// Those of reading samples and of the model; [`Error::Unsupported`] for a recipe whose weights or
/// correction need a quantized stream; [`Error::Invalid`] for a shard without samples.
pub fn calibrate_folder(
    model: &ModelSource,
    recipe: &Recipe,
    choice: &SampleChoice,
    (shard, n_shards): (usize, usize),
    memory_bytes: u64,
    output: &Path,
    observer: &dyn Observer,
) -> Result<Calibrated> {
    let origin = Origin {
        vlmq: env!("CARGO_PKG_VERSION").into(),
        importance: serde_json::json!(recipe.importance),
        samples: samples_digest(choice)?,
        n_samples: choice.n_samples,
        n_shards,
    };
    let power = recipe.importance.map_or(1.0, |settings| settings.power);
    let shards = BTreeSet::from([shard]);
    let mut writer = StatisticsWriter::create(output, origin, power, shards)?;
    let part = Part {
        rank: shard,
        n_ranks: n_shards,
        n_shards,
    };
    let room = (Room::of_memory(memory_bytes), writer.dir());
    let set = load_part(model, recipe, Some(choice), part, room, observer)?.by_itself();
    let n_sequences = set.n_sequences();
    if n_sequences == 0 {
        return Err(Error::Invalid {
            what: format!("--shard {}/{n_shards}", shard + 1),
            why: "there are fewer batches of samples than shards; nothing is left for this one"
                .into(),
        });
    }
    let (mut layer_idx, mut n_groups) = (0, 0);
    let mut take = |seen: &GroupStatistics<'_>| {
        if seen.layer_idx != layer_idx {
            writer.end_layer(model.layer_digest(layer_idx)?)?;
            layer_idx = seen.layer_idx;
        }
        let weighted = seen.factors.filter(|_| seen.weights.is_some());
        let names = seen.modules.iter().map(|m: &Module| m.name.clone());
        writer.add(
            names.collect(),
            seen.statistics,
            weighted.map(MeanFactor::of),
        );
        n_groups += 1;
        Ok(())
    };
    pipeline::measure(model, set, recipe, observer, &mut take)?;
    writer.end_layer(model.layer_digest(layer_idx)?)?;
    writer.finish()?;
    Ok(Calibrated {
        n_layers: layer_idx + 1,
        n_groups,
        n_sequences,
    })
}

/// As [`super::quantize_folder`], from statistics that were made before.
///
/// # Errors
/// As there; [`Error::Invalid`] if the statistics lack a shard, are of other weights, or if their
/// tokens are weighed otherwise than the recipe says.
pub fn quantize_folder_from(
    model: &ModelSource,
    statistics: &StatisticsFolder,
    recipe: &Recipe,
    output: &Path,
    options: RunOptions,
    observer: &dyn Observer,
) -> Result<(RunReport, Exported)> {
    let began = Instant::now();
    let plan = module_plan(model, recipe)?;
    check_imatrix(recipe, &options)?;
    check_statistics(statistics, recipe)?;
    let journal = Journal::open(output, options.resume)?;
    let exporter = open_exporter(model, &plan, &journal, options.format)?;
    check_copied(model, &plan)?;
    journal.bind(&Fingerprint {
        vlmq: env!("CARGO_PKG_VERSION").into(),
        settings: settings_digest(recipe, &plan),
        samples: statistics.digest(),
        n_shards: statistics.origin().n_shards,
    })?;
    let mut report = begun_report(model, recipe, &options);
    report.n_resumed_layers = journal.n_finished()?;
    let mut sink = Journaled {
        model,
        exporter,
        journal,
        layer: None,
        kept: None,
        pictures: None,
    };
    let layers = pipeline::quantize_from(model, statistics, recipe, observer, &mut sink)?;
    if options.imatrix {
        sink.write_imatrix(&layers, &report)?;
    }
    layers.into_iter().for_each(|layer| report.add_layer(layer));
    let total = began.elapsed().as_secs_f64();
    report.seconds.insert("total".into(), total);
    report.peak_memory_bytes = peak_memory_bytes();
    let exported = sink.finish(&plan, options.format, &mut report, output)?;
    Ok((report, exported))
}

/// Whether a recipe can be solved from the statistics.
fn check_statistics(statistics: &StatisticsFolder, recipe: &Recipe) -> Result<()> {
    let invalid = |why: String| {
        Err(Error::Invalid {
            what: "--statistics".into(),
            why,
        })
    };
    let missing = statistics.missing_shards();
    if let Some(first) = missing.first() {
        return invalid(format!(
            "{} of {} shards are missing, shard {} first; `vlmq merge` adds them up",
            missing.len(),
            statistics.origin().n_shards,
            first + 1
        ));
    }
    let asked = serde_json::json!(recipe.importance);
    let found = &statistics.origin().importance;
    if asked != *found {
        return invalid(format!(
            "tokens were weighed by {found}, the method asks for {asked}; give the method and settings \
             of `vlmq calibrate`"
        ));
    }
    if recipe.solver.held_out_alpha || recipe.tuning().is_some() {
        return invalid(
            "held-out samples and tuning need the samples; use gptq, vlmq-v1 or vlmq-v2".into(),
        );
    }
    Ok(())
}
