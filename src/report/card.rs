//! The model card, README.md of an output folder: how it was made, what was lost, what loads it.
//!
//! Nothing in it is a promise: losses are the run's own, scores those of an evaluation that was given,
//! commands those of the engines' documentation for what the folder holds.

mod engines;

use super::RunReport;
use crate::checkpoint::Checkpoint;
use crate::export::gguf::GgufExported;
use crate::export::{Format, ModulePlan};
use crate::model::decoder_config::DecoderConfig;
use crate::plan::Scheme;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Name of the card in a folder.
pub const CARD_FILE: &str = "README.md";

/// Name under which the card of the model that was quantized is kept.
pub const BASE_CARD_FILE: &str = "README_base_model.md";

/// Modules that the card names for their loss.
const N_WORST: usize = 5;

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
        [
            self.front_matter(),
            format!("# {}\n\n", self.name),
            self.how_it_was_made(),
            self.what_was_lost(),
            "## Running it\n".into(),
            engines::commands(self.name, self.format, self.plan),
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
            "---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\ntags:\n- vlmq\n\
             - {}\n",
            self.format.name()
        );
        if let Some(license) = base_license(self.source) {
            let _ = writeln!(text, "license: {license}");
        }
        text + "---\n"
    }

    fn how_it_was_made(&self) -> String {
        let mut text = String::from("## How it was made\n");
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
        }
        text + "\n"
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
        if let Some(evaluation) = self.evaluation {
            text += &scores(evaluation);
        }
        match text.is_empty() {
            true => String::new(),
            false => format!("## What was lost\n{text}\n"),
        }
    }
}

/// `license:` of the card of the model that was quantized.
fn base_license(source: &Checkpoint) -> Option<String> {
    let read = |name| std::fs::read_to_string(source.dir().join(name)).ok();
    let card = read(BASE_CARD_FILE).or_else(|| read(CARD_FILE))?;
    let (head, _) = card.strip_prefix("---\n")?.split_once("\n---")?;
    let license = head
        .lines()
        .find_map(|line| line.strip_prefix("license:"))?;
    let license = license.trim();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._ ".contains(c);
    (!license.is_empty() && license.chars().all(is_plain)).then(|| license.to_owned())
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
