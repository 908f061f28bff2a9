//! Plain numbers: what the codes stand for, in one float type, for programs that know no
//! quantization. Nothing gets smaller; it is the same function up to the rounding of that type.

use super::file_dtype;
use super::layout::{ConfigEntry, Layout, Part, Schemes, float_bytes};
use crate::checkpoint::Checkpoint;
use crate::plan::{ScaleDtype, Scheme};
use crate::{QuantizedWeight, Result};

/// Weights in a float type.
pub(super) struct Dense(ScaleDtype);

pub(super) const BF16: Dense = Dense(ScaleDtype::Bf16);
pub(super) const F16: Dense = Dense(ScaleDtype::F16);
pub(super) const F32: Dense = Dense(ScaleDtype::F32);

impl Layout for Dense {
    fn stored(&self, value: f32) -> f32 {
        self.0.round(value)
    }

    fn parts(&self, _module: &str, _scheme: Scheme, shape: [usize; 2]) -> Result<Vec<Part>> {
        Ok(vec![Part::new("weight", file_dtype(self.0), &shape)])
    }

    fn bytes(&self, module: &str, weight: &QuantizedWeight) -> Result<Vec<Vec<u8>>> {
        let dtype = file_dtype(self.0);
        let values = weight.dequantize();
        Ok(vec![float_bytes(module, dtype, values.data())?])
    }

    fn config(&self, _source: &Checkpoint, _schemes: &Schemes) -> Result<Option<ConfigEntry>> {
        Ok(None)
    }
}
