//! `config.json` of a quantized folder: which modules have which number format, and which none.

use crate::checkpoint::{CONFIG_FILE, Checkpoint};
use crate::plan::Scheme;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Oldest compressed-tensors version whose packing is ours, written to `config.json`.
const FORMAT_VERSION: &str = "0.18.0";

/// The source's `config.json` with `quantization_config` as its last key, otherwise untouched.
pub(super) fn config_with_quantization(
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
pub(super) fn ignore_patterns(
    source: &Checkpoint,
    schemes: &BTreeMap<String, Scheme>,
) -> Result<Vec<String>> {
    let mut patterns: BTreeSet<String> = ["re:.*lm_head$".to_owned()].into();
    let is_matrix = |module: &String| {
        let info = source.linear_info(module);
        info.is_some_and(|(_, shape)| shape.len() == 2)
    };
    let modules = source.names().flat_map(|name| source.modules_of(name));
    for module in modules.filter(|m| !schemes.contains_key(m) && is_matrix(m)) {
        let top = topmost_free(&module, schemes).map(|part| pattern(part, ".*"));
        if top.is_none_or(|p| !patterns.contains(&p)) {
            patterns.insert(ignore_pattern(&module, schemes)?);
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
pub(super) fn topmost_free<'m>(
    module: &'m str,
    schemes: &BTreeMap<String, Scheme>,
) -> Option<&'m str> {
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
pub(super) fn stable_part(module: &str) -> &str {
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
pub(super) fn pattern(part: &str, end: &str) -> String {
    format!("re:.*{}{end}", part.replace('.', "\\."))
}

/// An entry of an `ignore` list, as loaders read it.
pub(super) enum Ignore<'e> {
    Name(&'e str),
    Pattern(Option<regex::Regex>),
}

impl<'e> Ignore<'e> {
    pub(super) fn new(entry: &'e str) -> Self {
        match entry.strip_prefix("re:") {
            Some(p) => Self::Pattern(regex::Regex::new(&format!("^(?:{p})")).ok()),
            None => Self::Name(entry),
        }
    }

    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => *name == module,
            Self::Pattern(regex) => regex.as_ref().is_some_and(|r| r.is_match(module)),
        }
    }
}
