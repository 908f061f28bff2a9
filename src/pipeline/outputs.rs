//! What the linears of a stage read, and what becomes of the output of their half of the layer when
//! their weights change: all from the full-precision stream, where it stands in the layer.
//!
//! An error of the output is made from the errors before the last linear, which is a product with
//! that linear's weight: no output is ever subtracted from another. The half's output is judged
//! before its norm, where the architecture has one.

use super::stage::Stage;
use super::streams::{Piece, Sample, Streams, gather_tensor, pieces_of};
use crate::distributed::message::{Message, Received};
use crate::hidden_states::Store;
use crate::model::decoder::DecoderLayer;
use crate::model::linear::matrix_from_tensor;
use crate::model::projection::Projection;
use crate::processor::TokenClass;
use crate::{Matrix, Result};
use candle_core::Tensor;
use rayon::prelude::*;

/// Tokens that limits of weights are searched on, or up to twice as many: each n-th of all.
const SAMPLED_TOKENS: usize = 512;

/// How errors of an output are summed up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum OutputLoss {
    /// The mean square over tokens and channels.
    MeanSquare,
    /// Absolute errors of answer tokens and `vision` times those of vision tokens, divided by the
    /// number of both; raw text is answer throughout, other tokens have no part in it.
    Modality { vision: f64 },
}

/// A sum of errors, and how many there were.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Total {
    sum: f64,
    count: usize,
}

impl Total {
    fn add(self, other: Self) -> Self {
        Self {
            sum: self.sum + other.sum,
            count: self.count + other.count,
        }
    }
}

impl OutputLoss {
    /// What a token's errors count, in the unit of [`OutputLoss::measure`].
    fn weight(self, class: TokenClass) -> Option<f64> {
        match (self, class) {
            (Self::MeanSquare, _) => Some(1.0),
            (Self::Modality { .. }, TokenClass::Answer | TokenClass::Text) => Some(1.0),
            (Self::Modality { vision }, TokenClass::Vision) => Some(vision),
            (Self::Modality { .. }, TokenClass::Prompt | TokenClass::Special) => None,
        }
    }

    fn measure(self, error: f32) -> f64 {
        match self {
            Self::MeanSquare => f64::from(error).powi(2),
            Self::Modality { .. } => f64::from(error).abs(),
        }
    }

    /// Of the errors `[n, channels]` of tokens of these classes.
    fn total<'a>(
        self,
        errors: &Tensor,
        classes: impl Iterator<Item = &'a TokenClass>,
    ) -> Result<Total> {
        let errors = matrix_from_tensor(errors)?;
        let mut total = Total::default();
        for (row, class) in classes.enumerate() {
            if let Some(weight) = self.weight(*class) {
                let sum: f64 = errors.row(row).iter().map(|e| self.measure(*e)).sum();
                total.sum += weight * sum;
                total.count += errors.cols();
            }
        }
        Ok(total)
    }
}

