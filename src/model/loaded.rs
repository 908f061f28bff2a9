//! A model with all its layers in memory, to answer questions and to score answers.

use crate::model::context::TokenContext;
use crate::model::decoder::{DecoderLayer, KvCache};
use crate::model::decoder_config::Ahead;
use crate::model::head::Head;
use crate::model::source::ModelSource;
use crate::model::vision::{ImageFeatures, VisionTower};
use crate::processor::{ModelInput, VisionInput};
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;

/// All parts of a model.
pub struct LoadedModel {
    source: ModelSource,
    tower: Box<dyn VisionTower>,
    tower_digest: String,
    pub(super) layers: Vec<DecoderLayer>,
    head: Head,
}

/// What a model keeps of the first tokens of a prompt; several prompts may go on from it.
#[derive(Clone, Debug)]
pub struct Prefix {
    caches: Vec<KvCache>,
    n_tokens: usize,
}

/// An input that goes on from a prefix, and the tokens of it whose logits are asked for.
pub struct Continuation<'a> {
    /// The whole input, the prefix's tokens included.
    pub input: &'a ModelInput,
    /// Features of its images.
    pub features: Vec<ImageFeatures>,
    /// Tokens after the prefix; the logits at one predict the one after.
    pub tokens: Range<usize>,
}

impl LoadedModel {
    /// Loads everything; quantized weights are dequantized to f32.
    ///
    /// # Errors
    /// Those of [`crate::checkpoint::Checkpoint::load`].
    pub fn load(source: ModelSource) -> Result<Self> {
        let layers = (0..source.decoder().n_layers).map(|i| source.load_layer(i));
        Ok(Self {
            tower: source.load_tower()?,
            tower_digest: source.tower_digest()?,
            layers: layers.collect::<Result<_>>()?,
            head: source.load_head()?,
            source,
        })
    }

    /// The checkpoint that it came from.
    pub fn source(&self) -> &ModelSource {
        &self.source
    }

    /// The same model with other decoder layers; the tower and the head are shared memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more or fewer layers.
    pub fn set_layers(&mut self, layers: Vec<DecoderLayer>) -> Result<()> {
        if layers.len() != self.layers.len() {
            return Err(Error::Shape {
                module: "decoder layers".into(),
                expected: vec![self.layers.len()],
                found: vec![layers.len()],
            });
        }
        self.layers = layers;
        Ok(())
    }

    /// What tells towers apart: models with the same one make the same of an image.
    pub fn tower_digest(&self) -> &str {
        &self.tower_digest
    }

    /// The features of one image.
    ///
    /// # Errors
    /// As [`VisionTower::forward`].
    pub fn image_features(&self, image: &VisionInput) -> Result<ImageFeatures> {
        self.tower.forward(image)
    }

    /// What makes logits of the last layer's output.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The last layer's output `[n_tokens, hidden]` for an input without images.
    ///
    /// # Errors
    /// As [`ModelSource::embed`].
    pub fn text_states(&self, input: &ModelInput) -> Result<Tensor> {
        Ok(self.read(&self.nothing(), input, &[])?.0)
    }

