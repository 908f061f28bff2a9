//! Qwen3-VL with mixtures of experts (30B-A3B, 235B-A22B): Qwen3-VL in all else.

use super::{Family, qwen2_vl, qwen3_vl};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::model::architecture::Architecture;

/// Qwen3-VL-MoE.
pub const FAMILY: Family = Family {
    model_type: "qwen3_vl_moe",
    name: "Qwen3-VL-MoE",
    architecture,
    images: qwen2_vl::images,
};

fn architecture(checkpoint: &Checkpoint) -> Result<Architecture> {
    qwen3_vl::read(checkpoint, &FAMILY, "qwen3_vl_moe_text")
}