impl Streams<'_> {
    /// Mean |x| of each input channel of a stage over all tokens, `[in]`.
    pub(super) fn mean_abs(&self, stage: Stage, layer: &DecoderLayer) -> Result<Vec<f64>> {
        let store = &self.store;
        let batches = self.batches.par_iter().map(|batch| {
            let mut sums: Vec<f64> = Vec::new();
            let mut n_tokens = 0;
            for piece in pieces_of(batch) {
                let inputs = inputs(batch, &piece, store, stage, layer)?;
                sums.resize(inputs.cols(), 0.0);
                n_tokens += inputs.rows();
                for row in 0..inputs.rows() {
                    let pairs = sums.iter_mut().zip(inputs.row(row));
                    pairs.for_each(|(sum, x)| *sum += f64::from(x.abs()));
                }
            }
            Ok((sums, n_tokens))
        });
        let batches: Vec<(Vec<f64>, usize)> = batches.collect::<Result<_>>()?;
        let batches = self.gather_sums(batches)?;
        let mut mean = vec![0.0; batches.first().map_or(0, |(sums, _)| sums.len())];
        let n_tokens: usize = batches.iter().map(|(_, n)| n).sum();
        for (sums, _) in &batches {
            mean.iter_mut().zip(sums).for_each(|(all, sum)| *all += sum);
        }
        mean.iter_mut()
            .for_each(|sum| *sum /= n_tokens.max(1) as f64);
        Ok(mean)
    }

    /// The inputs of a stage for about [`SAMPLED_TOKENS`] tokens, evenly spaced, or for all if
    /// there are fewer; `[n_tokens, in]`.
    pub(super) fn sampled_inputs(
        &self,
        stage: Stage,
        layer: &DecoderLayer,
        width: usize,
    ) -> Result<Matrix> {
        let lengths = self.shards.n_tokens();
        let stride = (lengths.iter().sum::<usize>() / SAMPLED_TOKENS).max(1);
        let mut batches = Vec::new();
        for batch in &self.batches {
            let first = batch.first().map_or(0, |sample| sample.index);
            let mut token: usize = lengths[..first].iter().sum();
            let mut values = Vec::new();
            for piece in pieces_of(batch) {
                let inputs = inputs(batch, &piece, &self.store, stage, layer)?;
                for row in 0..inputs.rows() {
                    if token.is_multiple_of(stride) {
                        values.extend_from_slice(inputs.row(row));
                    }
                    token += 1;
                }
            }
            batches.push(values);
        }
        let values = self.gather_rows(batches)?;
        Matrix::from_vec("sampled inputs", values.len() / width.max(1), width, values)
    }

    /// What every rank has of its batches, in the order of all batches: `own` by batch, and what is
    /// told of each with its numbers.
    fn gather<T>(
        &self,
        own: Vec<T>,
        put: impl Fn(&mut Message, &T),
        n_values: impl Fn(&T) -> usize,
        take: impl Fn(&mut Received<'_>, usize) -> Result<T>,
    ) -> Result<Vec<T>> {
        if self.communicator.is_alone() {
            return Ok(own);
        }
        let firsts = self.batches.iter().flat_map(|batch| batch.first());
        let firsts = firsts.map(|sample| sample.index);
        let headers: Vec<(usize, usize)> = firsts.zip(own.iter().map(n_values)).collect();
        let mut message = Message::new(&headers);
        own.iter().for_each(|one| put(&mut message, one));
        let received = self.communicator.all_gather(message.into_bytes())?;
        let mut all = Vec::new();
        for (rank, bytes) in received.iter().enumerate() {
            let (headers, mut rest): (Vec<(usize, usize)>, _) = Received::open(rank, bytes)?;
            for (first, n_values) in headers {
                all.push((first, take(&mut rest, n_values)?));
            }
            rest.end()?;
        }
        all.sort_by_key(|(first, _)| *first);
        Ok(all.into_iter().map(|(_, one)| one).collect())
    }

    fn gather_sums(&self, own: Vec<(Vec<f64>, usize)>) -> Result<Vec<(Vec<f64>, usize)>> {
        let put = |message: &mut Message, (sums, n): &(Vec<f64>, usize)| {
            message.bytes(&(*n as u64).to_le_bytes());
            message.f64s(sums);
        };
        let take = |rest: &mut Received<'_>, n_values: usize| {
            let n = rest.bytes(size_of::<u64>())?;
            let n = u64::from_le_bytes(n.try_into().expect("as many bytes as asked for"));
            Ok((rest.f64s(n_values)?, n as usize))
        };
        self.gather(own, put, |(sums, _)| sums.len(), take)
    }

    fn gather_rows(&self, own: Vec<Vec<f32>>) -> Result<Vec<f32>> {
        let put = |message: &mut Message, rows: &Vec<f32>| message.f32s(rows);
        let take = |rest: &mut Received<'_>, n_values: usize| rest.f32s(n_values);
        Ok(self.gather(own, put, Vec::len, take)?.concat())
    }

    /// What the output of a half of `layer` loses when a stage's linears are those of `changed`;
    /// the half's states are those of `layer`, at its last linear.
    pub(super) fn output_loss(
        &self,
        stage: Stage,
        layer: &DecoderLayer,
        changed: &DecoderLayer,
        loss: OutputLoss,
    ) -> Result<f64> {
        let store = &self.store;
        let batches = self.batches.par_iter().map(|batch| {
            let mut total = Total::default();
            if stage == Stage::Qkv {
                for sample in batch {
                    let errors = attention_errors(sample, store, layer, changed)?;
                    total = total.add(loss.total(&errors, sample.classes.iter())?);
                }
                return Ok(total);
            }
            for piece in pieces_of(batch) {
                let errors = token_errors(batch, &piece, store, stage, (layer, changed))?;
                let classes = batch.iter().flat_map(|s| &s.classes[piece.rows(s)]);
                total = total.add(loss.total(&errors, classes)?);
            }
            Ok(total)
        });
        let batches: Vec<Total> = batches.collect::<Result<_>>()?;
        let put =
            |message: &mut Message, total: &Total| message.f64s(&[total.sum, total.count as f64]);
        let take = |rest: &mut Received<'_>, _| {
            let values = rest.f64s(2)?;
            Ok(Total {
                sum: values[0],
                count: values[1] as usize,
            })
        };
        let batches = self.gather(batches, put, |_| 2, take)?;
        let total = batches.into_iter().fold(Total::default(), Total::add);
        Ok(total.sum / total.count.max(1) as f64)
    }
}

