//! All layers there and back: forward with each layer's input kept, and the closed-form backward
//! pass of [`super::backward`] from the last layer to the first.
//!
//! Layers are read when they are needed, once on the way there and once on the way back; of a layer
//! nothing but its inputs is kept, and its inside is made again. So the memory is that of the
//! states between layers, `[n_layers][n_tokens, hidden]` of the sequences that are walked together
//! ([`together`]), and of one layer; the cost is two forwards and one backward.

use crate::Result;
use crate::calibration::{CalibrationSample, CalibrationSet};
use crate::importance::backward::{self, AttentionPass, LayerGradients};
use crate::model::ModelSource;
use crate::model::context::TokenContext;
use crate::model::decoder::{DecoderLayer, KvCache};
use crate::model::decoder_config::DecoderConfig;
use crate::processor::TokenClass;
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of the states between layers that are kept at once.
const STATE_BYTES: usize = 1 << 30;

/// Where whole layers come from, each when it is needed.
pub trait Layers: Sync {
    /// How many there are.
    fn n_layers(&self) -> usize;

    /// One of them with all its linears.
    ///
    /// # Errors
    /// The reader's.
    fn layer(&self, layer_idx: usize) -> Result<DecoderLayer>;
}

impl Layers for ModelSource {
    fn n_layers(&self) -> usize {
        self.decoder().n_layers
    }

    fn layer(&self, layer_idx: usize) -> Result<DecoderLayer> {
        self.load_layer(layer_idx)
    }
}

/// A sequence at the door of the first layer.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// `[n_tokens, hidden]`.
    pub embeddings: Tensor,
    /// Where its tokens stand, and what the tower adds on the way.
    pub context: TokenContext,
}

impl Sequence {
    /// A sample as it is in the store of `set`.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; a tensor error.
    pub fn read(set: &CalibrationSet, sample: &CalibrationSample) -> Result<Self> {
        let added = sample.deepstack.iter().map(|state| state.all(&set.store));
        let added = added.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            embeddings: sample.embeddings.all(&set.store)?,
            context: sample.context.clone().with_deepstack(added),
        })
    }
}

/// The places whose next token is one that the model is to say: of an answer, or of raw text.
pub fn answer_places(classes: &[TokenClass]) -> Vec<u32> {
    let is_said = |class: &TokenClass| matches!(class, TokenClass::Answer | TokenClass::Text);
    let next = classes.iter().skip(1).enumerate();
    next.filter(|(_, class)| is_said(class))
        .map(|(place, _)| place as u32)
        .collect()
}

/// Which consecutive samples of these many tokens are walked together.
pub fn together(config: &DecoderConfig, n_tokens: &[usize]) -> Vec<Range<usize>> {
    let token_bytes = (config.n_layers + 1) * config.hidden_size * size_of::<f32>();
    let most = STATE_BYTES / token_bytes.max(1);
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut sum = 0;
    for (index, n) in n_tokens.iter().enumerate() {
        sum += n;
        match runs.last_mut() {
            Some(run) if sum <= most => run.end = index + 1,
            _ => {
                sum = *n;
                runs.push(index..index + 1);
            }
        }
    }
    runs
}

/// The last layer's output of each sequence, `[n_tokens, hidden]`; nothing else is kept.
///
/// # Errors
/// Those of `layers`; a tensor error if shapes disagree.
pub fn outputs(layers: &dyn Layers, sequences: &[Sequence]) -> Result<Vec<Tensor>> {
    let mut states: Vec<Tensor> = sequences.iter().map(|s| s.embeddings.clone()).collect();
    for layer_idx in 0..layers.n_layers() {
        states = through(&layers.layer(layer_idx)?, layer_idx, sequences, &states)?;
    }
    Ok(states)
}

/// Sequences after the way there.
pub struct Walk<'a> {
    layers: &'a dyn Layers,
    sequences: &'a [Sequence],
    /// `[layer][sequence]`.
    inputs: Vec<Vec<Tensor>>,
    /// The last layer's output of each sequence, `[n_tokens, hidden]`.
    pub outputs: Vec<Tensor>,
}

