//! Reading of linears that a GGUF file has as blocks.
//!
//! A quantized linear `m` of `[rows, cols]` has `m.weight`, bytes `[rows, bytes of a row]`, whose type
//! and number format stand in the file ([`crate::checkpoint`] says how such a folder is read).

use crate::checkpoint::Checkpoint;
use crate::gguf::{TensorType, codes};
use crate::plan::Scheme;
use crate::{QuantizedWeight, Result};
use std::collections::BTreeMap;

/// Tensors of a quantized module.
pub(super) const SUFFIXES: [&str; 1] = ["weight"];

/// The blocks of one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::checkpoint) struct Blocks {
    pub(in crate::checkpoint) kind: TensorType,
    pub(in crate::checkpoint) scheme: Scheme,
    pub(in crate::checkpoint) cols: usize,
}

/// The quantized modules of a folder of GGUF files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gguf {
    modules: BTreeMap<String, Blocks>,
}

impl Gguf {
    pub(in crate::checkpoint) fn new(modules: BTreeMap<String, Blocks>) -> Self {
        Self { modules }
    }

    /// Whether a linear is stored as blocks.
    pub(super) fn contains(&self, module: &str) -> bool {
        self.modules.contains_key(module)
    }

    /// `[rows, cols]` of a module.
    pub(super) fn shape(&self, checkpoint: &Checkpoint, module: &str) -> Result<[usize; 2]> {
        let blocks = self.blocks(checkpoint, module)?;
        let [rows, _] = checkpoint.matrix_shape(&format!("{module}.weight"))?;
        Ok([rows, blocks.cols])
    }

    pub(super) fn read(&self, checkpoint: &Checkpoint, module: &str) -> Result<QuantizedWeight> {
        let Blocks { kind, scheme, .. } = *self.blocks(checkpoint, module)?;
        let shape = self.shape(checkpoint, module)?;
        let bytes = checkpoint.bytes(&format!("{module}.weight"))?;
        codes(module, &bytes, kind, scheme, shape)
    }

    fn blocks(&self, checkpoint: &Checkpoint, module: &str) -> Result<&Blocks> {
        let found = self.modules.get(module);
        found.ok_or_else(|| checkpoint.not_quantized(module))
    }
}
