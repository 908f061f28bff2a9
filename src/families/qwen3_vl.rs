//! Qwen3-VL (dense): a Qwen3 decoder with interleaved M-RoPE; a tower with learned positions beside
//! the rotary ones, three of whose layers feed the decoder's first layers too (DeepStack).

use super::{Family, qwen2_vl};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming};
use crate::model::config::ConfigNode;
use crate::model::decoder_config::{DecoderConfig, RopeAxes};
use crate::model::vision::activation::VisionActivation;
use crate::model::vision::qwen::{MergerNames, MlpKind, QwenVision, Widths, decoder_width};

/// Qwen3-VL.
pub const FAMILY: Family = Family {
    model_type: "qwen3_vl",
    name: "Qwen3-VL",
    architecture,
    images: qwen2_vl::images,
};

const NAMES: [Naming; 1] = [Naming {
    decoder: "model.language_model",
    head: "lm_head.weight",
    tower: "model.visual",
    projector: "",
}];

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    read(checkpoint, &FAMILY, "qwen3_vl_text")
}

/// Reads a member of the family, whose language model is of `kind` where it does not say.
pub(super) fn read(checkpoint: &Checkpoint, family: &Family, kind: &str) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let text = root.nested("text_config")?;
    let mut decoder = DecoderConfig::read(&root, &text, kind)?;
    decoder.rotary.axes = RopeAxes::multimodal(&text, [24, 20, 20], decoder.head_dim, true)?;
    let naming = Naming::of(checkpoint, &NAMES)?;
    let vision = vision(&root, naming.tower, decoder.hidden_size)?;
    qwen2_vl::assembled(family, &root, naming, decoder, vision)
}

fn vision(root: &ConfigNode, prefix: &str, hidden: usize) -> Result<QwenVision> {
    let node = root.nested("vision_config")?;
    let out_dim = node.size_or("out_hidden_size", 3584)?;
    let widths = Widths {
        width: node.size_or("hidden_size", 1152)?,
        mlp_dim: node.size_or("intermediate_size", 4304)?,
        out_dim: decoder_width(&node, "out_hidden_size", out_dim, hidden)?,
    };
    let mut vision = QwenVision::read(&node, prefix, widths, 16)?;
    vision.depth = node.size_or("depth", 27)?;
    vision.mlp = MlpKind::Plain {
        fc1: "mlp.linear_fc1",
        fc2: "mlp.linear_fc2",
        activation: VisionActivation::read(&node, "gelu_pytorch_tanh")?,
    };
    vision.patch_bias = true;
    let n_positions = node.size_or("num_position_embeddings", 2304)?;
    let side = n_positions.isqrt();
    if side * side != n_positions {
        let why = format!("{n_positions} is no square");
        return Err(node.invalid("num_position_embeddings", why));
    }
    vision.positions_side = Some(side);
    vision.deepstack_layers = node.sizes_or("deepstack_visual_indexes", &[8, 16, 24])?;
    if let Some(layer) = vision.deepstack_layers.iter().find(|&&l| l >= vision.depth) {
        let why = format!("layer {layer} of a tower with {}", vision.depth);
        return Err(node.invalid("deepstack_visual_indexes", why));
    }
    vision.merger = MergerNames {
        norm: "norm",
        fc1: "linear_fc1",
        fc2: "linear_fc2",
    };
    Ok(vision)
}
