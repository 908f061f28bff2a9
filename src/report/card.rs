//! The model card, README.md of an output folder: how it was made, what was lost, what loads it.
//!
//! Nothing in it is a promise: losses are the run's own, scores those of an evaluation that was given,
//! commands those of the engines' documentation for what the folder holds.

mod base;
mod engines;

use super::RunReport;
use crate::checkpoint::Checkpoint;
use crate::export::gguf::GgufExported;
use crate::export::{Format, ModulePlan, plain_among_coded};
use crate::gguf::kind_of;
use crate::model::decoder_config::DecoderConfig;
use crate::plan::Scheme;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Name of the card in a folder.
pub const CARD_FILE: &str = "README.md";

/// Name under which the card of the model that was quantized is kept.
pub const BASE_CARD_FILE: &str = "README_base_model.md";

/// The line of a card's head that says who wrote it.
const OUR_TAG: &str = "- vlmq";

/// Modules that the card names for their loss.
const N_WORST: usize = 5;

/// What a card says where no evaluation was given.
const NOT_MEASURED: &str = "\nAnswers: not measured. `vlmq eval --json` measures them, and `vlmq export \
                            --evaluation` writes them here.\n";

/// What a card is made of.
pub struct Card<'c> {
    /// Name of the folder.
    pub name: &'c str,
    /// The folder that the weights or codes come from.
    pub source: &'c Checkpoint,
    /// Sizes of the decoder.
    pub decoder: &'c DecoderConfig,
    /// The quantized modules.
    pub plan: &'c [ModulePlan],
    /// How they are written.
    pub format: Format,
    /// What the run tells that made the codes, where it is known.
    pub report: Option<&'c RunReport>,
    /// What `vlmq eval --json` printed of the model, if it was asked.
    pub evaluation: Option<&'c Value>,
}

