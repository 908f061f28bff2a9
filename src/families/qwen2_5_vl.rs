//! Qwen2.5-VL: the decoder and the names of Qwen2-VL; a tower with RMS norms, gated MLPs and attention
//! within windows.

use super::{Family, qwen2_vl};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::architecture::{Architecture, Naming};
use crate::model::config::ConfigNode;
use crate::model::norm::NormKind;
use crate::model::vision::qwen::{MlpKind, QwenVision, Widths, Windows, decoder_width};

/// Qwen2.5-VL.
pub const FAMILY: Family = Family {
    model_type: "qwen2_5_vl",
    name: "Qwen2.5-VL",
    architecture,
    images: qwen2_vl::images,
};

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let decoder = qwen2_vl::decoder(&root)?;
    let naming = Naming::of(checkpoint, &qwen2_vl::NAMES)?;
    let vision = vision(&root, naming.tower, decoder.hidden_size)?;
    qwen2_vl::assembled(&FAMILY, &root, naming, decoder, vision)
}

fn vision(root: &ConfigNode, prefix: &str, hidden: usize) -> Result<QwenVision> {
    let node = root.nested("vision_config")?;
    let out_dim = node.size_or("out_hidden_size", 3584)?;
    let widths = Widths {
        width: node.size_or("hidden_size", 3584)?,
        mlp_dim: node.size_or("intermediate_size", 3420)?,
        out_dim: decoder_width(&node, "out_hidden_size", out_dim, hidden)?,
    };
    let mut vision = QwenVision::read(&node, prefix, widths, 14)?;
    let window = node.size_or("window_size", 112)?;
    let side = window / vision.merge_size / node.size_or("patch_size", 14)?;
    if side == 0 {
        return Err(node.invalid("window_size", format!("{window} pixels hold no token")));
    }
    vision.norm = NormKind::Rms;
    vision.mlp = MlpKind::Gated;
    vision.windows = Some(Windows {
        side,
        full_layers: node.sizes_or("fullatt_block_indexes", &[7, 15, 23, 31])?,
    });
    Ok(vision)
}
