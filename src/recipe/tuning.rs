//! The settings of tuning by their keys.

use super::value::{count, word};
use crate::tuning::{TuningLoss, TuningSettings};

/// All keys, for messages.
pub(super) const KEYS: &str = "tune_steps, tune_batch, tune_rate, tune_loss, tune_samples";

const LOSSES: [(&str, TuningLoss); 2] = [("answer", TuningLoss::Answer), ("all", TuningLoss::All)];

/// Turns one setting; says what is wrong with the value. `None` if there is no such key.
pub(super) fn set(
    settings: &mut TuningSettings,
    key: &str,
    value: &str,
) -> Option<Result<(), String>> {
    Some(match key {
        "tune_steps" => count(value, 0, 1_000_000).map(|n| settings.steps = n),
        "tune_batch" => count(value, 1, 65536).map(|n| settings.batch = n),
        "tune_samples" => count(value, 2, 1_000_000).map(|n| settings.samples = Some(n)),
        "tune_rate" => match value.parse::<f64>() {
            Ok(x) if x > 0.0 && x <= 1.0 => {
                settings.rate = x;
                Ok(())
            }
            _ => Err("a number above 0, at most 1, expected".into()),
        },
        "tune_loss" => word(value, &LOSSES).map(|loss| settings.loss = loss),
        _ => return None,
    })
}
