//! What the linears of a stage see, summed up over all samples.
//!
//! In a mixture an expert sees the tokens that the quantized stream sends to it. Where the
//! full-precision stream sends a token elsewhere, there is nothing that this expert should have
//! given instead: f is then u, and the token asks for no correction.

use super::down_inputs::DownInputs;
use super::reduction::Reduction;
use super::stage::Stage;
use super::streams::{
    BothLayers, Piece, Sample, Streams, gather, gather_full, gather_tensor, pieces_of,
};
use crate::engine::Engine;
use crate::gpu::Kept;
use crate::hidden_states::Store;
use crate::model::decoder::DecoderLayer;
use crate::model::experts::Routing;
use crate::model::linear::matrix_from_tensor;
use crate::model::source::Module;
use crate::processor::TokenClass;
use crate::statistics::{Batch, Statistics, StatisticsDtype};
use crate::{Error, Matrix, Result};
use candle_core::Tensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Linears whose statistics are the same; at least one.
pub(super) struct Shared {
    pub(super) modules: Vec<Module>,
    /// `[sample][token]`; `None` weighs all alike.
    pub(super) weights: Option<Arc<Vec<Vec<f32>>>>,
    pub(super) with_cross: bool,
    /// Whether what the residual stream lacks counts as well.
    pub(super) with_stream: bool,
    /// W of the only linear, while it is needed: what least squares ask for is summed up at its
    /// output, in place of C.
    pub(super) at_output: Option<Matrix>,
}

/// How inputs are summed up.
#[derive(Clone, Copy)]
pub(super) struct Summing {
    pub(super) dtype: StatisticsDtype,
    /// Whether those of about half of the samples are also kept apart.
    pub(super) with_part: bool,
}

/// What linears see, summed up.
pub(super) struct Summed {
    pub(super) statistics: Statistics,
    /// Of a part of the samples, where it is wanted.
    pub(super) part: Option<Statistics>,
    /// Where tokens are weighted.
    pub(super) weight_share: Option<WeightShare>,
}

/// Σω by token class.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct WeightShare {
    sums: BTreeMap<String, f64>,
}

impl WeightShare {
    pub(super) fn add(&mut self, classes: &[TokenClass], weights: &[f32]) {
        for (class, weight) in classes.iter().zip(weights) {
            *self.sums.entry(class.name().to_owned()).or_default() += f64::from(*weight);
        }
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (class, sum) in &other.sums {
            *self.sums.entry(class.clone()).or_default() += sum;
        }
    }

    /// The share of each class, by its name in lower case.
    pub(super) fn by_name(self) -> BTreeMap<String, f64> {
        let total: f64 = self.sums.values().sum();
        let shares = self.sums.into_iter();
        shares.map(|(name, sum)| (name, sum / total)).collect()
    }
}

impl Shared {
    /// Linears whose statistics are there already.
    pub(super) fn of(modules: Vec<Module>) -> Self {
        Self {
            modules,
            weights: None,
            with_cross: false,
            with_stream: false,
            at_output: None,
        }
    }

    pub(super) fn expert(&self) -> Option<usize> {
        self.modules.first().and_then(|m| m.slot.expert)
    }

    pub(super) fn name(&self) -> &str {
        self.modules.first().map_or("", |m| &m.name)
    }

    pub(super) fn in_features(&self) -> usize {
        self.modules.first().map_or(0, |m| m.shape[1])
    }

    /// What is summed up of its inputs.
    pub(super) fn kept(&self, summing: Summing) -> Kept {
        let with_output = self.with_stream || self.at_output.is_some();
        let module = self.modules.first().filter(|_| with_output);
        Kept {
            in_features: self.in_features(),
            with_cross: self.with_cross && self.at_output.is_none(),
            out_features: module.map(|module| module.shape[0]),
            dtype: summing.dtype,
        }
    }

    /// Numbers that statistics of it hold.
    pub(super) fn n_moments(&self, summing: Summing) -> usize {
        let kept = self.kept(summing);
        let n = kept.in_features;
        let cross = usize::from(kept.with_cross) * n * n;
        n * (n + 1) / 2 + cross + kept.out_features.unwrap_or(0) * n
    }

