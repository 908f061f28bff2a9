//! The GGUF file format, which llama.cpp and what is built on it load: the container, the blocks
//! that codes are stored in, and where the tensors of a file come from.
//!
//! [`crate::export::gguf`] writes folders of such files, [`crate::checkpoint`] reads them back.

mod blocks;
mod codes;
mod container;
mod origin;
mod read;
mod super_block;

pub use blocks::{Rounding, decode};
pub(crate) use blocks::{encode, kind_of};
pub(crate) use codes::codes;
pub(crate) use container::in_memory;
pub use container::{TensorSpec, TensorType, Value, Writer};
pub(crate) use origin::{ORIGINS, Origin, Part, Parts, Rows};
pub use read::GgufFile;

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Name of the file of importance that may be beside a model.
pub const IMATRIX_FILE: &str = "imatrix.gguf";

/// The GGUF files of a folder, sorted; the importance matrix, which has no weights, is left out.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed.
pub fn gguf_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = |e| Error::io(dir, "list", e);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(list)? {
        let path = entry.map_err(list)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".gguf") && name != IMATRIX_FILE {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
