//! What a folder's configuration says of its codes, held against what is stored.
//!
//! Of a folder of ours all of it is known: it is made anew from the tensors' formats and compared
//! key by key. Of another tool's folder each module's bits, groups and symmetry are looked up as
//! the format's readers do, and what they would take for codes or leave out.

use super::stored::{Said, Stored, Zeros};
use crate::checkpoint::{Checkpoint, Quantization, name_in_memory};
use crate::export::layout::{ConfigEntry, Layout, Schemes};
use crate::export::names::{Ignore, layers_of, plain_matrices};
use crate::export::{Format, difference::differences, gptq};
use crate::plan::{ScaleDtype, Scheme};
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;

/// What differs from folder to folder without harm: which version of vlmq wrote it.
const OF_THE_MAKER: &str = "quantization_config.meta";

/// What in a folder's configuration is not as its tensors are; `is_ours` if vlmq wrote it.
pub fn check_config(written: &Checkpoint, is_ours: bool) -> Vec<String> {
    let modules = written.quantized_modules();
    let quantization = match written.quantization() {
        // Whose files say everything of their codes.
        None | Some(Quantization::Gguf(_)) => return Vec::new(),
        Some(quantization) => quantization,
    };
    if modules.is_empty() {
        return vec!["config.json speaks of a quantization, and no module has codes".into()];
    }
    let stored: BTreeMap<String, Stored> = modules
        .into_iter()
        .filter_map(|module| Some((module.clone(), Stored::of(written, &module)?)))
        .collect();
    let mut problems = left_out(written, quantization, &stored);
    match is_ours {
        true => problems.extend(against_ours(written, quantization, &stored)),
        false => {
            problems.extend(formats(written, quantization, &stored));
            problems.extend(keys(written, quantization));
        }
    }
    problems.extend(second_config(written));
    problems
}

/// The difference to what vlmq writes for such tensors.
fn against_ours(
    written: &Checkpoint,
    quantization: &Quantization,
    stored: &BTreeMap<String, Stored>,
) -> Vec<String> {
    let expected = schemes(written, quantization, stored)
        .and_then(|(layout, schemes)| Ok((layout, layout.config(written, &schemes)?)));
    let (layout, entry) = match expected {
        Ok((layout, Some(entry))) => (layout, entry),
        Ok((_, None)) => return Vec::new(),
        Err(error) => return vec![error.to_string()],
    };
    let ConfigEntry { key, value } = &entry;
    let found = written.config().get(*key).unwrap_or(&Value::Null);
    let mut problems = differences(key, value, found);
    problems.retain(|problem| !problem.starts_with(OF_THE_MAKER));
    for (name, _) in layout.files(Some(&entry)) {
        if !written.dir().join(name).exists() {
            problems.push(format!("{name}: is not there, and some readers ask for it"));
        }
    }
    problems
}

/// The number formats of all modules as our writer was given them, and the layout for them. Where
/// tensors leave something open, it is as the configuration says.
fn schemes(
    written: &Checkpoint,
    quantization: &Quantization,
    stored: &BTreeMap<String, Stored>,
) -> Result<(&'static dyn Layout, Schemes)> {
    let mut schemes = Schemes::new();
    for (module, stored) in stored {
        let said = Said::of(quantization, written.config(), module);
        let group_size = said.and_then(|said| said.group_size);
        let group_size = group_size.filter(|size| stored.has_groups(*size));
        let group_size = group_size.unwrap_or(stored.group_size());
        let symmetric = match stored.zeros {
            Zeros::Absent | Zeros::BelowMiddle => true,
            Zeros::Middle => said.and_then(|said| said.symmetric).unwrap_or(true),
            Zeros::Other => false,
        };
        let bits = stored.bits.ok_or_else(|| Error::Invalid {
            what: module.clone(),
            why: "has words for codes of 2, 3, 4 or 8 bits expected".into(),
        })?;
        let group_size = usize::try_from(group_size).ok();
        let dtype = match quantization {
            Quantization::CompressedTensors(_) => scale_dtype(written, module),
            _ => ScaleDtype::F16,
        };
        schemes.insert(
            module.clone(),
            Scheme::new(bits, group_size, symmetric, dtype)?,
        );
    }
    let format = match quantization {
        Quantization::CompressedTensors(_) | Quantization::Gguf(_) => Format::CompressedTensors,
        Quantization::Awq(_) => Format::Awq,
        Quantization::Mlx(_) => Format::Mlx,
        Quantization::Gptq(_) => Format::Gptq,
    };
    let are_less = |stored: &Stored| stored.zeros == Zeros::BelowMiddle;
    let layout: &dyn Layout = match format {
        // A v2 folder may have symmetric grids only.
        Format::Gptq if !stored.values().all(are_less) => &gptq::V2,
        format => format.layout(&schemes),
    };
    Ok((layout, schemes))
}

