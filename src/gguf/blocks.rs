//! Weights as GGUF blocks: our codes, put where llama.cpp looks for its own.
//!
//! A weight is (u − z)·s here. llama.cpp has for it, with d, m, dmin in f16:
//! - Q4_0: d·(q − 8), so q = u − 2^(bits−1) + 8 for symmetric 2, 3 and 4 bits;
//! - Q4_1: d·q + m, so q = u and m = −d·z for asymmetric ones;
//! - Q8_0: d·q of signed q = u − 128 for symmetric 8 bits;
//! - Q3_K: d·k·(q − 4) for symmetric 3 bits, and Q2_K: d·k·q − dmin·k with dmin = 2d for symmetric
//!   2 bits, of groups of 16 whose scales are multiples k of one d for each 256 columns.
//!
//! Codes are never changed. A scale is exact where f16 has it; where it has not it is rounded, and
//! [`Rounding`] says how far. Fewer bits take no less room in Q4_0: the type is exact, not small.
//!
//! Source: ggml-org/llama.cpp `ggml/src/ggml-common.h` and `ggml-quants.c`, `dequantize_row_*`.

use super::container::TensorType;
use super::super_block;
use crate::plan::Scheme;
use crate::plan::super_block::{GROUP, SUPER};
use crate::{Error, QuantizedWeight, Result};
use half::f16;
use serde::Serialize;

/// Weights of a block that is not a super-block.
const BLOCK: usize = 32;

/// How far the numbers beside the codes moved on their way to f16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rounding {
    /// Scales that were written.
    pub n_scales: usize,
    /// Those that f16 does not have.
    pub n_scales_rounded: usize,
    /// Largest relative change of one.
    pub largest_scale_change: f64,
    /// Offsets −d·z that f16 does not have.
    pub n_offsets_rounded: usize,
    /// Largest change of one, in steps of its grid.
    pub largest_offset_change: f64,
}

impl Rounding {
    /// A scale in f16, counted.
    fn scale(&mut self, module: &str, scale: f32) -> Result<f16> {
        let rounded = f16::from_f32(scale);
        if !(rounded.is_finite() && rounded > f16::ZERO) {
            return Err(Error::Unsupported {
                what: format!(
                    "{module}: its scale {scale:e} becomes {rounded} in f16, which GGUF stores; \
                     weights of this size cannot be stored as blocks"
                ),
            });
        }
        self.n_scales += 1;
        if rounded.to_f32() != scale {
            self.n_scales_rounded += 1;
            let change = f64::from(rounded.to_f32() - scale).abs() / f64::from(scale);
            self.largest_scale_change = self.largest_scale_change.max(change);
        }
        Ok(rounded)
    }

    /// The offset −d·z in f16, counted. It goes by the rounded scale: the code that stands for zero
    /// then stays nearest to it.
    fn offset(&mut self, module: &str, scale: f16, zero_point: u8) -> Result<f16> {
        let exact = scale.to_f32() * f32::from(zero_point);
        let rounded = f16::from_f32(exact);
        if !rounded.is_finite() {
            return Err(Error::Unsupported {
                what: format!("{module}: its offset {exact:e} is infinite in f16"),
            });
        }
        if rounded.to_f32() != exact {
            self.n_offsets_rounded += 1;
            let change = f64::from(rounded.to_f32() - exact).abs() / scale.to_f64();
            self.largest_offset_change = self.largest_offset_change.max(change);
        }
        // Plain zero, not minus zero, where there is no offset.
        Ok(if zero_point == 0 { f16::ZERO } else { -rounded })
    }
}

/// The type that holds codes of `scheme` as they are, for a weight of `cols` columns.
///
/// # Errors
/// [`Error::Unsupported`] naming `module`, what was found, and what can be done.
pub(crate) fn kind_of(module: &str, scheme: Scheme, cols: usize) -> Result<TensorType> {
    let refuse = |why: String| {
        Err(Error::Unsupported {
            what: format!("{module}: {why}"),
        })
    };
    let group = scheme.group_len(module, cols)?;
    let (bits, symmetric) = (scheme.bits(), scheme.symmetric());
    if group == GROUP && symmetric && bits < 4 {
        if cols.is_multiple_of(SUPER) {
            return Ok(if bits == 2 {
                TensorType::Q2K
            } else {
                TensorType::Q3K
            });
        }
        return refuse(format!(
            "groups of {GROUP} go into super-blocks of {SUPER} columns, which do not divide its \
             {cols}; quantize it with --group-size 32 or a multiple"
        ));
    }
    if !group.is_multiple_of(BLOCK) {
        return refuse(format!(
            "{group} columns share a scale, blocks of GGUF need a multiple of {BLOCK}; quantize \
             it with --group-size 32 or a multiple that divides its {cols} columns"
        ));
    }
    match (bits, symmetric) {
        (2..=4, true) => Ok(TensorType::Q4_0),
        (2..=4, false) => Ok(TensorType::Q4_1),
        (8, true) => Ok(TensorType::Q8_0),
        _ => refuse(format!(
            "asymmetric {bits} bits have no type in GGUF that holds the codes as they are; \
             quantize it with --symmetric, or export the original folder"
        )),
    }
}

