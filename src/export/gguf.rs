//! A folder of GGUF files, which llama.cpp and what is built on it load.
//!
//! - `model-TYPES.gguf`: the language model with its tokenizer. Quantized linears keep their codes
//!   (see [`crate::gguf`]); everything else is in the type that it is stored in.
//! - `mmproj-TYPE.gguf`: vision tower and projector, where llama.cpp has the family's;
//! - `imatrix.gguf`: the weights' importance for `llama-quantize`, if `vlmq quantize --imatrix`
//!   left it in the quantized folder;
//! - the source's configuration, tokenizer and processor, by which vlmq itself reads the folder.
//!
//! Nothing is quantized here: a folder that is not quantized gives files of floats, which
//! `llama-quantize` can work on.

mod imatrix;
mod mmproj;
mod tensors;
mod text;
mod tokenizer;
mod verify;

pub use imatrix::imatrix_file;
pub use verify::{GgufVerified, verify_gguf};

use super::config::config_text;
use super::{ModulePlan, copy_side_files};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, PendingFolder};
use crate::families::architecture_of;
use crate::gguf::{GgufFile, IMATRIX_FILE, ORIGINS, Rounding, TensorType, Value, Writer, kind_of};
use crate::{Error, Result};
use mmproj::Mmproj;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use tensors::Planned;
use text::TextModel;

/// Version of the block formats, which readers ask for.
const QUANTIZATION_VERSION: u32 = 2;

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GgufExported {
    /// The language model.
    pub model: GgufWritten,
    /// Vision tower and projector.
    pub mmproj: Option<GgufWritten>,
    /// Why there is no such file, if there is none.
    pub mmproj_absent: Option<String>,
    /// Whether the quantized folder had an importance matrix, which was copied.
    pub has_imatrix: bool,
    /// How far scales moved on their way to f16.
    pub rounding: Rounding,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GgufWritten {
    /// Its name in the folder.
    pub file: String,
    /// Bytes of all its tensors.
    pub tensor_bytes: u64,
    /// Tensors by the name of their type.
    pub n_tensors: BTreeMap<&'static str, usize>,
}

/// Writes the folder `output` of a checkpoint, quantized by us or not at all.
///
/// Every file is read back and compared before the folder appears, with the files beside that
/// `beside` makes of what was written: name and content.
///
/// # Errors
/// [`Error::Exists`] if `output` is there; [`Error::Unsupported`] for a family, tokenizer or number
/// format that GGUF cannot hold as it is, naming the module, what was found and what can be done;
/// [`Error::Missing`], [`Error::Format`] and [`Error::Io`] for what is wrong with the folders.
pub fn export(
    source: &Checkpoint,
    output: &Path,
    beside: impl FnOnce(&GgufExported) -> Vec<(String, Vec<u8>)>,
) -> Result<GgufExported> {
    let pending = PendingFolder::create(output)?;
    let exported = write_all(source, &pending)?;
    for (name, content) in beside(&exported) {
        pending.write_file(&name, &content)?;
    }
    let config = config_text(source, None)?;
    pending.write_file(CONFIG_FILE, config.as_bytes())?;
    copy_side_files(source, &pending)?;
    pending.commit()?;
    Ok(exported)
}

/// Holds a plan against what GGUF can hold, without any work.
///
/// # Errors
/// [`Error::Unsupported`] for a family, a tokenizer or a module that it has nothing for.
pub fn check(source: &Checkpoint, plan: &[ModulePlan]) -> Result<()> {
    let architecture = architecture_of(source)?;
    let text = TextModel::of(source, &architecture)?;
    text.keys()?;
    let vocab_size = architecture.decoder.vocab_size;
    tokenizer::keys(source, vocab_size, text.is_llama())?;
    for ModulePlan { name, scheme } in plan {
        let cols = source
            .linear_info(name)
            .and_then(|(_, shape)| shape.last().copied());
        kind_of(name, *scheme, cols.unwrap_or_default())?;
    }
    Ok(())
}

/// The files of [`export`] in a folder that has not got its name yet.
fn write_all(source: &Checkpoint, pending: &PendingFolder) -> Result<GgufExported> {
    let architecture = architecture_of(source)?;
    let text = TextModel::of(source, &architecture)?;
    let tensors = text.tensors()?;
    let mut keys = general_keys(source, text.arch.name, "model", &tensors);
    keys.extend(text.keys()?);
    let vocab_size = architecture.decoder.vocab_size;
    keys.extend(tokenizer::keys(source, vocab_size, text.is_llama())?);
    let (mmproj, mmproj_absent) = match mmproj::plan(source, &architecture) {
        Ok(plan) => (Some(plan), None),
        Err(Error::Unsupported { what }) => (None, Some(what)),
        Err(error) => return Err(error),
    };
    let mut rounding = Rounding::default();
    let file = format!("model-{}.gguf", types_in_name(&tensors));
    let model = write_file(source, pending, file, &keys, &tensors, &mut rounding)?;
    let write_mmproj = |Mmproj { keys, tensors }| {
        let mut all = general_keys(source, "clip", "mmproj", &tensors);
        all.extend(keys);
        let file = format!("mmproj-{}.gguf", types_in_name(&tensors));
        write_file(source, pending, file, &all, &tensors, &mut rounding)
    };
    let mmproj = mmproj.map(write_mmproj).transpose()?;
    let has_imatrix = source.dir().join(IMATRIX_FILE).is_file();
    if has_imatrix {
        pending.copy_from(source.dir(), IMATRIX_FILE)?;
    }
    Ok(GgufExported {
        model,
        mmproj,
        mmproj_absent,
        has_imatrix,
        rounding,
    })
}

/// Keys that every file has.
fn general_keys(
    source: &Checkpoint,
    architecture: &str,
    kind: &str,
    tensors: &[Planned],
) -> Vec<(String, Value)> {
    let name = source.dir().file_name().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    let keys = [
        ("architecture", architecture.into()),
        ("type", kind.into()),
        ("name", Value::Text(name)),
        ("file_type", Value::U32(FileType::of(tensors) as u32)),
        ("quantization_version", Value::U32(QUANTIZATION_VERSION)),
    ];
    let keys = keys.map(|(key, value)| (format!("general.{key}"), value));
    let mut keys = Vec::from(keys);
    if tensors
        .iter()
        .any(|planned| planned.spec.kind.is_quantized())
    {
        let version = format!("vlmq {}", env!("CARGO_PKG_VERSION"));
        keys.push(("general.quantized_by".into(), Value::Text(version)));
    }
    keys
}

/// What most of a file's weights are stored in, as llama.cpp numbers it; it is shown to users and
/// steers nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q8_0 = 7,
    Q2K = 10,
    Q3K = 11,
    Bf16 = 32,
}

