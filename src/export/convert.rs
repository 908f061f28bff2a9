//! From one format to another: the codes stay what they are.

use super::{Exported, Exporter, Format, ModulePlan};
use crate::checkpoint::write::MAX_SHARD_BYTES;
use crate::checkpoint::{Checkpoint, PendingFolder};
use crate::{Error, Result};
use std::path::Path;

/// The formats of all quantized modules of a folder.
///
/// # Errors
/// [`Error::Unsupported`] if there are none; as [`Checkpoint::packed_module`].
pub fn plan_of(source: &Checkpoint) -> Result<Vec<ModulePlan>> {
    let modules = source.quantized_modules();
    if modules.is_empty() {
        let what = format!(
            "{}: export of a model that is not quantized; use `vlmq quantize` first",
            source.dir().display()
        );
        return Err(Error::Unsupported { what });
    }
    let of_module = |name: String| {
        let scheme = source.packed_module(&name)?.scheme();
        Ok(ModulePlan { name, scheme })
    };
    modules.into_iter().map(of_module).collect()
}

/// Writes the quantized folder `source` once more, in another format, with `files` of our own beside
/// those that are copied. Codes and zero points are the same bit for bit; scales are, unless the
/// format has another type for them, which [`Exported::rounded_scales`] tells.
///
/// # Errors
/// [`Error::Unsupported`] if the format cannot hold one of the modules, with the reason; else as
/// [`Exporter`]. Nothing is left behind then.
pub fn convert(
    source: &Checkpoint,
    format: Format,
    plan: &[ModulePlan],
    output: &Path,
    files: &[(String, Vec<u8>)],
) -> Result<Exported> {
    let pending = PendingFolder::create(output)?;
    let mut exporter = Exporter::create(source, format, plan, pending, MAX_SHARD_BYTES)?;
    for ModulePlan { name, .. } in plan {
        exporter.write_module(name, &source.packed_module(name)?)?;
    }
    for (name, bytes) in files {
        exporter.write_file(name, bytes)?;
    }
    exporter.finish()
}
