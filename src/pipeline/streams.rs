//! The two streams of hidden states, and where in a layer they stand.
//!
//! Samples are walked in batches ([`crate::shards`]). What works on tokens alone takes a batch as one matrix, a longer sample
//! piece by piece; attention takes a sample at a time. How batches are cut depends on the samples
//! only, so the same bits come out for any number of threads and any place of the states.

use super::down_inputs::DownInputs;
use super::stage::Stage;
use crate::calibration::{CalibrationSample, CalibrationSet};
use crate::distributed::Communicator;
use crate::hidden_states::{HiddenState, Store};
use crate::importance::{
    FullPass, ImportanceSettings, LayerImportance, SampleFactors, SampleInLayer, gather_factors,
};
use crate::model::context::TokenContext;
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::DecoderConfig;
use crate::model::linear::tensor_from_matrix;
use crate::processor::TokenClass;
use crate::shards::{BATCH_TOKENS, Shards, batches, of_rank};
use crate::{Error, Matrix, Result};
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;

/// All samples of this rank.
pub(super) struct Streams<'a> {
    pub(super) batches: Vec<Vec<Sample>>,
    /// The batches of this rank's shards, one shard a round; none where another rank has one more.
    pub(super) rounds: Vec<Range<usize>>,
    /// All samples of the run.
    pub(super) shards: Shards,
    pub(super) communicator: &'a dyn Communicator,
    pub(super) store: Store,
    with_full: bool,
}

pub(super) struct Sample {
    /// Place among all samples.
    pub(super) index: usize,
    /// File and line or row, for messages.
    pub(super) origin: String,
    pub(super) classes: Vec<TokenClass>,
    pub(super) context: TokenContext,
    /// What the first layers' outputs have added to them, in both streams.
    deepstack: Vec<HiddenState>,
    /// U: the residual stream that the next addition goes to, `[n_tokens, hidden]`.
    pub(super) residual: HiddenState,
    /// U: the input of `o_proj`, later of `down_proj` if that is kept; the other stages' are a norm away.
    pub(super) input: HiddenState,
    pub(super) full: Option<FullStream>,
}

/// F, which runs ahead: its layer is known from the start.
pub(super) struct FullStream {
    pub(super) residual: HiddenState,
    /// Input of `o_proj`, later of `down_proj` if that is kept.
    pub(super) input: HiddenState,
    /// Residual stream after attention.
    pub(super) y: HiddenState,
}

/// The layer that each stream goes through, with the linears that the present step needs.
#[derive(Clone, Copy)]
pub(super) struct BothLayers<'a> {
    /// F's.
    pub(super) full: &'a DecoderLayer,
    /// U's.
    pub(super) quantized: &'a DecoderLayer,
}

impl<'a> BothLayers<'a> {
    /// One layer for both streams.
    pub(super) fn same(layer: &'a DecoderLayer) -> Self {
        Self {
            full: layer,
            quantized: layer,
        }
    }
}

/// How tokens are weighed in one layer.
pub(super) struct Weighing {
    pub(super) settings: ImportanceSettings,
    pub(super) layer_idx: usize,
    /// The layer with weights rounded to nearest, where factors are made of that.
    pub(super) rounded: Option<DecoderLayer>,
}

impl<'a> Streams<'a> {
    /// Both streams start as the embeddings; F is followed only `with_full`.
    ///
    /// # Errors
    /// Those of [`Store::place`] and of reading and writing states.
    pub(super) fn new(
        set: CalibrationSet,
        config: &DecoderConfig,
        with_full: bool,
        communicator: &'a dyn Communicator,
    ) -> Result<Self> {
        let CalibrationSet {
            samples,
            store,
            shards,
            ..
        } = set;
        let mut streams = Self {
            batches: Vec::new(),
            rounds: Vec::new(),
            shards,
            communicator,
            store,
            with_full,
        };
        let mut samples = samples.into_iter().peekable();
        let (n_shards, n_ranks) = (streams.shards.ranges().len(), communicator.n_ranks());
        for shard in of_rank(n_shards, communicator.rank(), n_ranks) {
            let shard = streams.shards.ranges()[shard].clone();
            let first = streams.batches.len();
            for batch in batches(&streams.shards.n_tokens()[shard.clone()]) {
                let end = shard.start + batch.end;
                let mut batch = Vec::new();
                while let Some(sample) = samples.next_if(|sample| sample.index < end) {
                    batch.push(streams.begin(sample, config)?);
                }
                streams.batches.push(batch);
            }
            streams.rounds.push(first..streams.batches.len());
        }
        let end = streams.batches.len();
        streams.rounds.resize(n_shards.div_ceil(n_ranks), end..end);
        Ok(streams)
    }

