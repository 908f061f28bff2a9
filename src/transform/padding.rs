//! The MLPs of a model made wider by channels of zeros, in a new folder of the same form, so that
//! engines can share them out (tensor parallelism) in parts of whole groups:
//! ```text
//! gate up   [inner, hidden]   rows of zeros below, and zeros behind a bias
//! down      [hidden, inner]   columns of zeros to the right
//! ```
//! The added channels are act(0)·0 = 0 for every token, and down adds nothing of them: the function is
//! the same for every activation that is 0 at 0, as SiLU and GELU are. Known case: the language model of
//! Qwen2.5-VL-72B and InternVL3-78B is 29,568 = 231 · 128 wide inside, which no power of two shares out in
//! groups of 128; 29,696 = 232 · 128 goes up to eight.
//!
//! Attention is shared out by heads, which cannot be added so; where their number does not divide, that is
//! an error.

use crate::checkpoint::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, PendingFolder};
use crate::export::copy_side_files;
use crate::families;
use crate::model::ModelSource;
use crate::model::projection::Projection;
use crate::{Error, Result};
use candle_core::Device;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The key of the width in the configuration of a language model.
const KEY: &str = "intermediate_size";

/// For whom a model is padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaddingSettings {
    /// Devices that share the model.
    pub n_devices: usize,
    /// Columns that must stay together: the group size, or what a kernel wants.
    pub group_size: usize,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Padded {
    /// Inner width of the MLPs before.
    pub from: usize,
    /// Inner width now.
    pub to: usize,
    /// Tensors that were made larger.
    pub n_changed: usize,
    /// Tensors copied unchanged.
    pub n_copied: usize,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

/// Which side of a tensor grows.
#[derive(Clone, Copy)]
enum Side {
    Rows,
    Columns,
}

/// Writes `model` with its MLPs as wide as they must be into the new folder `output`.
///
/// # Errors
/// [`Error::Invalid`] for no devices or groups, if nothing has to be padded, or if the heads do not
/// divide; [`Error::Unsupported`] for a mixture of experts or a quantized model; [`Error::Shape`] for a
/// tensor of another width than the configuration's; [`Error::Exists`] if `output` is there already;
/// [`Error::Io`]. Nothing is left behind then.
pub fn pad_folder(model: &ModelSource, settings: PaddingSettings, output: &Path) -> Result<Padded> {
    let from = model.decoder().intermediate_size;
    let to = padded_width(model, settings)?;
    let source = model.checkpoint();
    let grown = grown(model);
    let pending = PendingFolder::create(output)?;
    let specs = specs(source, &grown, [from, to])?;
    let mut writer = ShardedWriter::create(pending.path(), specs.clone(), MAX_SHARD_BYTES)?;
    for spec in specs.iter() {
        match grown.get(&spec.name) {
            Some(side) => writer.write_pieces(&spec.name, padded(source, spec, *side, from)?)?,
            None => writer.write_pieces(&spec.name, source.pieces(&spec.name)?)?,
        }
    }
    let tensor_bytes = writer.finish()?;
    pending.write_file(CONFIG_FILE, config(model, [from, to])?.as_bytes())?;
    copy_side_files(source, &pending)?;
    // Read as any model would be, which looks at every shape, before it gets its name.
    let written = Checkpoint::open(pending.path())?;
    families::open_model(written, Device::Cpu)?.load_head()?;
    pending.commit()?;
    Ok(Padded {
        from,
        to,
        n_changed: grown.len(),
        n_copied: specs.len() - grown.len(),
        tensor_bytes,
    })
}

/// The least width that divides, which is more than the present one.
fn padded_width(model: &ModelSource, settings: PaddingSettings) -> Result<usize> {
    let decoder = model.decoder();
    let PaddingSettings {
        n_devices,
        group_size,
    } = settings;
    let invalid = |what: &str, why: String| Error::Invalid {
        what: what.to_owned(),
        why,
    };
    if model.checkpoint().quantization().is_some() {
        let what = "padding of quantized weights; pad the original, then quantize it";
        return Err(Error::Unsupported { what: what.into() });
    }
    if decoder.experts.is_some() {
        let what = "padding of mixtures of experts, which engines share out by expert";
        return Err(Error::Unsupported { what: what.into() });
    }
    let unit = n_devices.checked_mul(group_size).filter(|unit| *unit > 0);
    let unit = unit.ok_or_else(|| {
        let why =
            format!("{n_devices} devices and groups of {group_size} given, 1 or more expected");
        invalid("padding", why)
    })?;
    if !decoder.n_heads.is_multiple_of(n_devices) {
        let why = format!("heads do not divide into {n_devices}, and cannot be added");
        return Err(invalid(&format!("{} heads", decoder.n_heads), why));
    }
    let width = decoder.intermediate_size;
    let to = width.checked_next_multiple_of(unit).unwrap_or(width);
    match to > width {
        true => Ok(to),
        false => Err(invalid(
            &format!("MLPs of width {width}"),
            format!("they divide into {n_devices} parts of whole {group_size}s as they are"),
        )),
    }
}

/// The tensors that grow.
fn grown(model: &ModelSource) -> BTreeMap<String, Side> {
    let mut grown = BTreeMap::new();
    for module in model.modules() {
        let side = match module.slot.projection {
            Projection::Gate | Projection::Up => Side::Rows,
            Projection::Down => Side::Columns,
            _ => continue,
        };
        grown.insert(format!("{}.weight", module.name), side);
        let bias = format!("{}.bias", module.name);
        if matches!(side, Side::Rows) && model.checkpoint().contains(&bias) {
            grown.insert(bias, side);
        }
    }
    grown
}

fn specs(
    source: &Checkpoint,
    grown: &BTreeMap<String, Side>,
    [from, to]: [usize; 2],
) -> Result<Vec<TensorSpec>> {
    if let Some(absent) = grown.keys().find(|name| !source.contains(name)) {
        return Err(Error::Missing {
            what: format!("tensor {absent}"),
            place: source.dir().display().to_string(),
        });
    }
    let names = source.names();
    let infos = names.filter_map(|name| Some((name, source.info(name)?)));
    let spec = |(name, info): (&str, &crate::checkpoint::TensorInfo)| {
        let mut shape = info.shape.clone();
        let side = grown.get(name).map(|side| match side {
            Side::Rows => 0,
            Side::Columns => shape.len().saturating_sub(1),
        });
        if let Some(side) = side {
            match shape.get_mut(side) {
                Some(length) if *length == from => *length = to,
                _ => {
                    return Err(Error::Shape {
                        module: format!("{name}, whose side {side} is the MLP's width"),
                        expected: vec![from],
                        found: info.shape.clone(),
                    });
                }
            }
        }
        Ok(TensorSpec {
            name: name.to_owned(),
            dtype: info.dtype,
            shape,
        })
    };
    infos.map(spec).collect()
}

/// The bytes of a tensor with zeros added, some at a time: a zero is zero bytes in every type.
fn padded<'a>(
    source: &'a Checkpoint,
    spec: &'a TensorSpec,
    side: Side,
    from: usize,
) -> Result<Box<dyn Iterator<Item = Result<Vec<u8>>> + 'a>> {
    let n_bytes = spec.dtype.n_bytes();
    let whole = spec.shape.iter().product::<usize>() * n_bytes;
    let width = spec.shape.last().copied().unwrap_or(1) * n_bytes;
    match side {
        Side::Rows => {
            let length = spec.shape.first().copied().unwrap_or(1);
            let zeros = whole / length.max(1) * (length - from);
            let own = source.pieces(&spec.name)?;
            Ok(Box::new(own.chain([Ok(vec![0; zeros])])))
        }
        Side::Columns => {
            let own = from * n_bytes;
            let n_rows = whole / width.max(1);
            let name = spec.name.clone();
            Ok(Box::new((0..n_rows).map(move |row| {
                let bytes = source.bytes_at(&name, row * own..(row + 1) * own)?;
                let mut bytes = bytes.unwrap_or_default();
                bytes.resize(width, 0);
                Ok(bytes)
            })))
        }
    }
}

/// `config.json` with the new width where the language model's was.
fn config(model: &ModelSource, [from, to]: [usize; 2]) -> Result<String> {
    let source = model.checkpoint();
    let mut config = source.config().clone();
    let mut n_set = 0;
    let mut set = |part: Option<&mut serde_json::Value>| {
        let value = part.and_then(|part| part.get_mut(KEY));
        if let Some(value) = value.filter(|value| value.as_u64() == Some(from as u64)) {
            *value = to.into();
            n_set += 1;
        }
    };
    for part in ["text_config", "llm_config"] {
        set(config.get_mut(part));
    }
    set(Some(&mut config));
    match n_set {
        0 => Err(Error::format(
            &source.dir().join(CONFIG_FILE),
            KEY,
            format!("{from} expected, not found where the language model has it"),
        )),
        _ => Ok(format!("{config:#}\n")),
    }
}
