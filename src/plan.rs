//! What is to be done: the number format of the weights, the method, and its settings.
//!
//! Everything here is validated when it is made, so nothing downstream meets a raw flag.

mod bits;
pub mod super_block;

pub use bits::Bits;

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The number format of a quantized weight: how many bits, which columns share a scale, whether
/// the grid is centred on zero, and the type that scales are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Scheme {
    bits: u8,
    group_size: Option<usize>,
    symmetric: bool,
    scale_dtype: ScaleDtype,
}

/// A scheme as a file has it.
#[derive(Deserialize)]
struct Unchecked {
    bits: u8,
    group_size: Option<usize>,
    symmetric: bool,
    scale_dtype: ScaleDtype,
}

impl TryFrom<Unchecked> for Scheme {
    type Error = Error;

    fn try_from(read: Unchecked) -> Result<Self> {
        Self::new(read.bits, read.group_size, read.symmetric, read.scale_dtype)
    }
}

/// Storage type of scales. The solver rounds every scale to it *before* rounding weights, so the
/// grid that errors are compensated on is exactly the grid that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// bfloat16, 8 bits of mantissa.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// Single precision, but in each 256 columns of a row whole multiples of one half-precision
    /// number, up to 15 for 2 bits and 31 for 3: the scales of GGUF's Q2_K and Q3_K, which then
    /// hold the codes as they are. For symmetric groups of 16 columns.
    Superblock,
}

impl ScaleDtype {
    /// `value` rounded to this type and back.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
            Self::F16 => half::f16::from_f32(value).to_f32(),
            Self::F32 | Self::Superblock => value,
        }
    }
}

impl Scheme {
    /// Bit widths that every output format of ours can hold.
    pub const BITS: [u8; 4] = [2, 3, 4, 8];

    /// A scheme; `group_size` `None` means one scale per output channel.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another bit width, or a group size that is zero or no multiple of 8.
    pub fn new(
        bits: u8,
        group_size: Option<usize>,
        symmetric: bool,
        scale_dtype: ScaleDtype,
    ) -> Result<Self> {
        if !Self::BITS.contains(&bits) {
            return Err(Error::Invalid {
                what: "--bits".into(),
                why: format!("{bits} given, one of {:?} expected", Self::BITS),
            });
        }
        if group_size.is_some_and(|g| g == 0 || g % 8 != 0) {
            return Err(Error::Invalid {
                what: "--group-size".into(),
                why: format!(
                    "{} given, a positive multiple of 8 or -1 (per channel) expected",
                    group_size.unwrap_or(0)
                ),
            });
        }
        let fits = symmetric && bits < 4 && group_size == Some(super_block::GROUP);
        if scale_dtype == ScaleDtype::Superblock && !fits {
            return Err(Error::Invalid {
                what: "scale_dtype superblock".into(),
                why: format!(
                    "{bits} bits, group size {group_size:?}, symmetric {symmetric} given; 2 or 3 \
                     bits, group size {} and symmetric expected",
                    super_block::GROUP
                ),
            });
        }
        Ok(Self {
            bits,
            group_size,
            symmetric,
            scale_dtype,
        })
    }

    /// The same format with codes of other bits.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another bit width than those of [`Scheme::BITS`].
    pub fn with_bits(self, bits: u8) -> Result<Self> {
        Self::new(bits, self.group_size, self.symmetric, self.scale_dtype)
    }

    /// The same format with other groups.
    ///
    /// # Errors
    /// As [`Scheme::new`].
    pub fn with_group_size(self, group_size: Option<usize>) -> Result<Self> {
        Self::new(self.bits, group_size, self.symmetric, self.scale_dtype)
    }

    /// The same format with scales stored in another type.
    pub fn with_scale_dtype(self, scale_dtype: ScaleDtype) -> Self {
        Self {
            scale_dtype,
            ..self
        }
    }

    /// Bits per code.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Columns that share a scale; `None` is the whole row.
    pub fn group_size(self) -> Option<usize> {
        self.group_size
    }

    /// Whether the grid is centred on zero (zero point fixed at 2^(bits−1)).
    pub fn symmetric(self) -> bool {
        self.symmetric
    }

    /// Storage type of scales.
    pub fn scale_dtype(self) -> ScaleDtype {
        self.scale_dtype
    }

    /// Largest code, 2^bits − 1.
    pub fn max_code(self) -> u8 {
        ((1u16 << self.bits) - 1) as u8
    }

    /// Columns that share a scale in a weight of `in_features` columns.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `module` if the group size does not divide `in_features`.
    pub fn group_len(self, module: &str, in_features: usize) -> Result<usize> {
        let group_len = self.group_size.unwrap_or(in_features);
        let is_super = self.scale_dtype == ScaleDtype::Superblock;
        if is_super && !in_features.is_multiple_of(super_block::SUPER) {
            return Err(Error::Invalid {
                what: "scale_dtype superblock".into(),
                why: format!(
                    "{module} has {in_features} input columns, a multiple of {} expected; give it \
                     a rule of its own",
                    super_block::SUPER
                ),
            });
        }
        if in_features == 0 || !in_features.is_multiple_of(group_len) {
            return Err(Error::Invalid {
                what: format!("--group-size {group_len}"),
                why: format!(
                    "{module} has {in_features} input columns, which it does not divide; {}",
                    propose_group(in_features)
                ),
            });
        }
        Ok(group_len)
    }

    /// Stored bits per weight, scales and zero points included, for rows of `in_features`.
    pub fn bits_per_weight(self, in_features: usize) -> f64 {
        let group = self.group_size.unwrap_or(in_features) as f64;
        let scale_bits = match self.scale_dtype {
            ScaleDtype::F32 | ScaleDtype::Superblock => 32.0,
            _ => 16.0,
        };
        let zero_bits = if self.symmetric {
            0.0
        } else {
            f64::from(self.bits)
        };
        f64::from(self.bits) + (scale_bits + zero_bits) / group
    }
}

fn propose_group(in_features: usize) -> String {
    match [128, 64, 32]
        .into_iter()
        .find(|g| in_features.is_multiple_of(*g))
    {
        Some(g) => format!("use --group-size {g}, or -1 for per-channel"),
        None => "use --group-size -1 for per-channel".to_owned(),
    }
}
