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

    /// The value of `key`, unless absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.layers
            .iter()
            .find_map(|layer| layer.get(key))
            .filter(|v| !v.is_null())
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

/// What the shared decoder needs to know of an architecture.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of transformer layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Epsilon inside RMSNorm's square root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How many of the `head_dim / 2` frequencies follow the temporal, height and width position.
    pub mrope_section: Vec<usize>,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
}

impl DecoderConfig {
    /// Reads the Qwen2 decoder of a Qwen2-VL configuration.
    ///
    /// # Errors
    /// [`Error::Format`] for an absent, ill-typed or contradictory key, [`Error::Unsupported`] for
    /// sliding windows and scaled rotary embeddings.
    pub fn qwen2(root: &ConfigNode) -> Result<Self> {
        let text = root.nested_or_flat("text_config");
        let hidden_size = text.size("hidden_size")?;
        let n_heads = text.size("num_attention_heads")?;
        let n_kv_heads = text.size_or("num_key_value_heads", n_heads)?;
        if hidden_size % n_heads != 0 {
            return Err(text.invalid(
                "num_attention_heads",
                format!("{n_heads} does not divide hidden_size {hidden_size}"),
            ));
        }
        if n_heads % n_kv_heads != 0 {
            return Err(text.invalid(
                "num_key_value_heads",
                format!("{n_kv_heads} does not divide {n_heads} heads"),
            ));
        }
        refuse_sliding_window(&text)?;
        let head_dim = hidden_size / n_heads;
        let (rope_theta, mrope_section) = rope(&text, head_dim)?;
        Ok(Self {
            vocab_size: text.size("vocab_size")?,
            hidden_size,
            intermediate_size: text.size("intermediate_size")?,
            n_layers: text.size("num_hidden_layers")?,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: text.positive_or("rms_norm_eps", 1e-5)?,
            rope_theta,
            mrope_section,
            tie_word_embeddings: root.flag_or("tie_word_embeddings", false)?
                || text.flag_or("tie_word_embeddings", false)?,
        })
    }

    /// Query heads that share one key and value head.
    pub fn n_groups(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
}

fn refuse_sliding_window(text: &ConfigNode) -> Result<()> {
    if text.flag_or("use_sliding_window", false)? {
        return Err(Error::Unsupported {
            what: "use_sliding_window: true in config.json; only full attention is implemented for this family".into(),
        });
    }
    Ok(())
}

/// `rope_theta` and `mrope_section`, which stand at the top level, in `rope_scaling` (hub files)
/// or in `rope_parameters` (transformers 5).
fn rope(text: &ConfigNode, head_dim: usize) -> Result<(f64, Vec<usize>)> {
    let scaling = text
        .nested_or_flat("rope_scaling")
        .nested_or_flat("rope_parameters");
    let kind = scaling.text_or("rope_type", scaling.text_or("type", "default")?)?;
    if !matches!(kind, "default" | "mrope") {
        return Err(Error::Unsupported {
            what: format!("rope_type {kind:?}; \"default\" and \"mrope\" are implemented"),
        });
    }
    let section = scaling.sizes_or("mrope_section", &[16, 24, 24])?;
    if section.len() != 3 || section.iter().sum::<usize>() * 2 != head_dim {
        return Err(scaling.invalid(
            "mrope_section",
            format!(
                "expected three numbers that sum to {} (head_dim / 2), found {section:?}",
                head_dim / 2
            ),
        ));
    }
    Ok((scaling.positive_or("rope_theta", 1e6)?, section))
}
