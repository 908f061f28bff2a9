//! Scales that lie on the grid of GGUF's super-blocks: in each 256 columns of a row whole multiples
//! of one half-precision number.
//!
//! Here is what makes such scales and what knows them again; the solver puts grids on them, the
//! exporter writes them.

use half::f16;

/// Columns that share a scale.
pub const GROUP: usize = 16;
/// Columns of a super-block.
pub const SUPER: usize = 256;
/// Groups of a super-block.
pub const N_GROUPS: usize = SUPER / GROUP;
/// Largest multiple that Q2_K stores.
pub const MAX_TWO: u8 = 15;
/// Largest multiple that Q3_K stores; it also has negative ones, which no scale of ours is.
pub const MAX_THREE: u8 = 31;

/// Scales as multiples of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multiples {
    /// The number.
    pub unit: f16,
    /// The multiples, from 1.
    pub multiples: [u8; N_GROUPS],
}

/// The number, and the multiples up to `max`, that the 16 scales are exactly; `None` if there are
/// no such. Of several the largest number, that is the smallest multiples.
pub fn common_unit(scales: &[f32], max: u8) -> Option<Multiples> {
    let largest = scales.iter().copied().fold(0.0, f32::max);
    (1..=max).find_map(|top| {
        let unit = f16::from_f32(largest / f32::from(top));
        let value = unit.to_f32();
        if !(unit.is_finite() && value > 0.0) {
            return None;
        }
        let mut multiples = [0; N_GROUPS];
        for (multiple, scale) in multiples.iter_mut().zip(scales) {
            let ratio = (scale / value).round();
            // The product of 11 and 5 bits is exact in f32.
            if !(1.0..=f32::from(max)).contains(&ratio) || value * ratio != *scale {
                return None;
            }
            *multiple = ratio as u8;
        }
        Some(Multiples { unit, multiples })
    })
}

/// Largest multiple for codes of 2 or 3 bits.
pub fn max_multiple(bits: u8) -> u8 {
    match bits {
        2 => MAX_TWO,
        _ => MAX_THREE,
    }
}
