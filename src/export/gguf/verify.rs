//! Looking at a folder of GGUF files as its readers will, and beside the folder that it is made of.
//!
//! The source is written once more, to where temporary files go, and the two are held together tensor
//! by tensor: same bytes, or, where one has codes and the other numbers, so far apart.

use super::write_all;
use crate::Result;
use crate::checkpoint::{Checkpoint, DType, PendingFolder};
use crate::export::verify::distance;
use crate::gguf::{GgufFile, ORIGINS, TensorSpec, TensorType, Value, decode, gguf_files};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Keys whose values are the file's own: the name of the folder that it was made of, the types
/// that its weights are stored in, and who made codes of them.
const OF_THE_FILE: [&str; 3] = ["general.name", "general.file_type", "general.quantized_by"];

/// Characters of a value that are shown: vocabularies are long.
const N_SHOWN: usize = 80;

/// What was found in a folder of GGUF files.
#[derive(Clone, Debug, Default)]
pub struct GgufVerified {
    /// Tensors that are stored as codes.
    pub n_quantized: usize,
    /// Other tensors.
    pub n_plain: usize,
    /// Everything that is wrong.
    pub problems: Vec<String>,
    /// Tensors that are other numbers than the source's: name, ‖W − Q‖ / ‖W‖, and largest |W − Q|.
    pub distances: Vec<(String, f64, f64)>,
}

/// Reads every tensor of a folder, and compares with `source` if there is one, quantized or not.
///
/// # Errors
/// Those of reading and writing the source; what is wrong with the folder is a problem that is told.
pub fn verify_gguf(dir: &Path, source: Option<&Checkpoint>) -> Result<GgufVerified> {
    let mut found = GgufVerified::default();
    let mut written = Vec::new();
    for path in gguf_files(dir)? {
        match GgufFile::open(&path) {
            Ok(file) => written.push((path, file)),
            Err(error) => found.problems.push(error.to_string()),
        }
    }
    for (path, file) in &written {
        found.read(path, file);
    }
    if let Some(source) = source {
        let place = format!("vlmq-verify-{}", std::process::id());
        let pending = PendingFolder::create(&std::env::temp_dir().join(place))?;
        write_all(source, &pending)?;
        found.compare(&written, pending.path())?;
    }
    let by_error = |a: &(String, f64, f64), b: &(String, f64, f64)| b.1.total_cmp(&a.1);
    found.distances.sort_by(by_error);
    Ok(found)
}

impl GgufVerified {
    /// Counts a file's tensors, and tells of those that are no finite numbers.
    fn read(&mut self, path: &Path, file: &GgufFile) {
        for spec in file.tensors() {
            match spec.kind.is_quantized() {
                true => self.n_quantized += 1,
                false => self.n_plain += 1,
            }
            match values(file, spec) {
                Ok(values) if values.iter().all(|value| value.is_finite()) => {}
                Ok(_) => self.problems.push(format!(
                    "{}: {}: NaN or infinity",
                    path.display(),
                    spec.name
                )),
                Err(error) => self.problems.push(error.to_string()),
            }
        }
        if !file
            .keys()
            .iter()
            .any(|(key, _)| key == "general.architecture")
        {
            self.problems
                .push(format!("{}: no general.architecture", path.display()));
        }
    }

    /// Holds every file against the one of the same kind that the source gives.
    fn compare(&mut self, written: &[(PathBuf, GgufFile)], reference: &Path) -> Result<()> {
        let kind_of = |path: &Path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.split('-').next().unwrap_or_default().to_owned()
        };
        let files: BTreeMap<String, &GgufFile> = written
            .iter()
            .map(|(path, file)| (kind_of(path), file))
            .collect();
        for path in gguf_files(reference)? {
            let kind = kind_of(&path);
            let expected = GgufFile::open(&path)?;
            match files.get(&kind) {
                Some(found) => self.compare_file(&kind, found, &expected)?,
                None => self.problems.push(format!("{kind}-*.gguf: is not there")),
            }
        }
        Ok(())
    }

    /// The keys that say what the model computes, and to whom.
    fn compare_keys(&mut self, kind: &str, found: &GgufFile, expected: &GgufFile) {
        let is_meant = |key: &str| key != ORIGINS && !OF_THE_FILE.contains(&key);
        for (key, value) in expected.keys().iter().filter(|(key, _)| is_meant(key)) {
            let problem = match found.key(key) {
                Some(other) if other == value => continue,
                Some(other) => format!("expected {}, found {}", shown(value), shown(other)),
                None => format!("expected {}, is not there", shown(value)),
            };
            self.problems.push(format!("{kind}: {key}: {problem}"));
        }
        let added = found.keys().iter().filter(|(key, _)| is_meant(key));
        let added = added.filter(|(key, _)| expected.key(key).is_none());
        let added = added
            .map(|(key, value)| format!("{kind}: {key}: not expected, found {}", shown(value)));
        self.problems.extend(added);
    }

    fn compare_file(&mut self, kind: &str, found: &GgufFile, expected: &GgufFile) -> Result<()> {
        self.compare_keys(kind, found, expected);
        for spec in expected.tensors() {
            let name = &spec.name;
            let Some(other) = found.tensor(name).filter(|other| other.shape == spec.shape) else {
                let shape = &spec.shape;
                self.problems
                    .push(format!("{kind}: {name} {shape:?}: is not there"));
                continue;
            };
            if !origins_agree(found, expected, name) {
                let problem = format!("{kind}: {name}: another origin than the source says");
                self.problems.push(problem);
            }
            let is_same = other.kind == spec.kind && found.bytes(name)? == expected.bytes(name)?;
            if is_same {
                continue;
            }
            if !other.kind.is_quantized() {
                self.problems
                    .push(format!("{kind}: {name}: differs from the source's"));
                continue;
            }
            let (w, q) = (values(expected, spec)?, values(found, other)?);
            let [relative, largest] = distance(&w, &q);
            self.distances.push((name.clone(), relative, largest));
        }
        let is_added = |spec: &&TensorSpec| expected.tensor(&spec.name).is_none();
        let added = found.tensors().filter(is_added);
        let added = added.map(|spec| format!("{kind}: {}: is not in the source", spec.name));
        self.problems.extend(added.collect::<Vec<_>>());
        Ok(())
    }
}

fn shown(value: &Value) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(N_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Whether both files say that this tensor comes from the same place, as codes or not.
fn origins_agree(a: &GgufFile, b: &GgufFile, tensor: &str) -> bool {
    match [a, b].map(|file| file.origin(tensor)) {
        [Some(a), Some(b)] => a.place() == b.place(),
        _ => false,
    }
}

/// A tensor's numbers.
fn values(file: &GgufFile, spec: &TensorSpec) -> Result<Vec<f32>> {
    let bytes = file.bytes(&spec.name)?;
    let dtype = match spec.kind {
        TensorType::F32 => DType::F32,
        TensorType::F16 => DType::F16,
        TensorType::Bf16 => DType::Bf16,
        kind => {
            let values = decode(&bytes, kind);
            return Ok(values.expect("every other type is one of blocks"));
        }
    };
    let values = dtype.f32_from_bytes(&bytes);
    Ok(values.expect("these three are floats"))
}
