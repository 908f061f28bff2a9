//! Gemma 3: SigLIP at one square size, the means of squares of its features, and a decoder with
//! five windowed layers to each global one, in which the tokens of an image see each other.
//!
//! Checkpoints of the hub keep the decoder at `language_model.model.…`, those saved by transformers
//! 4.52 and later at `model.language_model.…`; both are read.

use super::{Family, llava};
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::{Ahead, DecoderConfig};
use crate::model::vision::gemma3::Gemma3Vision;
use crate::model::vision::vit::{SIGLIP, SIGLIP_DEFAULTS, Vit};
use crate::processor::gemma3::Gemma3Images;
use crate::processor::{ImageProcessor, ImageSettings};
use crate::{Error, Result};

/// Gemma 3.
pub const FAMILY: Family = Family {
    model_type: "gemma3",
    name: "Gemma 3",
    architecture,
    images,
};

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let text = root.nested("text_config")?;
    if text.flag_or("use_bidirectional_attention", false)? {
        return Err(Error::Unsupported {
            what: "use_bidirectional_attention: true in config.json".into(),
        });
    }
    let mut decoder = DecoderConfig::read(&root, &text, "gemma3_text")?;
    decoder.ahead = Ahead::Image;
    let naming = Naming::of(checkpoint, &llava::NAMES)?;
    let token = root.size_or("image_token_index", 262_144)?;
    Ok(Architecture {
        family: FAMILY.model_type,
        names: naming.names(),
        image_token_id: root.size_or("image_token_id", token)? as u32,
        positions: PositionRule::Text,
        vision: Box::new(vision(&root, checkpoint, naming, decoder.hidden_size)?),
        decoder,
    })
}

fn images(settings: &ImageSettings) -> Result<Box<dyn ImageProcessor>> {
    Ok(Box::new(Gemma3Images::open(settings)?))
}

fn vision(
    root: &ConfigNode,
    checkpoint: &Checkpoint,
    naming: Naming,
    hidden: usize,
) -> Result<Gemma3Vision> {
    let node = root.nested("vision_config")?;
    let prefix = llava::tower_prefix(checkpoint, naming.tower, SIGLIP);
    let vit = siglip(&node, prefix, FAMILY.model_type)?;
    let n_tokens = root.size_or("mm_tokens_per_image", 256)?;
    let tokens_side = n_tokens.isqrt();
    if tokens_side * tokens_side != n_tokens || vit.tile_side % tokens_side != 0 {
        let side = vit.tile_side;
        let why = format!("{n_tokens} tokens are no even division of {side} x {side} patches");
        return Err(root.invalid("mm_tokens_per_image", why));
    }
    Ok(Gemma3Vision {
        pool: vit.tile_side / tokens_side,
        projector: naming.projector.to_owned(),
        out_dim: hidden,
        vit,
    })
}

/// SigLIP with the norm after its last layer, as the tower of `family`.
pub(super) fn siglip(node: &ConfigNode, prefix: String, family: &str) -> Result<Vit> {
    let kind = node.own_text("model_type").unwrap_or("siglip_vision_model");
    if kind != "siglip_vision_model" {
        return Err(Error::Unsupported {
            what: format!("vision tower {kind:?} of {family}; siglip_vision_model is implemented"),
        });
    }
    let mut vit = Vit::read(node, &prefix, SIGLIP, SIGLIP_DEFAULTS)?;
    vit.with_post_norm = true;
    Ok(vit)
}