impl Card<'_> {
    /// The card as Markdown.
    pub fn text(&self) -> String {
        let is_coded = |name: &str| self.plan.iter().any(|module| module.name == name);
        let uneven = plain_among_coded(self.source, is_coded);
        [
            self.front_matter(),
            format!("# {}\n\n", self.name),
            self.how_it_was_made(),
            self.what_was_lost(),
            "## Running it\n".into(),
            engines::commands(self.name, self.format, self.plan, uneven.as_deref()),
            engines::tensor_parallel(self.decoder, self.plan, self.format),
            "\nThe vision tower, the embedding and the head are as they were.\n".into(),
        ]
        .concat()
    }

    /// The card of GGUF files.
    pub fn text_of_gguf(&self, written: &GgufExported) -> String {
        [
            self.front_matter(),
            format!("# {}\n\n", self.name),
            self.how_it_was_made(),
            self.bits_of_files(written),
            self.what_was_lost(),
            "## Running it\n".into(),
            engines::llama_cpp_commands(self.name, written),
            "\nThe vision tower, the embedding and the head are as they were.\n".into(),
        ]
        .concat()
    }

    fn front_matter(&self) -> String {
        let library = match self.format {
            Format::Mlx => "mlx",
            Format::Gguf => "gguf",
            _ => "transformers",
        };
        let mut text = format!(
            "---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\ntags:\n{OUR_TAG}\n\
             - {}\n",
            self.format.name()
        );
        if let Some(license) = of_base_card(self.source, "license") {
            let _ = writeln!(text, "license: {license}");
        }
        if let Some(base) = base::published_name(self.source) {
            let _ = write!(text, "base_model: {base}\nbase_model_relation: quantized\n");
        }
        text + "---\n"
    }

    fn how_it_was_made(&self) -> String {
        let mut text = String::from("## How it was made\n");
        if let Some(name) = self.base_name() {
            let _ = writeln!(text, "The model that was quantized is {name}.");
        }
        let weights: usize = self.plan.iter().map(|m| self.n_weights(m)).sum();
        let _ = writeln!(
            text,
            "The {} linears of the decoder, {:.1} million weights, are on grids of {}; {:.2} bits a \
             weight with scales and zero points.",
            self.plan.len(),
            weights as f64 / 1e6,
            grids(self.plan),
            self.bits_per_weight(),
        );
        if let Some(report) = self.report {
            let _ = write!(text, "Method `{}` of vlmq {}", report.method, report.vlmq);
            if let Some(calibration) = &report.calibration {
                let tokens: u64 = calibration.n_tokens.values().sum();
                let vision = calibration.n_tokens.get("vision").copied().unwrap_or(0);
                let _ = write!(
                    text,
                    ", calibrated on {} samples (seed {}) with {tokens} tokens, {vision} of them \
                     of images",
                    calibration.n_samples, calibration.seed
                );
            }
            text += ".\n";
            text += &settings(report);
        }
        text + "\n"
    }

    /// The name of the model that was quantized: as it was published, or that of its folder.
    fn base_name(&self) -> Option<String> {
        let folder = self.report.and_then(|report| report.source.as_ref());
        let published = base::published_name(self.source);
        let published = published.map(|id| format!("[{id}](https://huggingface.co/{id})"));
        published.or_else(|| folder.map(|source| format!("`{}`", source.name)))
    }

    /// What the blocks of GGUF take: more than the codes where a type has room to spare.
    fn bits_of_files(&self, written: &GgufExported) -> String {
        let mut bits = 0.0;
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for module in self.plan {
            let info = self.source.linear_info(&module.name);
            let cols = info.and_then(|(_, shape)| shape.last().copied());
            let kind = kind_of(&module.name, module.scheme, cols.unwrap_or_default());
            let Ok(kind) = kind else { continue };
            let per_weight = 8.0 * kind.block_bytes() as f64 / kind.block_len() as f64;
            bits += per_weight * self.n_weights(module) as f64;
            *kinds.entry(kind.name()).or_default() += 1;
        }
        let weights: usize = self.plan.iter().map(|m| self.n_weights(m)).sum();
        let kinds: Vec<String> = kinds
            .iter()
            .map(|(kind, n)| format!("{n} {kind}"))
            .collect();
        format!(
            "In `{}` they take {:.2} bits a weight ({}).\n\n",
            written.model.file,
            bits / f64::max(weights as f64, 1.0),
            kinds.join(", ")
        )
    }

    fn n_weights(&self, module: &ModulePlan) -> usize {
        let info = self.source.linear_info(&module.name);
        info.map_or(0, |(_, shape)| shape.iter().product())
    }

    fn bits_per_weight(&self) -> f64 {
        let of_module = |module: &ModulePlan| {
            let info = self.source.linear_info(&module.name);
            let cols = info.map_or(1, |(_, shape)| shape.last().copied().unwrap_or(1));
            let n = self.n_weights(module) as f64;
            (n, n * module.scheme.bits_per_weight(cols))
        };
        let sums = self.plan.iter().map(of_module);
        let (n, bits) = sums.fold((0.0, 0.0), |(n, bits), (m, b)| (n + m, bits + b));
        bits / f64::max(n, 1.0)
    }

    fn what_was_lost(&self) -> String {
        let mut text = String::new();
        if let Some(report) = self.report {
            text += &losses(report);
        }
        let scores = self.evaluation.map(scores).unwrap_or_default();
        text += match scores.is_empty() {
            true => NOT_MEASURED,
            false => &scores,
        };
        format!("## What was lost\n{text}\n")
    }
}

/// Whether a folder's card is one that we wrote.
pub fn is_our_card(dir: &Path) -> bool {
    let card = std::fs::read_to_string(dir.join(CARD_FILE)).unwrap_or_default();
    let head = card
        .strip_prefix("---\n")
        .and_then(|card| card.split_once("\n---"));
    head.is_some_and(|(head, _)| head.lines().any(|line| line == OUR_TAG))
}

