//! An open checkpoint of a known family, and how a prompt becomes embeddings.
//!
//! Nothing is loaded before it is asked for: a layer is read when its turn comes, of the embedding
//! only the rows that a prompt needs.

use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Names, PositionRule};
use crate::model::context::TokenContext;
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::{Ahead, DecoderConfig};
use crate::model::device::ModelDevice;
use crate::model::head::Head;
use crate::model::layer_source::LayerSource;
use crate::model::positions::{Positions, multimodal_positions, text_positions};
use crate::model::projection::{Slot, slots};
use crate::model::vision::{ImageFeatures, VisionConfig, VisionTower};
use crate::processor::{ModelInput, TokenClass};
use crate::{Error, Result};
use candle_core::Tensor;

/// An open checkpoint, from which parts are loaded on demand.
pub struct ModelSource {
    checkpoint: Checkpoint,
    architecture: Architecture,
    device: ModelDevice,
}

/// One linear of the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Transformer layer it belongs to.
    pub layer_idx: usize,
    /// Its role there.
    pub slot: Slot,
    /// Checkpoint name without `.weight`; of an expert that of its own, wherever the file keeps it.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
}

/// A prompt on its way into the decoder.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// `[n_tokens, hidden]`, image features in their places.
    pub rows: Tensor,
    /// What is added to the outputs of the first layers, `[n_tokens, hidden]` each, zero for text.
    pub deepstack: Vec<Tensor>,
}

impl ModelSource {
    /// Takes an open checkpoint of a known architecture, after a look at the shapes that its
    /// configuration demands.
    ///
    /// # Errors
    /// [`Error::Missing`] if a weight is absent, [`Error::Shape`] if one has another shape.
    pub fn new(
        checkpoint: Checkpoint,
        architecture: Architecture,
        device: impl Into<ModelDevice>,
    ) -> Result<Self> {
        let model = Self {
            checkpoint,
            architecture,
            device: device.into(),
        };
        model.check_shapes()?;
        Ok(model)
    }

    /// Every size in the configuration is that of a tensor, so that none is believed before it
    /// is used: the first layer that is not there ends the search.
    fn check_shapes(&self) -> Result<()> {
        let decoder = self.decoder();
        let table = [decoder.vocab_size, decoder.hidden_size];
        self.checkpoint
            .require_shape(&self.embedding_name(), &table)?;
        for layer_idx in 0..decoder.n_layers {
            for module in self.layer_modules(layer_idx) {
                if !self.checkpoint.is_quantized(&module.name) {
                    self.checkpoint.require_linear(&module.name, module.shape)?;
                }
            }
        }
        self.vision().check_shapes(&self.checkpoint)
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What the family is called in configurations.
    pub fn family(&self) -> &'static str {
        self.architecture.family
    }

    /// Sizes of the decoder.
    pub fn decoder(&self) -> &DecoderConfig {
        &self.architecture.decoder
    }

    /// What the names of the decoder's tensors begin with.
    pub fn decoder_prefix(&self) -> &str {
        &self.architecture.names.decoder
    }

    /// The vision tower as data.
    pub fn vision(&self) -> &dyn VisionConfig {
        self.architecture.vision.as_ref()
    }

    /// Where tensors are put, and how linears multiply there.
    pub fn device(&self) -> &ModelDevice {
        &self.device
    }

    /// The id that stands for one token of an image.
    pub fn image_token_id(&self) -> u32 {
        self.architecture.image_token_id
    }

    /// All linears of the decoder, layer by layer in solve order.
    pub fn modules(&self) -> Vec<Module> {
        (0..self.decoder().n_layers)
            .flat_map(|layer_idx| self.layer_modules(layer_idx))
            .collect()
    }

    /// The linears of one layer in solve order.
    pub fn layer_modules(&self, layer_idx: usize) -> Vec<Module> {
        let module = |slot: Slot| Module {
            layer_idx,
            slot,
            name: format!("{}.{}", self.layer_prefix(layer_idx), slot.name()),
            shape: slot.shape(self.decoder()),
        };
        let slots = slots(self.decoder(), layer_idx);
        slots.into_iter().map(module).collect()
    }

    fn layer_prefix(&self, layer_idx: usize) -> String {
        format!("{}.layers.{layer_idx}", self.architecture.names.decoder)
    }

