//! The decoder as data: everything in which the language models of the known families differ.
//!
//! A language model is told by the `model_type` of its part of the configuration; each has a
//! function here that reads it. The forward in [`crate::model::decoder`] is one for all.

mod gemma;

use crate::model::config::ConfigNode;
use crate::model::experts::Experts;
use crate::{Error, Result};

/// Bound of the layers that a configuration may ask for, far above every published model.
const MAX_LAYERS: usize = 1 << 16;

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
    /// What norms multiply by.
    pub norm_scale: NormScale,
    /// Whether the outputs of attention and MLP are normed before they are added.
    pub sandwich_norms: bool,
    /// Whether queries and keys are normed head by head, before rotation.
    pub qk_norm: bool,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the attention output has a bias.
    pub o_bias: bool,
    /// The gate's activation.
    pub activation: Activation,
    /// Factor on scores before the softmax.
    pub score_scale: f64,
    /// Rotary positions of layers that see everything before a token.
    pub rotary: Rotary,
    /// Layers that see the latest tokens only.
    pub local: Option<LocalAttention>,
    /// Which later tokens a token sees.
    pub ahead: Ahead,
    /// What scores are bent towards before the softmax, as c·tanh(score / c).
    pub score_cap: Option<f64>,
    /// The same of logits.
    pub logit_cap: Option<f64>,
    /// Factor on the embeddings of text tokens.
    pub embedding_scale: f32,
    /// Whether the head is the transposed embedding.
    pub tie_word_embeddings: bool,
    /// Layers whose MLP is a mixture of experts.
    pub experts: Option<Experts>,
}

/// Which later tokens a token sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// None.
    Nothing,
    /// Those of its image; a window hides earlier ones of the image all the same.
    Image,
    /// Those of the prompt, of which no window hides anything.
    Prompt,
}

/// What a norm multiplies normed values by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormScale {
    /// Its weight.
    Weight,
    /// One plus its weight.
    OnePlusWeight,
}

/// The activation of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// z·σ(z).
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

/// Rotary positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotary {
    /// Base of the frequencies.
    pub theta: f64,
    /// What the frequencies are stretched by.
    pub scaling: RopeScaling,
    /// Which of a token's three positions a frequency follows.
    pub axes: RopeAxes,
}

/// How frequencies are changed for contexts longer than those of the first training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor.
    Linear(f64),
    /// Slowed, the slow ones most, once there are more tokens than in the first context, and the
    /// more the longer the context is.
    Dynamic {
        /// The factor.
        factor: f64,
        /// Tokens of the first context.
        original: f64,
    },
    /// Slow ones divided by a factor, fast ones kept, those between blended (Llama 3).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Below this many turns in the first context a frequency is slow.
        low: f64,
        /// Above this many it is fast.
        high: f64,
        /// Tokens of the first context.
        original: f64,
    },
}

/// Which of a token's positions (time, height, width) a frequency follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeAxes {
    /// The first for all: text positions.
    One,
    /// Three runs of frequencies of these lengths.
    Sections([usize; 3]),
    /// Frequencies take turns; those beyond 3 × the second or third length follow time.
    Interleaved([usize; 3]),
}

/// Layers with a sliding window.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalAttention {
    /// Tokens that a token sees, itself included.
    pub window: usize,
    /// Their rotary positions.
    pub rotary: Rotary,
    /// For each layer whether it is one of them.
    pub is_local: Vec<bool>,
}

impl DecoderConfig {
    /// Reads the language model in `text`, whose kind is its `model_type` or else `default_kind`.
    ///
    /// # Errors
    /// [`Error::Format`] for an absent, ill-typed or contradictory key; [`Error::Unsupported`] for
    /// another language model, and for features that this one is not handled with.
    pub fn read(root: &ConfigNode, text: &ConfigNode, default_kind: &str) -> Result<Self> {
        let kind = text.own_text("model_type").unwrap_or(default_kind);
        let mut config = Self::plain(text, Defaults::of(kind))?;
        config.tie_word_embeddings = tied(root, text, kind)?;
        match kind {
            "qwen2" | "qwen2_vl" | "qwen2_vl_text" | "qwen2_5_vl" | "qwen2_5_vl_text" => {
                config.qkv_bias = true;
            }
            "qwen3" | "qwen3_vl_text" | "qwen3_vl_moe_text" => {
                config.qk_norm = true;
                config.qkv_bias = text.flag_or("attention_bias", false)?;
                config.o_bias = config.qkv_bias;
                if kind.ends_with("moe_text") {
                    config.experts = Some(Experts::read(text, config.n_layers)?);
                }
            }
            "llama" | "mistral" => {
                config.qkv_bias = text.flag_or("attention_bias", false)?;
                config.o_bias = config.qkv_bias;
                if kind == "mistral" {
                    config.make_mistral(text)?;
                }
            }
            "gemma" => config.make_gemma(text)?,
            "gemma2" => config.make_gemma2(text)?,
            "gemma3_text" | "gemma3" => config.make_gemma3(text)?,
            _ => {
                return Err(Error::Unsupported {
                    what: format!(
                        "language model {kind:?} in config.json; qwen2, qwen3, llama, mistral, \
                         gemma, gemma2 and gemma3_text are implemented"
                    ),
                });
            }
        }
        config.refuse_what_is_not_handled(text, kind)?;
        Ok(config)
    }

