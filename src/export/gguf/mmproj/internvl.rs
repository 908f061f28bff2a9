//! InternVL: InternViT, whose layers scale what they add, and a projector of one norm and two linears.
//! Checkpoints of transformers and of OpenGVLab have other names for the same parts.

use super::{Mmproj, Part, Sizes, Tower};
use crate::Result;
use crate::model::vision::internvl::{OPENGVLAB, TRANSFORMERS};
use crate::model::vision::vit::VitNames;
use crate::processor::internvl::{IMAGENET_MEAN, IMAGENET_STD};
use serde_json::json;

/// Where checkpoints of transformers keep tower and projector, by age.
const TOWERS: [&str; 2] = ["model.vision_tower", "vision_tower"];
const PROJECTORS: [&str; 2] = ["model.multi_modal_projector", "multi_modal_projector"];
/// Width and layers of the one tower whose norms llama.cpp does not centre.
const RMS_TOWER: [usize; 2] = [3200, 45];
/// Tiles of an image where the file says nothing.
const TILES: [usize; 2] = [1, 12];

impl Tower<'_> {
    /// InternVL as transformers has it.
    pub(super) fn internvl(mut self) -> Result<Mmproj> {
        let tower = self.prefix(&TOWERS, "embeddings.cls_token")?;
        let projector = self.prefix(&PROJECTORS, "linear_1.weight")?;
        let tiles = [
            self.images["min_patches"].as_u64(),
            self.images["max_patches"].as_u64(),
        ];
        self.internvl_keys(tiles)?;
        self.intern_vit(tower, &TRANSFORMERS)?;
        self.internvl_projector(projector, ["layer_norm", "linear_1", "linear_2"])?;
        Ok(self.done())
    }

    /// InternVL as OpenGVLab published it.
    pub(super) fn internvl_chat(mut self) -> Result<Mmproj> {
        // Most of these folders leave the preparation of images to the code beside them.
        for (key, default) in [("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)] {
            if self.images[key].is_null() {
                self.images[key] = json!(default);
            }
        }
        let tiles = ["min_dynamic_patch", "max_dynamic_patch"];
        let tiles = tiles.map(|key| self.root.get(key).and_then(|n| n.as_u64()));
        self.internvl_keys(tiles)?;
        self.intern_vit("vision_model", &OPENGVLAB)?;
        self.internvl_projector("mlp1", ["0", "1", "3"])?;
        Ok(self.done())
    }

    fn intern_vit(&mut self, prefix: &str, names: &VitNames) -> Result<()> {
        let size = self.architecture.vision.size();
        let first = format!("{prefix}.{}.0", names.layers);
        let is_centred = self
            .checkpoint
            .contains(&format!("{first}.{}.bias", names.norm1));
        if is_centred == ([size.width, size.depth] == RMS_TOWER) {
            let (width, depth) = (size.width, size.depth);
            return self.refuse(format!(
                "a tower of width {width} and {depth} layers with such norms"
            ));
        }
        if self.has_closing_norm()? {
            return self.refuse("a norm after the tower".into());
        }
        let names = VitNames {
            post_norm: None,
            ..*names
        };
        // llama.cpp puts the class token behind the patches, and adds the table to them as it is.
        // Its converter leaves the token's row first, and so every patch its neighbour's position.
        self.vit(prefix, &names, None, Part::ClassLast)
    }

    /// Whether the tower's output goes through a norm, as in transformers without pooling.
    fn has_closing_norm(&self) -> Result<bool> {
        let is_pooled = self.node.flag_or("use_mean_pooling", true)?;
        let is_output = self
            .root
            .get("vision_feature_layer")
            .and_then(|n| n.as_i64());
        let is_ours = self.architecture.family == "internvl";
        Ok(is_ours && !is_pooled && is_output.unwrap_or(-1) == -1)
    }

    fn internvl_keys(&mut self, tiles: [Option<u64>; 2]) -> Result<()> {
        // Both are written as a number or as a pair of equal ones.
        let side = |key: &str, default| match self.node.sizes_or(key, &[]) {
            Ok(sides) => Ok(sides.first().copied().unwrap_or(default)),
            Err(_) => self.node.size_or(key, default),
        };
        let sizes = Sizes {
            projector: "internvl",
            image: side("image_size", 448)?,
            patch: side("patch_size", 14)?,
            feed_forward: self.architecture.vision.size().mlp_dim,
            norm_eps: self.node.positive_or("layer_norm_eps", 1e-6)?,
        };
        self.common_keys(sizes)?;
        self.activation("gelu")?;
        let ratio = self.root.positive_or("downsample_ratio", 0.5)?;
        self.size("projector.scale_factor", (1.0 / ratio) as usize);
        let keys = ["preproc_min_tiles", "preproc_max_tiles"];
        for ((key, tiles), default) in keys.into_iter().zip(tiles).zip(TILES) {
            if let Some(n) = tiles.map(|n| n as usize).filter(|n| *n != default) {
                self.size(key, n);
            }
        }
        Ok(())
    }

    fn internvl_projector(&mut self, from: &str, parts: [&str; 3]) -> Result<()> {
        for (part, number) in parts.into_iter().zip([0, 1, 3]) {
            self.pair(&format!("{from}.{part}"), &format!("mm.model.mlp.{number}"))?;
        }
        Ok(())
    }
}
