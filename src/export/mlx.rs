//! MLX's affine form, which mlx-vlm loads on Apple hardware.
//!
//! A weight is code · scale + bias there, so a grid with a zero point has bias = −zero_point · scale,
//! rounded to the type of the scales: exact for a symmetric grid, whose zero point is a power of two,
//! else within half a unit in the last place. Tensor layout: [`crate::checkpoint::Mlx`].

use super::compressed_tensors::packed_rows;
use super::file_dtype;
use super::layout::{ConfigEntry, Layout, Part, Schemes, float_bytes, refusal};
use crate::checkpoint::{Checkpoint, DType, mlx_bias};
use crate::plan::{ScaleDtype, Scheme};
use crate::{QuantizedWeight, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Groups that its kernels know.
const GROUP_SIZES: [usize; 3] = [32, 64, 128];

pub(super) struct Mlx;

impl Layout for Mlx {
    fn parts(&self, module: &str, scheme: Scheme, [rows, cols]: [usize; 2]) -> Result<Vec<Part>> {
        let group_len = scheme.group_len(module, cols)?;
        if scheme.group_size().is_none() {
            let why = format!(
                "one scale for a row (per channel), groups of one of {GROUP_SIZES:?} expected"
            );
            return Err(refusal(module, "mlx", why));
        }
        if !GROUP_SIZES.contains(&group_len) {
            let why = format!("groups of {group_len}, one of {GROUP_SIZES:?} expected");
            return Err(refusal(module, "mlx", why));
        }
        if scheme.bits() == 8 && !scheme.symmetric() && scheme.scale_dtype() == ScaleDtype::Bf16 {
            let why = "zero points of 8 bits, which bfloat16 biases do not tell apart; make it \
                       --symmetric";
            return Err(refusal(module, "mlx", why));
        }
        let n_words = cols * usize::from(scheme.bits()) / 32;
        let scales = file_dtype(scheme.scale_dtype());
        let groups = [rows, cols / group_len];
        Ok(vec![
            Part::new("weight", DType::U32, &[rows, n_words]),
            Part::new("scales", scales, &groups),
            Part::new("biases", scales, &groups),
        ])
    }

    fn bytes(&self, module: &str, weight: &QuantizedWeight) -> Result<Vec<Vec<u8>>> {
        let scheme = weight.scheme();
        let dtype = file_dtype(scheme.scale_dtype());
        let scales = weight.scales().data();
        let grids = scales.iter().zip(weight.zero_points());
        let biases: Vec<f32> = grids
            .map(|(scale, zero)| mlx_bias(*scale, *zero, scheme.scale_dtype()))
            .collect();
        Ok(vec![
            packed_rows(weight.codes(), weight.cols(), scheme.bits()),
            float_bytes(module, dtype, scales)?,
            float_bytes(module, dtype, &biases)?,
        ])
    }

    fn config(&self, _source: &Checkpoint, schemes: &Schemes) -> Result<Option<ConfigEntry>> {
        let mut counts: BTreeMap<(u8, Option<usize>), usize> = BTreeMap::new();
        let key = |scheme: &Scheme| (scheme.bits(), scheme.group_size());
        for scheme in schemes.values() {
            *counts.entry(key(scheme)).or_default() += 1;
        }
        let common = counts.iter().max_by_key(|(_, n)| **n).map(|(key, _)| *key);
        let entry = |(bits, group_size): (u8, Option<usize>)| {
            let mode = "affine";
            json!({"group_size": group_size, "bits": bits, "mode": mode})
        };
        let mut value = common.map_or(Value::Null, entry);
        let others = schemes.iter().filter(|(_, s)| Some(key(s)) != common);
        for (name, scheme) in others {
            value[name] = entry(key(scheme));
        }
        let key = "quantization";
        Ok(Some(ConfigEntry { key, value }))
    }
}
