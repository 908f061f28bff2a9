//! Reading `config.json` into the few numbers that a forward needs, with every value checked.
//!
//! Hub checkpoints of Qwen2-VL keep the decoder's keys at the top level, newer ones nest them in
//! `text_config`; both are read. A key that is absent takes the default that transformers gives
//! it, and only where transformers has one.

use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// One JSON object of a configuration file, which knows its own path for error messages.
#[derive(Clone, Debug)]
pub struct ConfigNode<'a> {
    file: PathBuf,
    at: String,
    /// Objects searched in turn for a key.
    layers: Vec<&'a Value>,
}

impl<'a> ConfigNode<'a> {
    /// The root object of the configuration of the checkpoint folder `dir`.
    pub fn root(dir: &Path, value: &'a Value) -> Self {
        Self {
            file: dir.join("config.json"),
            at: String::new(),
            layers: vec![value],
        }
    }

    /// The object under `key`, falling back to this object's own keys where it lacks one.
    pub fn nested_or_flat(&self, key: &str) -> Self {
        let mut node = self.clone();
        node.at = format!("{}{key}.", self.at);
        if let Some(inner) = self.get(key) {
            node.layers.insert(0, inner);
        }
        node
    }

    /// The object under `key`.
    ///
    /// # Errors
    /// [`Error::Format`] if it is absent.
    pub fn nested(&self, key: &str) -> Result<Self> {
        let inner = self.get(key).ok_or_else(|| self.absent(key))?;
        Ok(Self {
            file: self.file.clone(),
            at: format!("{}{key}.", self.at),
            layers: vec![inner],
        })
    }

    /// The object under `key` by itself, if it is there.
    pub fn inside(&self, key: &str) -> Option<Self> {
        let inner = self.get(key).filter(|value| value.is_object())?;
        Some(Self {
            file: self.file.clone(),
            at: format!("{}{key}.", self.at),
            layers: vec![inner],
        })
    }

    /// The string under `key` of this very object, not of one around it.
    pub fn own_text(&self, key: &str) -> Option<&'a str> {
        self.layers.first()?.get(key)?.as_str()
    }

    /// The value of `key`, unless absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.layers
            .iter()
            .find_map(|layer| layer.get(key))
            .filter(|v| !v.is_null())
    }

    /// Whether `key` is there and null, which says something where its absence means a default.
    pub fn is_null(&self, key: &str) -> bool {
        let found = self.layers.iter().find_map(|layer| layer.get(key));
        found.is_some_and(Value::is_null)
    }

    /// A positive integer below 2³¹.
    ///
    /// # Errors
    /// [`Error::Format`] if it is absent or anything else.
    pub fn size(&self, key: &str) -> Result<usize> {
        let value = self.get(key).ok_or_else(|| self.absent(key))?;
        match value.as_u64() {
            Some(n) if n > 0 && n < (1 << 31) => Ok(n as usize),
            _ => Err(self.wrong(key, "a positive integer below 2^31", value)),
        }
    }

    /// [`Self::size`], or `default` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::size`].
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.get(key).is_none() {
            Ok(default)
        } else {
            self.size(key)
        }
    }

    /// A finite number above zero, or `default` where the key is absent.
    ///
    /// # Errors
    /// [`Error::Format`] if it is anything else.
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(x),
            _ => Err(self.wrong(key, "a positive number", value)),
        }
    }

    /// A truth value, or `default` where the key is absent.
    ///
    /// # Errors
    /// [`Error::Format`] if it is anything else.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| self.wrong(key, "true or false", value))
    }

    /// A string, or `default` where the key is absent.
    ///
    /// # Errors
    /// [`Error::Format`] if it is anything else.
    pub fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_str()
            .ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// A list of strings, if there is one.
    ///
    /// # Errors
    /// [`Error::Format`] if it is anything else.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let texts = value.as_array();
        let texts = texts.and_then(|list| list.iter().map(Value::as_str).collect());
        match texts {
            Some(texts) => Ok(Some(texts)),
            None => Err(self.wrong(key, "a list of strings", value)),
        }
    }

    /// A list of positive integers, or `default` where the key is absent.
    ///
    /// # Errors
    /// [`Error::Format`] if it is anything else.
    pub fn sizes_or(&self, key: &str, default: &[usize]) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(default.to_vec());
        };
        let sizes = value.as_array().and_then(|list| {
            list.iter()
                .map(|v| v.as_u64().filter(|&n| n < 1 << 31).map(|n| n as usize))
                .collect()
        });
        sizes.ok_or_else(|| self.wrong(key, "a list of integers", value))
    }

    /// An error about `key`, for conditions that only the caller knows.
    pub fn invalid(&self, key: &str, why: impl Into<String>) -> Error {
        Error::format(&self.file, format!("{}{key}", self.at), why)
    }

    fn absent(&self, key: &str) -> Error {
        self.invalid(key, "expected a value, found none")
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.invalid(key, format!("expected {expected}, found {found}"))
    }
}