    fn begin(&self, sample: CalibrationSample, config: &DecoderConfig) -> Result<Sample> {
        let (n, hidden) = (sample.classes.len(), config.hidden_size);
        let widest = hidden.max(config.n_heads * config.head_dim);
        let widest = match self.store.keeps_down_inputs() {
            true => widest.max(config.widest_mlp()),
            false => widest,
        };
        let full = self.with_full.then(|| {
            let mut stream = FullStream {
                residual: self.store.place(n, hidden)?,
                input: self.store.place(n, widest)?,
                y: self.store.place(n, hidden)?,
            };
            for rows in pieces(n) {
                let embeddings = sample.embeddings.rows(&self.store, rows.clone())?;
                stream.residual.set(&self.store, rows.start, &embeddings)?;
            }
            Ok::<_, Error>(stream)
        });
        Ok(Sample {
            index: sample.index,
            origin: sample.origin,
            input: self.store.place(n, widest)?,
            full: full.transpose()?,
            classes: sample.classes,
            context: sample.context,
            deepstack: sample.deepstack,
            residual: sample.embeddings,
        })
    }

    /// Whether F is followed.
    pub(super) fn with_full(&self) -> bool {
        self.with_full
    }

    /// Takes F through the layer's attention, and with `weighing` gives the importance of U's
    /// tokens. `full` holds the linears of attention, and all others if the MLP is asked for.
    pub(super) fn begin_layer(
        &mut self,
        full: &DecoderLayer,
        weighing: Option<&Weighing>,
    ) -> Result<Option<LayerImportance>> {
        if !self.with_full && weighing.is_none() {
            return Ok(None);
        }
        let store = &self.store;
        let samples = self.batches.par_iter_mut().flatten();
        let factors = samples.map(|sample| {
            let factors = sample.begin_layer(store, full, weighing)?;
            Ok(factors.map(|factors| (sample.index, factors)))
        });
        let factors: Vec<_> = factors.collect::<Result<_>>()?;
        let Some(weighing) = weighing else {
            return Ok(None);
        };
        let factors = gather_factors(factors.into_iter().flatten().collect(), self.communicator)?;
        LayerImportance::new(weighing.settings, factors).map(Some)
    }

    /// Walks U to a stage through the quantized linears before it, and F to the last one through
    /// the original ones. Both layers hold the linears of [`Stage::crossed`].
    pub(super) fn enter(&mut self, stage: Stage, layers: BothLayers<'_>) -> Result<()> {
        let (store, quantized) = (&self.store, layers.quantized);
        self.batches.par_iter_mut().try_for_each(|batch| {
            if stage == Stage::O {
                return batch.iter_mut().try_for_each(|sample| {
                    let n1 = quantized.qkv_input(&sample.residual.all(store)?)?;
                    let a = quantized.attention(&n1, &sample.context)?.output;
                    sample.input.set(store, 0, &a)
                });
            }
            for piece in pieces_of(batch) {
                enter_piece(batch, &piece, store, stage, layers)?;
            }
            Ok(())
        })
    }

    /// Leaves the layer: U through its quantized `down_proj`, F through the original one. What the
    /// tower adds after this layer is added to both.
    pub(super) fn end_layer(&mut self, layer_idx: usize, layers: BothLayers<'_>) -> Result<()> {
        let store = &self.store;
        self.batches.par_iter_mut().try_for_each(|batch| {
            for piece in pieces_of(batch) {
                let added = match batch[0].deepstack.get(layer_idx) {
                    Some(_) => Some(gather_tensor(batch, &piece, store, |s| {
                        &s.deepstack[layer_idx]
                    })?),
                    None => None,
                };
                let leave = |layer: &DecoderLayer, y: &Tensor, h: &Tensor| -> Result<Tensor> {
                    let x = layer.after_mlp(y, h)?;
                    Ok(match &added {
                        Some(added) => (x + added)?,
                        None => x,
                    })
                };
                let inputs = DownInputs::of(batch, &piece, store, layers)?;
                let y = gather_tensor(batch, &piece, store, |s| &s.residual)?;
                let x = leave(layers.quantized, &y, &inputs.quantized)?;
                scatter(batch, &piece, store, &x, |s| Some(&mut s.residual))?;
                if let Some(h) = inputs.full {
                    let y = gather_full(batch, &piece, store, |f| &f.y)?;
                    let x = leave(layers.full, &y, &h)?;
                    scatter(batch, &piece, store, &x, |s| {
                        full_state(s, |f| &mut f.residual)
                    })?;
                }
            }
            Ok(())
        })
    }
}

impl Sample {
    fn begin_layer(
        &mut self,
        store: &Store,
        full: &DecoderLayer,
        weighing: Option<&Weighing>,
    ) -> Result<Option<SampleFactors>> {
        let full_pass = match &mut self.full {
            Some(stream) => Some(stream.begin_layer(store, full, &self.context)?),
            None => None,
        };
        let Some(weighing) = weighing else {
            return Ok(None);
        };
        let sample = SampleInLayer {
            layer: full,
            rounded: weighing.rounded.as_ref(),
            context: &self.context,
            x: &self.residual.all(store)?,
            full: full_pass.as_ref(),
            classes: &self.classes,
            layer_idx: weighing.layer_idx,
            sample_idx: self.index,
        };
        weighing.settings.sample_factors(&sample).map(Some)
    }
}

