//! Scales in another type than they were solved in.
//!
//! Codes are never touched. A bfloat16 scale is a float16 one as it is unless it is very small: 8 of
//! 11 bits of mantissa are used, so that nothing is lost down to 2⁻¹⁷ and little below it. A
//! scale that would become zero or infinite is refused.

use crate::plan::ScaleDtype;
use crate::{Error, Matrix, QuantizedWeight, Result};
use serde::Serialize;

/// What storing scales in another type changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RoundedScales {
    /// Scales that are not what they were.
    pub n_rounded: usize,
    /// Largest relative change of one.
    pub largest_change: f64,
}

impl RoundedScales {
    fn add(&mut self, before: f32, after: f32) {
        if before != after {
            self.n_rounded += 1;
            let change = f64::from(after) / f64::from(before) - 1.0;
            self.largest_change = self.largest_change.max(change.abs());
        }
    }
}

/// The weight with its scales in `dtype`, and adds to `rounded` what that changed.
///
/// # Errors
/// [`Error::Unsupported`] naming a scale that this type has no room for.
pub(super) fn with_scales_in(
    module: &str,
    weight: &QuantizedWeight,
    dtype: ScaleDtype,
    rounded: &mut RoundedScales,
) -> Result<QuantizedWeight> {
    let scales = weight.scales();
    let stored = Matrix::from_fn(scales.rows(), scales.cols(), |row, group| {
        dtype.round(scales.row(row)[group])
    });
    for (before, after) in scales.data().iter().zip(stored.data()) {
        if !after.is_finite() || *after == 0.0 {
            return Err(Error::Unsupported {
                what: format!(
                    "{module}: its scale {before:e} is outside of {dtype:?}'s range; use a format \
                     with bfloat16 scales"
                ),
            });
        }
        rounded.add(*before, *after);
    }
    QuantizedWeight::new(
        module,
        weight.scheme().with_scale_dtype(dtype),
        [weight.rows(), weight.cols()],
        weight.codes().to_vec(),
        stored,
        weight.zero_points().to_vec(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Scheme;

    fn weight(scale: f32) -> QuantizedWeight {
        let scheme = Scheme::new(4, None, true, ScaleDtype::Bf16).unwrap();
        let scales = Matrix::from_vec("s", 1, 1, vec![scale]).unwrap();
        QuantizedWeight::new("m", scheme, [1, 8], vec![3; 8], scales, vec![8]).unwrap()
    }

    #[test]
    fn bfloat16_scales_survive_in_float16_down_to_their_range() {
        let mut rounded = RoundedScales::default();
        // 255 · 2⁻²⁴ is a bfloat16 number that is a whole multiple of float16's smallest one.
        let exact = 255.0 / 16_777_216.0;
        let same = with_scales_in("m", &weight(exact), ScaleDtype::F16, &mut rounded).unwrap();
        assert_eq!(same.scales().data(), [exact]);
        assert_eq!(rounded, RoundedScales::default());
        let small = ScaleDtype::Bf16.round(1.3e-6);
        let other = with_scales_in("m", &weight(small), ScaleDtype::F16, &mut rounded).unwrap();
        assert_eq!(rounded.n_rounded, 1);
        let change = f64::from(other.scales().data()[0]) / f64::from(small) - 1.0;
        assert_eq!(rounded.largest_change, change.abs());
        for out_of_range in [1e-9, 1e6] {
            let scale = ScaleDtype::Bf16.round(out_of_range);
            let result = with_scales_in("m", &weight(scale), ScaleDtype::F16, &mut rounded);
            assert!(matches!(result, Err(Error::Unsupported { .. })));
        }
    }
}
