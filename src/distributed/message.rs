//! What ranks send each other: a value as JSON, and numbers after it as they are.
//!
//! ```text
//! length of the value      8 bytes
//! the value                JSON
//! numbers                  little-endian, as the value tells
//! ```

use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

const LENGTH: usize = size_of::<u64>();

/// A message in the making.
pub(crate) struct Message(Vec<u8>);

impl Message {
    pub(crate) fn new(value: &impl Serialize) -> Self {
        let json = serde_json::to_vec(value).expect("values of messages have only text keys");
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json);
        Self(bytes)
    }

    pub(crate) fn f32s(&mut self, values: &[f32]) {
        let start = self.0.len();
        self.0.resize(start + size_of_val(values), 0);
        let (words, _) = self.0[start..].as_chunks_mut::<4>();
        for (word, value) in words.iter_mut().zip(values) {
            *word = value.to_le_bytes();
        }
    }

    pub(crate) fn f64s(&mut self, values: &[f64]) {
        self.0.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn words(&mut self, words: &[u32]) {
        self.0.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A message from a rank, read from its front.
pub(crate) struct Received<'a> {
    rank: usize,
    rest: &'a [u8],
}

impl<'a> Received<'a> {
    /// The message's value, and its numbers.
    ///
    /// # Errors
    /// [`Error::Rank`] if it is of another kind.
    pub(crate) fn open<T: DeserializeOwned>(rank: usize, bytes: &'a [u8]) -> Result<(T, Self)> {
        let mut received = Self { rank, rest: bytes };
        let length = received.bytes(LENGTH)?;
        let length = u64::from_le_bytes(length.try_into().expect("as many bytes as asked for"));
        let json = received.bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
        let value = serde_json::from_slice(json);
        let value = value.map_err(|e| received.error(&e.to_string()))?;
        Ok((value, received))
    }

    /// The value of a message without numbers.
    ///
    /// # Errors
    /// As [`Received::open`].
    pub(crate) fn only<T: DeserializeOwned>(rank: usize, bytes: &'a [u8]) -> Result<T> {
        let (value, rest) = Self::open(rank, bytes)?;
        rest.end()?;
        Ok(value)
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some((own, rest)) = self.rest.split_at_checked(n) else {
            return Err(self.error("it ends too early"));
        };
        self.rest = rest;
        Ok(own)
    }

    pub(crate) fn f32s(&mut self, n: usize) -> Result<Vec<f32>> {
        let (words, _) = self.chunks(n)?;
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }

    pub(crate) fn f64s(&mut self, n: usize) -> Result<Vec<f64>> {
        let bytes = self.bytes(n.saturating_mul(8))?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| f64::from_le_bytes(*word)).collect())
    }

    pub(crate) fn words(&mut self, n: usize) -> Result<Vec<u32>> {
        let (words, _) = self.chunks(n)?;
        Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    fn chunks(&mut self, n: usize) -> Result<(&'a [[u8; 4]], &'a [u8])> {
        let bytes = self.bytes(n.saturating_mul(4))?;
        Ok(bytes.as_chunks::<4>())
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// [`Error::Rank`] if something is.
    pub(crate) fn end(self) -> Result<()> {
        match self.rest.is_empty() {
            true => Ok(()),
            false => Err(self.error("it is longer than it should be")),
        }
    }

    pub(crate) fn error(&self, why: &str) -> Error {
        Error::Rank {
            rank: self.rank,
            why: format!("its message is not what is waited for: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_and_what_is_cut_is_refused() {
        let mut message = Message::new(&("name", 3usize));
        message.f32s(&[0.1, -0.0, f32::MAX]);
        message.f64s(&[-1.0 / 3.0]);
        message.bytes(&[7, 8]);
        message.words(&[u32::MAX]);
        let bytes = message.into_bytes();
        let read = |bytes: &[u8]| -> Result<()> {
            let ((name, n), mut rest) = Received::open::<(String, usize)>(5, bytes)?;
            assert_eq!((&name[..], n), ("name", 3));
            let values = rest.f32s(3)?;
            let bits = values.iter().map(|v| v.to_bits());
            assert!(bits.eq([0.1f32, -0.0, f32::MAX].map(f32::to_bits)));
            assert_eq!(rest.f64s(1)?, [-1.0 / 3.0]);
            assert_eq!(rest.bytes(2)?, [7, 8]);
            assert_eq!(rest.words(1)?, [u32::MAX]);
            rest.end()
        };
        read(&bytes).unwrap();
        for n in 0..bytes.len() {
            let error = read(&bytes[..n]).unwrap_err();
            assert!(matches!(error, Error::Rank { rank: 5, .. }), "{error}");
        }
        assert!(read(&[&bytes[..], &[0]].concat()).is_err());
        let hostile = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
        assert!(Received::only::<()>(0, &hostile).is_err());
    }
}
