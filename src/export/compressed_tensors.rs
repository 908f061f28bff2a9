//! The compressed-tensors `pack-quantized` folder, which vLLM and transformers load.
//!
//! Tensor layout: see `checkpoint::quantization`, whose reader also verifies what is written here.
//! Three rules keep the folder loadable where other tools' folders break:
//! - tensors keep the source's names, because every loader knows those and renames them itself;
//! - `ignore` holds only `re:.*…` patterns and `lm_head`: loaders put different prefixes before
//!   the same module (`visual.` becomes `model.visual.` in transformers 5, `model.layers.` becomes
//!   `language_model.model.layers.` in vLLM) and match patterns from the start of the name;
//! - `config.json` is the source's text with one key added, and all other files are copied.
//!
//! Experts that the source keeps fused in one tensor are written one by one, by the names that
//! loaders of quantized mixtures know (`….experts.3.gate_proj.weight_packed`).
//!
//! Format: vllm-project/compressed-tensors 0.20.0, `compressors/pack_quantized`. Its 3-bit words
//! are dense since 0.18.0, so that is the oldest version that reads 3-bit folders.

mod config;
mod verify;

pub use verify::{Verified, verify, verify_against, verify_changed, verify_module};

use super::ModulePlan;
use crate::checkpoint::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, DType, PendingFolder};
use crate::pack::{pack, words_for};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, QuantizedWeight, Result};
use config::{config_with_quantization, ignore_patterns};
use std::collections::BTreeMap;
use std::path::Path;

/// Rows of a weight that are digested together.
const DIGEST_ROWS: usize = 64;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Modules stored as codes.
    pub n_quantized: usize,
    /// Tensors copied unchanged.
    pub n_copied: usize,
    /// Names of the plain tensors that were written with other values than the source's.
    pub changed: Vec<String>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Names of the files copied unchanged.
    pub side_files: Vec<String>,
    /// The `ignore` list of the written configuration.
    pub ignore: Vec<String>,
}

/// A folder in the making. Dropping it before [`Exporter::finish`] leaves nothing behind.
pub struct Exporter<'a> {
    source: &'a Checkpoint,
    pending: PendingFolder,
    writer: ShardedWriter,
    schemes: BTreeMap<String, Scheme>,
    /// Digest of the dequantized weight of each module written so far.
    digests: BTreeMap<String, blake3::Hash>,
    /// Digest of the bytes of each plain tensor that is not the source's.
    changed: BTreeMap<String, blake3::Hash>,
    config_text: String,
    ignore: Vec<String>,
}

impl<'a> Exporter<'a> {
    /// Plans the folder and makes its files, so that a bad plan, an `output` that exists and a
    /// place that cannot be written fail before any work.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`]; [`Error::Missing`] for a planned module without a weight;
    /// [`Error::Invalid`] for a plan that names a module twice, a group size that does not divide,
    /// or a set of modules that no `ignore` pattern can tell apart; [`Error::Unsupported`] for a
    /// source that is quantized already, a module that is no matrix, or the `lm_head`.
    pub fn create(source: &'a Checkpoint, plan: &[ModulePlan], output: &Path) -> Result<Self> {
        Self::create_in(
            source,
            plan,
            PendingFolder::create(output)?,
            MAX_SHARD_BYTES,
        )
    }

    /// As [`Exporter::create`], in a folder that is there already, with a limit of data per file.
    ///
    /// # Errors
    /// As [`Exporter::create`].
    pub fn create_in(
        source: &'a Checkpoint,
        plan: &[ModulePlan],
        pending: PendingFolder,
        max_shard_bytes: u64,
    ) -> Result<Self> {
        let schemes = schemes_by_name(source, plan)?;
        let ignore = ignore_patterns(source, &schemes)?;
        let config_text = config_with_quantization(source, &schemes, &ignore)?;
        let specs = tensor_specs(source, &schemes)?;
        let writer = ShardedWriter::create(pending.path(), specs, max_shard_bytes)?;
        Ok(Self {
            source,
            pending,
            writer,
            schemes,
            digests: BTreeMap::new(),
            changed: BTreeMap::new(),
            config_text,
            ignore,
        })
    }

