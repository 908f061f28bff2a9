//! Rotary position embedding: the tables of cosines and sines, the rotation, and its transpose.
//!
//! Angles are built in f32 as the published models do; a model's own dtype would lose positions.

use crate::Result;
use crate::model::decoder_config::{RopeScaling, Rotary};
use candle_core::{D, Device, Tensor};

/// The positions of one sample's tokens along the temporal, height and width axes, `[3][n]`.
/// A text token has the same position on all three.
pub type PositionIds = [Vec<u32>; 3];

/// Cosines and sines `[n, head_dim]` of one sample's tokens; both halves of the last axis agree.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// The angles of a decoder: each frequency follows the axis that `rotary` gives it.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    /// Source: Qwen2-VL, arXiv:2409.12191 §2.1 (M-RoPE); transformers `Qwen2VLRotaryEmbedding`,
    /// `Qwen3VLTextRotaryEmbedding`.
    pub fn of_decoder(
        rotary: &Rotary,
        head_dim: usize,
        positions: &PositionIds,
        device: &Device,
    ) -> Result<Self> {
        let last = positions.iter().flatten().max();
        let n_tokens = last.map_or(0, |&last| last as usize + 1);
        let mut freqs = inverse_frequencies(head_dim, base(rotary, head_dim, n_tokens));
        freqs
            .iter_mut()
            .for_each(|f| *f = scaled(*f, rotary.scaling));
        let axis_of = rotary.axes.of_frequencies(freqs.len());
        let n = positions[0].len();
        let angle = |token: usize, i: usize| positions[axis_of[i]][token] as f32 * freqs[i];
        let angles: Vec<f32> = (0..n)
            .flat_map(|token| (0..freqs.len()).map(move |i| (token, i)))
            .map(|(token, i)| angle(token, i))
            .collect();
        Self::from_angles(&angles, n, device)
    }

    /// Axial 2-D rotation of a vision tower: the first half of the frequencies follows the row,
    /// the second the column of a patch.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    pub fn axial(head_dim: usize, rows_cols: &[(u32, u32)], device: &Device) -> Result<Self> {
        let freqs = inverse_frequencies(head_dim / 2, 10_000.0);
        let mut angles = Vec::with_capacity(rows_cols.len() * freqs.len() * 2);
        for &(row, col) in rows_cols {
            angles.extend(freqs.iter().map(|f| row as f32 * f));
            angles.extend(freqs.iter().map(|f| col as f32 * f));
        }
        Self::from_angles(&angles, rows_cols.len(), device)
    }

    /// Axial 2-D rotation in which rows and columns take the frequencies of the whole head in
    /// turns: the slower of two neighbours follows the column. All that follow rows come first.
    ///
    /// # Errors
    /// A tensor error if the device refuses the memory.
    ///
    /// Source: arXiv:2410.07073 §2.2; transformers `PixtralVisionRotaryEmbedding`.
    pub fn axial_in_turns(
        head_dim: usize,
        theta: f64,
        rows_cols: &[(u32, u32)],
        device: &Device,
    ) -> Result<Self> {
        let freqs = inverse_frequencies(head_dim, theta as f32);
        let mut angles = Vec::with_capacity(rows_cols.len() * freqs.len());
        for &(row, col) in rows_cols {
            angles.extend(freqs.iter().step_by(2).map(|f| row as f32 * f));
            angles.extend(freqs.iter().skip(1).step_by(2).map(|f| col as f32 * f));
        }
        Self::from_angles(&angles, rows_cols.len(), device)
    }

    /// Cosines and sines, `[n, head_dim]` each.
    pub fn tables(&self) -> [&Tensor; 2] {
        [&self.cos, &self.sin]
    }

    fn from_angles(angles: &[f32], n: usize, device: &Device) -> Result<Self> {
        let half = angles.len().checked_div(n).unwrap_or(0);
        let table = |f: fn(f32) -> f32| -> Result<Tensor> {
            let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
            let values = Tensor::from_vec(values, (n, half), device)?;
            Ok(Tensor::cat(&[&values, &values], 1)?)
        };
        Ok(Self {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
        })
    }

    /// The tables of tokens `start..start + len`.
    ///
    /// # Errors
    /// A tensor error if the range is not inside.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self {
            cos: self.cos.narrow(0, start, len)?,
            sin: self.sin.narrow(0, start, len)?,
        })
    }

    /// The angles of several runs of tokens, one after the other.
    ///
    /// # Errors
    /// A tensor error if there are none or their widths differ.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        let join = |part: fn(&Self) -> &Tensor| {
            Tensor::cat(&parts.iter().map(part).collect::<Vec<_>>(), 0)
        };
        Ok(Self {
            cos: join(|rope| &rope.cos)?,
            sin: join(|rope| &rope.sin)?,
        })
    }

    /// Rotates `x [heads, n, head_dim]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        Ok((x.broadcast_mul(&self.cos)? + rotate_half(x)?.broadcast_mul(&self.sin)?)?)
    }

    /// The transpose of [`Self::rotate`], which rotates by the opposite angle: what a gradient
    /// with respect to rotated values becomes with respect to the values before rotation.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn rotate_back(&self, x: &Tensor) -> Result<Tensor> {
        Ok((x.broadcast_mul(&self.cos)? - rotate_half(x)?.broadcast_mul(&self.sin)?)?)
    }
}

