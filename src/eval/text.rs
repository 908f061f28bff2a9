//! Texts under a model, token by token: how well it predicts them, and how far it is from the
//! original.
//!
//! A text is read in pieces (see [`Processor::encode_pieces`]): every token but the first is
//! predicted once, from at most `max_tokens - 1` tokens before it. Of the original only the last
//! layer's output is kept; its logits are made anew, since those of a long text take gigabytes.

use crate::dataset::Text;
use crate::eval::score::{Divergence, kl, normalise, top};
use crate::model::LoadedModel;
use crate::model::head::Head;
use crate::processor::{ModelInput, Processor};
use crate::{Error, Result};
use candle_core::Tensor;
use rayon::prelude::*;
use serde::Serialize;

/// Tokens whose logits are in memory at once, of each model and thread.
const BLOCK: usize = 64;

/// One text, in pieces.
pub struct TextItem {
    /// Id in the file.
    pub id: String,
    /// File and row, for messages.
    pub origin: String,
    /// What the model reads; all tokens of a piece but its first are to be predicted.
    pub pieces: Vec<ModelInput>,
}

/// What a model makes of a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextScore {
    /// Id in the file.
    pub id: String,
    /// Tokens that were predicted: all but the first.
    pub n_tokens: usize,
    /// −log probability of them, in nats, summed.
    pub negative_log_likelihood: f64,
    /// How far the model is from the original here.
    pub divergence: Option<Divergence>,
}

/// What the original makes of texts.
pub struct TextReference {
    head: Head,
    /// Its last layer's output `[n_tokens, hidden]`, text by text and piece by piece.
    states: Vec<Vec<Tensor>>,
}

impl TextItem {
    /// A text of a file, in pieces of at most `max_tokens`.
    ///
    /// # Errors
    /// As [`Processor::encode_pieces`]; [`Error::Invalid`] for a text of one token.
    pub fn new(text: &Text, processor: &Processor, max_tokens: usize) -> Result<Self> {
        let pieces = processor.encode_pieces(&text.text, &text.origin, max_tokens)?;
        if pieces.iter().all(|piece| piece.input_ids.len() < 2) {
            return Err(Error::Invalid {
                what: text.origin.clone(),
                why: "a text of one token, which leaves none to be predicted".into(),
            });
        }
        Ok(Self {
            id: text.id.clone(),
            origin: text.origin.clone(),
            pieces,
        })
    }

    /// The last layer's output of each piece.
    fn states(&self, model: &LoadedModel) -> Result<Vec<Tensor>> {
        self.pieces.iter().map(|p| model.text_states(p)).collect()
    }
}

impl TextReference {
    /// Has the original read all texts.
    ///
    /// # Errors
    /// The model's.
    pub fn read(model: &LoadedModel, texts: &[TextItem]) -> Result<Self> {
        let states = texts.par_iter().map(|text| text.states(model));
        Ok(Self {
            head: model.head().clone(),
            states: states.collect::<Result<_>>()?,
        })
    }

    /// The original's own scores of the texts that it has read.
    ///
    /// # Errors
    /// As [`score_texts`].
    pub fn scores(&self, texts: &[TextItem]) -> Result<Vec<TextScore>> {
        let pairs = texts.par_iter().zip(&self.states);
        pairs
            .map(|(text, states)| score(text, (&self.head, states), None))
            .collect()
    }
}

/// Perplexity over the tokens of all texts: exp of the mean −log probability.
pub fn perplexity(scores: &[TextScore]) -> f64 {
    let sum: f64 = scores.iter().map(|s| s.negative_log_likelihood).sum();
    let n: usize = scores.iter().map(|s| s.n_tokens).sum();
    (sum / n.max(1) as f64).exp()
}

