//! One safetensors file: its header checked completely before anything else is believed, its
//! data read piece by piece from where it lies.
//!
//! The layout is 8 bytes of little-endian header length, a JSON header naming each tensor's type,
//! shape and byte range, then the data. The ranges must tile the data: no hole, no overlap. The
//! rules follow huggingface/safetensors@24b0b28 `tensor.rs`; the parser is our own because the
//! user has to be told which tensor of which file is wrong, and what was expected.

use super::DType;
use crate::{Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// Largest header that is read, in bytes; the same bound as the reference implementation's.
pub(super) const MAX_HEADER_BYTES: usize = 100_000_000;

/// Bytes of the length field before the header.
pub(super) const LENGTH_BYTES: usize = 8;

/// An open file whose header was found to be consistent with its size.
///
/// Data is read, not mapped: a disk that fails or a file that another program cuts short is then
/// an error to report and not the end of the process, and what is read is counted as memory only
/// where it is kept.
pub(crate) struct Shard {
    path: PathBuf,
    file: Mutex<File>,
    state: FileState,
    pub(crate) tensors: BTreeMap<String, Entry>,
}

/// What tells that a file was written to.
#[derive(Debug, PartialEq, Eq)]
struct FileState {
    n_bytes: u64,
    modified: Option<SystemTime>,
}

impl FileState {
    fn of(metadata: &Metadata) -> Self {
        Self {
            n_bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

/// One tensor of a shard.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// Position in the file.
    pub(crate) range: Range<usize>,
}

impl Shard {
    /// Opens `path` and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Format`] if it is no sound safetensors file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let (mut file, state) = open_file(path)?;
        let start = read_header(path, &mut file)?;
        let tensors = parse_header(path, &start, state.n_bytes)?;
        Ok(Self {
            path: path.to_path_buf(),
            file: Mutex::new(file),
            state,
            tensors,
        })
    }

    /// Opens a file of another kind, whose header the caller reads from the second value.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Format`] if it is no regular file.
    pub(super) fn open_foreign(path: &Path) -> Result<(Self, File)> {
        let (file, state) = open_file(path)?;
        let header = file.try_clone();
        let header = header.map_err(|e| Error::io(path, "open", e))?;
        let shard = Self {
            path: path.to_path_buf(),
            file: Mutex::new(file),
            state,
            tensors: BTreeMap::new(),
        };
        Ok((shard, header))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of a range inside one that [`Shard::open`] checked.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk fails, [`Error::Format`] if the file was changed since.
    pub(crate) fn read(&self, range: Range<usize>) -> Result<Vec<u8>> {
        // No panic leaves a file in a state that matters here: every read seeks first.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let fail = |e| Error::io(&self.path, "read", e);
        let mut bytes = vec![0; range.len()];
        let start = SeekFrom::Start(range.start as u64);
        let read = file
            .seek(start)
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(fail);
        // A file cut short ends early; that it was changed is the better explanation.
        if FileState::of(&file.metadata().map_err(fail)?) != self.state {
            let why = "it was written to after this run had opened it";
            return Err(Error::format(&self.path, "data", why));
        }
        read.map(|()| bytes)
    }
}

fn open_file(path: &Path) -> Result<(File, FileState)> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let metadata = file.metadata().map_err(|e| Error::io(path, "inspect", e))?;
    if !metadata.is_file() {
        return Err(Error::format(path, "file type", "expected a regular file"));
    }
    Ok((file, FileState::of(&metadata)))
}

/// The length field and, if it is believable, the header.
fn read_header(path: &Path, file: &mut File) -> Result<Vec<u8>> {
    let fail = |e| Error::io(path, "read", e);
    let mut start = Vec::new();
    let take = |file: &mut File, n: u64, start: &mut Vec<u8>| {
        file.take(n).read_to_end(start).map_err(fail)
    };
    take(file, LENGTH_BYTES as u64, &mut start)?;
    if let Some(length) = start.first_chunk().map(|b| u64::from_le_bytes(*b)) {
        take(file, length.min(MAX_HEADER_BYTES as u64), &mut start)?;
    }
    Ok(start)
}

/// Checks the header at the `start` of a file of `n_bytes`; `path` is for messages only.
fn parse_header(path: &Path, start: &[u8], n_bytes: u64) -> Result<BTreeMap<String, Entry>> {
    let fail = |why: String| Error::format(path, "header", why);
    let (length, rest) = start
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| fail(format!("expected at least 8 bytes, found {}", start.len())))?;
    let declared = u64::from_le_bytes(*length);
    if declared < 2 || declared > MAX_HEADER_BYTES as u64 {
        let why = format!("declares {declared} bytes, 2 to {MAX_HEADER_BYTES} expected");
        return Err(fail(why));
    }
    let header = rest.get(..declared as usize).ok_or_else(|| {
        let found = rest.len();
        fail(format!(
            "declares {declared} bytes, the file has only {found} after the length"
        ))
    })?;
    let header = std::str::from_utf8(header).map_err(|e| fail(format!("not UTF-8: {e}")))?;
    if !header.starts_with('{') {
        return Err(fail("expected a JSON object beginning with '{'".into()));
    }
    let raw: RawHeader = serde_json::from_str(header).map_err(|e| fail(e.to_string()))?;
    let data_start = LENGTH_BYTES + header.len();
    let n_data = n_bytes.saturating_sub(data_start as u64);
    check_tiling(path, &raw.tensors, n_data)?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in raw.tensors {
        let entry = check_entry(path, &name, entry, data_start)?;
        tensors.insert(name, entry);
    }
    Ok(tensors)
}

/// The byte ranges, in order, must begin where the one before ended and end with the data.
fn check_tiling(path: &Path, tensors: &[(String, RawEntry)], n_data: u64) -> Result<()> {
    let mut order: Vec<_> = tensors
        .iter()
        .map(|(name, entry)| (entry.data_offsets, name))
        .collect();
    order.sort();
    let mut expected = 0;
    for ([start, end], name) in order {
        if start != expected || end < start || end > n_data {
            let why = format!(
                "data_offsets are [{start}, {end}]; expected a start at {expected} and an end \
                 within the {n_data} bytes of data (no hole, no overlap)"
            );
            return Err(Error::format(path, format!("tensor {name}"), why));
        }
        expected = end;
    }
    if expected != n_data {
        let why = format!("the tensors take {expected} bytes, the file holds {n_data}");
        return Err(Error::format(path, "data", why));
    }
    Ok(())
}

/// Checks type and shape against a byte range that [`check_tiling`] found inside the file.
fn check_entry(path: &Path, name: &str, raw: RawEntry, data_start: usize) -> Result<Entry> {
    let fail = |why: String| Error::format(path, format!("tensor {name}"), why);
    let dtype = DType::from_name(&raw.dtype)
        .ok_or_else(|| fail(format!("dtype {:?} is not one that is handled", raw.dtype)))?;
    let [start, end] = raw.data_offsets;
    let found = end - start;
    let expected = raw
        .shape
        .iter()
        .try_fold(dtype.n_bytes() as u64, |n, side| n.checked_mul(*side));
    if expected != Some(found) {
        let needs = expected.map_or("more than 2^64".to_owned(), |n| n.to_string());
        let why = format!(
            "{} {:?} needs {needs} bytes, data_offsets [{start}, {end}] hold {found}",
            dtype.name(),
            raw.shape
        );
        return Err(fail(why));
    }
    let shape: Option<Vec<usize>> = raw.shape.iter().map(|s| usize::try_from(*s).ok()).collect();
    Ok(Entry {
        dtype,
        shape: shape.ok_or_else(|| fail("a side of the shape does not fit this machine".into()))?,
        range: data_start + start as usize..data_start + end as usize,
    })
}

/// A header as JSON has it, in file order.
#[derive(Debug)]
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
}

