//! The GGUF container: a header of typed keys, a table of tensors, and their data, all in one file.
//!
//! Version 3, little-endian: `GGUF`, version u32, number of tensors u64, number of keys u64, the
//! keys, the table, and after padding to 32 bytes the data, each tensor's again padded to 32. A
//! string is its length u64 and its bytes. Sides of a tensor are written innermost first, the other
//! way round than everywhere else here, so [`TensorSpec::shape`] is turned when it is written and
//! nowhere before.
//!
//! Source: ggml-org/llama.cpp `docs/gguf.md` and `gguf-py/gguf/gguf_writer.py`. Differs: data must
//! come in the order of the table, so that no more than one tensor is ever in memory.

use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// First bytes of every file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Version of the container.
pub(super) const VERSION: u32 = 3;
/// Boundary at which the data of each tensor begins.
pub(super) const ALIGNMENT: u64 = 32;
/// Most sides of a tensor that readers take.
pub(super) const MAX_SIDES: usize = 4;

/// A value of a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// 32-bit unsigned.
    U32(u32),
    /// 32-bit float.
    F32(f32),
    /// Truth value.
    Bool(bool),
    /// UTF-8 text.
    Text(String),
    /// List of 32-bit signed integers.
    I32s(Vec<i32>),
    /// List of 32-bit floats.
    F32s(Vec<f32>),
    /// List of truth values.
    Bools(Vec<bool>),
    /// List of texts.
    Texts(Vec<String>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl Value {
    /// Number of the type in the file: of the value itself, or of a list's elements.
    fn type_id(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::I32s(_) => 5,
            Self::F32(_) | Self::F32s(_) => 6,
            Self::Bool(_) | Self::Bools(_) => 7,
            Self::Text(_) | Self::Texts(_) => 8,
        }
    }

    /// Elements of a list.
    fn n_elements(&self) -> Option<usize> {
        match self {
            Self::I32s(list) => Some(list.len()),
            Self::F32s(list) => Some(list.len()),
            Self::Bools(list) => Some(list.len()),
            Self::Texts(list) => Some(list.len()),
            _ => None,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        if let Some(n) = self.n_elements() {
            out.extend(LIST_TYPE.to_le_bytes());
            out.extend(self.type_id().to_le_bytes());
            out.extend((n as u64).to_le_bytes());
        } else {
            out.extend(self.type_id().to_le_bytes());
        }
        match self {
            Self::U32(value) => out.extend(value.to_le_bytes()),
            Self::F32(value) => out.extend(value.to_le_bytes()),
            Self::Bool(value) => out.push(u8::from(*value)),
            Self::Text(text) => put_text(out, text),
            Self::I32s(list) => out.extend(list.iter().flat_map(|v| v.to_le_bytes())),
            Self::F32s(list) => out.extend(list.iter().flat_map(|v| v.to_le_bytes())),
            Self::Bools(list) => out.extend(list.iter().map(|v| u8::from(*v))),
            Self::Texts(list) => list.iter().for_each(|text| put_text(out, text)),
        }
    }
}

/// Number of the list type; its elements' type and count follow.
pub(super) const LIST_TYPE: u32 = 9;

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32: f16 scale, 4-bit codes less 8.
    Q4_0,
    /// Blocks of 32: f16 scale and offset, 4-bit codes.
    Q4_1,
    /// Blocks of 32: f16 scale, 8-bit codes.
    Q8_0,
    /// Blocks of 256: 16 scales and offsets of 4 bits, f16 factors of both, 2-bit codes.
    Q2K,
    /// Blocks of 256: 16 scales of 6 bits, their f16 factor, 3-bit codes less 4.
    Q3K,
}

/// (type, name, number in the file, weights of a block, bytes of a block).
const TYPES: [(TensorType, &str, u32, usize, usize); 8] = [
    (TensorType::F32, "F32", 0, 1, 4),
    (TensorType::F16, "F16", 1, 1, 2),
    (TensorType::Bf16, "BF16", 30, 1, 2),
    (TensorType::Q4_0, "Q4_0", 2, 32, 18),
    (TensorType::Q4_1, "Q4_1", 3, 32, 20),
    (TensorType::Q8_0, "Q8_0", 8, 32, 34),
    (TensorType::Q2K, "Q2_K", 10, 256, 84),
    (TensorType::Q3K, "Q3_K", 11, 256, 110),
];

impl TensorType {
    fn entry(self) -> &'static (TensorType, &'static str, u32, usize, usize) {
        // The table is in order of the enum, as a test holds it.
        &TYPES[self as usize]
    }

    /// Its name in llama.cpp.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    pub(super) fn id(self) -> u32 {
        self.entry().2
    }

    pub(super) fn from_id(id: u32) -> Option<Self> {
        TYPES
            .iter()
            .find(|entry| entry.2 == id)
            .map(|entry| entry.0)
    }

    /// Weights that are stored together.
    pub fn block_len(self) -> usize {
        self.entry().3
    }

    /// Bytes of that.
    pub fn block_bytes(self) -> usize {
        self.entry().4
    }

    /// Whether weights are stored as codes.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

