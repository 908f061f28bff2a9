//! Vision-language models, one layer in memory at a time.
//!
//! A family (`crate::families`) says what a checkpoint is ([`Architecture`]): the decoder and the
//! tower as data, and what they are called. The decoder, its rotary positions and the head are
//! shared. Calibration loads layer after layer from a [`ModelSource`]; [`LoadedModel`] holds all of
//! them, to answer questions.

pub mod architecture;
pub mod attention;
pub mod changed;
pub mod config;
pub mod context;
pub mod decoder;
pub mod decoder_config;
pub mod device;
pub mod experts;
pub mod generation;
pub mod head;
pub mod layer_source;
pub mod linear;
pub mod loaded;
pub mod norm;
pub mod positions;
mod product;
pub mod projection;
pub mod rope;
pub mod source;
pub mod vision;

pub use architecture::Architecture;
pub use changed::{ChangedTensor, LayerPart};
pub use context::TokenContext;
pub use decoder::DecoderLayer;
pub use decoder_config::DecoderConfig;
pub use device::{ModelDevice, Products};
pub use head::Head;
pub use layer_source::LayerSource;
pub use linear::Linear;
pub use loaded::LoadedModel;
pub use positions::multimodal_positions;
pub use projection::{Projection, Slot};
pub use rope::Rope;
pub use source::{ModelSource, Module};