/// The weight as blocks of `kind`, row after row, row `r` of the output being row `rows(r)`.
///
/// # Errors
/// [`Error::Unsupported`] naming `module` for a scale that f16 cannot hold, or for super-blocks
/// whose scales are no multiples of one number.
pub(crate) fn encode(
    module: &str,
    weight: &QuantizedWeight,
    kind: TensorType,
    rows: impl Fn(usize) -> usize,
    rounding: &mut Rounding,
) -> Result<Vec<u8>> {
    let cols = weight.cols();
    let n_blocks = weight.rows() * cols / kind.block_len();
    let mut out = Vec::with_capacity(n_blocks * kind.block_bytes());
    for row in 0..weight.rows() {
        let row = RowOf::new(weight, rows(row));
        match kind {
            TensorType::Q2K | TensorType::Q3K => {
                let is_three = kind == TensorType::Q3K;
                rounding.n_scales += row.scales.len();
                super_block::encode_row(module, row.codes, row.scales, is_three, &mut out)?;
            }
            _ => row.encode(module, kind, rounding, &mut out)?,
        }
    }
    Ok(out)
}

/// One row of a weight.
struct RowOf<'a> {
    bits: u8,
    codes: &'a [u8],
    scales: &'a [f32],
    zero_points: &'a [u8],
}

impl<'a> RowOf<'a> {
    fn new(weight: &'a QuantizedWeight, row: usize) -> Self {
        let (cols, n_groups) = (weight.cols(), weight.n_groups());
        Self {
            bits: weight.scheme().bits(),
            codes: &weight.codes()[row * cols..][..cols],
            scales: weight.scales().row(row),
            zero_points: &weight.zero_points()[row * n_groups..][..n_groups],
        }
    }

    fn encode(
        &self,
        module: &str,
        kind: TensorType,
        rounding: &mut Rounding,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let group = self.codes.len() / self.scales.len();
        let groups = self.codes.chunks_exact(group).zip(self.scales);
        for ((codes, scale), zero_point) in groups.zip(self.zero_points) {
            let d = rounding.scale(module, *scale)?;
            let m = match kind {
                TensorType::Q4_1 => Some(rounding.offset(module, d, *zero_point)?),
                _ => None,
            };
            for block in codes.chunks_exact(BLOCK) {
                out.extend(d.to_le_bytes());
                out.extend(m.into_iter().flat_map(f16::to_le_bytes));
                match kind {
                    // Adding 128 to a byte turns its sign bit: u − 128 as i8.
                    TensorType::Q8_0 => out.extend(block.iter().map(|u| u ^ 0x80)),
                    TensorType::Q4_0 => put_nibbles(block, 8 - (1 << (self.bits - 1)), out),
                    _ => put_nibbles(block, 0, out),
                }
            }
        }
        Ok(())
    }
}

/// 32 codes, each with `shift` added, as 16 bytes: code i low and code i + 16 high.
fn put_nibbles(codes: &[u8], shift: u8, out: &mut Vec<u8>) {
    let (low, high) = codes.split_at(BLOCK / 2);
    let pairs = low.iter().zip(high);
    out.extend(pairs.map(|(low, high)| (low + shift) | ((high + shift) << 4)));
}

/// What llama.cpp makes of `blocks` of `kind`: the weights, in order. `None` for a type that is not
/// one of blocks.
pub fn decode(blocks: &[u8], kind: TensorType) -> Option<Vec<f32>> {
    let f16_at = |b: &[u8], at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let nibbles = |b: &[u8], at: usize, i: usize| match i < BLOCK / 2 {
        true => f32::from(b[at + i] & 15),
        false => f32::from(b[at + i - BLOCK / 2] >> 4),
    };
    let of_block = |b: &[u8]| -> Vec<f32> {
        let d = f16_at(b, 0);
        let each = 0..BLOCK;
        match kind {
            TensorType::Q4_0 => each.map(|i| d * (nibbles(b, 2, i) - 8.0)).collect(),
            TensorType::Q4_1 => each.map(|i| d * nibbles(b, 4, i) + f16_at(b, 2)).collect(),
            TensorType::Q8_0 => each.map(|i| d * f32::from(b[2 + i] as i8)).collect(),
            TensorType::Q2K => super_block::decode_two(b),
            _ => super_block::decode_three(b),
        }
    };
    let blocks = blocks.chunks_exact(kind.block_bytes());
    kind.is_quantized()
        .then(|| blocks.flat_map(of_block).collect())
}

#[cfg(test)]
mod tests;
