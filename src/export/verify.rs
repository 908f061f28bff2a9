//! Looking at a written folder with the eyes of whoever will read it.

mod config;
mod stored;

pub use config::check_config;

use super::names::Ignore;
use crate::checkpoint::{Checkpoint, Quantization};
use crate::{Error, Matrix, QuantizedWeight, Result};
use std::collections::{BTreeMap, BTreeSet};

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
    let quantization = written.quantization().ok_or_else(|| Error::Unsupported {
        what: format!(
            "{}: config.json speaks of no quantization",
            written.dir().display()
        ),
    })?;
    let ignored: Vec<Ignore> = match quantization {
        Quantization::CompressedTensors(q) => q.ignore().iter().map(|e| Ignore::new(e)).collect(),
        _ => Vec::new(),
    };
    let mut n_plain = 0;
    for name in written.names() {
        let Some(module) = written.packed_owner(name) else {
            n_plain += 1;
            continue;
        };
        let fail = |why: &str| Error::format(written.dir(), format!("tensor {name}"), why);
        if !written.is_quantized(module) {
            return Err(fail("has no codes beside it"));
        }
        let plain = format!("{module}.weight");
        if written.contains(&plain) && written.packed_owner(&plain).is_none() {
            return Err(fail("there is a plain weight of the same module"));
        }
    }
    let modules = written.quantized_modules();
    for module in &modules {
        let packed = written.packed_module(module)?;
        check_zero_point_presence(written, module, &packed)?;
        if ignored.iter().any(|entry| entry.matches(module)) {
            let why = "is quantized, but config.json ignores it";
            return Err(Error::format(written.dir(), module, why));
        }
    }
    Ok(Verified {
        n_quantized: modules.len(),
        n_plain,
    })
}

/// Checks that `written` is `source` with some weights quantized: [`verify`], and every tensor of
/// the source is there with the same bytes, or quantized with the same shape, and nothing else.
///
/// # Errors
/// As [`verify`], and [`Error::Format`], [`Error::Missing`] or [`Error::Shape`] for a difference.
pub fn verify_against(written: &Checkpoint, source: &Checkpoint) -> Result<Verified> {
    verify_changed(written, source, &BTreeMap::new())
}

/// As [`verify_against`], with plain tensors that were changed: each has the type and the shape of
/// the source's, and its bytes this digest. `source` may be quantized, and `written` may have plain
/// weights in their stead.
///
/// # Errors
/// As [`verify_against`].
pub fn verify_changed(
    written: &Checkpoint,
    source: &Checkpoint,
    changed: &BTreeMap<String, blake3::Hash>,
) -> Result<Verified> {
    verify_export(written, source, changed, |_| false)
}

/// As [`verify_changed`], of linears that `is_rewritten` only the shape: their numbers are other
/// ones than the source's, and somebody else looks at them.
pub(super) fn verify_export(
    written: &Checkpoint,
    source: &Checkpoint,
    changed: &BTreeMap<String, blake3::Hash>,
    is_rewritten: impl Fn(&str) -> bool,
) -> Result<Verified> {
    let seen = match written.quantization() {
        Some(_) => verify(written)?,
        None => Verified {
            n_quantized: 0,
            n_plain: written.names().count(),
        },
    };
    let expected = |name: &str| changed.get(name).map_or(Expected::Same, Expected::Digest);
    check_source(written, source, expected, is_rewritten, |result| result)?;
    match written
        .names()
        .find(|name| !is_known(written, source, name))
    {
        Some(name) => {
            let why = "is not in the source";
            Err(Error::format(written.dir(), format!("tensor {name}"), why))
        }
        None => Ok(seen),
    }
}

/// What a plain tensor of the source should be in the folder.
enum Expected<'h> {
    /// The same bytes.
    Same,
    /// Bytes with this digest.
    Digest(&'h blake3::Hash),
    /// Any of the same type and shape.
    SameKind,
}

/// Gives `tell` what comes of each tensor and linear of the source, until it gives back an error.
fn check_source<'h>(
    written: &Checkpoint,
    source: &Checkpoint,
    expected: impl Fn(&str) -> Expected<'h>,
    is_rewritten: impl Fn(&str) -> bool,
    mut tell: impl FnMut(Result<()>) -> Result<()>,
) -> Result<()> {
    for name in source.names() {
        if source.packed_owner(name).is_some() {
            continue;
        }
        let modules = source.modules_of(name);
        let in_other_form = modules.iter().any(|module| is_rewritten(module));
        let is_plain = written.contains(name) && written.packed_owner(name).is_none();
        if !in_other_form && (is_plain || modules.is_empty()) {
            tell(check_plain(written, source, name, expected(name)))?;
            continue;
        }
        for module in &modules {
            tell(match is_rewritten(module) {
                true => check_shape(written, source, module),
                false => check_linear(written, source, module),
            })?;
        }
    }
    let quantized = source.quantized_modules();
    quantized
        .iter()
        .try_for_each(|module| tell(check_shape(written, source, module)))
}