    /// The last layer's output `[n, hidden]` for embeddings `x [n, hidden]` of sequences of
    /// `lengths`, each of which follows what `caches`, one per layer, hold.
    fn hidden_states(
        &self,
        x: &Tensor,
        context: &TokenContext,
        lengths: &[usize],
        caches: &mut [KvCache],
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            x = layer.forward(&x, context, lengths, cache)?;
            if let Some(added) = context.deepstack(i) {
                x = (x + added)?;
            }
        }
        Ok(x)
    }

    /// Logits `[n_tokens, vocab]` of a whole input.
    ///
    /// # Errors
    /// As [`ModelSource::embed`].
    pub fn logits(&self, input: &ModelInput, features: &[ImageFeatures]) -> Result<Tensor> {
        let (x, _) = self.read(&self.nothing(), input, features)?;
        self.head.logits(&x)
    }

    /// Logits `[n_tokens, vocab]` of each input at its tokens. The inputs are read side by side, and
    /// none sees another.
    ///
    /// # Errors
    /// As [`LoadedModel::read_prefix`], and a tensor error if tokens are not after the prefix.
    pub fn logits_at(&self, prefix: &Prefix, inputs: &[Continuation]) -> Result<Vec<Tensor>> {
        let parts = inputs
            .iter()
            .map(|c| self.after_prefix(prefix, c.input, &c.features));
        let (x, contexts): (Vec<_>, Vec<_>) =
            parts.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let lengths = x.iter().map(|x| Ok(x.dim(0)?));
        let lengths = lengths.collect::<Result<Vec<usize>>>()?;
        let mut caches = prefix.caches.clone();
        let (x, context) = (Tensor::cat(&x, 0)?, TokenContext::cat(&contexts)?);
        let x = self.hidden_states(&x, &context, &lengths, &mut caches)?;
        let mut end = 0;
        let logits = inputs.iter().zip(lengths).map(|(c, length)| {
            let own = x.narrow(0, end, length)?;
            end += length;
            let start = c.tokens.start.saturating_sub(prefix.n_tokens);
            self.head.logits(&own.narrow(0, start, c.tokens.len())?)
        });
        logits.collect()
    }

    /// No token read yet.
    pub fn nothing(&self) -> Prefix {
        Prefix {
            caches: vec![KvCache::default(); self.layers.len()],
            n_tokens: 0,
        }
    }

    /// Reads the first `n_tokens` of an input, for several inputs that begin alike; none of them if
    /// they see what follows.
    ///
    /// # Errors
    /// As [`ModelSource::embed`]; [`Error::Invalid`] if nothing is left to read after it.
    pub fn read_prefix(
        &self,
        input: &ModelInput,
        features: &[ImageFeatures],
        n_tokens: usize,
    ) -> Result<Prefix> {
        if self.source.decoder().ahead == Ahead::Prompt {
            return Ok(self.nothing());
        }
        let mut caches = self.nothing().caches;
        let (x, context) = self.embedded(input, features)?;
        let (x, context) = (x.narrow(0, 0, n_tokens)?, context.narrow(0, n_tokens)?);
        self.hidden_states(&x, &context, &[n_tokens], &mut caches)?;
        Ok(Prefix { caches, n_tokens })
    }

    /// Hidden states of the tokens after the prefix, and the caches with them in.
    pub(super) fn read(
        &self,
        prefix: &Prefix,
        input: &ModelInput,
        features: &[ImageFeatures],
    ) -> Result<(Tensor, Vec<KvCache>)> {
        let (x, context) = self.after_prefix(prefix, input, features)?;
        let mut caches = prefix.caches.clone();
        let x = self.hidden_states(&x, &context, &[x.dim(0)?], &mut caches)?;
        Ok((x, caches))
    }

    /// Embeddings and context of a whole input.
    fn embedded(
        &self,
        input: &ModelInput,
        features: &[ImageFeatures],
    ) -> Result<(Tensor, TokenContext)> {
        let embedded = self.source.embed(&input.input_ids, features)?;
        let positions = self.source.positions(input)?;
        let context = self.source.context(input, &positions)?;
        Ok((embedded.rows, context.with_deepstack(embedded.deepstack)))
    }

    /// Embeddings and context of the tokens after the prefix.
    fn after_prefix(
        &self,
        prefix: &Prefix,
        input: &ModelInput,
        features: &[ImageFeatures],
    ) -> Result<(Tensor, TokenContext)> {
        let n = input.input_ids.len();
        if n <= prefix.n_tokens {
            return Err(Error::Invalid {
                what: "prompt".into(),
                why: format!("{n} tokens, more than {} expected", prefix.n_tokens),
            });
        }
        let (start, rest) = (prefix.n_tokens, n - prefix.n_tokens);
        let (x, context) = self.embedded(input, features)?;
        Ok((x.narrow(0, start, rest)?, context.narrow(start, rest)?))
    }
}
