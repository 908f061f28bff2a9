//! GPTQ folders: GPTQModel, transformers, vLLM and SGLang load them.
//!
//! Symmetric grids are written as v1, whose readers are many: zero points are stored less one, and 2,
//! 4 and 8 become 1, 3 and 7. If any module is asymmetric the folder is v2, with zero points as
//! they are, since a v1 zero point of 0 wraps around and spills into its neighbour in some readers.
//! Columns stay in their natural order, so `desc_act` is false whatever order they were solved in,
//! and `g_idx` is column / group size. Scales are float16. Tensor layout: [`crate::checkpoint::Gptq`].
//!
//! A vision-language model needs three things in the configuration that a text model does not:
//! - `dynamic` with `-:` patterns for everything that has no codes (vLLM, SGLang, GPTQModel);
//! - `block_name_to_quantize`, the name that the decoder's layers have in transformers' memory
//!   (`model.language_model.layers` where the file says `model.layers`), since optimum knows only some;
//! - `modules_in_block_to_quantize` if some linears of the layers have no codes in any layer. It is
//!   left out otherwise: vLLM looks for its entries anywhere in a name, vision tower included.
//!
//! Format: ModelCloud/GPTQModel 7.7.0; vLLM 0.33 `auto_gptq.py`; optimum 2.3 `gptq/quantizer.py`.

