//! PaliGemma: SigLIP at one square size, one linear, and a Gemma or Gemma 2 decoder in which all
//! tokens before the answer see each other.
//!
//! Checkpoints of the hub keep the decoder at `language_model.model.…`, those saved by transformers
//! 4.52 to 4.57 at `model.language_model.…`; both are read.

use super::gemma3::siglip;
use super::{Family, llava};
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::{Ahead, DecoderConfig};
use crate::model::vision::paligemma::PaliGemmaVision;
use crate::model::vision::vit::SIGLIP;
use crate::processor::paligemma::PaliGemmaImages;
use crate::processor::settings::Settings;
use crate::processor::{ImageProcessor, ImageSettings};
use crate::{Error, Result};

/// PaliGemma and PaliGemma 2.
pub const FAMILY: Family = Family {
    model_type: "paligemma",
    name: "PaliGemma",
    architecture,
    images,
};

/// Bound of what a configuration may ask for, far above every published tower.
const MAX_PATCH: usize = 256;

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let text = root.nested("text_config")?;
    if !text.flag_or("use_bidirectional_attention", true)? {
        return Err(Error::Unsupported {
            what: "use_bidirectional_attention: false of a PaliGemma in config.json".into(),
        });
    }
    let mut decoder = DecoderConfig::read(&root, &text, "gemma")?;
    decoder.ahead = Ahead::Prompt;
    let naming = Naming::of(checkpoint, &llava::NAMES)?;
    let token = root.size_or("image_token_index", 256_000)?;
    let tower = llava::tower_prefix(checkpoint, naming.tower, SIGLIP);
    Ok(Architecture {
        family: FAMILY.model_type,
        names: naming.names(),
        image_token_id: root.size_or("image_token_id", token)? as u32,
        positions: PositionRule::TextFromOne,
        vision: Box::new(PaliGemmaVision {
            vit: siglip(&root.nested("vision_config")?, tower, FAMILY.model_type)?,
            projector: format!("{}.linear", naming.projector),
            out_dim: decoder.hidden_size,
        }),
        decoder,
    })
}

fn images(settings: &ImageSettings) -> Result<Box<dyn ImageProcessor>> {
    let path = settings.path.with_file_name("config.json");
    let tower = Settings {
        path: &path,
        value: &settings.model["vision_config"],
    };
    let patch = tower.integer("patch_size", 16, MAX_PATCH)?;
    Ok(Box::new(PaliGemmaImages::open(settings, patch)?))
}
