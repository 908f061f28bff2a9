//! The way of a layer whose input channels are scaled before its linears are rounded to nearest.
//!
//! ```text
//! for each half (attention, MLP) of the layer, on the full-precision stream alone:
//!   norm → q,k,v (gate,up) and v → o (up → down): the best of 20 scales each, by the half's output
//!   fold scales into the norm and into the rows of v (up); scale the columns
//!   limits of weights, row by row and group by group; round to nearest
//! ```
//! All searches of a layer see its linears as they were: no search knows of another's result. The
//! stream leaves the layer as it was, too, so that no layer sees the errors of those before it.
//! What is taken out of a stored tensor is exact ([`exact_quotients`]): where every linear stayed
//! unrounded, the folder would compute what the source does.
//!
//! Source: AWQ, arXiv:2306.00978 §3.2; mit-han-lab/llm-awq@d6e797a pre_quant.py. MBQ,
//! arXiv:2412.19509 §4: another loss, no limits. Differs: v and o are scaled if the rows of one are
//! the columns of the other, whatever the other sides.

use super::outputs::OutputLoss;
use super::stage::Stage;
use super::streams::{BothLayers, Streams};
use super::{LayerSink, Observer, Run, blank_report};
use crate::calibration::CalibrationSet;
use crate::distributed::Communicator;
use crate::importance::ModalityRatios;
use crate::importance::end_loss::modality_ratios;
use crate::model::changed::{ChangedTensor, LayerPart};
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::NormScale;
use crate::model::linear::matrix_from_tensor;
use crate::model::projection::{Projection, Slot};
use crate::model::source::{ModelSource, Module};
use crate::recipe::{Method, Recipe};
use crate::report::{ChangeReport, Deviation, NotScaled, ScaleReport};
use crate::solver::scale::{
    N_RATIOS, channel_scales, exact_quotients, ratio, rounded_in_scale, scaled,
};
use crate::solver::{limited, rtn, search_limits};
use crate::{Error, Matrix, Result};

/// What scales are judged by, and what comes after them.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleSearch {
    /// How much errors of vision tokens count beside those of answer tokens; `None` judges by the
    /// mean square over all tokens.
    pub modality: Option<ModalityRatios>,
    /// Whether limits of weights are searched for.
    pub limits: bool,
}

impl ScaleSearch {
    /// The search of AWQ.
    pub fn awq() -> Self {
        Self {
            modality: None,
            limits: true,
        }
    }

    /// The search of MBQ.
    pub fn mbq(ratios: ModalityRatios) -> Self {
        Self {
            modality: Some(ratios),
            limits: false,
        }
    }

    /// The search of a recipe's method, if it has one.
    ///
    /// # Errors
    /// Those of [`ScaleSearch::check`] and, for MBQ, [`modality_ratios`].
    pub fn of(
        recipe: &Recipe,
        model: &ModelSource,
        samples: &CalibrationSet,
        communicator: &dyn Communicator,
        observer: &dyn Observer,
    ) -> Result<Option<Self>> {
        if recipe.method.is_scaled() {
            Self::check(model)?;
        }
        Ok(match recipe.method {
            Method::Awq => Some(Self::awq()),
            Method::Mbq => {
                let ratios = modality_ratios(model, samples, communicator, observer)?;
                Some(Self::mbq(ratios))
            }
            _ => None,
        })
    }

    /// Whether scales can be searched for on this model.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for mixtures of experts.
    pub fn check(model: &ModelSource) -> Result<()> {
        if model.decoder().experts.is_none() {
            return Ok(());
        }
        let what = "scales of input channels on a mixture of experts: the router reads the same \
                    inputs, and scales for each expert are not searched for";
        Err(Error::Unsupported { what: what.into() })
    }

    fn loss(&self, layer_idx: usize, half: Half) -> OutputLoss {
        let Some(ratios) = &self.modality else {
            return OutputLoss::MeanSquare;
        };
        let ratios = match half {
            Half::Attention => &ratios.attention,
            Half::Mlp => &ratios.mlp,
        };
        let vision = ratios.get(layer_idx).copied().unwrap_or(1.0);
        OutputLoss::Modality { vision }
    }
}

