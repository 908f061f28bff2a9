//! One finished layer in one file.
//!
//! ```text
//! "vlmqlayr", version        8 + 4 bytes
//! of each module in turn:    codes as one bitstream of 32-bit words, zero points, scales in f32
//! of each changed tensor:    its values in f32
//! footer, its length         JSON, 8 bytes
//! BLAKE3 of all before       32 bytes
//! ```
//! Numbers are little-endian. The footer comes last because modules are written as they are
//! solved; the digest makes a file whole or worthless.

use crate::pack::{pack, unpack, words_for};
use crate::plan::Scheme;
use crate::{Error, Matrix, QuantizedWeight, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"vlmqlayr";
const VERSION: u32 = 2;
const START: usize = MAGIC.len() + 4;
const DIGEST: usize = blake3::OUT_LEN;

/// Name of a finished layer's file.
pub(super) fn name(layer_idx: usize) -> String {
    format!("layer-{layer_idx:05}.vlmq")
}

/// Whether a file of this name is a finished layer.
pub(super) fn is_finished(name: &str) -> bool {
    name.starts_with("layer-") && name.ends_with(".vlmq")
}

#[derive(Serialize, Deserialize)]
struct Footer<R> {
    layer_idx: usize,
    /// Digest of the layer's weights in the source.
    source: String,
    modules: Vec<Entry>,
    tensors: Vec<Plain>,
    record: R,
}

/// A plain tensor that is not the source's.
#[derive(Serialize, Deserialize)]
struct Plain {
    name: String,
    len: usize,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    scheme: Scheme,
    shape: [usize; 2],
}

/// A layer's file in the making, under another name.
pub struct LayerWriter {
    path: PathBuf,
    unfinished: PathBuf,
    file: BufWriter<File>,
    digest: blake3::Hasher,
    modules: Vec<Entry>,
    /// Changed tensors, which come after all modules.
    tensors: Vec<(String, Vec<f32>)>,
}

impl LayerWriter {
    /// Begins the file that will be `path`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: PathBuf) -> Result<Self> {
        let unfinished = path.with_extension("unfinished");
        let file = File::create(&unfinished).map_err(|e| Error::io(&unfinished, "create", e))?;
        let mut writer = Self {
            path,
            unfinished,
            file: BufWriter::new(file),
            digest: blake3::Hasher::new(),
            modules: Vec::new(),
            tensors: Vec::new(),
        };
        writer.put(MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        Ok(writer)
    }

    /// Adds a module.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn module(&mut self, name: &str, weight: &QuantizedWeight) -> Result<()> {
        let words = pack(weight.codes(), weight.scheme().bits());
        let words: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let scales = weight.scales().data().iter();
        let scales: Vec<u8> = scales.flat_map(|s| s.to_le_bytes()).collect();
        self.put(&words)?;
        self.put(weight.zero_points())?;
        self.put(&scales)?;
        self.modules.push(Entry {
            name: name.to_owned(),
            scheme: weight.scheme(),
            shape: [weight.rows(), weight.cols()],
        });
        Ok(())
    }

    /// Adds a plain tensor that is not the source's; it stays in memory until the file ends.
    pub fn tensor(&mut self, name: &str, values: &[f32]) {
        self.tensors.push((name.to_owned(), values.to_vec()));
    }

    /// Ends the file, puts it on disk and gives it its name: from here on the layer is safe.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self, layer_idx: usize, source: &str, record: &impl Serialize) -> Result<()> {
        let mut tensors = Vec::new();
        for (name, values) in std::mem::take(&mut self.tensors) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.put(&bytes)?;
            let len = values.len();
            tensors.push(Plain { name, len });
        }
        let footer = serde_json::to_vec(&Footer {
            layer_idx,
            source: source.to_owned(),
            modules: std::mem::take(&mut self.modules),
            tensors,
            record,
        });
        let footer = footer.expect("a record has only text keys");
        self.put(&footer)?;
        self.put(&(footer.len() as u64).to_le_bytes())?;
        let digest = self.digest.finalize();
        let fail = |e| Error::io(&self.unfinished, "write", e);
        self.file.write_all(digest.as_bytes()).map_err(fail)?;
        self.file.flush().map_err(fail)?;
        put_in_place(&self.unfinished, &self.path)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.digest.update(bytes);
        let written = self.file.write_all(bytes);
        written.map_err(|e| Error::io(&self.unfinished, "write", e))
    }
}

/// A finished layer.
#[derive(Debug)]
pub(super) struct LayerFile<R> {
    /// Digest of the weights that it was made from.
    pub(super) source: String,
    /// Modules by name, in solving order.
    pub(super) weights: Vec<(String, QuantizedWeight)>,
    /// Plain tensors that are not the source's, by name.
    pub(super) tensors: Vec<(String, Vec<f32>)>,
    /// What else is known of it.
    pub(super) record: R,
}

/// Reads a layer back; `None` if it is not finished.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] if the file is damaged or another layer's.
pub(super) fn read<R: DeserializeOwned>(
    path: &Path,
    layer_idx: usize,
) -> Result<Option<LayerFile<R>>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, "read", e)),
    };
    let layer = parse(&bytes, layer_idx).map_err(|why| {
        let why = format!(
            "{why}; without this file its layer is solved again, and no other layer is lost"
        );
        Error::format(path, "finished layer", why)
    })?;
    Ok(Some(layer))
}

