//! Pixtral and Mistral Small 3: a tower that takes images of any size, two linears, and a Mistral
//! decoder. Pixtral is a LLaVA in its configuration, told by its tower; Mistral Small 3 joins
//! squares of patches before the linears.
//!
//! Checkpoints of the hub keep the decoder at `language_model.model.…`, those saved by transformers
//! 4.52 to 4.57 at `model.language_model.…`; both are read.

use super::{Family, llava};
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::DecoderConfig;
use crate::model::vision::activation::VisionActivation;
use crate::model::vision::pixtral::{PatchMerger, PixtralVision};
use crate::model::vision::qwen::bounded_product;
use crate::model::vision::vit::FeatureLayer;
use crate::processor::pixtral::{PixtralImages, merge_size};
use crate::processor::{ImageProcessor, ImageSettings};
use crate::{Error, Result};
use serde_json::Value;

/// Mistral Small 3.
pub const MISTRAL3: Family = Family {
    model_type: "mistral3",
    name: "Mistral Small 3",
    architecture: |checkpoint| architecture(checkpoint, &MERGED),
    images: |settings| {
        let images = PixtralImages::open(settings, merge_size(settings)?)?;
        Ok(Box::new(images) as Box<dyn ImageProcessor>)
    },
};

/// Whether this is the configuration of a LLaVA with Pixtral's tower.
pub(super) fn is_pixtral(config: &Value) -> bool {
    config["vision_config"]["model_type"] == TOWER
}

/// The architecture of a LLaVA with Pixtral's tower.
pub(super) fn of_llava(checkpoint: &Checkpoint) -> Result<Architecture> {
    architecture(checkpoint, &LLAVA)
}

/// The image processor of a LLaVA with Pixtral's tower.
pub(super) fn images_of_llava(settings: &ImageSettings) -> Result<Box<dyn ImageProcessor>> {
    Ok(Box::new(PixtralImages::open(settings, 1)?))
}

/// What one of the two has, and what an absent key means in it.
struct Form {
    model_type: &'static str,
    text: &'static str,
    image_token_id: usize,
    feature_layer: i64,
    projector_bias: bool,
    is_tied: bool,
    merges: bool,
    /// Whether there is a key that can have the first patch taken for a class token.
    has_strategy: bool,
}

const MERGED: Form = Form {
    model_type: "mistral3",
    text: "mistral",
    image_token_id: 10,
    feature_layer: -1,
    projector_bias: false,
    is_tied: true,
    merges: true,
    has_strategy: false,
};

const LLAVA: Form = Form {
    model_type: "llava",
    text: "llama",
    image_token_id: 32_000,
    feature_layer: -2,
    projector_bias: true,
    is_tied: false,
    merges: false,
    has_strategy: true,
};

/// `model_type` of the tower's configuration.
const TOWER: &str = "pixtral";
/// Bound of what a configuration may ask for, far above every published tower.
const MAX_PATCH: usize = 256;

fn architecture(checkpoint: &Checkpoint, form: &Form) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let text = root.nested("text_config")?;
    let mut decoder = DecoderConfig::read(&root, &text, form.text)?;
    let naming = Naming::of(checkpoint, &llava::NAMES)?;
    let is_silent = root.get("tie_word_embeddings").is_none();
    // A head of its own is used, whatever the configuration says.
    decoder.tie_word_embeddings = !checkpoint.contains(naming.head)
        && (decoder.tie_word_embeddings || (is_silent && form.is_tied));
    let token = root.size_or("image_token_index", form.image_token_id)?;
    Ok(Architecture {
        family: form.model_type,
        names: naming.names(),
        image_token_id: root.size_or("image_token_id", token)? as u32,
        positions: PositionRule::Text,
        vision: Box::new(form.vision(&root, naming, &decoder)?),
        decoder,
    })
}

impl Form {
    fn vision(
        &self,
        root: &ConfigNode,
        naming: Naming,
        decoder: &DecoderConfig,
    ) -> Result<PixtralVision> {
        self.refuse_what_is_not_handled(root)?;
        let node = root.nested("vision_config")?;
        let width = node.size_or("hidden_size", 1024)?;
        let patch_size = node.size_or("patch_size", 16)?;
        if patch_size > MAX_PATCH {
            let why = format!("{patch_size} pixels, at most {MAX_PATCH} expected");
            return Err(node.invalid("patch_size", why));
        }
        let n_layers = node.size_or("num_hidden_layers", 24)?;
        let layer = FeatureLayer::read(root, "vision_feature_layer", self.feature_layer, n_layers)?;
        let merger = self.merges.then(|| merger(root, width, decoder));
        Ok(PixtralVision {
            prefix: naming.tower.to_owned(),
            depth: layer.depth,
            width,
            n_heads: heads(&node, width)?,
            mlp_dim: node.size_or("intermediate_size", 4096)?,
            patch_size,
            rope_theta: rope_theta(&node)?,
            activation: VisionActivation::read(&node, "gelu")?,
            projector: naming.projector.to_owned(),
            projector_bias: root.flag_or("multimodal_projector_bias", self.projector_bias)?,
            merger: merger.transpose()?,
            out_dim: decoder.hidden_size,
        })
    }

