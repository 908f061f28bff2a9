//! Output formats. Each has a writer that takes quantized modules one by one as they are solved,
//! copies everything else of the source folder unchanged, checks what it wrote by reading it back,
//! and only then lets the output folder appear.

pub mod compressed_tensors;

use crate::Matrix;
use crate::plan::Scheme;

/// Which module gets which number format.
#[derive(Clone, Debug, PartialEq)]
pub struct ModulePlan {
    /// Checkpoint name of the linear, without `.weight`.
    pub name: String,
    /// Its number format.
    pub scheme: Scheme,
}

/// A quantized weight, borrowed from the solver: (code − zero point) · scale.
#[derive(Clone, Copy, Debug)]
pub struct PackedSource<'a> {
    /// Number format.
    pub scheme: Scheme,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Unsigned codes `[rows, cols]`.
    pub codes: &'a [u8],
    /// Scales `[rows, n_groups]`, already rounded to the scheme's scale type.
    pub scales: &'a Matrix,
    /// Unsigned zero points `[rows, n_groups]`; all 2^(bits−1) if the scheme is symmetric.
    pub zero_points: &'a [u8],
}