/// The inputs of a stage for the tokens of a piece.
fn inputs(
    batch: &[Sample],
    piece: &Piece,
    store: &Store,
    stage: Stage,
    layer: &DecoderLayer,
) -> Result<Matrix> {
    let residual = || gather_tensor(batch, piece, store, |s| &s.residual);
    match stage {
        Stage::Qkv => matrix_from_tensor(&layer.qkv_input(&residual()?)?),
        Stage::GateUp => matrix_from_tensor(&layer.gate_up_input(&residual()?)?),
        Stage::O | Stage::Down => {
            matrix_from_tensor(&gather_tensor(batch, piece, store, |s| &s.input)?)
        }
    }
}

/// Errors of a sample's attention output with other q, k and v, `[n, hidden]`.
fn attention_errors(
    sample: &Sample,
    store: &Store,
    layer: &DecoderLayer,
    changed: &DecoderLayer,
) -> Result<Tensor> {
    let n1 = layer.qkv_input(&sample.residual.all(store)?)?;
    let heads = changed.attention(&n1, &sample.context)?.output;
    let difference = (heads - sample.input.all(store)?)?;
    layer.linear(Projection::O)?.without_bias(&difference)
}

/// Errors of the outputs of tokens with other linears of o, of gate and up, or of down,
/// `[n, hidden]`.
fn token_errors(
    batch: &[Sample],
    piece: &Piece,
    store: &Store,
    stage: Stage,
    (layer, changed): (&DecoderLayer, &DecoderLayer),
) -> Result<Tensor> {
    let input = gather_tensor(batch, piece, store, |s| &s.input)?;
    let weight = |layer: &DecoderLayer, projection: Projection| -> Result<Tensor> {
        layer.linear(projection)?.weight_f32()
    };
    if stage == Stage::GateUp {
        let y = gather_tensor(batch, piece, store, |s| &s.residual)?;
        let h = changed.down_input(&layer.gate_up_input(&y)?)?;
        return layer.linear(Projection::Down)?.without_bias(&(h - input)?);
    }
    let projection = match stage {
        Stage::O | Stage::Qkv => Projection::O,
        Stage::GateUp | Stage::Down => Projection::Down,
    };
    let difference = (weight(changed, projection)? - weight(layer, projection)?)?;
    Ok(input.matmul(&difference.t()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn losses_follow_their_definitions() {
        use TokenClass::{Answer, Prompt, Special, Text, Vision};
        let errors = [
            [1.0f32, -2.0],
            [3.0, 0.0],
            [0.5, 0.5],
            [-4.0, 1.0],
            [9.0, 9.0],
        ];
        let errors = Tensor::new(&errors, &Device::Cpu).unwrap();
        let total = |loss: OutputLoss, classes: [TokenClass; 5]| {
            let total = loss.total(&errors, classes.iter()).unwrap();
            (total.sum, total.count)
        };
        let classes = [Vision, Vision, Answer, Text, Prompt];
        let squares = 1.0 + 4.0 + 9.0 + 0.5 + 16.0 + 1.0 + 162.0;
        assert_eq!(total(OutputLoss::MeanSquare, classes), (squares, 10));
        // Vision tokens err by 3 and 3, the answer by 1, the text by 5; the prompt does not count.
        let loss = OutputLoss::Modality { vision: 0.25 };
        assert_eq!(total(loss, classes), (0.25 * 6.0 + 1.0 + 5.0, 8));
        let classes = [Special, Prompt, Special, Vision, Prompt];
        assert_eq!(total(loss, classes), (0.25 * 5.0, 2));
    }
}