impl FullStream {
    /// Takes one sample through attention.
    fn begin_layer(
        &mut self,
        store: &Store,
        layer: &DecoderLayer,
        context: &TokenContext,
    ) -> Result<FullPass> {
        let x = self.residual.all(store)?;
        let n1 = layer.qkv_input(&x)?;
        let a = layer.attention(&n1, context)?.output;
        let y = layer.after_attention(&x, &a)?;
        self.input.set(store, 0, &a)?;
        self.y.set(store, 0, &y)?;
        Ok(FullPass { n1, a, y })
    }
}

/// The way of a piece to a stage whose inputs are made of one token each.
fn enter_piece(
    batch: &mut [Sample],
    piece: &Piece,
    store: &Store,
    stage: Stage,
    layers: BothLayers<'_>,
) -> Result<()> {
    match stage {
        Stage::Qkv | Stage::O => Ok(()),
        Stage::GateUp => {
            let x = gather_tensor(batch, piece, store, |s| &s.residual)?;
            let a = gather_tensor(batch, piece, store, |s| &s.input)?;
            let y = layers.quantized.after_attention(&x, &a)?;
            scatter(batch, piece, store, &y, |s| Some(&mut s.residual))
        }
        Stage::Down => {
            let made = DownInputs::made(batch, piece, store, layers)?;
            scatter(batch, piece, store, &made.quantized, |s| Some(&mut s.input))?;
            match made.full {
                Some(h) => scatter(batch, piece, store, &h, |s| full_state(s, |f| &mut f.input)),
                None => Ok(()),
            }
        }
    }
}

/// Tokens that are worked on together: all of a batch, or some rows of its only sample.
pub(super) enum Piece {
    All,
    Rows(Range<usize>),
}

impl Piece {
    pub(super) fn rows(&self, sample: &Sample) -> Range<usize> {
        match self {
            Self::All => 0..sample.classes.len(),
            Self::Rows(rows) => rows.clone(),
        }
    }
}

pub(super) fn pieces_of(batch: &[Sample]) -> Vec<Piece> {
    match batch {
        [one] if one.classes.len() > BATCH_TOKENS => {
            pieces(one.classes.len()).map(Piece::Rows).collect()
        }
        _ => vec![Piece::All],
    }
}

fn pieces(n_rows: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..n_rows).step_by(BATCH_TOKENS);
    starts.map(move |start| start..n_rows.min(start + BATCH_TOKENS))
}

/// The rows of a piece in one matrix.
pub(super) fn gather(
    batch: &[Sample],
    piece: &Piece,
    store: &Store,
    state: impl Fn(&Sample) -> &HiddenState,
) -> Result<Matrix> {
    let n_rows = batch.iter().map(|s| piece.rows(s).len()).sum();
    let width = state(&batch[0]).width();
    let mut matrix = Matrix::zeros(n_rows, width);
    let mut rest = matrix.data_mut();
    for sample in batch {
        let rows = piece.rows(sample);
        let (own, after) = rest.split_at_mut(rows.len() * width);
        state(sample).read(store, rows, own)?;
        rest = after;
    }
    Ok(matrix)
}

pub(super) fn gather_tensor(
    batch: &[Sample],
    piece: &Piece,
    store: &Store,
    state: impl Fn(&Sample) -> &HiddenState,
) -> Result<Tensor> {
    if store.device().is_cpu() {
        let matrix = gather(batch, piece, store, state)?;
        return tensor_from_matrix(matrix, store.device());
    }
    // Each from where it lies: those on the device do not leave it.
    let rows = batch.iter().map(|s| state(s).rows(store, piece.rows(s)));
    let rows: Vec<Tensor> = rows.collect::<Result<_>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

/// As [`gather_tensor`], of F.
pub(super) fn gather_full(
    batch: &[Sample],
    piece: &Piece,
    store: &Store,
    state: impl Fn(&FullStream) -> &HiddenState,
) -> Result<Tensor> {
    gather_tensor(batch, piece, store, |s| {
        s.full.as_ref().map_or(&s.input, &state)
    })
}

fn full_state(
    sample: &mut Sample,
    state: impl Fn(&mut FullStream) -> &mut HiddenState,
) -> Option<&mut HiddenState> {
    sample.full.as_mut().map(state)
}

/// Puts the rows of a piece back.
fn scatter(
    batch: &mut [Sample],
    piece: &Piece,
    store: &Store,
    rows: &Tensor,
    state: impl Fn(&mut Sample) -> Option<&mut HiddenState>,
) -> Result<()> {
    let (_, width) = rows.dims2()?;
    if !store.device().is_cpu() {
        let mut start = 0;
        for sample in batch {
            let place = piece.rows(sample);
            let own = rows.narrow(0, start, place.len())?;
            start += place.len();
            if let Some(state) = state(sample) {
                state.set(store, place.start, &own)?;
            }
        }
        return Ok(());
    }
    let values: Vec<f32> = rows.flatten_all()?.to_vec1()?;
    let mut rest = &values[..];
    for sample in batch {
        let place = piece.rows(sample);
        let (own, after) = rest.split_at(place.len() * width);
        rest = after;
        if let Some(state) = state(sample) {
            state.write(store, place.start, width, own)?;
        }
    }
    Ok(())
}
