//! The head of the report: what was made of what, how large, how long, how.

use super::{grouped, percent, role};
use crate::report::RunReport;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Stages of work, in order; what else a report tells comes after them.
const STAGES: [(&str, &str); 14] = [
    ("check", "Checks before the run"),
    ("processor", "Images and text made ready"),
    ("vision", "Vision tower"),
    ("load", "Weights read"),
    ("forward", "Forward passes"),
    ("importance", "Importance of tokens"),
    ("statistics", "Hessians summed up"),
    ("search", "Scales searched"),
    ("factor", "Hessians factored"),
    ("solve", "Weights quantized"),
    ("exchange", "Waiting for other ranks' bytes"),
    ("report", "Losses of rounding, for this report"),
    ("write", "Weights written"),
    ("tuning", "Scales tuned"),
];

#[derive(Serialize)]
pub(super) struct Summary {
    /// What it is, in a line.
    lede: String,
    /// The numbers that matter most: name, value, and what it is to be held against.
    figures: Vec<[String; 3]>,
    /// Further facts, by name.
    facts: Vec<[String; 2]>,
    /// Every setting, by key.
    settings: Vec<[String; 2]>,
    /// Stage, seconds, share of all stages and its width in percent.
    stages: Vec<Stage>,
}

#[derive(Serialize)]
struct Stage {
    name: String,
    seconds: String,
    share: String,
    /// In percent of the longest.
    width: f64,
}

impl Summary {
    pub(super) fn of(report: &RunReport) -> Self {
        Self {
            lede: lede(report),
            figures: figures(report),
            facts: facts(report),
            settings: settings(&report.settings),
            stages: stages(&report.seconds),
        }
    }

    /// Figures and facts as pairs of name and value.
    pub(super) fn pairs(&self) -> impl Iterator<Item = [String; 2]> {
        let figures = self.figures.iter().map(|[name, value, note]| {
            let value = match note.is_empty() {
                true => value.clone(),
                false => format!("{value} ({note})"),
            };
            [name.clone(), value]
        });
        figures.chain(self.facts.iter().cloned())
    }
}

fn lede(report: &RunReport) -> String {
    let source = report
        .source
        .as_ref()
        .map(|source| format!("{} by ", source.name));
    let format = report
        .output
        .as_ref()
        .map(|output| format!(", {}", output.format));
    format!(
        "{}{}: {}{}",
        source.unwrap_or_default(),
        report.method,
        schemes(report),
        format.unwrap_or_default()
    )
}

fn figures(report: &RunReport) -> Vec<[String; 3]> {
    let figure = |name: &str, value: String, note: String| [name.to_owned(), value, note];
    let mut figures = Vec::new();
    if let Some(bits) = bits_per_weight(report) {
        let note = "of a quantized linear, scales and zero points included".into();
        figures.push(figure("Bits per weight", format!("{bits:.2}"), note));
    }
    if let (Some(source), Some(output)) = (&report.source, &report.output) {
        let share = output.tensor_bytes as f64 / source.tensor_bytes.max(1) as f64;
        let note = format!("{} of {}", percent(share), bytes(source.tensor_bytes));
        figures.push(figure("All tensors", bytes(output.tensor_bytes), note));
    }
    if let Some([own, nearest]) = losses(report) {
        let note = "of what rounding to nearest loses, over all linears".into();
        let share = percent(own / nearest.max(f64::MIN_POSITIVE));
        figures.push(figure("Output error", share, note));
    }
    if let Some(seconds) = report.seconds.get("total") {
        figures.push(figure("Time", duration(*seconds), String::new()));
    }
    if let Some(peak) = report.peak_memory_bytes {
        figures.push(figure("Peak memory", bytes(peak), String::new()));
    }
    figures
}

/// Bits of the quantized linears with what is stored beside the codes, by their weights.
fn bits_per_weight(report: &RunReport) -> Option<f64> {
    let mut sums = [0.0, 0.0];
    for module in &report.modules {
        if let (Some([rows, cols]), Some(scheme)) = (module.shape, module.scheme) {
            let n = rows as f64 * cols as f64;
            sums[0] += n * scheme.bits_per_weight(cols);
            sums[1] += n;
        }
    }
    (sums[1] > 0.0).then(|| sums[0] / sums[1])
}

/// The loss of all modules and that of rounding them, where both are known.
fn losses(report: &RunReport) -> Option<[f64; 2]> {
    let pairs = report.modules.iter();
    let pairs = pairs.filter_map(|m| Some([m.loss?, m.nearest_loss?]));
    pairs.reduce(|a, b| [a[0] + b[0], a[1] + b[1]])
}

