//! Element types of safetensors files, and their conversion to f32.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// Element type of a stored tensor; each takes a whole number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "&str", try_from = "String")]
#[non_exhaustive]
pub enum DType {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// 8-bit float with 4 exponent and 3 mantissa bits.
    F8E4M3,
    /// 8-bit float with 5 exponent and 2 mantissa bits.
    F8E5M2,
    /// 8-bit power of two.
    F8E8M0,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// IEEE single precision.
    F32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// IEEE double precision.
    F64,
}

/// Every type with the name that file headers use and its size in bytes.
const TABLE: [(DType, &str, usize); 16] = [
    (DType::Bool, "BOOL", 1),
    (DType::U8, "U8", 1),
    (DType::I8, "I8", 1),
    (DType::F8E4M3, "F8_E4M3", 1),
    (DType::F8E5M2, "F8_E5M2", 1),
    (DType::F8E8M0, "F8_E8M0", 1),
    (DType::I16, "I16", 2),
    (DType::U16, "U16", 2),
    (DType::F16, "F16", 2),
    (DType::Bf16, "BF16", 2),
    (DType::I32, "I32", 4),
    (DType::U32, "U32", 4),
    (DType::F32, "F32", 4),
    (DType::I64, "I64", 8),
    (DType::U64, "U64", 8),
    (DType::F64, "F64", 8),
];

impl DType {
    /// The type that a file header calls `name`; `None` for a name that is not handled.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The name that a file header uses.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Size of one element in bytes.
    pub fn n_bytes(self) -> usize {
        TABLE[self as usize].2
    }

    /// Little-endian `bytes` of this type as f32, rounded to nearest; `None` if the type is not a
    /// 16, 32 or 64-bit float. A trailing partial element is dropped.
    pub fn f32_from_bytes(self, bytes: &[u8]) -> Option<Vec<f32>> {
        Some(match self {
            Self::Bf16 => convert(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F16 => convert(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::F32 => convert(bytes, f32::from_le_bytes),
            Self::F64 => convert(bytes, |b| f64::from_le_bytes(b) as f32),
            _ => return None,
        })
    }

    /// `values` as little-endian bytes of this type, rounded to nearest; `None` if the type is not
    /// a 16 or 32-bit float.
    pub fn bytes_from_f32(self, values: &[f32]) -> Option<Vec<u8>> {
        let values = values.iter();
        Some(match self {
            Self::Bf16 => values
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::F16 => values
                .flat_map(|v| f16::from_f32(*v).to_le_bytes())
                .collect(),
            Self::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            _ => return None,
        })
    }
}

impl From<DType> for &str {
    fn from(dtype: DType) -> Self {
        dtype.name()
    }
}

impl TryFrom<String> for DType {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::from_name(&name).ok_or_else(|| format!("dtype {name:?} is not one that is handled"))
    }
}

fn convert<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_order_of_the_enum_and_names_agree_with_the_reference_crate() {
        for (dtype, name, n_bytes) in TABLE {
            assert_eq!(DType::from_name(name), Some(dtype));
            assert_eq!((dtype.name(), dtype.n_bytes()), (name, n_bytes));
            let json = format!("\"{name}\"");
            let reference: safetensors::Dtype = serde_json::from_str(&json).unwrap();
            assert_eq!(reference.bitsize(), 8 * n_bytes, "{name}");
        }
        assert_eq!(DType::from_name("F4"), None);
    }

    #[test]
    fn floats_convert_and_integers_do_not() {
        let values = [0.0f32, -1.5, 65504.0, 2.0f32.powi(-14)];
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let bytes = dtype.bytes_from_f32(&values).unwrap();
            let back = dtype.f32_from_bytes(&bytes).unwrap();
            let expected = values.map(|v| match dtype {
                DType::Bf16 => bf16::from_f32(v).to_f32(),
                _ => v,
            });
            assert_eq!(back, expected);
        }
        let doubles: Vec<u8> = [1.0f64, 1e300]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        assert_eq!(
            DType::F64.f32_from_bytes(&doubles).unwrap(),
            [1.0, f32::INFINITY]
        );
        assert_eq!(DType::I32.f32_from_bytes(&[0; 4]), None);
        assert_eq!(DType::I32.bytes_from_f32(&[0.0]), None);
    }
}
