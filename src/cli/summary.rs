//! What a finished `vlmq quantize` says: the losses, where the seconds went, what went otherwise
//! than planned.

use crate::allocation::AllocationReport;
use crate::export::Format;
use crate::importance::Safeguarded;
use crate::report::{Deviation, ModuleReport, RunReport};
use crate::tuning::TuningReport;
use std::collections::BTreeMap;

const STAGES: [&str; 10] = [
    "load",
    "forward",
    "importance",
    "statistics",
    "search",
    "factor",
    "solve",
    "exchange",
    "report",
    "write",
];

const BEFORE_THE_LAYERS: [&str; 3] = ["check", "processor", "vision"];

/// All of it, a line for each.
pub fn summary(report: &RunReport, format: Format) -> String {
    let total = report.seconds.get("total").copied().unwrap_or_default();
    let peak = report.peak_memory_bytes;
    let peak = peak.map_or("?".into(), |b| format!("{:.0}", b as f64 / 1e6));
    [
        losses(&report.modules),
        report.allocation.as_ref().map_or(String::new(), allocation),
        profile(report),
        notes(report, format).concat(),
        report.tuning.as_ref().map_or(String::new(), tuning),
        format!("{total:.1} s, peak memory {peak} MB\n"),
    ]
    .concat()
}

fn losses(modules: &[ModuleReport]) -> String {
    let mut layers: BTreeMap<usize, Vec<(f64, &str)>> = BTreeMap::new();
    for module in modules {
        if let Some(loss) = module.relative_loss {
            let layer = layers.entry(module.layer_idx).or_default();
            layer.push((loss, &module.name));
        }
    }
    let mut text = format!(
        "{:<8} {:>14} {:>14}\n",
        "layer", "relative loss", "worst module"
    );
    for (layer_idx, losses) in layers {
        let mean = losses.iter().map(|(loss, _)| loss).sum::<f64>() / losses.len() as f64;
        if let Some((loss, name)) = losses.iter().max_by(|a, b| a.0.total_cmp(&b.0)) {
            text += &format!("{layer_idx:<8} {mean:>14.3e} {loss:>14.3e}  {name}\n");
        }
    }
    text
}

/// Where the seconds went, by layer and stage.
fn profile(report: &RunReport) -> String {
    // Few methods search, and not every run has a report.
    let is_rare = |s: &str| s == "search" || s == "report";
    let is_shown = |s: &&str| !is_rare(s) || report.seconds.contains_key(*s);
    let stages: Vec<&str> = STAGES.into_iter().filter(is_shown).collect();
    let line = |name: &str, seconds: &BTreeMap<String, f64>| {
        let cell = |stage: &&str| format!("{:>11.2}", seconds.get(*stage).unwrap_or(&0.0));
        let cells: String = stages.iter().map(cell).collect();
        format!("{name:<8}{cells}\n")
    };
    let mut text = format!("{:<8}", "seconds");
    text += &stages
        .iter()
        .map(|s| format!("{s:>11}"))
        .collect::<String>();
    text.push('\n');
    for (layer_idx, seconds) in report.layers.iter().enumerate() {
        text += &line(&layer_idx.to_string(), seconds);
    }
    text += &line("all", &report.seconds);
    let before = BEFORE_THE_LAYERS.map(|part| {
        let seconds = report.seconds.get(part).copied().unwrap_or(0.0);
        format!("{part} {seconds:.2}")
    });
    text += &format!("before the first layer: {}\n", before.join(", "));
    text
}

/// Which bits each layer's linears got, and what they come to.
fn allocation(report: &AllocationReport) -> String {
    let mut text = format!(
        "bits: {:.3} on average of at most {}, {:.3} with scales and zero points ({:.1} MB)\n",
        report.code_bits_per_weight,
        report.mean_bits,
        report.stored_bits_per_weight,
        report.stored_bytes as f64 / 1e6
    );
    let mut layers: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for group in &report.groups {
        let roles = group.modules.iter().map(|name| role(name));
        let mut roles: Vec<&str> = roles.collect();
        roles.dedup();
        let shown = match roles.len() {
            0..=3 => roles.join(" "),
            n => format!("{n} experts' linears"),
        };
        let layer = layers.entry(group.layer_idx).or_default();
        layer.push(format!("{shown} {}", group.bits));
    }
    for (layer_idx, groups) in layers {
        text += &format!("{layer_idx:<8} {}\n", groups.join(", "));
    }
    text
}

