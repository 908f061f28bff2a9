//! Where a model's tensors are made, and what its products are made of there.

use crate::{Error, Result};
use candle_core::Device;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

/// What the factors of products are rounded to, of the forward passes and the backward one. Sums and
/// results are f32 always, and statistics and solutions are not concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// Not at all.
    #[default]
    F32,
    /// To 10 bits of mantissa, by the tensor cores of a GPU.
    Tf32,
    /// To 7 bits of mantissa for linears, whose weights are kept so, and to 10 for the products of
    /// attention.
    Bf16,
}

impl Products {
    /// As on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Products {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::F32, Self::Tf32, Self::Bf16];
        let found = all.into_iter().find(|products| products.name() == text);
        found.ok_or_else(|| Error::Invalid {
            what: "--products".into(),
            why: format!("{text:?} given, f32, tf32 or bf16 expected"),
        })
    }
}

/// A device with its way to multiply; one without more said is one of f32.
#[derive(Clone, Debug)]
pub struct ModelDevice {
    device: Device,
    products: Products,
}

impl ModelDevice {
    /// `device`, on which linears multiply as `products` says. TF32 is the tensor library's setting for
    /// the whole process, and the caller's to make.
    pub fn new(device: Device, products: Products) -> Self {
        Self { device, products }
    }

    /// What products are made of.
    pub fn products(&self) -> Products {
        self.products
    }
}

impl From<Device> for ModelDevice {
    fn from(device: Device) -> Self {
        Self::new(device, Products::F32)
    }
}

impl Deref for ModelDevice {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_named_as_on_the_command_line() {
        for products in [Products::F32, Products::Tf32, Products::Bf16] {
            assert_eq!(products.name().parse::<Products>().unwrap(), products);
        }
        let error = "fp8".parse::<Products>().unwrap_err();
        assert!(error.to_string().contains("tf32"), "{error}");
    }
}