    pub(super) fn empty(&self, summing: Summing) -> Summed {
        let kept = self.kept(summing);
        let statistics = || {
            let statistics = Statistics::new(kept.in_features, kept.with_cross);
            let statistics = statistics.rounded_to(kept.dtype);
            match kept.out_features {
                Some(out) => statistics.with_output(out),
                None => statistics,
            }
        };
        Summed {
            statistics: statistics(),
            part: (summing.with_part && self.with_cross).then(statistics),
            weight_share: self.weights.as_ref().map(|_| WeightShare::default()),
        }
    }
}

impl Summed {
    /// Adds the sums of the next shard.
    pub(super) fn merge(&mut self, next: &Self) -> Result<()> {
        self.statistics.merge(&next.statistics)?;
        if let (Some(part), Some(next)) = (&mut self.part, &next.part) {
            part.merge(next)?;
        }
        if let (Some(share), Some(next)) = (&mut self.weight_share, &next.weight_share) {
            share.merge(next);
        }
        Ok(())
    }

    /// The part, which is kept apart while samples are summed up, into the whole.
    pub(super) fn complete(mut self) -> Result<Self> {
        if let Some(part) = &self.part {
            self.statistics.merge(part)?;
        }
        Ok(self)
    }
}

impl Streams<'_> {
    /// Sums up the inputs of a stage over all samples, shard by shard in their order, for each of
    /// `shared`: at the ranks of its team.
    pub(super) fn accumulate(
        &self,
        engine: &Engine,
        stage: Stage,
        layers: BothLayers<'_>,
        (shared, teams): (&[Shared], &[Vec<usize>]),
        summing: Summing,
    ) -> Result<Vec<Option<Summed>>> {
        let mut reduction = Reduction::new(self.communicator, shared, summing);
        for round in &self.rounds {
            let own = (!round.is_empty()).then(|| {
                let batches = &self.batches[round.clone()];
                match engine {
                    Engine::Cpu => self.sum(batches, stage, layers, shared, summing),
                    Engine::Gpu(gpu) => self.sum_on(gpu, batches, (stage, layers), shared, summing),
                }
            });
            reduction.add(own.transpose()?)?;
        }
        reduction.finish(teams)
    }

    /// Sums up a shard's inputs in the order of its samples.
    fn sum(
        &self,
        batches: &[Vec<Sample>],
        stage: Stage,
        layers: BothLayers<'_>,
        shared: &[Shared],
        summing: Summing,
    ) -> Result<Vec<Summed>> {
        let mut all: Vec<Summed> = shared.iter().map(|group| group.empty(summing)).collect();
        let Some(first) = shared.first() else {
            return Ok(all);
        };
        let wanted = Wanted {
            full: shared.iter().any(|group| group.with_cross),
            stream: shared.iter().any(|group| group.with_stream),
        };
        for (batch, piece) in with_pieces(batches) {
            let down = self.down_inputs(batch, &piece, (stage, layers))?;
            for portion in portions(batch, &piece, summing.with_part) {
                let samples = portion.samples;
                let down = portion.of(down.as_ref())?;
                let stage = (stage, layers.full);
                let inputs = Inputs::new(samples, &piece, &self.store, stage, (wanted, down))?;
                let named = |error| name_sample(error, samples, &piece, &inputs);
                if inputs.routing.is_some() {
                    // Of an expert's rows nobody could say which tokens they are.
                    inputs.check_finite(first.name()).map_err(named)?;
                }
                for (group, summed) in shared.iter().zip(&mut all) {
                    let weights = group.weights.as_ref();
                    let weights = weights.map(|w| weights_of(samples, &piece, w));
                    inputs
                        .add_to(summed, group, portion.is_part, weights)
                        .map_err(named)?;
                }
            }
        }
        Ok(all)
    }

    /// Inputs of down for a piece, where they are seen and not kept: made once for all its portions.
    pub(super) fn down_inputs(
        &self,
        batch: &[Sample],
        piece: &Piece,
        (stage, layers): (Stage, BothLayers<'_>),
    ) -> Result<Option<DownInputs>> {
        let made = || DownInputs::made(batch, piece, &self.store, layers);
        let is_wanted = stage == Stage::Down && !self.store.keeps_down_inputs();
        is_wanted.then(made).transpose()
    }
}

