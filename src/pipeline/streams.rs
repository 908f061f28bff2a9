//! The two streams of hidden states, sample by sample, and where in a layer they stand.

use super::stage::Stage;
use crate::calibration::CalibrationSample;
use crate::importance::{ImportanceSettings, LayerImportance};
use crate::model::decoder::{DecoderLayer, Projection};
use crate::model::linear::matrix_from_tensor;
use crate::model::qwen2_vl::Module;
use crate::model::rope::Rope;
use crate::processor::TokenClass;
use crate::statistics::Statistics;
use crate::{Matrix, Result};
use candle_core::Tensor;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Tokens whose inputs are put together before they are added to the statistics: enough for a
/// product at full speed, little enough to stay small.
pub const CHUNK_TOKENS: usize = 4096;

/// All samples.
pub(super) struct Streams {
    samples: Vec<Sample>,
    with_full: bool,
}

struct Sample {
    classes: Vec<TokenClass>,
    rope: Rope,
    /// U: the residual stream that the next addition goes to, `[n_tokens, hidden]`.
    residual: Tensor,
    /// U: the input of the stage at which the walk stands.
    input: Tensor,
    full: Option<FullStream>,
}

/// F, which runs ahead: its layer is known from the start.
struct FullStream {
    residual: Tensor,
    /// Input of `o_proj`.
    attention: Tensor,
    /// Residual stream after attention.
    y: Tensor,
}

/// Linears whose statistics are the same, and those statistics.
pub(super) struct Shared {
    pub(super) projections: Vec<Projection>,
    /// `[sample][token]`; `None` weighs all alike.
    pub(super) weights: Option<Vec<Vec<f32>>>,
    pub(super) with_cross: bool,
    pub(super) statistics: Statistics,
    /// Share of Σω by token class, where tokens are weighted.
    pub(super) weight_share: Option<BTreeMap<String, f64>>,
    module: String,
}

impl Shared {
    pub(super) fn new(
        projection: Projection,
        module: &Module,
        weights: Option<Vec<Vec<f32>>>,
        with_cross: bool,
    ) -> Self {
        Self {
            projections: vec![projection],
            weights,
            with_cross,
            statistics: Statistics::new(module.shape[1], false),
            weight_share: None,
            module: module.name.clone(),
        }
    }
}

impl Streams {
    /// Both streams start as the embeddings; F is followed only `with_full`.
    pub(super) fn new(samples: Vec<CalibrationSample>, with_full: bool) -> Self {
        let start = |sample: CalibrationSample| Sample {
            classes: sample.classes,
            rope: sample.rope,
            full: with_full.then(|| FullStream {
                residual: sample.embeddings.clone(),
                attention: sample.embeddings.clone(),
                y: sample.embeddings.clone(),
            }),
            input: sample.embeddings.clone(),
            residual: sample.embeddings,
        };
        Self {
            samples: samples.into_iter().map(start).collect(),
            with_full,
        }
    }

    /// Takes F through the layer's attention, and with `importance` the gradients of U's residual.
    pub(super) fn begin_layer(
        &mut self,
        full: &DecoderLayer,
        importance: Option<ImportanceSettings>,
    ) -> Result<Option<LayerImportance>> {
        if !self.with_full {
            return Ok(None);
        }
        let one = |sample: &mut Sample| {
            let Some(stream) = &mut sample.full else {
                return Ok(None);
            };
            let n1 = full.qkv_input(&stream.residual)?;
            stream.attention = full.attention(&n1, &sample.rope)?.output;
            stream.y = full.after_attention(&stream.residual, &stream.attention)?;
            let Some(settings) = importance else {
                return Ok(None);
            };
            let trace = full.attention(&full.qkv_input(&sample.residual)?, &sample.rope)?;
            let y = full.after_attention(&sample.residual, &trace.output)?;
            settings
                .sample_factors(full, &trace, &sample.rope, &y, &stream.y)
                .map(Some)
        };
        let factors: Vec<_> = self
            .samples
            .par_iter_mut()
            .map(one)
            .collect::<Result<_>>()?;
        let factors: Option<Vec<_>> = factors.into_iter().collect();
        match (importance, factors) {
            (Some(settings), Some(factors)) => LayerImportance::new(settings, factors).map(Some),
            _ => Ok(None),
        }
    }