impl<'a> Walk<'a> {
    /// Goes through all layers.
    ///
    /// # Errors
    /// As [`outputs`].
    pub fn forward(layers: &'a dyn Layers, sequences: &'a [Sequence]) -> Result<Self> {
        let mut inputs = Vec::new();
        let mut states: Vec<Tensor> = sequences.iter().map(|s| s.embeddings.clone()).collect();
        for layer_idx in 0..layers.n_layers() {
            let next = through(&layers.layer(layer_idx)?, layer_idx, sequences, &states)?;
            inputs.push(std::mem::replace(&mut states, next));
        }
        Ok(Self {
            layers,
            sequences,
            inputs,
            outputs: states,
        })
    }

    /// Carries `gradients = ∂L/∂outputs` back. Of each layer and sequence `see` is shown the place
    /// `[layer, sequence]`, the pass and the gradients; what it makes of them is given by layer,
    /// then by sequence.
    ///
    /// # Errors
    /// As [`outputs`]; those of `see`.
    pub fn backward<T: Send>(
        self,
        gradients: Vec<Tensor>,
        see: impl Fn([usize; 2], &AttentionPass, &LayerGradients) -> Result<T> + Sync,
    ) -> Result<Vec<Vec<T>>> {
        let none = |_: usize, _: &DecoderLayer| Ok(());
        self.backward_with(gradients, none, |_, place, pass, own| see(place, pass, own))
    }

    /// [`Walk::backward`], where `see` is also shown what `begin` makes of each layer, once and only
    /// as long as the walk is there.
    ///
    /// # Errors
    /// As [`Walk::backward`]; those of `begin`.
    pub fn backward_with<L: Sync, T: Send>(
        self,
        mut gradients: Vec<Tensor>,
        begin: impl Fn(usize, &DecoderLayer) -> Result<L>,
        see: impl Fn(&L, [usize; 2], &AttentionPass, &LayerGradients) -> Result<T> + Sync,
    ) -> Result<Vec<Vec<T>>> {
        let mut seen = Vec::new();
        for (layer_idx, inputs) in self.inputs.into_iter().enumerate().rev() {
            let layer = self.layers.layer(layer_idx)?;
            let of_layer = begin(layer_idx, &layer)?;
            let one =
                |(index, ((x, d_out), sequence)): (usize, ((&Tensor, &Tensor), &Sequence))| {
                    // What the tower adds to the output does not depend on it: d_out passes by.
                    let pass = AttentionPass::new(&layer, &sequence.context, x)?;
                    let gradients = backward::layer(&pass, d_out)?;
                    let seen = see(&of_layer, [layer_idx, index], &pass, &gradients)?;
                    Ok((seen, gradients.x))
                };
            let parts = inputs.par_iter().zip(&gradients).zip(self.sequences);
            let done = parts.enumerate().map(one).collect::<Result<Vec<_>>>()?;
            let own: Vec<T>;
            (own, gradients) = done.into_iter().unzip();
            seen.push(own);
        }
        seen.reverse();
        Ok(seen)
    }
}

/// All sequences through one layer.
fn through(
    layer: &DecoderLayer,
    layer_idx: usize,
    sequences: &[Sequence],
    states: &[Tensor],
) -> Result<Vec<Tensor>> {
    let one = |(x, sequence): (&Tensor, &Sequence)| {
        let context = &sequence.context;
        let x = layer.forward(x, context, &[x.dim(0)?], &mut KvCache::default())?;
        Ok(match context.deepstack(layer_idx) {
            Some(added) => (x + added)?,
            None => x,
        })
    };
    states.par_iter().zip(sequences).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_places_before_said_tokens_are_asked_for() {
        use TokenClass::{Answer, Prompt, Special, Text, Vision};
        let chat = [Special, Vision, Prompt, Special, Answer, Answer, Special];
        assert_eq!(answer_places(&chat), [3, 4]);
        assert_eq!(answer_places(&[Special, Text, Text]), [0, 1]);
        assert!(answer_places(&[Answer]).is_empty());
        assert!(answer_places(&[]).is_empty());
    }

    #[test]
    fn samples_are_walked_together_as_far_as_their_states_fit() {
        let mut config = DecoderConfig::small(1 << 20, 8, [2, 1, 4]);
        config.n_layers = 1;
        // 8 MB a token: 128 of them.
        let runs = together(&config, &[60, 60, 60, 200, 1, 127, 1]);
        assert_eq!(runs, [0..2, 2..3, 3..4, 4..6, 6..7]);
        assert!(together(&config, &[]).is_empty());
    }
}
