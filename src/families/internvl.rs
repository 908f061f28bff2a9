//! InternVL3: InternViT on tiles of an image, a projector of one norm and two linears, and a Qwen2,
//! Qwen3 or Llama decoder with text positions.
//!
//! There are two forms of its checkpoints: transformers' own (`internvl`, "-hf" on the hub), whose
//! parts have been called `language_model.model.…` and, since 4.52, `model.language_model.…`; and
//! OpenGVLab's (`internvl_chat`), which has other configuration keys and other names in the tower.

use super::{Family, llava};
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::DecoderConfig;
use crate::model::norm::NormKind;
use crate::model::vision::internvl::{InternVlVision, OPENGVLAB, ProjectorNames, TRANSFORMERS};
use crate::model::vision::qwen::bounded_product;
use crate::model::vision::vit::{FeatureLayer, Vit, VitDefaults, VitNames, patches_on};
use crate::processor::internvl::{CONTEXT_TOKEN, InternVlImages};
use crate::processor::{ImageProcessor, read_json};
use crate::{Error, Result};

/// InternVL3 as transformers keeps it.
pub const INTERNVL: Family = Family {
    model_type: "internvl",
    name: "InternVL3",
    architecture: |checkpoint| {
        let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
        let token = root.size_or("image_token_id", 151_667)? as u32;
        architecture(checkpoint, &root, &OF_TRANSFORMERS, token)
    },
    images: |settings| {
        let images = InternVlImages::transformers(settings)?;
        Ok(Box::new(images) as Box<dyn ImageProcessor>)
    },
};

/// InternVL3 as OpenGVLab published it.
pub const ORIGINAL: Family = Family {
    model_type: "internvl_chat",
    name: "InternVL3 (OpenGVLab)",
    architecture: |checkpoint| {
        let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
        // Without the key it is v1, whose tokens stand column by column.
        let order = root.text_or("ps_version", "v1")?;
        if order != "v2" {
            return Err(Error::Unsupported {
                what: format!("ps_version {order:?} in config.json; v2 is implemented"),
            });
        }
        architecture(
            checkpoint,
            &root,
            &OF_OPENGVLAB,
            context_token_id(checkpoint)?,
        )
    },
    images: |settings| {
        let images = InternVlImages::opengvlab(settings)?;
        Ok(Box::new(images) as Box<dyn ImageProcessor>)
    },
};

/// What the two forms call the same things, and what an absent key means in each.
struct Form {
    model_type: &'static str,
    names: &'static [Naming],
    tower: VitNames,
    projector: ProjectorNames,
    text: &'static str,
    qkv_bias: &'static str,
    qk_norm: &'static str,
    feature_layer: &'static str,
    /// Whether embeddings are tied where nothing is said.
    is_tied: bool,
    defaults: Defaults,
}

struct Defaults {
    tower: VitDefaults,
    qk_norm: bool,
    norm_type: &'static str,
}

const OF_TRANSFORMERS: Form = Form {
    model_type: "internvl",
    names: &llava::NAMES,
    tower: TRANSFORMERS,
    projector: ProjectorNames {
        norm: "layer_norm",
        fc1: "linear_1",
        fc2: "linear_2",
    },
    text: "text_config",
    qkv_bias: "attention_bias",
    qk_norm: "use_qk_norm",
    feature_layer: "vision_feature_layer",
    is_tied: true,
    defaults: Defaults {
        tower: VitDefaults {
            width: 1024,
            n_layers: 24,
            n_heads: 16,
            mlp_dim: 4096,
            image_size: 448,
            patch_size: 14,
            norm_eps: 1e-6,
            activation: "gelu",
        },
        qk_norm: false,
        norm_type: "layer_norm",
    },
};

