//! Reading of GPTQ folders, v1 and v2.
//!
//! A quantized linear `m` of `[rows, cols]` has
//! - `m.qweight` int32 `[cols·bits/32, rows]`, each column a bitstream of an output's codes;
//! - `m.scales` `[n_groups, rows]`;
//! - `m.qzeros` int32 `[n_groups, rows·bits/32]`, each row a bitstream of a group's zero points:
//!   v2 has the zero point itself, v1 one less, modulo 2^bits;
//! - `m.g_idx` int32 `[cols]`, the group of each column; absent is i // group_size.
//!
//! Which bits a module has follows from its shapes, so that `dynamic` need not be understood.
//!
//! Format: ModelCloud/GPTQModel 7.7.0, `nn_modules/qlinear`.

use super::columns::Columns;
use super::words::turned;
use super::{Packed, bad_key, bits_of, group_size_of};
use crate::checkpoint::{Checkpoint, DType};
use crate::plan::Scheme;
use crate::{Error, Matrix, QuantizedWeight, Result};
use serde_json::Value;
use std::path::Path;

/// Tensors of a quantized module.
pub(super) const SUFFIXES: [&str; 4] = ["qweight", "scales", "qzeros", "g_idx"];

/// What a `quantization_config` of `quant_method: gptq` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gptq {
    /// Bits of most modules.
    pub bits: u8,
    /// Columns that share a scale; `None` is the whole row.
    pub group_size: Option<usize>,
    /// Whether zero points are 2^(bits−1) throughout.
    pub symmetric: bool,
    /// Whether zero points are stored as they are (v2), not one less.
    pub is_v2: bool,
}

impl Gptq {
    pub(super) fn from_config(path: &Path, config: &Value) -> Result<Self> {
        let first = |keys: [&str; 2]| keys.iter().find_map(|key| config.get(*key));
        let version = first(["checkpoint_format", "format"]).unwrap_or(&Value::Null);
        let is_v2 = match version.as_str() {
            Some("gptq") => false,
            Some("gptq_v2") => true,
            None if version.is_null() => false,
            _ => {
                let expected = "\"gptq\" or \"gptq_v2\"";
                return Err(bad_key(path, "checkpoint_format", expected, Some(version)));
            }
        };
        Ok(Self {
            bits: bits_of(path, config)?,
            group_size: group_size_of(path, config)?,
            symmetric: config.get("sym").and_then(Value::as_bool).unwrap_or(true),
            is_v2,
        })
    }

    pub(super) fn read(&self, checkpoint: &Checkpoint, module: &str) -> Result<Packed> {
        let name = |suffix: &str| format!("{module}.{suffix}");
        let [n_groups, rows] = checkpoint.matrix_shape(&name("scales"))?;
        let [n_words, _] = checkpoint.matrix_shape(&name("qweight"))?;
        let columns = self.groups(checkpoint, module, n_words, n_groups)?;
        let cols = columns.n;
        let bits = n_words * 32 / cols;
        let bits = u8::try_from(bits).ok().filter(|b| Scheme::BITS.contains(b));
        let bits = bits.ok_or_else(|| {
            let why = format!("{n_words} words for {cols} codes: 2, 3, 4 or 8 bits expected");
            checkpoint.tensor_error(&name("qweight"), why)
        })?;
        let codes = checkpoint.codes_down_columns(&name("qweight"), [cols, rows], bits)?;
        let codes = columns.places.gather(codes, cols);
        let zeros = checkpoint.codes_along_rows(&name("qzeros"), [n_groups, rows], bits)?;
        let mask = ((1u16 << bits) - 1) as u8;
        let zeros: Vec<u8> = zeros
            .into_iter()
            .map(|z| if self.is_v2 { z } else { (z + 1) & mask })
            .collect();
        let zeros = turned(&zeros, rows);
        let scales = checkpoint.load(&name("scales"), &[n_groups, rows])?;
        let scales = Matrix::from_vec(&name("scales"), rows, n_groups, turned(&scales, rows))?;
        let middle = 1 << (bits - 1);
        let scheme = Scheme::new(
            bits,
            (n_groups > 1).then_some(cols / n_groups),
            self.symmetric && zeros.iter().all(|z| *z == middle),
            checkpoint.scale_dtype(&name("scales"))?,
        )?;
        // One group may be the whole row by chance or by intent.
        let scheme = match (n_groups, self.group_size) {
            (1, Some(size)) if size == cols => scheme.with_group_size(Some(size))?,
            _ => scheme,
        };
        let weight = QuantizedWeight::new(module, scheme, [rows, cols], codes, scales, zeros)?;
        Ok(Packed {
            weight,
            columns: columns.places,
        })
    }

    /// `[rows, cols]` of a module.
    pub(super) fn shape(&self, checkpoint: &Checkpoint, module: &str) -> Result<[usize; 2]> {
        let name = |suffix: &str| format!("{module}.{suffix}");
        let [n_groups, rows] = checkpoint.matrix_shape(&name("scales"))?;
        let [n_words, _] = checkpoint.matrix_shape(&name("qweight"))?;
        let columns = self.groups(checkpoint, module, n_words, n_groups)?;
        Ok([rows, columns.n])
    }

    fn groups(
        &self,
        checkpoint: &Checkpoint,
        module: &str,
        n_words: usize,
        n_groups: usize,
    ) -> Result<Groups> {
        let name = format!("{module}.g_idx");
        if !checkpoint.contains(&name) {
            let n = n_words * 32 / usize::from(self.bits.max(1));
            let places = Columns::InOrder;
            return Ok(Groups { n, places });
        }
        let info = checkpoint.require_info(&name)?;
        if info.dtype != DType::I32 || info.shape.len() != 1 || info.shape[0] == 0 {
            let why = format!(
                "expected I32 [n], found {} {:?}",
                info.dtype.name(),
                info.shape
            );
            return Err(checkpoint.tensor_error(&name, why));
        }
        let bytes = checkpoint.bytes(&name)?;
        let (groups, _) = bytes.as_chunks::<4>();
        let groups: Vec<i64> = groups
            .iter()
            .map(|b| i64::from(i32::from_le_bytes(*b)))
            .collect();
        let places = Columns::from_groups(&groups, n_groups);
        let places = places.ok_or_else(|| -> Error {
            let why = format!("expected {n_groups} groups of one size, counted from 0");
            checkpoint.tensor_error(&name, why)
        })?;
        Ok(Groups {
            n: groups.len(),
            places,
        })
    }
}

impl Checkpoint {
    /// Zero points `[n_groups, rows]` of a GPTQ module with codes of so many bits, as they are
    /// stored, whatever the configuration says of them.
    ///
    /// # Errors
    /// As [`Checkpoint::packed_module`] for its `scales` and `qzeros`.
    pub(crate) fn stored_zero_points(&self, module: &str, bits: u8) -> Result<Vec<u8>> {
        let [n_groups, rows] = self.matrix_shape(&format!("{module}.scales"))?;
        self.codes_along_rows(&format!("{module}.qzeros"), [n_groups, rows], bits)
    }
}

/// The columns of a linear.
struct Groups {
    n: usize,
    places: Columns,
}
