//! Importance by the loss at the end of the model: the cross-entropy of the answers under the
//! full-precision model, carried back through all its layers.
//!
//! L = −Σ log p(token), summed over the answer tokens of a sample (all tokens of raw text), never
//! averaged: a long answer counts as its tokens do. Unlike the local losses it does not vanish in
//! the first layer, it needs no quantized stream, and it gives weights for all seven linears.
//! With the norm `rms` and the power 2, ω_n = mean_c P² is the Fisher information of the token's
//! outputs without cross terms.
//!
//! Source: arXiv:2505.07004 (GuidedQuant), with one group of output channels; arXiv:2412.19509
//! (MBQ) takes the same gradients by modality. Differs: sums over tokens where they average.

use crate::calibration::{CalibrationSample, CalibrationSet};
use crate::distributed::Communicator;
use crate::importance::backward::{AttentionPass, LayerGradients};
use crate::importance::walk::{Layers, Sequence, Walk, answer_places, together};
use crate::importance::{
    ImportanceSettings, LayerImportance, ModalityRatios, SampleFactors, TokenNorm, gather_factors,
};
use crate::model::decoder::DecoderLayer;
use crate::model::{Head, ModelSource};
use crate::pipeline::Observer;
use crate::processor::{ModelInput, TokenClass};
use crate::{Error, Result};
use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;

/// Logits that are made at once: those of few tokens, since a vocabulary is large.
const LOGIT_ROWS: usize = 256;

/// A loss and its gradient with respect to what it was made of.
#[derive(Clone, Debug)]
pub struct Loss {
    /// In nats, summed over places.
    pub sum: f64,
    /// With respect to the last layer's output at the places, `[n_places, hidden]`.
    pub gradient: Tensor,
}

/// −Σ log p(target) and its gradient, from the last layer's output `x [n, hidden]` at the places
/// that predict `targets`.
///
/// # Errors
/// A tensor error if shapes disagree or a target is not in the vocabulary.
pub fn cross_entropy(head: &Head, x: &Tensor, targets: &[u32]) -> Result<Loss> {
    in_pieces(x, |rows, start| {
        let targets = &targets[start..start + rows.dim(0)?];
        let log_q = log_softmax(&head.logits(rows)?, D::Minus1)?;
        let at = Tensor::from_slice(targets, (targets.len(), 1), x.device())?;
        let said = log_q.gather(&at, 1)?;
        // ∂L/∂logits = softmax − one-hot.
        let minus = Tensor::full(-1f32, at.shape(), x.device())?;
        let d = log_q.exp()?.scatter_add(&at, &minus, 1)?;
        Ok((-sum(&said)?, head.backward(rows, &d)?))
    })
}

/// Calls `part` with some rows of `x` and where they begin, and puts losses and gradients together.
pub(crate) fn in_pieces(
    x: &Tensor,
    part: impl Fn(&Tensor, usize) -> Result<(f64, Tensor)>,
) -> Result<Loss> {
    let n = x.dim(0)?;
    let (mut total, mut gradients) = (0.0, Vec::new());
    for start in (0..n).step_by(LOGIT_ROWS) {
        let rows = x.narrow(0, start, LOGIT_ROWS.min(n - start))?;
        let (sum, gradient) = part(&rows, start)?;
        total += sum;
        gradients.push(gradient);
    }
    let gradient = match gradients.is_empty() {
        true => x.zeros_like()?,
        false => Tensor::cat(&gradients, 0)?,
    };
    Ok(Loss {
        sum: total,
        gradient,
    })
}

/// The sum of all values, in f64.
pub(crate) fn sum(x: &Tensor) -> Result<f64> {
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    Ok(values.iter().map(|&v| f64::from(v)).sum())
}

/// The rows of `x [n, hidden]` at some places.
///
/// # Errors
/// A tensor error if a place is outside.
pub fn rows_at(x: &Tensor, places: &[u32]) -> Result<Tensor> {
    let at = Tensor::from_slice(places, places.len(), x.device())?;
    Ok(x.index_select(&at, 0)?)
}

/// Zeros as `x [n, hidden]` with `rows [places, hidden]` at some places.
///
/// # Errors
/// A tensor error if a place is outside or shapes disagree.
pub fn spread(x: &Tensor, places: &[u32], rows: &Tensor) -> Result<Tensor> {
    let at = Tensor::from_slice(places, places.len(), x.device())?;
    Ok(x.zeros_like()?.index_add(&at, rows, 0)?)
}