const OF_OPENGVLAB: Form = Form {
    model_type: "internvl_chat",
    names: &[Naming {
        decoder: "language_model.model",
        head: "language_model.lm_head.weight",
        tower: "vision_model",
        projector: "mlp1",
    }],
    tower: OPENGVLAB,
    projector: ProjectorNames {
        norm: "0",
        fc1: "1",
        fc2: "3",
    },
    text: "llm_config",
    qkv_bias: "qkv_bias",
    qk_norm: "qk_normalization",
    feature_layer: "select_layer",
    is_tied: false,
    defaults: Defaults {
        tower: VitDefaults {
            width: 3200,
            n_layers: 48,
            n_heads: 25,
            mlp_dim: 12_800,
            image_size: 224,
            patch_size: 14,
            norm_eps: 1e-6,
            activation: "gelu",
        },
        qk_norm: true,
        norm_type: "rms_norm",
    },
};

fn architecture(
    checkpoint: &Checkpoint,
    root: &ConfigNode,
    form: &Form,
    image_token_id: u32,
) -> Result<Architecture> {
    let text = root.nested(form.text)?;
    if text.own_text("model_type") == Some("internlm2") {
        return Err(Error::Unsupported {
            what: format!(
                "language model \"internlm2\" in config.json: queries, keys and values are one \
                 matrix, wqkv, there; as {} of this family qwen2, qwen3 and llama are implemented",
                form.text
            ),
        });
    }
    for (key, expected) in [
        ("projector_hidden_act", "gelu"),
        ("vision_feature_select_strategy", "default"),
    ] {
        let found = root.text_or(key, expected)?;
        if found != expected {
            return Err(Error::Unsupported {
                what: format!("{key} {found:?} in config.json; {expected} is implemented"),
            });
        }
    }
    let mut decoder = DecoderConfig::read(root, &text, "qwen2")?;
    let naming = Naming::of(checkpoint, form.names)?;
    let is_silent = root.get("tie_word_embeddings").is_none();
    // A head of its own is used, whatever the configuration says.
    decoder.tie_word_embeddings = !checkpoint.contains(naming.head)
        && (decoder.tie_word_embeddings || (is_silent && form.is_tied));
    Ok(Architecture {
        family: form.model_type,
        names: naming.names(),
        vision: Box::new(form.vision(root, naming, decoder.hidden_size)?),
        decoder,
        image_token_id,
        positions: PositionRule::Text,
    })
}

impl Form {
    fn vision(&self, root: &ConfigNode, naming: Naming, hidden: usize) -> Result<InternVlVision> {
        let node = root.nested("vision_config")?;
        let vit = self.vit(root, &node, naming.tower)?;
        let ratio = root.positive_or("downsample_ratio", 0.5)?;
        let merge_size = [1usize, 2, 4]
            .into_iter()
            .find(|n| ratio * *n as f64 == 1.0);
        let merge_size = merge_size.filter(|n| vit.tile_side.is_multiple_of(*n));
        let merge_size = merge_size.ok_or_else(|| {
            let why = format!(
                "expected 1, 0.5 or 0.25 that divides the {} patches on a tile's side, found {ratio}",
                vit.tile_side
            );
            root.invalid("downsample_ratio", why)
        })?;
        bounded_product(&node, "hidden_size", &[vit.width, merge_size, merge_size])?;
        Ok(InternVlVision {
            vit,
            merge_size,
            projector: naming.projector.to_owned(),
            names: self.projector,
            out_dim: hidden,
        })
    }

    fn vit(&self, root: &ConfigNode, node: &ConfigNode, prefix: &str) -> Result<Vit> {
        let mut vit = Vit::read(node, prefix, self.tower_names(node)?, self.defaults.tower)?;
        let table = vit.table_side * vit.patch_size;
        vit.tile_side = patches_on(root, "force_image_size", table, vit.patch_size)?;
        let feature = FeatureLayer::read(root, self.feature_layer, -1, vit.depth)?;
        let pools = node.flag_or("use_mean_pooling", true)?;
        vit.depth = feature.depth;
        vit.qkv_bias = node.flag_or(self.qkv_bias, false)?;
        vit.with_post_norm = feature.is_output && !pools;
        Ok(vit)
    }

