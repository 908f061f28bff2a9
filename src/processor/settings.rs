//! Settings files of image processors, read with every value checked, and what all families make of
//! them: the table from bytes to the network's numbers.

use super::{missing, read_json, token_text};
use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Red, green and blue.
pub const CHANNELS: usize = 3;

/// The mean that CLIP normalises with.
pub const CLIP_MEAN: [f64; CHANNELS] = [0.48145466, 0.4578275, 0.40821073];
/// The deviation that CLIP normalises with.
pub const CLIP_STD: [f64; CHANNELS] = [0.26862954, 0.26130258, 0.27577711];

/// A height and a width in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// All that a checkpoint folder says about images.
#[derive(Clone, Debug)]
pub struct ImageSettings {
    /// File of `images`, for messages.
    pub path: PathBuf,
    /// Settings of the image processor, null without any.
    pub images: Value,
    /// `processor_config.json`, null without one.
    pub processor: Value,
    /// `tokenizer_config.json`, null without one.
    pub tokenizer: Value,
    /// `config.json`, null without one.
    pub model: Value,
}

impl ImageSettings {
    /// Reads them; image settings are `image_processor` of `processor_config.json`, else
    /// `preprocessor_config.json`. Without either it is for the family to say whether it needs them.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged file.
    pub(super) fn open(dir: &Path, tokenizer: &Value) -> Result<Self> {
        let nested = dir.join("processor_config.json");
        let own = dir.join("preprocessor_config.json");
        let processor = read_json(&nested)?.unwrap_or(Value::Null);
        let inner = Some(processor["image_processor"].clone());
        let (path, images) = match inner.filter(Value::is_object) {
            Some(value) => (nested, value),
            None => {
                let value = read_json(&own)?.unwrap_or(Value::Null);
                (own, value)
            }
        };
        Ok(Self {
            path,
            images,
            processor,
            tokenizer: tokenizer.clone(),
            model: read_json(&dir.join("config.json"))?.unwrap_or(Value::Null),
        })
    }

    /// The image settings, to be read key by key.
    pub fn of_images(&self) -> Settings<'_> {
        Settings {
            path: &self.path,
            value: &self.images,
        }
    }

    /// Makes sure that the settings are those of one of `kinds`.
    ///
    /// # Errors
    /// [`Error::Missing`] if there are none, [`Error::Unsupported`] naming what was found.
    pub fn require_kind(&self, kinds: &[&str]) -> Result<()> {
        if self.images.is_null() {
            let dir = self.path.parent().unwrap_or(&self.path);
            return Err(missing("preprocessor_config.json", dir));
        }
        let kind = self.images["image_processor_type"].as_str();
        let kind = kind.unwrap_or_default();
        if kinds.contains(&kind) {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: format!(
                "{}: image processor {kind:?}; supported is {}",
                self.path.display(),
                kinds[0]
            ),
        })
    }

    /// A special token that the tokenizer's settings name.
    pub fn token(&self, key: &str) -> Option<String> {
        token_text(&self.tokenizer[key])
    }
}

/// One JSON object and the file it is from, for messages.
pub struct Settings<'a> {
    pub(crate) path: &'a Path,
    pub(crate) value: &'a Value,
}

impl Settings<'_> {
    pub(crate) fn bad(&self, key: &str, expected: &str) -> Error {
        let found = &self.value[key];
        Error::format(
            self.path,
            key,
            format!("{expected} expected, {found} found"),
        )
    }

    pub(crate) fn integer(&self, key: &str, default: usize, max: usize) -> Result<usize> {
        match &self.value[key] {
            Value::Null => Ok(default),
            v => v
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .filter(|n| (1..=max).contains(n))
                .ok_or_else(|| self.bad(key, &format!("an integer of 1 to {max}"))),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        match &self.value[key] {
            Value::Null => Ok(true),
            v => v.as_bool().ok_or_else(|| self.bad(key, "true or false")),
        }
    }

    pub(crate) fn number(&self, key: &str, default: f64) -> Result<f64> {
        match &self.value[key] {
            Value::Null => Ok(default),
            v => v
                .as_f64()
                .filter(|x| x.is_finite())
                .ok_or_else(|| self.bad(key, "a number")),
        }
    }

    pub(crate) fn channels(&self, key: &str, default: [f64; CHANNELS]) -> Result<[f32; CHANNELS]> {
        let wrong = || self.bad(key, "three numbers");
        let values = match &self.value[key] {
            Value::Null => return Ok(default.map(|x| x as f32)),
            Value::Number(n) => vec![n.as_f64(); CHANNELS],
            Value::Array(list) => list.iter().map(Value::as_f64).collect(),
            _ => return Err(wrong()),
        };
        let values: Option<Vec<f32>> = values.into_iter().map(|x| x.map(|x| x as f32)).collect();
        values
            .and_then(|v| <[f32; CHANNELS]>::try_from(v).ok())
            .filter(|v| v.iter().all(|x| x.is_finite()))
            .ok_or_else(wrong)
    }
}

/// The network's input for each byte, per channel: rescaled in f64, rounded to f32, normalised in
/// f32.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueTable {
    channels: [Vec<f32>; CHANNELS],
}

impl ValueTable {
    /// Reads `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean` and `image_std`.
    ///
    /// # Errors
    /// [`Error::Format`] naming the key whose value cannot be.
    pub fn read(
        settings: &Settings,
        default_mean: [f64; CHANNELS],
        default_std: [f64; CHANNELS],
    ) -> Result<Self> {
        let mean = settings.channels("image_mean", default_mean)?;
        let std = settings.channels("image_std", default_std)?;
        if std.contains(&0.0) {
            return Err(settings.bad("image_std", "three numbers other than zero"));
        }
        let factor = settings.number("rescale_factor", 1.0 / 255.0)?;
        let factor = if settings.flag("do_rescale")? {
            factor
        } else {
            1.0
        };
        let normalises = settings.flag("do_normalize")?;
        let value = |channel: usize, byte: u8| {
            let value = (f64::from(byte) * factor) as f32;
            match normalises {
                true => (value - mean[channel]) / std[channel],
                false => value,
            }
        };
        let channel = |c: usize| (0..=u8::MAX).map(|byte| value(c, byte)).collect();
        Ok(Self {
            channels: std::array::from_fn(channel),
        })
    }

    /// The values of each channel, 256 of them.
    pub fn channels(&self) -> [&[f32]; CHANNELS] {
        std::array::from_fn(|c| self.channels[c].as_slice())
    }
}