    /// Writes one planned module, in any order, once.
    ///
    /// # Errors
    /// [`Error::Missing`] if it was not planned, [`Error::Shape`] or [`Error::Invalid`] if it is
    /// not what was planned, [`Error::Io`].
    pub fn write_module(&mut self, name: &str, weight: &QuantizedWeight) -> Result<()> {
        let planned = self.schemes.get(name).ok_or_else(|| Error::Missing {
            what: format!("module {name}"),
            place: "the plan of this export".into(),
        })?;
        let scheme = weight.scheme();
        if *planned != scheme {
            return Err(Error::Invalid {
                what: name.to_owned(),
                why: format!("{scheme:?} given, {planned:?} planned"),
            });
        }
        let info = self.source.linear_info(name);
        let expected = info.map(|(_, shape)| shape).unwrap_or_default();
        let found = vec![weight.rows(), weight.cols()];
        if expected != found {
            return Err(Error::Shape {
                module: name.to_owned(),
                expected,
                found,
            });
        }
        let scale_type = scale_dtype(scheme.scale_dtype());
        let scales = scale_type.bytes_from_f32(weight.scales().data());
        let scales = scales.ok_or_else(|| Error::Unsupported {
            what: format!("{name}: scales in {}", scale_type.name()),
        })?;
        let shape = [weight.rows() as i64, weight.cols() as i64].map(i64::to_le_bytes);
        let bits = scheme.bits();
        let codes = packed_rows(weight.codes(), weight.cols(), bits);
        let mut put = |suffix, bytes: &[u8]| self.writer.write(&format!("{name}.{suffix}"), bytes);
        put("weight_packed", &codes)?;
        put("weight_scale", &scales)?;
        put("weight_shape", shape.as_flattened())?;
        if !scheme.symmetric() {
            let zeros = packed_columns(weight.zero_points(), weight.n_groups(), bits);
            put("weight_zero_point", &zeros)?;
        }
        self.digests.insert(name.to_owned(), digest(weight));
        Ok(())
    }

    /// Writes a plain tensor with other `values` than the source's, in its shape and type, once.
    ///
    /// # Errors
    /// [`Error::Missing`] if the output has no plain tensor of this name, [`Error::Shape`] for
    /// another number of values, [`Error::Unsupported`] if the source's type is not a 16 or 32-bit
    /// float, [`Error::Invalid`] for values that are not finite or that this type would round,
    /// [`Error::Io`].
    pub fn write_tensor(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let is_plain = replaced_by(self.source, &self.schemes, name).is_none();
        let info = self.source.info(name).filter(|_| is_plain);
        let info = info.ok_or_else(|| Error::Missing {
            what: format!("plain tensor {name}"),
            place: "the plan of this export".into(),
        })?;
        if info.shape.iter().product::<usize>() != values.len() {
            return Err(Error::Shape {
                module: name.to_owned(),
                expected: info.shape.clone(),
                found: vec![values.len()],
            });
        }
        let bytes = info.dtype.bytes_from_f32(values);
        let bytes = bytes.ok_or_else(|| Error::Unsupported {
            what: format!("{name}: changed values in {}", info.dtype.name()),
        })?;
        let stored = info.dtype.f32_from_bytes(&bytes).unwrap_or_default();
        let is_exact = |(value, stored): (&f32, &f32)| value.is_finite() && value == stored;
        if !values.iter().zip(&stored).all(is_exact) {
            return Err(Error::Invalid {
                what: name.to_owned(),
                why: format!(
                    "its new values are not finite numbers of {}",
                    info.dtype.name()
                ),
            });
        }
        self.writer.write(name, &bytes)?;
        self.changed.insert(name.to_owned(), blake3::hash(&bytes));
        Ok(())
    }

