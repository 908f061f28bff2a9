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
//! Format: vllm-project/compressed-tensors 0.20.0, `compressors/pack_quantized`. Its 3-bit words
//! are dense since 0.18.0, so that is the oldest version that reads 3-bit folders.

use super::ModulePlan;
use crate::checkpoint::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, DType, PendingFolder};
use crate::pack::{pack, words_for};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Matrix, QuantizedWeight, Result};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Oldest compressed-tensors version whose packing is ours, written to `config.json`.
const FORMAT_VERSION: &str = "0.18.0";

/// Rows of a weight that are digested together.
const DIGEST_ROWS: usize = 64;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Modules stored as codes.
    pub n_quantized: usize,
    /// Tensors copied unchanged.
    pub n_copied: usize,
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
        let info = self.source.info(&format!("{name}.weight"));
        let expected = info.map(|i| i.shape.clone()).unwrap_or_default();
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
            .filter(|n| !is_replaced(&self.schemes, n))
        {
            if self.writer.is_open(name) {
                self.writer.write_pieces(name, self.source.pieces(name)?)?;
            }
            n_copied += 1;
        }
        let tensor_bytes = self.writer.finish()?;
        self.pending
            .write_file(CONFIG_FILE, self.config_text.as_bytes())?;
        let side_files = copy_side_files(self.source, &self.pending)?;
        let written = Checkpoint::open(self.pending.path())?;
        verify_against(&written, self.source)?;
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
            tensor_bytes,
            side_files,
            ignore: self.ignore,
        })
    }
}

/// What [`verify`] looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Quantized modules whose tensors keep every rule of the format.
    pub n_quantized: usize,
    /// Other tensors.
    pub n_plain: usize,
}

/// Checks every quantized module of a written folder: names, types, shapes, spare bits, scales.
///
/// # Errors
/// The first breach, as [`Checkpoint::packed_module`]; [`Error::Unsupported`] if the folder is not
/// quantized; [`Error::Format`] for a quantization tensor that belongs to no packed module.
pub fn verify(written: &Checkpoint) -> Result<Verified> {
    let config = written.quantization().ok_or_else(|| Error::Unsupported {
        what: format!(
            "{}: config.json has no quantization_config",
            written.dir().display()
        ),
    })?;
    let ignored: Vec<Ignore> = config.ignore().iter().map(|e| Ignore::new(e)).collect();
    let mut seen = Verified {
        n_quantized: 0,
        n_plain: 0,
    };
    for name in written.names() {
        let Some((module, suffix)) = split_packed(name) else {
            seen.n_plain += 1;
            continue;
        };
        let fail = |why: &str| Error::format(written.dir(), format!("tensor {name}"), why);
        if !written.is_quantized(module) {
            return Err(fail("has no weight_packed beside it"));
        }
        if written.contains(&format!("{module}.weight")) {
            return Err(fail("there is a plain weight of the same module"));
        }
        if suffix == "weight_packed" {
            let packed = written.packed_module(module)?;
            check_zero_point_presence(written, module, &packed)?;
            seen.n_quantized += 1;
            if ignored.iter().any(|entry| entry.matches(module)) {
                return Err(fail("is quantized, but config.json ignores it"));
            }
        }
    }
    Ok(seen)
}

/// Checks that `written` is `source` with some weights quantized: [`verify`], and every tensor of
/// the source is there with the same bytes, or quantized with the same shape, and nothing else.
///
/// # Errors
/// As [`verify`], and [`Error::Format`], [`Error::Missing`] or [`Error::Shape`] for a difference.
pub fn verify_against(written: &Checkpoint, source: &Checkpoint) -> Result<Verified> {
    let seen = verify(written)?;
    for name in source.names() {
        let module = name.strip_suffix(".weight");
        if let Some(module) = module.filter(|m| written.is_quantized(m)) {
            let packed = written.packed_module(module)?;
            let shape = source.info(name).map(|info| info.shape.clone());
            let found = vec![packed.rows(), packed.cols()];
            if shape.as_ref() != Some(&found) {
                return Err(Error::Shape {
                    module: name.to_owned(),
                    expected: shape.unwrap_or_default(),
                    found,
                });
            }
        } else {
            check_copy(written, source, name)?;
        }
    }
    let is_known = |name: &&str| {
        let module = split_packed(name).map(|(module, _)| format!("{module}.weight"));
        source.contains(&module.unwrap_or_else(|| (*name).to_owned()))
    };
    match written.names().find(|name| !is_known(name)) {
        Some(name) => {
            let why = "is not in the source";
            Err(Error::format(written.dir(), format!("tensor {name}"), why))
        }
        None => Ok(seen),
    }
}

