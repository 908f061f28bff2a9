//! Writing of safetensors files whose tensors are known by name, type and shape beforehand.
//!
//! Headers are written first, so every tensor has its place at once and may arrive in any order;
//! the bytes of the files do not depend on that order. Tensors are dealt to shards in order of
//! their names; inside a shard those of wider types come first, as the reference implementation
//! has it, which keeps every tensor aligned to its type.

use super::shard::{LENGTH_BYTES, MAX_HEADER_BYTES};
use super::{DType, INDEX_FILE, WEIGHTS_FILE};
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Data per shard unless the caller wants otherwise: 5 GB, which every file host takes.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Sides, outermost first.
    pub shape: Vec<usize>,
}

/// Files under construction.
pub struct ShardedWriter {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    slots: BTreeMap<String, Slot>,
}

/// A tensor's place.
struct Slot {
    file: usize,
    offset: u64,
    n_bytes: u64,
    is_written: bool,
}

/// A tensor with its size.
struct Sized {
    spec: TensorSpec,
    n_bytes: u64,
}

impl ShardedWriter {
    /// Creates `model.safetensors` in `dir`, or shards `model-0000i-of-0000n.safetensors` if the
    /// tensors take more than `max_shard_bytes`, with headers and room for the data.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that comes twice, is reserved, or a size that overflows;
    /// [`Error::Io`] if a file exists or cannot be written.
    pub fn create(dir: &Path, specs: Vec<TensorSpec>, max_shard_bytes: u64) -> Result<Self> {
        let shards = deal(measure(specs)?, max_shard_bytes);
        let mut writer = Self {
            dir: dir.to_path_buf(),
            files: Vec::new(),
            slots: BTreeMap::new(),
        };
        let n_shards = shards.len();
        for (i, mut tensors) in shards.into_iter().enumerate() {
            tensors.sort_by_key(|t| (Reverse(t.spec.dtype.n_bytes()), t.spec.name.clone()));
            let name = match n_shards {
                1 => WEIGHTS_FILE.to_owned(),
                _ => format!("model-{:05}-of-{n_shards:05}.safetensors", i + 1),
            };
            writer.create_shard(&dir.join(name), tensors)?;
        }
        Ok(writer)
    }

    fn create_shard(&mut self, path: &Path, tensors: Vec<Sized>) -> Result<()> {
        let (header, n_data) = header_for(&tensors);
        if header.len() > MAX_HEADER_BYTES {
            return Err(Error::Invalid {
                what: path.display().to_string(),
                why: format!("needs a header of {} bytes, too long to read", header.len()),
            });
        }
        let fail = |e| Error::io(path, "write", e);
        let mut file = File::create_new(path).map_err(|e| Error::io(path, "create", e))?;
        file.write_all(&(header.len() as u64).to_le_bytes())
            .map_err(fail)?;
        file.write_all(&header).map_err(fail)?;
        let mut offset = (LENGTH_BYTES + header.len()) as u64;
        file.set_len(offset + n_data).map_err(fail)?;
        for Sized { spec, n_bytes } in tensors {
            let slot = Slot {
                file: self.files.len(),
                offset,
                n_bytes,
                is_written: n_bytes == 0,
            };
            offset += n_bytes;
            self.slots.insert(spec.name, slot);
        }
        self.files.push((path.to_path_buf(), file));
        Ok(())
    }