/// The last word of a linear's name: `q` of `model.layers.3.self_attn.q_proj`.
fn role(name: &str) -> &str {
    let last = name.rsplit('.').next().unwrap_or(name);
    last.strip_suffix("_proj").unwrap_or(last)
}

/// What tuning of scales did.
fn tuning(report: &TuningReport) -> String {
    format!(
        "tuning: {} steps, best after {}; KL {:.4} -> {:.4}, held out {:.4} -> {:.4}; {:.1} s\n",
        report.steps,
        report.best_step,
        report.loss_before,
        report.loss_after,
        report.held_out_before,
        report.held_out_after,
        report.seconds
    )
}

/// Everything that went otherwise than planned, in words; `vlmq_report.json` has each module.
fn notes(report: &RunReport, format: Format) -> Vec<String> {
    let deviations = &report.deviations;
    let mut notes: Vec<String> = deviations.iter().filter_map(own_note).collect();
    notes.extend(uniform_weights(deviations));
    notes.extend(safeguards(deviations));
    notes.extend(not_scaled(deviations));
    notes.extend(few_tokens(report));
    notes.extend(counted(deviations));
    let is_asymmetric = |m: &ModuleReport| m.scheme.is_some_and(|s| !s.symmetric());
    let is_affected = format == Format::CompressedTensors;
    if is_affected && report.modules.iter().any(is_asymmetric) {
        notes.push(
            "note: transformers with compressed-tensors up to 0.20 cannot load asymmetric folders; \
             --symmetric makes one that it can\n"
                .to_owned(),
        );
    }
    notes
}

/// What is told by itself, however often it happened.
fn own_note(deviation: &Deviation) -> Option<String> {
    match deviation {
        Deviation::DampingRaised {
            module,
            tried,
            used,
            of_part,
        } => Some(format!(
            "note: {module}: damping raised to {used}; {tried:?} left the Hessian{} singular\n",
            if *of_part {
                " of the part that α is found with"
            } else {
                ""
            }
        )),
        Deviation::TuningUndone { held_out_loss } => Some(format!(
            "note: tuning left the held-out loss at {held_out_loss:.4}; scales as before it\n"
        )),
        Deviation::IdleRule { pattern } => {
            Some(format!("note: the rule {pattern:?} matched no module\n"))
        }
        _ => None,
    }
}

/// Where tokens weigh alike, by layer and reason.
fn uniform_weights(deviations: &[Deviation]) -> Vec<String> {
    let mut alike: BTreeMap<(usize, String), Vec<&str>> = BTreeMap::new();
    for deviation in deviations {
        if let Deviation::UniformWeights {
            layer_idx,
            projection,
            reason,
        } = deviation
        {
            let key = (*layer_idx, reason.to_string());
            alike.entry(key).or_default().push(projection);
        }
    }
    let note = |((layer_idx, reason), projections): ((usize, String), Vec<&str>)| {
        let names = projections.join(", ");
        format!("note: layer {layer_idx}: tokens weigh alike in {names}: {reason}\n")
    };
    alike.into_iter().map(note).collect()
}

/// How many modules rest on damping, and which most.
fn few_tokens(report: &RunReport) -> Option<String> {
    let few = report.deviations.iter().filter_map(|d| match d {
        Deviation::FewTokens {
            module,
            effective_sample_size,
            in_features,
        } => Some((module, *effective_sample_size, *in_features)),
        _ => None,
    });
    let shortest = few.clone().min_by(|a, b| {
        let tokens_per_input = |(_, n, inputs): &(&String, f64, usize)| n / *inputs as f64;
        tokens_per_input(a).total_cmp(&tokens_per_input(b))
    });
    let (module, n, inputs) = shortest?;
    Some(format!(
        "note: {} of {} modules have fewer tokens than inputs and rest on damping, {module} most \
         ({n:.0} for {inputs}): more samples would help\n",
        few.count(),
        report.modules.len()
    ))
}

