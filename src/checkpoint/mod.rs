//! A Hugging Face model folder: `config.json`, safetensors files, and the files beside them; or one of
//! GGUF files that we wrote, whose tensors then have the names that they had.
//!
//! Opening a checkpoint costs its headers, and a tensor costs memory only when it is asked for.
//! Nothing in the folder is trusted; what is wrong with it is reported with the file, the tensor,
//! what was expected and what was found. Weight files stay open, so one that is replaced is not
//! noticed and does no harm; one that is written to meanwhile is an error at the next read.
//!
//! [`write::ShardedWriter`] and [`PendingFolder`] are the way back to disk.

mod dtype;
mod experts;
mod folder;
mod gguf;
mod quantization;
mod shard;
pub mod write;

pub use dtype::DType;
pub use folder::PendingFolder;
pub use quantization::{Awq, CompressedTensors, Gguf, Gptq, Mlx, Quantization, QuantizationGroup};
pub(crate) use quantization::{NIBBLE_OF_OUTPUT, mlx_bias, name_in_memory, turned};

use crate::gguf::gguf_files;
use crate::{Error, Matrix, Result};
use serde_json::Value;
pub(crate) use shard::Shard;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

/// Name of the model configuration in every folder.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the weights when they are in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Name of the table that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Largest JSON side file that is read, in bytes; a 700 B model's index has 10 MB.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// Bytes of a tensor that are read in one go; a multiple of every element's size.
const PIECE_BYTES: usize = 1 << 20;

/// Endings of files that hold weights in some other form, or tables of such files.
const WEIGHT_ENDINGS: [&str; 13] = [
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".npz",
];

/// An open model folder. See the module's documentation for what it promises and asks.
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    config_text: String,
    quantization: Option<Quantization>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where a tensor is and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: DType,
    /// Sides, outermost first.
    pub shape: Vec<usize>,
    /// Size in the file, in bytes.
    pub n_bytes: usize,
    /// Which of the folder's weight files holds it, counted from 0 in order of their names.
    pub shard: usize,
    place: Place,
}

/// Where the bytes of a tensor are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// In a file as they are.
    InFile(Range<usize>),
    /// In parts that have to be put together.
    Assembled(Box<gguf::Assembly>),
}

