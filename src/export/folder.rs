//! An output folder in the making: the source with some of its linears in another form.
//!
//! Tensors keep the source's names, `config.json` is the source's text with one key added, and all
//! other files are copied. A folder that is quantized already may be the source, if all of its
//! quantized linears are to be written: that is how one format becomes another ([`super::convert`]).
//!
//! Experts that the source keeps fused in one tensor are written one by one, by the names that
//! loaders of quantized mixtures know (`….experts.3.gate_proj.weight_packed`).

use super::config::config_text;
use super::layout::{Layout, Schemes};
use super::scales::{RoundedScales, with_scales_in};
use super::verify::verify_export;
use super::{Format, ModulePlan};
use crate::checkpoint::write::{ShardedWriter, TensorSpec};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, DType, PendingFolder};
use crate::{Error, QuantizedWeight, Result};
use std::collections::BTreeMap;

/// Files that repeat how weights are quantized, which is another way in another format.
pub(crate) const QUANTIZATION_FILES: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// Rows of a weight that are digested together.
const DIGEST_ROWS: usize = 64;

/// What was written.
#[derive(Clone, Debug, PartialEq)]
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
    /// What storing scales in the format's type changed.
    pub rounded_scales: RoundedScales,
    /// Readers of the format that do not take such modules, and why.
    pub notes: Vec<String>,
}

/// A folder in the making. Dropping it before [`Exporter::finish`] leaves nothing behind.
pub struct Exporter<'a> {
    source: &'a Checkpoint,
    layout: &'static dyn Layout,
    pending: PendingFolder,
    writer: ShardedWriter,
    contents: Contents,
    /// Digest of the numbers of each module written so far, as a reader gets them.
    digests: BTreeMap<String, blake3::Hash>,
    /// Digest of the bytes of each plain tensor that is not the source's.
    changed: BTreeMap<String, blake3::Hash>,
    rounded_scales: RoundedScales,
    config_text: String,
    files: Vec<(&'static str, String)>,
}

/// What of the source goes where.
struct Contents {
    /// The formats of the modules to be written, as they are stored.
    schemes: Schemes,
    /// Tensors that are there as in the source, or with other values.
    plain: Vec<String>,
    /// Experts that stay as they are, of a tensor in which others do not.
    loose: Vec<String>,
}

impl<'a> Exporter<'a> {
    /// Plans the folder and makes its files, with at most so many bytes of data in each, so that a
    /// bad plan and a place that cannot be written fail before any work.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Missing`] for a planned module without a weight; [`Error::Invalid`]
    /// for a plan that names a module twice, a group size that does not divide, or a set of modules
    /// that the format's configuration cannot tell apart, or a link among the source's files that
    /// must not be followed; [`Error::Unsupported`] for a source that
    /// has quantized modules of which the plan says nothing, a module that is no matrix, the
    /// `lm_head`, or a module that the format cannot hold, with the reason.
    pub fn create(
        source: &'a Checkpoint,
        format: Format,
        plan: &[ModulePlan],
        pending: PendingFolder,
        max_shard_bytes: u64,
    ) -> Result<Self> {
        if format == Format::Gguf {
            let what = "a folder of safetensors in GGUF: it has a writer of its own";
            return Err(Error::Unsupported { what: what.into() });
        }
        source.side_files()?;
        let (layout, schemes) = laid_out(source, format, plan)?;
        let entry = layout.config(source, &schemes)?;
        let config_text = config_text(source, entry.as_ref())?;
        let contents = Contents::new(source, schemes);
        let specs = contents.specs(source, layout)?;
        let writer = ShardedWriter::create(pending.path(), specs, max_shard_bytes)?;
        Ok(Self {
            source,
            layout,
            pending,
            writer,
            contents,
            digests: BTreeMap::new(),
            changed: BTreeMap::new(),
            rounded_scales: RoundedScales::default(),
            config_text,
            files: layout.files(entry.as_ref()),
        })
    }