fn scale_dtype(written: &Checkpoint, module: &str) -> ScaleDtype {
    let info = written.info(&format!("{module}.weight_scale"));
    match info.map(|info| info.dtype.name()) {
        Some("BF16") => ScaleDtype::Bf16,
        Some("F16") => ScaleDtype::F16,
        _ => ScaleDtype::F32,
    }
}

/// Modules whose format is another than the configuration says, one line for each way.
fn formats(
    written: &Checkpoint,
    quantization: &Quantization,
    stored: &BTreeMap<String, Stored>,
) -> Vec<String> {
    let mut told: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (module, stored) in stored {
        for problem in format_of(written, quantization, module, *stored) {
            told.entry(problem).or_default().push(module);
        }
    }
    let line = |(problem, modules): (String, Vec<&str>)| match modules[..] {
        [only] => format!("{only}: {problem}"),
        [first, ..] => format!("{first} and {} others: {problem}", modules.len() - 1),
        [] => problem,
    };
    told.into_iter().map(line).collect()
}

fn format_of(
    written: &Checkpoint,
    quantization: &Quantization,
    module: &str,
    stored: Stored,
) -> Vec<String> {
    let Some(said) = Said::of(quantization, written.config(), module) else {
        return match quantization {
            Quantization::CompressedTensors(_) => {
                vec!["config_groups: no target means it, and it is quantized".into()]
            }
            // Left out by a rule, which is told as such.
            _ => Vec::new(),
        };
    };
    let mut problems = Vec::new();
    if said.bits != stored.bits.map(u64::from) {
        let expected = stored
            .bits
            .map_or("no known number".into(), |b| b.to_string());
        problems.push(told("bits", &expected, said.bits));
    }
    if !said.group_size.is_some_and(|size| stored.has_groups(size)) {
        let expected = stored.group_size().to_string();
        problems.push(told("group_size", &expected, said.group_size));
    }
    let is_v2 = match quantization {
        Quantization::Gptq(q) => Some(q.is_v2),
        _ => None,
    };
    problems.extend(match (said.symmetric, stored.zeros, is_v2) {
        (Some(true), Zeros::BelowMiddle, Some(true)) => {
            let expected = "\"gptq\", zero points less one";
            Some(told("checkpoint_format", expected, Some("\"gptq_v2\"")))
        }
        (Some(true), Zeros::Middle, Some(false)) => {
            let expected = "\"gptq_v2\", zero points as they are";
            Some(told("checkpoint_format", expected, Some("\"gptq\"")))
        }
        (Some(true), Zeros::Other, _) => {
            Some(told("symmetric", "an asymmetric grid", Some("true")))
        }
        (Some(false), Zeros::Absent, _) => {
            Some(told("symmetric", "a symmetric grid", Some("false")))
        }
        _ => None,
    });
    problems
}

fn told(key: &str, expected: &str, found: Option<impl std::fmt::Display>) -> String {
    let found = found.map_or("nothing".into(), |found| found.to_string());
    format!("{key}: its tensors are of {expected}, found {found}")
}

/// Keys that speak of the whole folder, against what is there.
fn keys(written: &Checkpoint, quantization: &Quantization) -> Vec<String> {
    let config = &written.config()["quantization_config"];
    let has = |suffix: &str| written.names().any(|name| name.ends_with(suffix));
    let mut problems = Vec::new();
    match quantization {
        Quantization::Gptq(_) => {
            if config["lm_head"] == true && !has("lm_head.qweight") {
                problems.push("lm_head: expected false, for there are no codes of it".into());
            }
            let scattered = |module: &String| {
                let read = written.packed_module(module);
                matches!(read, Err(Error::Unsupported { .. }))
            };
            let is_unsaid = config["desc_act"] != true;
            if is_unsaid && written.quantized_modules().iter().any(scattered) {
                problems.push("desc_act: expected true, for columns of a group are apart".into());
            }
        }
        Quantization::Awq(_) => {
            if config["zero_point"] == false && has(".qzeros") {
                problems.push("zero_point: expected true, for there are zero points".into());
            }
        }
        Quantization::CompressedTensors(_) => {
            let groups = config["config_groups"].as_object().into_iter().flatten();
            let orders = groups.filter(|(_, group)| group["weights"]["actorder"] == "group");
            problems.extend(orders.map(|(name, _)| {
                let there = match has(".weight_g_idx") {
                    true => "which vlmq does not follow",
                    false => "for which there is no weight_g_idx",
                };
                format!("config_groups.{name}.weights.actorder: \"group\", {there}")
            }));
        }
        Quantization::Mlx(_) | Quantization::Gguf(_) => {}
    }
    problems
}