/// Batches and their pieces, in order.
pub(super) fn with_pieces(batches: &[Vec<Sample>]) -> impl Iterator<Item = (&[Sample], Piece)> {
    let pieces = |batch| {
        pieces_of(batch)
            .into_iter()
            .map(move |piece| (batch, piece))
    };
    batches.iter().map(Vec::as_slice).flat_map(pieces)
}

/// Samples of a batch that are summed up together.
pub(super) struct Portion<'a> {
    pub(super) samples: &'a [Sample],
    /// Whether they are of the part that is kept apart.
    pub(super) is_part: bool,
    /// Their rows among those of the batch's piece.
    rows: Range<usize>,
}

impl Portion<'_> {
    /// Its part of what there is of the piece.
    pub(super) fn of(&self, piece: Option<&DownInputs>) -> Result<Option<DownInputs>> {
        piece.map(|piece| piece.rows(&self.rows)).transpose()
    }
}

/// All samples of a batch, or with a part two halves, so that one without the other has samples of every
/// kind.
pub(super) fn portions<'a>(
    batch: &'a [Sample],
    piece: &Piece,
    with_part: bool,
) -> Vec<Portion<'a>> {
    // Of an odd number the one more goes to either in turn.
    let n_before = batch.first().map_or(0, |sample| sample.index);
    let middle = match with_part {
        true => (n_before + batch.len()).div_ceil(2) - usize::div_ceil(n_before, 2),
        false => 0,
    };
    let (part, rest) = batch.split_at(middle);
    let mut end = 0;
    let portions = [(part, true), (rest, false)].map(|(samples, is_part)| {
        let start = end;
        end += samples.iter().map(|s| piece.rows(s).len()).sum::<usize>();
        Portion {
            samples,
            is_part,
            rows: start..end,
        }
    });
    let portions = portions.into_iter();
    portions.filter(|p| !p.samples.is_empty()).collect()
}

/// What is wanted beside the inputs of the quantized stream.
#[derive(Clone, Copy)]
struct Wanted {
    full: bool,
    stream: bool,
}

/// The inputs of a stage for the tokens of a piece, by token.
struct Inputs {
    u: Matrix,
    f: Option<Matrix>,
    /// What the residual stream lacks that the outputs are added to.
    stream_drift: Option<Matrix>,
    classes: Vec<TokenClass>,
    routing: Option<Choices>,
}

/// Where a mixture sends the tokens of both streams.
struct Choices {
    quantized: Routing,
    full: Option<Routing>,
    /// Whether rows have a part for each choice, or one for all.
    has_parts: bool,
}

impl Inputs {
    fn new(
        batch: &[Sample],
        piece: &Piece,
        store: &Store,
        (stage, norms): (Stage, &DecoderLayer),
        (wanted, down): (Wanted, Option<DownInputs>),
    ) -> Result<Self> {
        let with_full = wanted.full && batch[0].full.is_some();
        let residual = || gather_tensor(batch, piece, store, |s| &s.residual);
        // n₂ of both streams, which also tells where a mixture sends tokens.
        let both_n2 = || -> Result<(Tensor, Option<Tensor>)> {
            let full = || norms.gate_up_input(&gather_full(batch, piece, store, |f| &f.y)?);
            let full = with_full.then(full).transpose()?;
            Ok((norms.gate_up_input(&residual()?)?, full))
        };
        let (u, f, routing) = match stage {
            Stage::Qkv => {
                let x = || gather_full(batch, piece, store, |f| &f.residual);
                let f = || matrix_from_tensor(&norms.qkv_input(&x()?)?);
                let u = matrix_from_tensor(&norms.qkv_input(&residual()?)?)?;
                (u, with_full.then(f).transpose()?, None)
            }
            Stage::GateUp => {
                let (n2, full_n2) = both_n2()?;
                let f = full_n2.as_ref().map(matrix_from_tensor).transpose()?;
                let routing = Choices::new(norms, &n2, full_n2.as_ref(), false)?;
                (matrix_from_tensor(&n2)?, f, routing)
            }
            Stage::O | Stage::Down => {
                let routing = match stage == Stage::Down && norms.router().is_some() {
                    true => {
                        let (n2, full_n2) = both_n2()?;
                        Choices::new(norms, &n2, full_n2.as_ref(), true)?
                    }
                    false => None,
                };
                let (u, f) = match down {
                    Some(DownInputs { quantized, full }) => (matrix_from_tensor(&quantized)?, full),
                    None => {
                        let f = || gather_full(batch, piece, store, |f| &f.input);
                        let f = with_full.then(f).transpose()?;
                        (gather(batch, piece, store, |s| &s.input)?, f)
                    }
                };
                let f = f.filter(|_| with_full);
                (u, f.as_ref().map(matrix_from_tensor).transpose()?, routing)
            }
        };
        let stream_drift = (wanted.stream && with_full)
            .then(|| matrix_from_tensor(&stream_drift(batch, piece, store, stage)?))
            .transpose()?;
        let classes = batch.iter().map(|s| &s.classes[piece.rows(s)]);
        Ok(Self {
            u,
            f,
            stream_drift,
            classes: classes.collect::<Vec<_>>().concat(),
            routing,
        })
    }