impl FileType {
    fn of(tensors: &[Planned]) -> Self {
        match main_kind(tensors) {
            TensorType::F32 => Self::F32,
            TensorType::F16 => Self::F16,
            TensorType::Bf16 => Self::Bf16,
            TensorType::Q4_0 => Self::Q4_0,
            TensorType::Q4_1 => Self::Q4_1,
            TensorType::Q8_0 => Self::Q8_0,
            TensorType::Q2K => Self::Q2K,
            TensorType::Q3K => Self::Q3K,
        }
    }
}

/// The types of codes that a file has, or that of most weights if it has none, for its name.
fn types_in_name(tensors: &[Planned]) -> String {
    let kinds = tensors.iter().map(|planned| planned.spec.kind);
    let mut kinds: Vec<TensorType> = kinds.filter(|kind| kind.is_quantized()).collect();
    if kinds.is_empty() {
        kinds.push(main_kind(tensors));
    }
    kinds.sort();
    kinds.dedup();
    let names: Vec<&str> = kinds.into_iter().map(TensorType::name).collect();
    names.join("-")
}

/// The type of most weights in matrices; codes outweigh floats.
fn main_kind(tensors: &[Planned]) -> TensorType {
    let mut n_weights: BTreeMap<TensorType, usize> = BTreeMap::new();
    let matrices = tensors
        .iter()
        .filter(|planned| planned.spec.shape.len() > 1);
    for Planned { spec, .. } in matrices {
        *n_weights.entry(spec.kind).or_default() += spec.shape.iter().product::<usize>();
    }
    let most = n_weights
        .into_iter()
        .max_by_key(|(kind, n)| (kind.is_quantized(), *n));
    most.map_or(TensorType::F32, |(kind, _)| kind)
}