    /// Writes one planned module, in any order, once. Its scales are stored in the type of the
    /// format; what that changes is told by [`Exported::rounded_scales`].
    ///
    /// # Errors
    /// [`Error::Missing`] if it was not planned, [`Error::Shape`] or [`Error::Invalid`] if it is
    /// not what was planned, [`Error::Unsupported`] if its scales do not fit, [`Error::Io`].
    pub fn write_module(&mut self, name: &str, weight: &QuantizedWeight) -> Result<()> {
        let planned = *self
            .contents
            .schemes
            .get(name)
            .ok_or_else(|| Error::Missing {
                what: format!("module {name}"),
                place: "the plan of this export".into(),
            })?;
        let dtype = planned.scale_dtype();
        let scheme = weight.scheme();
        if planned != scheme.with_scale_dtype(dtype) {
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
        let fitted = match scheme.scale_dtype() == dtype {
            true => None,
            false => Some(with_scales_in(
                name,
                weight,
                dtype,
                &mut self.rounded_scales,
            )?),
        };
        let weight = fitted.as_ref().unwrap_or(weight);
        let parts = self
            .layout
            .parts(name, planned, [weight.rows(), weight.cols()])?;
        for (part, bytes) in parts.iter().zip(self.layout.bytes(name, weight)?) {
            self.writer
                .write(&format!("{name}.{}", part.suffix), &bytes)?;
        }
        self.digests
            .insert(name.to_owned(), digest(weight, self.layout));
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
        let is_plain = self.contents.plain.iter().any(|plain| plain == name);
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

    /// Bytes of all tensors of the folder.
    pub fn tensor_bytes(&self) -> u64 {
        self.writer.total_bytes()
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
        let n_copied = self.copy_the_rest()?;
        let tensor_bytes = self.writer.finish()?;
        self.pending
            .write_file(CONFIG_FILE, self.config_text.as_bytes())?;
        for (name, text) in &self.files {
            self.pending.write_file(name, text.as_bytes())?;
        }
        let side_files = copy_side_files(self.source, &self.pending)?;
        let written = Checkpoint::open(self.pending.path())?;
        let is_rewritten = |module: &str| self.contents.schemes.contains_key(module);
        verify_export(&written, self.source, &self.changed, is_rewritten)?;
        for (name, expected) in &self.digests {
            if digest_of(&written, name)? != *expected {
                let why = "read back, its weight differs from what was written";
                return Err(Error::format(self.pending.path(), name, why));
            }
        }
        drop(written);
        self.pending.commit()?;
        let notes = self.layout.notes(self.source, &self.contents.schemes);
        Ok(Exported {
            notes,
            n_quantized: self.contents.schemes.len(),
            n_copied,
            changed: self.changed.into_keys().collect(),
            tensor_bytes,
            side_files,
            rounded_scales: self.rounded_scales,
        })
    }

    fn copy_the_rest(&mut self) -> Result<usize> {
        let mut n_copied = 0;
        let is_copied = |name: &&String| !self.changed.contains_key(*name);
        for name in self.contents.plain.iter().filter(is_copied) {
            if self.writer.is_open(name) {
                self.writer.write_pieces(name, self.source.pieces(name)?)?;
            }
            n_copied += 1;
        }
        for module in &self.contents.loose {
            let bytes = self.source.linear_bytes(module)?;
            self.writer.write(&format!("{module}.weight"), &bytes)?;
            n_copied += 1;
        }
        Ok(n_copied)
    }
}

impl Contents {
    fn new(source: &Checkpoint, schemes: Schemes) -> Self {
        let (mut plain, mut loose) = (Vec::new(), Vec::new());
        for name in source.names() {
            if source.packed_owner(name).is_some() {
                continue;
            }
            match replaced_by(source, &schemes, name) {
                None => plain.push(name.to_owned()),
                Some(modules) => {
                    let left = modules.into_iter().filter(|m| !schemes.contains_key(m));
                    loose.extend(left);
                }
            }
        }
        Self {
            schemes,
            plain,
            loose,
        }
    }

    /// Every tensor of the output.
    fn specs(&self, source: &Checkpoint, layout: &dyn Layout) -> Result<Vec<TensorSpec>> {
        let spec = |name: String, dtype: DType, shape: &[usize]| TensorSpec {
            name,
            dtype,
            shape: shape.to_vec(),
        };
        let mut specs = Vec::new();
        for name in &self.plain {
            let info = source.info(name);
            specs.extend(info.map(|info| spec(name.clone(), info.dtype, &info.shape)));
        }
        for module in &self.loose {
            let info = source.linear_info(module);
            let name = format!("{module}.weight");
            specs.extend(info.map(|(dtype, shape)| spec(name, dtype, &shape)));
        }
        for (module, scheme) in &self.schemes {
            let parts = layout.parts(module, *scheme, matrix_shape(source, module)?)?;
            let named = parts
                .into_iter()
                .map(|part| spec(format!("{module}.{}", part.suffix), part.dtype, &part.shape));
            specs.extend(named);
        }
        Ok(specs)
    }
}

/// The modules in whose stead the output has other tensors, if some of those that the tensor `name`
/// holds, or the other tensor of the same experts, are to be quantized; both are then taken apart.
fn replaced_by(source: &Checkpoint, schemes: &Schemes, name: &str) -> Option<Vec<String>> {
    let modules = source.modules_of(name);
    let other = source.fused_with(name);
    let others = other.map(|other| source.modules_of(&other));
    let mut all = modules.iter().chain(others.iter().flatten());
    let is_replaced = all.any(|module| schemes.contains_key(module));
    is_replaced.then_some(modules)
}

fn matrix_shape(source: &Checkpoint, module: &str) -> Result<[usize; 2]> {
    let (_, shape) = source.linear_info(module).ok_or_else(|| Error::Missing {
        what: format!("tensor {module}.weight"),
        place: source.dir().display().to_string(),
    })?;
    match shape[..] {
        [rows, cols] => Ok([rows, cols]),
        _ => Err(Error::Unsupported {
            what: format!("{module}: quantizing a weight of shape {shape:?}"),
        }),
    }
}

/// The format's layout for a plan, and the formats of modules as it stores them.
fn laid_out(
    source: &Checkpoint,
    format: Format,
    plan: &[ModulePlan],
) -> Result<(&'static dyn Layout, Schemes)> {
    let mut schemes = schemes_by_name(source, plan)?;
    let layout = format.layout(&schemes);
    if let Some(dtype) = layout.scale_dtype() {
        let stored = schemes.values_mut();
        stored.for_each(|scheme| *scheme = scheme.with_scale_dtype(dtype));
    }
    Ok((layout, schemes))
}

/// See [`Format::check`].
pub(super) fn check(source: &Checkpoint, format: Format, plan: &[ModulePlan]) -> Result<()> {
    let (layout, schemes) = laid_out(source, format, plan)?;
    layout.config(source, &schemes)?;
    Contents::new(source, schemes).specs(source, layout)?;
    Ok(())
}

/// Checks the plan against the source.
fn schemes_by_name(source: &Checkpoint, plan: &[ModulePlan]) -> Result<Schemes> {
    let planned = |module: &String| plan.iter().any(|planned| planned.name == *module);
    if let Some(module) = source.quantized_modules().iter().find(|m| !planned(m)) {
        return Err(Error::Unsupported {
            what: format!("{module}: quantizing a model that is quantized already"),
        });
    }
    let mut schemes = Schemes::new();
    for ModulePlan { name, scheme } in plan {
        if name == "lm_head" || name.ends_with(".lm_head") {
            let what = format!("{name}: loaders cannot take a quantized output head");
            return Err(Error::Unsupported { what });
        }
        let [_, cols] = matrix_shape(source, name)?;
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

/// Digest of the numbers that a reader of `layout` gets, some rows at a time: the whole of a weight
/// in f32 would be the largest thing in memory beside the statistics.
fn digest(weight: &QuantizedWeight, layout: &dyn Layout) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for start in (0..weight.rows()).step_by(DIGEST_ROWS) {
        let rows = weight.dequantize_rows(start..weight.rows().min(start + DIGEST_ROWS));
        add_values(&mut hasher, rows.data().iter().map(|v| layout.stored(*v)));
    }
    hasher.finalize()
}

/// The same of a module that was written.
fn digest_of(written: &Checkpoint, module: &str) -> Result<blake3::Hash> {
    if written.is_quantized(module) {
        let plain = &super::dense::F32;
        return Ok(digest(&written.packed_module(module)?, plain));
    }
    let name = format!("{module}.weight");
    let mut hasher = blake3::Hasher::new();
    for piece in written.pieces(&name)? {
        let dtype = written.info(&name).map(|info| info.dtype);
        let piece = piece?;
        let values = dtype.and_then(|dtype| dtype.f32_from_bytes(&piece));
        add_values(&mut hasher, values.unwrap_or_default().into_iter());
    }
    Ok(hasher.finalize())
}

fn add_values(hasher: &mut blake3::Hasher, values: impl Iterator<Item = f32>) {
    let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    hasher.update(&bytes);
}

/// Copies every file beside the weights but `config.json` and those that say how weights are
/// quantized, unless there is one of the same name already, and names them.
pub(crate) fn copy_side_files(source: &Checkpoint, pending: &PendingFolder) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for path in source.side_files()? {
        let name = source.side_name(&path)?;
        let is_copied = name != CONFIG_FILE && !QUANTIZATION_FILES.contains(&name.as_str());
        if is_copied && !pending.path().join(&name).exists() {
            pending.copy_from(source.dir(), &name)?;
            copied.push(name);
        }
    }
    Ok(copied)
}