/// The base of the frequencies in a context of `n_tokens`. A dynamic one grows with it such that
/// the slowest frequency is divided by factor · n / original − factor + 1.
fn base(rotary: &Rotary, head_dim: usize, n_tokens: usize) -> f32 {
    let theta = rotary.theta;
    match rotary.scaling {
        RopeScaling::Dynamic { factor, original } if n_tokens as f64 > original => {
            let stretch = factor * n_tokens as f64 / original - (factor - 1.0);
            let dim = head_dim as f64;
            (theta * stretch.powf(dim / (dim - 2.0))) as f32
        }
        _ => theta as f32,
    }
}

/// theta^(−2i/dim) for i in 0..dim/2.
fn inverse_frequencies(dim: usize, theta: f32) -> Vec<f32> {
    (0..dim)
        .step_by(2)
        .map(|i| 1.0 / theta.powf(i as f32 / dim as f32))
        .collect()
}

/// A frequency in a stretched context, in f32 as published.
fn scaled(frequency: f32, scaling: RopeScaling) -> f32 {
    match scaling {
        // A dynamic one changes the base.
        RopeScaling::None | RopeScaling::Dynamic { .. } => frequency,
        RopeScaling::Linear(factor) => frequency / factor as f32,
        RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        } => {
            let wavelength = std::f32::consts::TAU / frequency;
            if wavelength < (original / high) as f32 {
                frequency
            } else if wavelength > (original / low) as f32 {
                frequency / factor as f32
            } else {
                let share = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                (1.0 - share) * frequency / factor as f32 + share * frequency
            }
        }
    }
}

/// (−x₂, x₁) of the two halves of the last axis.
fn rotate_half(x: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let first = x.narrow(D::Minus1, 0, half)?;
    let second = x.narrow(D::Minus1, half, half)?;
    Ok(Tensor::cat(&[&second.neg()?, &first], D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_base_is_the_first_one_until_the_context_is_longer() {
        let rotary = Rotary {
            theta: 1e4,
            scaling: RopeScaling::Dynamic {
                factor: 2.0,
                original: 8.0,
            },
            axes: crate::model::decoder_config::RopeAxes::One,
        };
        assert_eq!(base(&rotary, 16, 8), 1e4);
        let long = inverse_frequencies(16, base(&rotary, 16, 16));
        let short = inverse_frequencies(16, 1e4);
        assert_eq!(long[0], short[0]);
        // Twice the tokens: 2 · 2 − 1.
        assert!((short[7] / long[7] - 3.0).abs() < 1e-5);
    }

    #[test]
    fn rows_and_columns_take_frequencies_in_turns() {
        let rope = Rope::axial_in_turns(8, 1e4, &[(2, 3)], &Device::Cpu).unwrap();
        let sines: Vec<Vec<f32>> = rope.sin.to_vec2().unwrap();
        // Frequencies 1, 0.1, 0.01 and 0.001.
        let half = [2.0, 0.02, 0.3, 0.003f32].map(f32::sin);
        for (found, expected) in sines[0].iter().zip([half, half].concat()) {
            assert!((found - expected).abs() < 1e-6, "{sines:?}");
        }
    }

    #[test]
    fn rotating_back_undoes_rotating() {
        let rope = Rope::axial(8, &[(0, 1), (3, 2), (5, 7)], &Device::Cpu).unwrap();
        let x = Tensor::arange(0f32, 48.0, &Device::Cpu)
            .unwrap()
            .reshape((2, 3, 8))
            .unwrap();
        let back = rope.rotate_back(&rope.rotate(&x).unwrap()).unwrap();
        let worst: f32 = ((back - &x).unwrap().abs().unwrap())
            .flatten_all()
            .and_then(|d| d.max(0))
            .and_then(|d| d.to_scalar())
            .unwrap();
        // A rotation keeps lengths; the error is a few roundings of values up to 48.
        assert!(worst <= 48.0 * 8.0 * f32::EPSILON, "{worst}");
    }
}