impl Checkpoint {
    /// Opens the folder: `config.json` and `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` names, or GGUF files that we wrote. No tensor is converted.
    ///
    /// # Errors
    /// [`Error::Missing`] for an absent file, [`Error::Io`] for an unreadable one,
    /// [`Error::Format`] for a damaged one, [`Error::Unsupported`] if the weights are quantized in
    /// a form that is not one of [`Quantization`].
    pub fn open(dir: &Path) -> Result<Self> {
        let config_path = require(dir, CONFIG_FILE)?;
        let config_text = read_text(&config_path)?;
        let config = parse_object(&config_path, &config_text)?;
        let mut checkpoint = Self {
            dir: dir.to_path_buf(),
            config,
            config_text,
            quantization: None,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        };
        let is_there = |name| dir.join(name).exists();
        if !is_there(WEIGHTS_FILE) && !is_there(INDEX_FILE) {
            let files = gguf_files(dir)?;
            if !files.is_empty() {
                checkpoint.add_gguf_files(&files)?;
                return Ok(checkpoint);
            }
        }
        let config = &checkpoint.config;
        checkpoint.quantization = Quantization::from_config(&config_path, config)?;
        if is_there(WEIGHTS_FILE) || !is_there(INDEX_FILE) {
            checkpoint.add_shard(&require(dir, WEIGHTS_FILE)?)?;
        } else {
            checkpoint.add_indexed_shards(&dir.join(INDEX_FILE))?;
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, path: &Path) -> Result<()> {
        let shard = Shard::open(path)?;
        for (name, entry) in &shard.tensors {
            let info = TensorInfo {
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                n_bytes: entry.range.len(),
                shard: self.shards.len(),
                place: Place::InFile(entry.range.clone()),
            };
            self.add_tensor(path, name, info)?;
        }
        self.shards.push(shard);
        Ok(())
    }

    fn add_tensor(&mut self, path: &Path, name: &str, info: TensorInfo) -> Result<()> {
        let Some(first) = self.tensors.insert(name.to_owned(), info) else {
            return Ok(());
        };
        let other = self.shards.get(first.shard).map_or(path, Shard::path);
        let why = format!("is already in {}", other.display());
        Err(Error::format(path, format!("tensor {name}"), why))
    }

    fn add_indexed_shards(&mut self, index_path: &Path) -> Result<()> {
        let weight_map = read_weight_map(index_path)?;
        let mut files: Vec<&String> = weight_map.values().collect();
        files.sort();
        files.dedup();
        for file in &files {
            self.add_shard(&require(&self.dir.clone(), file)?)?;
        }
        for (name, file) in &weight_map {
            let holder = self.tensors.get(name).map(|info| files[info.shard]);
            if holder != Some(file) {
                let found = holder.map_or("in no shard".to_owned(), |f| format!("in {f}"));
                let why = format!("expected in {file}, found {found}");
                return Err(Error::format(index_path, format!("tensor {name}"), why));
            }
        }
        match self.tensors.keys().find(|n| !weight_map.contains_key(*n)) {
            Some(name) => Err(Error::format(
                index_path,
                "weight_map",
                format!("does not list tensor {name}, which a shard holds"),
            )),
            None => Ok(()),
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`, always an object, keys in file order.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `config.json` as it is written, byte for byte.
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type, shape and size of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Size of all tensors in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.n_bytes as u64).sum()
    }

    /// The weight files, in the order that [`TensorInfo::shard`] counts.
    pub fn shard_paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(Shard::path)
    }

    /// The stored bytes of a tensor, row-major, little-endian.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is no such tensor; [`Error::Io`] or [`Error::Format`] if its
    /// file fails or was written to since it was opened.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.require_info(name)?;
        self.read(info, 0..info.n_bytes)
    }

    /// As [`Checkpoint::bytes`], one part only; `None` if the tensor ends before `range` does.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn bytes_at(&self, name: &str, range: Range<usize>) -> Result<Option<Vec<u8>>> {
        let info = self.require_info(name)?;
        if range.end > info.n_bytes {
            return Ok(None);
        }
        self.read(info, range).map(Some)
    }

    /// A range of a tensor's bytes, which it must have.
    fn read(&self, info: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        let shard = &self.shards[info.shard];
        match &info.place {
            Place::InFile(place) => shard.read(place.start + range.start..place.start + range.end),
            Place::Assembled(assembly) => {
                let mut bytes = assembly.read(shard)?;
                bytes.truncate(range.end);
                Ok(bytes.split_off(range.start))
            }
        }
    }

    /// As [`Checkpoint::bytes`], piece after piece, each a whole number of elements and none
    /// large, unless the tensor has to be put together, which gives one.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`], each piece's own inside.
    pub fn pieces(&self, name: &str) -> Result<impl Iterator<Item = Result<Vec<u8>>>> {
        let info = self.require_info(name)?;
        let end = info.n_bytes;
        let len = match info.place {
            Place::InFile(_) => PIECE_BYTES,
            Place::Assembled(_) => end.max(1),
        };
        let starts = (0..end).step_by(len);
        Ok(starts.map(move |start| self.read(info, start..end.min(start + len))))
    }

    /// A digest of all tensors whose names begin with `prefix`: their names, types, shapes and
    /// bytes.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn digest(&self, prefix: &str) -> Result<String> {
        self.digest_of(|name| name.starts_with(prefix))
    }

    /// As [`Checkpoint::digest`], of all tensors whose names `is_meant`.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    pub fn digest_of(&self, is_meant: impl Fn(&str) -> bool) -> Result<String> {
        let mut digest = blake3::Hasher::new();
        let tensors = self.tensors.iter();
        for (name, info) in tensors.filter(|(name, _)| is_meant(name)) {
            digest.update(format!("{name} {} {:?};", info.dtype.name(), info.shape).as_bytes());
            for piece in self.pieces(name)? {
                digest.update(&piece?);
            }
        }
        Ok(digest.finalize().to_string())
    }

