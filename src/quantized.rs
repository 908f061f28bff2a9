//! A weight on its grid: what solvers make, exporters write and readers give back.

use crate::plan::Scheme;
use crate::{Error, Matrix, Result};
use std::ops::Range;

/// Codes, scales and zero points of one linear: w = (code − zero_point) · scale.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    scheme: Scheme,
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Matrix,
    zero_points: Vec<u8>,
}

impl QuantizedWeight {
    /// A weight of `shape` `[rows, cols]` from its parts, checked.
    ///
    /// Shapes: `codes [rows, cols]` in original column order, `scales` and `zero_points`
    /// `[rows, n_groups]`.
    /// # Errors
    /// [`Error::Invalid`] if the group size does not divide the columns, a code or zero point has
    /// more bits than the scheme, a symmetric scheme's zero point is not the middle code, or a
    /// scale is not positive or changes when it is stored; [`Error::Shape`] for other lengths;
    /// [`Error::NotFinite`] for NaN or infinite scales.
    pub fn new(
        module: &str,
        scheme: Scheme,
        shape: [usize; 2],
        codes: Vec<u8>,
        scales: Matrix,
        zero_points: Vec<u8>,
    ) -> Result<Self> {
        let [rows, cols] = shape;
        let n_groups = cols / scheme.group_len(module, cols)?;
        let expect = |part: &str, expected: [usize; 2], found: Vec<usize>, n: usize| {
            if expected[0].checked_mul(expected[1]) == Some(n) {
                return Ok(());
            }
            Err(Error::Shape {
                module: format!("{part} of {module}"),
                expected: expected.to_vec(),
                found,
            })
        };
        expect("codes", shape, vec![codes.len()], codes.len())?;
        let groups = [rows, n_groups];
        expect(
            "zero points",
            groups,
            vec![zero_points.len()],
            zero_points.len(),
        )?;
        let found = [scales.rows(), scales.cols()];
        let n_found = if found == groups {
            rows * n_groups
        } else {
            usize::MAX
        };
        expect("scales", groups, found.to_vec(), n_found)?;
        let weight = Self {
            scheme,
            rows,
            cols,
            codes,
            scales,
            zero_points,
        };
        weight.check_values(module)?;
        Ok(weight)
    }

    /// Number format.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Groups of columns in each row.
    pub fn n_groups(&self) -> usize {
        self.scales.cols()
    }

    /// Codes `[rows, cols]`, row after row, columns in original order.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Scales `[rows, n_groups]`, exactly representable in their storage type.
    pub fn scales(&self) -> &Matrix {
        &self.scales
    }

    /// Gives the codes other scales `[rows, n_groups]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are more or fewer; as [`QuantizedWeight::new`] for their values.
    pub(crate) fn set_scales(&mut self, module: &str, scales: Matrix) -> Result<()> {
        let shape = |m: &Matrix| vec![m.rows(), m.cols()];
        if shape(&scales) != shape(&self.scales) {
            return Err(Error::Shape {
                module: format!("scales of {module}"),
                expected: shape(&self.scales),
                found: shape(&scales),
            });
        }
        self.scales = scales;
        self.check_scales(module)
    }

    /// Zero points `[rows, n_groups]`; 2^(bits−1) throughout if the scheme is symmetric.
    pub fn zero_points(&self) -> &[u8] {
        &self.zero_points
    }

    /// The weight `[rows, cols]` that the codes stand for, computed in f32.
    pub fn dequantize(&self) -> Matrix {
        self.dequantize_rows(0..self.rows)
    }

    /// Some rows of [`QuantizedWeight::dequantize`].
    pub(crate) fn dequantize_rows(&self, rows: Range<usize>) -> Matrix {
        let n_groups = self.n_groups();
        let group_len = (self.cols / n_groups.max(1)).max(1);
        let mut values = Matrix::zeros(rows.len(), self.cols);
        let codes = self.codes[rows.start * self.cols..].chunks(group_len);
        let groups = values.data_mut().chunks_mut(group_len).zip(codes);
        for (index, (values, codes)) in (rows.start * n_groups..).zip(groups) {
            let scale = self.scales.data()[index];
            let zero = f32::from(self.zero_points[index]);
            for (value, code) in values.iter_mut().zip(codes) {
                *value = (f32::from(*code) - zero) * scale;
            }
        }
        values
    }

    fn check_values(&self, module: &str) -> Result<()> {
        let invalid = |what: &str, why: String| {
            Err(Error::Invalid {
                what: format!("{what} of {module}"),
                why,
            })
        };
        let max_code = self.scheme.max_code();
        if let Some(code) = self.codes.iter().find(|code| **code > max_code) {
            return invalid("code", format!("{code} found, at most {max_code} expected"));
        }
        let middle = max_code / 2 + 1;
        let allowed = if self.scheme.symmetric() {
            middle..=middle
        } else {
            0..=max_code
        };
        if let Some(zero) = self.zero_points.iter().find(|z| !allowed.contains(z)) {
            return invalid("zero point", format!("{zero} found, {allowed:?} expected"));
        }
        self.check_scales(module)
    }

    fn check_scales(&self, module: &str) -> Result<()> {
        let count = self.scales.count_not_finite();
        if count > 0 {
            return Err(Error::NotFinite {
                module: module.to_owned(),
                stage: "scales".into(),
                count,
            });
        }
        let dtype = self.scheme.scale_dtype();
        let is_bad = |scale: &&f32| !(**scale > 0.0 && dtype.round(**scale) == **scale);
        if let Some(scale) = self.scales.data().iter().find(is_bad) {
            return Err(Error::Invalid {
                what: format!("scale of {module}"),
                why: format!("{scale:e} found, a positive {dtype:?} expected"),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ScaleDtype;

    #[test]
    fn a_weight_is_checked_when_it_is_made() {
        let make = |codes: Vec<u8>, scales: Vec<f32>, zeros: Vec<u8>, symmetric| {
            let scales = Matrix::from_vec("scales", 1, scales.len(), scales).unwrap();
            QuantizedWeight::new(
                "layer",
                Scheme::new(2, Some(8), symmetric, ScaleDtype::Bf16).unwrap(),
                [1, 16],
                codes,
                scales,
                zeros,
            )
        };
        let good = make(vec![3; 16], vec![0.5, 2.0], vec![2, 2], true).unwrap();
        assert_eq!(good.dequantize().row(0)[7..9], [0.5, 2.0]);
        assert_eq!((good.rows(), good.cols(), good.n_groups()), (1, 16, 2));
        let bad = [
            make(vec![3; 15], vec![0.5, 2.0], vec![2, 2], true),
            make(vec![4; 16], vec![0.5, 2.0], vec![2, 2], true),
            make(vec![3; 16], vec![0.5, 2.0], vec![2, 1], true),
            make(vec![3; 16], vec![0.5, 2.0], vec![2, 4], false),
            make(vec![3; 16], vec![0.5, 2.0], vec![2], false),
            make(vec![3; 16], vec![0.5], vec![2, 2], false),
            make(vec![3; 16], vec![0.5, -2.0], vec![2, 2], false),
            make(vec![3; 16], vec![0.5, 0.0], vec![2, 2], false),
            make(vec![3; 16], vec![0.5, f32::NAN], vec![2, 2], false),
            make(vec![3; 16], vec![0.5, 0.1], vec![2, 2], false),
        ];
        for (index, weight) in bad.into_iter().enumerate() {
            assert!(weight.is_err(), "case {index}");
        }
    }
}