    /// Writes a tensor's bytes, row-major and little-endian, to its place.
    ///
    /// # Errors
    /// [`Error::Missing`] for a name that was not announced, [`Error::Invalid`] for a length that
    /// was not or a second time, [`Error::Io`] if the disk refuses.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write_pieces(name, std::iter::once(Ok(bytes)))
    }

    /// As [`ShardedWriter::write`], from pieces in their order.
    ///
    /// # Errors
    /// As [`ShardedWriter::write`], and the first piece's that has one; the tensor then counts as
    /// not written.
    pub fn write_pieces<B: AsRef<[u8]>>(
        &mut self,
        name: &str,
        pieces: impl Iterator<Item = Result<B>>,
    ) -> Result<()> {
        let slot = self.slots.get_mut(name).ok_or_else(|| Error::Missing {
            what: format!("tensor {name}"),
            place: format!("the tensors announced for {}", self.dir.display()),
        })?;
        let wrong = |found: String| Error::Invalid {
            what: format!("tensor {name}"),
            why: format!("{found}, {} bytes expected once", slot.n_bytes),
        };
        if slot.is_written && slot.n_bytes > 0 {
            return Err(wrong("given a second time".into()));
        }
        let (path, file) = &mut self.files[slot.file];
        let fail = |e| Error::io(path, "write", e);
        file.seek(SeekFrom::Start(slot.offset)).map_err(fail)?;
        let mut n_bytes = 0;
        for piece in pieces {
            let piece = piece?;
            n_bytes += piece.as_ref().len() as u64;
            if n_bytes > slot.n_bytes {
                return Err(wrong(format!("{n_bytes} bytes given")));
            }
            file.write_all(piece.as_ref()).map_err(fail)?;
        }
        if n_bytes < slot.n_bytes {
            return Err(wrong(format!("{n_bytes} bytes given")));
        }
        slot.is_written = true;
        Ok(())
    }

    /// Bytes of all tensors that were announced.
    pub fn total_bytes(&self) -> u64 {
        self.slots.values().map(|slot| slot.n_bytes).sum()
    }

    /// Whether the tensor was announced and not yet written.
    pub fn is_open(&self, name: &str) -> bool {
        self.slots.get(name).is_some_and(|slot| !slot.is_written)
    }

    /// Writes the index if there are several shards; returns the data written, in bytes.
    ///
    /// # Errors
    /// [`Error::Missing`] naming a tensor that was never written, [`Error::Io`].
    pub fn finish(self) -> Result<u64> {
        if let Some((name, _)) = self.slots.iter().find(|(_, slot)| !slot.is_written) {
            return Err(Error::Missing {
                what: format!("data of tensor {name}"),
                place: self.dir.display().to_string(),
            });
        }
        let n_bytes = self.total_bytes();
        if self.files.len() > 1 {
            self.write_index(n_bytes)?;
        }
        Ok(n_bytes)
    }

    fn write_index(&self, n_bytes: u64) -> Result<()> {
        let file_name = |slot: &Slot| {
            let name = self.files[slot.file].0.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let weight_map: BTreeMap<&String, String> = self
            .slots
            .iter()
            .map(|(name, slot)| (name, file_name(slot)))
            .collect();
        let index = json!({"metadata": {"total_size": n_bytes}, "weight_map": weight_map});
        let path = self.dir.join(INDEX_FILE);
        std::fs::write(&path, format!("{index:#}\n")).map_err(|e| Error::io(&path, "write", e))
    }
}

/// Sizes of the tensors, which are returned in order of their names.
fn measure(specs: Vec<TensorSpec>) -> Result<Vec<Sized>> {
    let mut tensors: Vec<Sized> = Vec::with_capacity(specs.len());
    let mut total = 0u64;
    for spec in specs {
        let fail = |why: &str| Error::Invalid {
            what: format!("tensor {}", spec.name),
            why: why.into(),
        };
        if spec.name == "__metadata__" {
            return Err(fail("the name is reserved in the file format"));
        }
        let mut sides = spec.shape.iter();
        let n_bytes = sides.try_fold(spec.dtype.n_bytes() as u64, |n, s| n.checked_mul(*s as u64));
        let n_bytes = n_bytes.ok_or_else(|| fail("its size overflows"))?;
        total = total
            .checked_add(n_bytes)
            .filter(|n| *n < i64::MAX as u64)
            .ok_or_else(|| fail("the size of all tensors overflows"))?;
        tensors.push(Sized { spec, n_bytes });
    }
    tensors.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
    match tensors
        .windows(2)
        .find(|w| w[0].spec.name == w[1].spec.name)
    {
        Some(pair) => Err(Error::Invalid {
            what: format!("tensor {}", pair[0].spec.name),
            why: "announced twice".into(),
        }),
        None => Ok(tensors),
    }
}

