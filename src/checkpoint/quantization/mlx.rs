//! Reading of MLX folders, affine mode, of which the biases are whole multiples of the scales.
//!
//! A quantized linear `m` of `[rows, cols]` has
//! - `m.weight` uint32 `[rows, cols·bits/32]`, each row a bitstream of codes;
//! - `m.scales` and `m.biases` `[rows, n_groups]`.
//!
//! A weight is code · scale + bias. Ours have bias = −zero_point · scale, rounded to the type that
//! both are stored in, and are read back so; a bias that is no such multiple is refused.
//!
//! Format: ml-explore/mlx 0.32, `mx.quantize`; config as mlx-vlm reads it.

use super::{bad_key, bits_of, group_size_of};
use crate::checkpoint::Checkpoint;
use crate::plan::{ScaleDtype, Scheme};
use crate::{Matrix, QuantizedWeight, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors of a quantized module.
pub(super) const SUFFIXES: [&str; 3] = ["weight", "scales", "biases"];

/// What a `quantization` object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mlx {
    /// Bits and columns that share a scale, of most modules.
    common: Grouping,
    /// Those of modules that are named.
    named: BTreeMap<String, Grouping>,
}

/// Bits and group size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grouping {
    bits: u8,
    group_size: usize,
}

impl Grouping {
    fn from_json(path: &Path, found: &Value) -> Result<Self> {
        let expected = "a positive integer";
        let group_size = group_size_of(path, found)?
            .ok_or_else(|| bad_key(path, "group_size", expected, found.get("group_size")))?;
        let bits = bits_of(path, found)?;
        Ok(Self { bits, group_size })
    }
}

impl Mlx {
    pub(super) fn from_config(path: &Path, config: &Value) -> Result<Self> {
        let mode = config.get("mode");
        if mode.is_some_and(|mode| mode.as_str() != Some("affine")) {
            return Err(bad_key(path, "quantization.mode", "\"affine\"", mode));
        }
        let common = Grouping::from_json(path, config)?;
        let entries = config.as_object().into_iter().flatten();
        let named = entries
            .filter(|(_, value)| value.is_object())
            .map(|(name, value)| Ok((name.clone(), Grouping::from_json(path, value)?)))
            .collect::<Result<_>>()?;
        Ok(Self { common, named })
    }

    /// `[rows, cols]` of a module.
    pub(super) fn shape(&self, checkpoint: &Checkpoint, module: &str) -> Result<[usize; 2]> {
        let group_size = self.named.get(module).unwrap_or(&self.common).group_size;
        let [rows, n_groups] = checkpoint.matrix_shape(&format!("{module}.scales"))?;
        Ok([rows, n_groups.saturating_mul(group_size)])
    }

    pub(super) fn read(&self, checkpoint: &Checkpoint, module: &str) -> Result<QuantizedWeight> {
        let name = |suffix: &str| format!("{module}.{suffix}");
        let Grouping { bits, group_size } = *self.named.get(module).unwrap_or(&self.common);
        let [rows, n_groups] = checkpoint.matrix_shape(&name("scales"))?;
        let dtype = checkpoint.scale_dtype(&name("scales"))?;
        let scheme = Scheme::new(bits, Some(group_size), false, dtype)?;
        let cols = n_groups.saturating_mul(group_size);
        let codes = checkpoint.codes_along_rows(&name("weight"), [rows, cols], bits)?;
        let scales = checkpoint.load(&name("scales"), &[rows, n_groups])?;
        let biases = checkpoint.load(&name("biases"), &[rows, n_groups])?;
        let zeros = zero_points(&scales, &biases, scheme).ok_or_else(|| {
            let why = "expected whole multiples of the scales: only such grids are read";
            checkpoint.tensor_error(&name("biases"), why)
        })?;
        let scales = Matrix::from_vec(&name("scales"), rows, n_groups, scales)?;
        QuantizedWeight::new(module, scheme, [rows, cols], codes, scales, zeros)
    }
}

/// The bias that a grid has in this format.
pub(crate) fn bias(scale: f32, zero_point: u8, dtype: ScaleDtype) -> f32 {
    dtype.round(-scale * f32::from(zero_point))
}

fn zero_points(scales: &[f32], biases: &[f32], scheme: Scheme) -> Option<Vec<u8>> {
    let dtype = scheme.scale_dtype();
    let zero = |(scale, found): (&f32, &f32)| {
        let zero = (-found / scale).round();
        let zero = (0.0..=f32::from(scheme.max_code()))
            .contains(&zero)
            .then_some(zero as u8)?;
        (bias(*scale, zero, dtype) == *found).then_some(zero)
    };
    scales.iter().zip(biases).map(zero).collect()
}
