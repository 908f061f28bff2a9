//! Vision tower and projector, which llama.cpp keeps in a file of their own: architecture `clip`,
//! told apart by `clip.projector_type`.
//!
//! What llama.cpp has no code for is refused with the reason; the language model is of use without.
//!
//! Source: ggml-org/llama.cpp `conversion/` (`base.py` `MmprojModel`, `qwenvl.py`, `qwen3vl.py`,
//! `smolvlm.py`), `tools/mtmd/clip.cpp`, and for LLaVA `tools/mtmd/legacy-models`.

mod internvl;
mod qwen;
mod vit;

use super::tensors::Planned;
use crate::checkpoint::{Checkpoint, DType};
use crate::gguf::{Part, TensorType, Value};
use crate::model::architecture::Architecture;
use crate::model::config::ConfigNode;
use crate::processor::read_json;
use crate::{Error, Result};
use serde_json::Value as Json;

/// Keys, `general.…` not among them, and tensors of the file.
pub(super) struct Mmproj {
    pub(super) keys: Vec<(String, Value)>,
    pub(super) tensors: Vec<Planned>,
}

/// What the file of a checkpoint's vision tower holds.
///
/// # Errors
/// [`Error::Unsupported`] for a tower that llama.cpp has no code for or that is not written here;
/// [`Error::Missing`] and [`Error::Format`] for what is wrong with the folder.
pub(super) fn plan(checkpoint: &Checkpoint, architecture: &Architecture) -> Result<Mmproj> {
    let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
    let tower = Tower {
        checkpoint,
        architecture,
        node: root.nested("vision_config")?,
        root,
        images: image_settings(checkpoint)?,
        keys: Vec::new(),
        tensors: Vec::new(),
    };
    match architecture.family {
        "qwen2_vl" => tower.qwen2(false),
        "qwen2_5_vl" => tower.qwen2(true),
        "qwen3_vl" => tower.qwen3(),
        "idefics3" | "smolvlm" => tower.idefics3(),
        "llava" => tower.llava(),
        "internvl" => tower.internvl(),
        "internvl_chat" => tower.internvl_chat(),
        other => Err(Error::Unsupported {
            what: format!(
                "vision tower and projector of {other} as GGUF; those of qwen2_vl, qwen2_5_vl, \
                 qwen3_vl, idefics3, smolvlm, llava, internvl and internvl_chat are written"
            ),
        }),
    }
}

/// A file in the making.
struct Tower<'a> {
    checkpoint: &'a Checkpoint,
    architecture: &'a Architecture,
    root: ConfigNode<'a>,
    /// `vision_config`.
    node: ConfigNode<'a>,
    /// Of the image processor.
    images: Json,
    keys: Vec<(String, Value)>,
    tensors: Vec<Planned>,
}