/// Writes one file into the folder, and holds it against what was meant.
fn write_file(
    source: &Checkpoint,
    pending: &PendingFolder,
    file: String,
    keys: &[(String, Value)],
    tensors: &[Planned],
    rounding: &mut Rounding,
) -> Result<GgufWritten> {
    let path = pending.path().join(&file);
    let origins = tensors.iter().map(|planned| planned.origin.to_text());
    let origins = (ORIGINS.to_owned(), Value::Texts(origins.collect()));
    let keys = [keys, &[origins]].concat();
    let specs = tensors.iter().map(|planned| planned.spec.clone()).collect();
    let mut writer = Writer::create(&path, &keys, specs)?;
    for planned in tensors {
        planned.write(source, &mut writer, rounding)?;
    }
    let tensor_bytes = writer.finish()?;
    let written = GgufFile::open(&path)?;
    let is_same = written.keys() == keys
        && written
            .tensors()
            .eq(tensors.iter().map(|planned| &planned.spec));
    if !is_same {
        let why = "read back, keys and tensors differ from what was written";
        return Err(Error::format(&path, "header", why));
    }
    let mut n_tensors = BTreeMap::new();
    for Planned { spec, .. } in tensors {
        *n_tensors.entry(spec.kind.name()).or_default() += 1;
    }
    Ok(GgufWritten {
        file,
        tensor_bytes,
        n_tensors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundled() -> Checkpoint {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/testbed/model");
        Checkpoint::open(Path::new(dir)).unwrap()
    }

    #[test]
    fn the_bundled_model_becomes_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let (source, output) = (bundled(), dir.path().join("out"));
        let exported = export(&source, &output, |_| Vec::new()).unwrap();
        assert_eq!(exported.model.file, "model-BF16.gguf");
        let mmproj = exported.mmproj.unwrap();
        assert_eq!(mmproj.file, "mmproj-BF16.gguf");
        let model = GgufFile::open(&output.join(exported.model.file)).unwrap();
        let q = model.bytes("blk.1.attn_q.weight").unwrap();
        assert_eq!(
            q,
            source
                .bytes("model.layers.1.self_attn.q_proj.weight")
                .unwrap()
        );
        let key = |key: &str| model.keys().iter().find(|(k, _)| k == key).map(|(_, v)| v);
        assert_eq!(key("general.architecture"), Some(&"qwen2vl".into()));
        let sections = Value::I32s(vec![4, 6, 6, 0]);
        assert_eq!(key("qwen2vl.rope.dimension_sections"), Some(&sections));
        let tower = GgufFile::open(&output.join(mmproj.file)).unwrap();
        let patches = tower.tensor("v.patch_embd.weight.1").unwrap();
        assert_eq!(patches.shape, [128, 3, 14, 14]);
        assert!(matches!(
            export(&source, &output, |_| Vec::new()),
            Err(Error::Exists { .. })
        ));
    }

    /// Names, types, shapes and bytes of all tensors.
    fn assert_same_tensors(found: &Checkpoint, expected: &Checkpoint) {
        assert!(found.names().eq(expected.names()));
        for name in expected.names() {
            let [a, b] = [found, expected].map(|folder| folder.info(name).unwrap());
            assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape), "{name}");
            assert_eq!(
                found.bytes(name).unwrap(),
                expected.bytes(name).unwrap(),
                "{name}"
            );
        }
    }

    #[test]
    fn a_folder_is_read_as_the_checkpoint_that_it_was_made_of() {
        let dir = tempfile::tempdir().unwrap();
        let (source, output) = (bundled(), dir.path().join("out"));
        export(&source, &output, |_| Vec::new()).unwrap();
        let found = Checkpoint::open(&output).unwrap();
        assert_same_tensors(&found, &source);
        assert_eq!(found.config_text(), source.config_text());
        let name = "visual.patch_embed.proj.weight";
        let whole = source.bytes(name).unwrap();
        assert_eq!(
            found.bytes_at(name, 10..30).unwrap().unwrap(),
            whole[10..30]
        );
        assert_eq!(found.bytes_at(name, 10..whole.len() + 1).unwrap(), None);
        let digests = [&found, &source].map(|folder| folder.digest("").unwrap());
        assert_eq!(digests[0], digests[1]);
        let again = dir.path().join("again");
        export(&found, &again, |_| Vec::new()).unwrap();
        assert_same_tensors(&Checkpoint::open(&again).unwrap(), &source);
    }

    #[test]
    fn what_cannot_be_written_leaves_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        for entry in std::fs::read_dir(bundled().dir()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap();
            match name.to_str() {
                Some("tokenizer.json") => {}
                _ => drop(std::fs::copy(&path, folder.join(name)).unwrap()),
            }
        }
        let source = Checkpoint::open(&folder).unwrap();
        let output = dir.path().join("out");
        let error = export(&source, &output, |_| Vec::new()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
