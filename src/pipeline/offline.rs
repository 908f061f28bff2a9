//! Statistics without a quantized stream, and layers solved from such.
//!
//! The stream that linears see here is the full-precision one, in every layer and stage: nothing is
//! quantized on the way. Statistics of some samples then do not depend on any code, so those of
//! several shards can be added up, and all layers solved from them at any time. What is given up:
//! linears do not learn what those before them became, and there is no drift to correct.

use super::group::Task;
use super::inputs::Summed;
use super::streams::Streams;
use super::{
    GroupStatistics, LayerOutcome, LayerSink, Observer, Pair, Run, Shared, Stage, Summing,
};
use crate::calibration::CalibrationSet;
use crate::distributed::{Alone, Communicator};
use crate::engine::Engine;
use crate::importance::{ImportanceSettings, LayerImportance, end_loss};
use crate::model::source::{ModelSource, Module};
use crate::plan::Scheme;
use crate::recipe::Recipe;
use crate::report::log;
use crate::statistics::folder::StatisticsFolder;
use crate::{Error, Result};

/// Takes what linears that share their inputs see; of a layer in solving order.
pub(crate) type Take<'a> = dyn FnMut(&GroupStatistics<'_>) -> Result<()> + 'a;

/// Sums up what every linear of `model` sees in full precision.
///
/// # Errors
/// [`Error::Unsupported`] for a recipe whose weights or correction need a quantized stream, or
/// whose weights are not a power of factors; the model's; [`Error::Interrupted`]; those of `take`.
pub(crate) fn measure(
    model: &ModelSource,
    calibration: CalibrationSet,
    recipe: &Recipe,
    observer: &dyn Observer,
    take: &mut Take<'_>,
) -> Result<()> {
    recipe.check()?;
    check_measurable(model, recipe)?;
    let end_loss = recipe.importance.filter(ImportanceSettings::is_end_loss);
    let of_end = |settings| end_loss::importance(model, &calibration, settings, &Alone, observer);
    let end_loss = end_loss.map(of_end).transpose()?;
    let engine = Engine::of(model.device())?;
    engine.check(model, recipe)?;
    let mut streams = Streams::new(calibration, model.decoder(), false, &Alone)?;
    let n_layers = model.decoder().n_layers;
    for layer_idx in 0..n_layers {
        observer.on_layer(layer_idx, n_layers);
        let of_end = end_loss.as_ref().and_then(|layers| layers.get(layer_idx));
        let among = (&Alone as &dyn Communicator, observer);
        let mut run = Run::new(&engine, model, recipe, among, layer_idx, of_end);
        run.measured_layer(&mut streams, take)?;
    }
    Ok(())
}

/// What needs no quantized stream, and can be told by shards.
fn check_measurable(model: &ModelSource, recipe: &Recipe) -> Result<()> {
    let schemes = model.modules().into_iter();
    let schemes = schemes.filter_map(|m| recipe.scheme_of(&m.name));
    let needs_drift = recipe.needs_full_stream(&schemes.collect::<Vec<Scheme>>());
    let what = match &recipe.importance {
        _ if !recipe.needs_calibration() || recipe.method.is_scaled() => {
            "statistics for a method that solves from none; gptq, vlmq-v1 and vlmq-v2 do"
        }
        _ if needs_drift => {
            "statistics without a quantized stream have no drift: set alpha=0, and \
             importance_loss=answer or importance_source=curvature or attention"
        }
        Some(settings) if !settings.is_power_of_factors() => {
            "statistics whose token weights depend on all shards at once: importance_quantile, \
             importance_floor, importance_min_ess and importance_granularity=modality"
        }
        _ => return Ok(()),
    };
    Err(Error::Unsupported { what: what.into() })
}

