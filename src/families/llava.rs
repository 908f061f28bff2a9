//! LLaVA: a vision transformer (CLIP, SigLIP or DINOv2), two linears, and a language model of the
//! usual kinds. LLaVA-1.5 sees one view of an image, LLaVA-NeXT and LLaVA-OneVision tiles of it too.
//!
//! Checkpoints of the first years keep the decoder at `language_model.model.…`, those saved by
//! transformers 4.52 and later at `model.language_model.…`; both are read.

use super::{Family, pixtral};
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::DecoderConfig;
use crate::model::vision::llava::{LlavaVision, TileFeatures};
use crate::model::vision::vit::{
    CLIP, CLIP_DEFAULTS, DINOV2, FeatureLayer, SIGLIP, SIGLIP_DEFAULTS, Vit, VitDefaults, VitNames,
};
use crate::processor::anyres::Packing;
use crate::processor::llava::{LlavaImages, TowerSettings, max_tiles_of};
use crate::processor::{ImageProcessor, ImageSettings, read_json};
use crate::{Error, Result};
use serde_json::Value;

/// LLaVA-1.5, and Pixtral, whose configuration is that of a LLaVA.
pub const LLAVA: Family = Family {
    model_type: "llava",
    name: "LLaVA-1.5",
    architecture: |checkpoint| match pixtral::is_pixtral(checkpoint.config()) {
        true => pixtral::of_llava(checkpoint),
        false => architecture(checkpoint, &SINGLE),
    },
    images: |settings| {
        if pixtral::is_pixtral(&settings.model) {
            return pixtral::images_of_llava(settings);
        }
        let images = LlavaImages::single(settings, SINGLE.tower_settings(settings)?)?;
        Ok(Box::new(images) as Box<dyn ImageProcessor>)
    },
};

/// LLaVA-NeXT.
pub const NEXT: Family = Family {
    model_type: "llava_next",
    name: "LLaVA-NeXT",
    architecture: |checkpoint| architecture(checkpoint, &TILED),
    images: |settings| {
        let images = LlavaImages::next(settings, TILED.tower_settings(settings)?)?;
        Ok(Box::new(images) as Box<dyn ImageProcessor>)
    },
};

/// LLaVA-OneVision.
pub const ONEVISION: Family = Family {
    model_type: "llava_onevision",
    name: "LLaVA-OneVision",
    architecture: |checkpoint| architecture(checkpoint, &SHRUNK),
    images: |settings| {
        let images = LlavaImages::onevision(settings, SHRUNK.tower_settings(settings)?)?;
        Ok(Box::new(images) as Box<dyn ImageProcessor>)
    },
};

/// What one of the three has where its configuration is silent.
struct Member {
    model_type: &'static str,
    tower: &'static str,
    text: &'static str,
    image_token_id: usize,
    /// Counted from the end, −1 being the last layer.
    feature_layer: i64,
    drops_class: bool,
    is_tiled: bool,
    is_shrunk: bool,
}

const SINGLE: Member = Member {
    model_type: "llava",
    tower: "clip_vision_model",
    text: "llama",
    image_token_id: 32_000,
    feature_layer: -2,
    drops_class: true,
    is_tiled: false,
    is_shrunk: false,
};

const TILED: Member = Member {
    model_type: "llava_next",
    is_tiled: true,
    ..SINGLE
};

const SHRUNK: Member = Member {
    model_type: "llava_onevision",
    tower: "siglip_vision_model",
    text: "qwen2",
    image_token_id: 151_646,
    feature_layer: -1,
    drops_class: false,
    is_tiled: true,
    is_shrunk: true,
};

/// The defaults of transformers' DINOv2.
const DINOV2_DEFAULTS: VitDefaults = VitDefaults {
    patch_size: 14,
    activation: "gelu",
    ..SIGLIP_DEFAULTS
};

/// Patches on a side of an image that a tower resamples its positions to.
const MAX_TILE_SIDE: usize = 128;

pub(super) const NAMES: [Naming; 2] = [
    Naming {
        decoder: "language_model.model",
        head: "language_model.lm_head.weight",
        tower: "vision_tower",
        projector: "multi_modal_projector",
    },
    Naming {
        decoder: "model.language_model",
        head: "lm_head.weight",
        tower: "model.vision_tower",
        projector: "model.multi_modal_projector",
    },
];

fn architecture(checkpoint: &Checkpoint, member: &Member) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let text = root.nested("text_config")?;
    let decoder = DecoderConfig::read(&root, &text, member.text)?;
    let naming = Naming::of(checkpoint, &NAMES)?;
    let act = root.text_or("projector_hidden_act", "gelu")?;
    if act != "gelu" {
        return Err(Error::Unsupported {
            what: format!("projector_hidden_act {act:?} in config.json; gelu is implemented"),
        });
    }
    let token = root.size_or("image_token_index", member.image_token_id)?;
    Ok(Architecture {
        family: member.model_type,
        names: naming.names(),
        vision: Box::new(member.vision(&root, checkpoint, naming, decoder.hidden_size)?),
        decoder,
        image_token_id: root.size_or("image_token_id", token)? as u32,
        positions: PositionRule::Text,
    })
}

