//! The compressed-tensors `pack-quantized` form, which vLLM and transformers load.
//!
//! Tensor layout: see [`crate::checkpoint::CompressedTensors`], whose reader verifies what is written.
//! Two rules keep the folder loadable where other tools' folders break:
//! - tensors keep the source's names, because every loader knows those and renames them itself;
//! - `ignore` holds only `re:.*…` patterns and `lm_head`: loaders put different prefixes before
//!   the same module (`visual.` becomes `model.visual.` in transformers 5, `model.layers.` becomes
//!   `language_model.model.layers.` in vLLM) and match patterns from the start of the name.
//!
//! Format: vllm-project/compressed-tensors 0.20.0, `compressors/pack_quantized`. Its 3-bit words
//! are dense since 0.18.0, so that is the oldest version that reads 3-bit folders.

use super::file_dtype;
use super::layout::{ConfigEntry, Layout, Part, Schemes, float_bytes, refusal, word_bytes};
use super::names::{ignore_patterns, rule_for};
use crate::checkpoint::{Checkpoint, DType};
use crate::pack::{pack, words_for};
use crate::plan::Scheme;
use crate::{QuantizedWeight, Result};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Oldest compressed-tensors version whose packing is ours, written to `config.json`.
const FORMAT_VERSION: &str = "0.18.0";

pub(super) struct CompressedTensors;

impl Layout for CompressedTensors {
    fn parts(&self, module: &str, scheme: Scheme, [rows, cols]: [usize; 2]) -> Result<Vec<Part>> {
        let words = |n| {
            let why = format!("{n} codes of {} bits overflow", scheme.bits());
            words_for(n, scheme.bits()).ok_or_else(|| refusal(module, "compressed-tensors", why))
        };
        let n_groups = cols / scheme.group_len(module, cols)?;
        let scales = file_dtype(scheme.scale_dtype());
        let mut parts = vec![
            Part::new("weight_packed", DType::I32, &[rows, words(cols)?]),
            Part::new("weight_scale", scales, &[rows, n_groups]),
            Part::new("weight_shape", DType::I64, &[2]),
        ];
        if !scheme.symmetric() {
            let shape = [words(rows)?, n_groups];
            parts.push(Part::new("weight_zero_point", DType::I32, &shape));
        }
        Ok(parts)
    }

    fn bytes(&self, module: &str, weight: &QuantizedWeight) -> Result<Vec<Vec<u8>>> {
        let scheme = weight.scheme();
        let bits = scheme.bits();
        let scales = file_dtype(scheme.scale_dtype());
        let shape = [weight.rows() as i64, weight.cols() as i64].map(i64::to_le_bytes);
        let mut bytes = vec![
            packed_rows(weight.codes(), weight.cols(), bits),
            float_bytes(module, scales, weight.scales().data())?,
            shape.as_flattened().to_vec(),
        ];
        if !scheme.symmetric() {
            bytes.push(packed_columns(
                weight.zero_points(),
                weight.n_groups(),
                bits,
            ));
        }
        Ok(bytes)
    }

    fn config(&self, source: &Checkpoint, schemes: &Schemes) -> Result<Option<ConfigEntry>> {
        let ignore = ignore_patterns(source, schemes)?;
        Ok(Some(ConfigEntry {
            key: "quantization_config",
            value: quantization_config(schemes, &ignore),
        }))
    }
}

/// The `quantization_config` object. The format that most modules have is the one for every
/// `Linear`; the modules of each other format are named by patterns. SGLang takes a whole that it runs
/// as one for a `Linear` before it looks at its parts, so that patterns hold its name too.
fn quantization_config(schemes: &Schemes, ignore: &[String]) -> Value {
    let mut formats: Vec<(Scheme, Vec<&str>)> = Vec::new();
    for (name, scheme) in schemes {
        match formats.iter_mut().find(|(s, _)| s == scheme) {
            Some((_, names)) => names.push(name),
            None => formats.push((*scheme, vec![name])),
        }
    }
    formats.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
    let mut groups = serde_json::Map::new();
    for (i, (scheme, names)) in formats.iter().enumerate() {
        let rules: BTreeSet<String> = match i {
            0 => ["Linear".to_owned()].into(),
            _ => names
                .iter()
                .map(|name| format!("re:{}", rule_for(name, schemes)))
                .collect(),
        };
        let targets = rules.into_iter().collect();
        groups.insert(format!("group_{i}"), group_json(*scheme, targets));
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
        "version": FORMAT_VERSION,
    })
}

/// One entry of `config_groups`. `actorder` is null also for columns solved in another order:
/// the stored order is the natural one, so no loader has anything to do.
fn group_json(scheme: Scheme, targets: Vec<String>) -> Value {
    json!({
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits(),
            "type": "int",
            "symmetric": scheme.symmetric(),
            "strategy": if scheme.group_size().is_some() { "group" } else { "channel" },
            "group_size": scheme.group_size(),
            "block_structure": null,
            "dynamic": false,
            "actorder": null,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": null,
        "output_activations": null,
        "format": "pack-quantized",
    })
}

/// Bytes of int32 `[rows, ceil(cols·bits/32)]`.
pub(super) fn packed_rows(codes: &[u8], cols: usize, bits: u8) -> Vec<u8> {
    let rows = codes.chunks_exact(cols);
    word_bytes(rows.flat_map(|row| pack(row, bits)))
}

/// Bytes of int32 `[ceil(rows·bits/32), n_groups]` for zero points `[rows, n_groups]`.
pub(super) fn packed_columns(zero_points: &[u8], n_groups: usize, bits: u8) -> Vec<u8> {
    let columns: Vec<Vec<u32>> = (0..n_groups)
        .map(|group| {
            let column = zero_points.iter().skip(group).step_by(n_groups).copied();
            pack(&column.collect::<Vec<u8>>(), bits)
        })
        .collect();
    let n_words = columns.first().map_or(0, Vec::len);
    word_bytes((0..n_words).flat_map(|word| columns.iter().map(move |column| column[word])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn zero_points_pack_down_their_columns(
            bits in prop::sample::select(Scheme::BITS.to_vec()),
            rows in 1usize..40,
            n_groups in 1usize..5,
            seed in any::<u8>(),
        ) {
            let mask = ((1u16 << bits) - 1) as u8;
            let zeros: Vec<u8> = (0..rows * n_groups)
                .map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed) & mask)
                .collect();
            let bytes = packed_columns(&zeros, n_groups, bits);
            let n_words = words_for(rows, bits).unwrap();
            prop_assert_eq!(bytes.len(), 4 * n_words * n_groups);
            let (words, _) = bytes.as_chunks::<4>();
            for (i, zero) in zeros.iter().enumerate() {
                let (row, group) = (i / n_groups, i % n_groups);
                let code = (0..usize::from(bits)).fold(0u8, |code, b| {
                    let bit = row * usize::from(bits) + b;
                    let word = u32::from_le_bytes(words[bit / 32 * n_groups + group]);
                    code | (((word >> (bit % 32)) & 1) as u8) << b
                });
                prop_assert_eq!(code, *zero);
            }
        }
    }
}
