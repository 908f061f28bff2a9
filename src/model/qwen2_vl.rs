//! Qwen2-VL: where its checkpoint keeps what, and how a prompt becomes embeddings.
//!
//! Checkpoints on the hub use the names of their first release (`visual.…`, `model.layers.…`);
//! those saved by transformers 4.52 and later put `model.visual.` and `model.language_model.`
//! before them. Both are read, and an export keeps what it found.

use crate::checkpoint::Checkpoint;
use crate::model::config::{ConfigNode, DecoderConfig};
use crate::model::decoder::{DecoderLayer, LayerSource, Projection};
use crate::model::head::Head;
use crate::model::positions::{Positions, multimodal_positions};
use crate::model::rope::Rope;
use crate::model::vision::qwen2::{VisionConfig, VisionTower};
use crate::processor::ModelInput;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// Value of `model_type` in `config.json`.
pub const MODEL_TYPE: &str = "qwen2_vl";

/// An open Qwen2-VL checkpoint, from which parts are loaded on demand.
pub struct Qwen2Vl {
    checkpoint: Checkpoint,
    decoder: DecoderConfig,
    vision: VisionConfig,
    image_token_id: u32,
    names: Names,
    device: Device,
}

/// Prefixes of the two naming generations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Names {
    decoder: &'static str,
    tower: &'static str,
}

const NAMES: [Names; 2] = [
    Names {
        decoder: "model",
        tower: "visual",
    },
    Names {
        decoder: "model.language_model",
        tower: "model.visual",
    },
];

/// One linear of the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Transformer layer it belongs to.
    pub layer_idx: usize,
    /// Its role there.
    pub projection: Projection,
    /// Checkpoint name without `.weight`.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
}

impl Qwen2Vl {
    /// Takes an open checkpoint, after a look at its configuration, its names, and the shapes
    /// that the one demands of the other.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another architecture, [`Error::Format`] for a faulty
    /// configuration, [`Error::Missing`] if the embedding bears no known name or a weight is
    /// absent, [`Error::Shape`] if one has another shape.
    pub fn new(checkpoint: Checkpoint, device: Device) -> Result<Self> {
        refuse_other_families(&checkpoint)?;
        let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
        let decoder = DecoderConfig::qwen2(&root)?;
        let vision = VisionConfig::read(&root, decoder.hidden_size)?;
        let image_token_id = root.size_or("image_token_id", 151_655)? as u32;
        let embedding = |names: &&Names| checkpoint.contains(&embedding_name(names));
        let names = *NAMES.iter().find(embedding).ok_or_else(|| Error::Missing {
            what: NAMES
                .iter()
                .map(embedding_name)
                .collect::<Vec<_>>()
                .join(" or "),
            place: checkpoint.dir().display().to_string(),
        })?;
        let model = Self {
            checkpoint,
            decoder,
            vision,
            image_token_id,
            names,
            device,
        };
        model.check_shapes()?;
        Ok(model)
    }

    /// Every size in the configuration is that of a tensor, so that none is believed before it
    /// is used: the first layer that is not there ends the search.
    fn check_shapes(&self) -> Result<()> {
        let table = [self.decoder.vocab_size, self.decoder.hidden_size];
        self.checkpoint
            .require_shape(&embedding_name(&self.names), &table)?;
        for layer_idx in 0..self.decoder.n_layers {
            for module in self.layer_modules(layer_idx) {
                if !self.checkpoint.is_quantized(&module.name) {
                    let weight = format!("{}.weight", module.name);
                    self.checkpoint.require_shape(&weight, &module.shape)?;
                }
            }
        }
        self.vision.check_shapes(&self.checkpoint, self.names.tower)
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Sizes of the decoder.
    pub fn decoder(&self) -> &DecoderConfig {
        &self.decoder
    }

    /// Sizes of the vision tower.
    pub fn vision(&self) -> &VisionConfig {
        &self.vision
    }

    /// Where tensors are put.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The id that stands for one token of an image.
    pub fn image_token_id(&self) -> u32 {
        self.image_token_id
    }

    /// All linears of the decoder, layer by layer in solve order.
    pub fn modules(&self) -> Vec<Module> {
        (0..self.decoder.n_layers)
            .flat_map(|layer_idx| self.layer_modules(layer_idx))
            .collect()
    }

    /// The linears of one layer in solve order.
    pub fn layer_modules(&self, layer_idx: usize) -> Vec<Module> {
        let module = |projection: Projection| Module {
            layer_idx,
            projection,
            name: format!("{}.{}", self.layer_prefix(layer_idx), projection.name()),
            shape: projection.shape(&self.decoder),
        };
        Projection::ALL.into_iter().map(module).collect()
    }

    fn layer_prefix(&self, layer_idx: usize) -> String {
        format!("{}.layers.{layer_idx}", self.names.decoder)
    }

    /// Loads the vision tower.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load_tower(&self) -> Result<VisionTower> {
        VisionTower::load(
            &self.checkpoint,
            self.names.tower,
            &self.vision,
            &self.device,
        )
    }

