//! What a format is: the tensors of one quantized linear, and what `config.json` says of them.

use crate::checkpoint::{Checkpoint, DType};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, QuantizedWeight, Result};
use serde_json::Value;
use std::collections::BTreeMap;

/// The number format of each quantized module, by checkpoint name.
pub(super) type Schemes = BTreeMap<String, Scheme>;

/// Name, type and sides of a tensor that a quantized linear has in a format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Last part of its name, after the module's.
    pub(super) suffix: &'static str,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
}

impl Part {
    pub(super) fn new(suffix: &'static str, dtype: DType, shape: &[usize]) -> Self {
        Self {
            suffix,
            dtype,
            shape: shape.to_vec(),
        }
    }
}

/// The key that a format adds to `config.json`, with its value.
pub(super) struct ConfigEntry {
    pub(super) key: &'static str,
    pub(super) value: Value,
}

/// A format, as [`super::Exporter`] writes it.
pub(super) trait Layout: Sync {
    /// The type that it stores scales in, if it is not free to take any.
    fn scale_dtype(&self) -> Option<ScaleDtype> {
        None
    }

    /// The number that a reader gets for a weight of the grid.
    fn stored(&self, value: f32) -> f32 {
        value
    }

    /// The tensors of a linear with this format and shape `[rows, cols]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the reason, if the format cannot hold it.
    fn parts(&self, module: &str, scheme: Scheme, shape: [usize; 2]) -> Result<Vec<Part>>;

    /// Their bytes, in the same order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a type cannot be written.
    fn bytes(&self, module: &str, weight: &QuantizedWeight) -> Result<Vec<Vec<u8>>>;

    /// What `config.json` says; `None` if it says nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the modules cannot be told apart by what it may say.
    fn config(&self, source: &Checkpoint, schemes: &Schemes) -> Result<Option<ConfigEntry>>;

    /// Which readers of the format do not take such modules, and why.
    fn notes(&self, _source: &Checkpoint, _schemes: &Schemes) -> Vec<String> {
        Vec::new()
    }

    /// Files beside `config.json` that repeat `entry` for some readers: name and content.
    fn files(&self, _entry: Option<&ConfigEntry>) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// An [`Error::Unsupported`] for a module that a format cannot hold.
pub(super) fn refusal(module: &str, format: &str, why: impl std::fmt::Display) -> Error {
    Error::Unsupported {
        what: format!("{module} in {format}: {why}"),
    }
}

/// Bytes of words, little-endian.
pub(super) fn word_bytes(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Bytes of scales, biases or weights in a type.
pub(super) fn float_bytes(module: &str, dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    dtype
        .bytes_from_f32(values)
        .ok_or_else(|| Error::Unsupported {
            what: format!("{module}: numbers in {}", dtype.name()),
        })
}
