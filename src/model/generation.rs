//! Answers, token by token, of several prompts at once.
//!
//! A step that answers one prompt reads every weight for one token and is bound by that; here each
//! step serves all prompts that are not done, and only attention, which has no weights, is each
//! one's own. Prompts that begin alike have been read once up to there ([`Prefix`]).

use crate::model::LoadedModel;
use crate::model::decoder::DecodeCache;
use crate::model::loaded::Prefix;
use crate::model::positions::Positions;
use crate::model::vision::ImageFeatures;
use crate::processor::ModelInput;
use crate::{Error, Result};
use candle_core::Tensor;
use rayon::prelude::*;

/// A prompt that is to be answered.
pub struct Request<'a> {
    /// What is known of its first tokens.
    pub prefix: &'a Prefix,
    /// The whole prompt, the prefix's tokens included.
    pub input: &'a ModelInput,
    /// Features of its images.
    pub features: Vec<ImageFeatures>,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Tokens whose logits at the answer's first place are wanted.
    pub first_ids: Vec<u32>,
}

/// How a prompt goes on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    /// The answer's tokens.
    pub ids: Vec<u32>,
    /// Logits of the request's tokens at the answer's first place; none if no token was to be written.
    pub first_logits: Vec<f32>,
}

/// What hears after each token how many answers ended there.
pub type OnToken<'a> = dyn Fn(usize) -> Result<()> + Sync + 'a;

/// A prompt with as much of its answer as there is.
struct Sequence {
    /// Its place among the requests.
    index: usize,
    answer: Vec<u32>,
    first_ids: Vec<u32>,
    first_logits: Vec<f32>,
    max_new_tokens: usize,
    is_done: bool,
    /// Position of the next token.
    next: u32,
    /// Output of the last layer at the last token, `[1, hidden]`.
    last: Tensor,
}

/// The prompts that are not done.
struct Batch {
    sequences: Vec<Sequence>,
    /// For each layer one cache for each sequence.
    caches: Vec<Vec<DecodeCache>>,
}

impl LoadedModel {
    /// The most likely continuation of each prompt, until an end token (which is not returned) or
    /// `max_new_tokens`. `on_token` hears after each token how many continuations ended there, and
    /// ends the work by an error.
    ///
    /// # Errors
    /// As [`LoadedModel::read_prefix`]; [`Error::NotFinite`] if the logits are not numbers;
    /// `on_token`'s.
    pub fn generate(
        &self,
        requests: &[Request],
        eos_ids: &[u32],
        on_token: &OnToken,
    ) -> Result<Vec<Generated>> {
        let mut batch = self.begin(requests)?;
        let mut answers = vec![Generated::default(); requests.len()];
        loop {
            let done = batch.remove_done();
            on_token(done.len())?;
            for sequence in done {
                answers[sequence.index] = Generated {
                    ids: sequence.answer,
                    first_logits: sequence.first_logits,
                };
            }
            if batch.sequences.is_empty() {
                return Ok(answers);
            }
            self.step(&mut batch)?;
            let lasts: Vec<&Tensor> = batch.sequences.iter().map(|s| &s.last).collect();
            let logits = self.head().logits(&Tensor::cat(&lasts, 0)?)?;
            let rows = finite_rows(&logits)?;
            for (sequence, row) in batch.sequences.iter_mut().zip(rows) {
                sequence.add(&row, eos_ids);
            }
        }
    }

    /// Reads all prompts.
    fn begin(&self, requests: &[Request]) -> Result<Batch> {
        let read = |(index, request): (usize, &Request)| {
            let next = self.source().positions(request.input)?.next;
            let (x, caches) = self.read(request.prefix, request.input, &request.features)?;
            let sequence = Sequence {
                index,
                answer: Vec::new(),
                first_ids: request.first_ids.clone(),
                first_logits: Vec::new(),
                max_new_tokens: request.max_new_tokens,
                is_done: request.max_new_tokens == 0,
                next,
                last: x.narrow(0, x.dim(0)? - 1, 1)?,
            };
            let caches = caches.iter().map(DecodeCache::new);
            Ok((sequence, caches.collect::<Result<Vec<_>>>()?))
        };
        let read = requests.par_iter().enumerate().map(read);
        let mut batch = Batch {
            sequences: Vec::new(),
            caches: self.layers.iter().map(|_| Vec::new()).collect(),
        };
        for (sequence, caches) in read.collect::<Result<Vec<_>>>()? {
            batch.sequences.push(sequence);
            for (layer, cache) in batch.caches.iter_mut().zip(caches) {
                layer.push(cache);
            }
        }
        Ok(batch)
    }

    /// Reads the last token of each answer; the prompts are read already.
    fn step(&self, batch: &mut Batch) -> Result<()> {
        let lasts = batch.sequences.iter().filter_map(|s| s.answer.last());
        let ids: Vec<u32> = lasts.copied().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let next: Vec<u32> = batch.sequences.iter().map(|s| s.next).collect();
        let positions = Positions {
            next: 0,
            ids: std::array::from_fn(|_| next.clone()),
        };
        let context = self.source().context_of_text(&positions)?;
        let mut x = self.source().embed_text(&ids)?;
        for (layer, caches) in self.layers.iter().zip(&mut batch.caches) {
            x = layer.decode(&x, &context, caches)?;
        }
        for (row, sequence) in batch.sequences.iter_mut().enumerate() {
            sequence.next += 1;
            sequence.last = x.narrow(0, row, 1)?;
        }
        Ok(())
    }
}

impl Sequence {
    /// Takes the likeliest next token, unless it ends the answer.
    fn add(&mut self, logits: &[f32], eos_ids: &[u32]) {
        if self.answer.is_empty() {
            let first = self
                .first_ids
                .iter()
                .filter_map(|id| logits.get(*id as usize));
            self.first_logits = first.copied().collect();
        }
        let id = most_likely(logits);
        if eos_ids.contains(&id) {
            self.is_done = true;
            return;
        }
        self.answer.push(id);
        self.is_done = self.answer.len() == self.max_new_tokens;
    }
}

impl Batch {
    /// Takes out the sequences that are done.
    fn remove_done(&mut self) -> Vec<Sequence> {
        for layer in &mut self.caches {
            let mut sequences = self.sequences.iter();
            layer.retain(|_| sequences.next().is_some_and(|sequence| !sequence.is_done));
        }
        let all = std::mem::take(&mut self.sequences).into_iter();
        let (done, open) = all.partition(|sequence| sequence.is_done);
        self.sequences = open;
        done
    }
}

/// Logits `[n, vocab]` row by row.
fn finite_rows(logits: &Tensor) -> Result<Vec<Vec<f32>>> {
    let rows: Vec<Vec<f32>> = logits.to_vec2()?;
    let count = rows.iter().flatten().filter(|v| !v.is_finite()).count();
    match count {
        0 => Ok(rows),
        count => Err(Error::NotFinite {
            module: "head".into(),
            stage: "logits".into(),
            count,
        }),
    }
}

/// Index of the largest of the logits; the first one among equals.
fn most_likely(logits: &[f32]) -> u32 {
    let larger = |best: (usize, f32), next: (usize, f32)| if next.1 > best.1 { next } else { best };
    let values = logits.iter().copied().enumerate();
    values.reduce(larger).map_or(0, |(id, _)| id as u32)
}
