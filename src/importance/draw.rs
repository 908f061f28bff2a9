//! What is drawn at random: signs to carry back, and vision tokens to weigh less. Every draw has a
//! generator of its own, seeded with what it is for, so that no order of work changes any.

use crate::Result;
use crate::processor::TokenClass;
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A generator for one use of one sample; `use_idx` tells uses apart.
fn generator(seed: u64, [layer_idx, sample_idx, use_idx]: [usize; 3]) -> ChaCha8Rng {
    let words = [seed, layer_idx as u64, sample_idx as u64, use_idx as u64];
    let mut bytes = [0; 32];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

/// Independent values of −1 or 1, each as likely, in the shape of a residual stream; `place` is
/// layer, sample and number of the vector.
///
/// # Errors
/// A tensor error if the device refuses the memory.
pub(super) fn signs(
    seed: u64,
    place: [usize; 3],
    (n_tokens, hidden): (usize, usize),
    device: &Device,
) -> Result<Tensor> {
    let mut rng = generator(seed, place);
    let sign = |_| if rng.random::<bool>() { 1f32 } else { -1.0 };
    let values: Vec<f32> = (0..n_tokens * hidden).map(sign).collect();
    Ok(Tensor::from_vec(values, (n_tokens, hidden), device)?)
}

/// Factors of a sample's tokens: `weight` for the share `share` of its vision tokens, rounded to
/// whole tokens, and 1 for all others.
pub(super) fn pilot(
    seed: u64,
    sample_idx: usize,
    classes: &[TokenClass],
    (share, weight): (f64, f64),
) -> Vec<f32> {
    let vision = classes.iter().enumerate();
    let vision = vision.filter(|(_, class)| **class == TokenClass::Vision);
    let vision: Vec<usize> = vision.map(|(token, _)| token).collect();
    let n_drawn = (share * vision.len() as f64).round() as usize;
    // One layer's place serves all layers.
    let mut rng = generator(seed, [0, sample_idx, 0]);
    let mut factors = vec![1.0; classes.len()];
    for drawn in rand::seq::index::sample(&mut rng, vision.len(), n_drawn.min(vision.len())) {
        factors[vision[drawn]] = weight as f32;
    }
    factors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pilot_draws_an_exact_share_of_the_vision_tokens_and_nothing_else() {
        let mut classes = vec![TokenClass::Vision; 40];
        classes.extend([TokenClass::Prompt, TokenClass::Answer, TokenClass::Special]);
        for (share, n_drawn) in [(0.0, 0), (0.25, 10), (0.5, 20), (0.66, 26), (1.0, 40)] {
            let factors = pilot(7, 3, &classes, (share, 0.1));
            assert_eq!(factors.iter().filter(|g| **g == 0.1).count(), n_drawn);
            assert_eq!(factors.iter().filter(|g| **g == 1.0).count(), 43 - n_drawn);
            assert_eq!(factors[40..], [1.0; 3]);
        }
        let draw = |seed, sample| pilot(seed, sample, &classes, (0.5, 0.0));
        assert_eq!(draw(7, 3), draw(7, 3));
        assert_ne!(draw(7, 3), draw(8, 3));
        assert_ne!(draw(7, 3), draw(7, 4));
    }

    #[test]
    fn signs_are_of_size_one_and_differ_by_place() {
        let draw = |place| -> Vec<f32> {
            let signs = signs(1, place, (30, 20), &Device::Cpu).unwrap();
            signs.flatten_all().unwrap().to_vec1().unwrap()
        };
        let some = draw([0, 0, 0]);
        assert!(some.iter().all(|v| v.abs() == 1.0));
        // Six standard deviations of a sum of 600 signs.
        assert!(some.iter().sum::<f32>().abs() < 6.0 * 600f32.sqrt());
        for place in [[1, 0, 0], [0, 1, 0], [0, 0, 1]] {
            assert_ne!(draw(place), some);
        }
    }
}
