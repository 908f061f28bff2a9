//! The settings of the solver by their keys.

use super::value::{count, flag, number, word};
use crate::solver::{Clip, ClipNorm, DampeningUnit, SolverSettings, Target};

/// All keys, for messages.
pub(super) const KEYS: &str = "dampening_frac, dampening_unit, col_block, act_order, target, clip, \
                               clip_power, clip_norm, sweeps, refit_scales, unit_gain";

const UNITS: [(&str, DampeningUnit); 2] = [
    ("mean_diagonal", DampeningUnit::MeanDiagonal),
    ("largest_eigenvalue", DampeningUnit::LargestEigenvalue),
];

const TARGETS: [(&str, Target); 4] = [
    ("pull", Target::Pull),
    ("least_squares", Target::LeastSquares),
    ("residual_stream", Target::ResidualStream),
    ("qronos", Target::Qronos),
];

const NORMS: [(&str, ClipNorm); 3] = [
    ("2", ClipNorm::Square),
    ("2.5", ClipNorm::Between),
    ("3", ClipNorm::Cube),
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
        "dampening_unit" => word(value, &UNITS).map(|w| settings.dampening_unit = w),
        "col_block" => count(value, 1, 65536).map(|n| settings.col_block = n),
        "act_order" => flag(value).map(|is_on| settings.act_order = is_on),
        "target" => word(value, &TARGETS).map(|w| settings.target = w),
        "clip" => word(value, &CLIPS).map(|w| settings.clip = w),
        "clip_norm" => word(value, &NORMS).map(|w| settings.clip_norm = w),
        "clip_power" => number(value, 0.0, 1.0).map(|x| settings.clip_power = x as f32),
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
