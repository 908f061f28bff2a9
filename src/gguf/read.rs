//! Reading of a GGUF file's header, as far as is needed to check what was written: the kinds of
//! values and tensors that [`super::container`] writes.

use super::container::{ALIGNMENT, LIST_TYPE, MAGIC, TensorSpec, TensorType, VERSION, Value};
use super::origin::{ORIGINS, Origin};
use crate::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Longest text that is read, in bytes.
const MAX_TEXT_BYTES: u64 = 1 << 24;
/// Most elements of a list, keys or tensors that are read.
const MAX_COUNT: u64 = 1 << 26;

/// An open file.
pub struct GgufFile {
    path: PathBuf,
    keys: Vec<(String, Value)>,
    tensors: Vec<(TensorSpec, u64)>,
    data_start: u64,
}

impl GgufFile {
    /// Reads keys and table, and holds the table against the file's size.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a damaged file or one with kinds of values that
    /// [`Value`] does not have.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        Self::of(path, file)
    }

    /// As [`GgufFile::open`], of an open file at its beginning.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub(crate) fn of(path: &Path, file: File) -> Result<Self> {
        let metadata = file.metadata().map_err(|e| Error::io(path, "inspect", e))?;
        let mut cursor = Cursor {
            path,
            input: BufReader::new(file),
            at: 0,
        };
        if cursor.array::<4>("magic")? != MAGIC || cursor.u32("version")? != VERSION {
            return Err(cursor.wrong("header", "expected GGUF of version 3"));
        }
        let n_tensors = cursor.count("number of tensors")?;
        let n_keys = cursor.count("number of keys")?;
        let mut keys = Vec::new();
        for _ in 0..n_keys {
            let key = cursor.text("key")?;
            let value = cursor.value(&key)?;
            keys.push((key, value));
        }
        let mut tensors = Vec::new();
        let mut end = 0;
        for _ in 0..n_tensors {
            let (spec, offset) = cursor.tensor()?;
            if offset != end {
                let why = format!("expected offset {end}, found {offset}");
                return Err(cursor.wrong(&format!("tensor {}", spec.name), why));
            }
            let n_bytes = spec.n_bytes()?.next_multiple_of(ALIGNMENT);
            let sum = offset
                .checked_add(n_bytes)
                .filter(|end| *end < i64::MAX as u64);
            end = sum.ok_or_else(|| cursor.wrong("tensors", "their sizes overflow"))?;
            tensors.push((spec, offset));
        }
        let data_start = cursor.at.next_multiple_of(ALIGNMENT);
        if data_start + end != metadata.len() {
            let why = format!(
                "expected {} bytes, found {}",
                data_start + end,
                metadata.len()
            );
            return Err(cursor.wrong("size", why));
        }
        Ok(Self {
            path: path.to_path_buf(),
            keys,
            tensors,
            data_start,
        })
    }

    /// All keys, in file order.
    pub fn keys(&self) -> &[(String, Value)] {
        &self.keys
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.iter().map(|(spec, _)| spec)
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<&TensorSpec> {
        self.tensors().find(|spec| spec.name == name)
    }

    /// The value of a key.
    pub fn key(&self, name: &str) -> Option<&Value> {
        let found = self.keys.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value)
    }

    /// What a tensor is made of, if the file is one of ours and says so.
    pub(crate) fn origin(&self, tensor: &str) -> Option<Origin> {
        let Value::Texts(texts) = self.key(ORIGINS)? else {
            return None;
        };
        let index = self.tensors().position(|spec| spec.name == tensor)?;
        Origin::from_text(texts.get(index)?)
    }

    /// All tensors, in file order, with where in the file their bytes are.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one does not fit into this machine's memory.
    pub(crate) fn places(&self) -> Result<Vec<(&TensorSpec, Range<usize>)>> {
        let mut places = Vec::with_capacity(self.tensors.len());
        for (spec, offset) in &self.tensors {
            let start = self.data_start + offset;
            let bounds = [start, start + spec.n_bytes()?].map(usize::try_from);
            let [Ok(start), Ok(end)] = bounds else {
                return Err(Error::Invalid {
                    what: format!("tensor {} of {}", spec.name, self.path.display()),
                    why: "does not fit this machine".into(),
                });
            };
            places.push((spec, start..end));
        }
        Ok(places)
    }

    /// The stored bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such tensor, [`Error::Io`].
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let found = self.tensors.iter().find(|(spec, _)| spec.name == name);
        let (spec, offset) = found.ok_or_else(|| Error::Missing {
            what: format!("tensor {name}"),
            place: self.path.display().to_string(),
        })?;
        let fail = |e| Error::io(&self.path, "read", e);
        let mut file = File::open(&self.path).map_err(fail)?;
        file.seek(SeekFrom::Start(self.data_start + offset))
            .map_err(fail)?;
        let mut bytes = vec![0; spec.n_bytes()? as usize];
        file.read_exact(&mut bytes).map_err(fail)?;
        Ok(bytes)
    }
}

