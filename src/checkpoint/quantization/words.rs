//! Tensors of 32-bit words, as streams of codes along their rows or down their columns.

use super::super::{Checkpoint, DType};
use crate::pack::{unpack, words_for};
use crate::{Error, Result};

impl Checkpoint {
    /// Codes `[shape]` of a tensor of 32-bit integers whose rows are bitstreams.
    pub(super) fn codes_along_rows(
        &self,
        name: &str,
        [rows, cols]: [usize; 2],
        bits: u8,
    ) -> Result<Vec<u8>> {
        let n_words = words_for(cols, bits).unwrap_or(usize::MAX);
        let words = self.words(name, [rows, n_words])?;
        let mut codes = Vec::with_capacity(words.len() * 32 / usize::from(bits));
        for stream in words.chunks_exact(n_words.max(1)) {
            codes.extend(self.codes_of(name, stream, cols, bits)?);
        }
        Ok(codes)
    }

    /// Codes `[cols, rows]`, turned, of a tensor of 32-bit integers whose columns are bitstreams of
    /// `rows` codes each.
    pub(super) fn codes_down_columns(
        &self,
        name: &str,
        [rows, cols]: [usize; 2],
        bits: u8,
    ) -> Result<Vec<u8>> {
        let n_words = words_for(rows, bits).unwrap_or(usize::MAX);
        let words = self.words(name, [n_words, cols])?;
        let mut codes = Vec::with_capacity(words.len() * 32 / usize::from(bits));
        for column in 0..cols {
            let stream: Vec<u32> = words.iter().skip(column).step_by(cols).copied().collect();
            codes.extend(self.codes_of(name, &stream, rows, bits)?);
        }
        Ok(codes)
    }

    /// The words of a tensor of 32-bit integers, which must have this shape.
    pub(super) fn words(&self, name: &str, shape: [usize; 2]) -> Result<Vec<u32>> {
        let info = self.require_info(name)?;
        if !matches!(info.dtype, DType::I32 | DType::U32) {
            let why = format!("expected I32 or U32, found {}", info.dtype.name());
            return Err(self.tensor_error(name, why));
        }
        if info.shape != shape {
            return Err(Error::Shape {
                module: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
        let bytes = self.bytes(name)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    fn codes_of(&self, name: &str, stream: &[u32], n: usize, bits: u8) -> Result<Vec<u8>> {
        let unpacked = unpack(stream, bits, n);
        if !unpacked.padding_is_zero {
            return Err(self.tensor_error(name, "the spare bits after the last code are not zero"));
        }
        Ok(unpacked.codes)
    }
}

/// `[cols, rows]` from `[rows, cols]`.
pub(crate) fn turned<T: Copy>(values: &[T], cols: usize) -> Vec<T> {
    (0..cols)
        .flat_map(|column| values.iter().skip(column).step_by(cols.max(1)).copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::turned;

    #[test]
    fn a_matrix_is_turned() {
        assert_eq!(turned(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
        assert!(turned::<u8>(&[], 0).is_empty());
    }
}