fn facts(report: &RunReport) -> Vec<[String; 2]> {
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| facts.push([name.to_owned(), value]);
    if let Some(source) = &report.source {
        let kind = source.model_type.as_ref();
        let kind = kind.map_or(String::new(), |kind| format!(" ({kind})"));
        fact("Model", format!("{}{kind}", source.name));
    }
    fact("Method", report.method.clone());
    fact("Scheme", schemes(report));
    if let Some(output) = &report.output {
        fact("Format", output.format.clone());
    }
    if let Some(calibration) = &report.calibration {
        let tokens: u64 = calibration.n_tokens.values().sum();
        let vision = calibration.n_tokens.get("vision").copied().unwrap_or(0);
        let text = format!(
            "{} samples, seed {}; {} tokens, {} of them of images",
            grouped(calibration.n_samples as u64),
            calibration.seed,
            grouped(tokens),
            percent(vision as f64 / tokens.max(1) as f64),
        );
        fact("Calibration", text);
    }
    let n_quantized = report.modules.iter().filter(|m| m.scheme.is_some()).count();
    let linears = format!("{n_quantized} of {} quantized", report.modules.len());
    fact("Linears", linears);
    if let Some(allocation) = &report.allocation {
        let text = format!(
            "{:.3} on average of at most {} asked for; {:.3} with scales and zero points",
            allocation.code_bits_per_weight,
            allocation.mean_bits,
            allocation.stored_bits_per_weight
        );
        fact("Shared bits", text);
    }
    if let Some(tuning) = &report.tuning {
        let text = format!(
            "{} steps, best after {}; held-out divergence {:.4} before, {:.4} after",
            tuning.steps, tuning.best_step, tuning.held_out_before, tuning.held_out_after
        );
        fact("Tuning", text);
    }
    if report.n_resumed_layers > 0 {
        let n = report.n_resumed_layers;
        fact(
            "Resumed",
            format!("{n} layers were finished by an earlier run"),
        );
    }
    fact("vlmq", report.vlmq.clone());
    facts
}

/// The number formats that there are, with what they are for where there are several.
fn schemes(report: &RunReport) -> String {
    let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for module in &report.modules {
        if let Some(scheme) = module.scheme {
            let group = match scheme.group_size() {
                Some(size) => format!("groups of {size}"),
                None => "one scale per row".into(),
            };
            let kind = match scheme.symmetric() {
                true => "symmetric",
                false => "asymmetric",
            };
            let roles = kinds
                .entry(format!("{} bits, {group}, {kind}", scheme.bits()))
                .or_default();
            let role = role(&module.name);
            if !roles.contains(&role) {
                roles.push(role);
            }
        }
    }
    match kinds.len() {
        0 => "none".into(),
        1 => kinds.into_keys().collect(),
        _ => {
            let each = kinds
                .iter()
                .map(|(kind, roles)| format!("{kind} ({})", roles.join(", ")));
            each.collect::<Vec<_>>().join("; ")
        }
    }
}

/// Settings, those inside of others by both keys.
fn settings(value: &Value) -> Vec<[String; 2]> {
    let mut all = Vec::new();
    for (key, value) in value.as_object().into_iter().flatten() {
        match value {
            Value::Null => {}
            Value::Object(inner) => {
                let shown = inner.iter().filter(|(_, value)| !value.is_null());
                all.extend(shown.map(|(name, value)| [format!("{key}.{name}"), plain(value)]));
            }
            _ => all.push([key.clone(), plain(value)]),
        }
    }
    all
}

fn plain(value: &Value) -> String {
    value.as_str().map_or(value.to_string(), str::to_owned)
}

fn stages(seconds: &BTreeMap<String, f64>) -> Vec<Stage> {
    let known = STAGES.iter().filter_map(|(key, name)| {
        let seconds = seconds.get(*key)?;
        Some((*name, *seconds))
    });
    let known: Vec<(&str, f64)> = known.collect();
    let all: f64 = known.iter().map(|(_, s)| s).sum();
    let most = known
        .iter()
        .map(|(_, s)| *s)
        .fold(f64::MIN_POSITIVE, f64::max);
    let stage = |(name, seconds): (&str, f64)| Stage {
        name: name.to_owned(),
        seconds: format!("{seconds:.2}"),
        share: percent(seconds / all.max(f64::MIN_POSITIVE)),
        width: (1000.0 * seconds / most).round() / 10.0,
    };
    known.into_iter().map(stage).collect()
}

/// Bytes in the unit that suits them, three digits or more.
fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n >= 1e10 => format!("{:.1} GB", n / 1e9),
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e7 => format!("{:.0} MB", n / 1e6),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.0} kB", n / 1e3),
    }
}

fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match seconds {
        s if s < 100.0 => format!("{s:.1} s"),
        s if s < 6000.0 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_told_in_fitting_units() {
        assert_eq!(bytes(12_345_678), "12 MB");
        assert_eq!(bytes(1_234_567_890), "1.23 GB");
        assert_eq!(bytes(999), "1 kB");
        assert_eq!(duration(12.34), "12.3 s");
        assert_eq!(duration(600.0), "10 min");
        assert_eq!(duration(7260.0), "2 h 1 min");
    }
}
