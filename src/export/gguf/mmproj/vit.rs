//! The plain vision transformers: SigLIP of Idefics3 and SmolVLM, CLIP and SigLIP of LLaVA, InternViT.

use super::{Mmproj, Part, Sizes, TensorType, Tower, Value, patch_kind};
use crate::model::vision::vit::{CLIP, QkvNames, SIGLIP, VitNames};
use crate::{Error, Result};

/// Where checkpoints keep the tower, by family and age.
const PREFIXES: [&str; 5] = [
    "model.vision_model",
    "vision_tower.vision_model",
    "vision_tower",
    "model.vision_tower.vision_model",
    "model.vision_tower",
];
const PATCHES: &str = "embeddings.patch_embedding.weight";
const POSITIONS: &str = "embeddings.position_embedding.weight";

impl Tower<'_> {
    /// Idefics3 and SmolVLM.
    pub(super) fn idefics3(mut self) -> Result<Mmproj> {
        let prefix = self.prefix(&PREFIXES, PATCHES)?;
        let eps = self.node.positive_or("layer_norm_eps", 1e-6)?;
        let image = self.vit_keys(prefix, "idefics3", eps)?;
        let scale = self.root.size_or("scale_factor", 2)?;
        self.size("projector.scale_factor", scale);
        self.activation("gelu_pytorch_tanh")?;
        let edge = self.images["size"]["longest_edge"].as_u64();
        let edge = edge.and_then(|n| usize::try_from(n).ok()).unwrap_or(image);
        self.size("preproc_image_size", edge);
        self.vit(prefix, &SIGLIP, Some(TensorType::F32), Part::Whole)?;
        let projection = "model.connector.modality_projection.proj";
        self.pair(projection, "mm.model.fc")?;
        Ok(self.done())
    }

    /// LLaVA-1.5.
    pub(super) fn llava(mut self) -> Result<Mmproj> {
        let kind = self
            .node
            .own_text("model_type")
            .unwrap_or("clip_vision_model");
        if !["clip_vision_model", "siglip_vision_model"].contains(&kind) {
            return self.refuse(format!("a vision tower {kind}"));
        }
        let prefix = self.prefix(&PREFIXES, PATCHES)?;
        let is_clip = kind == "clip_vision_model";
        let eps = self
            .node
            .positive_or("layer_norm_eps", if is_clip { 1e-5 } else { 1e-6 })?;
        self.vit_keys(prefix, "mlp", eps)?;
        self.activation(if is_clip {
            "quick_gelu"
        } else {
            "gelu_pytorch_tanh"
        })?;
        // Without this key the last layer of the file would be left out.
        let depth = self.architecture.vision.size().depth as i32;
        self.key("vision.feature_layer", Value::I32s(vec![depth]));
        let names = VitNames {
            post_norm: None,
            ..if is_clip { CLIP } else { SIGLIP }
        };
        self.vit(prefix, &names, None, Part::Whole)?;
        let projectors = ["multi_modal_projector", "model.multi_modal_projector"];
        let projector = self.prefix(&projectors, "linear_1.weight")?;
        if !self
            .checkpoint
            .contains(&format!("{projector}.linear_1.bias"))
        {
            return self.refuse("a projector without biases".into());
        }
        self.pair(&format!("{projector}.linear_1"), "mm.0")?;
        self.pair(&format!("{projector}.linear_2"), "mm.2")?;
        Ok(self.done())
    }

    /// The common keys; returns the pixels on an image's side.
    fn vit_keys(&mut self, prefix: &str, projector: &'static str, norm_eps: f64) -> Result<usize> {
        let tensor = format!("{prefix}.{PATCHES}");
        let (_, shape) = self.require(&tensor)?;
        let [_, _, patch, _] = *shape else {
            return Err(Error::Shape {
                module: tensor,
                expected: vec![self.architecture.vision.size().width, 3, 0, 0],
                found: shape.to_vec(),
            });
        };
        let (_, table) = self.require(&format!("{prefix}.{POSITIONS}"))?;
        let side = table.first().map_or(0, |n| n.isqrt());
        let image = self.node.size_or("image_size", side * patch)?;
        self.common_keys(Sizes {
            projector,
            image,
            patch,
            feed_forward: self.architecture.vision.size().mlp_dim,
            norm_eps,
        })?;
        Ok(image)
    }

    /// The key of the MLP's activation, of which quick_gelu is what is taken without.
    pub(super) fn activation(&mut self, default: &'static str) -> Result<()> {
        match self.node.text_or("hidden_act", default)? {
            "quick_gelu" => {}
            "gelu" | "gelu_pytorch_tanh" => self.key("use_gelu", Value::Bool(true)),
            "silu" => self.key("use_silu", Value::Bool(true)),
            other => return self.refuse(format!("hidden_act {other}")),
        }
        Ok(())
    }

    /// The transformer: what goes in, the layers that are run, and the norm after them if `names` have one.
    /// The patches' convolution is of the type `patches`, or else of that of [`patch_kind`].
    pub(super) fn vit(
        &mut self,
        prefix: &str,
        names: &VitNames,
        patches: Option<TensorType>,
        positions: Part,
    ) -> Result<()> {
        let of_tower = |name: &str| format!("{prefix}.{name}");
        let tensor = of_tower(&format!("{}.weight", names.patch));
        let kind = patches.unwrap_or(patch_kind(self.require(&tensor)?.0));
        self.add(&tensor, "v.patch_embd.weight", Part::Whole, Some(kind))?;
        self.add_if_there(
            &of_tower(&format!("{}.bias", names.patch)),
            "v.patch_embd.bias",
        )?;
        let kind = Some(TensorType::F32);
        if let Some(class) = names.class {
            self.add(&of_tower(class), "v.class_embd", Part::Whole, kind)?;
        }
        let table = of_tower(names.positions);
        self.add(&table, "v.position_embd.weight", positions, kind)?;
        if let Some(norm) = names.pre_norm {
            self.pair(&of_tower(norm), "v.pre_ln")?;
        }
        for layer in 0..self.architecture.vision.size().depth {
            let from = of_tower(&format!("{}.{layer}", names.layers));
            self.vit_layer(&from, &format!("v.blk.{layer}"), names)?;
        }
        if let Some(norm) = names.post_norm {
            self.pair(&of_tower(norm), "v.post_ln")?;
        }
        Ok(())
    }

    fn vit_layer(&mut self, from: &str, to: &str, names: &VitNames) -> Result<()> {
        let qkv = ["attn_q", "attn_k", "attn_v"];
        match names.qkv {
            QkvNames::Fused(module) => self.split_qkv(&format!("{from}.{module}"), to)?,
            QkvNames::Separate(modules) => {
                for (module, name) in modules.iter().zip(qkv) {
                    self.pair(&format!("{from}.{module}"), &format!("{to}.{name}"))?;
                }
            }
        }
        for (module, name) in [
            (names.out, "attn_out"),
            (names.norm1, "ln1"),
            (names.norm2, "ln2"),
            (names.fc1, "ffn_up"),
            (names.fc2, "ffn_down"),
        ] {
            self.pair(&format!("{from}.{module}"), &format!("{to}.{name}"))?;
        }
        for (norm, name) in names
            .qk_norm
            .iter()
            .flatten()
            .zip(["attn_q_norm", "attn_k_norm"])
        {
            self.add_if_there(
                &format!("{from}.{norm}.weight"),
                &format!("{to}.{name}.weight"),
            )?;
        }
        for (factor, name) in names.scales.iter().flatten().zip(["ls1", "ls2"]) {
            let factor = format!("{from}.{factor}");
            self.add(&factor, &format!("{to}.{name}.weight"), Part::Whole, None)?;
        }
        Ok(())
    }
}