/// The cross-entropy of a sequence's answer, and its gradient with respect to the last layer's
/// output `x [n, hidden]` at all places.
///
/// # Errors
/// A tensor error if shapes disagree.
pub fn answer_loss(head: &Head, x: &Tensor, input_ids: &[u32], places: &[u32]) -> Result<Loss> {
    if places.is_empty() {
        return Ok(Loss {
            sum: 0.0,
            gradient: x.zeros_like()?,
        });
    }
    let targets: Vec<u32> = places.iter().map(|&p| input_ids[p as usize + 1]).collect();
    let loss = cross_entropy(head, &rows_at(x, places)?, &targets)?;
    Ok(Loss {
        sum: loss.sum,
        gradient: spread(x, places, &loss.gradient)?,
    })
}

/// The cross-entropy of one sequence's answer under `layers`, and its gradients in every layer.
///
/// # Errors
/// Those of `layers`; a tensor error if shapes disagree.
pub fn answer_gradients(
    layers: &dyn Layers,
    head: &Head,
    sequence: Sequence,
    input: &ModelInput,
) -> Result<(f64, Vec<LayerGradients>)> {
    let sequences = [sequence];
    let walk = Walk::forward(layers, &sequences)?;
    let places = answer_places(&input.classes);
    let loss = answer_loss(head, &walk.outputs[0], &input.input_ids, &places)?;
    let layers = walk.backward(vec![loss.gradient], |_, _, own| Ok(own.clone()))?;
    Ok((loss.sum, layers.into_iter().flatten().collect()))
}

/// The factors of all layers from one way there and back through the full-precision model.
///
/// # Errors
/// The model's; [`Error::Invalid`] if no sample has a token that the model is to say;
/// [`Error::NotFinite`] if the loss is no number; [`Error::Interrupted`] if the observer says so.
/// Source: arXiv:2505.07004 §3; Fisher information of the outputs.
pub fn importance(
    model: &ModelSource,
    set: &CalibrationSet,
    settings: ImportanceSettings,
    communicator: &dyn Communicator,
    observer: &dyn Observer,
) -> Result<Vec<LayerImportance>> {
    let see = |_: &(), sample: &CalibrationSample, _: &AttentionPass, own: &LayerGradients| {
        SampleFactors::of_gradients(settings.norm, &sample.classes, own)
    };
    let all = set.samples.len();
    let among = (communicator, observer);
    let layers = carried_back(model, set, all, among, |_, _| Ok(()), see)?;
    let layers = layers.into_iter().map(|own| {
        let indices = set.samples.iter().map(|sample| sample.index);
        let all = gather_factors(indices.zip(own).collect(), communicator)?;
        LayerImportance::new(settings, all)
    });
    layers.collect()
}

/// How much an error in a vision token counts beside one in an answer token, in each layer: of each
/// sample the mean |∂L/∂(output of o, of down)| over its vision tokens and over its answer tokens,
/// the means of these over samples, their ratio; none below the median of all layers. Raw text is
/// answer throughout. A sample without such tokens has no part in their mean.
///
/// # Errors
/// As [`importance`]; [`Error::Invalid`] if the gradients of all answer tokens are zero and those of
/// vision tokens are not.
/// Source: MBQ, arXiv:2412.19509 §4.2; thu-nics/MBQ@a4d460d. Differs: a layer in which no token has
/// a gradient gets the median.
pub fn modality_ratios(
    model: &ModelSource,
    set: &CalibrationSet,
    communicator: &dyn Communicator,
    observer: &dyn Observer,
) -> Result<ModalityRatios> {
    let see = |_: &(), sample: &CalibrationSample, _: &AttentionPass, own: &LayerGradients| {
        let means = |gradient: &Tensor| -> Result<[Option<f64>; 2]> {
            let g = TokenNorm::MeanAbs.per_token(gradient)?;
            let mean = |is_one: fn(&TokenClass) -> bool| {
                let some = g.iter().zip(&sample.classes).filter(|(_, c)| is_one(c));
                let (n, sum) = some.fold((0, 0.0), |(n, sum), (g, _)| (n + 1, sum + f64::from(*g)));
                (n > 0).then(|| sum / f64::from(n))
            };
            Ok([
                mean(|class| *class == TokenClass::Vision),
                mean(|class| matches!(class, TokenClass::Answer | TokenClass::Text)),
            ])
        };
        Ok([means(&own.attention.o)?, means(&own.mlp.down)?])
    };
    let all = set.samples.len();
    let among = (communicator, observer);
    let layers = carried_back(model, set, all, among, |_, _| Ok(()), see)?;
    let indices = set.samples.iter().map(|sample| sample.index);
    let own: Vec<(usize, Vec<_>)> = indices
        .enumerate()
        .map(|(i, index)| (index, layers.iter().map(|layer| layer[i]).collect()))
        .collect();
    let mut samples = communicator.all_gather_value(&own)?.concat();
    samples.sort_by_key(|(index, _)| *index);
    let layers = (0..layers.len()).map(|layer| samples.iter().map(move |(_, own)| own[layer]));
    let layers: Vec<Vec<[[Option<f64>; 2]; 2]>> = layers.map(Iterator::collect).collect();
    let ratios = |place: usize| {
        let layers = layers.iter();
        layers.map(move |samples| ratio(samples.iter().map(|sample| sample[place])))
    };
    ModalityRatios::floored(ratios(0).collect(), ratios(1).collect())
}