    /// The names of the tower, less what this one has not.
    fn tower_names(&self, node: &ConfigNode) -> Result<VitNames> {
        let unsupported = |what: String| Err(Error::Unsupported { what });
        if node.size_or("num_channels", 3)? != 3 {
            return unsupported("num_channels of vision_config in config.json other than 3".into());
        }
        if !node.flag_or("use_absolute_position_embeddings", true)? {
            return unsupported("use_absolute_position_embeddings: false in config.json".into());
        }
        let has_qk_norm = node.flag_or(self.qk_norm, self.defaults.qk_norm)?;
        // The norms of queries and keys have an epsilon of their own in transformers.
        if has_qk_norm && node.positive_or("layer_norm_eps", 1e-6)? != 1e-6 {
            let key = self.qk_norm;
            return unsupported(format!("{key} with a layer_norm_eps other than 1e-6"));
        }
        let layer_norms = match node.text_or("norm_type", self.defaults.norm_type)? {
            "layer_norm" => NormKind::Layer,
            "rms_norm" => NormKind::Rms,
            other => {
                return unsupported(format!("norm_type {other:?}; layer_norm or rms_norm"));
            }
        };
        Ok(VitNames {
            qk_norm: self.tower.qk_norm.filter(|_| has_qk_norm),
            layer_norms,
            ..self.tower
        })
    }
}

/// The id of the image token, which OpenGVLab's configurations leave to the tokenizer.
fn context_token_id(checkpoint: &Checkpoint) -> Result<u32> {
    let path = checkpoint.dir().join("tokenizer.json");
    let missing = |what: String| Error::Missing {
        what,
        place: path.display().to_string(),
    };
    let tokenizer = read_json(&path)?.ok_or_else(|| missing("the tokenizer".into()))?;
    let tokens = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let mut tokens = tokens.filter(|token| token["content"] == CONTEXT_TOKEN);
    let id = tokens.find_map(|token| u32::try_from(token["id"].as_u64()?).ok());
    id.ok_or_else(|| missing(format!("the token {CONTEXT_TOKEN}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn vision(form: &Form, config: &Value) -> Result<InternVlVision> {
        let root = ConfigNode::root(Path::new("."), config);
        form.vision(&root, form.names[0], 8)
    }

    #[test]
    fn positions_are_resampled_where_the_image_is_forced_to_another_size() {
        let found = vision(
            &OF_OPENGVLAB,
            &json!({"force_image_size": 448, "select_layer": -4, "vision_config": {}}),
        );
        let found = found.unwrap();
        assert_eq!((found.vit.table_side, found.vit.tile_side), (16, 32));
        assert_eq!((found.vit.depth, found.merge_size), (45, 2));
        assert_eq!(found.vit.names.layer_norms, NormKind::Rms);
        assert!(found.vit.names.qk_norm.is_some() && !found.vit.qkv_bias);
    }

    #[test]
    fn the_last_norm_is_that_of_the_output_only() {
        let with = |layer: i64, pools: bool| {
            let config = json!({"vision_feature_layer": layer,
                "vision_config": {"use_mean_pooling": pools, "image_size": [448, 448]}});
            let found = vision(&OF_TRANSFORMERS, &config).unwrap();
            (found.vit.depth, found.vit.with_post_norm)
        };
        assert_eq!(with(-1, false), (24, true));
        assert_eq!(with(-1, true), (24, false));
        assert_eq!(with(24, false), (24, false));
        assert_eq!(with(-2, false), (23, false));
    }

    #[test]
    fn what_is_not_handled_names_its_key() {
        for (key, config) in [
            (
                "downsample_ratio",
                json!({"downsample_ratio": 0.3, "vision_config": {}}),
            ),
            (
                "vision_feature_layer",
                json!({"vision_feature_layer": [1], "vision_config": {}}),
            ),
            (
                "vision_feature_layer",
                json!({"vision_feature_layer": 25, "vision_config": {}}),
            ),
            (
                "norm_type",
                json!({"vision_config": {"norm_type": "batch"}}),
            ),
            (
                "image_size",
                json!({"vision_config": {"image_size": [448, 224]}}),
            ),
            ("patch_size", json!({"vision_config": {"patch_size": 500}})),
            (
                "use_qk_norm",
                json!({"vision_config": {"use_qk_norm": true, "layer_norm_eps": 1e-5}}),
            ),
        ] {
            let message = vision(&OF_TRANSFORMERS, &config).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }
}
