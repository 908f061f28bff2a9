//! How one layer of the decoder is read: part by part, each when it is needed.

use crate::checkpoint::Checkpoint;
use crate::model::attention::Scoring;
use crate::model::changed::LayerPart;
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::DecoderConfig;
use crate::model::device::ModelDevice;
use crate::model::experts::Router;
use crate::model::linear::{Linear, load_tensor, tensor_from_matrix};
use crate::model::norm::RmsNorm;
use crate::model::projection::{Slot, slots};
use crate::{Matrix, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// Name of the norm before attention.
const BEFORE_ATTENTION: &str = "input_layernorm";

/// Where the parts of one layer are read from, each when it is needed: of a 32B model, the linears
/// of one layer have 2 GB in f32.
#[derive(Clone)]
pub struct LayerSource<'a> {
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Name of the layer in it, e.g. `model.layers.3`.
    pub prefix: String,
    /// Its place among the layers.
    pub layer_idx: usize,
    /// Shapes.
    pub config: &'a DecoderConfig,
    /// Where the weights go.
    pub device: &'a ModelDevice,
}

impl LayerSource<'_> {
    /// The layer with its norms, and none of its linears.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`]: absent tensors, wrong shapes, values that are not finite.
    pub fn norms(&self) -> Result<DecoderLayer> {
        let config = self.config;
        let norm = |name: &str, dim: usize| {
            let name = format!("{}.{name}.weight", self.prefix);
            RmsNorm::load(self.checkpoint, &name, dim, config, self.device)
        };
        let when = |is_there: bool, name: &str, dim: usize| is_there.then(|| norm(name, dim));
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let sandwich = config.sandwich_norms;
        Ok(DecoderLayer {
            linears: BTreeMap::new(),
            router: self.router()?,
            before_attention: norm(BEFORE_ATTENTION, hidden)?,
            after_attention: when(sandwich, "post_attention_layernorm", hidden).transpose()?,
            before_mlp: norm(self.norm_before_mlp(), hidden)?,
            after_mlp: when(sandwich, "post_feedforward_layernorm", hidden).transpose()?,
            queries: when(config.qk_norm, "self_attn.q_norm", head_dim).transpose()?,
            keys: when(config.qk_norm, "self_attn.k_norm", head_dim).transpose()?,
            n_heads: config.n_heads,
            head_dim,
            scoring: Scoring {
                scale: config.score_scale,
                cap: config.score_cap,
            },
            activation: config.activation,
            ahead: config.ahead,
            window: config.window(self.layer_idx),
        })
    }

    /// The whole layer.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn whole(&self) -> Result<DecoderLayer> {
        let mut layer = self.norms()?;
        self.complete(&mut layer, &slots(self.config, self.layer_idx))?;
        Ok(layer)
    }

    /// Reads those of the linears that `layer` does not hold.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn complete(&self, layer: &mut DecoderLayer, slots: &[Slot]) -> Result<()> {
        for &slot in slots {
            if !layer.linears.contains_key(&slot) {
                layer.replace(slot, self.linear(slot, self.weight(slot)?)?);
            }
        }
        Ok(())
    }

    fn router(&self) -> Result<Option<Router>> {
        let config = self.config;
        let experts = config.experts.as_ref();
        let experts = experts.filter(|_| config.n_experts(self.layer_idx).is_some());
        let load = |experts| {
            let name = format!("{}.mlp.gate.weight", self.prefix);
            Router::load(
                self.checkpoint,
                &name,
                experts,
                config.hidden_size,
                self.device,
            )
        };
        experts.map(load).transpose()
    }

    /// The weight `[out, in]` of a linear in f32.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear_weight`].
    pub fn weight(&self, slot: Slot) -> Result<Matrix> {
        let [out, inp] = slot.shape(self.config);
        let name = self.name(slot);
        self.checkpoint.linear_weight(&name, out, inp)
    }

    /// A linear of the layer with this weight and the bias that it has there.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn linear(&self, slot: Slot, weight: Matrix) -> Result<Linear> {
        let bias = slot.has_bias(self.config).then(|| {
            let name = format!("{}.bias", self.name(slot));
            let [out, _] = slot.shape(self.config);
            load_tensor(self.checkpoint, &name, &[out], self.device)
        });
        let weight = tensor_from_matrix(weight, self.device)?;
        Linear::on(self.device, weight, bias.transpose()?)
    }

    /// A sandwiched layer calls the norm before its MLP by another name.
    fn norm_before_mlp(&self) -> &'static str {
        match self.config.sandwich_norms {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        }
    }

    /// Checkpoint name of a part.
    pub fn part_name(&self, part: LayerPart) -> String {
        match part {
            LayerPart::BeforeAttention => format!("{}.{BEFORE_ATTENTION}.weight", self.prefix),
            LayerPart::BeforeMlp => format!("{}.{}.weight", self.prefix, self.norm_before_mlp()),
            LayerPart::Bias(slot) => format!("{}.bias", self.name(slot)),
        }
    }

    /// Values of a part as the checkpoint has them.
    ///
    /// # Errors
    /// As [`LayerSource::norms`].
    pub fn part(&self, part: LayerPart) -> Result<Vec<f32>> {
        let len = match part {
            LayerPart::BeforeAttention | LayerPart::BeforeMlp => self.config.hidden_size,
            LayerPart::Bias(slot) => slot.shape(self.config)[0],
        };
        self.checkpoint.load(&self.part_name(part), &[len])
    }

    /// Puts a part with other values into `layer`, of a linear only if `layer` holds it.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn put(&self, layer: &mut DecoderLayer, part: LayerPart, values: &[f32]) -> Result<()> {
        let tensor = Tensor::from_slice(values, values.len(), self.device)?;
        match part {
            LayerPart::BeforeAttention => {
                layer.before_attention = RmsNorm::of_weight(tensor, self.config)?;
            }
            LayerPart::BeforeMlp => layer.before_mlp = RmsNorm::of_weight(tensor, self.config)?,
            LayerPart::Bias(slot) => {
                if let Some(linear) = layer.linears.get_mut(&slot) {
                    *linear = Linear::new(linear.weight().clone(), Some(tensor));
                }
            }
        }
        Ok(())
    }

    fn name(&self, slot: Slot) -> String {
        format!("{}.{}", self.prefix, slot.name())
    }
}
