//! The language model: llama.cpp's name of its architecture, the keys that describe it, and its
//! tensors.
//!
//! Source: ggml-org/llama.cpp `conversion/` (`base.py`, `llama.py`, `qwen.py`, `qwenvl.py`,
//! `qwen3vl.py`, `gemma.py`) and `gguf-py/gguf/tensor_mapping.py`. Differs: what llama.cpp would
//! compute otherwise than the model is refused, where the converter goes on.

use super::tensors::Planned;
use crate::checkpoint::Checkpoint;
use crate::gguf::{Origin, Part, Rows, TensorSpec, TensorType, Value};
use crate::model::architecture::Architecture;
use crate::model::config::ConfigNode;
use crate::model::decoder_config::{DecoderConfig, NormScale, RopeAxes, RopeScaling};
use crate::{Error, Result};

/// An architecture of llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arch {
    /// Its name, which its keys begin with.
    pub(super) name: &'static str,
    /// Whether rows of q and k are paired, see [`Rows::Paired`].
    is_paired: bool,
    /// Whether the sizes of heads are told in any case.
    tells_head_dim: bool,
    /// Tokens of context where the configuration says nothing: the default of transformers.
    default_context: usize,
}

const QWEN2_VL: Arch = Arch {
    name: "qwen2vl",
    is_paired: false,
    tells_head_dim: false,
    default_context: 32_768,
};
const QWEN2: Arch = Arch {
    name: "qwen2",
    ..QWEN2_VL
};
const QWEN3: Arch = Arch {
    name: "qwen3",
    tells_head_dim: true,
    ..QWEN2_VL
};
const QWEN3_VL: Arch = Arch {
    name: "qwen3vl",
    default_context: 128_000,
    ..QWEN3
};
const LLAMA: Arch = Arch {
    name: "llama",
    is_paired: true,
    tells_head_dim: true,
    default_context: 2048,
};
const MISTRAL: Arch = Arch {
    default_context: 131_072,
    ..LLAMA
};
const GEMMA3: Arch = Arch {
    name: "gemma3",
    is_paired: false,
    tells_head_dim: true,
    default_context: 131_072,
};

/// Names of a layer's linears here and in the file.
const LINEARS: [(&str, &str); 7] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The name in the file, without `.weight`, of a linear of the decoder whose names begin with
/// `prefix`; `None` if it is not one that every layer has.
pub(super) fn linear_name(prefix: &str, module: &str) -> Option<String> {
    let rest = module.strip_prefix(prefix)?.strip_prefix(".layers.")?;
    let (layer, module) = rest.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (_, name) = LINEARS.iter().find(|(own, _)| *own == module)?;
    Some(format!("blk.{layer}.{name}"))
}

/// A language model under its configuration.
pub(super) struct TextModel<'a> {
    pub(super) arch: Arch,
    checkpoint: &'a Checkpoint,
    architecture: &'a Architecture,
    text: ConfigNode<'a>,
}

impl<'a> TextModel<'a> {
    /// The language model of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for one that llama.cpp does not run as it is.
    pub(super) fn of(checkpoint: &'a Checkpoint, architecture: &'a Architecture) -> Result<Self> {
        let root = ConfigNode::root(checkpoint.dir(), checkpoint.config());
        let key = match root.inside("llm_config") {
            Some(_) => "llm_config",
            None => "text_config",
        };
        let text = root.nested_or_flat(key);
        let model = Self {
            arch: arch_of(architecture, &text)?,
            checkpoint,
            architecture,
            text,
        };
        model.refuse_what_differs()?;
        Ok(model)
    }

    /// Whether it is of the `llama` architecture, whose rows of q and k are paired.
    pub(super) fn is_llama(&self) -> bool {
        self.arch.is_paired
    }

    fn decoder(&self) -> &DecoderConfig {
        &self.architecture.decoder
    }

    fn refuse_what_differs(&self) -> Result<()> {
        let decoder = self.decoder();
        let refuse = |what: &str| {
            let what = format!(
                "{what} in a GGUF file, which {} has no way to say",
                self.arch.name
            );
            Err(Error::Unsupported { what })
        };
        if decoder.experts.is_some() {
            return refuse("a mixture of experts, of which none is written yet,");
        }
        if decoder.local.is_some() && self.arch != GEMMA3 {
            return refuse("a sliding window");
        }
        if let Some(bias) = self.foreign_bias() {
            return refuse(&format!("{bias}, a bias,"));
        }
        match decoder.rotary.scaling {
            RopeScaling::Dynamic { .. } => refuse("dynamic rope scaling"),
            RopeScaling::Llama3 { .. } if !self.arch.is_paired => refuse("llama3 rope scaling"),
            _ => Ok(()),
        }
    }

