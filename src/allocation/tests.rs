//! On the bundled model, a few samples of its calibration set.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::dataset::open_samples;
use crate::distributed::Alone;
use crate::importance::end_loss::answer_loss;
use crate::importance::walk::{Sequence, Walk, answer_places};
use crate::model::linear::matrix_from_tensor;
use crate::pipeline::Unobserved;
use crate::plan::ScaleDtype;
use crate::recipe::Method;
use crate::run::{SampleChoice, load_samples};
use crate::solver::{Clip, rtn};
use crate::{Matrix, sweep};
use candle_core::Device;
use std::path::Path;

const N_SAMPLES: usize = 2;

/// Of f32 products and sums against f64 ones.
const TOLERANCE: f64 = 1e-4;

fn opened() -> ModelSource {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/model");
    crate::families::open_model(Checkpoint::open(&folder).unwrap(), Device::Cpu).unwrap()
}

fn samples(model: &ModelSource, recipe: &Recipe) -> CalibrationSet {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/calibration");
    let choice = SampleChoice {
        set: open_samples(&path).unwrap(),
        n_samples: N_SAMPLES,
        seed: 0,
        max_tokens: 512,
    };
    let dir = std::env::temp_dir();
    load_samples(model, recipe, Some(&choice), u64::MAX, &dir, &Unobserved).unwrap()
}

fn recipe(mean: f64) -> Recipe {
    let bits = Bits::new(mean).unwrap();
    let scheme = Scheme::new(bits.ceil(), Some(64), false, ScaleDtype::Bf16).unwrap();
    Recipe::new(Method::Gptq, scheme).with_bits(bits)
}

fn with_rules(recipe: &Recipe, rules: &str) -> Recipe {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, rules).unwrap();
    let mut recipe = recipe.clone();
    recipe.read_rules(&path).unwrap();
    recipe
}

/// By down of layer 1, from its inputs and gradients, in f64.
#[test]
fn losses_are_those_of_their_definition() {
    const LAYER: usize = 1;
    let (model, recipe) = (opened(), recipe(2.5));
    let set = samples(&model, &recipe);
    let read = set.samples.iter().map(|s| Sequence::read(&set, s).unwrap());
    let sequences: Vec<Sequence> = read.collect();
    let places = set.samples.iter().map(|s| answer_places(&s.classes));
    let places: Vec<Vec<u32>> = places.collect();
    let head = model.load_head().unwrap();
    let walk = Walk::forward(&model, &sequences).unwrap();
    let losses = set.samples.iter().zip(&places).zip(&walk.outputs);
    let losses = losses.map(|((s, p), x)| answer_loss(&head, x, &s.input_ids, p).unwrap());
    let gradients = losses.map(|loss| loss.gradient).collect();
    let sides = walk.backward(gradients, |_, _, own| {
        let both = [&own.mlp.down, &own.mlp.h];
        Ok(both.map(|side| matrix_from_tensor(side).unwrap()))
    });
    let sides: Vec<[Matrix; 2]> = sides.unwrap().swap_remove(LAYER);
    let module = model.layer_modules(LAYER).pop().unwrap();
    let w = matrix_from_tensor(
        model
            .load_layer(LAYER)
            .unwrap()
            .linear(module.slot)
            .unwrap()
            .weight(),
    );
    let w = w.unwrap();
    let n_places: usize = places.iter().map(Vec::len).sum();
    let expected = Bits::SHARED.map(|bits| {
        let scheme = recipe.scheme().with_bits(bits).unwrap();
        let q = rtn("down", &w, scheme, Clip::None).unwrap().dequantize();
        let mut sum = 0.0;
        for [p, u] in &sides {
            for (token, out) in (0..p.rows()).flat_map(|t| (0..p.cols()).map(move |o| (t, o))) {
                let errors = q.row(out).iter().zip(w.row(out)).zip(u.row(token));
                let error: f64 = errors
                    .map(|((q, w), u)| f64::from(q - w) * f64::from(*u))
                    .sum();
                sum += (error * f64::from(p[(token, out)])).powi(2);
            }
        }
        0.5 * sum / n_places as f64
    });
    let groups = groups(&model, &recipe);
    let found = sensitivity::losses(&model, &recipe, &set, &groups, (&Alone, &Unobserved)).unwrap();
    let at = groups
        .iter()
        .position(|g| g.modules.contains(&module))
        .unwrap();
    for (found, expected) in found[at].iter().zip(expected) {
        let error = (found - expected).abs() / expected;
        assert!(error < TOLERANCE, "{found} {expected}");
    }
}