/// Two stages of which the second's inputs come from the first's linears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    Attention,
    Mlp,
}

impl Half {
    const BOTH: [Self; 2] = [Self::Attention, Self::Mlp];

    fn stages(self) -> [Stage; 2] {
        match self {
            Self::Attention => [Stage::Qkv, Stage::O],
            Self::Mlp => [Stage::GateUp, Stage::Down],
        }
    }
}

/// What the scales of a stage's inputs are taken out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Norm(LayerPart),
    /// The rows of a linear.
    Rows(Projection),
}

impl Stage {
    fn source(self) -> Source {
        match self {
            Self::Qkv => Source::Norm(LayerPart::BeforeAttention),
            Self::O => Source::Rows(Projection::V),
            Self::GateUp => Source::Norm(LayerPart::BeforeMlp),
            Self::Down => Source::Rows(Projection::Up),
        }
    }
}

/// Scales of the inputs of a half's stages, where they have any.
#[derive(Default)]
struct Scales([Option<Vec<f32>>; 2]);

impl Run<'_> {
    /// Solves a layer, and takes the stream through it as it was.
    pub(super) fn scaled_layer(
        &mut self,
        streams: &mut Streams<'_>,
        sink: &mut dyn LayerSink,
        search: &ScaleSearch,
    ) -> Result<()> {
        let mut layer = self.timed("load", |run| run.source.norms())?;
        for half in Half::BOTH {
            self.enter_half(half, &mut layer, streams)?;
            let loss = search.loss(self.layer_idx, half);
            let mut scales = Scales::default();
            for (own, stage) in scales.0.iter_mut().zip(half.stages()) {
                *own = self.search_stage(stage, &layer, streams, loss)?;
                if let Some(own) = own {
                    self.fold(stage, own, sink)?;
                }
            }
            for (i, stage) in half.stages().into_iter().enumerate() {
                self.round_stage(stage, &layer, streams, (&scales, i), search.limits, sink)?;
            }
        }
        self.leave(&layer, streams)?;
        self.timed("write", |run| sink.layer(run.layer_idx, &run.outcome))
    }

    /// Takes the stream through a layer as it was.
    pub(super) fn pass_layer(&mut self, streams: &mut Streams<'_>) -> Result<()> {
        let mut layer = self.timed("load", |run| run.source.norms())?;
        for half in Half::BOTH {
            self.enter_half(half, &mut layer, streams)?;
        }
        self.leave(&layer, streams)
    }

    /// Walks the stream to the last linear of a half, whose linears `layer` holds from then on.
    fn enter_half(
        &mut self,
        half: Half,
        layer: &mut DecoderLayer,
        streams: &mut Streams<'_>,
    ) -> Result<()> {
        self.check_cancelled()?;
        let [first, last] = half.stages();
        self.timed("forward", |_| streams.enter(first, BothLayers::same(layer)))?;
        layer.release_all();
        let own = [first, last].map(|stage| stage.modules(&self.modules).map(|m| m.slot).collect());
        let own: Vec<Slot> = own.into_iter().flat_map(|slots: Vec<Slot>| slots).collect();
        self.timed("load", |run| run.source.complete(layer, &own))?;
        self.timed("forward", |_| streams.enter(last, BothLayers::same(layer)))
    }

    fn leave(&mut self, layer: &DecoderLayer, streams: &mut Streams<'_>) -> Result<()> {
        let layer_idx = self.layer_idx;
        self.timed("forward", |_| {
            streams.end_layer(layer_idx, BothLayers::same(layer))
        })
    }

    /// The best scales of a stage's inputs, `[in]`.
    fn search_stage(
        &mut self,
        stage: Stage,
        layer: &DecoderLayer,
        streams: &Streams<'_>,
        loss: OutputLoss,
    ) -> Result<Option<Vec<f32>>> {
        let roles = stage.projections().iter().map(|p| p.name().to_owned());
        let modules: Vec<String> = roles.collect();
        if let Some(reason) = self.not_scaled(stage) {
            self.outcome.deviations.push(Deviation::NotScaled {
                layer_idx: self.layer_idx,
                modules: modules.join(", "),
                reason,
            });
            return Ok(None);
        }
        let mean_abs = self.timed("search", |_| streams.mean_abs(stage, layer))?;
        let mut losses = Vec::with_capacity(N_RATIOS);
        for step in 0..N_RATIOS {
            self.check_cancelled()?;
            let scales = channel_scales(&mean_abs, ratio(step));
            losses.push(self.timed("search", |run| {
                let changed = run.rounded(stage, layer, &scales)?;
                streams.output_loss(stage, layer, &changed, loss)
            })?);
        }
        let best = self.best(stage, &losses)?;
        let source = match stage.source() {
            Source::Norm(part) => self.source.part_name(part),
            Source::Rows(projection) => projection.name().to_owned(),
        };
        self.outcome.scales.push(ScaleReport {
            layer_idx: self.layer_idx,
            source,
            modules,
            ratio: ratio(best),
            losses,
        });
        Ok(Some(channel_scales(&mean_abs, ratio(best))))
    }

    /// The first step of the least loss.
    fn best(&self, stage: Stage, losses: &[f64]) -> Result<usize> {
        let count = losses.iter().filter(|loss| !loss.is_finite()).count();
        let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
        match losses.iter().position(|loss| *loss == least) {
            Some(best) if count == 0 => Ok(best),
            _ => Err(Error::NotFinite {
                module: stage.modules(&self.modules).map(|m| &m.name[..]).collect(),
                stage: "output errors of the search for scales".into(),
                count,
            }),
        }
    }

    /// Why a stage's inputs cannot be scaled, if they cannot.
    fn not_scaled(&self, stage: Stage) -> Option<NotScaled> {
        let source = match stage.source() {
            Source::Norm(_) => None,
            Source::Rows(projection) => {
                let is_it = |m: &&Module| m.slot == projection.into();
                self.modules.iter().find(is_it)
            }
        };
        let is_left = |m: &Module| self.recipe.scheme_of(&m.name).is_none();
        if stage.modules(&self.modules).chain(source).any(is_left) {
            return Some(NotScaled::LeftAsItIs);
        }
        let columns = stage.modules(&self.modules).next()?.shape[1];
        let fits = source.is_none_or(|source| source.shape[0] == columns);
        (!fits).then_some(NotScaled::GroupedQueries)
    }

    /// The layer with a stage's linears rounded in these scales, and no others.
    fn rounded(&self, stage: Stage, layer: &DecoderLayer, scales: &[f32]) -> Result<DecoderLayer> {
        let mut changed = layer.clone();
        changed.release_all();
        for module in stage.modules(&self.modules) {
            let Some(scheme) = self.recipe.scheme_of(&module.name) else {
                continue;
            };
            let linear = layer.linear(module.slot)?;
            let (w, clip) = (
                matrix_from_tensor(&linear.weight_f32()?)?,
                self.recipe.solver.clip,
            );
            let w = rounded_in_scale(&module.name, &w, scales, scheme, clip)?;
            changed.replace(module.slot, linear.with_weight(w)?);
        }
        Ok(changed)
    }

    /// Takes a stage's scales out of the tensor before it, where one is stored, and moves them so
    /// that this is exact.
    fn fold(&mut self, stage: Stage, scales: &mut [f32], sink: &mut dyn LayerSink) -> Result<()> {
        let config = self.model.decoder();
        let (part, offset) = match (stage.source(), config.norm_scale) {
            (Source::Norm(part), NormScale::Weight) => (part, 0.0),
            (Source::Norm(part), NormScale::OnePlusWeight) => (part, 1.0),
            (Source::Rows(projection), _) => match Slot::from(projection) {
                slot if slot.has_bias(config) => (LayerPart::Bias(slot), 0.0),
                _ => return Ok(()),
            },
        };
        let name = self.source.part_name(part);
        let dtype = self.model.checkpoint().info(&name).map(|info| info.dtype);
        let dtype = dtype.filter(|dtype| dtype.bytes_from_f32(&[]).is_some());
        let dtype = dtype.ok_or_else(|| Error::Unsupported {
            what: format!("{name}: scaling a tensor that is not BF16, F16 or F32"),
        })?;
        let round = |value: f32| {
            let bytes = dtype.bytes_from_f32(&[value]).unwrap_or_default();
            let back = dtype.f32_from_bytes(&bytes).unwrap_or_default();
            back.first().copied().unwrap_or(f32::NAN)
        };
        let stored = self.source.part(part)?;
        let values = exact_quotients(&stored, offset, scales, round);
        if values == stored {
            return Ok(());
        }
        let roles: Vec<&str> = stage.projections().iter().map(|p| p.name()).collect();
        let by = format!("scales of the inputs of {}", roles.join(", "));
        self.outcome.changed.push(ChangeReport {
            name: name.clone(),
            by: by.clone(),
        });
        let tensor = ChangedTensor {
            layer_idx: self.layer_idx,
            part,
            name,
            values,
            by,
        };
        self.timed("write", |_| sink.tensor(&tensor))
    }

    /// Scales, limits and rounds the linears of a half's `i`-th stage, and hands them over.
    fn round_stage(
        &mut self,
        stage: Stage,
        layer: &DecoderLayer,
        streams: &Streams<'_>,
        (scales, i): (&Scales, usize),
        limits: bool,
        sink: &mut dyn LayerSink,
    ) -> Result<()> {
        let [_, inner] = &scales.0;
        let columns = scales.0[i].as_deref();
        let inputs = limits.then(|| {
            let width = stage
                .modules(&self.modules)
                .next()
                .map_or(0, |m| m.shape[1]);
            let inputs = self.timed("search", |_| streams.sampled_inputs(stage, layer, width))?;
            let inverse = columns.map(|c| c.iter().map(|s| 1.0 / s).collect::<Vec<f32>>());
            Ok::<_, Error>(scaled(inputs, None, inverse.as_deref()))
        });
        let inputs = inputs.transpose()?;
        for module in stage.modules(&self.modules.clone()) {
            self.check_cancelled()?;
            let Some(scheme) = self.scheme_or_skip(module) else {
                continue;
            };
            let projection = module.slot.projection;
            let has_rows = matches!(projection, Projection::V | Projection::Up);
            let rows = inner.as_deref().filter(|_| has_rows);
            let w = matrix_from_tensor(&layer.linear(module.slot)?.weight_f32()?)?;
            let w = scaled(w, rows, columns);
            let w = match inputs.as_ref().filter(|_| has_limits(projection)) {
                Some(inputs) => self.timed("search", |run| run.limited(module, w, inputs))?,
                None => w,
            };
            let clip = self.recipe.solver.clip;
            let weight = self.timed("solve", |_| rtn(&module.name, &w, scheme, clip))?;
            self.timed("write", |_| sink.module(module, &weight))?;
            self.outcome
                .modules
                .push(blank_report(module, Some(scheme)));
        }
        Ok(())
    }

    fn limited(&self, module: &Module, w: Matrix, inputs: &Matrix) -> Result<Matrix> {
        let Some(scheme) = self.recipe.scheme_of(&module.name) else {
            return Ok(w);
        };
        let clip = self.recipe.solver.clip;
        let limits = search_limits(&module.name, &w, inputs, scheme, clip)?;
        Ok(limited(w, &limits))
    }
}

/// Queries and keys meet in a product, which errors of one alone do not tell of.
fn has_limits(projection: Projection) -> bool {
    !matches!(projection, Projection::Q | Projection::K)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mbq_weighs_each_half_of_each_layer_by_its_own_ratio() {
        let ratios = ModalityRatios {
            attention: vec![0.1, 0.2],
            mlp: vec![0.3, 0.4],
        };
        let search = ScaleSearch::mbq(ratios);
        assert!(!search.limits);
        let loss = |layer_idx, half| search.loss(layer_idx, half);
        let expected = |vision| OutputLoss::Modality { vision };
        assert_eq!(loss(1, Half::Attention), expected(0.2));
        assert_eq!(loss(0, Half::Mlp), expected(0.3));
        let awq = ScaleSearch::awq();
        assert_eq!(awq.loss(0, Half::Mlp), OutputLoss::MeanSquare);
    }
}