impl Tower<'_> {
    fn done(self) -> Mmproj {
        Mmproj {
            keys: self.keys,
            tensors: self.tensors,
        }
    }

    fn key(&mut self, key: &str, value: Value) {
        self.keys.push((format!("clip.{key}"), value));
    }

    fn size(&mut self, key: &str, value: usize) {
        self.key(&format!("vision.{key}"), Value::U32(value as u32));
    }

    /// The keys that all towers have.
    fn common_keys(&mut self, sizes: Sizes) -> Result<()> {
        let vision = self.architecture.vision.size();
        self.key("has_vision_encoder", Value::Bool(true));
        self.key("projector_type", sizes.projector.into());
        self.size("projection_dim", self.architecture.decoder.hidden_size);
        self.size("image_size", sizes.image);
        self.size("patch_size", sizes.patch);
        self.size("embedding_length", vision.width);
        self.size("feed_forward_length", sizes.feed_forward);
        self.size("block_count", vision.depth);
        self.size("attention.head_count", vision.n_heads);
        let eps = Value::F32(sizes.norm_eps as f32);
        self.key("vision.attention.layer_norm_epsilon", eps);
        for key in ["image_mean", "image_std"] {
            let value = self.three_floats(key)?;
            self.key(&format!("vision.{key}"), value);
        }
        Ok(())
    }

    fn three_floats(&self, key: &str) -> Result<Value> {
        let list = self.images[key].as_array();
        let list: Option<Vec<f32>> =
            list.and_then(|list| list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect());
        match list.filter(|list| list.len() == 3) {
            Some(list) => Ok(Value::F32s(list)),
            None => Err(Error::Missing {
                what: format!("{key} of three numbers"),
                place: format!(
                    "preprocessor_config.json or processor_config.json of {}",
                    self.checkpoint.dir().display()
                ),
            }),
        }
    }

    /// Adds a stored tensor.
    fn add(
        &mut self,
        tensor: &str,
        name: &str,
        part: Part,
        kind: Option<TensorType>,
    ) -> Result<()> {
        let planned = Planned::stored(self.checkpoint, tensor, name, part, kind)?;
        self.tensors.push(planned);
        Ok(())
    }

    /// Adds a stored tensor, if there is one of this name.
    fn add_if_there(&mut self, tensor: &str, name: &str) -> Result<()> {
        match self.checkpoint.contains(tensor) {
            true => self.add(tensor, name, Part::Whole, None),
            false => Ok(()),
        }
    }

    /// Adds weight and, if there is one, bias of a linear or norm.
    fn pair(&mut self, module: &str, name: &str) -> Result<()> {
        let weight = format!("{module}.weight");
        self.add(&weight, &format!("{name}.weight"), Part::Whole, None)?;
        self.add_if_there(&format!("{module}.bias"), &format!("{name}.bias"))
    }

    /// Queries, keys and values, which the checkpoint has in one linear, in three.
    fn split_qkv(&mut self, module: &str, to: &str) -> Result<()> {
        let width = self.architecture.vision.size().width;
        for (index, role) in ["q", "k", "v"].into_iter().enumerate() {
            for suffix in ["weight", "bias"] {
                let tensor = format!("{module}.{suffix}");
                if suffix == "weight" || self.checkpoint.contains(&tensor) {
                    let part = Part::Rows(index * width..(index + 1) * width);
                    self.add(&tensor, &format!("{to}.attn_{role}.{suffix}"), part, None)?;
                }
            }
        }
        Ok(())
    }

    /// A tensor's type and shape.
    fn require(&self, tensor: &str) -> Result<(DType, &[usize])> {
        let info = self.checkpoint.info(tensor).ok_or_else(|| Error::Missing {
            what: format!("tensor {tensor}"),
            place: self.checkpoint.dir().display().to_string(),
        })?;
        Ok((info.dtype, &info.shape))
    }

    /// The first of `prefixes` under which there is `tensor`.
    fn prefix(&self, prefixes: &[&'static str], tensor: &str) -> Result<&'static str> {
        let mut all = prefixes.iter().copied();
        let found = all.find(|prefix| self.checkpoint.contains(&format!("{prefix}.{tensor}")));
        found.ok_or_else(|| Error::Missing {
            what: format!("tensor {tensor} under {}", prefixes.join(" or ")),
            place: self.checkpoint.dir().display().to_string(),
        })
    }

    fn refuse<T>(&self, what: String) -> Result<T> {
        let family = self.architecture.family;
        Err(Error::Unsupported {
            what: format!("{what} of {family} in a GGUF file: llama.cpp has no way to say it"),
        })
    }
}

/// Numbers that the towers find in different places.
struct Sizes {
    projector: &'static str,
    image: usize,
    patch: usize,
    feed_forward: usize,
    norm_eps: f64,
}

/// The convolution over patches is kept in F32 unless the file is one of F16, which readers need.
fn patch_kind(dtype: DType) -> TensorType {
    match dtype {
        DType::F16 => TensorType::F16,
        _ => TensorType::F32,
    }
}

/// The image processor's settings; the newer file's over the older one's.
fn image_settings(checkpoint: &Checkpoint) -> Result<Json> {
    let dir = checkpoint.dir();
    let mut settings = read_json(&dir.join("preprocessor_config.json"))?.unwrap_or_default();
    let mut newer = read_json(&dir.join("processor_config.json"))?.unwrap_or_default();
    if let Json::Object(newer) = newer["image_processor"].take() {
        if settings.is_null() {
            settings = Json::Object(newer);
        } else if let Some(older) = settings.as_object_mut() {
            older.extend(newer);
        }
    }
    Ok(settings)
}