/// A tensor that will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// How it is stored.
    pub kind: TensorType,
    /// Sides, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Size of its data.
    ///
    /// # Errors
    /// [`Error::Invalid`] if rows are no whole blocks, there are no or too many sides, or the size
    /// overflows.
    pub fn n_bytes(&self) -> Result<u64> {
        let fail = |why: String| Error::Invalid {
            what: format!("tensor {}", self.name),
            why,
        };
        let (len, kind) = (self.kind.block_len(), self.kind.name());
        match self.shape.last() {
            Some(cols) if self.shape.len() <= MAX_SIDES && cols % len == 0 => {}
            _ => {
                let found = &self.shape;
                let why = format!(
                    "has shape {found:?}; {kind} expects 1 to {MAX_SIDES} sides, the last a \
                     multiple of {len}"
                );
                return Err(fail(why));
            }
        }
        let mut sides = self.shape.iter();
        let n = sides.try_fold(1u64, |n, side| n.checked_mul(*side as u64));
        let n_bytes = n.and_then(|n| (n / len as u64).checked_mul(self.kind.block_bytes() as u64));
        let bounded = n_bytes.filter(|n| *n < i64::MAX as u64 / 2);
        bounded.ok_or_else(|| fail(format!("its shape {:?} overflows", self.shape)))
    }
}

/// A file under construction.
pub struct Writer {
    path: PathBuf,
    out: BufWriter<File>,
    specs: Vec<TensorSpec>,
    n_written: usize,
    data_bytes: u64,
}

impl Writer {
    /// Creates the file with its header and table; the data of `tensors` follows in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a key or name that comes twice and as [`TensorSpec::n_bytes`];
    /// [`Error::Io`] if the file exists or cannot be written.
    pub fn create(path: &Path, keys: &[(String, Value)], tensors: Vec<TensorSpec>) -> Result<Self> {
        check_names(path, keys, &tensors)?;
        let header = header_of(keys, &tensors)?;
        let file = File::create_new(path).map_err(|e| Error::io(path, "create", e))?;
        let mut writer = Self {
            path: path.to_path_buf(),
            out: BufWriter::with_capacity(1 << 20, file),
            specs: tensors,
            n_written: 0,
            data_bytes: 0,
        };
        writer.put(&header)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let put = self.out.write_all(bytes);
        put.map_err(|e| Error::io(&self.path, "write", e))
    }

    /// Writes the next tensor's data from pieces in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is another's turn or its data has another length; [`Error::Io`];
    /// the first piece's that has one.
    pub fn write<B: AsRef<[u8]>>(
        &mut self,
        name: &str,
        pieces: impl IntoIterator<Item = Result<B>>,
    ) -> Result<()> {
        let next = self.specs.get(self.n_written);
        let n_expected = match next {
            Some(spec) if spec.name == name => spec.n_bytes()?,
            _ => {
                let next = next.map_or("none", |spec| spec.name.as_str());
                return Err(Error::Invalid {
                    what: format!("tensor {name} of {}", self.path.display()),
                    why: format!("given where {next} was expected"),
                });
            }
        };
        let mut n_bytes = 0;
        for piece in pieces {
            let piece = piece?;
            n_bytes += piece.as_ref().len() as u64;
            self.put(piece.as_ref())?;
        }
        if n_bytes != n_expected {
            return Err(Error::Invalid {
                what: format!("tensor {name} of {}", self.path.display()),
                why: format!("{n_bytes} bytes given, {n_expected} expected"),
            });
        }
        let padding = n_bytes.next_multiple_of(ALIGNMENT) - n_bytes;
        self.put(&[0; ALIGNMENT as usize][..padding as usize])?;
        self.n_written += 1;
        self.data_bytes += n_bytes;
        Ok(())
    }

    /// Puts everything on disk; returns the tensors' size in bytes.
    ///
    /// # Errors
    /// [`Error::Missing`] naming a tensor that was not written; [`Error::Io`].
    pub fn finish(mut self) -> Result<u64> {
        if let Some(spec) = self.specs.get(self.n_written) {
            return Err(Error::Missing {
                what: format!("data of tensor {}", spec.name),
                place: self.path.display().to_string(),
            });
        }
        let flush = self.out.flush();
        flush.map_err(|e| Error::io(&self.path, "write", e))?;
        Ok(self.data_bytes)
    }
}

/// A small file as a whole, from keys and tensors of F32 with their values.
///
/// # Errors
/// As [`Writer::create`].
pub(crate) fn in_memory(
    keys: &[(String, Value)],
    tensors: &[(TensorSpec, Vec<f32>)],
) -> Result<Vec<u8>> {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    check_names(Path::new("the file"), keys, &specs)?;
    let mut out = header_of(keys, &specs)?;
    for (_, values) in tensors {
        out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    }
    Ok(out)
}