#[derive(Debug, Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the header's keys one by one, because a map type would hide that a key came twice.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut seen = BTreeSet::new();
        let mut tensors = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let at = |e: A::Error| A::Error::custom(format!("{key:?}: {e}"));
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("{key:?} comes twice")));
            }
            if key == "__metadata__" {
                map.next_value::<BTreeMap<String, String>>().map_err(at)?;
            } else {
                let entry = map.next_value().map_err(at)?;
                tensors.push((key, entry));
            }
        }
        Ok(RawHeader { tensors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn message(bytes: &[u8]) -> String {
        parse_header(Path::new("m.safetensors"), bytes, bytes.len() as u64)
            .unwrap_err()
            .to_string()
    }

    fn message_of(header: &str, n_data: usize) -> String {
        message(&file(header, &vec![0; n_data]))
    }

    #[test]
    fn lying_lengths_are_named() {
        assert!(message(&[]).contains("at least 8 bytes, found 0"));
        assert!(message(&[0; 8]).contains("declares 0 bytes"));
        assert!(message(&1000u64.to_le_bytes()).contains("has only 0 after"));
        assert!(message(&u64::MAX.to_le_bytes()).contains("2 to 100000000 expected"));
        assert!(message(&100_000_001u64.to_le_bytes()).contains("declares 100000001"));
    }

    #[test]
    fn headers_that_are_not_json_objects_are_named() {
        let mut bytes = 4u64.to_le_bytes().to_vec();
        bytes.extend([0x7b, 0xff, 0xfe, 0x7d]);
        assert!(message(&bytes).contains("not UTF-8"));
        assert!(message_of("[1]", 0).contains("expected a JSON object"));
        assert!(message_of("{\"a\":}", 0).contains("header"));
        assert!(message_of("{} x", 0).contains("trailing"));
        assert!(message_of(r#"{"__metadata__":{"a":1}}"#, 0).contains("__metadata__"));
        assert!(message_of(r#"{"a":{"dtype":"F32","shape":[]}}"#, 0).contains("data_offsets"));
    }

    #[test]
    fn bad_entries_are_named_with_expected_and_found() {
        let one = |dtype: &str, shape: &str, offsets: &str, n: usize| {
            let header = format!(
                r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
            );
            message_of(&header, n)
        };
        assert!(one("Q7", "[1]", "[0,4]", 4).contains("tensor w: dtype \"Q7\""));
        assert!(one("F32", "[2]", "[0,4]", 4).contains("needs 8 bytes"));
        assert!(one("F32", "[4294967296,4294967296]", "[0,4]", 4).contains("more than 2^64"));
        assert!(one("F32", "[1]", "[0,8]", 4).contains("within the 4 bytes"));
        assert!(one("F32", "[1]", "[4,0]", 4).contains("[4, 0]"));
        assert!(one("F32", "[1]", "[0,18446744073709551615]", 4).contains("within"));
        assert!(one("F32", "[1]", "[4,8]", 8).contains("expected a start at 0"));
        assert!(one("F32", "[1]", "[0,4]", 8).contains("the file holds 8"));
        assert!(one("F32", "[-1]", "[0,4]", 4).contains("\"w\""));
        assert!(one("F32", "[1]", "[0,4,8]", 4).contains("\"w\""));
    }

    #[test]
    fn overlaps_and_duplicates_are_named() {
        let overlap = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
            "b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(message_of(overlap, 6).contains("tensor b"));
        let twice = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
            "a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert!(message_of(twice, 2).contains("\"a\" comes twice"));
        let inner = r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#;
        assert!(message_of(inner, 1).contains("duplicate field"));
    }

    #[test]
    fn empty_tensors_and_scalars_are_sound() {
        let header = r#"{"z":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},
            "s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
        let bytes = file(header, &[0; 4]);
        let parsed = parse_header(Path::new("m"), &bytes, bytes.len() as u64).unwrap();
        assert_eq!(parsed["z"].shape, [0, 7]);
        assert_eq!(parsed["s"].range.len(), 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let parse = |bytes: &[u8]| parse_header(Path::new("m"), bytes, bytes.len() as u64);
            let _ = parse(&bytes);
            let wrapped = file(&String::from_utf8_lossy(&bytes), &[]);
            prop_assert!(parse(&wrapped).is_err());
        }
    }
}
