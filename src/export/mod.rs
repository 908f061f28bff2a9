//! Output formats. Each has a writer that takes quantized modules one by one as they are solved,
//! copies everything else of the source folder unchanged, checks what it wrote by reading it back,
//! and only then lets the output folder appear.

pub mod compressed_tensors;
pub mod gguf;

use crate::plan::Scheme;

/// Which module gets which number format.
#[derive(Clone, Debug, PartialEq)]
pub struct ModulePlan {
    /// Checkpoint name of the linear, without `.weight`.
    pub name: String,
    /// Its number format.
    pub scheme: Scheme,
}