/// Where reading stands.
struct Cursor<'a> {
    path: &'a Path,
    input: BufReader<File>,
    at: u64,
}

impl Cursor<'_> {
    fn wrong(&self, at: &str, why: impl Into<String>) -> Error {
        Error::format(self.path, at, why)
    }

    fn bytes(&mut self, n: u64, what: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(n).read_to_end(&mut bytes);
        read.map_err(|e| Error::io(self.path, "read", e))?;
        self.at += n;
        match bytes.len() as u64 == n {
            true => Ok(bytes),
            false => Err(self.wrong(what, "the file ends inside it")),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.bytes(N as u64, what)?;
        let mut array = [0; N];
        array.copy_from_slice(&bytes);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn count(&mut self, what: &str) -> Result<u64> {
        match self.u64(what)? {
            n if n <= MAX_COUNT => Ok(n),
            n => Err(self.wrong(what, format!("expected at most {MAX_COUNT}, found {n}"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let n = self.u64(what)?;
        if n > MAX_TEXT_BYTES {
            let why = format!("expected at most {MAX_TEXT_BYTES} bytes, found {n}");
            return Err(self.wrong(what, why));
        }
        let bytes = self.bytes(n, what)?;
        String::from_utf8(bytes).map_err(|_| self.wrong(what, "not UTF-8"))
    }

    fn flag(&mut self, what: &str) -> Result<bool> {
        Ok(self.array::<1>(what)? != [0])
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        match self.u32(key)? {
            4 => Ok(Value::U32(self.u32(key)?)),
            6 => Ok(Value::F32(f32::from_le_bytes(self.array(key)?))),
            7 => Ok(Value::Bool(self.flag(key)?)),
            8 => Ok(Value::Text(self.text(key)?)),
            LIST_TYPE => self.list(key),
            other => Err(self.wrong(key, format!("type {other} of a value is not known here"))),
        }
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        let n = self.count(key)?;
        let i32 = |cursor: &mut Self| Ok(i32::from_le_bytes(cursor.array(key)?));
        let f32 = |cursor: &mut Self| Ok(f32::from_le_bytes(cursor.array(key)?));
        Ok(match kind {
            5 => Value::I32s(self.each(n, i32)?),
            6 => Value::F32s(self.each(n, f32)?),
            7 => Value::Bools(self.each(n, |cursor| cursor.flag(key))?),
            8 => Value::Texts(self.each(n, |cursor| cursor.text(key))?),
            other => {
                let why = format!("type {other} of a list's elements is not known here");
                return Err(self.wrong(key, why));
            }
        })
    }

    /// Elements as long as the file has them: a count alone reserves nothing.
    fn each<T>(&mut self, n: u64, read: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        (0..n).map(|_| read(self)).collect::<Result<_>>()
    }

    fn tensor(&mut self) -> Result<(TensorSpec, u64)> {
        let name = self.text("name of a tensor")?;
        let what = format!("tensor {name}");
        let n_sides = self.u32(&what)?;
        if n_sides > super::container::MAX_SIDES as u32 {
            return Err(self.wrong(&what, format!("{n_sides} sides found")));
        }
        let mut shape = Vec::new();
        for _ in 0..n_sides {
            shape.push(self.u64(&what)? as usize);
        }
        shape.reverse();
        let id = self.u32(&what)?;
        let kind = TensorType::from_id(id);
        let kind = kind.ok_or_else(|| self.wrong(&what, format!("type {id} is not known here")))?;
        let offset = self.u64(&what)?;
        let spec = TensorSpec { name, kind, shape };
        Ok((spec, offset))
    }
}