    /// Loads the vision tower with what joins it to the decoder.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load_tower(&self) -> Result<Box<dyn VisionTower>> {
        self.vision().load(&self.checkpoint, &self.device)
    }

    /// Where the parts of one layer of the decoder are read from.
    pub fn layer_source(&self, layer_idx: usize) -> LayerSource<'_> {
        LayerSource {
            checkpoint: &self.checkpoint,
            prefix: self.layer_prefix(layer_idx),
            layer_idx,
            config: self.decoder(),
            device: &self.device,
        }
    }

    /// Loads one layer of the decoder.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load_layer(&self, layer_idx: usize) -> Result<DecoderLayer> {
        self.layer_source(layer_idx).whole()
    }

    /// A digest of everything that a layer's loading reads.
    ///
    /// # Errors
    /// As [`Checkpoint::digest`].
    pub fn layer_digest(&self, layer_idx: usize) -> Result<String> {
        self.checkpoint
            .digest(&format!("{}.", self.layer_prefix(layer_idx)))
    }

    /// A digest of all tensors that are not the decoder's: those of the tower, with what joins it
    /// to the decoder.
    ///
    /// # Errors
    /// As [`Checkpoint::digest`].
    pub fn tower_digest(&self) -> Result<String> {
        let Names { decoder, head } = self.names();
        let parts = ["layers.", "embed_tokens.", "norm."].map(|part| format!("{decoder}.{part}"));
        let is_decoder = |name: &str| name == head || parts.iter().any(|p| name.starts_with(p));
        self.checkpoint.digest_of(|name| !is_decoder(name))
    }

    /// Loads the final norm and the head.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load_head(&self) -> Result<Head> {
        let weight = match self.decoder().tie_word_embeddings {
            true => self.embedding_name(),
            false => self.architecture.names.head.clone(),
        };
        let norm = format!("{}.norm.weight", self.architecture.names.decoder);
        let (config, device) = (self.decoder(), &self.device);
        Head::load(&self.checkpoint, &norm, &weight, config, device)
    }

    /// Embeddings of a prompt, each run of image tokens replaced by the features of its image,
    /// which come in the order of the images.
    ///
    /// # Errors
    /// [`Error::Shape`] if the image tokens and the features differ in number,
    /// [`Error::Invalid`] for an id outside the vocabulary.
    pub fn embed(&self, input_ids: &[u32], features: &[ImageFeatures]) -> Result<Embedded> {
        let mut rows = self.embedding_rows(input_ids)?;
        let embeddings: Vec<&Tensor> = features.iter().map(|f| &f.embeddings).collect();
        self.put_images(input_ids, &embeddings, &mut rows)?;
        let shape = (input_ids.len(), self.decoder().hidden_size);
        let level = |i: usize| {
            let mut rows = vec![0.0; shape.0 * shape.1];
            let added: Option<Vec<&Tensor>> = features.iter().map(|f| f.deepstack.get(i)).collect();
            self.put_images(input_ids, &added.unwrap_or_default(), &mut rows)?;
            Ok(Tensor::from_vec(rows, shape, &self.device)?)
        };
        Ok(Embedded {
            rows: Tensor::from_vec(rows, shape, &self.device)?,
            deepstack: (0..self.vision().n_deepstack())
                .map(level)
                .collect::<Result<_>>()?,
        })
    }

    /// Writes the rows of `images` over those of the image tokens.
    fn put_images(&self, ids: &[u32], images: &[&Tensor], rows: &mut [f32]) -> Result<()> {
        let is_image = |id: &u32| *id == self.image_token_id();
        let n_tokens = ids.iter().filter(|id| is_image(id)).count();
        let n_rows: usize = images.iter().map(|image| image.dims()[0]).sum();
        if n_tokens != n_rows {
            return Err(Error::Shape {
                module: "image tokens in the prompt".into(),
                expected: vec![n_rows],
                found: vec![n_tokens],
            });
        }
        if n_rows == 0 {
            return Ok(());
        }
        let hidden = self.decoder().hidden_size;
        let features: Vec<f32> = Tensor::cat(images, 0)?.flatten_all()?.to_vec1()?;
        let places = rows.chunks_exact_mut(hidden).zip(ids);
        let places = places.filter(|(_, id)| is_image(id));
        for ((row, _), feature) in places.zip(features.chunks_exact(hidden)) {
            row.copy_from_slice(feature);
        }
        Ok(())
    }

    /// Embeddings `[n_tokens, hidden]` of text tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id outside the vocabulary.
    pub fn embed_text(&self, ids: &[u32]) -> Result<Tensor> {
        let rows = self.embedding_rows(ids)?;
        Ok(Tensor::from_vec(
            rows,
            (ids.len(), self.decoder().hidden_size),
            &self.device,
        )?)
    }

    /// Only the rows that a prompt needs are read: the table may be larger than a layer.
    fn embedding_rows(&self, input_ids: &[u32]) -> Result<Vec<f32>> {
        let name = self.embedding_name();
        let (vocab, hidden) = (self.decoder().vocab_size, self.decoder().hidden_size);
        let info = self.checkpoint.require_shape(&name, &[vocab, hidden])?;
        let row_bytes = hidden * info.dtype.n_bytes();
        let mut rows = Vec::with_capacity(input_ids.len() * hidden);
        for &id in input_ids {
            let start = id as usize * row_bytes;
            let row = self
                .checkpoint
                .bytes_at(&name, start..start + row_bytes)?
                .ok_or_else(|| Error::Invalid {
                    what: format!("token id {id}"),
                    why: format!("the vocabulary has {vocab} entries"),
                })?;
            rows.extend(
                info.dtype
                    .f32_from_bytes(&row)
                    .ok_or_else(|| Error::Unsupported {
                        what: format!("{name} stored as {}", info.dtype.name()),
                    })?,
            );
        }
        let scale = self.decoder().embedding_scale;
        rows.iter_mut().for_each(|value| *value *= scale);
        match rows.iter().filter(|v| !v.is_finite()).count() {
            0 => Ok(rows),
            count => Err(Error::NotFinite {
                module: name,
                stage: "weights".into(),
                count,
            }),
        }
    }

    /// The positions of a prompt's tokens.
    ///
    /// # Errors
    /// As [`multimodal_positions`].
    pub fn positions(&self, input: &ModelInput) -> Result<Positions> {
        let n_tokens = input.input_ids.len();
        let merge_size = match self.architecture.positions {
            PositionRule::Text => return Ok(text_positions(n_tokens, 0)),
            PositionRule::TextFromOne => return Ok(text_positions(n_tokens, 1)),
            PositionRule::Multimodal { merge_size } => merge_size,
        };
        let grids: Vec<[usize; 3]> = input.images.iter().map(|image| image.grid_thw).collect();
        let image_token_id = self.image_token_id();
        multimodal_positions(&input.input_ids, image_token_id, &grids, merge_size)
    }

    /// The context of an input's tokens at these positions.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn context(&self, input: &ModelInput, positions: &Positions) -> Result<TokenContext> {
        let groups = match self.decoder().ahead {
            Ahead::Prompt => before_answer(&input.classes),
            Ahead::Nothing | Ahead::Image => image_numbers(&input.input_ids, self.image_token_id()),
        };
        TokenContext::new(self.decoder(), &positions.ids, groups, &self.device)
    }

    /// The context of text tokens at these positions.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn context_of_text(&self, positions: &Positions) -> Result<TokenContext> {
        let groups = vec![0; positions.ids[0].len()];
        TokenContext::new(self.decoder(), &positions.ids, groups, &self.device)
    }

    /// Names of the decoder's parts.
    pub fn names(&self) -> &Names {
        &self.architecture.names
    }

    fn embedding_name(&self) -> String {
        format!("{}.embed_tokens.weight", self.architecture.names.decoder)
    }
}

