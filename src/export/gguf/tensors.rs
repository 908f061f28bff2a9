//! From a checkpoint's tensors to those of a GGUF file: which bytes, in which order, as which type.

use super::blocks::{self, Rounding};
use super::container::{TensorSpec, TensorType, Writer};
use crate::checkpoint::{Checkpoint, DType};
use crate::{Error, Result};
use half::{bf16, f16};
use std::ops::Range;

/// A tensor of the file and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// What it will be.
    pub(super) spec: TensorSpec,
    /// What it is made of.
    pub(super) source: Source,
}

/// What a tensor is made of.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Source {
    /// The codes of a quantized linear.
    Packed {
        /// Its checkpoint name.
        module: String,
        /// Order of its rows.
        rows: Rows,
    },
    /// A stored tensor of floats.
    Stored {
        /// Its name.
        tensor: String,
        /// What is taken of it.
        part: Part,
        /// Added to each value: 1 for norms that multiply by one plus their weight.
        plus: f32,
    },
    /// Numbers that follow from the configuration.
    Values(Vec<f32>),
}

/// Order of a linear's rows in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    /// As they are.
    Same,
    /// Each head's rows i and i + half beside each other: llama.cpp turns neighbours of Llama-type
    /// models together, where checkpoints have the two halves of a head.
    Paired {
        /// Heads that the rows are of.
        n_heads: usize,
    },
}

impl Rows {
    /// The row that stands at `row` in the file, of `n` rows.
    pub(super) fn source_of(self, row: usize, n: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Paired { n_heads } => {
                let head_dim = n / n_heads;
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        }
    }

    /// Whether `n` rows can be ordered so.
    pub(super) fn check(self, module: &str, n: usize) -> Result<()> {
        match self {
            Self::Paired { n_heads } if !n.is_multiple_of(2 * n_heads) => Err(Error::Invalid {
                what: module.to_owned(),
                why: format!("{n} rows are no {n_heads} heads of an even number of channels"),
            }),
            _ => Ok(()),
        }
    }
}

/// What is taken of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// All of its rows, in another order.
    Ordered(Rows),
    /// Some of its rows.
    Rows(Range<usize>),
    /// One frame of a convolution `[out, in, frames, height, width]`.
    Frame(usize),
}

impl Part {
    /// The shape of the part of a tensor of `shape`.
    fn shape(&self, name: &str, shape: &[usize]) -> Result<Vec<usize>> {
        let found = match self {
            Self::Whole => Some(shape.to_vec()),
            Self::Ordered(rows) => {
                let n = shape.first().copied().unwrap_or(0);
                rows.check(name, n)?;
                Some(shape.to_vec())
            }
            Self::Rows(rows) => {
                let fits = shape.first().is_some_and(|n| rows.end <= *n);
                fits.then(|| [&[rows.len()], &shape[1..]].concat())
            }
            Self::Frame(frame) => match shape {
                [out, inp, frames, height, width] if frame < frames => {
                    Some(vec![*out, *inp, *height, *width])
                }
                _ => None,
            },
        };
        found.ok_or_else(|| Error::Unsupported {
            what: format!("{name} of shape {shape:?} in a GGUF file; {self:?} of it was expected"),
        })
    }

    /// The bytes of the part, of a tensor's `bytes`, whose elements have `size`.
    fn of(&self, bytes: Vec<u8>, shape: &[usize], size: usize) -> Vec<u8> {
        match self {
            Self::Whole => bytes,
            Self::Ordered(rows) => {
                let n = shape[0];
                let row_bytes = bytes.len() / n;
                let sources = (0..n).map(|row| rows.source_of(row, n));
                sources
                    .flat_map(|row| bytes[row * row_bytes..][..row_bytes].to_vec())
                    .collect()
            }
            Self::Rows(rows) => {
                let row_bytes = bytes.len() / shape[0];
                bytes[rows.start * row_bytes..rows.end * row_bytes].to_vec()
            }
            Self::Frame(frame) => {
                let plane = shape[3] * shape[4] * size;
                let planes = bytes.chunks_exact(plane).skip(*frame).step_by(shape[2]);
                planes.flatten().copied().collect()
            }
        }
    }
}

