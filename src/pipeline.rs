//! The loop over layers: both streams walk through a layer stage by stage, and at each stage the
//! linears that see the same inputs are solved before the walk goes on.
//!
//! ```text
//! for each layer:   F, U → one backward per sample → token weights
//!   for each stage: walk U through the linears quantized so far
//!                   inputs f (full-precision layer, stream F), u (partly quantized layer, stream U)
//!                   → H, C → solve → put the quantized linears into the layer
//!   F ← full-precision layer(F),  U ← quantized layer(U)
//! ```
//! A linear is read when a step needs it and given up after: what is in memory at once is one
//! stage's weights and its statistics, never a whole layer.
//! Source: arXiv:2508.03351 §3; the order of stages is GPTQ's true-sequential one.

mod down_inputs;
mod following;
#[cfg(test)]
mod gpu_tests;
mod group;
mod inputs;
mod inputs_on_gpu;
mod observer;
mod offline;
mod outputs;
mod prefetch;
mod prepared;
mod reduction;
mod scaled;
mod share;
mod sink;
mod stage;
mod streams;
mod teams;
mod walk;

use crate::calibration::CalibrationSet;
use crate::distributed::{Alone, Communicator};
use crate::engine::Engine;
use crate::importance::{ImportanceSettings, LayerImportance, end_loss};
use crate::model::decoder::DecoderLayer;
use crate::model::layer_source::LayerSource;
use crate::model::projection::{Projection, Slot};
use crate::model::source::{ModelSource, Module};
use crate::plan::Scheme;
use crate::recipe::Recipe;
use crate::report::importance::KeptWeights;
use crate::report::{Deviation, ModuleReport, log};
use crate::solver::{Target, rtn};
use crate::statistics::{Statistics, is_output_cheaper};
use crate::{Error, QuantizedWeight, Result};
use following::{Following, Leading};
use inputs::{Shared, Summing};
pub use observer::{GroupStatistics, Observer, Unobserved};
pub(crate) use offline::{measure, quantize_from};
use prefetch::Prefetch;
pub use scaled::ScaleSearch;
pub use sink::{FinishedLayer, LayerOutcome, LayerSink};
use stage::Stage;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::Streams;
use walk::Pair;

/// Quantizes every linear of the decoder, hands each to `sink` as soon as it is solved, and says
/// what each layer has to tell.
///
/// # Errors
/// The solver's, the model's and `sink`'s; [`Error::Invalid`] if the recipe needs samples and
/// there are none; [`Error::Interrupted`] if the observer says so.
pub fn quantize(
    model: &ModelSource,
    calibration: CalibrationSet,
    recipe: &Recipe,
    observer: &dyn Observer,
    sink: &mut dyn LayerSink,
) -> Result<Vec<LayerOutcome>> {
    quantize_among(&Alone, model, calibration, recipe, observer, Some(sink))
}

/// As [`quantize`], by several ranks: each gives its share of the samples, all give the same model and
/// recipe, and rank 0 alone gives a sink. What comes out depends on the number of shards
/// ([`crate::shards`]), not on that of ranks.
///
/// # Errors
/// As [`quantize`]; [`Error::Rank`] if another rank is lost or ends the run.
pub fn quantize_among(
    communicator: &dyn Communicator,
    model: &ModelSource,
    calibration: CalibrationSet,
    recipe: &Recipe,
    observer: &dyn Observer,
    sink: Option<&mut dyn LayerSink>,
) -> Result<Vec<LayerOutcome>> {
    let search = ScaleSearch::of(recipe, model, &calibration, communicator, observer)?;
    let kept = sink.as_ref().and_then(|sink| sink.kept_samples());
    let kept_samples = communicator.broadcast_value(|| Ok(kept))?;
    let mut leading;
    let mut following;
    let sink: &mut dyn LayerSink = match sink {
        Some(sink) => {
            leading = Leading { sink, communicator };
            &mut leading
        }
        None => {
            following = Following {
                kept_samples,
                communicator,
            };
            &mut following
        }
    };
    let among = (communicator, observer);
    layers(model, calibration, recipe, search.as_ref(), among, sink)
}