#[test]
fn every_way_keeps_the_budget_and_fused_linears_together() {
    let model = opened();
    let mut seen = Vec::new();
    for by in ["answer", "output", "ends", "random"] {
        let mut recipe = recipe(2.3);
        recipe.set(&format!("allocation_by={by}")).unwrap();
        let set = samples(&model, &recipe);
        let allocated = allocate(&model, &recipe, &set, (&Alone, &Unobserved)).unwrap();
        let report = allocated.report.unwrap();
        let AllocationReport {
            groups,
            code_bits_per_weight,
            ..
        } = &report;
        assert!(
            (2.25..=2.3).contains(code_bits_per_weight),
            "{by}: {code_bits_per_weight}"
        );
        assert_eq!(groups.len(), 16);
        let sizes: Vec<usize> = groups[..4].iter().map(|g| g.modules.len()).collect();
        assert_eq!(sizes, [3, 1, 2, 1]);
        allocated.recipe.check_shared(&model.modules()).unwrap();
        for group in groups {
            assert!(group.losses.is_sorted_by(|a, b| a > b), "{by}: {group:?}");
            for module in &group.modules {
                let scheme = allocated.recipe.scheme_of(module).unwrap();
                assert_eq!((scheme.bits(), scheme.group_size()), (group.bits, Some(64)));
            }
        }
        seen.push(groups.iter().map(|g| g.bits).collect::<Vec<u8>>());
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 4);
}

#[test]
fn rules_come_first_and_count() {
    let (model, plain) = (opened(), recipe(2.75));
    let rules = "[[rule]]\npattern = 'layers\\.0\\.'\nskip = true\n\
                 [[rule]]\npattern = 'down_proj$'\nbits = 4\n\
                 [[rule]]\npattern = 'o_proj$'\ngroup_size = 32\n";
    let recipe = with_rules(&plain, rules);
    let set = samples(&model, &recipe);
    let allocated = allocate(&model, &recipe, &set, (&Alone, &Unobserved)).unwrap();
    let report = allocated.report.unwrap();
    assert_eq!(report.groups.len(), 9);
    assert!(report.code_bits_per_weight <= 2.75);
    let scheme_of = |name| allocated.recipe.scheme_of(name);
    assert_eq!(scheme_of("model.layers.0.self_attn.q_proj"), None);
    assert_eq!(scheme_of("model.layers.1.mlp.down_proj").unwrap().bits(), 4);
    let o = scheme_of("model.layers.2.self_attn.o_proj").unwrap();
    assert_eq!(o.group_size(), Some(32));
    let greedy = with_rules(
        &plain,
        "[[rule]]\npattern = 'up_proj$|down_proj$'\nbits = 4\n",
    );
    let error = allocate(&model, &greedy, &set, (&Alone, &Unobserved)).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

#[test]
fn a_mean_that_nobody_shared_out_is_told() {
    let (model, recipe) = (opened(), recipe(2.5));
    let error = recipe.check_shared(&model.modules()).unwrap_err();
    assert!(error.to_string().contains("q_proj"), "{error}");
    let scheme = Scheme::new(3, Some(64), false, ScaleDtype::Bf16).unwrap();
    let uniform = Recipe::new(Method::Gptq, scheme);
    uniform.check_shared(&model.modules()).unwrap();
    let none = CalibrationSet::none();
    let allocated = allocate(&model, &uniform, &none, (&Alone, &Unobserved)).unwrap();
    assert!(allocated.report.is_none());
    let nearest = Recipe::new(Method::Rtn, scheme).with_bits(Bits::new(2.5).unwrap());
    assert!(matches!(nearest.check(), Err(Error::Invalid { .. })));
}

#[test]
fn experts_of_a_layer_are_one_group() {
    let slot = |projection, expert| Slot { projection, expert };
    let of_experts = [Projection::Gate, Projection::Up, Projection::Down];
    let places = of_experts.map(|projection| [0, 5].map(|e| place(slot(projection, Some(e)))));
    assert!(places.as_flattened().iter().all(|p| *p == places[0][0]));
    assert_ne!(place(slot(Projection::Down, None)), places[0][0]);
}

#[test]
fn rows_of_a_sweep_tell_what_was_shared_out() {
    let (model, recipe) = (opened(), recipe(2.5));
    let set = samples(&model, &recipe);
    let allocated = allocate(&model, &recipe, &set, (&Alone, &Unobserved)).unwrap();
    let report = allocated.report.unwrap();
    let short = sweep::AllocatedBits::from(report.clone());
    assert_eq!(short.bits.len(), 16);
    assert_eq!(short.stored_bytes, report.stored_bytes);
}
