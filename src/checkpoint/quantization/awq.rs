//! Reading of AWQ folders, GEMM layout, 4 bits.
//!
//! A quantized linear `m` of `[rows, cols]` has
//! - `m.qweight` int32 `[cols, rows/8]`: a word has the codes of eight outputs for one input;
//! - `m.scales` `[n_groups, rows]`;
//! - `m.qzeros` int32 `[n_groups, rows/8]`, words of the same form.
//!
//! Within a word output `i` of eight is at nibble [`NIBBLE_OF_OUTPUT`]`[i]`.
//!
//! Format: casper-hansen/AutoAWQ 0.2.9, `modules/linear/gemm.py` and `utils/packing_utils.py`.

use super::words::turned;
use super::{bad_key, bits_of, group_size_of};
use crate::checkpoint::Checkpoint;
use crate::plan::Scheme;
use crate::{Matrix, QuantizedWeight, Result};
use serde_json::Value;
use std::path::Path;

/// Tensors of a quantized module.
pub(super) const SUFFIXES: [&str; 3] = ["qweight", "scales", "qzeros"];

/// The nibble of a word, counted from the lowest, that each of eight outputs is at.
pub(crate) const NIBBLE_OF_OUTPUT: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

const BITS: u8 = 4;

/// What a `quantization_config` of `quant_method: awq` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awq {
    /// Columns that share a scale; `None` is the whole row.
    pub group_size: Option<usize>,
}

impl Awq {
    pub(super) fn from_config(path: &Path, config: &Value) -> Result<Self> {
        if bits_of(path, config)? != BITS {
            return Err(bad_key(path, "bits", "4", config.get("bits")));
        }
        let version = config.get("version").or_else(|| config.get("format"));
        let name = version.and_then(Value::as_str).map(str::to_lowercase);
        if version.is_some() && name.as_deref() != Some("gemm") {
            return Err(bad_key(path, "version", "\"gemm\"", version));
        }
        let group_size = group_size_of(path, config)?;
        Ok(Self { group_size })
    }

    pub(super) fn read(&self, checkpoint: &Checkpoint, module: &str) -> Result<QuantizedWeight> {
        let name = |suffix: &str| format!("{module}.{suffix}");
        let [cols, n_words] = checkpoint.matrix_shape(&name("qweight"))?;
        let [n_groups, rows] = checkpoint.matrix_shape(&name("scales"))?;
        if rows.checked_div(8) != Some(n_words) || rows % 8 != 0 {
            let why = format!("expected eight outputs to each of {n_words} words, found {rows}");
            return Err(checkpoint.tensor_error(&name("scales"), why));
        }
        let codes = nibbles(&checkpoint.words(&name("qweight"), [cols, n_words])?);
        let zeros = nibbles(&checkpoint.words(&name("qzeros"), [n_groups, n_words])?);
        let scales = checkpoint.load(&name("scales"), &[n_groups, rows])?;
        let scales = Matrix::from_vec(&name("scales"), rows, n_groups, turned(&scales, rows))?;
        let scheme = Scheme::new(
            BITS,
            self.group_size,
            false,
            checkpoint.scale_dtype(&name("scales"))?,
        )?;
        let (codes, zeros) = (turned(&codes, rows), turned(&zeros, rows));
        QuantizedWeight::new(module, scheme, [rows, cols], codes, scales, zeros)
    }
}

/// `[rows, cols]` of a module.
pub(super) fn shape(checkpoint: &Checkpoint, module: &str) -> Result<[usize; 2]> {
    let [cols, _] = checkpoint.matrix_shape(&format!("{module}.qweight"))?;
    let [_, rows] = checkpoint.matrix_shape(&format!("{module}.scales"))?;
    Ok([rows, cols])
}

/// Eight codes of each word, in the order of outputs.
fn nibbles(words: &[u32]) -> Vec<u8> {
    let of_word = |word: &u32| {
        let word = *word;
        NIBBLE_OF_OUTPUT.map(|nibble| ((word >> (4 * nibble)) & 15) as u8)
    };
    words.iter().flat_map(of_word).collect()
}
