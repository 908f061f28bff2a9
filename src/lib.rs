//! Post-training quantization of vision-language models with importance-weighted Hessians.
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used))]

pub mod checkpoint;
pub mod dataset;
pub mod error;
pub mod export;
pub mod importance;
pub mod matrix;
pub mod model;
pub(crate) mod pack;
pub mod plan;
pub mod processor;
pub mod solver;
pub mod statistics;

pub use error::{Error, Result};
pub use matrix::Matrix;
