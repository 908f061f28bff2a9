//! Changes of a model that keep its function, made before it is quantized.

mod orthogonal;
mod padding;
mod rotation;

pub use orthogonal::{Rotation, RotationKind};
pub use padding::{Padded, PaddingSettings, pad_folder};
pub use rotation::{Rotated, RotationSettings, rotate_folder};