    /// A bias that llama.cpp does not load: those of q, k and v it has for all, others for `llama` only.
    fn foreign_bias(&self) -> Option<String> {
        let others = LINEARS[3..].iter().filter(|_| !self.arch.is_paired);
        let prefix = &self.architecture.names.decoder;
        let names = others.flat_map(|(module, _)| {
            let layers = 0..self.decoder().n_layers;
            layers.map(move |layer| format!("{prefix}.layers.{layer}.{module}.bias"))
        });
        names
            .into_iter()
            .find(|name| self.checkpoint.contains(name))
    }

    /// The keys that describe it, `general.…` not among them.
    ///
    /// # Errors
    /// [`Error::Format`] for a key of the configuration of another kind.
    pub(super) fn keys(&self) -> Result<Vec<(String, Value)>> {
        let decoder = self.decoder();
        let size = |n: usize| Value::U32(n as u32);
        let context = self.arch.default_context;
        let context = self.text.size_or("max_position_embeddings", context)?;
        let mut keys = vec![
            ("block_count", size(decoder.n_layers)),
            ("context_length", size(context)),
            ("embedding_length", size(decoder.hidden_size)),
            ("feed_forward_length", size(decoder.intermediate_size)),
            ("attention.head_count", size(decoder.n_heads)),
            ("attention.head_count_kv", size(decoder.n_kv_heads)),
            ("rope.freq_base", Value::F32(decoder.rotary.theta as f32)),
            (
                "attention.layer_norm_rms_epsilon",
                Value::F32(decoder.rms_norm_eps as f32),
            ),
        ];
        match decoder.rotary.axes {
            RopeAxes::One => {}
            RopeAxes::Sections(sections) | RopeAxes::Interleaved(sections) => {
                let sections = sections.map(|n| n as i32);
                let padded = [&sections[..], &[0]].concat();
                keys.push(("rope.dimension_sections", Value::I32s(padded)));
            }
        }
        if let RopeScaling::Linear(factor) = decoder.rotary.scaling {
            keys.push(("rope.scaling.type", "linear".into()));
            keys.push(("rope.scaling.factor", Value::F32(factor as f32)));
        }
        let follows = decoder.head_dim * decoder.n_heads == decoder.hidden_size;
        if self.arch.tells_head_dim || !follows {
            keys.push(("attention.key_length", size(decoder.head_dim)));
            keys.push(("attention.value_length", size(decoder.head_dim)));
        }
        if self.arch.is_paired {
            keys.push(("vocab_size", size(decoder.vocab_size)));
            keys.push(("rope.dimension_count", size(decoder.head_dim)));
        }
        if self.arch == QWEN3_VL {
            let n = self.architecture.vision.n_deepstack();
            keys.push(("n_deepstack_layers", size(n)));
        }
        if let Some(local) = &decoder.local {
            keys.push(("attention.sliding_window", size(local.window)));
            let theta = Value::F32(local.rotary.theta as f32);
            keys.push(("rope.freq_base_swa", theta));
        }
        let named = keys.into_iter();
        Ok(named
            .map(|(key, value)| (format!("{}.{key}", self.arch.name), value))
            .collect())
    }

    /// All of its tensors.
    ///
    /// # Errors
    /// [`Error::Missing`] for one that is not there; those of [`Planned::linear`].
    pub(super) fn tensors(&self) -> Result<Vec<Planned>> {
        let mut tensors = vec![self.plain("embed_tokens.weight", "token_embd.weight")?];
        if !self.decoder().tie_word_embeddings {
            let head = &self.architecture.names.head;
            let module = head.strip_suffix(".weight").unwrap_or(head);
            let linear = Planned::linear(self.checkpoint, module, "output.weight", Rows::Same)?;
            tensors.push(linear);
        }
        tensors.push(self.norm("norm.weight", "output_norm.weight")?);
        tensors.extend(self.rope_factors());
        for layer in 0..self.decoder().n_layers {
            self.add_layer(layer, &mut tensors)?;
        }
        Ok(tensors)
    }