/// Modules that have codes and are said to have none, and plain matrices of which nothing says that
/// they are.
fn left_out(
    written: &Checkpoint,
    quantization: &Quantization,
    stored: &BTreeMap<String, Stored>,
) -> Vec<String> {
    let left_out = LeftOut::of(quantization, written.config());
    let coded = stored
        .keys()
        .filter(|name| left_out.has(name) == Some(true));
    let mut problems: Vec<String> = coded
        .map(|name| format!("{name}: is quantized, but config.json leaves it out"))
        .collect();
    let plain = plain_matrices(written, |module| written.is_quantized(module));
    // An embedding is no linear, and no loader takes it for one.
    let is_linear = |name: &&String| {
        let last = name.rsplit('.').next();
        !last.is_some_and(|last| last.contains("emb"))
    };
    let layers = stored.keys().next().map(|first| layers_of(first));
    let taken = |name: &&String| match quantization {
        Quantization::CompressedTensors(q) => q.targeted(name).is_some(),
        // Their readers know that everything else is plain.
        _ => layers.is_some_and(|layers| layers_of(name) == layers),
    };
    let forgotten = plain.iter().filter(is_linear).filter(taken);
    let forgotten = forgotten.filter(|name| left_out.has(name) == Some(false));
    problems
        .extend(forgotten.map(|name| {
            format!("{name}: is not quantized, and config.json does not leave it out")
        }));
    problems
}

/// Which modules a configuration leaves out.
enum LeftOut<'c> {
    /// Names and patterns.
    Entries(Vec<Ignore<'c>>),
    /// Parts of names.
    Parts(Vec<&'c str>),
    /// It says nothing of that: tensors speak for themselves.
    Unsaid,
}

impl<'c> LeftOut<'c> {
    fn of(quantization: &'c Quantization, config: &'c Value) -> Self {
        let config = &config["quantization_config"];
        match quantization {
            Quantization::CompressedTensors(q) => {
                Self::Entries(q.ignore().iter().map(|e| Ignore::new(e)).collect())
            }
            Quantization::Gptq(_) => {
                let rules = config["dynamic"].as_object().into_iter().flatten();
                let patterns = rules.filter_map(|(rule, _)| rule.strip_prefix("-:"));
                let patterns: Vec<Ignore> = patterns.map(Ignore::pattern).collect();
                match patterns.is_empty() {
                    true => Self::Unsaid,
                    false => Self::Entries(patterns),
                }
            }
            Quantization::Awq(_) => match config["modules_to_not_convert"].as_array() {
                Some(parts) if !parts.is_empty() => {
                    Self::Parts(parts.iter().filter_map(Value::as_str).collect())
                }
                _ => Self::Unsaid,
            },
            Quantization::Mlx(_) | Quantization::Gguf(_) => Self::Unsaid,
        }
    }

    /// Whether it leaves this one out, if it says; other tools have names in memory, which begin
    /// otherwise.
    fn has(&self, module: &str) -> Option<bool> {
        match self {
            Self::Entries(entries) => {
                let in_memory = name_in_memory(module).unwrap_or(format!("model.{module}"));
                let is_meant = |e: &Ignore| e.matches(module) || e.matches(&in_memory);
                Some(entries.iter().any(is_meant))
            }
            Self::Parts(parts) => Some(parts.iter().any(|part| module.contains(part))),
            Self::Unsaid => None,
        }
    }
}

/// `quantize_config.json`, which some readers of GPTQ ask first, must say the same.
fn second_config(written: &Checkpoint) -> Option<String> {
    let text = std::fs::read_to_string(written.dir().join("quantize_config.json")).ok()?;
    let found = serde_json::from_str::<Value>(&text).ok();
    let expected = written.config().get("quantization_config");
    (found.as_ref() != expected)
        .then(|| "quantize_config.json: differs from config.json's quantization_config".into())
}