use super::compressed_tensors::packed_rows;
use super::file_dtype;
use super::layout::{ConfigEntry, Layout, Part, Schemes, float_bytes, refusal, word_bytes};
use super::names::{
    layers_of, plain_among_coded, plain_matrices, rule_for, stable_part, unquantized_patterns,
    within_layer,
};
use crate::checkpoint::{Checkpoint, DType, turned};
use crate::pack::pack;
use crate::plan::{ScaleDtype, Scheme};
use crate::{QuantizedWeight, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

/// Codes whose words readers take apart at once: both sides of a weight must be multiples.
const CODES_AT_ONCE: usize = 32;

/// One of the two versions.
pub(super) struct Gptq {
    /// Whether zero points are stored as they are.
    is_v2: bool,
}

pub(super) const V1: Gptq = Gptq { is_v2: false };
pub(super) const V2: Gptq = Gptq { is_v2: true };

impl Layout for Gptq {
    fn scale_dtype(&self) -> Option<ScaleDtype> {
        Some(ScaleDtype::F16)
    }

    fn parts(&self, module: &str, scheme: Scheme, [rows, cols]: [usize; 2]) -> Result<Vec<Part>> {
        if !rows.is_multiple_of(CODES_AT_ONCE) || !cols.is_multiple_of(CODES_AT_ONCE) {
            let why = format!("[{rows}, {cols}], both multiples of {CODES_AT_ONCE} expected");
            return Err(refusal(module, "gptq", why));
        }
        let bits = usize::from(scheme.bits());
        let n_groups = cols / scheme.group_len(module, cols)?;
        Ok(vec![
            Part::new("qweight", DType::I32, &[cols * bits / 32, rows]),
            Part::new("qzeros", DType::I32, &[n_groups, rows * bits / 32]),
            Part::new("scales", DType::F16, &[n_groups, rows]),
            Part::new("g_idx", DType::I32, &[cols]),
        ])
    }

    fn bytes(&self, module: &str, weight: &QuantizedWeight) -> Result<Vec<Vec<u8>>> {
        let scheme = weight.scheme();
        let (bits, n_groups) = (scheme.bits(), weight.n_groups());
        let group_len = weight.cols() / n_groups;
        let less = u8::from(!self.is_v2);
        let zeros: Vec<u8> = weight.zero_points().iter().map(|z| z - less).collect();
        let scales = turned(weight.scales().data(), n_groups);
        let dtype = file_dtype(scheme.scale_dtype());
        let groups = (0..weight.cols()).map(|column| (column / group_len) as u32);
        Ok(vec![
            packed_down(weight, bits),
            packed_rows(&turned(&zeros, n_groups), weight.rows(), bits),
            float_bytes(module, dtype, &scales)?,
            word_bytes(groups),
        ])
    }

    fn config(&self, source: &Checkpoint, schemes: &Schemes) -> Result<Option<ConfigEntry>> {
        let common = most_common(schemes);
        let group_size = |scheme: Scheme| scheme.group_size().map_or(-1, |size| size as i64);
        let version = if self.is_v2 { "gptq_v2" } else { "gptq" };
        let mut dynamic = Map::new();
        for pattern in unquantized_patterns(source, schemes)? {
            dynamic.insert(format!("-:{pattern}"), json!({}));
        }
        for (name, scheme) in schemes.iter().filter(|(_, s)| Some(**s) != common) {
            let of_module = json!({
                "bits": scheme.bits(),
                "group_size": group_size(*scheme),
                "sym": scheme.symmetric(),
            });
            dynamic.insert(format!("+:{}", rule_for(name, schemes)), of_module);
        }
        let mut value = json!({
            "quant_method": "gptq",
            "bits": common.map(Scheme::bits),
            "group_size": common.map(group_size),
            "desc_act": false,
            "sym": common.map(Scheme::symmetric),
            "lm_head": false,
            "checkpoint_format": version,
            "pack_dtype": "int32",
            "true_sequential": true,
            "static_groups": false,
            "dynamic": dynamic,
            "block_name_to_quantize": block_name(schemes),
            "meta": {"quantizer": [concat!("vlmq:", env!("CARGO_PKG_VERSION"))]},
        });
        if let Some(modules) = modules_in_block(source, schemes) {
            value["modules_in_block_to_quantize"] = modules;
        }
        let key = "quantization_config";
        Ok(Some(ConfigEntry { key, value }))
    }

    fn notes(&self, source: &Checkpoint, schemes: &Schemes) -> Vec<String> {
        let plain = plain_among_coded(source, |module| schemes.contains_key(module));
        let plain = plain.map(|module| {
            format!(
                "transformers does not load it: optimum puts codes into every layer alike, and \
                 {module} has none; --format compressed-tensors makes what it reads"
            )
        });
        plain.into_iter().collect()
    }

    fn files(&self, entry: Option<&ConfigEntry>) -> Vec<(&'static str, String)> {
        let text = |entry: &ConfigEntry| format!("{:#}\n", entry.value);
        entry
            .map(|entry| ("quantize_config.json", text(entry)))
            .into_iter()
            .collect()
    }
}

/// Bytes of int32 `[cols·bits/32, rows]`: each row's codes are a column's stream.
fn packed_down(weight: &QuantizedWeight, bits: u8) -> Vec<u8> {
    let rows = weight.codes().chunks_exact(weight.cols());
    let words: Vec<u32> = rows.flat_map(|row| pack(row, bits)).collect();
    let n_words = weight.cols() * usize::from(bits) / 32;
    word_bytes(turned(&words, n_words))
}

fn most_common(schemes: &Schemes) -> Option<Scheme> {
    let mut counts: Vec<(Scheme, usize)> = Vec::new();
    for scheme in schemes.values() {
        match counts.iter_mut().find(|(known, _)| known == scheme) {
            Some((_, n)) => *n += 1,
            None => counts.push((*scheme, 1)),
        }
    }
    let most = counts.iter().rev().max_by_key(|(_, n)| *n);
    most.map(|(scheme, _)| *scheme)
}

/// What the decoder's layers are called in transformers' memory, from their name in the file.
fn block_name(schemes: &Schemes) -> Option<String> {
    let name = schemes.keys().next()?;
    let before = name.strip_suffix(stable_part(name))?.trim_end_matches('.');
    let layers = stable_part(name).split('.').next()?;
    let decoder = match before {
        "model" | "language_model.model" => "model.language_model",
        other => other,
    };
    Some(format!("{decoder}.{layers}"))
}

/// The linears of a layer that have codes, if others have none in any layer.
fn modules_in_block(source: &Checkpoint, schemes: &Schemes) -> Option<Value> {
    let coded: BTreeSet<&str> = schemes
        .keys()
        .filter_map(|name| within_layer(name))
        .collect();
    let layers = layers_of(schemes.keys().next()?);
    let plain = plain_matrices(source, |module| schemes.contains_key(module));
    let mut in_layers = plain.iter().filter(|name| layers_of(name) == layers);
    let some_are_plain =
        in_layers.any(|name| within_layer(name).is_some_and(|module| !coded.contains(module)));
    some_are_plain.then(|| json!([coded]))
}