    /// Adds a file of our own, such as a report.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] for a name that is no plain file name.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.pending.write_file(name, bytes)
    }

    /// Copies everything else, reads the folder back and compares it, and gives it its name.
    ///
    /// # Errors
    /// [`Error::Missing`] naming a module that was never written; [`Error::Io`]; [`Error::Format`]
    /// if the folder read back differs from what was meant. Nothing is left behind then.
    pub fn finish(mut self) -> Result<Exported> {
        let mut n_copied = 0;
        for name in self
            .source
            .names()
            .filter(|n| !self.changed.contains_key(*n))
        {
            match replaced_by(self.source, &self.schemes, name) {
                None => {
                    if self.writer.is_open(name) {
                        self.writer.write_pieces(name, self.source.pieces(name)?)?;
                    }
                    n_copied += 1;
                }
                Some(modules) => {
                    // Experts that stay as they are, of a tensor in which others do not.
                    for module in modules.iter().filter(|m| !self.schemes.contains_key(*m)) {
                        let bytes = self.source.linear_bytes(module)?;
                        self.writer.write(&format!("{module}.weight"), &bytes)?;
                        n_copied += 1;
                    }
                }
            }
        }
        let tensor_bytes = self.writer.finish()?;
        self.pending
            .write_file(CONFIG_FILE, self.config_text.as_bytes())?;
        let side_files = copy_side_files(self.source, &self.pending)?;
        let written = Checkpoint::open(self.pending.path())?;
        verify_changed(&written, self.source, &self.changed)?;
        for (name, expected) in &self.digests {
            if digest(&written.packed_module(name)?) != *expected {
                let why = "read back, its weight differs from what was written";
                return Err(Error::format(self.pending.path(), name, why));
            }
        }
        drop(written);
        self.pending.commit()?;
        Ok(Exported {
            n_quantized: self.schemes.len(),
            n_copied,
            changed: self.changed.into_keys().collect(),
            tensor_bytes,
            side_files,
            ignore: self.ignore,
        })
    }
}

/// The modules in whose stead the output has other tensors, if some of those that the tensor `name`
/// holds, or the other tensor of the same experts, are to be quantized; both are then taken apart.
fn replaced_by(
    source: &Checkpoint,
    schemes: &BTreeMap<String, Scheme>,
    name: &str,
) -> Option<Vec<String>> {
    let modules = source.modules_of(name);
    let other = source.fused_with(name);
    let others = other.map(|other| source.modules_of(&other));
    let mut all = modules.iter().chain(others.iter().flatten());
    let is_replaced = all.any(|module| schemes.contains_key(module));
    is_replaced.then_some(modules)
}

/// Checks the plan against the source.
fn schemes_by_name(source: &Checkpoint, plan: &[ModulePlan]) -> Result<BTreeMap<String, Scheme>> {
    if source.quantization().is_some() {
        let what = format!(
            "{}: quantizing weights that are quantized",
            source.dir().display()
        );
        return Err(Error::Unsupported { what });
    }
    let mut schemes = BTreeMap::new();
    for ModulePlan { name, scheme } in plan {
        if name == "lm_head" || name.ends_with(".lm_head") {
            let what = format!("{name}: loaders cannot take a quantized output head");
            return Err(Error::Unsupported { what });
        }
        let (_, shape) = source.linear_info(name).ok_or_else(|| Error::Missing {
            what: format!("tensor {name}.weight"),
            place: source.dir().display().to_string(),
        })?;
        let [_, cols] = shape[..] else {
            let what = format!("{name}: quantizing a weight of shape {shape:?}");
            return Err(Error::Unsupported { what });
        };
        scheme.group_len(name, cols)?;
        if schemes.insert(name.clone(), *scheme).is_some() {
            return Err(Error::Invalid {
                what: name.clone(),
                why: "planned twice".into(),
            });
        }
    }
    match schemes.is_empty() {
        true => Err(Error::Invalid {
            what: "the plan".into(),
            why: "no module given, at least one expected".into(),
        }),
        false => Ok(schemes),
    }
}