    /// A float tensor (bf16, f16, f32 or f64) as f32, which must have exactly this `shape`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Shape`], [`Error::Format`] for another element type, and
    /// [`Error::NotFinite`] for NaN or infinity; each names the tensor.
    pub fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let info = self.require_shape(name, shape)?;
        let mut values = Vec::with_capacity(info.n_bytes / info.dtype.n_bytes());
        for piece in self.pieces(name)? {
            let piece = info.dtype.f32_from_bytes(&piece?);
            values.extend(piece.ok_or_else(|| {
                let found = info.dtype.name();
                self.tensor_error(
                    name,
                    format!("expected BF16, F16, F32 or F64, found {found}"),
                )
            })?);
        }
        finite(name, values)
    }

    /// A tensor's type and place, if it has exactly this `shape`; nothing of it is read.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Shape`], naming the tensor.
    pub fn require_shape(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let info = self.require_info(name)?;
        if info.shape == shape {
            return Ok(info);
        }
        Err(Error::Shape {
            module: name.to_owned(),
            expected: shape.to_vec(),
            found: info.shape.clone(),
        })
    }

    /// Looks for NaN and infinity in a tensor without keeping it; integers have neither.
    ///
    /// # Errors
    /// [`Error::NotFinite`], or [`Error::Missing`] if there is no such tensor.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        let dtype = self.require_info(name)?.dtype;
        let mut count = 0;
        for piece in self.pieces(name)? {
            let values = dtype.f32_from_bytes(&piece?).into_iter().flatten();
            count += values.filter(|v| !v.is_finite()).count();
        }
        match count {
            0 => Ok(()),
            _ => Err(Error::NotFinite {
                module: name.to_owned(),
                stage: "weights".into(),
                count,
            }),
        }
    }

    /// The weight `[out, inp]` of a linear by its checkpoint name without `.weight`; dequantized
    /// if it is stored quantized, cut out if it is an expert's in a fused tensor.
    ///
    /// # Errors
    /// As [`Checkpoint::load`] and [`Checkpoint::packed_module`].
    pub fn linear_weight(&self, module: &str, out: usize, inp: usize) -> Result<Matrix> {
        if !self.is_quantized(module) {
            if self.fused_weight(module).is_some() {
                return self.fused_matrix(module, out, inp);
            }
            let name = format!("{module}.weight");
            return Matrix::from_vec(&name, out, inp, self.load(&name, &[out, inp])?);
        }
        self.dequantized(module, out, inp)
    }

    /// Every regular file of the folder and its subfolders that holds no weights, sorted,
    /// `config.json` included. Hidden subfolders (of version control and download tools) and
    /// Python's `__pycache__` are no part of a model and are left out.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be listed; [`Error::Invalid`] for a symbolic link that
    /// leads out of the folder (the `blobs` folder of a download cache excepted) or to a folder,
    /// because a copy of it would publish files that are no part of the model.
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        let home = self.dir.canonicalize();
        let home = home.map_err(|e| Error::io(&self.dir, "list", e))?;
        let mut files = Vec::new();
        add_side_files(&home, &self.dir, &mut files)?;
        files.sort();
        Ok(files)
    }

    /// The name of one of [`Checkpoint::side_files`] within the folder, with `/` between its parts.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a name that is not UTF-8.
    pub fn side_name(&self, path: &Path) -> Result<String> {
        let within = path.strip_prefix(&self.dir).unwrap_or(path);
        let parts: Option<Vec<&str>> = within.iter().map(|part| part.to_str()).collect();
        let parts = parts.ok_or_else(|| Error::Unsupported {
            what: format!("{}: a file name that is not UTF-8", path.display()),
        })?;
        Ok(parts.join("/"))
    }

    fn require_info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| Error::Missing {
            what: format!("tensor {name}"),
            place: self.dir.display().to_string(),
        })
    }

    /// An [`Error::Format`] about a tensor, with the file that holds it.
    fn tensor_error(&self, name: &str, why: impl Into<String>) -> Error {
        let shard = self.tensors.get(name).map(|info| &self.shards[info.shard]);
        let path = shard.map_or(self.dir.as_path(), Shard::path);
        Error::format(path, format!("tensor {name}"), why)
    }
}