fn parse<R: DeserializeOwned>(
    bytes: &[u8],
    layer_idx: usize,
) -> std::result::Result<LayerFile<R>, String> {
    let n_least = START + 8 + DIGEST;
    if bytes.len() < n_least {
        return Err(format!(
            "{} bytes found, at least {n_least} expected",
            bytes.len()
        ));
    }
    let (bytes, digest) = bytes.split_at(bytes.len() - DIGEST);
    if blake3::hash(bytes).as_bytes()[..] != *digest {
        return Err("its checksum does not match".into());
    }
    if bytes[..MAGIC.len()] != *MAGIC || bytes[MAGIC.len()..START] != VERSION.to_le_bytes() {
        return Err("it has another form or another version".into());
    }
    let (bytes, n_footer) = bytes[START..]
        .split_last_chunk::<8>()
        .ok_or("it is too short")?;
    let at = usize::try_from(u64::from_le_bytes(*n_footer))
        .ok()
        .and_then(|n| bytes.len().checked_sub(n))
        .ok_or("its footer is longer than the file")?;
    let (mut data, footer) = bytes.split_at(at);
    let footer: Footer<R> = serde_json::from_slice(footer).map_err(|e| e.to_string())?;
    if footer.layer_idx != layer_idx {
        return Err(format!(
            "layer {} found, {layer_idx} expected",
            footer.layer_idx
        ));
    }
    let mut weights = Vec::new();
    for entry in footer.modules {
        let weight = entry.weight(&mut data).map_err(|e| e.to_string())?;
        weights.push((entry.name, weight));
    }
    let mut tensors = Vec::new();
    for Plain { name, len } in footer.tensors {
        let n_bytes = len.checked_mul(4).filter(|n| *n <= data.len());
        let n_bytes = n_bytes.ok_or_else(|| format!("{name} is longer than the file"))?;
        let (values, rest) = data.split_at(n_bytes);
        data = rest;
        let values = values.as_chunks::<4>().0.iter();
        tensors.push((name, values.map(|b| f32::from_le_bytes(*b)).collect()));
    }
    match data.len() {
        0 => Ok(LayerFile {
            source: footer.source,
            weights,
            tensors,
            record: footer.record,
        }),
        n => Err(format!("{n} bytes of data are left over")),
    }
}

impl Entry {
    /// Takes this module's bytes off `data`.
    fn weight(&self, data: &mut &[u8]) -> Result<QuantizedWeight> {
        let [rows, cols] = self.shape;
        let overflow = || Error::Invalid {
            what: self.name.clone(),
            why: format!("its shape {:?} needs more bytes than there are", self.shape),
        };
        let n_codes = rows.checked_mul(cols).ok_or_else(overflow)?;
        let n_scales = rows * (cols / self.scheme.group_len(&self.name, cols)?);
        let bits = self.scheme.bits();
        let n_words = words_for(n_codes, bits).ok_or_else(overflow)?;
        let mut take = |n: Option<usize>| {
            let n = n.filter(|n| *n <= data.len()).ok_or_else(overflow)?;
            let (taken, rest) = data.split_at(n);
            *data = rest;
            Ok::<_, Error>(taken)
        };
        let (words, _) = take(n_words.checked_mul(4))?.as_chunks::<4>();
        let zero_points = take(Some(n_scales))?.to_vec();
        let (scales, _) = take(n_scales.checked_mul(4))?.as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let scales = scales.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let n_groups = n_scales / rows.max(1);
        let scales = Matrix::from_vec(&self.name, rows, n_groups, scales)?;
        let codes = unpack(&words, bits, n_codes).codes;
        QuantizedWeight::new(
            &self.name,
            self.scheme,
            self.shape,
            codes,
            scales,
            zero_points,
        )
    }
}

/// Puts a whole file on disk and gives it its name, so that it is there whole or not at all.
pub(super) fn put_in_place(unfinished: &Path, path: &Path) -> Result<()> {
    let sync = |path: &Path| {
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.map_err(|e| Error::io(path, "put on disk", e))
    };
    sync(unfinished)?;
    fs::rename(unfinished, path).map_err(|e| Error::io(path, "rename to", e))?;
    sync(path.parent().unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A whole file whose one module has this scheme and shape, and data for one scale.
    fn file(scheme: &str, shape: &str) -> Vec<u8> {
        let footer = format!(
            r#"{{"layer_idx":0,"source":"","record":null,
                "modules":[{{"name":"m","scheme":{scheme},"shape":{shape}}}],"tensors":[]}}"#
        );
        let data = [0; 5];
        let start = [&MAGIC[..], &VERSION.to_le_bytes(), &data];
        let mut bytes = [&start.concat(), footer.as_bytes()].concat();
        bytes.extend((footer.len() as u64).to_le_bytes());
        let digest = blake3::hash(&bytes);
        bytes.extend(digest.as_bytes());
        bytes
    }

    fn message(scheme: &str, shape: &str) -> String {
        parse::<()>(&file(scheme, shape), 0).unwrap_err()
    }

    #[test]
    fn codes_without_bits_ask_for_no_memory() {
        let scheme = |bits: u8| {
            format!(r#"{{"bits":{bits},"group_size":null,"symmetric":true,"scale_dtype":"f32"}}"#)
        };
        for bits in [0, 1, 64, 255] {
            let found = message(&scheme(bits), "[1,1099511627776]");
            assert!(found.contains(&format!("{bits} given")), "{found}");
        }
        let found = message(&scheme(4), "[1,1099511627776]");
        assert!(found.contains("more bytes than there are"), "{found}");
    }

    #[test]
    fn groups_of_no_columns_are_refused() {
        let scheme = r#"{"bits":4,"group_size":0,"symmetric":true,"scale_dtype":"f32"}"#;
        let found = message(scheme, "[1,8]");
        assert!(found.contains("0 given"), "{found}");
    }
}
