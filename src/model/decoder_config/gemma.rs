//! The three generations of Gemma: norms that multiply by 1 + weight, GELU, scaled embeddings.

use super::{Activation, DecoderConfig, LocalAttention, NormScale, RopeAxes, RopeScaling, Rotary};
use crate::model::config::ConfigNode;
use crate::{Error, Result};

impl DecoderConfig {
    /// Gemma: what all three have.
    pub(super) fn make_gemma(&mut self, text: &ConfigNode) -> Result<()> {
        self.norm_scale = NormScale::OnePlusWeight;
        self.qkv_bias = text.flag_or("attention_bias", false)?;
        self.o_bias = self.qkv_bias;
        self.activation = Activation::GeluTanh;
        self.embedding_scale = (self.hidden_size as f32).sqrt();
        Ok(())
    }

    /// Gemma 2: also sandwich norms, caps on scores and logits, and a local layer before each
    /// global one.
    pub(super) fn make_gemma2(&mut self, text: &ConfigNode) -> Result<()> {
        self.make_gemma(text)?;
        self.sandwich_norms = true;
        self.score_scale = query_scale(text)?;
        self.score_cap = cap(text, "attn_logit_softcapping", 50.0)?;
        self.logit_cap = cap(text, "final_logit_softcapping", 30.0)?;
        if !text.is_null("sliding_window") {
            self.local = Some(LocalAttention {
                window: text.size_or("sliding_window", 4096)?,
                rotary: self.rotary,
                is_local: local_layers(text, self.n_layers, 2)?,
            });
        }
        Ok(())
    }

    /// Gemma 3: also sandwich norms, query and key norms, and five local layers to a global one.
    pub(super) fn make_gemma3(&mut self, text: &ConfigNode) -> Result<()> {
        self.make_gemma(text)?;
        self.sandwich_norms = true;
        self.qk_norm = true;
        self.score_scale = query_scale(text)?;
        // Hub files say `rope_scaling` and mean the global layers; newer ones have both kinds.
        let full = text.nested_or_flat("rope_parameters");
        self.rotary = Rotary::read(&full.nested_or_flat("full_attention"), 1e6)?;
        let parameters = text.inside("rope_parameters");
        let theta = text.positive_or("rope_local_base_freq", 1e4)?;
        let rotary = match parameters.and_then(|p| p.inside("sliding_attention")) {
            Some(node) => Rotary::read(&node, theta)?,
            None => Rotary {
                theta,
                scaling: RopeScaling::None,
                axes: RopeAxes::One,
            },
        };
        self.local = Some(LocalAttention {
            window: text.size_or("sliding_window", 4096)?,
            rotary,
            is_local: local_layers(text, self.n_layers, 6)?,
        });
        Ok(())
    }
}

/// The factor on scores, by `query_pre_attn_scalar`.
fn query_scale(text: &ConfigNode) -> Result<f64> {
    Ok(1.0 / text.positive_or("query_pre_attn_scalar", 256.0)?.sqrt())
}

/// A cap, which is `default` where nothing is said, and none where null is.
fn cap(text: &ConfigNode, key: &str, default: f64) -> Result<Option<f64>> {
    match text.is_null(key) {
        true => Ok(None),
        false => Ok(Some(text.positive_or(key, default)?)),
    }
}

/// For each layer whether it has a window: as `layer_types` says, or all but each
/// `sliding_window_pattern`-th, which is `pattern` where nothing is said.
fn local_layers(text: &ConfigNode, n_layers: usize, pattern: usize) -> Result<Vec<bool>> {
    let Some(types) = text.texts("layer_types")? else {
        let pattern = text.size_or("sliding_window_pattern", pattern)?;
        return Ok((1..=n_layers).map(|i| i % pattern != 0).collect());
    };
    if types.len() != n_layers {
        let why = format!("{} entries for {n_layers} layers", types.len());
        return Err(text.invalid("layer_types", why));
    }
    let is_local = |kind: &&str| match *kind {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(Error::Unsupported {
            what: format!(
                "layer_types {other:?} in config.json; sliding_attention and full_attention are \
                 implemented"
            ),
        }),
    };
    types.iter().map(is_local).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gemma3(text: serde_json::Value) -> Result<DecoderConfig> {
        let root = serde_json::json!({"text_config": text});
        let root = ConfigNode::root(std::path::Path::new("model"), &root);
        DecoderConfig::read(&root, &root.nested("text_config")?, "gemma3_text")
    }

    #[test]
    fn both_spellings_of_gemma3_are_one_decoder() {
        // The hub's 4B leaves out what its time's defaults were; transformers 5 writes all of it.
        let hub = gemma3(serde_json::json!({
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 7,
            "model_type": "gemma3_text", "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}));
        let kinds = [
            vec!["sliding_attention"; 5],
            vec!["full_attention", "sliding_attention"],
        ];
        let new = gemma3(serde_json::json!({
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 7,
            "model_type": "gemma3_text", "sliding_window": 1024, "vocab_size": 262_208,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": null, "tie_word_embeddings": true,
            "layer_types": kinds.concat(),
            "rope_parameters": {
                "full_attention": {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}}));
        let (hub, new) = (hub.unwrap(), new.unwrap());
        assert_eq!(hub, new);
        assert_eq!((hub.window(4), hub.window(5)), (Some(1024), None));
        assert_eq!(hub.rotary.scaling, RopeScaling::Linear(8.0));
        assert_eq!(hub.local.map(|l| l.rotary.scaling), Some(RopeScaling::None));
        assert!(hub.tie_word_embeddings);
        let chunked =
            serde_json::json!({"num_hidden_layers": 1, "layer_types": ["chunked_attention"]});
        assert!(matches!(gemma3(chunked), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn a_cap_of_gemma2_is_the_usual_one_unless_it_is_null() {
        let root = serde_json::json!({"text_config": {"num_hidden_layers": 3,
            "attn_logit_softcapping": null, "final_logit_softcapping": 7.0}});
        let root = ConfigNode::root(std::path::Path::new("model"), &root);
        let text = root.nested("text_config").unwrap();
        let found = DecoderConfig::read(&root, &text, "gemma2").unwrap();
        assert_eq!((found.score_cap, found.logit_cap), (None, Some(7.0)));
        let windows: Vec<_> = (0..3).map(|i| found.window(i)).collect();
        assert_eq!(windows, [Some(4096), None, Some(4096)]);
        assert!(found.tie_word_embeddings && found.sandwich_norms && !found.qk_norm);
        let silent = serde_json::json!({"text_config": {}});
        let silent = ConfigNode::root(std::path::Path::new("model"), &silent);
        let text = silent.nested("text_config").unwrap();
        let found = DecoderConfig::read(&silent, &text, "gemma2").unwrap();
        assert_eq!((found.score_cap, found.logit_cap), (Some(50.0), Some(30.0)));
    }
}
