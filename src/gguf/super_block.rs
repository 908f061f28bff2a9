//! The super-blocks Q2_K and Q3_K: 256 columns in 16 groups, whose scales are small whole multiples
//! of one f16 number.
//!
//! A weight whose scales lie on such a grid already, as [`ScaleDtype::Superblock`] puts them, is
//! stored exactly. No scale is fitted here: where there is no such number that is
//! an error, not an approximation.

use super::codes::Group;
#[cfg(doc)]
use crate::plan::ScaleDtype;
use crate::plan::super_block::{
    GROUP, MAX_THREE, MAX_TWO, Multiples, N_GROUPS, SUPER, common_unit,
};
use crate::{Error, Result};
use half::f16;

/// Columns whose 2-bit parts share bytes.
const HALF: usize = 128;
/// Bytes that hold the 2-bit parts of [`HALF`] columns; also columns that share a bit's position.
const RUN: usize = 32;

/// Appends a row's super-blocks: Q3_K if `is_three`, else Q2_K.
///
/// # Errors
/// [`Error::Unsupported`] naming `module` if the scales of a super-block are not multiples of one
/// f16 number.
pub fn encode_row(
    module: &str,
    codes: &[u8],
    scales: &[f32],
    is_three: bool,
    out: &mut Vec<u8>,
) -> Result<()> {
    let (name, max) = match is_three {
        true => ("Q3_K", MAX_THREE),
        false => ("Q2_K", MAX_TWO),
    };
    let blocks = codes.chunks_exact(SUPER).zip(scales.chunks_exact(N_GROUPS));
    for (codes, scales) in blocks {
        let found = common_unit(scales, max).ok_or_else(|| Error::Unsupported {
            what: format!(
                "{module}: the scales of 256 columns are not multiples up to {max} of one f16 \
                 number, as {name} needs them; quantize it with \
                 scale_dtype = \"superblock\", or with \
                 --group-size 32 or a multiple"
            ),
        })?;
        match is_three {
            true => put_three(codes, &found, out),
            false => put_two(codes, &found, module, out)?,
        }
    }
    Ok(())
}

/// scales[16], low bits[64], d, dmin.
fn put_two(codes: &[u8], scales: &Multiples, module: &str, out: &mut Vec<u8>) -> Result<()> {
    let twice = f16::from_f32(2.0 * scales.unit.to_f32());
    if !twice.is_finite() {
        return Err(Error::Unsupported {
            what: format!("{module}: twice {} is infinite in f16", scales.unit),
        });
    }
    // Scale low, offset high: the offset 2·d·k moves code 2 to zero.
    out.extend(scales.multiples.map(|k| k | (k << 4)));
    put_low_bits(codes, out);
    out.extend(scales.unit.to_le_bytes());
    out.extend(twice.to_le_bytes());
    Ok(())
}

/// high bits[32], low bits[64], scales[12], d.
fn put_three(codes: &[u8], scales: &Multiples, out: &mut Vec<u8>) {
    let mut high = [0u8; RUN];
    for (index, code) in codes.iter().enumerate() {
        high[index % RUN] |= (code >> 2) << (index / RUN);
    }
    out.extend(high);
    put_low_bits(codes, out);
    let mut packed = [0u8; 12];
    for (group, k) in scales.multiples.iter().enumerate() {
        let stored = k + 32;
        packed[group % 8] |= (stored & 15) << (4 * (group / 8));
        packed[8 + group % 4] |= (stored >> 4) << (2 * (group / 4));
    }
    out.extend(packed);
    out.extend(scales.unit.to_le_bytes());
}

/// The two low bits of 256 codes: byte l of a half holds columns l, l + 32, l + 64 and l + 96.
fn put_low_bits(codes: &[u8], out: &mut Vec<u8>) {
    for half in codes.chunks_exact(HALF) {
        let byte = |l| (0..4).fold(0, |byte, j| byte | ((half[l + RUN * j] & 3) << (2 * j)));
        out.extend((0..RUN).map(byte));
    }
}

fn low_bits(bytes: &[u8], index: usize) -> u8 {
    let (half, rest) = (index / HALF, index % HALF);
    (bytes[RUN * half + rest % RUN] >> (2 * (rest / RUN))) & 3
}

/// Scale and offset of each group, and the codes, of one Q2_K super-block.
fn parts_of_two(block: &[u8]) -> impl Iterator<Item = (f32, f32, Vec<u8>)> {
    let f16_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (d, dmin) = (f16_at(80), f16_at(82));
    (0..N_GROUPS).map(move |group| {
        let packed = block[group];
        let columns = group * GROUP..(group + 1) * GROUP;
        let codes = columns.map(|index| low_bits(&block[16..80], index));
        (
            d * f32::from(packed & 15),
            dmin * f32::from(packed >> 4),
            codes.collect(),
        )
    })
}

/// The weights of one Q2_K super-block.
pub fn decode_two(block: &[u8]) -> Vec<f32> {
    let groups = parts_of_two(block);
    let weights = groups.flat_map(|(scale, offset, codes)| {
        let codes = codes.into_iter();
        codes.map(move |code| scale * f32::from(code) - offset)
    });
    weights.collect()
}

/// The groups of one Q2_K super-block; `None` if they are not centred on zero.
pub(super) fn groups_of_two(block: &[u8]) -> Option<Vec<Group>> {
    let groups = parts_of_two(block).map(|(scale, offset, codes)| {
        (offset == 2.0 * scale).then_some(Group {
            codes,
            scale,
            zero_point: 2,
        })
    });
    groups.collect()
}

/// The groups of one Q3_K super-block, whose weights are those of the format.
pub(super) fn groups_of_three(block: &[u8]) -> Vec<Group> {
    let d = f16::from_le_bytes([block[108], block[109]]).to_f32();
    let groups = (0..N_GROUPS).map(|group| {
        let low = (block[96 + group % 8] >> (4 * (group / 8))) & 15;
        let high = (block[104 + group % 4] >> (2 * (group / 4))) & 3;
        let columns = group * GROUP..(group + 1) * GROUP;
        let code = |index: usize| {
            let top = (block[index % RUN] >> (index / RUN)) & 1;
            low_bits(&block[32..96], index) | (top << 2)
        };
        Group {
            codes: columns.map(code).collect(),
            scale: d * (f32::from(low | (high << 4)) - 32.0),
            zero_point: 4,
        }
    });
    groups.collect()
}

/// The weights of one Q3_K super-block.
pub fn decode_three(block: &[u8]) -> Vec<f32> {
    let groups = groups_of_three(block).into_iter();
    let weights = groups.flat_map(|group| {
        let codes = group.codes.into_iter();
        codes.map(move |code| group.scale * (f32::from(code) - 4.0))
    });
    weights.collect()
}