    /// Where the parts of one layer of the decoder are read from.
    pub fn layer_source(&self, layer_idx: usize) -> LayerSource<'_> {
        LayerSource {
            checkpoint: &self.checkpoint,
            prefix: self.layer_prefix(layer_idx),
            config: &self.decoder,
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

    /// Loads the final norm and the head.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load_head(&self) -> Result<Head> {
        let weight = match self.decoder.tie_word_embeddings {
            true => embedding_name(&self.names),
            false => "lm_head.weight".to_owned(),
        };
        let norm = format!("{}.norm.weight", self.names.decoder);
        Head::load(
            &self.checkpoint,
            &norm,
            &weight,
            &self.decoder,
            &self.device,
        )
    }

    /// Embeddings `[n_tokens, hidden]` of a prompt, each run of image tokens replaced by the
    /// features of its image, which come in the order of the images.
    ///
    /// # Errors
    /// [`Error::Shape`] if the image tokens and the features differ in number,
    /// [`Error::Invalid`] for an id outside the vocabulary.
    pub fn embed(&self, input_ids: &[u32], features: &[Tensor]) -> Result<Tensor> {
        let n_images = input_ids
            .iter()
            .filter(|&&id| id == self.image_token_id)
            .count();
        let n_features: usize = features.iter().map(|f| f.dims()[0]).sum();
        if n_images != n_features {
            return Err(Error::Shape {
                module: "image tokens in the prompt".into(),
                expected: vec![n_features],
                found: vec![n_images],
            });
        }
        let hidden = self.decoder.hidden_size;
        let mut rows = self.embedding_rows(input_ids)?;
        if n_images > 0 {
            let features: Vec<f32> = Tensor::cat(features, 0)?.flatten_all()?.to_vec1()?;
            let mut features = features.chunks_exact(hidden);
            for (row, &id) in rows.chunks_exact_mut(hidden).zip(input_ids) {
                if let Some(feature) = (id == self.image_token_id)
                    .then(|| features.next())
                    .flatten()
                {
                    row.copy_from_slice(feature);
                }
            }
        }
        Ok(Tensor::from_vec(
            rows,
            (input_ids.len(), hidden),
            &self.device,
        )?)
    }

    /// Embeddings `[n_tokens, hidden]` of text tokens.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id outside the vocabulary.
    pub fn embed_text(&self, ids: &[u32]) -> Result<Tensor> {
        let rows = self.embedding_rows(ids)?;
        Ok(Tensor::from_vec(
            rows,
            (ids.len(), self.decoder.hidden_size),
            &self.device,
        )?)
    }

    /// Only the rows that a prompt needs are read: the table may be larger than a layer.
    fn embedding_rows(&self, input_ids: &[u32]) -> Result<Vec<f32>> {
        let name = embedding_name(&self.names);
        let (vocab, hidden) = (self.decoder.vocab_size, self.decoder.hidden_size);
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
        let grids: Vec<[usize; 3]> = input.images.iter().map(|image| image.grid_thw).collect();
        multimodal_positions(
            &input.input_ids,
            self.image_token_id,
            &grids,
            self.vision.merge_size,
        )
    }

    /// The rotary tables of these positions.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn rope(&self, positions: &Positions) -> Result<Rope> {
        Rope::multimodal(&self.decoder, &positions.ids, &self.device)
    }
}

fn embedding_name(names: &Names) -> String {
    format!("{}.embed_tokens.weight", names.decoder)
}

fn refuse_other_families(checkpoint: &Checkpoint) -> Result<()> {
    let found = checkpoint
        .config()
        .get("model_type")
        .and_then(|v| v.as_str())
        .unwrap_or("none");
    if found == MODEL_TYPE {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!(
            "{}: model_type {found:?}; this version handles {MODEL_TYPE:?}",
            checkpoint.dir().join("config.json").display()
        ),
    })
}