    fn add_layer(&self, layer: usize, tensors: &mut Vec<Planned>) -> Result<()> {
        let decoder = self.decoder();
        let prefix = format!("{}.layers.{layer}", self.architecture.names.decoder);
        for (module, name) in LINEARS {
            let rows = match name {
                "attn_q" if self.arch.is_paired => Rows::Paired {
                    n_heads: decoder.n_heads,
                },
                "attn_k" if self.arch.is_paired => Rows::Paired {
                    n_heads: decoder.n_kv_heads,
                },
                _ => Rows::Same,
            };
            let module = format!("{prefix}.{module}");
            let name = format!("blk.{layer}.{name}");
            let weight = format!("{name}.weight");
            tensors.push(Planned::linear(self.checkpoint, &module, &weight, rows)?);
            let bias = format!("{module}.bias");
            if self.checkpoint.contains(&bias) {
                let name = format!("{name}.bias");
                let planned = Planned::stored(self.checkpoint, &bias, &name, rows.part(), None)?;
                tensors.push(planned);
            }
        }
        for (norm, name) in self.layer_norms() {
            let norm = format!("layers.{layer}.{norm}.weight");
            let name = format!("blk.{layer}.{name}.weight");
            tensors.push(self.norm(&norm, &name)?);
        }
        Ok(())
    }

    /// Names of a layer's norms here and in the file.
    fn layer_norms(&self) -> Vec<(&'static str, &'static str)> {
        let mut norms = vec![("input_layernorm", "attn_norm")];
        if self.decoder().sandwich_norms {
            norms.push(("post_attention_layernorm", "post_attention_norm"));
            norms.push(("pre_feedforward_layernorm", "ffn_norm"));
            norms.push(("post_feedforward_layernorm", "post_ffw_norm"));
        } else {
            norms.push(("post_attention_layernorm", "ffn_norm"));
        }
        if self.decoder().qk_norm {
            norms.push(("self_attn.q_norm", "attn_q_norm"));
            norms.push(("self_attn.k_norm", "attn_k_norm"));
        }
        norms
    }

    fn plain(&self, tensor: &str, name: &str) -> Result<Planned> {
        let tensor = format!("{}.{tensor}", self.architecture.names.decoder);
        let part = Part::Whole;
        Planned::stored(self.checkpoint, &tensor, name, part, None)
    }

    fn norm(&self, tensor: &str, name: &str) -> Result<Planned> {
        let adds_one = self.decoder().norm_scale == NormScale::OnePlusWeight;
        Ok(self.plain(tensor, name)?.plus_one(adds_one))
    }

    /// What llama.cpp divides the frequencies by under Llama 3's rope scaling.
    fn rope_factors(&self) -> Option<Planned> {
        let RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        } = self.decoder().rotary.scaling
        else {
            return None;
        };
        let (head_dim, theta) = (self.decoder().head_dim, self.decoder().rotary.theta);
        let of_pair = |pair: usize| {
            let exponent = (2 * pair) as f32 / head_dim as f32;
            let frequency = 1.0 / (theta as f32).powf(exponent);
            let wavelength = std::f64::consts::TAU / f64::from(frequency);
            let turns = original / wavelength;
            if turns > high {
                1.0
            } else if turns < low {
                factor as f32
            } else {
                let smooth = (turns - low) / (high - low);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        };
        let factors: Vec<f32> = (0..head_dim / 2).map(of_pair).collect();
        Some(Planned {
            spec: TensorSpec {
                name: "rope_freqs.weight".into(),
                kind: TensorType::F32,
                shape: vec![factors.len()],
            },
            origin: Origin::Computed { values: factors },
        })
    }
}

fn arch_of(architecture: &Architecture, text: &ConfigNode) -> Result<Arch> {
    let default = match architecture.family {
        "llava_onevision" | "internvl" | "internvl_chat" => "qwen2",
        "mistral3" => "mistral",
        "gemma3" => "gemma3_text",
        _ => "llama",
    };
    match architecture.family {
        "qwen2_vl" | "qwen2_5_vl" => return Ok(QWEN2_VL),
        "qwen3_vl" => return Ok(QWEN3_VL),
        "paligemma" | "qwen3_vl_moe" => {
            let what = format!(
                "the family {} as GGUF; qwen2_vl, qwen2_5_vl, qwen3_vl, llava, llava_next, \
                 llava_onevision, idefics3, smolvlm, internvl, internvl_chat, mistral3 and gemma3 \
                 are written",
                architecture.family
            );
            return Err(Error::Unsupported { what });
        }
        _ => {}
    }
    match text.own_text("model_type").unwrap_or(default) {
        "llama" => Ok(LLAMA),
        "mistral" => Ok(MISTRAL),
        "qwen2" => Ok(QWEN2),
        "qwen3" => Ok(QWEN3),
        "gemma3_text" => Ok(GEMMA3),
        other => Err(Error::Unsupported {
            what: format!(
                "the language model {other} as GGUF; llama, mistral, qwen2, qwen3 and gemma3_text \
                 are written"
            ),
        }),
    }
}
