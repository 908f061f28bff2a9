//! Names of modules as loaders know them, and how those are told which modules have no codes.

use super::layout::Schemes;
use crate::checkpoint::Checkpoint;
use crate::{Error, Result};
use std::collections::BTreeSet;

/// Linears that engines run as one, after the name of the whole.
const RUN_AS_ONE: [(&str, &[&str]); 2] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
];

/// `lm_head` and patterns for every other matrix of the source that stays as it is.
///
/// A subtree without quantized modules is named by its topmost component (`re:.*visual.*`), which
/// every loader keeps; a single module by the part of its name that they all keep.
pub(super) fn ignore_patterns(source: &Checkpoint, schemes: &Schemes) -> Result<Vec<String>> {
    let mut patterns: BTreeSet<String> = ["re:.*lm_head$".to_owned()].into();
    for module in plain_matrices(source, |module| schemes.contains_key(module)) {
        let top = topmost_free(&module, schemes).map(|part| pattern(part, ".*"));
        if top.is_none_or(|p| !patterns.contains(&p)) {
            patterns.insert(ignore_pattern(&module, schemes)?);
        }
    }
    let mut ignore = vec!["lm_head".to_owned()];
    ignore.extend(patterns);
    Ok(ignore)
}

/// Every matrix of the source that is not to be quantized, by its module's name.
pub(super) fn plain_matrices(
    source: &Checkpoint,
    is_quantized: impl Fn(&str) -> bool,
) -> Vec<String> {
    let is_matrix = |module: &String| {
        let info = source.linear_info(module);
        info.is_some_and(|(_, shape)| shape.len() == 2)
    };
    let modules = source.names().flat_map(|name| source.modules_of(name));
    modules
        .filter(|module| !is_quantized(module) && is_matrix(module))
        .collect()
}

fn ignore_pattern(module: &str, schemes: &Schemes) -> Result<String> {
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
pub(super) fn topmost_free<'m>(module: &'m str, schemes: &Schemes) -> Option<&'m str> {
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

/// The name of a linear within its layer, `mlp.up_proj` of `model.layers.3.mlp.up_proj`.
pub(super) fn within_layer(module: &str) -> Option<&str> {
    let (_, rest) = stable_part(module).split_once('.')?;
    rest.split_once('.').map(|(_, within)| within)
}

/// A plain linear of the decoder whose like has codes in another layer.
pub(crate) fn plain_among_coded(
    source: &Checkpoint,
    is_coded: impl Fn(&str) -> bool,
) -> Option<String> {
    let modules = source.names().flat_map(|name| source.modules_of(name));
    let quantized = source.quantized_modules();
    let coded: BTreeSet<String> = modules.chain(quantized).filter(|m| is_coded(m)).collect();
    let layers = layers_of(coded.first()?);
    let coded_within: BTreeSet<&str> = coded.iter().filter_map(|m| within_layer(m)).collect();
    let mut plain = plain_matrices(source, |module| is_coded(module)).into_iter();
    plain.find(|module| {
        let within = within_layer(module);
        layers_of(module) == layers && within.is_some_and(|name| coded_within.contains(name))
    })
}

/// What is before the number of a module's layer, `model.layers` of `model.layers.3.mlp.up_proj`.
pub(super) fn layers_of(module: &str) -> &str {
    let numbered = stable_part(module);
    let word = numbered.split('.').next().unwrap_or_default();
    &module[..module.len() - numbered.len() + word.len()]
}

/// A regular expression, matched from the start of a name, that finds `part` behind any prefix;
/// `end` follows it.
pub(super) fn regex_for(part: &str, end: &str) -> String {
    format!(".*{}{end}", part.replace('.', "\\."))
}

/// The pattern of a module whose format is not the common one. Linears that vLLM and SGLang run as one
/// are asked for by the name of the whole, so that alike parts share a rule with it.
pub(super) fn rule_for(name: &str, schemes: &Schemes) -> String {
    let Some((parent, last)) = name.rsplit_once('.') else {
        return regex_for(name, "$");
    };
    let whole = RUN_AS_ONE.iter().find(|(_, parts)| parts.contains(&last));
    let of = |part: &&str| schemes.get(&format!("{parent}.{part}"));
    match whole {
        Some((whole, parts)) if parts.iter().all(|part| of(part) == schemes.get(name)) => {
            let names = [&[*whole], *parts].concat().join("|");
            regex_for(stable_part(&format!("{parent}.")), &format!("({names})$"))
        }
        _ => regex_for(stable_part(name), "$"),
    }
}

/// [`regex_for`], marked as compressed-tensors marks patterns.
pub(super) fn pattern(part: &str, end: &str) -> String {
    format!("re:{}", regex_for(part, end))
}

/// Regular expressions for `lm_head` and every other matrix of the source that stays as it is.
///
/// # Errors
/// As [`ignore_patterns`].
pub(super) fn unquantized_patterns(source: &Checkpoint, schemes: &Schemes) -> Result<Vec<String>> {
    let patterns = ignore_patterns(source, schemes)?;
    let patterns = patterns
        .iter()
        .filter_map(|entry| entry.strip_prefix("re:"));
    Ok(patterns.map(str::to_owned).collect())
}

/// Parts of names, found anywhere in a name, of every matrix that stays as it is.
///
/// # Errors
/// [`Error::Invalid`] for a module whose name is a part of a quantized module's.
pub(super) fn unquantized_parts(source: &Checkpoint, schemes: &Schemes) -> Result<Vec<String>> {
    let mut parts: BTreeSet<String> = ["lm_head".to_owned()].into();
    for module in plain_matrices(source, |module| schemes.contains_key(module)) {
        let candidates = [
            topmost_free(&module, schemes),
            Some(stable_part(&module)),
            Some(module.as_str()),
        ];
        let is_safe = |part: &&str| !schemes.keys().any(|name| name.contains(*part));
        let part = candidates.into_iter().flatten().find(is_safe);
        parts.insert(part.ok_or_else(|| part_of_another(&module))?.to_owned());
    }
    Ok(parts.into_iter().collect())
}

fn part_of_another(module: &str) -> Error {
    Error::Invalid {
        what: module.to_owned(),
        why: "cannot be left out, because its name is a part of a quantized module's".into(),
    }
}

/// An entry of an `ignore` list, as loaders read it.
pub(super) enum Ignore<'e> {
    Name(&'e str),
    Pattern(Option<regex::Regex>),
}

impl<'e> Ignore<'e> {
    pub(super) fn new(entry: &'e str) -> Self {
        match entry.strip_prefix("re:") {
            Some(p) => Self::pattern(p),
            None => Self::Name(entry),
        }
    }

    /// From a regular expression without a mark.
    pub(super) fn pattern(pattern: &str) -> Self {
        Self::Pattern(regex::Regex::new(&format!("^(?:{pattern})")).ok())
    }

    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::Name(name) => *name == module,
            Self::Pattern(regex) => regex.as_ref().is_some_and(|r| r.is_match(module)),
        }
    }
}
