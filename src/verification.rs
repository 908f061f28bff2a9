//! Looking at a quantized folder as its readers will, and at how far it is from its source.
//!
//! Every tensor is read. What is wrong is collected, not only the first of it: the rules of the
//! format ([`crate::export::verify`] and all that its configuration says of codes), the files that
//! a vision-language model cannot do without, and with a source all that should have stayed as it
//! was: plain tensors, the rest of the configuration, and every file beside the weights.

mod beside;

use crate::checkpoint::{Checkpoint, Quantization};
use crate::export::gguf::verify_gguf;
use crate::export::{Format, check_config, check_unchanged, weight_distance};
use crate::report::card::is_our_card;
use crate::report::{REPORT_FILE, RunReport};
use crate::{Matrix, Result};
use beside::differences_beside;
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Form of the weights; "none" if they are plain numbers.
    pub format: String,
    /// Modules that are stored as codes.
    pub n_quantized: usize,
    /// Other tensors.
    pub n_plain: usize,
    /// Everything that is wrong.
    pub problems: Vec<String>,
    /// Every module's distance from the source, the farthest first; empty without a source.
    pub modules: Vec<ModuleDistance>,
    /// Plain tensors that are not the source's, as the folder's own report says they would.
    pub changed: Vec<String>,
}

/// How far a module's weight Q is from the source's W.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleDistance {
    /// Checkpoint name.
    pub name: String,
    /// ‖W − Q‖ / ‖W‖, Frobenius.
    pub relative_error: f64,
    /// Largest |W − Q|.
    pub largest_error: f64,
}

/// Verifies a folder, against its `source` if there is one.
///
/// # Errors
/// Those of reading the source; whatever is wrong with the folder is a problem that is told.
pub fn verify_folder(written: &Checkpoint, source: Option<&Checkpoint>) -> Result<Verification> {
    let modules = written.quantized_modules();
    let mut problems: Vec<String> = read_everything(written);
    let report = own_report(written);
    let is_ours = report.is_some() || is_our_card(written.dir());
    problems.extend(check_config(written, is_ours));
    let changed = changed_tensors(&report);
    let dequantized = match modules.is_empty() {
        true => quantized_by(&report),
        false => BTreeSet::new(),
    };
    let mut distances = Vec::new();
    if let Some(source) = source {
        problems.extend(check_unchanged(written, source, &changed, &dequantized));
        problems.extend(differences_beside(written, source, is_ours)?);
        let compared = modules.iter().cloned().chain(dequantized);
        let in_both = |name: &String| source.linear_info(name).is_some();
        let compared: Vec<String> = compared.filter(in_both).collect();
        let found: Result<Vec<_>> = compared
            .into_par_iter()
            .map(|name| distance(written, source, name))
            .collect();
        distances = found?;
        distances.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
    }
    let is_plain = |name: &&str| written.packed_owner(name).is_none();
    Ok(Verification {
        format: written
            .quantization()
            .map_or("none", Quantization::name)
            .into(),
        n_quantized: modules.len(),
        n_plain: written.names().filter(is_plain).count(),
        problems,
        modules: distances,
        changed: changed.into_iter().collect(),
    })
}

/// What goes wrong when every tensor is read.
fn read_everything(written: &Checkpoint) -> Vec<String> {
    let modules = written.quantized_modules();
    let of_modules = modules.par_iter().filter_map(|module| {
        let shape = written.linear_info(module).map(|(_, shape)| shape);
        match shape.as_deref() {
            Some([rows, cols]) => written.linear_weight(module, *rows, *cols).err(),
            _ => written.packed_module(module).err(),
        }
    });
    let mut problems: Vec<String> = of_modules.map(|e| e.to_string()).collect();
    for name in written.names() {
        let Some(module) = written.packed_owner(name) else {
            problems.extend(written.check_finite(name).err().map(|e| e.to_string()));
            continue;
        };
        if !written.is_quantized(module) {
            problems.push(format!("{name}: there are no codes that belong to it"));
        }
    }
    problems
}

/// Verifies a folder of GGUF files, against its `source` if there is one.
///
/// # Errors
/// As [`verify_gguf`].
pub fn verify_gguf_folder(dir: &Path, source: Option<&Checkpoint>) -> Result<Verification> {
    let mut found = verify_gguf(dir, source)?;
    if let Some(source) = source {
        // Files that cannot be opened have been told already.
        match Checkpoint::open(dir) {
            Ok(written) => {
                let beside = differences_beside(&written, source, true)?;
                found.problems.extend(beside);
            }
            Err(error) if found.problems.is_empty() => found.problems.push(error.to_string()),
            Err(_) => {}
        }
    }
    let of_tensor = |(name, relative_error, largest_error)| ModuleDistance {
        name,
        relative_error,
        largest_error,
    };
    Ok(Verification {
        format: Format::Gguf.name().into(),
        n_quantized: found.n_quantized,
        n_plain: found.n_plain,
        problems: found.problems,
        modules: found.distances.into_iter().map(of_tensor).collect(),
        changed: Vec::new(),
    })
}

/// What the run tells that made the folder, if it is one of ours.
fn own_report(written: &Checkpoint) -> Option<RunReport> {
    let text = std::fs::read_to_string(written.dir().join(REPORT_FILE));
    serde_json::from_str(&text.ok()?).ok()
}

/// Plain tensors that it changed.
fn changed_tensors(report: &Option<RunReport>) -> BTreeSet<String> {
    let changed = report.iter().flat_map(|report| &report.changed);
    changed.map(|change| change.name.clone()).collect()
}

/// Modules that it quantized.
fn quantized_by(report: &Option<RunReport>) -> BTreeSet<String> {
    let modules = report.iter().flat_map(|report| &report.modules);
    let quantized = modules.filter(|module| module.scheme.is_some());
    quantized.map(|module| module.name.clone()).collect()
}

fn distance(written: &Checkpoint, source: &Checkpoint, name: String) -> Result<ModuleDistance> {
    let shape = source.linear_info(&name).map(|(_, shape)| shape);
    let [rows, cols] = shape.as_deref().unwrap_or_default() else {
        return Ok(ModuleDistance::of(name, &[], &[]));
    };
    let expected = source.linear_weight(&name, *rows, *cols)?;
    // What cannot be read has been told already.
    let found = written.linear_weight(&name, *rows, *cols);
    let found = found.unwrap_or_else(|_| Matrix::zeros(*rows, *cols));
    Ok(ModuleDistance::of(name, expected.data(), found.data()))
}

impl ModuleDistance {
    fn of(name: String, expected: &[f32], found: &[f32]) -> Self {
        let [relative_error, largest_error] = weight_distance(expected, found);
        Self {
            name,
            relative_error,
            largest_error,
        }
    }
}