    fn add_to(
        &self,
        summed: &mut Summed,
        group: &Shared,
        is_part: bool,
        weights: Option<Vec<f32>>,
    ) -> Result<()> {
        let statistics = match &mut summed.part {
            Some(part) if is_part => part,
            _ => &mut summed.statistics,
        };
        let mut count = |classes: &[TokenClass], weights: &Option<Vec<f32>>| {
            if let (Some(share), Some(weights)) = (&mut summed.weight_share, weights) {
                share.add(classes, weights);
            }
        };
        let f = self.f.as_ref().filter(|_| group.with_cross);
        match (&self.routing, group.expert()) {
            (Some(choices), Some(expert)) => {
                let tokens: Vec<_> = choices.quantized.of_expert(expert).collect();
                let of_token = |w: Vec<f32>| tokens.iter().map(|&(t, _)| w[t]).collect();
                let weights: Option<Vec<f32>> = weights.map(of_token);
                let classes: Vec<_> = tokens.iter().map(|&(t, _)| self.classes[t]).collect();
                count(&classes, &weights);
                let width = group.in_features();
                let u = choices.rows(&self.u, &tokens, width)?;
                let f = f
                    .map(|f| choices.full_rows(f, &u, &tokens, expert))
                    .transpose()?;
                statistics.add(group.name(), &u, f.as_ref(), weights.as_deref())
            }
            _ => {
                count(&self.classes, &weights);
                let stream = self.stream_drift.as_ref().filter(|_| group.with_stream);
                let at_output = group.at_output.as_ref().zip(f);
                let drift = at_output.map(|(w, f)| output_drift(w, &self.u, f, stream));
                let batch = Batch {
                    u: &self.u,
                    f: f.filter(|_| drift.is_none()),
                    output_drift: drift.as_ref().or(stream),
                    weights: weights.as_deref(),
                };
                statistics.add_batch(group.name(), &batch)
            }
        }
    }

    fn check_finite(&self, module: &str) -> Result<()> {
        let count = |m: &Matrix| m.count_not_finite();
        match count(&self.u) + self.f.as_ref().map_or(0, count) {
            0 => Ok(()),
            count => Err(Error::NotFinite {
                module: module.to_owned(),
                stage: "inputs of a mixture of experts".into(),
                count,
            }),
        }
    }
}

impl Choices {
    /// Of tokens n₂ in both streams; `None` where the MLP is one for all.
    fn new(
        norms: &DecoderLayer,
        n2: &Tensor,
        full_n2: Option<&Tensor>,
        has_parts: bool,
    ) -> Result<Option<Self>> {
        let Some(quantized) = norms.routing(n2)? else {
            return Ok(None);
        };
        let full = full_n2.map(|n2| norms.routing(n2)).transpose()?;
        Ok(Some(Self {
            quantized,
            full: full.flatten(),
            has_parts,
        }))
    }

