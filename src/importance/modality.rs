//! How much an error in a vision token counts beside one in an answer token, layer by layer.
//!
//! Source: MBQ, arXiv:2412.19509 §4.2; thu-nics/MBQ@a4d460d pre_quant.py.

use crate::{Error, Result};

/// Mean |∂L/∂z| over vision tokens divided by that over answer tokens, L being the cross-entropy of
/// the answers; one number per layer and place.
#[derive(Clone, Debug, PartialEq)]
pub struct ModalityRatios {
    /// z the output of `o_proj`.
    pub attention: Vec<f64>,
    /// z the output of `down_proj`.
    pub mlp: Vec<f64>,
}

impl ModalityRatios {
    /// The ratios of all layers, none below the median of its kind.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a ratio that is negative or not finite.
    pub fn floored(attention: Vec<f64>, mlp: Vec<f64>) -> Result<Self> {
        Ok(Self {
            attention: at_least_median("attention", attention)?,
            mlp: at_least_median("MLP", mlp)?,
        })
    }
}

fn at_least_median(place: &str, mut ratios: Vec<f64>) -> Result<Vec<f64>> {
    if let Some(bad) = ratios.iter().find(|r| !(r.is_finite() && **r >= 0.0)) {
        return Err(Error::Invalid {
            what: format!("ratio of gradients of vision and answer tokens, {place}"),
            why: format!("{bad} found, a finite number >= 0 expected"),
        });
    }
    let mut sorted = ratios.clone();
    sorted.sort_by(f64::total_cmp);
    let middle = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
    let n = sorted.len();
    let median = (middle(n.saturating_sub(1) / 2) + middle(n / 2)) / 2.0;
    ratios.iter_mut().for_each(|r| *r = r.max(median));
    Ok(ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_at_least_their_median() {
        let found = ModalityRatios::floored(vec![0.1, 0.5, 0.3], vec![1.0, 0.0, 0.2, 0.4]);
        let found = found.unwrap();
        assert_eq!(found.attention, [0.3, 0.5, 0.3]);
        assert_eq!(found.mlp, [1.0, (0.2 + 0.4) / 2.0, (0.2 + 0.4) / 2.0, 0.4]);
        assert!(ModalityRatios::floored(vec![f64::NAN], vec![]).is_err());
    }
}