/// Checks that a module read back is bit for bit the weight that the solver meant.
///
/// # Errors
/// As [`Checkpoint::packed_module`]; [`Error::Format`] naming the first weight that differs.
pub fn verify_module(written: &Checkpoint, name: &str, expected: &Matrix) -> Result<()> {
    let found = written.linear_weight(name, expected.rows(), expected.cols())?;
    let pairs = found.data().iter().zip(expected.data());
    let bits = pairs.map(|(a, b)| (a.to_bits(), b.to_bits()));
    match bits.enumerate().find(|(_, (a, b))| a != b) {
        Some((i, _)) => {
            let (row, col) = (i / expected.cols(), i % expected.cols());
            let why = format!(
                "weight ({row}, {col}): expected {}, found {}",
                expected.data()[i],
                found.data()[i]
            );
            Err(Error::format(written.dir(), name, why))
        }
        None => Ok(()),
    }
}

fn check_copy(written: &Checkpoint, source: &Checkpoint, name: &str) -> Result<()> {
    let found = written.info(name).map(|i| (i.dtype, &i.shape));
    let expected = source.info(name).map(|i| (i.dtype, &i.shape));
    if found.is_some() && found != expected {
        let why = format!("expected {expected:?}, found {found:?}");
        return Err(Error::format(written.dir(), format!("tensor {name}"), why));
    }
    for (found, expected) in written.pieces(name)?.zip(source.pieces(name)?) {
        if found? != expected? {
            let why = "its bytes differ from the source's";
            return Err(Error::format(written.dir(), format!("tensor {name}"), why));
        }
    }
    Ok(())
}

fn check_zero_point_presence(
    written: &Checkpoint,
    module: &str,
    packed: &QuantizedWeight,
) -> Result<()> {
    let name = format!("{module}.weight_zero_point");
    if packed.scheme().symmetric() && written.contains(&name) {
        let why = "a symmetric scheme has no zero points";
        return Err(Error::format(written.dir(), format!("tensor {name}"), why));
    }
    Ok(())
}

/// Module and suffix of a tensor that belongs to the packed form of a weight.
fn split_packed(name: &str) -> Option<(&str, &str)> {
    const SUFFIXES: [&str; 4] = [
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
    ];
    name.rsplit_once('.')
        .filter(|(_, suffix)| SUFFIXES.contains(suffix))
}