    fn refuse_what_is_not_handled(&self, root: &ConfigNode) -> Result<()> {
        let unsupported = |what: String| Err(Error::Unsupported { what });
        let node = root.nested("vision_config")?;
        let kind = node.own_text("model_type").unwrap_or(TOWER);
        if kind != TOWER {
            let of = self.model_type;
            return unsupported(format!(
                "vision tower {kind:?} of {of} in config.json; {TOWER} is implemented"
            ));
        }
        if node.size_or("num_channels", 3)? != 3 {
            return unsupported("num_channels of vision_config in config.json other than 3".into());
        }
        let act = root.text_or("projector_hidden_act", "gelu")?;
        if act != "gelu" {
            return unsupported(format!(
                "projector_hidden_act {act:?} in config.json; gelu is implemented"
            ));
        }
        let strategy = root.text_or("vision_feature_select_strategy", "default")?;
        if self.has_strategy && strategy != "full" {
            return unsupported(format!(
                "vision_feature_select_strategy {strategy:?} with a {TOWER} tower, which has no \
                 class token, in config.json; full is implemented"
            ));
        }
        Ok(())
    }
}

fn merger(root: &ConfigNode, width: usize, decoder: &DecoderConfig) -> Result<PatchMerger> {
    let merge_size = root.size_or("spatial_merge_size", 2)?;
    bounded_product(root, "spatial_merge_size", &[width, merge_size, merge_size])?;
    Ok(PatchMerger {
        merge_size,
        norm_eps: decoder.rms_norm_eps as f32,
    })
}

/// Heads of the tower, which cut its width into pairs of channels.
fn heads(node: &ConfigNode, width: usize) -> Result<usize> {
    let n_heads = node.size_or("num_attention_heads", 16)?;
    if !width.is_multiple_of(n_heads) || !(width / n_heads).is_multiple_of(2) {
        let why = format!("{n_heads} heads do not cut the width {width} into pairs");
        return Err(node.invalid("num_attention_heads", why));
    }
    let head_dim = node.size_or("head_dim", width / n_heads)?;
    if head_dim != width / n_heads {
        return Err(Error::Unsupported {
            what: format!(
                "head_dim {head_dim} of vision_config in config.json; {} is, of {n_heads} heads \
                 over a width of {width}",
                width / n_heads
            ),
        });
    }
    Ok(n_heads)
}

/// The base of the rotary frequencies, at the top level in hub files.
fn rope_theta(node: &ConfigNode) -> Result<f64> {
    let rope = node
        .nested_or_flat("rope_scaling")
        .nested_or_flat("rope_parameters");
    let kind = rope.text_or("rope_type", rope.text_or("type", "axial")?)?;
    if !["axial", "default"].contains(&kind) {
        return Err(Error::Unsupported {
            what: format!("rope_type {kind:?} of vision_config in config.json; axial is"),
        });
    }
    rope.positive_or("rope_theta", 1e4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn vision(form: &Form, config: &Value) -> Result<PixtralVision> {
        let root = ConfigNode::root(Path::new("."), config);
        let decoder = DecoderConfig::small(8, 16, [2, 1, 4]);
        form.vision(&root, llava::NAMES[0], &decoder)
    }

    #[test]
    fn published_configurations_are_read() {
        let small = json!({"spatial_merge_size": 2, "vision_config": {"head_dim": 64,
            "hidden_act": "silu", "patch_size": 14, "rope_theta": 1e4, "model_type": "pixtral"}});
        let small = vision(&MERGED, &small).unwrap();
        assert_eq!((small.depth, small.width, small.n_heads), (24, 1024, 16));
        assert_eq!((small.merge_size(), small.projector_bias), (2, false));
        assert_eq!(small.activation, VisionActivation::Silu);
        let pixtral = json!({"vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            "vision_config": {"model_type": "pixtral", "rope_theta": 10000.0}});
        assert!(is_pixtral(&pixtral));
        let pixtral = vision(&LLAVA, &pixtral).unwrap();
        assert_eq!((pixtral.depth, pixtral.patch_size), (24, 16));
        assert_eq!((pixtral.merge_size(), pixtral.projector_bias), (1, true));
    }

    #[test]
    fn what_is_not_handled_names_its_key() {
        for (key, value) in [
            ("model_type", json!("clip_vision_model")),
            ("num_channels", json!(1)),
            ("patch_size", json!(1000)),
            ("patch_size", json!([14, 14])),
            ("num_attention_heads", json!(7)),
            ("head_dim", json!(32)),
            ("hidden_act", json!("relu")),
            ("rope_type", json!("yarn")),
        ] {
            let mut config = json!({"vision_config": {}});
            config["vision_config"][key] = value;
            let message = vision(&MERGED, &config).unwrap_err().to_string();
            let named = if key == "model_type" {
                "vision tower"
            } else {
                key
            };
            assert!(message.contains(named), "{message}");
        }
        for (key, value) in [
            ("projector_hidden_act", json!("relu")),
            ("spatial_merge_size", json!(1 << 20)),
            ("vision_feature_layer", json!([-1, -2])),
            ("vision_feature_layer", json!(25)),
        ] {
            let mut config = json!({"vision_config": {}});
            config[key] = value;
            let message = vision(&MERGED, &config).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
        let silent = vision(&LLAVA, &json!({"vision_config": {}})).unwrap_err();
        let key = "vision_feature_select_strategy";
        assert!(silent.to_string().contains(key), "{silent}");
    }
}
