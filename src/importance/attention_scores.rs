//! How much attention tokens receive, as a measure of importance that needs no loss.
//!
//! Source: RSQ, ylsung/rsq@1a7cf31 fake_quant/input_weighting_module.py (AttnCon). Differs: no.

use crate::Result;
use crate::model::attention::Attention;

/// Factors of tokens: the probabilities that all queries of all heads give them, brought to
/// [min, 1] over the sequence, and then to mean 1.
///
/// # Errors
/// A tensor error if shapes disagree.
pub(super) fn received(trace: &Attention, min: f64) -> Result<Vec<f32>> {
    let sums = column_sums(trace)?;
    let lowest = sums.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = sums.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scaled = |sum: &f64| match highest > lowest {
        true => min + (1.0 - min) * (sum - lowest) / (highest - lowest),
        // All alike, or none finite.
        false if sum.is_finite() => 1.0,
        false => f64::NAN,
    };
    let scaled: Vec<f64> = sums.iter().map(scaled).collect();
    let mean = scaled.iter().sum::<f64>() / scaled.len() as f64;
    Ok(scaled.iter().map(|w| (w / mean) as f32).collect())
}

/// Sums of the attention probabilities over heads and queries, of each key.
fn column_sums(trace: &Attention) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; trace.keys.dim(1)?];
    for rows in trace.blocks() {
        let block: Vec<f32> = trace.probabilities(rows)?.sum((0, 1))?.to_vec1()?;
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum += f64::from(value);
        }
    }
    Ok(sums)
}
