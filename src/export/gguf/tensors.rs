//! From a checkpoint's tensors to those of a GGUF file: which bytes, in which order, as which type.

use crate::checkpoint::{Checkpoint, DType};
use crate::gguf::{self, Origin, Part, Rounding, Rows, TensorSpec, TensorType, Writer};
use crate::{Error, Result};
use half::{bf16, f16};

/// A tensor of the file and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Planned {
    /// What it will be.
    pub(super) spec: TensorSpec,
    /// What it is made of.
    pub(super) origin: Origin,
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
            origin: Origin::Stored {
                tensor: tensor.to_owned(),
                dtype: info.dtype,
                part,
                adds_one: false,
            },
        })
    }

    /// A linear of the decoder, as codes if it has them.
    ///
    /// # Errors
    /// Those of [`gguf::kind_of`] and of [`Planned::stored`].
    pub(super) fn linear(
        checkpoint: &Checkpoint,
        module: &str,
        name: &str,
        rows: Rows,
    ) -> Result<Self> {
        if !checkpoint.is_quantized(module) {
            let weight = format!("{module}.weight");
            return Self::stored(checkpoint, &weight, name, rows.part(), None);
        }
        let weight = checkpoint.packed_module(module)?;
        rows.check(module, weight.rows())?;
        let spec = TensorSpec {
            name: name.to_owned(),
            kind: gguf::kind_of(module, weight.scheme(), weight.cols())?,
            shape: vec![weight.rows(), weight.cols()],
        };
        Ok(Self {
            spec,
            origin: Origin::Packed {
                module: module.to_owned(),
                rows,
                scheme: weight.scheme(),
            },
        })
    }

    /// Adds one to each value, if `applies`.
    pub(super) fn plus_one(mut self, applies: bool) -> Self {
        if let Origin::Stored { adds_one, .. } = &mut self.origin {
            *adds_one = applies;
        }
        self
    }

    /// Writes the tensor's data as the next of `writer`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for NaN or infinity; [`Error::Unsupported`] for elements that are no
    /// floats and as [`gguf::encode`]; those of [`Writer::write`] and [`Checkpoint::bytes`].
    pub(super) fn write(
        &self,
        checkpoint: &Checkpoint,
        writer: &mut Writer,
        rounding: &mut Rounding,
    ) -> Result<()> {
        let TensorSpec { name, kind, .. } = &self.spec;
        match &self.origin {
            Origin::Packed { module, rows, .. } => {
                let weight = checkpoint.packed_module(module)?;
                let n = weight.rows();
                let order = |row| rows.source_of(row, n);
                let bytes = gguf::encode(module, &weight, *kind, order, rounding)?;
                writer.write(name, [Ok(bytes)])
            }
            Origin::Computed { values } => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                writer.write(name, [Ok(bytes)])
            }
            Origin::Stored {
                tensor,
                dtype,
                part,
                adds_one,
            } => {
                let plus = if *adds_one { 1.0 } else { 0.0 };
                let turn = |bytes: Vec<u8>| converted(tensor, &bytes, *dtype, *kind, plus);
                match part {
                    // The largest tensors are never whole in memory.
                    Part::Whole => {
                        let pieces = checkpoint.pieces(tensor)?;
                        writer.write(name, pieces.map(|piece| turn(piece?)))
                    }
                    _ => {
                        let shape = checkpoint.info(tensor).map(|info| &info.shape[..]);
                        let shape = shape.unwrap_or_default();
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
    fn values_that_a_type_cannot_hold_are_refused() {
        let bytes = 1e6f32.to_le_bytes();
        let to = |kind| converted("t", &bytes, DType::F32, kind, 0.0);
        assert!(matches!(to(TensorType::F16), Err(Error::NotFinite { .. })));
        assert_eq!(to(TensorType::F32).unwrap(), bytes);
        assert!(converted("t", &[0; 4], DType::I32, TensorType::F32, 0.0).is_err());
    }
}