/// Lays every text before the model, in order; with a reference, compares. `on_text` hears of each
/// one that is done, and ends the work by an error.
///
/// # Errors
/// The model's; [`Error::NotFinite`] if the logits of either model are not numbers;
/// [`Error::Shape`] if the reference has read other texts, or has another vocabulary.
pub fn score_texts(
    model: &LoadedModel,
    texts: &[TextItem],
    reference: Option<&TextReference>,
    on_text: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Vec<TextScore>> {
    if let Some(other) = reference.filter(|r| r.states.len() != texts.len()) {
        return Err(shape("reference texts", texts.len(), other.states.len()));
    }
    let one = |(i, text): (usize, &TextItem)| {
        let own = text.states(model)?;
        let original = reference.map(|r| (&r.head, r.states[i].as_slice()));
        let score = score(text, (model.head(), &own), original)?;
        on_text()?;
        Ok(score)
    };
    texts.par_iter().enumerate().map(one).collect()
}

/// A head and the states of a text's pieces that it is put on.
type Read<'a> = (&'a Head, &'a [Tensor]);

fn score(text: &TextItem, own: Read, original: Option<Read>) -> Result<TextScore> {
    let mut score = TextScore {
        id: text.id.clone(),
        n_tokens: 0,
        negative_log_likelihood: 0.0,
        divergence: original.map(|_| Divergence::default()),
    };
    for (i, piece) in text.pieces.iter().enumerate() {
        let expected = &piece.input_ids[1..];
        for start in (0..expected.len()).step_by(BLOCK) {
            let n = BLOCK.min(expected.len() - start);
            let rows = |(head, states): Read| rows(head, &states[i].narrow(0, start, n)?, text);
            let (found, original) = (rows(own)?, original.map(rows).transpose()?);
            score.add(&expected[start..start + n], &found, original.as_deref())?;
        }
    }
    Ok(score)
}

/// Log probabilities `[n][vocab]` after `states`.
fn rows(head: &Head, states: &Tensor, text: &TextItem) -> Result<Vec<Vec<f32>>> {
    let mut rows: Vec<Vec<f32>> = head.logits(states)?.to_vec2()?;
    rows.iter_mut()
        .try_for_each(|row| normalise(row, || text.origin.clone()))?;
    Ok(rows)
}

impl TextScore {
    fn add(
        &mut self,
        expected: &[u32],
        found: &[Vec<f32>],
        original: Option<&[Vec<f32>]>,
    ) -> Result<()> {
        self.n_tokens += expected.len();
        let likelihoods = found.iter().zip(expected);
        let likelihoods = likelihoods.map(|(row, id)| f64::from(row[*id as usize]));
        self.negative_log_likelihood -= likelihoods.sum::<f64>();
        let (Some(divergence), Some(original)) = (&mut self.divergence, original) else {
            return Ok(());
        };
        for (p, q) in original.iter().zip(found) {
            if p.len() != q.len() {
                return Err(shape("reference distributions", p.len(), q.len()));
            }
            divergence.kl_sum += kl(p, q);
            divergence.n_same_top += usize::from(top(p) == top(q));
            divergence.n_tokens += 1;
        }
        Ok(())
    }
}

fn shape(module: &str, expected: usize, found: usize) -> Error {
    Error::Shape {
        module: module.into(),
        expected: vec![expected],
        found: vec![found],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_rows(logits: &[[f32; 2]]) -> Vec<Vec<f32>> {
        let row = |logits: &[f32; 2]| {
            let mut row = logits.to_vec();
            normalise(&mut row, || "test".into()).unwrap();
            row
        };
        logits.iter().map(row).collect()
    }

    #[test]
    fn tokens_add_up_to_perplexity_and_divergence() {
        let mut score = TextScore {
            id: "t".into(),
            n_tokens: 0,
            negative_log_likelihood: 0.0,
            divergence: Some(Divergence::default()),
        };
        // q = (3/4, 1/4) and (1/2, 1/2) against p = (1/2, 1/2) twice.
        let found = log_rows(&[[3f32.ln(), 0.0], [0.0, 0.0]]);
        let original = log_rows(&[[0.0, 0.0], [0.0, 0.0]]);
        score.add(&[0, 1], &found, Some(&original)).unwrap();
        let expected = (3f64 / 8.0).ln();
        assert!((score.negative_log_likelihood + expected).abs() < 1e-6);
        assert!((perplexity(&[score.clone()]) - (8f64 / 3.0).sqrt()).abs() < 1e-6);
        let divergence = score.divergence.unwrap();
        let kl = (4f64 / 3.0).ln() / 2.0;
        assert!((divergence.kl_sum - kl).abs() < 1e-6, "{divergence:?}");
        assert_eq!((divergence.n_same_top, divergence.n_tokens), (2, 2));
        let narrow = vec![vec![0.0]; 2];
        assert!(score.add(&[0, 1], &found, Some(&narrow)).is_err());
    }
}
