//! The settings of allocation by their keys.

use super::value::{count, word};
use crate::allocation::{AllocationBy, AllocationSettings};

/// All keys, for messages.
pub(super) const KEYS: &str = "allocation_by, allocation_samples, allocation_seed";

const WAYS: [(&str, AllocationBy); 4] = [
    ("answer", AllocationBy::Answer),
    ("output", AllocationBy::Output),
    ("ends", AllocationBy::Ends),
    ("random", AllocationBy::Random),
];

/// Turns one setting; says what is wrong with the value. `None` if there is no such key.
pub(super) fn set(
    settings: &mut AllocationSettings,
    key: &str,
    value: &str,
) -> Option<Result<(), String>> {
    Some(match key {
        "allocation_by" => word(value, &WAYS).map(|by| settings.by = by),
        "allocation_samples" => count(value, 1, 1_000_000).map(|n| settings.samples = n),
        "allocation_seed" => value
            .parse()
            .map(|seed| settings.seed = seed)
            .map_err(|_| "a whole number from 0 to 2^64 − 1 expected".to_owned()),
        _ => return None,
    })
}