    /// What most language models are: pre-norm, SiLU, no biases, text positions.
    fn plain(text: &ConfigNode, defaults: Defaults) -> Result<Self> {
        let size = |key, of| size(text, key, &defaults, of);
        let hidden_size = size("hidden_size", |s| s.hidden)?;
        let n_heads = size("num_attention_heads", |s| s.heads)?;
        // Kinds whose groups are of one head follow the number of heads.
        let grouped = defaults.sizes.as_ref().filter(|s| s.kv_heads != s.heads);
        let n_kv_heads = grouped.map_or(n_heads, |sizes| sizes.kv_heads);
        let n_kv_heads = text.size_or("num_key_value_heads", n_kv_heads)?;
        let head_dim = defaults.sizes.as_ref().and_then(|sizes| sizes.head_dim);
        if text.get("head_dim").is_none() && head_dim.is_none() && hidden_size % n_heads != 0 {
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
        let head_dim = text.size_or("head_dim", head_dim.unwrap_or(hidden_size / n_heads))?;
        if head_dim % 2 != 0 || n_heads.checked_mul(head_dim).is_none_or(|n| n >= 1 << 31) {
            let why = format!("{n_heads} heads of {head_dim} channels cannot be");
            return Err(text.invalid("head_dim", why));
        }
        let n_layers = size("num_hidden_layers", |s| s.layers)?;
        if n_layers > MAX_LAYERS {
            let why = format!("{n_layers} layers, at most {MAX_LAYERS} expected");
            return Err(text.invalid("num_hidden_layers", why));
        }
        Ok(Self {
            vocab_size: size("vocab_size", |s| s.vocab)?,
            hidden_size,
            intermediate_size: size("intermediate_size", |s| s.intermediate)?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            rms_norm_eps: text.positive_or("rms_norm_eps", defaults.rms_norm_eps)?,
            norm_scale: NormScale::Weight,
            sandwich_norms: false,
            qk_norm: false,
            qkv_bias: false,
            o_bias: false,
            activation: Activation::Silu,
            score_scale: 1.0 / (head_dim as f64).sqrt(),
            rotary: Rotary::read(text, defaults.rope_theta)?,
            local: None,
            ahead: Ahead::Nothing,
            score_cap: None,
            logit_cap: None,
            embedding_scale: 1.0,
            tie_word_embeddings: false,
            experts: None,
        })
    }

    /// Mistral: all layers have a window, that of its first release where nothing is said; the
    /// files of later ones say null, and mean none.
    fn make_mistral(&mut self, text: &ConfigNode) -> Result<()> {
        if !text.is_null("sliding_window") {
            self.local = Some(LocalAttention {
                window: text.size_or("sliding_window", 4096)?,
                rotary: self.rotary,
                is_local: vec![true; self.n_layers],
            });
        }
        Ok(())
    }

    fn refuse_what_is_not_handled(&self, text: &ConfigNode, kind: &str) -> Result<()> {
        let unsupported = |what: &str| Err(Error::Unsupported { what: what.into() });
        if text.flag_or("use_sliding_window", false)? {
            return unsupported(
                "use_sliding_window: true in config.json; only full attention is implemented for this family",
            );
        }
        if text.flag_or("mlp_bias", false)? {
            return unsupported("mlp_bias: true in config.json");
        }
        let act = text.text_or("hidden_act", text.text_or("hidden_activation", "default")?)?;
        let expected: &[&str] = match self.activation {
            Activation::Silu => &["default", "silu", "swish"],
            // Gemma's first files say gelu and mean its tanh form.
            Activation::GeluTanh if kind == "gemma" => &["default", "gelu_pytorch_tanh", "gelu"],
            Activation::GeluTanh => &["default", "gelu_pytorch_tanh"],
        };
        if !expected.contains(&act) {
            return unsupported(&format!(
                "hidden_act {act:?} of a {kind} language model; {} is implemented",
                expected[1]
            ));
        }
        for cap in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if kind != "gemma2" && text.get(cap).is_some() {
                return unsupported(&format!("{cap} in config.json"));
            }
        }
        Ok(())
    }

