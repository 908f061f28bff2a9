//! What the linears of a stage see, summed up on a GPU: inputs are made there and stay there.
//!
//! Samples are taken in the same portions and order as on the CPU. A mixture's are not: an engine
//! on a GPU refuses it.

use super::down_inputs::DownInputs;
use super::inputs::{
    Shared, Summed, Summing, WeightShare, portions, stream_drift, weights_of, with_pieces,
};
use super::stage::Stage;
use super::streams::{BothLayers, FullStream, Piece, Sample, Streams, gather_full, gather_tensor};
use crate::engine::OneGpu;
use crate::gpu::{Sums, TensorBatch};
use crate::hidden_states::{HiddenState, Store};
use crate::model::decoder::DecoderLayer;
use crate::model::linear::tensor_from_matrix;
use crate::{Error, Result};
use candle_core::Tensor;

/// What linears that share their inputs see, on the way.
struct Growing<'a> {
    group: &'a Shared,
    rest: Sums,
    part: Option<Sums>,
    weight_share: Option<WeightShare>,
    /// As [`Shared::at_output`].
    at_output: Option<Tensor>,
}

/// As on the CPU, by token.
struct Inputs {
    u: Tensor,
    f: Option<Tensor>,
    stream_drift: Option<Tensor>,
}

impl Streams<'_> {
    /// As [`Streams::sum`], on this GPU.
    pub(super) fn sum_on(
        &self,
        gpu: &OneGpu,
        batches: &[Vec<Sample>],
        (stage, layers): (Stage, BothLayers<'_>),
        shared: &[Shared],
        summing: Summing,
    ) -> Result<Vec<Summed>> {
        let growing = shared.iter();
        let growing = growing.map(|group| Growing::new(gpu, group, summing, &self.store));
        let mut growing: Vec<Growing<'_>> = growing.collect::<Result<_>>()?;
        let with_full = shared.iter().any(|group| group.with_cross);
        let with_stream = shared.iter().any(|group| group.with_stream);
        for (batch, piece) in with_pieces(batches) {
            let down = self.down_inputs(batch, &piece, (stage, layers))?;
            for portion in portions(batch, &piece, summing.with_part) {
                let samples = portion.samples;
                let wanted = ([with_full, with_stream], portion.of(down.as_ref())?);
                let stage = (stage, layers.full);
                let inputs = Inputs::new(samples, &piece, &self.store, stage, wanted)?;
                for group in &mut growing {
                    let added = group.add(samples, &piece, &inputs, portion.is_part);
                    added.map_err(|error| name_samples(error, samples))?;
                }
            }
        }
        growing.into_iter().map(Growing::finish).collect()
    }
}

impl Inputs {
    fn new(
        batch: &[Sample],
        piece: &Piece,
        store: &Store,
        (stage, norms): (Stage, &DecoderLayer),
        ([with_full, with_stream], down): ([bool; 2], Option<DownInputs>),
    ) -> Result<Self> {
        let with_full = with_full && batch[0].full.is_some();
        let of_u = || gather_tensor(batch, piece, store, |s| &s.residual);
        let of_f = |state: fn(&FullStream) -> &HiddenState| {
            let state = || gather_full(batch, piece, store, state);
            with_full.then(state).transpose()
        };
        let norm = |x: Option<Tensor>, norm: &dyn Fn(&Tensor) -> Result<Tensor>| {
            x.as_ref().map(norm).transpose()
        };
        let (u, f) = match stage {
            Stage::Qkv => {
                let f = norm(of_f(|f| &f.residual)?, &|x| norms.qkv_input(x))?;
                (norms.qkv_input(&of_u()?)?, f)
            }
            Stage::GateUp => {
                let f = norm(of_f(|f| &f.y)?, &|y| norms.gate_up_input(y))?;
                (norms.gate_up_input(&of_u()?)?, f)
            }
            Stage::O | Stage::Down => match down {
                Some(DownInputs { quantized, full }) => (quantized, full.filter(|_| with_full)),
                None => {
                    let u = gather_tensor(batch, piece, store, |s| &s.input)?;
                    (u, of_f(|f| &f.input)?)
                }
            },
        };
        let stream_drift = (with_stream && with_full)
            .then(|| stream_drift(batch, piece, store, stage))
            .transpose()?;
        Ok(Self { u, f, stream_drift })
    }
}

impl<'a> Growing<'a> {
    fn new(gpu: &OneGpu, group: &'a Shared, summing: Summing, store: &Store) -> Result<Self> {
        let sums = || Sums::new(&gpu.gpu, group.kept(summing));
        let with_part = summing.with_part && group.with_cross;
        let w = group.at_output.clone();
        Ok(Self {
            rest: sums()?,
            part: with_part.then(sums).transpose()?,
            weight_share: group.weights.as_ref().map(|_| WeightShare::default()),
            at_output: w
                .map(|w| tensor_from_matrix(w, store.device()))
                .transpose()?,
            group,
        })
    }

    fn add(
        &mut self,
        samples: &[Sample],
        piece: &Piece,
        inputs: &Inputs,
        is_part: bool,
    ) -> Result<()> {
        let weights = self.group.weights.as_ref();
        let weights = weights.map(|weights| weights_of(samples, piece, weights));
        if let (Some(share), Some(weights)) = (&mut self.weight_share, &weights) {
            let classes = samples.iter().map(|s| &s.classes[piece.rows(s)]);
            share.add(&classes.collect::<Vec<_>>().concat(), weights);
        }
        let f = inputs.f.as_ref().filter(|_| self.group.with_cross);
        let stream = inputs.stream_drift.as_ref();
        let stream = stream.filter(|_| self.group.with_stream);
        let drift = match self.at_output.as_ref().zip(f) {
            Some((w, f)) => {
                let drift = (f - &inputs.u)?.matmul(&w.t()?)?;
                Some(match stream {
                    Some(stream) => (drift + stream)?,
                    None => drift,
                })
            }
            None => None,
        };
        let batch = TensorBatch {
            u: &inputs.u,
            f: f.filter(|_| drift.is_none()),
            output_drift: drift.as_ref().or(stream),
            weights: weights.as_deref(),
        };
        let sums = match &mut self.part {
            Some(part) if is_part => part,
            _ => &mut self.rest,
        };
        sums.add(self.group.name(), &batch)
    }

    fn finish(self) -> Result<Summed> {
        let module = self.group.name();
        let part = self.part.map(|part| part.finish(module)).transpose()?;
        Ok(Summed {
            statistics: self.rest.finish(module)?,
            part,
            weight_share: self.weight_share,
        })
    }
}

/// Says in which samples inputs are not finite; which token it is would have to be looked for.
fn name_samples(error: Error, samples: &[Sample]) -> Error {
    match (error, samples) {
        (
            Error::NotFinite {
                module,
                stage,
                count,
            },
            [first, rest @ ..],
        ) => Error::NotFinite {
            module,
            stage: match rest.last() {
                Some(last) => format!("{stage}, in {} to {}", first.origin, last.origin),
                None => format!("{stage}, in {}", first.origin),
            },
            count,
        },
        (error, _) => error,
    }
}
