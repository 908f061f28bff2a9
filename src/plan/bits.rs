//! How many bits a weight is to have: the same for all, or a mean that modules share out.

use super::Scheme;
use crate::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cmp::Ordering;
use std::str::FromStr;

/// Bits per code, as they are asked for.
#[derive(Clone, Copy, Debug)]
pub enum Bits {
    /// Of every weight.
    Each(u8),
    /// On average over all quantized weights, at most; each module has one of [`Bits::SHARED`].
    Mean(f64),
}

impl Bits {
    /// Widths among which a mean is shared out, rising.
    pub const SHARED: [u8; 3] = [2, 3, 4];

    /// A whole number is the width of every weight, any other a mean.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a whole number that is not one of [`Scheme::BITS`], a mean that is
    /// not between the widths of [`Bits::SHARED`], and what is not a number.
    pub fn new(bits: f64) -> Result<Self> {
        let each = Scheme::BITS
            .into_iter()
            .find(|each| f64::from(*each) == bits);
        let [low, .., high] = Self::SHARED;
        match each {
            Some(each) => Ok(Self::Each(each)),
            None if bits.fract() != 0.0 && bits > low.into() && bits < high.into() => {
                Ok(Self::Mean(bits))
            }
            None => Err(refused(&format!("--bits {bits}"), "")),
        }
    }

    /// The number.
    pub fn value(self) -> f64 {
        match self {
            Self::Each(bits) => bits.into(),
            Self::Mean(bits) => bits,
        }
    }

    /// The least width of a number format that no mean is above.
    pub fn ceil(self) -> u8 {
        match self {
            Self::Each(bits) => bits,
            Self::Mean(bits) => bits.ceil() as u8,
        }
    }
}

fn refused(what: &str, note: &str) -> Error {
    let [low, .., high] = Bits::SHARED;
    Error::Invalid {
        what: what.to_owned(),
        why: format!(
            "one of {:?} for every weight, or a mean between {low} and {high} such as 2.5 \
             expected{note}",
            Scheme::BITS
        ),
    }
}

impl FromStr for Bits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let note = match text.contains(',') {
            true => ", with a point and no comma",
            false => "",
        };
        let refuse = || refused(&format!("--bits {text}"), note);
        let bits = text.parse().map_err(|_| refuse())?;
        Self::new(bits).map_err(|_| refuse())
    }
}

impl std::fmt::Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.value().fmt(f)
    }
}

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Bits {}

impl PartialOrd for Bits {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Bits {
    fn cmp(&self, other: &Self) -> Ordering {
        self.value().total_cmp(&other.value())
    }
}

impl Serialize for Bits {
    /// A whole number stays one.
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Each(bits) => serializer.serialize_u8(*bits),
            Self::Mean(bits) => serializer.serialize_f64(*bits),
        }
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let bits = f64::deserialize(deserializer)?;
        Self::new(bits).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_widths_and_others_means() {
        for (text, expected) in [
            ("2", Bits::Each(2)),
            ("3.0", Bits::Each(3)),
            ("8", Bits::Each(8)),
            ("2.5", Bits::Mean(2.5)),
            ("3.9999", Bits::Mean(3.9999)),
        ] {
            let bits: Bits = text.parse().unwrap();
            assert_eq!(bits, expected, "{text}");
            assert_eq!(
                std::mem::discriminant(&bits),
                std::mem::discriminant(&expected)
            );
        }
        assert_eq!("2.01".parse::<Bits>().unwrap().ceil(), 3);
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        for bad in [
            "1", "1.5", "5", "6", "9", "4.5", "7.5", "0", "-2.5", "NaN", "inf", "2,5", "", "two",
        ] {
            let error = bad.parse::<Bits>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("--bits {bad}")), "{error}");
            assert!(error.contains("such as 2.5"), "{error}");
            assert_eq!(error.contains("comma"), bad == "2,5", "{error}");
        }
    }

    #[test]
    fn files_keep_whole_numbers_whole() {
        for text in ["3", "2.5"] {
            let bits: Bits = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&bits).unwrap(), text);
            assert_eq!(bits.to_string(), text);
        }
        for bad in ["5", "1.5", "\"3\"", "null"] {
            assert!(serde_json::from_str::<Bits>(bad).is_err(), "{bad}");
        }
    }
}