fn is_replaced(schemes: &BTreeMap<String, Scheme>, name: &str) -> bool {
    name.strip_suffix(".weight")
        .is_some_and(|m| schemes.contains_key(m))
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
        let weight = format!("{name}.weight");
        let info = source.info(&weight).ok_or_else(|| Error::Missing {
            what: format!("tensor {weight}"),
            place: source.dir().display().to_string(),
        })?;
        let [_, cols] = info.shape[..] else {
            let what = format!("{name}: quantizing a weight of shape {:?}", info.shape);
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
    for name in source.names() {
        let Some(info) = source.info(name) else {
            continue;
        };
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match (schemes.get(module), &info.shape[..]) {
            (Some(scheme), [rows, cols]) if is_replaced(schemes, name) => {
                specs.extend(packed_specs(module, *scheme, *rows, *cols)?);
            }
            _ => specs.push(TensorSpec {
                name: name.to_owned(),
                dtype: info.dtype,
                shape: info.shape.clone(),
            }),
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
        ScaleDtype::F32 => DType::F32,
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

fn copy_side_files(source: &Checkpoint, pending: &PendingFolder) -> Result<Vec<String>> {
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

/// The source's `config.json` with `quantization_config` as its last key, otherwise untouched.
fn config_with_quantization(
    source: &Checkpoint,
    schemes: &BTreeMap<String, Scheme>,
    ignore: &[String],
) -> Result<String> {
    let config_path = source.dir().join(CONFIG_FILE);
    let added = quantization_config(schemes, ignore);
    let mut config = source.config().clone();
    let fail = |why: &str| Error::format(&config_path, "JSON", why);
    let object = config
        .as_object_mut()
        .ok_or_else(|| fail("expected an object"))?;
    // A null entry is the one thing that cannot be completed by adding text.
    if object.shift_remove("quantization_config").is_some() {
        object.insert("quantization_config".into(), added);
        return Ok(format!("{config:#}\n"));
    }
    let separator = if object.is_empty() { "\n" } else { ",\n" };
    object.insert("quantization_config".into(), added.clone());
    let body = source.config_text().trim_end().strip_suffix('}');
    let body = body
        .ok_or_else(|| fail("expected a closing '}'"))?
        .trim_end();
    let added = format!("{added:#}").replace('\n', "\n  ");
    let text = format!("{body}{separator}  \"quantization_config\": {added}\n}}\n");
    match serde_json::from_str::<Value>(&text) {
        Ok(parsed) if parsed == config => Ok(text),
        _ => Err(fail("cannot be completed by quantization_config")),
    }
}

/// The `quantization_config` object. The format that most modules have is the one for every
/// `Linear`; the modules of each other format are named by patterns.
fn quantization_config(schemes: &BTreeMap<String, Scheme>, ignore: &[String]) -> Value {
    let mut formats: Vec<(Scheme, Vec<&str>)> = Vec::new();
    for (name, scheme) in schemes {
        match formats.iter_mut().find(|(s, _)| s == scheme) {
            Some((_, names)) => names.push(name),
            None => formats.push((*scheme, vec![name])),
        }
    }
    formats.sort_by_key(|(_, names)| std::cmp::Reverse(names.len()));
    let mut groups = serde_json::Map::new();
    for (i, (scheme, names)) in formats.iter().enumerate() {
        let targets: Vec<String> = match i {
            0 => vec!["Linear".into()],
            _ => names.iter().map(|n| pattern(stable_part(n), "$")).collect(),
        };
        groups.insert(format!("group_{i}"), group_json(*scheme, targets));
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "global_compression_ratio": null,
        "version": FORMAT_VERSION,
    })
}

/// One entry of `config_groups`. `actorder` is null also for columns solved in another order:
/// the stored order is the natural one, so no loader has anything to do.
fn group_json(scheme: Scheme, targets: Vec<String>) -> Value {
    json!({
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits(),
            "type": "int",
            "symmetric": scheme.symmetric(),
            "strategy": if scheme.group_size().is_some() { "group" } else { "channel" },
            "group_size": scheme.group_size(),
            "block_structure": null,
            "dynamic": false,
            "actorder": null,
            "observer": "minmax",
            "observer_kwargs": {},
        },
        "input_activations": null,
        "output_activations": null,
        "format": "pack-quantized",
    })
}

/// `lm_head` and patterns for every other matrix of the source that stays as it is.
///
/// A subtree without quantized modules is named by its topmost component (`re:.*visual.*`), which
/// every loader keeps; a single module by the part of its name that they all keep.
fn ignore_patterns(source: &Checkpoint, schemes: &BTreeMap<String, Scheme>) -> Result<Vec<String>> {
    let mut patterns: BTreeSet<String> = ["re:.*lm_head$".to_owned()].into();
    for name in source.names() {
        let is_matrix = source.info(name).is_some_and(|info| info.shape.len() == 2);
        let module = name.strip_suffix(".weight").filter(|_| is_matrix);
        if let Some(module) = module.filter(|m| !schemes.contains_key(*m)) {
            let top = topmost_free(module, schemes).map(|part| pattern(part, ".*"));
            if top.is_none_or(|p| !patterns.contains(&p)) {
                patterns.insert(ignore_pattern(module, schemes)?);
            }
        }
    }
    let mut ignore = vec!["lm_head".to_owned()];
    ignore.extend(patterns);
    Ok(ignore)
}

fn ignore_pattern(module: &str, schemes: &BTreeMap<String, Scheme>) -> Result<String> {
    let tail = "($|\\.)";
    let candidates = [
        topmost_free(module, schemes).map(|part| pattern(part, ".*")),
        Some(pattern(stable_part(module), "$")),
        Some(pattern(module, tail)),
    ];
    let is_safe = |p: &String| {
        let entry = Ignore::new(p);
        !schemes.keys().any(|name| entry.matches(name))
    };
    candidates
        .into_iter()
        .flatten()
        .find(is_safe)
        .ok_or_else(|| Error::Invalid {
            what: module.to_owned(),
            why: "cannot be left out, because its name is the end of a quantized module's".into(),
        })
}

/// The last component of the shortest prefix of `module` that no quantized module has; `None` if
/// that is a number or the whole name.
fn topmost_free<'m>(module: &'m str, schemes: &BTreeMap<String, Scheme>) -> Option<&'m str> {
    let ends = module.match_indices('.').map(|(i, _)| i);
    let has_quantized = |prefix: &str| {
        let mut from = schemes.range(prefix.to_owned()..);
        from.next()
            .is_some_and(|(name, _)| name.starts_with(prefix))
    };
    let end = ends.into_iter().find(|i| !has_quantized(&module[..=*i]))?;
    let part = module[..end].rsplit('.').next()?;
    (!part.bytes().all(|b| b.is_ascii_digit())).then_some(part)
}

/// The name from the word before its first number on (`layers.3.mlp.up_proj`): what is before it
/// differs between loaders. The last component if there is no number.
fn stable_part(module: &str) -> &str {
    let mut word_start = 0;
    let mut start = 0;
    for part in module.split('.') {
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return &module[word_start..];
        }
        word_start = start;
        start += part.len() + 1;
    }
    &module[word_start..]
}

/// A pattern that finds `part` behind any prefix; `end` follows it.
fn pattern(part: &str, end: &str) -> String {
    format!("re:.*{}{end}", part.replace('.', "\\."))
}

/// An entry of an `ignore` list, as loaders read it.
enum Ignore<'e> {
    Name(&'e str),
    Pattern(Option<regex::Regex>),
}

impl<'e> Ignore<'e> {
    fn new(entry: &'e str) -> Self {
        match entry.strip_prefix("re:") {
            Some(p) => Self::Pattern(regex::Regex::new(&format!("^(?:{p})")).ok()),
            None => Self::Name(entry),
        }
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => *name == module,
            Self::Pattern(regex) => regex.as_ref().is_some_and(|r| r.is_match(module)),
        }
    }
}

#[cfg(test)]
mod tests;