    /// Query heads that share one key and value head.
    pub fn n_groups(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// The window of a layer, if it has one.
    pub fn window(&self, layer_idx: usize) -> Option<usize> {
        let local = self.local.as_ref()?;
        let is_local = local.is_local.get(layer_idx).copied().unwrap_or(false);
        is_local.then_some(local.window)
    }

    /// The experts of a layer, if its MLP is a mixture.
    pub fn n_experts(&self, layer_idx: usize) -> Option<usize> {
        let experts = self.experts.as_ref()?;
        let is_mixture = experts.is_mixture.get(layer_idx).copied();
        is_mixture.unwrap_or(false).then_some(experts.n_experts)
    }

    /// The width inside an MLP, or inside an expert.
    pub fn mlp_width(&self, is_expert: bool) -> usize {
        match &self.experts {
            Some(experts) if is_expert => experts.width,
            _ => self.intermediate_size,
        }
    }

    /// The most values per token that the inputs of down have in any layer.
    pub fn widest_mlp(&self) -> usize {
        let Some(experts) = &self.experts else {
            return self.intermediate_size;
        };
        let width = |is_mixture: &bool| match is_mixture {
            true => experts.n_chosen * experts.width,
            false => self.intermediate_size,
        };
        experts.is_mixture.iter().map(width).max().unwrap_or(0)
    }
}

/// What transformers takes where a configuration says nothing.
struct Defaults {
    rms_norm_eps: f64,
    rope_theta: f64,
    sizes: Option<DefaultSizes>,
}

/// Sizes that some published configurations leave out.
struct DefaultSizes {
    vocab: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: Option<usize>,
}

impl Defaults {
    fn of(kind: &str) -> Self {
        let (rms_norm_eps, rope_theta) = match kind {
            "qwen2_vl" | "qwen2_vl_text" | "qwen2_5_vl" | "qwen2_5_vl_text" => (1e-5, 1e6),
            "qwen3_vl_text" | "qwen3_vl_moe_text" => (1e-6, 5e5),
            _ => (1e-6, 1e4),
        };
        Self {
            rms_norm_eps,
            rope_theta,
            sizes: DefaultSizes::of(kind),
        }
    }
}

impl DefaultSizes {
    fn of(kind: &str) -> Option<Self> {
        let sizes =
            |vocab, [hidden, intermediate, layers, heads, kv_heads]: [usize; 5], head_dim| {
                Some(Self {
                    vocab,
                    hidden,
                    intermediate,
                    layers,
                    heads,
                    kv_heads,
                    head_dim,
                })
            };
        match kind {
            "llama" => sizes(32_000, [4096, 11_008, 32, 32, 32], None),
            "mistral" => sizes(32_000, [4096, 14_336, 32, 32, 8], None),
            "qwen2" => sizes(151_936, [4096, 22_016, 32, 32, 32], None),
            "qwen3" => sizes(151_936, [4096, 22_016, 32, 32, 32], Some(128)),
            "gemma" => sizes(256_000, [3072, 24_576, 28, 16, 16], Some(256)),
            "gemma2" => sizes(256_000, [2304, 9216, 26, 8, 4], Some(256)),
            "qwen3_vl_moe_text" => sizes(151_936, [2048, 5632, 24, 16, 16], None),
            "gemma3" | "gemma3_text" => sizes(262_208, [2304, 9216, 26, 8, 4], Some(256)),
            _ => None,
        }
    }
}

/// A size, or the default of this kind of language model where it has one.
fn size(
    text: &ConfigNode,
    key: &str,
    defaults: &Defaults,
    of: fn(&DefaultSizes) -> usize,
) -> Result<usize> {
    match &defaults.sizes {
        Some(sizes) => text.size_or(key, of(sizes)),
        None => text.size(key),
    }
}

/// Whether the head is the embedding. Of Gemma the whole model's word counts, which ties where it
/// is silent; its language model says to tie in every file.
fn tied(root: &ConfigNode, text: &ConfigNode, kind: &str) -> Result<bool> {
    const KEY: &str = "tie_word_embeddings";
    match kind.starts_with("gemma") {
        true => root.flag_or(KEY, true),
        false => Ok(root.flag_or(KEY, false)? || text.flag_or(KEY, false)?),
    }
}

impl Rotary {
    /// Reads what stands at the top level, in `rope_scaling` (hub files) or in `rope_parameters`
    /// (transformers 5).
    fn read(text: &ConfigNode, default_theta: f64) -> Result<Self> {
        let node = text
            .nested_or_flat("rope_scaling")
            .nested_or_flat("rope_parameters");
        let kind = node.text_or("rope_type", node.text_or("type", "default")?)?;
        let scaling = match kind {
            "default" | "mrope" => RopeScaling::None,
            "linear" => RopeScaling::Linear(node.positive_or("factor", 1.0)?),
            "dynamic" => RopeScaling::Dynamic {
                factor: node.positive_or("factor", 1.0)?,
                original: node.size("max_position_embeddings")? as f64,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: node.positive_or("factor", 8.0)?,
                low: node.positive_or("low_freq_factor", 1.0)?,
                high: node.positive_or("high_freq_factor", 4.0)?,
                original: node.positive_or("original_max_position_embeddings", 8192.0)?,
            },
            _ => {
                return Err(Error::Unsupported {
                    what: format!(
                        "rope_type {kind:?}; \"default\", \"mrope\", \"linear\", \"dynamic\" and \"llama3\" are \
                         implemented"
                    ),
                });
            }
        };
        Ok(Self {
            theta: node.positive_or("rope_theta", default_theta)?,
            scaling,
            axes: RopeAxes::One,
        })
    }
}

impl RopeAxes {
    /// Reads `mrope_section` and whether its axes are interleaved.
    ///
    /// # Errors
    /// [`Error::Format`] if the sections do not sum to half of `head_dim`.
    pub fn multimodal(
        text: &ConfigNode,
        default: [usize; 3],
        head_dim: usize,
        interleaved: bool,
    ) -> Result<Self> {
        let node = text
            .nested_or_flat("rope_scaling")
            .nested_or_flat("rope_parameters");
        let found = node.sizes_or("mrope_section", &default)?;
        match <[usize; 3]>::try_from(found.as_slice()) {
            Ok(sections) if sections.iter().sum::<usize>() * 2 == head_dim => {
                match node.flag_or("mrope_interleaved", interleaved)? {
                    true => Ok(Self::Interleaved(sections)),
                    false => Ok(Self::Sections(sections)),
                }
            }
            _ => Err(node.invalid(
                "mrope_section",
                format!(
                    "expected three numbers that sum to {} (head_dim / 2), found {found:?}",
                    head_dim / 2
                ),
            )),
        }
    }