/// The type that llama.cpp wants a tensor of floats in: vectors and norms in F32, the rest as it is
/// stored.
pub(super) fn plain_kind(name: &str, n_sides: usize, dtype: DType) -> TensorType {
    match dtype {
        _ if n_sides <= 1 || name.ends_with("_norm.weight") => TensorType::F32,
        DType::Bf16 => TensorType::Bf16,
        DType::F16 => TensorType::F16,
        _ => TensorType::F32,
    }
}

impl Planned {
    /// A stored tensor under `name`, as the type of [`plain_kind`] unless `kind` says another.
    ///
    /// # Errors
    /// [`Error::Missing`] without it, [`Error::Unsupported`] for another shape than `part` needs.
    pub(super) fn stored(
        checkpoint: &Checkpoint,
        tensor: &str,
        name: &str,
        part: Part,
        kind: Option<TensorType>,
    ) -> Result<Self> {
        let info = checkpoint.info(tensor).ok_or_else(|| Error::Missing {
            what: format!("tensor {tensor}"),
            place: checkpoint.dir().display().to_string(),
        })?;
        let shape = part.shape(tensor, &info.shape)?;
        let kind = kind.unwrap_or_else(|| plain_kind(name, shape.len(), info.dtype));
        let name = name.to_owned();
        Ok(Self {
            spec: TensorSpec { name, kind, shape },
            source: Source::Stored {
                tensor: tensor.to_owned(),
                part,
                plus: 0.0,
            },
        })
    }

    /// A linear of the decoder, as codes if it has them.
    ///
    /// # Errors
    /// Those of [`blocks::kind_of`] and of [`Planned::stored`].
    pub(super) fn linear(
        checkpoint: &Checkpoint,
        module: &str,
        name: &str,
        rows: Rows,
    ) -> Result<Self> {
        if !checkpoint.is_quantized(module) {
            let part = match rows {
                Rows::Same => Part::Whole,
                _ => Part::Ordered(rows),
            };
            return Self::stored(checkpoint, &format!("{module}.weight"), name, part, None);
        }
        let weight = checkpoint.packed_module(module)?;
        rows.check(module, weight.rows())?;
        let spec = TensorSpec {
            name: name.to_owned(),
            kind: blocks::kind_of(module, weight.scheme(), weight.cols())?,
            shape: vec![weight.rows(), weight.cols()],
        };
        let module = module.to_owned();
        Ok(Self {
            spec,
            source: Source::Packed { module, rows },
        })
    }

    /// Adds one to each value, if `applies`.
    pub(super) fn plus_one(mut self, applies: bool) -> Self {
        if let (true, Source::Stored { plus, .. }) = (applies, &mut self.source) {
            *plus = 1.0;
        }
        self
    }

    /// Writes the tensor's data as the next of `writer`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for NaN or infinity; [`Error::Unsupported`] for elements that are no
    /// floats and as [`blocks::encode`]; those of [`Writer::write`] and [`Checkpoint::bytes`].
    pub(super) fn write(
        &self,
        checkpoint: &Checkpoint,
        writer: &mut Writer,
        rounding: &mut Rounding,
    ) -> Result<()> {
        let TensorSpec { name, kind, .. } = &self.spec;
        match &self.source {
            Source::Packed { module, rows } => {
                let weight = checkpoint.packed_module(module)?;
                let n = weight.rows();
                let order = |row| rows.source_of(row, n);
                let bytes = blocks::encode(module, &weight, *kind, order, rounding)?;
                writer.write(name, [Ok(bytes)])
            }
            Source::Values(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                writer.write(name, [Ok(bytes)])
            }
            Source::Stored { tensor, part, plus } => {
                let (dtype, shape) = checkpoint
                    .info(tensor)
                    .map(|info| (info.dtype, &info.shape))
                    .ok_or_else(|| Error::Missing {
                        what: format!("tensor {tensor}"),
                        place: checkpoint.dir().display().to_string(),
                    })?;
                let turn = |bytes: Vec<u8>| converted(tensor, &bytes, dtype, *kind, *plus);
                match part {
                    // The largest tensors are never whole in memory.
                    Part::Whole => {
                        let pieces = checkpoint.pieces(tensor)?;
                        writer.write(name, pieces.map(|piece| turn(piece?)))
                    }
                    _ => {
                        let bytes = part.of(checkpoint.bytes(tensor)?, shape, dtype.n_bytes());
                        writer.write(name, [turn(bytes)])
                    }
                }
            }
        }
    }
}

