//! What a family's file says of a checkpoint: which decoder, which tower, under which names.

use crate::checkpoint::Checkpoint;
use crate::model::decoder_config::DecoderConfig;
use crate::model::vision::VisionConfig;
use crate::{Error, Result};

/// One checkpoint's architecture.
#[derive(Debug)]
pub struct Architecture {
    /// Value of `model_type` in `config.json`.
    pub family: &'static str,
    /// The language model.
    pub decoder: DecoderConfig,
    /// Where the checkpoint keeps it.
    pub names: Names,
    /// The vision tower with what joins it to the decoder.
    pub vision: Box<dyn VisionConfig>,
    /// The id that stands for one token of an image.
    pub image_token_id: u32,
    /// How tokens get their positions.
    pub positions: PositionRule,
}

/// Names of the decoder's parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Prefix of `layers`, `embed_tokens` and `norm`.
    pub decoder: String,
    /// The untied head.
    pub head: String,
}

/// How tokens get their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionRule {
    /// One after the other from 0, image tokens too.
    Text,
    /// The same from 1.
    TextFromOne,
    /// Image tokens by time, row and column of their image, `merge_size`² patches a token.
    Multimodal {
        /// Patches per side that are one token.
        merge_size: usize,
    },
}

/// One of the ways in which a family's checkpoints have named their parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Naming {
    /// Prefix of the decoder's `layers`, `embed_tokens` and `norm`.
    pub decoder: &'static str,
    /// The untied head.
    pub head: &'static str,
    /// Prefix of the vision tower.
    pub tower: &'static str,
    /// Prefix of what joins the tower to the decoder; empty where that is a part of the tower.
    pub projector: &'static str,
}

impl Naming {
    /// The one of `known` by which the checkpoint calls its embedding.
    ///
    /// # Errors
    /// [`Error::Missing`] naming all candidates.
    pub fn of(checkpoint: &Checkpoint, known: &[Self]) -> Result<Self> {
        let embedding = |naming: &Self| format!("{}.embed_tokens.weight", naming.decoder);
        let found = known.iter().find(|n| checkpoint.contains(&embedding(n)));
        found.copied().ok_or_else(|| Error::Missing {
            what: known.iter().map(embedding).collect::<Vec<_>>().join(" or "),
            place: checkpoint.dir().display().to_string(),
        })
    }

    /// The names of the decoder's parts.
    pub fn names(&self) -> Names {
        Names {
            decoder: self.decoder.to_owned(),
            head: self.head.to_owned(),
        }
    }
}
