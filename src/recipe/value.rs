//! The values of settings.

/// What one of some words means.
pub(super) fn word<T: Copy>(value: &str, all: &[(&str, T)]) -> Result<T, String> {
    let found = all.iter().find(|(name, _)| *name == value);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        format!("one of {} expected", names.join(", "))
    })
}

/// A number within bounds, which NaN is not.
pub(super) fn number(value: &str, low: f64, high: f64) -> Result<f64, String> {
    match value.parse::<f64>() {
        Ok(x) if x >= low && x <= high => Ok(x),
        _ => Err(format!("a number from {low} to {high} expected")),
    }
}

/// A whole number within bounds.
pub(super) fn count(value: &str, low: usize, high: usize) -> Result<usize, String> {
    match value.parse::<usize>() {
        Ok(n) if (low..=high).contains(&n) => Ok(n),
        _ => Err(format!("a whole number from {low} to {high} expected")),
    }
}

/// `true` or `false`.
pub(super) fn flag(value: &str) -> Result<bool, String> {
    word(value, &[("true", true), ("false", false)])
}
