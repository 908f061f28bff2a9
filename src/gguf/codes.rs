//! The way back of [`super::encode`]: codes, scales and zero points of a weight from its blocks.

use super::TensorType;
use super::super_block;
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Matrix, QuantizedWeight, Result};
use half::f16;

/// Columns of a block with one scale.
pub(super) struct Group {
    /// One for each column.
    pub(super) codes: Vec<u8>,
    /// Positive in any sound file.
    pub(super) scale: f32,
    /// The code that stands for zero.
    pub(super) zero_point: u8,
}

/// The weight of `shape` `[rows, cols]` whose codes are of `scheme`, from its `blocks` of `kind`.
///
/// # Errors
/// [`Error::Invalid`] naming `module` if the blocks hold no such weight; [`Error::Shape`] if they are
/// of another number.
pub(crate) fn codes(
    module: &str,
    blocks: &[u8],
    kind: TensorType,
    scheme: Scheme,
    shape: [usize; 2],
) -> Result<QuantizedWeight> {
    let wrong = || Error::Invalid {
        what: module.to_owned(),
        why: format!(
            "expected {} blocks with codes of {} bits, found others",
            kind.name(),
            scheme.bits()
        ),
    };
    let scale_dtype = match kind {
        TensorType::Q2K | TensorType::Q3K => ScaleDtype::F32,
        _ => ScaleDtype::F16,
    };
    let scheme = scheme.with_scale_dtype(scale_dtype);
    let group_len = scheme.group_len(module, shape[1])?;
    let blocks = blocks.chunks_exact(kind.block_bytes());
    let groups = blocks.map(|block| groups_of(block, kind, scheme.bits()));
    let groups: Option<Vec<Vec<Group>>> = groups.collect();
    let groups: Vec<Group> = groups.ok_or_else(wrong)?.into_iter().flatten().collect();
    let n_shared = groups
        .first()
        .map_or(1, |group| group_len / group.codes.len());
    let shared = || groups.chunks(n_shared.max(1));
    let is_same = |a: &Group, b: &Group| (a.scale, a.zero_point) == (b.scale, b.zero_point);
    if !shared().all(|groups| groups.iter().all(|group| is_same(group, &groups[0]))) {
        return Err(wrong());
    }
    let scales: Vec<f32> = shared().map(|groups| groups[0].scale).collect();
    let zero_points = shared().map(|groups| groups[0].zero_point).collect();
    let codes = groups.iter().flat_map(|group| group.codes.iter().copied());
    let name = format!("scales of {module}");
    let scales = Matrix::from_vec(&name, shape[0], shape[1] / group_len, scales)?;
    QuantizedWeight::new(module, scheme, shape, codes.collect(), scales, zero_points)
}

/// The groups of one block; `None` if it is not as we write it.
fn groups_of(block: &[u8], kind: TensorType, bits: u8) -> Option<Vec<Group>> {
    let f16_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
    let scale = f16_at(0).to_f32();
    let middle = 1 << (bits - 1);
    let (codes, zero_point) = match kind {
        TensorType::Q4_0 => {
            let shift = 8 - middle;
            let codes = nibbles(&block[2..]).map(|code| code.checked_sub(shift));
            (codes.collect::<Option<_>>()?, middle)
        }
        TensorType::Q4_1 => {
            let offset = f16_at(2);
            let zero_point = (-offset.to_f32() / scale).round();
            let zero_point = (0.0..=15.0).contains(&zero_point).then_some(zero_point)?;
            let is_ours = f16::from_f32(-scale * zero_point) == offset;
            (
                nibbles(&block[4..]).collect(),
                is_ours.then_some(zero_point as u8)?,
            )
        }
        TensorType::Q8_0 => (block[2..].iter().map(|code| code ^ 0x80).collect(), middle),
        TensorType::Q2K => return super_block::groups_of_two(block),
        TensorType::Q3K => return Some(super_block::groups_of_three(block)),
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 => return None,
    };
    Some(vec![Group {
        codes,
        scale,
        zero_point,
    }])
}

/// 32 codes of 16 bytes: the low halves and then the high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    let high = bytes.iter().map(|byte| byte >> 4);
    bytes.iter().map(|byte| byte & 15).chain(high)
}