/// For each token the number of the run of image tokens that it is in, 0 for none.
fn image_numbers(input_ids: &[u32], image_token_id: u32) -> Vec<u32> {
    let (mut n_runs, mut inside) = (0, false);
    let number = |id: &u32| {
        let is_image = *id == image_token_id;
        n_runs += u32::from(is_image && !inside);
        inside = is_image;
        if is_image { n_runs } else { 0 }
    };
    input_ids.iter().map(number).collect()
}

/// 1 for each token before the first of an answer, which see each other as those of an image do,
/// and 0 from there on. Raw text has no prompt, and is read as an answer is.
fn before_answer(classes: &[TokenClass]) -> Vec<u32> {
    let is_said = |class: &TokenClass| matches!(class, TokenClass::Answer | TokenClass::Text);
    let n = classes.iter().position(is_said).unwrap_or(classes.len());
    (0..classes.len()).map(|i| u32::from(i < n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_ends_where_the_answer_begins() {
        use TokenClass::{Answer, Prompt, Special, Text, Vision};
        let prompt = [Vision, Special, Prompt, Special];
        assert_eq!(before_answer(&prompt), [1; 4]);
        let whole = [&prompt[..], &[Answer, Answer, Special]].concat();
        assert_eq!(before_answer(&whole), [1, 1, 1, 1, 0, 0, 0]);
        assert_eq!(before_answer(&[Special, Text, Text]), [1, 0, 0]);
    }

    #[test]
    fn runs_of_image_tokens_are_numbered() {
        let found = image_numbers(&[9, 9, 1, 9, 2, 2, 9, 9], 9);
        assert_eq!(found, [1, 1, 0, 2, 0, 0, 3, 3]);
    }
}
