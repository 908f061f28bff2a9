//! From one format to another: the codes stay what they are.

use super::{Exported, Exporter, Format, ModulePlan};
use crate::checkpoint::write::MAX_SHARD_BYTES;
use crate::checkpoint::{Checkpoint, PendingFolder};
use crate::{Error, Result};
use std::path::Path;

/// Writes the quantized folder `source` once more, in another format. Codes and zero points are the
/// same bit for bit; scales are, unless the format has another type for them.
///
/// # Errors
/// [`Error::Unsupported`] if `source` is not quantized, or the format cannot hold one of its
/// modules, with the reason; else as [`Exporter`]. Nothing is left behind then.
pub fn convert(source: &Checkpoint, format: Format, output: &Path) -> Result<Exported> {
    let modules = source.quantized_modules();
    if source.quantization().is_none() || modules.is_empty() {
        let what = format!(
            "{}: export of a model that is not quantized; use `vlmq quantize` first",
            source.dir().display()
        );
        return Err(Error::Unsupported { what });
    }
    let mut plan = Vec::with_capacity(modules.len());
    for name in modules {
        let scheme = source.packed_module(&name)?.scheme();
        plan.push(ModulePlan { name, scheme });
    }
    let pending = PendingFolder::create(output)?;
    let mut exporter = Exporter::create(source, format, &plan, pending, MAX_SHARD_BYTES)?;
    for ModulePlan { name, .. } in &plan {
        exporter.write_module(name, &source.packed_module(name)?)?;
    }
    exporter.finish()
}
