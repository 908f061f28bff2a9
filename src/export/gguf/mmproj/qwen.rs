//! The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose projectors are their mergers.

use super::{Mmproj, Part, Sizes, TensorType, Tower, Value, patch_kind};
use crate::Result;

/// Where checkpoints keep the tower, by age.
const PREFIXES: [&str; 2] = ["visual", "model.visual"];
const PATCHES: &str = "patch_embed.proj.weight";
/// Epsilon of all norms, which no configuration key changes.
const NORM_EPS: f64 = 1e-6;
/// Pixels on a window's side, which llama.cpp knows by itself.
const WINDOW: usize = 112;

impl Tower<'_> {
    /// Qwen2-VL, or Qwen2.5-VL with its windows and gates.
    pub(super) fn qwen2(mut self, is_newer: bool) -> Result<Mmproj> {
        let prefix = self.prefix(&PREFIXES, PATCHES)?;
        self.qwen2_keys(is_newer)?;
        self.patches(prefix)?;
        let mlp: &[(&str, &str)] = match is_newer {
            true => &[
                ("mlp.gate_proj", "ffn_gate"),
                ("mlp.up_proj", "ffn_up"),
                ("mlp.down_proj", "ffn_down"),
            ],
            false => &[("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down")],
        };
        let others = [
            ("attn.proj", "attn_out"),
            ("norm1", "ln1"),
            ("norm2", "ln2"),
        ];
        for layer in 0..self.architecture.vision.size().depth {
            let (from, to) = (format!("{prefix}.blocks.{layer}"), format!("v.blk.{layer}"));
            self.split_qkv(&format!("{from}.attn.qkv"), &to)?;
            for (module, name) in mlp.iter().chain(&others) {
                self.pair(&format!("{from}.{module}"), &format!("{to}.{name}"))?;
            }
        }
        self.pair(&format!("{prefix}.merger.ln_q"), "v.post_ln")?;
        self.pair(&format!("{prefix}.merger.mlp.0"), "mm.0")?;
        self.pair(&format!("{prefix}.merger.mlp.2"), "mm.2")?;
        Ok(self.done())
    }

    fn qwen2_keys(&mut self, is_newer: bool) -> Result<()> {
        let merge = self.node.size_or("spatial_merge_size", 2)?;
        if merge != 2 {
            return self.refuse(format!("spatial_merge_size {merge}"));
        }
        let expected = if is_newer { "silu" } else { "quick_gelu" };
        let act = self.node.text_or("hidden_act", expected)?;
        if act != expected {
            return self.refuse(format!("hidden_act {act}"));
        }
        // The converter reads the key that is the decoder's width here; readers go by the tensors.
        let feed_forward = match is_newer {
            true => self.architecture.vision.size().mlp_dim,
            false => self.architecture.decoder.hidden_size,
        };
        let projector = match is_newer {
            true => "qwen2.5vl_merger",
            false => "qwen2vl_merger",
        };
        self.common_keys(Sizes {
            projector,
            image: self.node.size_or("image_size", 560)?,
            patch: self.node.size_or("patch_size", 14)?,
            feed_forward,
            norm_eps: NORM_EPS,
        })?;
        if is_newer {
            self.key("use_silu", Value::Bool(true));
            let pattern = self.window_pattern()?;
            self.size("n_wa_pattern", pattern);
        }
        Ok(())
    }

    /// Qwen3-VL.
    pub(super) fn qwen3(mut self) -> Result<Mmproj> {
        let prefix = self.prefix(&PREFIXES, PATCHES)?;
        let depth = self.architecture.vision.size().depth;
        let deep = self
            .node
            .sizes_or("deepstack_visual_indexes", &[8, 16, 24])?;
        self.qwen3_keys((0..depth).map(|layer| deep.contains(&layer)).collect())?;
        self.patches(prefix)?;
        let bias = format!("{prefix}.patch_embed.proj.bias");
        self.add(&bias, "v.patch_embd.bias", Part::Whole, None)?;
        let positions = format!("{prefix}.pos_embed.weight");
        let kind = Some(TensorType::F32);
        self.add(&positions, "v.position_embd.weight", Part::Whole, kind)?;
        for layer in 0..depth {
            let (from, to) = (format!("{prefix}.blocks.{layer}"), format!("v.blk.{layer}"));
            for (module, name) in [
                ("attn.qkv", "attn_qkv"),
                ("attn.proj", "attn_out"),
                ("mlp.linear_fc1", "ffn_up"),
                ("mlp.linear_fc2", "ffn_down"),
                ("norm1", "ln1"),
                ("norm2", "ln2"),
            ] {
                self.pair(&format!("{from}.{module}"), &format!("{to}.{name}"))?;
            }
        }
        let names = ["norm", "linear_fc1", "linear_fc2"];
        for (index, layer) in deep.iter().enumerate() {
            let from = format!("{prefix}.deepstack_merger_list.{index}");
            for (module, name) in names.iter().zip(["norm", "fc1", "fc2"]) {
                let name = format!("v.deepstack.{layer}.{name}");
                self.pair(&format!("{from}.{module}"), &name)?;
            }
        }
        for (module, name) in names.iter().zip(["v.post_ln", "mm.0", "mm.2"]) {
            self.pair(&format!("{prefix}.merger.{module}"), name)?;
        }
        Ok(self.done())
    }

    fn qwen3_keys(&mut self, is_deep: Vec<bool>) -> Result<()> {
        let patch = self.node.size_or("patch_size", 16)?;
        let n_positions = self.node.size_or("num_position_embeddings", 2304)?;
        self.common_keys(Sizes {
            projector: "qwen3vl_merger",
            image: self
                .node
                .size_or("image_size", n_positions.isqrt() * patch)?,
            patch,
            feed_forward: self.architecture.vision.size().mlp_dim,
            norm_eps: self.architecture.decoder.rms_norm_eps,
        })?;
        self.key("use_gelu", Value::Bool(true));
        let merge = self.node.size_or("spatial_merge_size", 2)?;
        self.size("spatial_merge_size", merge);
        self.key("vision.is_deepstack_layers", Value::Bools(is_deep));
        Ok(())
    }

    /// The convolution over two frames as two over one each.
    fn patches(&mut self, prefix: &str) -> Result<()> {
        let tensor = format!("{prefix}.{PATCHES}");
        let (dtype, shape) = self.require(&tensor)?;
        let kind = Some(patch_kind(dtype));
        if shape.get(2) != Some(&2) {
            return self.refuse(format!(
                "{tensor} of shape {shape:?}, other than of two frames,"
            ));
        }
        self.add(&tensor, "v.patch_embd.weight", Part::Frame(0), kind)?;
        self.add(&tensor, "v.patch_embd.weight.1", Part::Frame(1), kind)
    }

    /// Each how manieth layer sees whole frames.
    fn window_pattern(&self) -> Result<usize> {
        let window = self.node.size_or("window_size", WINDOW)?;
        if window != WINDOW {
            return self.refuse(format!("window_size {window}, other than {WINDOW},"));
        }
        let full = self
            .node
            .sizes_or("fullatt_block_indexes", &[7, 15, 23, 31])?;
        let pattern = full.first().map_or(0, |first| first + 1);
        let is_even = full
            .windows(2)
            .all(|pair| pair[1].checked_sub(pair[0]) == Some(pattern));
        match is_even && pattern > 0 {
            true => Ok(pattern),
            false => self.refuse(format!(
                "fullatt_block_indexes {full:?}, which are not even,"
            )),
        }
    }
}
