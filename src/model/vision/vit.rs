//! The plain vision transformer of CLIP, SigLIP, InternViT and DINOv2: tiles of one size, each a
//! sequence of patches with learned positions, of which every token sees all of its tile. In what
//! these differ, their names above all, is data ([`Vit`]).
//!
//! Source: arXiv:2010.11929; transformers `CLIPVisionModel`, `SiglipVisionModel`,
//! `InternVLVisionModel`, `Dinov2Model`.

mod tower;

use super::VisionSize;
use super::activation::VisionActivation;
use crate::checkpoint::Checkpoint;
use crate::model::config::ConfigNode;
use crate::model::device::ModelDevice;
use crate::model::norm::NormKind;
use crate::{Error, Result};
use serde_json::Value;
pub use tower::VitTower;

/// A vision transformer as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Vit {
    /// Where the checkpoint keeps it, e.g. `vision_tower.vision_model`.
    pub prefix: String,
    /// Names inside it.
    pub names: VitNames,
    /// Layers that are run; the checkpoint may hold more.
    pub depth: usize,
    /// Width of the tower.
    pub width: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Patches on a side of a tile.
    pub tile_side: usize,
    /// Patches on a side of the table of learned positions.
    pub table_side: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Of the MLP.
    pub activation: VisionActivation,
    /// Whether the linears of q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the norm after the last layer is run: not for features of an inner layer.
    pub with_post_norm: bool,
}