/// A weight that the source has in another form: quantized with the same shape, or, of an expert,
/// by itself with the same values.
fn check_linear(written: &Checkpoint, source: &Checkpoint, module: &str) -> Result<()> {
    if written.is_quantized(module) {
        return check_shape(written, source, module);
    }
    let expected = source.linear_info(module);
    let found = written.linear_bytes(module)?;
    if written.linear_info(module) == expected && found == source.linear_bytes(module)? {
        return Ok(());
    }
    let why = "differs from its part of the source's tensor";
    Err(Error::format(
        written.dir(),
        format!("tensor {module}.weight"),
        why,
    ))
}

/// A weight of any form that has the source's shape.
fn check_shape(written: &Checkpoint, source: &Checkpoint, module: &str) -> Result<()> {
    let shape = |checkpoint: &Checkpoint| checkpoint.linear_info(module).map(|(_, shape)| shape);
    let (expected, found) = (shape(source), shape(written));
    let found = found.ok_or_else(|| Error::Missing {
        what: format!("the weight of {module}"),
        place: written.dir().display().to_string(),
    })?;
    match expected.as_ref() == Some(&found) {
        true => Ok(()),
        false => Err(Error::Shape {
            module: format!("{module}.weight"),
            expected: expected.unwrap_or_default(),
            found,
        }),
    }
}

/// What of `source` is not in `written` as it should be: plain tensors have the same bytes, unless
/// they are among `changed`, linears with codes and those that are `dequantized` the same shape, and
/// nothing is there that the source has not.
pub fn check_unchanged(
    written: &Checkpoint,
    source: &Checkpoint,
    changed: &BTreeSet<String>,
    dequantized: &BTreeSet<String>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let expected = |name: &str| match changed.contains(name) {
        true => Expected::SameKind,
        false => Expected::Same,
    };
    let is_rewritten = |module: &str| dequantized.contains(module);
    let told = check_source(written, source, expected, is_rewritten, |result| {
        problems.extend(result.err().map(|e| e.to_string()));
        Ok(())
    });
    problems.extend(told.err().map(|e| e.to_string()));
    let unknown = written
        .names()
        .filter(|name| !is_known(written, source, name));
    let added = unknown.map(|name| format!("tensor {name}: is not in the source"));
    let added: Vec<String> = added.collect();
    problems.extend(added);
    problems
}

/// How far the numbers of a weight, `found`, are from those `expected`: ‖W − Q‖ / ‖W‖, and the largest
/// |W − Q|.
pub(crate) fn distance(expected: &[f32], found: &[f32]) -> [f64; 2] {
    let (mut error, mut norm, mut largest) = (0f64, 0f64, 0f64);
    for (w, q) in expected.iter().zip(found) {
        let difference = (f64::from(*w) - f64::from(*q)).abs();
        error += difference * difference;
        norm += f64::from(*w) * f64::from(*w);
        largest = largest.max(difference);
    }
    let relative = match error == 0.0 {
        true => 0.0,
        false => (error / norm).sqrt(),
    };
    [relative, largest]
}

/// A tensor has the type and shape of the source's.
fn check_same_kind(written: &Checkpoint, source: &Checkpoint, name: &str) -> Result<()> {
    let found = written.info(name).map(|i| (i.dtype, &i.shape));
    let expected = source.info(name).map(|i| (i.dtype, &i.shape));
    match found == expected {
        true => Ok(()),
        false => {
            let why = format!("expected {expected:?}, found {found:?}");
            Err(Error::format(written.dir(), format!("tensor {name}"), why))
        }
    }
}

/// Whether a tensor of a folder is one of the source's, or stands for one.
fn is_known(written: &Checkpoint, source: &Checkpoint, name: &str) -> bool {
    let module = written
        .packed_owner(name)
        .or_else(|| name.strip_suffix(".weight"));
    source.contains(name) || module.is_some_and(|m| source.linear_info(m).is_some())
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

/// A plain tensor is what it should be.
fn check_plain(
    written: &Checkpoint,
    source: &Checkpoint,
    name: &str,
    expected: Expected,
) -> Result<()> {
    if written.contains(name) || matches!(expected, Expected::SameKind) {
        check_same_kind(written, source, name)?;
    }
    if matches!(expected, Expected::SameKind) {
        return Ok(());
    }
    if let Expected::Digest(expected) = expected {
        let mut found = blake3::Hasher::new();
        for piece in written.pieces(name)? {
            found.update(&piece?);
        }
        return match found.finalize() == *expected {
            true => Ok(()),
            false => {
                let why = "read back, it differs from what it was changed to";
                Err(Error::format(written.dir(), format!("tensor {name}"), why))
            }
        };
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