/// The value of a key in the head of the card of the model that was quantized.
fn of_base_card(source: &Checkpoint, key: &str) -> Option<String> {
    let read = |name| std::fs::read_to_string(source.dir().join(name)).ok();
    of_head(&read(BASE_CARD_FILE).or_else(|| read(CARD_FILE))?, key)
}

/// The value of a key in the head of a card, if it is a plain word or several.
fn of_head(card: &str, key: &str) -> Option<String> {
    let (head, _) = card.strip_prefix("---\n")?.split_once("\n---")?;
    let of_key = |line: &str| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim().to_owned());
    let value = head.lines().find_map(of_key)?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._/ ".contains(c);
    (!value.is_empty() && value.chars().all(is_plain)).then_some(value)
}

/// The command of a run, or its settings where that is not known.
fn settings(report: &RunReport) -> String {
    match &report.command {
        Some(command) => format!("```\n{command}\n```\n"),
        None if report.settings.is_null() => String::new(),
        None => format!("Its settings:\n```json\n{:#}\n```\n", report.settings),
    }
}

/// The formats of modules in words, the most frequent first.
fn grids(plan: &[ModulePlan]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for module in plan {
        *counts.entry(in_words(module.scheme)).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    match counts.as_slice() {
        [(only, _)] => only.clone(),
        many => many
            .iter()
            .map(|(words, n)| format!("{words} ({n} of them)"))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

fn in_words(scheme: Scheme) -> String {
    let groups = match scheme.group_size() {
        Some(size) => format!("in groups of {size}"),
        None => "per output channel".into(),
    };
    let kind = if scheme.symmetric() {
        "symmetric"
    } else {
        "asymmetric"
    };
    format!("{} bits, {kind}, {groups}", scheme.bits())
}

/// The run's own measure: how much of the outputs' energy is lost, module by module.
fn losses(report: &RunReport) -> String {
    let mut losses: Vec<(f64, &str)> = report
        .modules
        .iter()
        .filter_map(|m| Some((m.relative_loss?, m.name.as_str())))
        .collect();
    if losses.is_empty() {
        return String::new();
    }
    losses.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mean = losses.iter().map(|(loss, _)| loss).sum::<f64>() / losses.len() as f64;
    let mut text = format!(
        "On the calibration samples a linear loses {mean:.1e} of its output's energy on average. \
         The most:\n\n| module | lost |\n|---|---|\n"
    );
    for (loss, name) in losses.iter().take(N_WORST) {
        let _ = writeln!(text, "| `{name}` | {loss:.1e} |");
    }
    if !report.deviations.is_empty() {
        let _ = writeln!(
            text,
            "\n{} things went otherwise than planned; `{}` lists them.",
            report.deviations.len(),
            super::REPORT_FILE
        );
    }
    text
}

/// The tasks of an evaluation.
fn scores(evaluation: &Value) -> String {
    let tasks = evaluation["tasks"].as_object().into_iter().flatten();
    let number = |value: &Value, digits: usize| {
        let number = value.as_f64();
        number.map_or(String::new(), |v| format!("{v:.digits$}"))
    };
    let rows: String = tasks
        .map(|(name, task)| {
            let accuracy = &task["accuracy"];
            let kl = match &task["kl_per_answer_token"] {
                Value::Null => &task["kl_per_token"],
                kl => kl,
            };
            format!(
                "| {} | {} | {} ({} to {}) | {} | {} |\n",
                name.replace(['|', '\n'], " "),
                accuracy["n"]
                    .as_u64()
                    .or(task["n_texts"].as_u64())
                    .unwrap_or(0),
                number(&accuracy["percent"], 1),
                number(&accuracy["interval"][0], 1),
                number(&accuracy["interval"][1], 1),
                number(&task["perplexity"], 3),
                number(kl, 4),
            )
        })
        .collect();
    match rows.is_empty() {
        true => String::new(),
        false => format!(
            "\nMeasured by `vlmq eval`; KL is the divergence from the original per answer token, in \
             nats.\n\n| task | n | right, % (95 %) | perplexity | KL |\n|---|---|---|---|---|\n{rows}"
        ),
    }
}
