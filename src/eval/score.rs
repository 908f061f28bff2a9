//! Right answers under a model, token by token.

use crate::eval::task::{EvalItem, groups, shared_prefix};
use crate::model::LoadedModel;
use crate::model::loaded::Continuation;
use crate::processor::ModelInput;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Log probabilities `[n_answer_tokens][vocab]` of the original, with which others are compared.
#[derive(Clone, Debug)]
pub struct Reference {
    log_probabilities: Vec<Vec<f32>>,
}

impl Divergence {
    /// The same over the tokens of several.
    pub fn total(parts: impl IntoIterator<Item = Self>) -> Self {
        parts.into_iter().fold(Self::default(), |a, b| Self {
            kl_sum: a.kl_sum + b.kl_sum,
            n_same_top: a.n_same_top + b.n_same_top,
            n_tokens: a.n_tokens + b.n_tokens,
        })
    }

    /// Mean KL per token, in nats.
    pub fn kl_per_token(&self) -> f64 {
        self.kl_sum / self.n_tokens.max(1) as f64
    }

    /// Share of tokens with the same most likely one, in percent.
    pub fn same_top_percent(&self) -> f64 {
        100.0 * self.n_same_top as f64 / self.n_tokens.max(1) as f64
    }
}

/// What a model makes of a right answer that is laid before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnswerScore {
    /// Whether every token of it, end included, is the most likely one: greedy decoding gives it.
    pub exact: bool,
    /// −log probability of the answer, in nats, summed over its tokens.
    pub negative_log_likelihood: f64,
    /// How far the model is from the original here.
    pub divergence: Option<Divergence>,
}

/// Distance from the original over the tokens of an answer or a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Σ KL(original ‖ model) over tokens, in nats.
    pub kl_sum: f64,
    /// Tokens where both find the same token most likely.
    pub n_same_top: usize,
    /// Tokens.
    pub n_tokens: usize,
}

/// Lays the first right answer of every question before the model, in order; with `references`,
/// compares. Returns the scores and the distributions, to serve as references themselves.
///
/// # Errors
/// The model's; [`Error::Missing`] for a question without a right answer; [`Error::NotFinite`] if
/// the model's logits are not numbers; [`Error::Shape`] if the references have other tokens.
pub fn score_answers(
    model: &LoadedModel,
    items: &[EvalItem],
    references: Option<&[Reference]>,
) -> Result<Vec<(AnswerScore, Reference)>> {
    let mut parts = Vec::new();
    let mut start = 0;
    for group in groups(items) {
        let own = references.and_then(|r| r.get(start..start + group.len()));
        parts.push((group, own));
        start += group.len();
    }
    let score = |(group, own): &(&[EvalItem], Option<&[Reference]>)| {
        let found = distributions(model, group)?;
        let pairs = group.iter().zip(found).enumerate();
        pairs
            .map(|(i, (item, found))| {
                let score = score_answer(item, &found, own.map(|references| &references[i]))?;
                Ok((score, found))
            })
            .collect::<Result<Vec<_>>>()
    };
    Ok(parts
        .par_iter()
        .map(score)
        .collect::<Result<Vec<_>>>()?
        .concat())
}

/// The model's distributions on the right answers of questions on the same images.
fn distributions(model: &LoadedModel, group: &[EvalItem]) -> Result<Vec<Reference>> {
    let prefix = shared_prefix(model, group)?;
    let inputs = group.iter().map(|item| continuation(model, item));
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let logits = model.logits_at(&prefix, &inputs)?;
    let pairs = group.iter().zip(logits);
    pairs
        .map(|(item, logits)| {
            let mut log_probabilities: Vec<Vec<f32>> = logits.to_vec2()?;
            log_probabilities
                .iter_mut()
                .try_for_each(|row| normalise(row, || format!("answer to {}", item.origin)))?;
            Ok(Reference { log_probabilities })
        })
        .collect()
}