    fn part<'a>(&self, row: &'a [f32], choice: usize, width: usize) -> &'a [f32] {
        match self.has_parts {
            true => &row[choice * width..][..width],
            false => row,
        }
    }

    /// An expert's rows in the quantized stream, `[n_tokens, width]`.
    fn rows(&self, u: &Matrix, tokens: &[(usize, usize)], width: usize) -> Result<Matrix> {
        let part = |&(token, choice): &(usize, usize)| self.part(u.row(token), choice, width);
        let values = tokens.iter().flat_map(part).copied().collect();
        Matrix::from_vec("inputs of an expert", tokens.len(), width, values)
    }

    /// The same tokens in the full-precision stream, `u` for those that it sends elsewhere.
    fn full_rows(
        &self,
        f: &Matrix,
        u: &Matrix,
        tokens: &[(usize, usize)],
        expert: usize,
    ) -> Result<Matrix> {
        let part = |(row, &(token, _)): (usize, &(usize, usize))| {
            let choice = self
                .full
                .as_ref()
                .and_then(|full| full.choice(token, expert));
            match choice {
                Some(choice) => self.part(f.row(token), choice, u.cols()),
                None => u.row(row),
            }
        };
        let values = tokens.iter().enumerate().flat_map(part).copied().collect();
        Matrix::from_vec("inputs of an expert", u.rows(), u.cols(), values)
    }
}

/// What the residual stream lacks before attention's or the MLP's output is added to it.
pub(super) fn stream_drift(
    batch: &[Sample],
    piece: &Piece,
    store: &Store,
    stage: Stage,
) -> Result<Tensor> {
    let u = gather_tensor(batch, piece, store, |s| &s.residual)?;
    let f = match stage {
        Stage::Qkv | Stage::O => gather_full(batch, piece, store, |f| &f.residual)?,
        Stage::GateUp | Stage::Down => gather_full(batch, piece, store, |f| &f.y)?,
    };
    Ok((f - u)?)
}

/// What an output lacks by the drift of its inputs, W (f − u), and by that of the residual stream.
fn output_drift(w: &Matrix, u: &Matrix, f: &Matrix, stream: Option<&Matrix>) -> Matrix {
    let mut difference = f.clone();
    let pairs = difference.data_mut().par_iter_mut().zip(u.data());
    pairs.for_each(|(f, u)| *f -= u);
    let mut drift = match stream {
        Some(stream) => stream.clone(),
        None => Matrix::zeros(u.rows(), w.rows()),
    };
    let (difference, w) = (difference.as_faer(), w.as_faer().transpose());
    let parallelism = Par::rayon(0);
    matmul(
        drift.as_faer_mut(),
        Accum::Add,
        difference,
        w,
        1.0,
        parallelism,
    );
    drift
}

pub(super) fn weights_of(batch: &[Sample], piece: &Piece, weights: &[Vec<f32>]) -> Vec<f32> {
    let rows = batch.iter().map(|s| &weights[s.index][piece.rows(s)]);
    rows.collect::<Vec<_>>().concat()
}

