//! Qwen2-VL.
//!
//! Checkpoints on the hub use the names of their first release (`visual.…`, `model.layers.…`);
//! those saved by transformers 4.52 and later put `model.visual.` and `model.language_model.`
//! before them. Both are read, and an export keeps what it found.

use super::Family;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming, PositionRule};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::{DecoderConfig, RopeAxes};
use crate::model::vision::activation::VisionActivation;
use crate::model::vision::qwen::{MlpKind, QwenVision, Widths, decoder_width};
use crate::processor::{ImageProcessor, ImageSettings, qwen2_vl};

/// Qwen2-VL.
pub const FAMILY: Family = Family {
    model_type: "qwen2_vl",
    name: "Qwen2-VL",
    architecture,
    images,
};

/// The names of Qwen2-VL and Qwen2.5-VL.
pub(super) const NAMES: [Naming; 2] = [
    Naming {
        decoder: "model",
        head: "lm_head.weight",
        tower: "visual",
        projector: "",
    },
    Naming {
        decoder: "model.language_model",
        head: "lm_head.weight",
        tower: "model.visual",
        projector: "",
    },
];

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let decoder = decoder(&root)?;
    let naming = Naming::of(checkpoint, &NAMES)?;
    let vision = vision(&root, naming.tower, decoder.hidden_size)?;
    assembled(&FAMILY, &root, naming, decoder, vision)
}

/// What all Qwen-VL families have in common.
pub(super) fn assembled(
    family: &Family,
    root: &ConfigNode,
    naming: Naming,
    decoder: DecoderConfig,
    vision: QwenVision,
) -> Result<Architecture> {
    Ok(Architecture {
        family: family.model_type,
        names: naming.names(),
        image_token_id: root.size_or("image_token_id", 151_655)? as u32,
        positions: PositionRule::Multimodal {
            merge_size: vision.merge_size,
        },
        decoder,
        vision: Box::new(vision),
    })
}

/// The language model of Qwen2-VL and Qwen2.5-VL; hub files keep its keys at the top level.
pub(super) fn decoder(root: &ConfigNode) -> Result<DecoderConfig> {
    let text = root.nested_or_flat("text_config");
    let mut decoder = DecoderConfig::read(root, &text, "qwen2_vl")?;
    decoder.rotary.axes = RopeAxes::multimodal(&text, [16, 24, 24], decoder.head_dim, false)?;
    Ok(decoder)
}

fn vision(root: &ConfigNode, prefix: &str, hidden: usize) -> Result<QwenVision> {
    let node = root.nested("vision_config")?;
    let width = node.size_or("embed_dim", 1280)?;
    let ratio = node.positive_or("mlp_ratio", 4.0)?;
    let out_dim = node.size_or("hidden_size", 3584)?;
    let widths = Widths {
        width,
        mlp_dim: (width as f64 * ratio) as usize,
        out_dim: decoder_width(&node, "hidden_size", out_dim, hidden)?,
    };
    let mut vision = QwenVision::read(&node, prefix, widths, 14)?;
    vision.mlp = MlpKind::Plain {
        fc1: "mlp.fc1",
        fc2: "mlp.fc2",
        activation: VisionActivation::read(&node, "quick_gelu")?,
    };
    Ok(vision)
}

/// The image processor of all Qwen-VL families.
pub(super) fn images(settings: &ImageSettings) -> Result<Box<dyn ImageProcessor>> {
    Ok(Box::new(qwen2_vl::Preprocessor::open(settings)?))
}