/// As [`quantize`], with scales of input channels searched for as `search` says, and linears
/// rounded to nearest then; without it as the recipe's method does it.
///
/// # Errors
/// As [`quantize`], and those of [`ScaleSearch::check`].
pub fn quantize_with(
    model: &ModelSource,
    calibration: CalibrationSet,
    recipe: &Recipe,
    search: Option<&ScaleSearch>,
    observer: &dyn Observer,
    sink: &mut dyn LayerSink,
) -> Result<Vec<LayerOutcome>> {
    layers(model, calibration, recipe, search, (&Alone, observer), sink)
}

fn layers(
    model: &ModelSource,
    calibration: CalibrationSet,
    recipe: &Recipe,
    search: Option<&ScaleSearch>,
    (communicator, observer): (&dyn Communicator, &dyn Observer),
    sink: &mut dyn LayerSink,
) -> Result<Vec<LayerOutcome>> {
    recipe.check()?;
    recipe.check_shared(&model.modules())?;
    search.map_or(Ok(()), |_| ScaleSearch::check(model))?;
    let engine = Engine::of(model.device())?;
    layers_on(
        &engine,
        model,
        calibration,
        recipe,
        search,
        (communicator, observer),
        sink,
    )
}

/// As [`layers`], on a certain engine.
fn layers_on(
    engine: &Engine,
    model: &ModelSource,
    calibration: CalibrationSet,
    recipe: &Recipe,
    search: Option<&ScaleSearch>,
    (communicator, observer): (&dyn Communicator, &dyn Observer),
    sink: &mut dyn LayerSink,
) -> Result<Vec<LayerOutcome>> {
    engine.check(model, recipe)?;
    if recipe.needs_calibration() && calibration.n_sequences() == 0 {
        return Err(Error::Invalid {
            what: "calibration".into(),
            why: format!("{} needs samples, none given", recipe.method.name()),
        });
    }
    let modules = model.modules().into_iter();
    let schemes = modules.filter_map(|m| recipe.scheme_of(&m.name));
    let with_full = recipe.needs_full_stream(&schemes.collect::<Vec<Scheme>>());
    let end_loss = recipe.importance.filter(ImportanceSettings::is_end_loss);
    let of_end =
        |settings| end_loss::importance(model, &calibration, settings, communicator, observer);
    let end_loss = end_loss.map(of_end).transpose()?;
    let mut streams = Streams::new(calibration, model.decoder(), with_full, communicator)?;
    let n_layers = model.decoder().n_layers;
    let prefetch = Prefetch::new();
    std::thread::scope(|scope| {
        let mut outcomes = Vec::new();
        let all = (0..n_layers).try_for_each(|layer_idx| {
            observer.on_layer(layer_idx, n_layers);
            prefetch.begin(scope, engine, model, layer_idx + 1);
            let of_end = end_loss.as_ref().and_then(|layers| layers.get(layer_idx));
            let among = (communicator, observer);
            let mut run = Run::new(engine, model, recipe, among, layer_idx, of_end);
            run.kept_samples = sink.kept_samples();
            let was_finished = run.layer(&mut streams, search, sink)?;
            run.count_bytes(was_finished)?;
            log::layer(layer_idx, &run.outcome, was_finished);
            outcomes.push(run.outcome);
            Ok(())
        });
        prefetch.end();
        all.map(|()| outcomes)
    })
}

/// The work on one layer.
struct Run<'a> {
    engine: &'a Engine,
    model: &'a ModelSource,
    recipe: &'a Recipe,
    communicator: &'a dyn Communicator,
    observer: &'a dyn Observer,
    layer_idx: usize,
    modules: Vec<Module>,
    source: LayerSource<'a>,
    /// Importance by the loss at the end of the model, which was there before the first layer.
    end_loss: Option<&'a LayerImportance>,
    /// As [`LayerSink::kept_samples`].
    kept_samples: Option<Vec<usize>>,
    /// What this rank had sent when the layer began.
    bytes_before: u64,
    outcome: LayerOutcome,
}