/// Stored elements as those of `kind`.
fn converted(
    tensor: &str,
    bytes: &[u8],
    dtype: DType,
    kind: TensorType,
    plus: f32,
) -> Result<Vec<u8>> {
    let values = dtype
        .f32_from_bytes(bytes)
        .ok_or_else(|| Error::Unsupported {
            what: format!("{tensor}: elements of {} in a GGUF file", dtype.name()),
        })?;
    let values = values.iter().map(|value| value + plus);
    let (out, count): (Vec<u8>, usize) = match kind {
        TensorType::F16 => gathered(values, |v| {
            let rounded = f16::from_f32(v);
            (rounded.to_le_bytes(), rounded.is_finite())
        }),
        TensorType::Bf16 => gathered(values, |v| {
            let rounded = bf16::from_f32(v);
            (rounded.to_le_bytes(), rounded.is_finite())
        }),
        _ => gathered(values, |v| (v.to_le_bytes(), v.is_finite())),
    };
    match count {
        0 => Ok(out),
        _ => Err(Error::NotFinite {
            module: tensor.to_owned(),
            stage: format!("weights as {}", kind.name()),
            count,
        }),
    }
}

/// The bytes of all values, and how many are not finite.
fn gathered<const N: usize>(
    values: impl Iterator<Item = f32>,
    turn: impl Fn(f32) -> ([u8; N], bool),
) -> (Vec<u8>, usize) {
    let mut count = 0;
    let bytes = values.flat_map(|value| {
        let (bytes, is_finite) = turn(value);
        count += usize::from(!is_finite);
        bytes
    });
    let bytes = bytes.collect();
    (bytes, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_heads_are_paired() {
        let rows = Rows::Paired { n_heads: 2 };
        let order: Vec<usize> = (0..12).map(|row| rows.source_of(row, 12)).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert!(rows.check("q", 12).is_ok());
        assert!(rows.check("q", 10).is_err());
        assert_eq!(Rows::Same.source_of(5, 12), 5);
    }

    #[test]
    fn parts_are_cut_out() {
        let bytes: Vec<u8> = (0..24).collect();
        let shape = [2, 1, 3, 2, 2];
        let frame = Part::Frame(1);
        assert_eq!(frame.shape("conv", &shape).unwrap(), [2, 1, 2, 2]);
        assert_eq!(
            frame.of(bytes.clone(), &shape, 1),
            [4, 5, 6, 7, 16, 17, 18, 19]
        );
        let rows = Part::Rows(1..2);
        assert_eq!(rows.shape("qkv", &[3, 8]).unwrap(), [1, 8]);
        assert_eq!(rows.of(bytes, &[3, 8], 1), [8, 9, 10, 11, 12, 13, 14, 15]);
        for (part, shape) in [
            (Part::Frame(3), &[2, 1, 3, 2, 2][..]),
            (Part::Frame(0), &[2, 1, 3, 2]),
            (Part::Rows(2..4), &[3, 8]),
        ] {
            assert!(part.shape("name", shape).is_err());
        }
    }

    #[test]
    fn values_that_a_type_cannot_hold_are_refused() {
        let bytes = 1e6f32.to_le_bytes();
        let to = |kind| converted("t", &bytes, DType::F32, kind, 0.0);
        assert!(matches!(to(TensorType::F16), Err(Error::NotFinite { .. })));
        assert_eq!(to(TensorType::F32).unwrap(), bytes);
        assert!(converted("t", &[0; 4], DType::I32, TensorType::F32, 0.0).is_err());
    }
}
