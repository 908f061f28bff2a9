//! Searches for scales through the library, as a method to come would ask for them.

use super::tiny::{Home, N_MODULES, Spelling};
use std::path::Path;
use vlmq::checkpoint::Checkpoint;
use vlmq::dataset::open_samples;
use vlmq::families::open_model;
use vlmq::importance::ModalityRatios;
use vlmq::model::{ChangedTensor, Module};
use vlmq::pipeline::{LayerOutcome, LayerSink, ScaleSearch, Unobserved, quantize_with};
use vlmq::plan::{ScaleDtype, Scheme};
use vlmq::processor::MAX_TEXT_TOKENS;
use vlmq::recipe::{Method, Recipe};
use vlmq::run::{SampleChoice, load_samples};
use vlmq::{QuantizedWeight, Result};

#[derive(Default)]
struct Counted {
    n_modules: usize,
    n_tensors: usize,
}

impl LayerSink for Counted {
    fn module(&mut self, _: &Module, _: &QuantizedWeight) -> Result<()> {
        self.n_modules += 1;
        Ok(())
    }

    fn tensor(&mut self, _: &ChangedTensor) -> Result<()> {
        self.n_tensors += 1;
        Ok(())
    }
}

fn outcomes(home: &Home, search: &ScaleSearch) -> Vec<LayerOutcome> {
    let checkpoint = Checkpoint::open(&home.model()).unwrap();
    let model = open_model(checkpoint, candle_core::Device::Cpu).unwrap();
    let scheme = Scheme::new(3, Some(32), false, ScaleDtype::Bf16).unwrap();
    let recipe = Recipe::new(Method::Awq, scheme);
    let choice = SampleChoice {
        set: open_samples(&home.data()).unwrap(),
        n_samples: 4,
        seed: 0,
        max_tokens: MAX_TEXT_TOKENS,
    };
    let here = Path::new(".");
    let set = load_samples(&model, &recipe, Some(&choice), u64::MAX, here, &Unobserved).unwrap();
    let mut sink = Counted::default();
    let done = quantize_with(&model, set, &recipe, Some(search), &Unobserved, &mut sink);
    assert_eq!(sink.n_modules, N_MODULES);
    let done = done.unwrap();
    let n_changed: usize = done.iter().map(|layer| layer.changed.len()).sum();
    assert_eq!(sink.n_tensors, n_changed);
    done
}

/// MBQ's loss is (answer + ρ · vision) / tokens of both, so that it is a straight line in ρ; ρ is
/// one number for attention and one for the MLP of each layer.
#[test]
fn errors_of_vision_tokens_count_as_much_as_their_ratio_says() {
    let home = Home::new(Spelling::USUAL);
    let losses = |ratio: f64| -> Vec<f64> {
        let ratios = ModalityRatios {
            attention: vec![ratio, ratio / 2.0],
            mlp: vec![ratio, ratio / 2.0],
        };
        let layers = outcomes(&home, &ScaleSearch::mbq(ratios));
        let scales = layers.into_iter().flat_map(|layer| layer.scales);
        scales.flat_map(|search| search.losses).collect()
    };
    let (none, half, all) = (losses(0.0), losses(0.5), losses(1.0));
    assert_eq!(none.len(), N_MODULES / 7 * 3 * 20);
    for ((none, half), all) in none.iter().zip(&half).zip(&all) {
        assert!(0.0 < *none && none < half && half < all);
        assert!(((none + all) / 2.0 / half - 1.0).abs() < 1e-9);
    }
}