/// Deals tensors to shards in order, a new one whenever the next would not fit; at least one.
fn deal(tensors: Vec<Sized>, max_shard_bytes: u64) -> Vec<Vec<Sized>> {
    let mut shards = vec![Vec::new()];
    let mut room = max_shard_bytes;
    for tensor in tensors {
        let is_empty = shards
            .last()
            .is_none_or(|shard: &Vec<Sized>| shard.is_empty());
        if tensor.n_bytes > room && !is_empty {
            shards.push(Vec::new());
            room = max_shard_bytes;
        }
        room = room.saturating_sub(tensor.n_bytes);
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}

/// The JSON header, padded with spaces to a multiple of 8, and the bytes of data behind it.
fn header_for(tensors: &[Sized]) -> (Vec<u8>, u64) {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for Sized { spec, n_bytes } in tensors {
        let entry = json!({
            "dtype": spec.dtype.name(),
            "shape": spec.shape,
            "data_offsets": [offset, offset + n_bytes],
        });
        entries.insert(spec.name.clone(), entry);
        offset += n_bytes;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    (header, offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        }
    }

    fn specs() -> Vec<TensorSpec> {
        vec![
            spec("c", DType::Bf16, &[3]),
            spec("a", DType::I64, &[2]),
            spec("b", DType::U8, &[0, 5]),
        ]
    }

    #[test]
    fn the_reference_crate_reads_the_file_and_order_does_not_matter() {
        let mut files = Vec::new();
        for order in [["a", "c"], ["c", "a"]] {
            let dir = tempfile::tempdir().unwrap();
            let mut writer = ShardedWriter::create(dir.path(), specs(), MAX_SHARD_BYTES).unwrap();
            for name in order {
                assert!(writer.is_open(name));
                let n = if name == "a" { 16 } else { 6 };
                writer.write(name, &vec![n; n as usize]).unwrap();
            }
            assert_eq!(writer.finish().unwrap(), 22);
            files.push(std::fs::read(dir.path().join(WEIGHTS_FILE)).unwrap());
        }
        assert_eq!(files[0], files[1]);
        let (n_header, metadata) = SafeTensors::read_metadata(&files[0]).unwrap();
        assert_eq!(n_header % 8, 0);
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        let read = SafeTensors::deserialize(&files[0]).unwrap();
        assert_eq!(read.tensor("a").unwrap().data(), [16; 16]);
        assert_eq!(read.tensor("b").unwrap().shape(), [0, 5]);
        assert_eq!(read.tensor("c").unwrap().data(), [6; 6]);
    }

    #[test]
    fn misuse_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardedWriter::create(dir.path(), specs(), MAX_SHARD_BYTES).unwrap();
        assert!(matches!(writer.write("x", &[]), Err(Error::Missing { .. })));
        assert!(matches!(
            writer.write("a", &[0; 15]),
            Err(Error::Invalid { .. })
        ));
        writer.write("a", &[0; 16]).unwrap();
        assert!(matches!(
            writer.write("a", &[0; 16]),
            Err(Error::Invalid { .. })
        ));
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("data of tensor c"), "{error}");
        let again = ShardedWriter::create(dir.path(), specs(), MAX_SHARD_BYTES);
        assert!(matches!(again, Err(Error::Io { .. })));
        for bad in [
            vec![spec("a", DType::U8, &[1]), spec("a", DType::U8, &[1])],
            vec![spec("__metadata__", DType::U8, &[1])],
            vec![spec("a", DType::U8, &[usize::MAX, 2])],
            vec![
                spec("a", DType::U8, &[i64::MAX as usize]),
                spec("b", DType::U8, &[1]),
            ],
        ] {
            let result = ShardedWriter::create(&dir.path().join("absent"), bad, 1);
            assert!(matches!(result, Err(Error::Invalid { .. })));
        }
    }
}