/// Mean of the first over mean of the second, of what there is; nothing is 0 of whatever.
fn ratio(samples: impl Iterator<Item = [Option<f64>; 2]>) -> f64 {
    let mut totals = [(0.0, 0.0); 2];
    for sample in samples {
        for ((sum, n), value) in totals.iter_mut().zip(sample) {
            *sum += value.unwrap_or(0.0);
            *n += f64::from(u8::from(value.is_some()));
        }
    }
    let [vision, answer] = totals.map(|(sum, n): (f64, f64)| sum / n.max(1.0));
    match vision == 0.0 {
        true => 0.0,
        false => vision / answer,
    }
}

/// What `see` makes of the gradients of each of the first `n_samples` of this rank, by layer, then by
/// sample; it is also shown what `begin` makes of the layer.
pub(crate) fn carried_back<L: Sync, T: Send>(
    model: &ModelSource,
    set: &CalibrationSet,
    n_samples: usize,
    (communicator, observer): (&dyn Communicator, &dyn Observer),
    begin: impl Fn(usize, &DecoderLayer) -> Result<L>,
    see: impl Fn(&L, &CalibrationSample, &AttentionPass, &LayerGradients) -> Result<T> + Sync,
) -> Result<Vec<Vec<T>>> {
    let head = model.load_head()?;
    let samples = &set.samples[..n_samples.min(set.samples.len())];
    let n_tokens: Vec<usize> = samples.iter().map(|s| s.classes.len()).collect();
    let mut layers: Vec<Vec<T>> = Vec::new();
    layers.resize_with(model.decoder().n_layers, Vec::new);
    let (mut total, mut n_places) = (0.0, 0);
    for run in together(model.decoder(), &n_tokens) {
        if observer.is_cancelled() {
            return Err(Error::Interrupted);
        }
        let samples = &samples[run];
        let sequences = samples.iter().map(|sample| Sequence::read(set, sample));
        let sequences = sequences.collect::<Result<Vec<_>>>()?;
        let walk = Walk::forward(model, &sequences)?;
        let mut gradients = Vec::new();
        for (sample, x) in samples.iter().zip(&walk.outputs) {
            let places = answer_places(&sample.classes);
            let loss = answer_loss(&head, x, &sample.input_ids, &places)?;
            (total, n_places) = (total + loss.sum, n_places + places.len());
            gradients.push(loss.gradient);
        }
        let seen = walk.backward_with(gradients, &begin, |layer, [_, index], pass, own| {
            see(layer, &samples[index], pass, own)
        })?;
        for (all, own) in layers.iter_mut().zip(seen) {
            all.extend(own);
        }
    }
    let all = communicator.all_gather_value(&(total.to_bits(), n_places))?;
    let total = all.iter().map(|(total, _)| f64::from_bits(*total)).sum();
    check(total, all.iter().map(|(_, n)| n).sum())?;
    Ok(layers)
}

/// There is a loss, and it is a number.
fn check(total: f64, n_places: usize) -> Result<()> {
    if n_places == 0 {
        return Err(Error::Invalid {
            what: "calibration".into(),
            why: "the loss of answers needs samples with answers, or raw text".into(),
        });
    }
    match total.is_finite() {
        true => Ok(()),
        false => Err(Error::NotFinite {
            module: "head".into(),
            stage: "loss of the answers".into(),
            count: 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_means_over_samples_that_have_such_tokens() {
        let both = [Some(1.0), Some(4.0)];
        let no_image = [None, Some(2.0)];
        assert_eq!(ratio([both, no_image].into_iter()), 1.0 / 3.0);
        assert_eq!(ratio([no_image].into_iter()), 0.0);
        assert_eq!(ratio([[Some(0.0), Some(0.0)]].into_iter()), 0.0);
        assert!(ratio([[Some(1.0), Some(0.0)]].into_iter()).is_infinite());
    }
}