/// `values` of a tensor or linear, if none is NaN or infinite.
fn finite(name: &str, values: Vec<f32>) -> Result<Vec<f32>> {
    match values.iter().filter(|v| !v.is_finite()).count() {
        0 => Ok(values),
        count => Err(Error::NotFinite {
            module: name.to_owned(),
            stage: "weights".into(),
            count,
        }),
    }
}

/// Adds the side files of `dir`, which is `home` or a folder in it.
fn add_side_files(home: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let list = |e| Error::io(dir, "list", e);
    for entry in std::fs::read_dir(dir).map_err(list)? {
        let entry = entry.map_err(list)?;
        let path = entry.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_real = entry.file_type().map_err(list)?.is_dir();
        if path.is_dir() {
            if name.starts_with('.') || name == "__pycache__" {
                continue;
            }
            if !is_real {
                let why = "links to a folder, a folder of its own expected";
                return Err(Error::Invalid {
                    what: path.display().to_string(),
                    why: why.into(),
                });
            }
            add_side_files(home, &path, files)?;
            continue;
        }
        let holds_weights = WEIGHT_ENDINGS.iter().any(|end| name.ends_with(end));
        if !holds_weights && path.is_file() {
            check_inside(home, &path)?;
            files.push(path);
        }
    }
    Ok(())
}

/// A file's real place must be in `home`, or in the blobs that a cache's snapshot links to.
fn check_inside(home: &Path, path: &Path) -> Result<()> {
    let real = path
        .canonicalize()
        .map_err(|e| Error::io(path, "resolve", e))?;
    let snapshots = home.parent().filter(|p| p.ends_with("snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|p| p.join("blobs"));
    let is_blob = blobs.is_some() && real.parent() == blobs.as_deref();
    if real.starts_with(home) || is_blob {
        return Ok(());
    }
    Err(Error::Invalid {
        what: path.display().to_string(),
        why: format!(
            "links to {}, a file inside the folder expected",
            real.display()
        ),
    })
}

/// `dir/name` if it is there.
fn require(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    match path.try_exists() {
        Ok(true) => Ok(path),
        Ok(false) => Err(Error::Missing {
            what: name.to_owned(),
            place: dir.display().to_string(),
        }),
        Err(e) => Err(Error::io(&path, "look for", e)),
    }
}

fn read_text(path: &Path) -> Result<String> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, "inspect", e))?;
    if !metadata.is_file() || metadata.len() > MAX_JSON_BYTES {
        let why = format!(
            "expected a regular file of at most {MAX_JSON_BYTES} bytes, found {} bytes",
            metadata.len()
        );
        return Err(Error::format(path, "file", why));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    String::from_utf8(bytes).map_err(|e| Error::format(path, "text", format!("not UTF-8: {e}")))
}

fn parse_object(path: &Path, text: &str) -> Result<Value> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| Error::format(path, "JSON", e.to_string()))?;
    if !value.is_object() {
        return Err(Error::format(path, "JSON", "expected an object"));
    }
    Ok(value)
}

/// The index's `weight_map`, tensor name to file name, with file names that stay in the folder.
fn read_weight_map(path: &Path) -> Result<BTreeMap<String, String>> {
    let index = parse_object(path, &read_text(path)?)?;
    let fail = |at: String, why: &str| Error::format(path, at, why);
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| fail("weight_map".into(), "expected an object, found none"))?;
    let mut weight_map = BTreeMap::new();
    for (name, file) in map {
        let at = || format!("weight_map.{name}");
        let file = file.as_str();
        let file = file.ok_or_else(|| fail(at(), "expected a file name"))?;
        if !is_plain_name(file) || !file.ends_with(".safetensors") {
            let why = format!("found {file:?}, the bare name of a .safetensors file expected");
            return Err(fail(at(), &why));
        }
        weight_map.insert(name.clone(), file.to_owned());
    }
    Ok(weight_map)
}

/// Whether `name` is one path component on every system, so that it cannot leave its folder.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(p)), None) if p == name)
        && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
mod tests;
