//! Post-training quantization of vision-language models with importance-weighted Hessians.
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used))]

pub mod calibration;
pub mod checkpoint;
pub mod dataset;
pub mod error;
pub mod eval;
pub mod export;
pub mod importance;
pub mod matrix;
pub mod memory;
pub mod model;
pub mod pack;
pub mod pipeline;
pub mod plan;
pub mod processor;
pub mod recipe;
pub mod report;
pub mod run;
pub mod solver;
pub mod statistics;
pub mod sweep;

pub use error::{Error, Result};
pub use matrix::Matrix;