fn check_names(path: &Path, keys: &[(String, Value)], tensors: &[TensorSpec]) -> Result<()> {
    let mut names: BTreeSet<&str> = BTreeSet::new();
    let keys = keys.iter().map(|(key, _)| key.as_str());
    let mut all = keys.chain(tensors.iter().map(|spec| spec.name.as_str()));
    match all.find(|name| !names.insert(name)) {
        Some(name) => Err(Error::Invalid {
            what: format!("{name} in {}", path.display()),
            why: "comes twice".into(),
        }),
        None => Ok(()),
    }
}

/// Everything before the data, padded.
fn header_of(keys: &[(String, Value)], tensors: &[TensorSpec]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        put_text(&mut out, key);
        value.put(&mut out);
    }
    let mut offset = 0u64;
    for spec in tensors {
        let n_bytes = spec.n_bytes()?;
        put_text(&mut out, &spec.name);
        out.extend((spec.shape.len() as u32).to_le_bytes());
        let sides = spec.shape.iter().rev();
        out.extend(sides.flat_map(|side| (*side as u64).to_le_bytes()));
        out.extend(spec.kind.id().to_le_bytes());
        out.extend(offset.to_le_bytes());
        let end = offset.checked_add(n_bytes.next_multiple_of(ALIGNMENT));
        offset = end
            .filter(|n| *n < i64::MAX as u64)
            .ok_or_else(|| Error::Invalid {
                what: format!("tensor {}", spec.name),
                why: "the size of all tensors up to it overflows".into(),
            })?;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFile;
    use proptest::prelude::*;

    #[test]
    fn the_table_of_types_is_in_order() {
        for (index, (kind, name, id, ..)) in TYPES.iter().enumerate() {
            assert_eq!(*kind as usize, index);
            assert_eq!(
                (kind.name(), TensorType::from_id(*id)),
                (*name, Some(*kind))
            );
        }
    }

    fn spec(name: &str, kind: TensorType, shape: &[usize]) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            kind,
            shape: shape.to_vec(),
        }
    }

    fn keys() -> Vec<(String, Value)> {
        let values = [
            Value::U32(7),
            Value::F32(-0.5),
            Value::Bool(true),
            Value::from("täxt"),
            Value::I32s(vec![-1, 2]),
            Value::F32s(vec![0.25]),
            Value::Bools(vec![true, false]),
            Value::Texts(vec!["a".into(), String::new()]),
        ];
        let named = values.into_iter().enumerate();
        named
            .map(|(i, value)| (format!("key.{i}"), value))
            .collect()
    }

    fn sample() -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let specs = vec![
            spec("b", TensorType::F32, &[3]),
            spec("a", TensorType::Q4_0, &[2, 64]),
        ];
        let mut writer = Writer::create(&path, &keys(), specs).unwrap();
        writer.write("b", [Ok(vec![1; 5]), Ok(vec![2; 7])]).unwrap();
        writer.write("a", [Ok(vec![3; 72])]).unwrap();
        assert_eq!(writer.finish().unwrap(), 84);
        std::fs::read(path).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<GgufFile> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        GgufFile::open(file.path())
    }

    #[test]
    fn what_was_written_is_read() {
        let file = read(&sample()).unwrap();
        assert_eq!(file.keys(), keys());
        let found = file.tensor("a").unwrap();
        assert_eq!(
            (found.kind, &found.shape[..]),
            (TensorType::Q4_0, &[2, 64][..])
        );
        assert!(file.tensor("c").is_none());
    }

    #[test]
    fn misuse_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let two = || {
            vec![
                spec("a", TensorType::F32, &[2]),
                spec("b", TensorType::F16, &[1]),
            ]
        };
        let mut writer = Writer::create(&path, &[], two()).unwrap();
        assert!(writer.write("b", [Ok([0; 2])]).is_err());
        assert!(writer.write("a", [Ok([0; 7])]).is_err());
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("data of tensor a"), "{error}");
        assert!(matches!(
            Writer::create(&path, &[], two()),
            Err(Error::Io { .. })
        ));
        let other = dir.path().join("b.gguf");
        for bad in [
            vec![spec("a", TensorType::Q4_0, &[2, 33])],
            vec![spec("a", TensorType::F32, &[])],
            vec![spec("a", TensorType::F32, &[1; 5])],
            vec![spec("a", TensorType::F32, &[usize::MAX, 2])],
            vec![
                spec("a", TensorType::F32, &[1]),
                spec("a", TensorType::F32, &[1]),
            ],
        ] {
            let result = Writer::create(&other, &[], bad);
            assert!(matches!(result, Err(Error::Invalid { .. })));
        }
        assert!(!other.exists());
    }

    proptest! {
        #[test]
        fn a_file_that_was_cut_or_changed_never_panics(at in 0usize..1000, bit in 0u8..8) {
            let mut bytes = sample();
            let at = at % bytes.len();
            prop_assert!(read(&bytes[..at]).is_err());
            bytes[at] ^= 1 << bit;
            let _ = read(&bytes);
        }
    }
}