fn continuation<'a>(model: &LoadedModel, item: &'a EvalItem) -> Result<Continuation<'a>> {
    let (input, start) = answered(item)?;
    Ok(Continuation {
        input,
        features: item.features(model)?,
        tokens: start - 1..input.input_ids.len() - 1,
    })
}

/// The prompt with its right answer, and where the answer begins.
fn answered(item: &EvalItem) -> Result<(&ModelInput, usize)> {
    let missing = || Error::Missing {
        what: "right answer".into(),
        place: item.origin.clone(),
    };
    let (input, start) = item.answered.as_ref().ok_or_else(missing)?;
    Ok((input, *start))
}

fn score_answer(
    item: &EvalItem,
    found: &Reference,
    reference: Option<&Reference>,
) -> Result<AnswerScore> {
    let (input, start) = answered(item)?;
    let expected = &input.input_ids[start..];
    let rows = || found.log_probabilities.iter().zip(expected);
    Ok(AnswerScore {
        exact: rows().all(|(row, id)| top(row) == *id as usize),
        negative_log_likelihood: -rows()
            .map(|(row, id)| f64::from(row[*id as usize]))
            .sum::<f64>(),
        divergence: reference.map(|r| divergence(r, found)).transpose()?,
    })
}

/// Logits to log probabilities, in place.
pub(super) fn normalise(row: &mut [f32], module: impl Fn() -> String) -> Result<()> {
    let count = row.iter().filter(|v| !v.is_finite()).count();
    if count > 0 {
        return Err(Error::NotFinite {
            module: module(),
            stage: "logits".into(),
            count,
        });
    }
    let highest = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let sum: f64 = row.iter().map(|v| f64::from(v - highest).exp()).sum();
    let shift = f64::from(highest) + sum.ln();
    row.iter_mut()
        .for_each(|v| *v = (f64::from(*v) - shift) as f32);
    Ok(())
}

pub(super) fn top(row: &[f32]) -> usize {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).fold(0, better)
}

/// KL(p ‖ q) of two rows of log probabilities, in nats.
pub(super) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p), f64::from(*q));
        p.exp() * (p - q)
    });
    // Rounding of two equal distributions may fall a hair below zero.
    terms.sum::<f64>().max(0.0)
}

fn divergence(reference: &Reference, found: &Reference) -> Result<Divergence> {
    let (p, q) = (&reference.log_probabilities, &found.log_probabilities);
    if p.len() != q.len() || p.iter().zip(q).any(|(p, q)| p.len() != q.len()) {
        return Err(Error::Shape {
            module: "reference distributions".into(),
            expected: vec![p.len()],
            found: vec![q.len()],
        });
    }
    Ok(Divergence {
        kl_sum: p.iter().zip(q).map(|(p, q)| kl(p, q)).sum(),
        n_same_top: p.iter().zip(q).filter(|(p, q)| top(p) == top(q)).count(),
        n_tokens: p.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(logits: &[f32]) -> Reference {
        let mut row = logits.to_vec();
        normalise(&mut row, || "test".into()).unwrap();
        Reference {
            log_probabilities: vec![row],
        }
    }

    #[test]
    fn divergence_of_known_distributions() {
        // p = (1/2, 1/2), q = (3/4, 1/4): KL = ln 2 − ½·ln 3.
        let (p, q) = (reference(&[0.0, 0.0]), reference(&[3f32.ln(), 0.0]));
        let d = divergence(&p, &q).unwrap();
        let expected = (4f64 / 3.0).ln() / 2.0;
        assert!((d.kl_sum - expected).abs() < 1e-6, "{}", d.kl_sum);
        assert_eq!((d.n_same_top, d.n_tokens), (1, 1));
        assert_eq!(divergence(&p, &p).unwrap().kl_sum, 0.0);
        assert!(divergence(&p, &reference(&[0.0; 3])).is_err());
    }

    #[test]
    fn numbers_only() {
        assert!(matches!(
            normalise(&mut [0.0, f32::NAN], || "x".into()),
            Err(Error::NotFinite { .. })
        ));
    }
}
