//! The families of vision-language models: which checkpoints are known, and what each file here says
//! of one of them.
//!
//! A family is an entry of [`FAMILIES`]: how its configuration is read into an [`Architecture`], and
//! how its images are prepared. Everything else is shared. `docs/adding-a-family.md` tells how one is
//! added.

mod gemma3;
mod idefics3;
mod internvl;
mod llava;
mod paligemma;
mod pixtral;
mod qwen2_5_vl;
mod qwen2_vl;
mod qwen3_vl;
mod qwen3_vl_moe;
mod smolvlm;

use crate::checkpoint::Checkpoint;
use crate::model::architecture::Architecture;
use crate::model::device::ModelDevice;
use crate::model::source::ModelSource;
use crate::processor::{ImageProcessor, ImageSettings, Processor};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// A known family.
pub struct Family {
    /// Value of `model_type` in `config.json`.
    pub model_type: &'static str,
    /// What people call it.
    pub name: &'static str,
    /// Reads the configuration.
    pub architecture: fn(&Checkpoint) -> Result<Architecture>,
    /// Reads the settings of its image processor.
    pub images: fn(&ImageSettings) -> Result<Box<dyn ImageProcessor>>,
}

/// All of them.
pub const FAMILIES: &[Family] = &[
    qwen2_vl::FAMILY,
    qwen2_5_vl::FAMILY,
    qwen3_vl::FAMILY,
    qwen3_vl_moe::FAMILY,
    llava::LLAVA,
    llava::NEXT,
    llava::ONEVISION,
    pixtral::MISTRAL3,
    idefics3::FAMILY,
    smolvlm::FAMILY,
    gemma3::FAMILY,
    paligemma::FAMILY,
    internvl::INTERNVL,
    internvl::ORIGINAL,
];

/// The model in an open checkpoint.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown family; else the family's, and those of
/// [`ModelSource::new`].
pub fn open_model(checkpoint: Checkpoint, device: impl Into<ModelDevice>) -> Result<ModelSource> {
    let architecture = architecture_of(&checkpoint)?;
    ModelSource::new(checkpoint, architecture, device)
}

/// What an open checkpoint says of its model.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown family; else the family's.
pub fn architecture_of(checkpoint: &Checkpoint) -> Result<Architecture> {
    let place = checkpoint.dir().join("config.json");
    (family_of(&place, checkpoint.config())?.architecture)(checkpoint)
}

/// The processor of a checkpoint folder.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown family; else those of [`Processor::open`].
pub fn open_processor(dir: &Path) -> Result<Processor> {
    let place = dir.join("config.json");
    let config = crate::processor::read_json(&place)?.ok_or_else(|| Error::Missing {
        what: "config.json".into(),
        place: dir.display().to_string(),
    })?;
    Processor::open(dir, family_of(&place, &config)?.images)
}

fn family_of(place: &Path, config: &Value) -> Result<&'static Family> {
    let found = config["model_type"].as_str().unwrap_or("none");
    let family = FAMILIES.iter().find(|family| family.model_type == found);
    family.ok_or_else(|| Error::Unsupported {
        what: format!(
            "{}: model_type {found:?}; {}",
            place.display(),
            what_is_missing(found, config)
        ),
    })
}

/// What would have to be known to handle an unknown family.
fn what_is_missing(found: &str, config: &Value) -> String {
    let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
    let part = |key: &str| config[key]["model_type"].as_str();
    let mut missing = vec!["its image processor"];
    let mut parts = Vec::new();
    match part("vision_config") {
        Some(tower) => {
            parts.push(format!("vision tower {tower:?}"));
            missing.push("its vision tower");
        }
        None => missing.push("a vision_config"),
    }
    if let Some(text) = part("text_config") {
        parts.push(format!("language model {text:?}"));
    }
    // Of equals the first.
    let nearest = known
        .iter()
        .rev()
        .max_by_key(|name| common_prefix(name, found))
        .filter(|name| common_prefix(name, found) >= 3);
    let nearest = nearest.map_or(String::new(), |name| {
        format!("; the nearest is {name:?}, which has other names and shapes")
    });
    let parts = match parts.is_empty() {
        true => String::new(),
        false => format!(" (it has {})", parts.join(" and ")),
    };
    format!(
        "not known is {}{parts}{nearest}. Known families: {}",
        missing.join(" and "),
        known.join(", ")
    )
}

fn common_prefix(a: &str, b: &str) -> usize {
    let pairs = a.bytes().zip(b.bytes());
    pairs.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_family_is_told_what_is_missing_and_what_is_near() {
        let config = serde_json::json!({
            "model_type": "qwen2_audio", "text_config": {"model_type": "qwen2"}});
        let error = family_of(Path::new("config.json"), &config).err().unwrap();
        let message = error.to_string();
        for part in [
            "qwen2_audio",
            "a vision_config",
            "\"qwen2\"",
            "\"qwen2_vl\"",
        ] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn no_family_is_listed_twice() {
        for (i, family) in FAMILIES.iter().enumerate() {
            let twin = FAMILIES[..i]
                .iter()
                .find(|f| f.model_type == family.model_type);
            assert!(twin.is_none(), "{}", family.model_type);
        }
    }
}