/// Statistics that are summed up in one walk over the samples: all of a dense layer's, some of a
/// mixture's, whose experts may be more than memory has room for.
pub(crate) const GROUPS_AT_ONCE: usize = 16;

impl<'a> Run<'a> {
    fn new(
        engine: &'a Engine,
        model: &'a ModelSource,
        recipe: &'a Recipe,
        (communicator, observer): (&'a dyn Communicator, &'a dyn Observer),
        layer_idx: usize,
        end_loss: Option<&'a LayerImportance>,
    ) -> Self {
        Self {
            engine,
            model,
            recipe,
            communicator,
            observer,
            layer_idx,
            modules: model.layer_modules(layer_idx),
            source: model.layer_source(layer_idx),
            end_loss,
            kept_samples: None,
            bytes_before: communicator.traffic().bytes_sent,
            outcome: LayerOutcome::default(),
        }
    }
}

impl Run<'_> {
    /// Does the layer, or passes through it where an earlier run did it, which it tells.
    fn layer(
        &mut self,
        streams: &mut Streams<'_>,
        search: Option<&ScaleSearch>,
        sink: &mut dyn LayerSink,
    ) -> Result<bool> {
        let finished = sink.finished(self.layer_idx)?;
        let was_finished = finished.is_some();
        match (finished, search) {
            (Some(finished), Some(_)) => {
                self.pass_layer(streams)?;
                self.outcome = finished.outcome;
            }
            (None, Some(search)) => self.scaled_layer(streams, sink, search)?,
            (Some(finished), None) if self.recipe.needs_calibration() => {
                self.finished_layer(finished, streams)?;
            }
            (Some(finished), None) => self.outcome = finished.outcome,
            (None, None) if self.recipe.needs_calibration() => {
                self.calibrated_layer(streams, sink)?;
            }
            (None, None) => self.nearest_layer(sink)?,
        }
        Ok(was_finished)
    }

    /// Takes both streams through a layer that is solved already: the same products of the same
    /// numbers as when it was solved, so that the next layer sees the same bits.
    fn finished_layer(&mut self, finished: FinishedLayer, streams: &mut Streams<'_>) -> Result<()> {
        let (mut pair, _) = self.begin(streams, None)?;
        let solved = finished.weights.iter();
        let solved = solved.map(|(name, weight)| (name.as_str(), weight));
        let solved: HashMap<&str, &QuantizedWeight> = solved.collect();
        for stage in Stage::ALL {
            self.enter(stage, &mut pair, streams)?;
            for module in stage.modules(&self.modules) {
                if let Some(weight) = solved.get(module.name.as_str()) {
                    let linear = self.source.linear(module.slot, weight.dequantize())?;
                    pair.quantized.replace(module.slot, linear);
                }
            }
        }
        self.end(pair, streams)?;
        // What it took to solve the layer, not to pass through it.
        self.outcome = finished.outcome;
        Ok(())
    }

    fn calibrated_layer(
        &mut self,
        streams: &mut Streams<'_>,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        let local = self.recipe.importance.filter(|_| self.end_loss.is_none());
        let (mut pair, importance) = self.begin(streams, local)?;
        let importance = importance.as_ref().or(self.end_loss);
        for stage in Stage::ALL {
            self.enter(stage, &mut pair, streams)?;
            let mut shared = self.shared(stage, importance);
            let summing = Summing {
                dtype: self.recipe.statistics_dtype,
                with_part: self.recipe.solver.held_out_alpha,
            };
            for some in shared.chunks_mut(GROUPS_AT_ONCE) {
                let engine = self.engine;
                self.timed("load", |run| run.load_outputs(some))?;
                let teams = self.teams(some);
                let sums = self.timed("statistics", |_| {
                    streams.accumulate(engine, stage, pair.both(), (some, &teams), summing)
                })?;
                some.iter_mut().for_each(|group| group.at_output = None);
                let of_group = some.iter().zip(&sums);
                for (group, summed) in of_group.filter_map(|(g, s)| Some((g, s.as_ref()?))) {
                    let seen = self.seen(group, &summed.statistics, importance);
                    self.observer.on_statistics(&seen);
                }
                self.solve_groups(some, &teams, sums, &mut pair.quantized, sink)?;
            }
        }
        self.end(pair, streams)?;
        self.timed("write", |run| sink.layer(run.layer_idx, &run.outcome))
    }

    /// What all ranks sent each other for a layer.
    fn count_bytes(&mut self, was_finished: bool) -> Result<()> {
        if !self.communicator.is_alone() && !was_finished {
            let own = self.communicator.traffic().bytes_sent - self.bytes_before;
            let all = self.communicator.all_gather_value(&own)?;
            self.outcome.bytes_exchanged = all.iter().sum();
        }
        Ok(())
    }

    /// What is told of a group.
    fn seen<'b>(
        &self,
        group: &'b Shared,
        statistics: &'b Statistics,
        importance: Option<&'b LayerImportance>,
    ) -> GroupStatistics<'b> {
        let projection = group.modules.first().map(|module| module.slot.projection);
        let factors = importance.zip(projection);
        GroupStatistics {
            layer_idx: self.layer_idx,
            modules: &group.modules,
            statistics,
            weights: group.weights.as_ref().map(|weights| weights.as_slice()),
            factors: factors.and_then(|(importance, of)| importance.factors(of)),
        }
    }

    /// RTN needs neither streams nor a forward.
    fn nearest_layer(&mut self, sink: &mut dyn LayerSink) -> Result<()> {
        for module in self.modules.clone() {
            self.check_cancelled()?;
            let Some(scheme) = self.scheme_or_skip(&module) else {
                continue;
            };
            let [out, inp] = module.shape;
            let clip = self.recipe.solver.clip;
            let weight = self.timed("solve", |run| {
                let w = run
                    .model
                    .checkpoint()
                    .linear_weight(&module.name, out, inp)?;
                rtn(&module.name, &w, scheme, clip)
            })?;
            self.timed("write", |_| sink.module(&module, &weight))?;
            self.outcome
                .modules
                .push(blank_report(&module, Some(scheme)));
        }
        sink.layer(self.layer_idx, &self.outcome)
    }

    /// The statistics that a stage needs: one for all linears with the same inputs and the same
    /// token weights.
    fn shared(&mut self, stage: Stage, importance: Option<&LayerImportance>) -> Vec<Shared> {
        let modules: Vec<Module> = stage.modules(&self.modules).cloned().collect();
        let mut weights = BTreeMap::new();
        let mut all: Vec<Shared> = Vec::new();
        for module in modules {
            let Some(scheme) = self.scheme_or_skip(&module) else {
                continue;
            };
            let weights = weights.entry(module.slot.projection);
            let weights = weights.or_insert_with(|| self.weights_of(&module, importance));
            let weights = weights.clone();
            let with_cross = self.recipe.alpha(scheme) != 0.0;
            let with_stream = with_cross && self.gives_to_stream(&module);
            // Those of an expert follow one another.
            let expert = module.slot.expert;
            let mut own = all.iter_mut().rev().take_while(|s| s.expert() == expert);
            let alike = own.find(|s| s.weights == weights);
            match alike {
                Some(shared) => {
                    shared.modules.push(module);
                    shared.with_cross |= with_cross;
                }
                None => all.push(Shared {
                    modules: vec![module],
                    weights,
                    with_cross,
                    with_stream,
                    at_output: None,
                }),
            }
        }
        all
    }

    /// Reads the weights of linears whose drift is cheaper summed up at their output. An expert's is
    /// not: it sees few tokens.
    fn load_outputs(&self, all: &mut [Shared]) -> Result<()> {
        for shared in all.iter_mut().filter(|shared| shared.with_cross) {
            if let [module] = &shared.modules[..]
                && self.recipe.solver.target != Target::Pull
                && module.slot.expert.is_none()
                && is_output_cheaper(module.shape, shared.with_stream)
            {
                shared.at_output = Some(self.source.weight(module.slot)?);
            }
        }
        Ok(())
    }

    /// Whether the linear is to give what the residual stream lacks. An expert's output is one of
    /// several, and one that goes through a norm is no longer linear in the weight.
    fn gives_to_stream(&self, module: &Module) -> bool {
        let Slot { projection, expert } = module.slot;
        self.recipe.solver.target == Target::ResidualStream
            && matches!(projection, Projection::O | Projection::Down)
            && expert.is_none()
            && !self.model.decoder().sandwich_norms
    }

    /// Token weights of all linears with this one's role, and a note where they should be but are
    /// not, or where safeguards had a part in them.
    fn weights_of(
        &mut self,
        module: &Module,
        importance: Option<&LayerImportance>,
    ) -> Option<Arc<Vec<Vec<f32>>>> {
        let projection = module.slot.projection;
        match importance?.token_weights(projection, module.shape[1]) {
            Ok(found) => {
                let found = found?;
                if let Some(changes) = found.safeguarded {
                    let entry = Deviation::safeguarded(self.layer_idx, projection, changes);
                    self.outcome.deviations.push(entry);
                }
                if let Some(kept) = &self.kept_samples {
                    let kept = KeptWeights::of(projection.name(), &found.weights, kept);
                    self.outcome.kept_weights.push(kept);
                }
                Some(Arc::new(found.weights))
            }
            Err(reason) => {
                let entry = Deviation::uniform(self.layer_idx, projection, reason);
                self.outcome.deviations.push(entry);
                None
            }
        }
    }

    /// Puts a solved weight into the quantized layer, where one is walked through, and hands it over.
    fn take(
        &mut self,
        module: &Module,
        weight: &QuantizedWeight,
        quantized: Option<&mut DecoderLayer>,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        if let Some(quantized) = quantized {
            let linear = self.source.linear(module.slot, weight.dequantize())?;
            quantized.replace(module.slot, linear);
        }
        self.timed("write", |_| sink.module(module, weight))
    }

    fn scheme_or_skip(&mut self, module: &Module) -> Option<Scheme> {
        let scheme = self.recipe.scheme_of(&module.name);
        if scheme.is_none() {
            let name = module.name.clone();
            self.outcome
                .deviations
                .push(Deviation::Skipped { module: name });
            self.outcome.modules.push(blank_report(module, None));
        }
        scheme
    }

    fn check_cancelled(&self) -> Result<()> {
        match self.observer.is_cancelled() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    fn timed<T>(&mut self, stage: &str, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.observer.on_stage(stage);
        let (began, traffic) = (Instant::now(), self.communicator.traffic());
        let result = work(self);
        let elapsed = began.elapsed();
        let exchanged = self.communicator.traffic().time - traffic.time;
        let mut spend = |stage: &str, time: Duration| {
            let spent = self.outcome.seconds.entry(stage.to_owned()).or_default();
            *spent += time.as_secs_f64();
        };
        spend(stage, elapsed.saturating_sub(exchanged));
        if !exchanged.is_zero() {
            spend("exchange", exchanged);
        }
        result
    }
}

fn blank_report(module: &Module, scheme: Option<Scheme>) -> ModuleReport {
    ModuleReport {
        name: module.name.clone(),
        layer_idx: module.layer_idx,
        shape: Some(module.shape),
        scheme,
        relative_loss: None,
        loss: None,
        nearest_loss: None,
        dampening_frac: None,
        alpha: None,
        n_dead_columns: None,
        effective_sample_size: None,
        weight_share: None,
    }
}
