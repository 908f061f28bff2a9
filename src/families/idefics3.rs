//! Idefics3: a Llama decoder under text positions; SigLIP over square tiles and a connector of one
//! linear. SmolVLM differs by name only, and many of its checkpoints go by the name of Idefics3.

use super::Family;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::DecoderConfig;
use crate::model::vision::idefics3::Idefics3Vision;
use crate::model::vision::vit::{SIGLIP, SIGLIP_DEFAULTS, Vit, VitDefaults};
use crate::processor::idefics3::{Preprocessor, PromptTokens};
use crate::processor::{ImageProcessor, ImageSettings};

/// Idefics3.
pub const FAMILY: Family = Family {
    model_type: "idefics3",
    name: "Idefics3",
    architecture,
    images,
};

/// The defaults of transformers' Idefics3 tower.
const DEFAULTS: VitDefaults = VitDefaults {
    width: 1152,
    n_heads: 16,
    patch_size: 32,
    ..SIGLIP_DEFAULTS
};

const NAMES: [Naming; 1] = [Naming {
    decoder: "model.text_model",
    head: "lm_head.weight",
    tower: "model.vision_model",
    projector: "model.connector.modality_projection.proj",
}];

/// Bound of the connector's width, so that no product of sizes overflows.
const MAX_WIDTH: usize = 1 << 31;

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    architecture_of(checkpoint, FAMILY.model_type)
}

fn images(settings: &ImageSettings) -> Result<Box<dyn ImageProcessor>> {
    let tokens = PromptTokens::default();
    Ok(Box::new(Preprocessor::open(settings, tokens)?))
}

/// What a checkpoint of Idefics3 or SmolVLM is.
pub(super) fn architecture_of(
    checkpoint: &Checkpoint,
    family: &'static str,
) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let text = root.nested("text_config")?;
    let mut decoder = DecoderConfig::read(&root, &text, "llama")?;
    // transformers looks at the top level only.
    decoder.tie_word_embeddings = root.flag_or("tie_word_embeddings", false)?;
    let naming = Naming::of(checkpoint, &NAMES)?;
    let vision = vision(&root, &naming, decoder.hidden_size)?;
    Ok(Architecture {
        family,
        names: naming.names(),
        image_token_id: root.size_or("image_token_id", 128_257)? as u32,
        positions: PositionRule::Text,
        decoder,
        vision: Box::new(vision),
    })
}

fn vision(root: &ConfigNode, naming: &Naming, out_dim: usize) -> Result<Idefics3Vision> {
    let node = root.nested("vision_config")?;
    let mut vit = Vit::read(&node, naming.tower, SIGLIP, DEFAULTS)?;
    vit.with_post_norm = true;
    let (width, tile_side) = (vit.width, vit.tile_side);
    let scale_factor = root.size_or("scale_factor", 2)?;
    if tile_side % scale_factor != 0 || scale_factor * scale_factor * width >= MAX_WIDTH {
        let why = format!(
            "{scale_factor} × {scale_factor} of {tile_side} × {tile_side} patches cannot be joined"
        );
        return Err(root.invalid("scale_factor", why));
    }
    Ok(Idefics3Vision {
        vit,
        projection: naming.projector.to_owned(),
        scale_factor,
        out_dim,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::vision::activation::VisionActivation;
    use serde_json::{Value, json};
    use std::path::Path;

    fn read(config: &Value) -> Result<Idefics3Vision> {
        vision(&ConfigNode::root(Path::new("model"), config), &NAMES[0], 64)
    }

    #[test]
    fn patches_that_a_tile_has_no_room_for_are_left_out() {
        let config = json!({"scale_factor": 3, "vision_config": {
            "image_size": 384, "patch_size": 14, "num_hidden_layers": 27}});
        let found = read(&config).unwrap();
        assert_eq!(found.vit.tile_side, 27);
        assert_eq!(found.vit.width, 1152);
        assert_eq!(found.vit.activation, VisionActivation::GeluTanh);
        assert_eq!(found.scale_factor, 3);
    }

    #[test]
    fn sizes_that_cannot_be_name_their_key() {
        let wrong = |key: &str, value: usize| {
            let mut config = json!({"vision_config": {"image_size": 64, "patch_size": 16}});
            match key {
                "scale_factor" => config[key] = value.into(),
                _ => config["vision_config"][key] = value.into(),
            }
            read(&config).unwrap_err().to_string()
        };
        for (key, value) in [
            ("scale_factor", 3),
            ("scale_factor", 8),
            ("image_size", 15),
            ("image_size", 1 << 20),
            ("num_attention_heads", 7),
        ] {
            let message = wrong(key, value);
            assert!(message.contains(key), "{message}");
        }
    }
}