/// Solves every layer of `model` from statistics of all shards.
///
/// # Errors
/// [`Error::Invalid`] if they are not of this model's weights, or lack a shard; [`Error::Missing`] if
/// they lack a linear; the solver's and `sink`'s; [`Error::Interrupted`].
pub(crate) fn quantize_from(
    model: &ModelSource,
    statistics: &StatisticsFolder,
    recipe: &Recipe,
    observer: &dyn Observer,
    sink: &mut dyn LayerSink,
) -> Result<Vec<LayerOutcome>> {
    recipe.check()?;
    recipe.check_shared(&model.modules())?;
    let engine = Engine::of(model.device())?;
    engine.check(model, recipe)?;
    let n_layers = model.decoder().n_layers;
    let mut outcomes = Vec::new();
    for layer_idx in 0..n_layers {
        observer.on_layer(layer_idx, n_layers);
        let among = (&Alone as &dyn Communicator, observer);
        let mut run = Run::new(&engine, model, recipe, among, layer_idx, None);
        let finished = sink.finished(layer_idx)?;
        let was_finished = finished.is_some();
        match finished {
            Some(finished) => run.outcome = finished.outcome,
            None => run.layer_from(statistics, sink)?,
        }
        log::layer(layer_idx, &run.outcome, was_finished);
        outcomes.push(run.outcome);
    }
    Ok(outcomes)
}

impl Run<'_> {
    fn measured_layer(&mut self, streams: &mut Streams<'_>, take: &mut Take<'_>) -> Result<()> {
        let local = self.recipe.importance.filter(|_| self.end_loss.is_none());
        let (mut pair, importance) = self.begin(streams, local)?;
        let importance = importance.as_ref().or(self.end_loss);
        for stage in Stage::ALL {
            self.enter(stage, &mut pair, streams)?;
            self.measure_stage(stage, &pair, importance, streams, take)?;
        }
        self.end(pair, streams)
    }

    fn measure_stage(
        &mut self,
        stage: Stage,
        pair: &Pair,
        importance: Option<&LayerImportance>,
        streams: &Streams<'_>,
        take: &mut Take<'_>,
    ) -> Result<()> {
        let mut shared = self.shared(stage, importance);
        let summing = Summing {
            dtype: self.recipe.statistics_dtype,
            with_part: false,
        };
        for some in shared.chunks_mut(super::GROUPS_AT_ONCE) {
            let teams = vec![vec![0]; some.len()];
            let engine = self.engine;
            let sums = self.timed("statistics", |_| {
                streams.accumulate(engine, stage, pair.both(), (some, &teams), summing)
            })?;
            for (group, summed) in some.iter().zip(sums) {
                let Some(summed) = summed else {
                    continue;
                };
                take(&self.seen(group, &summed.statistics, importance))?;
            }
        }
        Ok(())
    }

    fn layer_from(&mut self, from: &StatisticsFolder, sink: &mut dyn LayerSink) -> Result<()> {
        let digest = self.model.layer_digest(self.layer_idx)?;
        if from.layer_source(self.layer_idx) != Some(&digest) {
            return Err(Error::Invalid {
                what: "--statistics".into(),
                why: format!(
                    "they were made with other weights of layer {} than this model's",
                    self.layer_idx
                ),
            });
        }
        let mut left: Vec<Module> = self.modules.clone();
        let names = from.groups(self.layer_idx);
        for (group, statistics) in names.iter().zip(from.layer(self.layer_idx)?) {
            self.check_cancelled()?;
            let is_own = |module: &Module| group.modules.contains(&module.name);
            let (own, rest) = left.into_iter().partition(is_own);
            left = rest;
            self.solve_from(own, statistics?, sink)?;
        }
        for module in left {
            // What is to stay as it is needs none.
            if self.scheme_or_skip(&module).is_some() {
                return Err(Error::Missing {
                    what: format!("statistics of {}", module.name),
                    place: "the folder of --statistics".into(),
                });
            }
        }
        self.timed("write", |run| sink.layer(run.layer_idx, &run.outcome))
    }

    fn solve_from(
        &mut self,
        mut modules: Vec<Module>,
        statistics: crate::statistics::Statistics,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        modules.retain(|module| self.scheme_or_skip(module).is_some());
        let group = Shared::of(modules);
        let summed = Summed {
            statistics,
            part: None,
            weight_share: None,
        };
        let task = Task {
            index: 0,
            group: &group,
            team: &[0],
            place: 0,
        };
        let prepared = self.prepared(&task, summed)?;
        let solved = self.solve_share(&task, prepared)?;
        self.take_all(solved, None, sink)
    }
}