    /// The axis of each of `n` frequencies.
    pub fn of_frequencies(self, n: usize) -> Vec<usize> {
        match self {
            Self::One => vec![0; n],
            Self::Sections(lengths) => (lengths.iter().enumerate())
                .flat_map(|(axis, &len)| std::iter::repeat_n(axis, len))
                .collect(),
            Self::Interleaved(lengths) => {
                let axis = |i: usize| match i % 3 {
                    turn @ (1 | 2) if i < 3 * lengths[turn] => turn,
                    _ => 0,
                };
                (0..n).map(axis).collect()
            }
        }
    }
}

#[cfg(test)]
impl DecoderConfig {
    /// A small Qwen2-like decoder for tests, `heads` being query heads, key heads and channels.
    pub(crate) fn small(hidden: usize, intermediate: usize, heads: [usize; 3]) -> Self {
        Self {
            vocab_size: 8,
            hidden_size: hidden,
            intermediate_size: intermediate,
            n_layers: 1,
            n_heads: heads[0],
            n_kv_heads: heads[1],
            head_dim: heads[2],
            rms_norm_eps: 1e-6,
            norm_scale: NormScale::Weight,
            sandwich_norms: false,
            qk_norm: false,
            qkv_bias: true,
            o_bias: false,
            activation: Activation::Silu,
            score_scale: 1.0 / (heads[2] as f64).sqrt(),
            rotary: Rotary {
                theta: 1e4,
                scaling: RopeScaling::None,
                axes: RopeAxes::One,
            },
            local: None,
            ahead: Ahead::Nothing,
            score_cap: None,
            logit_cap: None,
            embedding_scale: 1.0,
            tie_word_embeddings: true,
            experts: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_axes_are_those_of_qwen3_vl() {
        let axes = RopeAxes::Interleaved([24, 20, 20]).of_frequencies(64);
        assert_eq!(axes[..6], [0, 1, 2, 0, 1, 2]);
        // Beyond 3 · 20 all follow time.
        assert_eq!(axes[58..], [1, 2, 0, 0, 0, 0]);
        let count = |axis| axes.iter().filter(|&&a| a == axis).count();
        assert_eq!([count(0), count(1), count(2)], [24, 20, 20]);
        let axes = RopeAxes::Sections([1, 2, 1]).of_frequencies(4);
        assert_eq!(axes, [0, 1, 1, 2]);
    }
}
