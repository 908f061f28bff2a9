//! AWQ's GEMM layout, 4 bits: vLLM, SGLang and transformers load it.
//!
//! Nothing of AWQ's method is in it, no scaled channels: any 4-bit grid fits. Zero points are always
//! stored, so that a symmetric grid is written as one whose zero point is 8 throughout. Scales are
//! float16. Tensor layout: [`crate::checkpoint::Awq`].
//!
//! `modules_to_not_convert` is written twice over: vLLM and SGLang look for an entry anywhere in a
//! name (`visual`), transformers 5 takes it for a pattern from the start of the name (`.*visual`).

use super::file_dtype;
use super::layout::{ConfigEntry, Layout, Part, Schemes, float_bytes, refusal, word_bytes};
use super::names::{regex_for, unquantized_parts};
use crate::checkpoint::{Checkpoint, DType, NIBBLE_OF_OUTPUT, turned};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, QuantizedWeight, Result};
use serde_json::json;

/// Outputs whose codes for one input share a word.
const OUTPUTS_PER_WORD: usize = 8;

pub(super) struct Awq;

impl Layout for Awq {
    fn scale_dtype(&self) -> Option<ScaleDtype> {
        Some(ScaleDtype::F16)
    }

    fn parts(&self, module: &str, scheme: Scheme, [rows, cols]: [usize; 2]) -> Result<Vec<Part>> {
        if scheme.bits() != 4 {
            let why = format!("{} bits, of which it has 4 only", scheme.bits());
            return Err(refusal(module, "awq", why));
        }
        if !rows.is_multiple_of(OUTPUTS_PER_WORD) {
            let why = format!("{rows} outputs, where a word holds {OUTPUTS_PER_WORD} of them");
            return Err(refusal(module, "awq", why));
        }
        let n_groups = cols / scheme.group_len(module, cols)?;
        let n_words = rows / OUTPUTS_PER_WORD;
        Ok(vec![
            Part::new("qweight", DType::I32, &[cols, n_words]),
            Part::new("qzeros", DType::I32, &[n_groups, n_words]),
            Part::new("scales", DType::F16, &[n_groups, rows]),
        ])
    }

    fn bytes(&self, module: &str, weight: &QuantizedWeight) -> Result<Vec<Vec<u8>>> {
        let dtype = file_dtype(weight.scheme().scale_dtype());
        let scales = turned(weight.scales().data(), weight.n_groups());
        Ok(vec![
            nibble_words(&turned(weight.codes(), weight.cols())),
            nibble_words(&turned(weight.zero_points(), weight.n_groups())),
            float_bytes(module, dtype, &scales)?,
        ])
    }

    fn config(&self, source: &Checkpoint, schemes: &Schemes) -> Result<Option<ConfigEntry>> {
        let mut group_sizes = schemes.values().map(|scheme| scheme.group_size());
        let first = group_sizes.next().flatten();
        if !group_sizes.all(|size| size == first) {
            return Err(Error::Unsupported {
                what: "awq: modules with groups of several sizes, of which it knows one".into(),
            });
        }
        let parts = unquantized_parts(source, schemes)?;
        let patterns: Vec<String> = parts.iter().map(|part| regex_for(part, "")).collect();
        let left_out = [parts, patterns].concat();
        Ok(Some(ConfigEntry {
            key: "quantization_config",
            value: json!({
                "quant_method": "awq",
                "bits": 4,
                "group_size": first.map_or(-1, |size| size as i64),
                "zero_point": true,
                "version": "gemm",
                "modules_to_not_convert": left_out,
            }),
        }))
    }
}

/// Bytes of int32 words from codes `[_, outputs]`, eight of neighbouring outputs to a word.
fn nibble_words(codes: &[u8]) -> Vec<u8> {
    let word = |codes: &[u8]| {
        let nibbles = codes.iter().zip(NIBBLE_OF_OUTPUT);
        nibbles.fold(0, |word, (code, at)| word | u32::from(*code) << (4 * at))
    };
    word_bytes(codes.chunks_exact(OUTPUTS_PER_WORD).map(word))
}