/// Says in which sample and token the inputs begin not to be finite.
fn name_sample(error: Error, batch: &[Sample], piece: &Piece, inputs: &Inputs) -> Error {
    let (u, f) = (&inputs.u, inputs.f.as_ref());
    let is_bad = |m: &Matrix, row: usize| m.row(row).iter().any(|v| !v.is_finite());
    let is_bad = |row: &usize| is_bad(u, *row) || f.is_some_and(|f| is_bad(f, *row));
    let tokens = batch
        .iter()
        .flat_map(|s| piece.rows(s).map(move |t| (s, t)));
    match (error, (0..u.rows()).find(is_bad)) {
        (
            Error::NotFinite {
                module,
                stage,
                count,
            },
            Some(row),
        ) => Error::NotFinite {
            module,
            stage: match tokens.into_iter().nth(row) {
                Some((sample, token)) => {
                    format!("{stage}, first in token {token} of {}", sample.origin)
                }
                None => stage,
            },
            count,
        },
        (error, _) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::experts::Router;
    use crate::model::projection::{Projection, Slot};
    use candle_core::Device;

    /// Three experts, each of which likes one channel; tokens go to the best two.
    fn routing(tokens: [[f32; 3]; 3]) -> Routing {
        let identity = Tensor::eye(3, candle_core::DType::F32, &Device::Cpu).unwrap();
        let router = Router::of(identity, 2);
        router
            .route(&Tensor::new(&tokens, &Device::Cpu).unwrap())
            .unwrap()
    }

    /// Tokens that U sends to experts (1, 0), (1, 2), (0, 2) and F to (0, 1), (1, 0), (0, 2).
    fn inputs(has_parts: bool, width: usize) -> Inputs {
        let quantized = routing([[1.0, 2.0, 0.0], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0]]);
        let full = routing([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [2.0, 0.0, 1.0]]);
        Inputs {
            u: Matrix::from_fn(3, width, |row, col| (10 * row + col) as f32),
            f: Some(Matrix::from_fn(3, width, |row, col| {
                (100 + 10 * row + col) as f32
            })),
            stream_drift: None,
            classes: vec![TokenClass::Vision, TokenClass::Answer, TokenClass::Vision],
            routing: Some(Choices {
                quantized,
                full: Some(full),
                has_parts,
            }),
        }
    }

    fn group(expert: usize, projection: Projection) -> Shared {
        let module = Module {
            layer_idx: 0,
            slot: Slot {
                projection,
                expert: Some(expert),
            },
            name: "m".into(),
            shape: [4, 2],
        };
        Shared {
            modules: vec![module],
            weights: None,
            with_cross: true,
            with_stream: false,
            at_output: None,
        }
    }

    fn summed(inputs: &Inputs, expert: usize, projection: Projection) -> Summed {
        let mut found = Summed {
            statistics: Statistics::new(2, true),
            part: None,
            weight_share: Some(WeightShare::default()),
        };
        let group = group(expert, projection);
        let weights = vec![1.0, 2.0, 3.0];
        inputs
            .add_to(&mut found, &group, false, Some(weights))
            .unwrap();
        found
    }

    fn added(inputs: &Inputs, expert: usize, projection: Projection) -> Statistics {
        summed(inputs, expert, projection).statistics
    }

    #[test]
    fn an_experts_share_is_of_the_tokens_that_are_sent_to_it() {
        let inputs = inputs(false, 2);
        let shares = |expert| {
            let share = summed(&inputs, expert, Projection::Gate).weight_share;
            share.unwrap().by_name().into_iter().collect::<Vec<_>>()
        };
        let of = |class: &str, share: f64| (class.to_owned(), share);
        assert_eq!(shares(0), [of("vision", 1.0)]);
        assert_eq!(
            shares(1),
            [of("answer", 2.0 / 3.0), of("vision", 1.0 / 3.0)]
        );
        assert_eq!(shares(2), [of("answer", 0.4), of("vision", 0.6)]);
    }

    fn expected(rows: &[([f32; 2], [f32; 2], f32)]) -> Statistics {
        let mut expected = Statistics::new(2, true);
        for (u, f, weight) in rows {
            let row = |v: &[f32; 2]| Matrix::from_vec("row", 1, 2, v.to_vec()).unwrap();
            expected
                .add("m", &row(u), Some(&row(f)), Some(&[*weight]))
                .unwrap();
        }
        expected
    }

    fn assert_close(a: &Statistics, b: &Statistics) {
        assert_eq!(a.n_tokens(), b.n_tokens());
        let pairs = |a: &Matrix, b: &Matrix| {
            let mut pairs = a.data().iter().zip(b.data());
            pairs.all(|(a, b)| (a - b).abs() <= 1e-3 * b.abs().max(1.0))
        };
        assert!(pairs(&a.hessian(), &b.hessian()));
        assert!(pairs(a.cross().unwrap(), b.cross().unwrap()));
    }

    #[test]
    fn an_expert_sees_the_tokens_that_are_sent_to_it() {
        // gate and up see whole rows. F sends the first two tokens to expert 1 as well.
        let inputs = inputs(false, 2);
        let rows = [
            ([0.0, 1.0], [100.0, 101.0], 1.0),
            ([10.0, 11.0], [110.0, 111.0], 2.0),
        ];
        assert_close(&added(&inputs, 1, Projection::Gate), &expected(&rows));
        // Of expert 2's tokens F sends the first elsewhere.
        let rows = [
            ([10.0, 11.0], [10.0, 11.0], 2.0),
            ([20.0, 21.0], [120.0, 121.0], 3.0),
        ];
        assert_close(&added(&inputs, 2, Projection::Up), &expected(&rows));
    }

    #[test]
    fn down_sees_its_part_of_each_token() {
        // Expert 0 is U's second choice for the first token, F's first.
        let inputs = inputs(true, 4);
        let rows = [
            ([2.0, 3.0], [100.0, 101.0], 1.0),
            ([20.0, 21.0], [120.0, 121.0], 3.0),
        ];
        assert_close(&added(&inputs, 0, Projection::Down), &expected(&rows));
    }
}