impl Member {
    fn drops_class(&self, root: &Value) -> bool {
        match root["vision_feature_select_strategy"].as_str() {
            Some(strategy) => strategy == "default",
            None => self.drops_class,
        }
    }

    /// What the image processor must know of the tower.
    fn tower_settings(&self, settings: &ImageSettings) -> Result<TowerSettings> {
        let node = &settings.model["vision_config"];
        let kind = node["model_type"].as_str().unwrap_or(self.tower);
        let patch = node["patch_size"]
            .as_u64()
            .filter(|n| (1..=256).contains(n));
        let path = settings.path.with_file_name("config.json");
        let patch = patch
            .ok_or_else(|| Error::format(&path, "vision_config.patch_size", "1 to 256 expected"))?;
        Ok(TowerSettings {
            patch: patch as usize,
            keeps_class: names_of(kind)?.class.is_some() && !self.drops_class(&settings.model),
        })
    }

    fn vision(
        &self,
        root: &ConfigNode,
        checkpoint: &Checkpoint,
        naming: Naming,
        hidden: usize,
    ) -> Result<LlavaVision> {
        let node = root.nested("vision_config")?;
        let vit = self.vit(root, &node, checkpoint, naming.tower)?;
        let tiles = self
            .is_tiled
            .then(|| self.tile_features(root, &vit, naming));
        Ok(LlavaVision {
            drops_class: self.drops_class(checkpoint.config()),
            projector: naming.projector.to_owned(),
            has_bias: root.flag_or("multimodal_projector_bias", true)?,
            out_dim: hidden,
            tiles: tiles.transpose()?,
            vit,
        })
    }

    fn tile_features(&self, root: &ConfigNode, vit: &Vit, naming: Naming) -> Result<TileFeatures> {
        let max_tiles = self.is_shrunk.then(|| {
            let named = root.text_or("vision_aspect_ratio", "anyres_max_9")?;
            max_tiles_of(named)
        });
        let newline = match naming.decoder.starts_with("model.") {
            true => "model.image_newline",
            false => "image_newline",
        };
        Ok(TileFeatures {
            packing: Packing {
                side: vit.tile_side,
                max_tiles: max_tiles.transpose()?,
            },
            newline: newline.to_owned(),
        })
    }

    fn vit(
        &self,
        root: &ConfigNode,
        node: &ConfigNode,
        checkpoint: &Checkpoint,
        tower: &str,
    ) -> Result<Vit> {
        let kind = node.own_text("model_type").unwrap_or(self.tower);
        let names = names_of(kind)?;
        let (is_dino, is_clip) = (kind == "dinov2", kind == "clip_vision_model");
        if is_dino && node.flag_or("use_swiglu_ffn", false)? {
            return Err(Error::Unsupported {
                what: "use_swiglu_ffn of a dinov2 tower in config.json".into(),
            });
        }
        let defaults = match (is_clip, is_dino) {
            (true, _) => CLIP_DEFAULTS,
            (_, true) => DINOV2_DEFAULTS,
            _ => SIGLIP_DEFAULTS,
        };
        let prefix = tower_prefix(checkpoint, tower, names);
        let mut vit = Vit::read(node, &prefix, names, defaults)?;
        let key = "vision_feature_layer";
        vit.depth = FeatureLayer::read(root, key, self.feature_layer, vit.depth)?.depth;
        vit.qkv_bias = node.flag_or("qkv_bias", true)?;
        if is_dino {
            vit.mlp_dim = vit.width.saturating_mul(node.size_or("mlp_ratio", 4)?);
            let processed = processed_side(checkpoint)?.map(|side| side / vit.patch_size);
            vit.tile_side = processed.unwrap_or(vit.table_side).clamp(1, MAX_TILE_SIDE);
        }
        Ok(vit)
    }
}

fn names_of(kind: &str) -> Result<VitNames> {
    match kind {
        "clip_vision_model" => Ok(CLIP),
        "siglip_vision_model" => Ok(SIGLIP),
        "dinov2" => Ok(DINOV2),
        _ => Err(Error::Unsupported {
            what: format!(
                "vision tower {kind:?} in config.json; clip_vision_model, siglip_vision_model and \
                 dinov2 are implemented"
            ),
        }),
    }
}

/// Some releases of transformers put `vision_model` between.
pub(super) fn tower_prefix(checkpoint: &Checkpoint, tower: &str, names: VitNames) -> String {
    let nested = format!("{tower}.vision_model");
    match checkpoint.contains(&format!("{nested}.{}.weight", names.patch)) {
        true => nested,
        false => tower.to_owned(),
    }
}

/// Side of the images that the processor makes: a tower that resamples its positions takes any.
fn processed_side(checkpoint: &Checkpoint) -> Result<Option<usize>> {
    let own = read_json(&checkpoint.dir().join("preprocessor_config.json"))?;
    let joint = read_json(&checkpoint.dir().join("processor_config.json"))?;
    let joint = joint.map(|mut value| value["image_processor"].take());
    let found = [joint, own].into_iter().flatten().find_map(|settings| {
        let crop = settings["crop_size"]["height"].as_u64();
        crop.or_else(|| settings["size"]["height"].as_u64())
    });
    Ok(found
        .map(|side| side as usize)
        .filter(|side| *side <= 1 << 14))
}
