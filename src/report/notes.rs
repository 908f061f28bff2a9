//! Deviations in words: what kind of thing happened, to what, and how.

use super::Deviation;
use crate::importance::Safeguarded;

/// A deviation in words.
pub(super) struct Note {
    /// What all deviations of its kind have in common.
    pub title: &'static str,
    /// What it means for the result.
    pub meaning: &'static str,
    /// Module, or layer and role.
    pub place: String,
    /// What happened there.
    pub what: String,
}

impl From<&Deviation> for Note {
    fn from(deviation: &Deviation) -> Self {
        let (title, meaning) = kind(deviation);
        let (place, what) = details(deviation);
        Self {
            title,
            meaning,
            place,
            what,
        }
    }
}

fn kind(deviation: &Deviation) -> (&'static str, &'static str) {
    match deviation {
        Deviation::DampingRaised { .. } => (
            "Damping raised",
            "The Hessian was singular with the damping that was asked for.",
        ),
        Deviation::UniformWeights { .. } => (
            "Tokens weigh alike",
            "These linears could not be given token weights; all tokens count the same in them.",
        ),
        Deviation::Safeguarded { .. } => (
            "Safeguards on token weights",
            "Token weights were held back from resting on a few tokens.",
        ),
        Deviation::Skipped { .. } => (
            "Left as they were",
            "A rule of the recipe asked to leave these modules alone.",
        ),
        Deviation::FewTokens { .. } => (
            "Fewer tokens than inputs",
            "The solution rests on damping; more samples would help.",
        ),
        Deviation::UnjudgedAlpha { .. } => (
            "Drift not corrected",
            "No samples could be held out to judge the correction by; more would help.",
        ),
        Deviation::NotScaled { .. } => (
            "Inputs not scaled",
            "No scales of input channels could be put into what stands before these linears.",
        ),
        Deviation::Unreached { .. } => (
            "Experts that no token reached",
            "They were rounded to nearest; more or other samples would help.",
        ),
        Deviation::TuningUndone { .. } => (
            "Tuning undone",
            "Tuning made no held-out loss smaller; the scales are those of before it.",
        ),
        Deviation::IdleRule { .. } => (
            "Rules without effect",
            "A rule of the recipe matched no module.",
        ),
    }
}

fn details(deviation: &Deviation) -> (String, String) {
    match deviation {
        Deviation::DampingRaised {
            module,
            tried,
            used,
            of_part,
        } => {
            let of_part = match of_part {
                true => " (of the samples that α is found with)",
                false => "",
            };
            let tried: Vec<String> = tried.iter().map(f64::to_string).collect();
            let what = format!("{} failed, {used} used{of_part}", tried.join(", "));
            (module.clone(), what)
        }
        Deviation::UniformWeights {
            layer_idx,
            projection,
            reason,
        } => (at(*layer_idx, projection), reason.to_string()),
        Deviation::Safeguarded {
            layer_idx,
            projection,
            changes,
        } => (at(*layer_idx, projection), safeguarded(changes)),
        Deviation::FewTokens {
            module,
            effective_sample_size,
            in_features,
        } => {
            let what =
                format!("{effective_sample_size:.0} effective tokens for {in_features} inputs");
            (module.clone(), what)
        }
        Deviation::NotScaled {
            layer_idx,
            modules,
            reason,
        } => (at(*layer_idx, modules), reason.to_string()),
        Deviation::Skipped { module }
        | Deviation::UnjudgedAlpha { module }
        | Deviation::Unreached { module } => (module.clone(), String::new()),
        Deviation::TuningUndone { held_out_loss } => (
            "all scales".into(),
            format!("held-out divergence {held_out_loss:.4} nats"),
        ),
        Deviation::IdleRule { pattern } => (pattern.clone(), String::new()),
    }
}

fn at(layer_idx: usize, role: &str) -> String {
    format!("layer {layer_idx}, {role}")
}

fn safeguarded(changes: &Safeguarded) -> String {
    format!(
        "{} factors clipped, {} raised, equal weights mixed in to {:.3}; {:.0} effective tokens",
        changes.n_clipped, changes.n_raised, changes.tempering, changes.effective_sample_size
    )
}