    /// Walks U to the input of a stage, through the linears solved so far.
    pub(super) fn enter(&mut self, stage: Stage, layer: &DecoderLayer) -> Result<()> {
        self.samples.par_iter_mut().try_for_each(|s| {
            s.input = match stage {
                Stage::Qkv => layer.qkv_input(&s.residual)?,
                Stage::O => layer.attention(&s.input, &s.rope)?.output,
                Stage::GateUp => {
                    s.residual = layer.after_attention(&s.residual, &s.input)?;
                    layer.gate_up_input(&s.residual)?
                }
                Stage::Down => layer.down_input(&s.input)?,
            };
            Ok(())
        })
    }

    /// Sums up the inputs of a stage over all samples, in their order, for each of `shared`.
    pub(super) fn accumulate(
        &mut self,
        stage: Stage,
        full: &DecoderLayer,
        mut shared: Vec<Shared>,
    ) -> Result<Vec<Shared>> {
        for group in &mut shared {
            let in_features = group.statistics.in_features();
            group.statistics = Statistics::new(in_features, group.with_cross);
            group.weight_share = group.weights.as_ref().map(|w| self.weight_share(w));
        }
        let with_cross = shared.iter().any(|group| group.with_cross);
        let mut start = 0;
        while start < self.samples.len() && !shared.is_empty() {
            let end = self.chunk_end(start);
            let chunk = &mut self.samples[start..end];
            let inputs = chunk
                .par_iter_mut()
                .map(|s| s.inputs(stage, full, with_cross));
            let inputs = inputs.collect::<Result<Vec<_>>>()?;
            let (u, f): (Vec<_>, Vec<_>) = inputs.into_iter().unzip();
            let u = stack(&u)?;
            let f = f.into_iter().collect::<Option<Vec<_>>>();
            let f = f.map(|f| stack(&f)).transpose()?;
            for group in &mut shared {
                let weights = group.weights.as_ref().map(|w| w[start..end].concat());
                let f = f.as_ref().filter(|_| group.with_cross);
                group
                    .statistics
                    .add(&group.module, &u, f, weights.as_deref())?;
            }
            start = end;
        }
        Ok(shared)
    }

    /// Leaves the layer: U through its quantized linears, F through the original ones.
    pub(super) fn end_layer(
        &mut self,
        full: &DecoderLayer,
        quantized: &DecoderLayer,
    ) -> Result<()> {
        self.samples.par_iter_mut().try_for_each(|s| {
            s.residual = quantized.after_mlp(&s.residual, &s.input)?;
            if let Some(stream) = &mut s.full {
                let h = full.down_input(&full.gate_up_input(&stream.y)?)?;
                stream.residual = full.after_mlp(&stream.y, &h)?;
            }
            Ok(())
        })
    }

    fn chunk_end(&self, start: usize) -> usize {
        let mut n_tokens = 0;
        let fits = |s: &&Sample| {
            n_tokens += s.classes.len();
            n_tokens <= CHUNK_TOKENS
        };
        let n = self.samples[start..].iter().take_while(fits).count();
        start + n.max(1)
    }

    fn weight_share(&self, weights: &[Vec<f32>]) -> BTreeMap<String, f64> {
        let mut share = BTreeMap::new();
        let mut total = 0.0;
        for (sample, weights) in self.samples.iter().zip(weights) {
            for (class, weight) in sample.classes.iter().zip(weights) {
                let name = format!("{class:?}").to_lowercase();
                *share.entry(name).or_insert(0.0) += f64::from(*weight);
                total += f64::from(*weight);
            }
        }
        share.values_mut().for_each(|s| *s /= total);
        share
    }
}

impl Sample {
    /// u and, if asked, f of a stage.
    fn inputs(
        &mut self,
        stage: Stage,
        full: &DecoderLayer,
        with_cross: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let f = match self.full.as_ref().filter(|_| with_cross) {
            None => None,
            Some(stream) => Some(match stage {
                Stage::Qkv => full.qkv_input(&stream.residual)?,
                Stage::O => stream.attention.clone(),
                Stage::GateUp => full.gate_up_input(&stream.y)?,
                Stage::Down => full.down_input(&full.gate_up_input(&stream.y)?)?,
            }),
        };
        Ok((self.input.clone(), f))
    }
}

/// The rows of all `parts`, one after the other.
fn stack(parts: &[Tensor]) -> Result<Matrix> {
    matrix_from_tensor(&Tensor::cat(parts, 0)?)
}
