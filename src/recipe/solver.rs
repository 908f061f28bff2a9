//! The settings of the solver by their keys.

use super::value::{count, flag, number, word};
use crate::solver::{Clip, SolverSettings, Target};

/// All keys, for messages.
pub(super) const KEYS: &str = "dampening_frac, col_block, act_order, target, clip, sweeps, \
                               refit_scales, unit_gain";

const TARGETS: [(&str, Target); 3] = [
    ("pull", Target::Pull),
    ("least_squares", Target::LeastSquares),
    ("residual_stream", Target::ResidualStream),
];

const CLIPS: [(&str, Clip); 3] = [
    ("none", Clip::None),
    ("mse", Clip::Mse),
    ("weighted", Clip::Weighted),
];

/// Turns one setting; says what is wrong with the value. `None` if there is no such key.
pub(super) fn set(
    settings: &mut SolverSettings,
    key: &str,
    value: &str,
) -> Option<Result<(), String>> {
    Some(match key {
        "dampening_frac" => number(value, 0.0, 10.0).map(|x| settings.dampening_frac = x),
        "col_block" => count(value, 1, 65536).map(|n| settings.col_block = n),
        "act_order" => flag(value).map(|is_on| settings.act_order = is_on),
        "target" => word(value, &TARGETS).map(|w| settings.target = w),
        "clip" => word(value, &CLIPS).map(|w| settings.clip = w),
        "sweeps" => count(value, 0, 1000).map(|n| settings.sweeps = n),
        "refit_scales" => flag(value).map(|is_on| settings.refit_scales = is_on),
        "unit_gain" => flag(value).map(|is_on| settings.unit_gain = is_on),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_key_is_one() {
        for key in KEYS.split(", ") {
            let mut settings = SolverSettings::default();
            let outcome = set(&mut settings, key.trim(), "?");
            assert!(outcome.unwrap().is_err(), "{key}");
        }
    }
}
