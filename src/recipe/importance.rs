//! The settings of token importance by their keys.

use super::value::{count, number, word};
use crate::importance::{
    Granularity, ImportanceLoss, ImportanceModules, ImportanceSettings, ImportanceSource, TokenNorm,
};

/// All keys, for messages.
pub(super) const KEYS: &str = "importance_source, importance_probes, importance_attention_min, \
                               importance_random_share, importance_random_weight, importance_seed, \
                               importance_loss, importance_norm, importance_power, \
                               importance_modules, importance_granularity, importance_quantile, \
                               importance_floor, importance_min_ess";

/// Probes of the curvature, unless they are set.
const N_PROBES: usize = 2;

/// RSQ's weight of the token that receives least attention.
const ATTENTION_MIN: f64 = 0.005;

/// Turns one setting; says what is wrong with the value. `None` if there is no such key.
pub(super) fn set(
    settings: &mut ImportanceSettings,
    key: &str,
    value: &str,
) -> Option<Result<(), String>> {
    Some(match key {
        "importance_loss" => word(value, &LOSSES).map(|w| settings.loss = w),
        "importance_norm" => word(value, &NORMS).map(|w| settings.norm = w),
        "importance_modules" => word(value, &MODULES).map(|w| settings.modules = w),
        "importance_granularity" => word(value, &GRANULARITIES).map(|w| settings.granularity = w),
        "importance_power" => number(value, 0.0, 8.0).map(|x| settings.power = x),
        "importance_seed" => value
            .parse()
            .map(|seed| settings.seed = seed)
            .map_err(|_| "a whole number from 0 to 2^64 − 1 expected".to_owned()),
        "importance_quantile" => {
            number(value, 0.0, 1.0).map(|x| settings.safeguards.quantile = Some(x))
        }
        "importance_floor" => number(value, 0.0, 1.0).map(|x| settings.safeguards.floor = Some(x)),
        "importance_min_ess" => {
            number(value, 0.0, 1e6).map(|x| settings.safeguards.min_ess = Some(x))
        }
        "importance_source" => word(value, &SOURCES).map(|w| settings.source = w),
        _ => return set_source(&mut settings.source, key, value),
    })
}

/// Turns a setting that one source alone has.
fn set_source(source: &mut ImportanceSource, key: &str, value: &str) -> Option<Result<(), String>> {
    use ImportanceSource::{Attention, Curvature, Random};
    let needs = |name: &str| Err(format!("importance_source={name} is to be set before it"));
    Some(match (key, source) {
        ("importance_probes", Curvature { n_probes }) => {
            count(value, 1, 1024).map(|n| *n_probes = n)
        }
        ("importance_attention_min", Attention { min }) => {
            number(value, 0.0, 1.0).map(|x| *min = x)
        }
        ("importance_random_share", Random { share, .. }) => {
            number(value, 0.0, 1.0).map(|x| *share = x)
        }
        ("importance_random_weight", Random { weight, .. }) => {
            number(value, 0.0, 1.0).map(|x| *weight = x)
        }
        ("importance_probes", _) => needs("curvature"),
        ("importance_attention_min", _) => needs("attention"),
        ("importance_random_share" | "importance_random_weight", _) => needs("random"),
        _ => return None,
    })
}

const LOSSES: [(&str, ImportanceLoss); 4] = [
    ("linear", ImportanceLoss::Linear),
    ("attention", ImportanceLoss::Attention),
    ("layer", ImportanceLoss::Layer),
    ("answer", ImportanceLoss::Answer),
];

const NORMS: [(&str, TokenNorm); 2] = [("mean_abs", TokenNorm::MeanAbs), ("rms", TokenNorm::Rms)];

const MODULES: [(&str, ImportanceModules); 5] = [
    ("qkv", ImportanceModules::Qkv),
    ("o", ImportanceModules::O),
    ("qkvo", ImportanceModules::Qkvo),
    ("mlp", ImportanceModules::Mlp),
    ("all", ImportanceModules::All),
];

const GRANULARITIES: [(&str, Granularity); 2] = [
    ("token", Granularity::Token),
    ("modality", Granularity::Modality),
];

const SOURCES: [(&str, ImportanceSource); 5] = [
    ("drift", ImportanceSource::Drift),
    ("rounding", ImportanceSource::Rounding),
    (
        "curvature",
        ImportanceSource::Curvature { n_probes: N_PROBES },
    ),
    (
        "attention",
        ImportanceSource::Attention { min: ATTENTION_MIN },
    ),
    (
        "random",
        ImportanceSource::Random {
            share: 0.5,
            weight: 0.0,
        },
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn all_set(assignments: &str) -> Result<ImportanceSettings, String> {
        let mut settings = ImportanceSettings::paper(1.0);
        for assignment in assignments.split(' ') {
            let (key, value) = assignment.split_once('=').unwrap();
            set(&mut settings, key, value).unwrap_or(Err("no such key".into()))?;
        }
        settings.check().map_err(|e| e.to_string())?;
        Ok(settings)
    }

    #[test]
    fn every_listed_key_is_one() {
        for key in KEYS.split(", ") {
            let mut settings = ImportanceSettings::paper(1.0);
            assert!(
                set(&mut settings, key.trim(), "?").unwrap().is_err(),
                "{key}"
            );
        }
    }

    #[test]
    fn choices_go_together() {
        for good in [
            "importance_source=drift importance_loss=linear importance_modules=mlp",
            "importance_source=rounding importance_modules=qkv",
            "importance_loss=answer importance_modules=mlp importance_granularity=modality",
            "importance_source=curvature importance_probes=8 importance_loss=layer",
            "importance_source=attention importance_attention_min=0.1 importance_modules=mlp",
            "importance_source=random importance_random_share=0.25 importance_random_weight=0.1",
            "importance_granularity=modality importance_modules=o importance_seed=7",
            "importance_min_ess=4 importance_quantile=0.99 importance_floor=0.05",
        ] {
            assert!(all_set(good).is_ok(), "{good}: {:?}", all_set(good));
        }
        let random = all_set("importance_source=random importance_random_share=0.25").unwrap();
        let expected = ImportanceSource::Random {
            share: 0.25,
            weight: 0.0,
        };
        assert_eq!(random.source, expected);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "importance_source=fisher",
            "importance_probes=2",
            "importance_source=curvature importance_probes=0",
            "importance_source=curvature importance_loss=linear",
            "importance_source=curvature importance_loss=answer",
            "importance_source=random importance_loss=answer",
            "importance_attention_min=0.1",
            "importance_source=attention importance_attention_min=2",
            "importance_source=attention importance_random_share=0.5",
            "importance_source=random importance_random_share=nan",
            "importance_source=random importance_random_weight=-1",
            "importance_loss=block",
            "importance_modules=mlp",
            "importance_modules=q",
            "importance_granularity=class",
            "importance_seed=-1",
            "importance_quantile=1.5",
            "importance_floor=-0.1",
            "importance_min_ess=inf",
            "importance_taste=good",
        ] {
            assert!(all_set(bad).is_err(), "{bad}");
        }
    }
}