/// Names inside a vision transformer; what is `None` is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VitNames {
    /// The token before the patches.
    pub class: Option<&'static str>,
    /// The convolution over patches, without `.weight`.
    pub patch: &'static str,
    /// Whether it has a bias.
    pub patch_bias: bool,
    /// The learned positions, the class token's first.
    pub positions: &'static str,
    /// The norm before the first layer.
    pub pre_norm: Option<&'static str>,
    /// The list of layers.
    pub layers: &'static str,
    /// Queries, keys and values.
    pub qkv: QkvNames,
    /// The norms of whole queries and keys, before they are cut into heads.
    pub qk_norm: Option<[&'static str; 2]>,
    /// Output of attention.
    pub out: &'static str,
    /// The norm before attention.
    pub norm1: &'static str,
    /// The norm before the MLP.
    pub norm2: &'static str,
    /// Of which kind both are.
    pub layer_norms: NormKind,
    /// First linear of the MLP.
    pub fc1: &'static str,
    /// Second linear of the MLP.
    pub fc2: &'static str,
    /// Factors on the outputs of attention and MLP, channel by channel.
    pub scales: Option<[&'static str; 2]>,
    /// The norm after the last layer.
    pub post_norm: Option<&'static str>,
}

/// Names of the linears of queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvNames {
    /// One for each.
    Separate([&'static str; 3]),
    /// One for all, their outputs side by side.
    Fused(&'static str),
}

/// The names in transformers' CLIP, whose class token comes first.
pub const CLIP: VitNames = VitNames {
    class: Some("embeddings.class_embedding"),
    patch: "embeddings.patch_embedding",
    patch_bias: false,
    positions: "embeddings.position_embedding.weight",
    pre_norm: Some("pre_layrnorm"),
    layers: "encoder.layers",
    qkv: QkvNames::Separate(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    qk_norm: None,
    out: "self_attn.out_proj",
    norm1: "layer_norm1",
    norm2: "layer_norm2",
    layer_norms: NormKind::Layer,
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    scales: None,
    post_norm: Some("post_layernorm"),
};

/// The names in transformers' SigLIP.
pub const SIGLIP: VitNames = VitNames {
    class: None,
    patch_bias: true,
    pre_norm: None,
    ..CLIP
};

/// The names in the files of DINOv2, and of transformers up to 5.
pub const DINOV2: VitNames = VitNames {
    class: Some("embeddings.cls_token"),
    patch: "embeddings.patch_embeddings.projection",
    patch_bias: true,
    positions: "embeddings.position_embeddings",
    pre_norm: None,
    layers: "encoder.layer",
    qkv: QkvNames::Separate([
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ]),
    qk_norm: None,
    out: "attention.output.dense",
    norm1: "norm1",
    norm2: "norm2",
    layer_norms: NormKind::Layer,
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
    scales: Some(["layer_scale1.lambda1", "layer_scale2.lambda1"]),
    post_norm: Some("layernorm"),
};

/// What transformers takes where a tower's configuration says nothing.
#[derive(Clone, Copy, Debug)]
pub struct VitDefaults {
    /// Width of the tower.
    pub width: usize,
    /// Transformer layers.
    pub n_layers: usize,
    /// Attention heads.
    pub n_heads: usize,
    /// Width inside the MLP.
    pub mlp_dim: usize,
    /// Pixels on a side of a tile.
    pub image_size: usize,
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Of the MLP.
    pub activation: &'static str,
}

/// The defaults of transformers' SigLIP.
pub const SIGLIP_DEFAULTS: VitDefaults = VitDefaults {
    width: 768,
    n_layers: 12,
    n_heads: 12,
    mlp_dim: 3072,
    image_size: 224,
    patch_size: 16,
    norm_eps: 1e-6,
    activation: "gelu_pytorch_tanh",
};

/// The defaults of transformers' CLIP.
pub const CLIP_DEFAULTS: VitDefaults = VitDefaults {
    patch_size: 32,
    norm_eps: 1e-5,
    activation: "quick_gelu",
    ..SIGLIP_DEFAULTS
};

/// Bounds of what a configuration may ask for, far above every published tower.
const MAX_PATCH: usize = 256;
const MAX_SIDE: usize = 256;

impl Vit {
    /// Reads the keys that all towers of this kind share: all layers of it, biases for q, k and v, and
    /// no norm after the last layer.
    ///
    /// # Errors
    /// [`Error::Format`] for an ill-typed or contradictory key, [`Error::Unsupported`] for an unknown
    /// activation.
    pub fn read(
        node: &ConfigNode,
        prefix: &str,
        names: VitNames,
        defaults: VitDefaults,
    ) -> Result<Self> {
        let width = node.size_or("hidden_size", defaults.width)?;
        let n_heads = node.size_or("num_attention_heads", defaults.n_heads)?;
        if width % n_heads != 0 {
            let why = format!("{n_heads} does not divide hidden_size {width}");
            return Err(node.invalid("num_attention_heads", why));
        }
        let patch_size = side(node, "patch_size", defaults.patch_size)?;
        if patch_size > MAX_PATCH {
            let why = format!("{patch_size} pixels, at most {MAX_PATCH} expected");
            return Err(node.invalid("patch_size", why));
        }
        let tile_side = patches_on(node, "image_size", defaults.image_size, patch_size)?;
        Ok(Self {
            prefix: prefix.to_owned(),
            names,
            depth: node.size_or("num_hidden_layers", defaults.n_layers)?,
            width,
            n_heads,
            mlp_dim: node.size_or("intermediate_size", defaults.mlp_dim)?,
            patch_size,
            tile_side,
            table_side: tile_side,
            norm_eps: node.positive_or("layer_norm_eps", defaults.norm_eps)? as f32,
            activation: VisionActivation::read(node, defaults.activation)?,
            qkv_bias: true,
            with_post_norm: false,
        })
    }

    /// Patches of a tile.
    pub fn n_patches(&self) -> usize {
        self.tile_side * self.tile_side
    }

    /// Values of a patch.
    pub fn patch_dim(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// Tokens before the patches of a tile.
    pub fn n_class_tokens(&self) -> usize {
        usize::from(self.names.class.is_some())
    }

    /// Sizes, where `patches_per_token` patches become a token.
    pub fn size(&self, patches_per_token: usize) -> VisionSize {
        VisionSize {
            depth: self.depth,
            width: self.width,
            n_heads: self.n_heads,
            mlp_dim: self.mlp_dim,
            patches_per_token,
            patches_per_tile: Some(self.n_patches()),
        }
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }

    fn layer_name(&self, i: usize, part: &str) -> String {
        format!("{}.{}.{i}.{part}", self.prefix, self.names.layers)
    }

    fn patch_shape(&self) -> [usize; 4] {
        [self.width, 3, self.patch_size, self.patch_size]
    }

    /// Looks at the shapes that tell the tower's sizes.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`].
    pub fn check_shapes(&self, checkpoint: &Checkpoint) -> Result<()> {
        let patch = self.name(&format!("{}.weight", self.names.patch));
        checkpoint.require_shape(&patch, &self.patch_shape())?;
        for i in 0..self.depth {
            let fc1 = self.layer_name(i, &format!("{}.weight", self.names.fc1));
            checkpoint.require_shape(&fc1, &[self.mlp_dim, self.width])?;
        }
        Ok(())
    }

    /// Reads the weights.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(&self, checkpoint: &Checkpoint, device: &ModelDevice) -> Result<VitTower> {
        VitTower::load(self, checkpoint, device)
    }
}

/// Where in a tower features are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureLayer {
    /// Layers before that.
    pub depth: usize,
    /// Whether it is the tower's output, so that the norm after the last layer, if there is one, comes
    /// before it too.
    pub is_output: bool,
}

impl FeatureLayer {
    /// Reads `key`: 0 is the input of the first of `n_layers` layers, −1 the tower's output.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for several layers, [`Error::Format`] for one that is not
    /// there.
    pub fn read(root: &ConfigNode, key: &str, default: i64, n_layers: usize) -> Result<Self> {
        let layer = match root.get(key) {
            None => default,
            Some(value) => value.as_i64().ok_or_else(|| Error::Unsupported {
                what: format!("{key} {value} in config.json; one layer is handled"),
            })?,
        };
        let depth = match layer < 0 {
            true => (n_layers as i64 + 1).checked_add(layer),
            false => Some(layer),
        };
        let depth = depth.and_then(|depth| usize::try_from(depth).ok());
        match depth.filter(|depth| *depth <= n_layers) {
            Some(depth) => Ok(Self {
                depth,
                is_output: layer == -1,
            }),
            None => {
                let why = format!("{layer} of a tower with {n_layers} layers");
                Err(root.invalid(key, why))
            }
        }
    }
}

/// Patches on the side of a tile whose pixels stand under `key`.
///
/// # Errors
/// [`Error::Format`] if there is room for none, or for more than any tower has.
pub fn patches_on(
    node: &ConfigNode,
    key: &str,
    default_pixels: usize,
    patch_size: usize,
) -> Result<usize> {
    let pixels = side(node, key, default_pixels)?;
    let n = pixels / patch_size;
    if (1..=MAX_SIDE).contains(&n) {
        return Ok(n);
    }
    let why = format!("{pixels} pixels, room for 1 to {MAX_SIDE} patches of {patch_size} expected");
    Err(node.invalid(key, why))
}

/// A side in pixels under `key`: a number, or two that are equal.
fn side(node: &ConfigNode, key: &str, default: usize) -> Result<usize> {
    match node.get(key).and_then(Value::as_array).map(Vec::as_slice) {
        Some([height, width]) if height == width => {
            let side = height.as_u64().filter(|side| (1..1 << 31).contains(side));
            side.map(|side| side as usize).ok_or_else(|| {
                node.invalid(key, format!("sides in pixels expected, found {height}"))
            })
        }
        Some(other) => {
            let why = format!("two equal sides expected, found {other:?}");
            Err(node.invalid(key, why))
        }
        None => node.size_or(key, default),
    }
}
