//! On the bundled model, a few samples of its calibration set.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::dataset::open_samples;
use crate::model::Projection;
use crate::pipeline::Unobserved;
use crate::plan::{ScaleDtype, Scheme};
use crate::recipe::{Method, Recipe};
use crate::run::{SampleChoice, load_samples};
use crate::solver::{Clip, rtn};
use candle_core::Device;
use std::path::Path;

/// A central difference of losses in f32 over a step that is not small, against the gradient.
const SLOPE_TOLERANCE: f64 = 0.02;

fn opened() -> ModelSource {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/model");
    crate::families::open_model(Checkpoint::open(&folder).unwrap(), Device::Cpu).unwrap()
}

fn scheme(bits: u8, dtype: ScaleDtype) -> Scheme {
    Scheme::new(bits, Some(64), false, dtype).unwrap()
}

fn samples(model: &ModelSource, n_samples: usize) -> CalibrationSet {
    let recipe = Recipe::new(Method::Gptq, scheme(4, ScaleDtype::F32));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/calibration");
    let choice = SampleChoice {
        set: open_samples(&path).unwrap(),
        n_samples,
        seed: 0,
        max_tokens: 512,
    };
    let dir = std::env::temp_dir();
    load_samples(model, &recipe, Some(&choice), u64::MAX, &dir, &Unobserved).unwrap()
}

fn rounded(model: &ModelSource, scheme: Scheme) -> Vec<(Module, QuantizedWeight)> {
    let modules = model.modules().into_iter();
    let weights = modules.map(|module| {
        let [out, inp] = module.shape;
        let w = model.checkpoint().linear_weight(&module.name, out, inp);
        let weight = rtn(&module.name, &w.unwrap(), scheme, Clip::None).unwrap();
        (module, weight)
    });
    weights.collect()
}

fn settings(steps: usize, rate: f64) -> TuningSettings {
    TuningSettings {
        steps,
        batch: 3,
        rate,
        loss: TuningLoss::Answer,
        samples: None,
    }
}

/// Along its own gradient, each linear's scales change the loss by the gradient's length.
#[test]
fn gradients_of_scales_are_slopes_of_the_loss() {
    const STEP: f32 = 0.02;
    let model = opened();
    let set = samples(&model, 3);
    let weights = rounded(&model, scheme(3, ScaleDtype::F32));
    for loss in [TuningLoss::Answer, TuningLoss::All] {
        let comparison = Comparison::new(&model, &set, loss, &Unobserved).unwrap();
        let mut student = Student::new(&model, weights.clone());
        let gradients = comparison.gradients(&student, &[0, 1, 2]).unwrap();
        let start = student.thetas();
        for projection in Projection::ALL {
            let own = |(module, _): &(Module, QuantizedWeight)| {
                module.slot.projection == projection && module.layer_idx == 1
            };
            let index = weights.iter().position(own).unwrap();
            let scales = weights[index].1.scales().data();
            let pairs = gradients[index].iter().zip(scales);
            let slope: Vec<f32> = pairs.map(|(g, s)| g * s).collect();
            let length = slope.iter().map(|v| v * v).sum::<f32>().sqrt();
            let mut value = |step: f32| {
                let mut thetas = start.clone();
                let moved = thetas[index].iter_mut().zip(&slope);
                moved.for_each(|(theta, g)| *theta += step * g / length);
                student.restore(&thetas).unwrap();
                comparison.loss(&student, &[0, 1, 2]).unwrap()
            };
            let found = (value(STEP) - value(-STEP)) / f64::from(2.0 * STEP);
            let error = (found / f64::from(length) - 1.0).abs();
            assert!(
                error <= SLOPE_TOLERANCE,
                "{projection:?}, {loss:?}: {found:.3e} measured, {length:.3e} expected"
            );
        }
    }
}

#[test]
fn tuning_brings_a_coarse_model_nearer_for_any_number_of_threads() {
    let model = opened();
    let set = samples(&model, 9);
    let start = rounded(&model, scheme(2, ScaleDtype::Bf16));
    let tuned = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
        let run = || tune(&model, &set, start.clone(), settings(6, 0.02), &Unobserved);
        pool.build().unwrap().install(run).unwrap()
    };
    let (one, three) = (tuned(1), tuned(3));
    assert_eq!(one.weights, three.weights);
    let report = one.report;
    assert_eq!((report.n_samples, report.n_held_out), (8, 1));
    assert!(report.best_step > 0);
    assert!(report.held_out_after < report.held_out_before);
    // Of the samples tuned on the report judges as many as are held out, here a single one: that
    // one may have lost what the others gained.
    assert!(report.loss_after.is_finite());
    for ((module, before), (same, after)) in start.iter().zip(&one.weights) {
        assert_eq!(module, same);
        assert_eq!(before.codes(), after.codes());
        assert_eq!(before.zero_points(), after.zero_points());
        assert_ne!(before.scales(), after.scales(), "{}", module.name);
    }
}

#[test]
fn tuning_that_helps_nothing_is_undone() {
    let model = opened();
    let set = samples(&model, 4);
    let start = rounded(&model, scheme(8, ScaleDtype::Bf16));
    let tuned = tune(&model, &set, start.clone(), settings(2, 1.0), &Unobserved).unwrap();
    assert_eq!(tuned.report.best_step, 0);
    assert_eq!(tuned.report.loss_after, tuned.report.loss_before);
    assert_eq!(tuned.report.held_out_after, tuned.report.held_out_before);
    assert_eq!(tuned.weights, start);
}

#[test]
fn tuning_needs_samples_to_hold_out() {
    let model = opened();
    let set = samples(&model, 1);
    let start = rounded(&model, scheme(8, ScaleDtype::Bf16));
    let tuned = tune(&model, &set, start, settings(2, 0.1), &Unobserved);
    assert!(matches!(tuned, Err(Error::Invalid { .. })));
}

#[test]
fn lots_go_through_all_before_any_comes_again() {
    let mut lots = Lots::new((0..7).collect());
    let sizes = [3, 3, 1];
    for _ in 0..2 {
        let round: Vec<Vec<usize>> = sizes.iter().map(|_| lots.next(3)).collect();
        assert!(round.iter().map(Vec::len).eq(sizes));
        let mut all = round.concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn the_rate_falls_to_a_tenth() {
    let settings = settings(10, 0.1);
    assert!((settings.rate_at(0) - 0.1).abs() < 1e-12);
    assert!((settings.rate_at(10) - 0.01).abs() < 1e-12);
}
