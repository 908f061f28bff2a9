//! Post-training quantization of vision-language models with importance-weighted Hessians.
//!
//! ```text
//! checkpoint ─► model, one layer at a time ─► two streams per sample:  F (full precision)  U (quantized so far)
//!                    ▲                                │
//! images + text ─► processor ─► samples               ▼
//!                                        importance   g = ‖∂L_layer/∂z‖ per token, one analytic backward
//!                                                     │
//!                                        statistics   H = Σ ω u uᵀ,  C = Σ ω (f − u) uᵀ
//!                                                     │
//!                                        solver       codes, scales, zero points
//!                                                     │
//!                                        pack ─► export ─► verify ─► eval ─► report
//! ```
//! A weight travels this line once, from disk to disk.
//!
//! | word | meaning |
//! |---|---|
//! | module | one linear, by its checkpoint name |
//! | layer | one transformer layer |
//! | group | columns that share a scale |
//! | col_block | columns whose corrections the solver gathers |
//! | stage | the linears of a layer that see the same inputs |
//! | F, U | the full-precision and the quantized stream of hidden states |
//! | ω, g | a token's weight, and the importance factor it comes from |
//!
//! # Example
//! One matrix, without a model:
//! ```
//! use vlmq::{Matrix, plan::{ScaleDtype, Scheme}, solver::{SolverSettings, gptq}};
//! use vlmq::statistics::Statistics;
//!
//! let weight = Matrix::from_fn(8, 32, |row, col| ((row * 7 + col * 3) % 11) as f32 - 5.0);
//! let inputs = Matrix::from_fn(64, 32, |token, col| ((token * 5 + col * 13) % 17) as f32 - 8.0);
//! let mut statistics = Statistics::new(32, false);
//! statistics.add("example", &inputs, None, None)?;
//! let scheme = Scheme::new(4, Some(16), false, ScaleDtype::Bf16)?;
//! let solved = gptq("example", &weight, &statistics, scheme, &SolverSettings::default())?;
//! assert!(solved.loss < 0.01 * solved.energy);
//! # Ok::<(), vlmq::Error>(())
//! ```
#![deny(missing_docs)]
#![cfg_attr(not(test), deny(clippy::unwrap_used))]

pub mod allocation;
pub mod calibration;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod conversion;
pub mod dataset;
pub mod distributed;
pub mod engine;
pub mod error;
pub mod eval;
pub mod export;
pub mod families;
pub mod gguf;
// What only an implementation reads is read by nobody where there is none.
#[cfg_attr(not(any(feature = "cuda", test)), allow(dead_code))]
mod gpu;
pub mod hidden_states;
pub mod importance;
pub mod journal;
pub mod matrix;
pub mod memory;
pub mod model;
pub mod pack;
pub mod pipeline;
pub mod plan;
pub mod processor;
pub mod quantized;
pub mod recipe;
pub mod report;
pub mod run;
pub mod shards;
pub mod solver;
pub mod statistics;
pub mod sweep;
pub mod transform;
pub mod tuning;
pub mod verification;

pub use error::{Error, Result};
pub use matrix::Matrix;
pub use quantized::QuantizedWeight;
