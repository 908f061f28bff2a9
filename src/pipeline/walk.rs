//! The way of both streams through a layer: which linears each step needs, and what it leaves.

use super::Run;
use super::stage::Stage;
use super::streams::{BothLayers, Streams, Weighing};
use crate::importance::{ImportanceSettings, LayerImportance};
use crate::model::decoder::DecoderLayer;
use crate::model::linear::matrix_from_tensor;
use crate::model::projection::{Projection, Slot};
use crate::solver::rtn;
use crate::{Error, Result};

/// A layer twice: as it was, and as far as it is quantized. Each holds only the linears that the
/// present step needs.
pub(super) struct Pair {
    pub(super) full: DecoderLayer,
    pub(super) quantized: DecoderLayer,
}

impl Pair {
    pub(super) fn both(&self) -> BothLayers<'_> {
        BothLayers {
            full: &self.full,
            quantized: &self.quantized,
        }
    }
}

impl Run<'_> {
    /// Takes F through attention, and gives the importance of tokens.
    pub(super) fn begin(
        &mut self,
        streams: &mut Streams<'_>,
        importance: Option<ImportanceSettings>,
    ) -> Result<(Pair, Option<LayerImportance>)> {
        let needed = match importance {
            Some(settings) if settings.needs_mlp() => self.modules.iter().map(|m| m.slot).collect(),
            None if !streams.with_full() => Vec::new(),
            _ => Projection::ATTENTION.map(Slot::from).to_vec(),
        };
        let mut full = self.timed("load", |run| {
            let mut full = run.source.norms()?;
            run.source.complete(&mut full, &needed)?;
            Ok(full)
        })?;
        let stage = if importance.is_some() {
            "importance"
        } else {
            "forward"
        };
        let importance = self.timed(stage, |run| {
            let weighing = importance.map(|settings| run.weighing(settings, &full, &needed));
            streams.begin_layer(&full, weighing.transpose()?.as_ref())
        })?;
        full.release_all();
        let quantized = full.clone();
        Ok((Pair { full, quantized }, importance))
    }

    /// What weighing tokens takes beside the streams and the layer.
    fn weighing(
        &self,
        settings: ImportanceSettings,
        full: &DecoderLayer,
        linears: &[Slot],
    ) -> Result<Weighing> {
        let rounded = settings.needs_rounded().then(|| {
            let mut rounded = full.clone();
            for module in self.modules.iter().filter(|m| linears.contains(&m.slot)) {
                if let Some(scheme) = self.recipe.scheme_of(&module.name) {
                    let linear = full.linear(module.slot)?;
                    let w = matrix_from_tensor(&linear.weight_f32()?)?;
                    let w = rtn(&module.name, &w, scheme, self.recipe.solver.clip)?;
                    rounded.replace(module.slot, linear.with_weight(w.dequantize())?);
                }
            }
            Ok::<_, Error>(rounded)
        });
        Ok(Weighing {
            settings,
            layer_idx: self.layer_idx,
            rounded: rounded.transpose()?,
        })
    }

    /// Walks both streams to a stage. What was not quantized goes as it was.
    pub(super) fn enter(
        &mut self,
        stage: Stage,
        pair: &mut Pair,
        streams: &mut Streams<'_>,
    ) -> Result<()> {
        self.check_cancelled()?;
        let crossed = stage.crossed(&self.modules);
        self.timed("load", |run| {
            run.source.complete(&mut pair.quantized, &crossed)?;
            match stage == Stage::Down && streams.with_full() {
                true => run.source.complete(&mut pair.full, &crossed),
                false => Ok(()),
            }
        })?;
        if stage == Stage::Down && !streams.store.keeps_down_inputs() {
            // Gate and up are needed as long as its inputs are.
            return Ok(());
        }
        self.timed("forward", |_| streams.enter(stage, pair.both()))?;
        pair.full.release(&crossed);
        pair.quantized.release(&crossed);
        Ok(())
    }

    pub(super) fn end(&mut self, mut pair: Pair, streams: &mut Streams<'_>) -> Result<()> {
        let down: Vec<Slot> = Stage::Down.modules(&self.modules).map(|m| m.slot).collect();
        let layer_idx = self.layer_idx;
        self.timed("load", |run| {
            run.source.complete(&mut pair.quantized, &down)?;
            match streams.with_full() {
                true => run.source.complete(&mut pair.full, &down),
                false => Ok(()),
            }
        })?;
        self.timed("forward", |_| streams.end_layer(layer_idx, pair.both()))
    }
}
