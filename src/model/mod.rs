//! Vision-language models, one layer in memory at a time.
//!
//! A family is a file that says how its checkpoint names things and which tower it has; the
//! decoder, its rotary positions and the head are shared. Calibration loads layer after layer;
//! [`LoadedModel`] holds all of them, to answer questions.

pub mod attention;
pub mod config;
pub mod decoder;
pub mod head;
pub mod linear;
pub mod loaded;
pub mod positions;
pub mod qwen2_vl;
pub mod rope;
pub mod vision;

pub use config::DecoderConfig;
pub use decoder::{DecoderLayer, LayerSource, Projection};
pub use head::Head;
pub use linear::Linear;
pub use loaded::LoadedModel;
pub use positions::multimodal_positions;
pub use qwen2_vl::Qwen2Vl;
pub use rope::Rope;