/// Every tensor of the output.
fn tensor_specs(
    source: &Checkpoint,
    schemes: &BTreeMap<String, Scheme>,
) -> Result<Vec<TensorSpec>> {
    let mut specs = Vec::new();
    let plain = |name: &str, dtype: DType, shape: &[usize]| TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    for name in source.names() {
        let Some(modules) = replaced_by(source, schemes, name) else {
            let info = source.info(name);
            specs.extend(info.map(|info| plain(name, info.dtype, &info.shape)));
            continue;
        };
        for module in &modules {
            let Some((dtype, shape)) = source.linear_info(module) else {
                continue;
            };
            match (schemes.get(module), &shape[..]) {
                (Some(scheme), [rows, cols]) => {
                    specs.extend(packed_specs(module, *scheme, *rows, *cols)?);
                }
                _ => specs.push(plain(&format!("{module}.weight"), dtype, &shape)),
            }
        }
    }
    Ok(specs)
}

fn packed_specs(module: &str, scheme: Scheme, rows: usize, cols: usize) -> Result<Vec<TensorSpec>> {
    let words = |n| {
        words_for(n, scheme.bits()).ok_or_else(|| Error::Invalid {
            what: module.to_owned(),
            why: format!("{n} codes of {} bits overflow", scheme.bits()),
        })
    };
    let n_groups = cols / scheme.group_len(module, cols)?;
    let spec = |suffix: &str, dtype, shape: &[usize]| TensorSpec {
        name: format!("{module}.{suffix}"),
        dtype,
        shape: shape.to_vec(),
    };
    let scale_type = scale_dtype(scheme.scale_dtype());
    let mut specs = vec![
        spec("weight_packed", DType::I32, &[rows, words(cols)?]),
        spec("weight_scale", scale_type, &[rows, n_groups]),
        spec("weight_shape", DType::I64, &[2]),
    ];
    if !scheme.symmetric() {
        specs.push(spec(
            "weight_zero_point",
            DType::I32,
            &[words(rows)?, n_groups],
        ));
    }
    Ok(specs)
}

fn scale_dtype(dtype: ScaleDtype) -> DType {
    match dtype {
        ScaleDtype::Bf16 => DType::Bf16,
        ScaleDtype::F16 => DType::F16,
        ScaleDtype::F32 | ScaleDtype::Superblock => DType::F32,
    }
}

/// Bytes of int32 `[rows, ceil(cols·bits/32)]`.
fn packed_rows(codes: &[u8], cols: usize, bits: u8) -> Vec<u8> {
    let rows = codes.chunks_exact(cols);
    rows.flat_map(|row| pack(row, bits))
        .flat_map(u32::to_le_bytes)
        .collect()
}

/// Bytes of int32 `[ceil(rows·bits/32), n_groups]` for zero points `[rows, n_groups]`.
fn packed_columns(zero_points: &[u8], n_groups: usize, bits: u8) -> Vec<u8> {
    let columns: Vec<Vec<u32>> = (0..n_groups)
        .map(|group| {
            let column = zero_points.iter().skip(group).step_by(n_groups).copied();
            pack(&column.collect::<Vec<u8>>(), bits)
        })
        .collect();
    let n_words = columns.first().map_or(0, Vec::len);
    (0..n_words)
        .flat_map(|word| columns.iter().map(move |column| column[word]))
        .flat_map(u32::to_le_bytes)
        .collect()
}

/// Digest of the weight that the codes stand for, some rows at a time: the whole of it in f32 would
/// be the largest thing in memory beside the statistics.
fn digest(weight: &QuantizedWeight) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for start in (0..weight.rows()).step_by(DIGEST_ROWS) {
        let rows = weight.dequantize_rows(start..weight.rows().min(start + DIGEST_ROWS));
        let bytes: Vec<u8> = rows.data().iter().flat_map(|v| v.to_le_bytes()).collect();
        hasher.update(&bytes);
    }
    hasher.finalize()
}

/// Copies every file beside the weights but `config.json`, and names them.
pub(crate) fn copy_side_files(source: &Checkpoint, pending: &PendingFolder) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for path in source.side_files()? {
        let name = path.file_name().unwrap_or_default();
        let name = name.to_str().ok_or_else(|| Error::Unsupported {
            what: format!("{}: a file name that is not UTF-8", path.display()),
        })?;
        if name != CONFIG_FILE {
            pending.copy_from(source.dir(), name)?;
            copied.push(name.to_owned());
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests;