/// What is told as a number of modules.
fn counted(deviations: &[Deviation]) -> Vec<String> {
    let count = |is_one: fn(&Deviation) -> bool| deviations.iter().filter(|d| is_one(d)).count();
    let counts = [
        (
            count(|d| matches!(d, Deviation::Unreached { .. })),
            "rounded to nearest: no token was sent to their experts; more or other samples would help",
        ),
        (
            count(|d| matches!(d, Deviation::UnjudgedAlpha { .. })),
            "without a correction of drift: no samples could be held out to find α; more would help",
        ),
        (
            count(|d| matches!(d, Deviation::Skipped { .. })),
            "left as they were, as rules asked",
        ),
    ];
    let counts = counts.into_iter().filter(|(n, _)| *n > 0);
    counts
        .map(|(n, what)| format!("note: {n} modules {what}\n"))
        .collect()
}

/// What safeguards did, over all linears that they had a part in.
fn safeguards(deviations: &[Deviation]) -> Option<String> {
    let all = deviations.iter().filter_map(|d| match d {
        Deviation::Safeguarded { changes, .. } => Some(changes),
        _ => None,
    });
    let all: Vec<&Safeguarded> = all.collect();
    let tempering = all.iter().map(|s| s.tempering).reduce(f64::max)?;
    let is_short = |s: &&&Safeguarded| {
        s.wanted
            .is_some_and(|w| s.effective_sample_size < w * 0.999)
    };
    let short = match all.iter().filter(is_short).count() {
        0 => String::new(),
        n => format!(", too few tokens in {n}"),
    };
    Some(format!(
        "note: safeguards on the token weights of {} linears: {} factors clipped, {} raised, equal \
         weights mixed in up to {tempering:.3}{short}\n",
        all.len(),
        all.iter().map(|s| s.n_clipped).sum::<usize>(),
        all.iter().map(|s| s.n_raised).sum::<usize>(),
    ))
}

/// Of all layers in which the same is not scaled, one note.
fn not_scaled(deviations: &[Deviation]) -> impl Iterator<Item = String> {
    let mut alike: BTreeMap<(&str, String), usize> = BTreeMap::new();
    for deviation in deviations {
        if let Deviation::NotScaled {
            modules, reason, ..
        } = deviation
        {
            *alike.entry((modules, reason.to_string())).or_default() += 1;
        }
    }
    let note = |((modules, reason), n)| {
        format!("note: inputs of {modules} not scaled in {n} layers: {reason}\n")
    };
    alike.into_iter().map(note)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn notes_are_told_by_kind_and_not_by_module() {
        let alike = |projection| {
            json!({"kind": "uniform_weights", "layer_idx": 0, "projection": projection,
                   "reason": "vanishing_residual"})
        };
        let few = |module, n: f64| {
            json!({"kind": "few_tokens", "module": module, "effective_sample_size": n,
                   "in_features": 100})
        };
        let report = json!({
            "schema": 1, "vlmq": "", "method": "", "settings": {}, "calibration": null,
            "modules": [], "seconds": {}, "peak_memory_bytes": null,
            "deviations": [alike("q"), few("a", 20.0), alike("k"), few("b", 10.0),
                {"kind": "not_scaled", "layer_idx": 0, "modules": "o", "reason": "grouped_queries"},
                {"kind": "not_scaled", "layer_idx": 1, "modules": "o", "reason": "grouped_queries"},
                {"kind": "idle_rule", "pattern": "x"}],
        });
        let report: RunReport = serde_json::from_value(report).unwrap();
        assert_eq!(
            notes(&report, Format::CompressedTensors),
            [
                "note: the rule \"x\" matched no module\n",
                "note: layer 0: tokens weigh alike in q, k: nothing is quantized before them\n",
                "note: inputs of o not scaled in 2 layers: several heads of queries share their \
                 values\n",
                "note: 2 of 0 modules have fewer tokens than inputs and rest on damping, b most \
                 (10 for 100): more samples would help\n",
            ]
        );
    }
}
