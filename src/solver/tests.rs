//! Laws of the solver, its reference, and the independent numpy results in `testdata/solver`.

mod beyond;
mod held_out;

use super::*;
use crate::plan::{ScaleDtype, Scheme};
use crate::statistics::Statistics;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

/// Relative error of a loss computed from the same codes: f32 sums of at most a few hundred terms.
const SAME_LOSS: f64 = 1e-4;

/// Rows that may differ between two evaluations of one recurrence in other orders of summation: a
/// weight within f32 error of a rounding tie (about one in 10^5 codes) may fall either way, and
/// the later columns of its row follow it.
const MAX_TIED_ROWS: usize = 2;

fn random(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Matrix {
    Matrix::from_fn(rows, cols, |_, _| {
        (0..4).map(|_| rng.random_range(-0.87f32..0.87)).sum()
    })
}

/// Correlated inputs whose columns differ in size, and the same with drift and noise.
fn streams(n_tokens: usize, cols: usize, rng: &mut ChaCha8Rng) -> (Matrix, Matrix) {
    let mixing = random(cols, cols, rng);
    let raw = random(n_tokens, cols, rng);
    let noise = random(n_tokens, cols, rng);
    let size: Vec<f32> = (0..cols).map(|_| rng.random_range(0.2f32..2.0)).collect();
    let strength = 1.5 / (cols as f32).sqrt();
    let f = Matrix::from_fn(n_tokens, cols, |t, j| {
        let mixed: f32 = (0..cols).map(|k| raw[(t, k)] * mixing[(k, j)]).sum();
        size[j] * (raw[(t, j)] + strength * mixed)
    });
    let u = Matrix::from_fn(n_tokens, cols, |t, j| {
        f[(t, j)] * 1.05 + 0.1 * size[j] * noise[(t, j)] + 0.05 * f[(t, (j + 1) % cols)]
    });
    (u, f)
}

struct Layer {
    w: Matrix,
    u: Matrix,
    f: Matrix,
    statistics: Statistics,
}

fn layer(rows: usize, cols: usize, n_tokens: usize, seed: u64) -> Layer {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let w = random(rows, cols, &mut rng);
    let (u, f) = streams(n_tokens, cols, &mut rng);
    let mut statistics = Statistics::new(cols, true);
    statistics.add("layer", &u, Some(&f), None).unwrap();
    Layer {
        w,
        u,
        f,
        statistics,
    }
}

fn scheme(bits: u8, group_size: Option<usize>, symmetric: bool) -> Scheme {
    Scheme::new(bits, group_size, symmetric, ScaleDtype::Bf16).unwrap()
}

fn with(act_order: bool, alpha: f32) -> SolverSettings {
    SolverSettings {
        act_order,
        alpha,
        ..Default::default()
    }
}

fn n_different_rows(a: &QuantizedWeight, b: &QuantizedWeight) -> usize {
    let rows = a.codes().chunks(a.cols()).zip(b.codes().chunks(b.cols()));
    rows.filter(|(a, b)| a != b).count()
}

/// Whether two solutions agree up to ties: few rows differ, and the loss by no more than those.
fn agree(a: (&QuantizedWeight, f64), b: (&QuantizedWeight, f64)) -> bool {
    let n_different = n_different_rows(a.0, b.0);
    let tolerance = SAME_LOSS + n_different as f64 / a.0.rows() as f64;
    n_different <= MAX_TIED_ROWS && (a.1 - b.1).abs() < tolerance * a.1
}

/// tr(D M Dᵀ) with D = w − q, in f64.
fn exact_loss(w: &Matrix, q: &Matrix, m: &[Vec<f64>]) -> f64 {
    let row_loss = |row: usize| -> f64 {
        let pairs = w.row(row).iter().zip(q.row(row));
        let d: Vec<f64> = pairs.map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
        let products = m
            .iter()
            .map(|m| m.iter().zip(&d).map(|(m, d)| m * d).sum::<f64>());
        products.zip(&d).map(|(p, d)| p * d).sum()
    };
    (0..w.rows()).map(row_loss).sum()
}

fn any_scheme() -> impl Strategy<Value = Scheme> {
    let bits = prop::sample::select(vec![2u8, 3, 4]);
    let group = prop::sample::select(vec![Some(8), Some(16), None]);
    (bits, group, any::<bool>()).prop_map(|(b, g, s)| scheme(b, g, s))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Houses' law (a): the errors of the steps add up to the damped loss.
    #[test]
    fn step_losses_add_up(seed: u64, scheme in any_scheme(), act_order: bool) {
        let layer = layer(3, 16, 24, seed);
        let settings = with(act_order, 0.0);
        let solved =
            reference::gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        let damped = reference::damped(&layer.statistics.hessian(), 0.01).unwrap();
        let loss = exact_loss(&layer.w, &solved.weight.dequantize(), &damped);
        // Dequantized values are exact (bf16 scale times a small integer), so only the f64
        // inverses err, by about eps · condition.
        prop_assert!((solved.step_loss - loss).abs() < 1e-9 * loss);
    }

    /// The loss told is H's own, whether it was added up on the way or asked of H: many tokens and
    /// few, with dead columns, all dampings.
    #[test]
    fn the_loss_told_is_that_of_the_weight(
        seed: u64,
        scheme in any_scheme(),
        act_order: bool,
        n_tokens in prop::sample::select(vec![2usize, 6, 20, 48, 300]),
        dampening_frac in prop::sample::select(vec![1e-4, 0.01, 0.1, 1.0]),
        n_dead in 0usize..3,
    ) {
        let mut layer = layer(20, 48, n_tokens, seed);
        for token in 0..n_tokens {
            layer.u.row_mut(token)[7..7 + n_dead].fill(0.0);
        }
        let mut statistics = Statistics::new(48, false);
        statistics.add("layer", &layer.u, None, None).unwrap();
        let settings = SolverSettings { dampening_frac, ..with(act_order, 0.0) };
        let solved = gptq("layer", &layer.w, &statistics, scheme, &settings).unwrap();
        let q = solved.weight.dequantize();
        let loss = layer_loss(&layer.w, &q, statistics.hessian_lower());
        prop_assert_eq!(solved.n_dead_columns, n_dead);
        prop_assert!((solved.loss - loss).abs() < SAME_LOSS * loss, "{} {loss}", solved.loss);
    }

    #[test]
    fn fast_path_follows_the_reference(
        seed: u64,
        scheme in any_scheme(),
        act_order: bool,
        alpha in prop::sample::select(vec![0.0f32, 0.25, 1.0]),
    ) {
        let layer = layer(40, 32, 64, seed);
        let settings = SolverSettings { col_block: 16, ..with(act_order, alpha) };
        let fast = gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        let slow =
            reference::gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        let q = slow.weight.dequantize();
        let loss = layer_loss(&layer.w, &q, &layer.statistics.hessian());
        prop_assert!(agree((&fast.weight, fast.loss), (&slow.weight, loss)));
    }

    /// Law (b): the width of the lazy updates is a matter of speed.
    #[test]
    fn block_width_changes_nothing(seed: u64, scheme in any_scheme(), act_order: bool) {
        let layer = layer(24, 48, 96, seed);
        let solve = |col_block| {
            let settings = SolverSettings { col_block, ..with(act_order, 0.25) };
            gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap()
        };
        let whole = solve(128);
        for col_block in [1, 7, 8, 16, 24, 40] {
            let other = solve(col_block);
            let pair = ((&whole.weight, whole.loss), (&other.weight, other.loss));
            prop_assert!(agree(pair.0, pair.1), "{col_block}");
        }
    }

    /// Law (c), for powers of two exactly: the scale of H is nothing.
    #[test]
    fn hessian_scale_changes_nothing(seed: u64, scheme in any_scheme(), power in -20i32..20) {
        let layer = layer(9, 32, 64, seed);
        let settings = with(true, 0.25);
        let factor = 2f32.powi(power);
        let scaled = |m: &Matrix| Matrix::from_fn(32, 32, |i, j| m[(i, j)] * factor);
        let hessian = scaled(&layer.statistics.hessian());
        let cross = layer.statistics.cross().map(scaled);
        let scaled = Statistics::from_moments(&hessian, cross.as_ref());
        let one = gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        let two = gptq("layer", &layer.w, &scaled, scheme, &settings).unwrap();
        prop_assert_eq!(&one.weight, &two.weight);
        prop_assert_eq!(one.loss * f64::from(factor), two.loss);
    }

    /// Law (d): without correlations there is nothing to compensate.
    #[test]
    fn identity_hessian_rounds_to_nearest(
        seed: u64,
        scheme in any_scheme(),
        act_order: bool,
        c in 1e-6f32..1e6,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w = random(5, 48, &mut rng);
        let identity = Matrix::from_fn(48, 48, |i, j| if i == j { c } else { 0.0 });
        let statistics = Statistics::from_moments(&identity, None);
        let settings = with(act_order, 0.0);
        let nearest = rtn("layer", &w, scheme, Clip::None).unwrap();
        let fast = gptq("layer", &w, &statistics, scheme, &settings).unwrap();
        let slow = reference::gptq("layer", &w, &statistics, scheme, &settings).unwrap();
        prop_assert_eq!(&fast.weight, &nearest);
        // The reference divides in f64, which may see another tie.
        prop_assert!(n_different_rows(&slow.weight, &nearest) <= MAX_TIED_ROWS);
    }
}

#[test]
fn uniform_weights_and_no_drift_are_plain_gptq() {
    let layer = layer(10, 32, 64, 1);
    let solve = |weights: Option<&[f32]>, alpha| {
        let mut statistics = Statistics::new(32, true);
        statistics
            .add("layer", &layer.u, Some(&layer.u), weights)
            .unwrap();
        assert!(statistics.cross().unwrap().data().iter().all(|v| *v == 0.0));
        gptq(
            "layer",
            &layer.w,
            &statistics,
            scheme(3, Some(8), false),
            &with(true, alpha),
        )
        .unwrap()
    };
    let plain = solve(None, 0.0);
    assert_eq!(plain.weight, solve(None, 0.25).weight);
    assert_eq!(plain.weight, solve(Some(&[1.0; 64]), 0.25).weight);
    assert_eq!(plain.weight, solve(Some(&[4.0; 64]), 0.0).weight);
}

#[test]
fn zero_alpha_ignores_drift() {
    let layer = layer(10, 32, 64, 2);
    let mut without = Statistics::new(32, false);
    without.add("layer", &layer.u, None, None).unwrap();
    let scheme = scheme(3, Some(8), false);
    let one = gptq(
        "layer",
        &layer.w,
        &layer.statistics,
        scheme,
        &with(true, 0.0),
    )
    .unwrap();
    let two = gptq("layer", &layer.w, &without, scheme, &with(true, 0.0)).unwrap();
    assert_eq!(one, two);
    let missing = gptq("layer", &layer.w, &without, scheme, &with(true, 0.25));
    assert!(matches!(missing, Err(Error::Missing { .. })));
}

/// A mean, not a theorem: houses.md (e).
#[test]
fn gptq_beats_rounding_and_gptaq_follows_the_full_precision_stream_on_the_mean() {
    let (mut rounding, mut plain, mut drift_plain, mut drift_pulled) = (0.0, 0.0, 0.0, 0.0);
    for seed in 0..12 {
        let layer = layer(16, 64, 256, seed);
        let scheme = scheme(3, Some(16), false);
        let nearest = rtn("layer", &layer.w, scheme, Clip::None).unwrap();
        let hessian = layer.statistics.hessian();
        rounding += layer_loss(&layer.w, &nearest.dequantize(), &hessian);
        let solve = |alpha| {
            gptq(
                "layer",
                &layer.w,
                &layer.statistics,
                scheme,
                &with(true, alpha),
            )
            .unwrap()
        };
        let (gptq, gptaq) = (solve(0.0), solve(0.25));
        plain += gptq.loss;
        drift_plain += stream_loss(&layer, &gptq.weight);
        drift_pulled += stream_loss(&layer, &gptaq.weight);
    }
    assert!(plain < 0.7 * rounding, "{plain} {rounding}");
    assert!(
        drift_pulled < 0.97 * drift_plain,
        "{drift_pulled} {drift_plain}"
    );
}

/// ‖ŴU − WF‖², GPTAQ's objective.
fn stream_loss(layer: &Layer, weight: &QuantizedWeight) -> f64 {
    let q = weight.dequantize();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    let mut sum = 0.0;
    for token in 0..layer.u.rows() {
        for row in 0..q.rows() {
            let target = dot(layer.w.row(row), layer.f.row(token));
            sum += (dot(q.row(row), layer.u.row(token)) - target).powi(2);
        }
    }
    sum
}

#[test]
fn singular_hessians_are_damped_and_the_steps_recorded() {
    let layer = layer(8, 32, 5, 3);
    let scheme = scheme(4, Some(16), true);
    let solve = |dampening_frac, ladder: &[f64]| {
        let settings = SolverSettings {
            dampening_frac,
            dampening_ladder: ladder.to_vec(),
            ..Default::default()
        };
        gptq("layer", &layer.w, &layer.statistics, scheme, &settings)
    };
    let solved = solve(0.01, &[]).unwrap();
    assert_eq!(
        (solved.dampening_frac, solved.dampening_steps),
        (0.01, vec![])
    );
    let solved = solve(0.0, &[1e-12, 0.02, 0.5]).unwrap();
    assert_eq!(solved.dampening_frac, 0.02);
    assert_eq!(solved.dampening_steps, [0.0, 1e-12]);
    let Err(Error::Singular {
        module,
        pivot,
        dampening_frac,
    }) = solve(0.0, &[1e-12])
    else {
        panic!("a singular H was accepted");
    };
    assert_eq!((module.as_str(), dampening_frac), ("layer", 1e-12));
    assert!(pivot < 32);
}

/// Pictures of one colour: four tokens over and over, so H has rank four of 32 columns.
#[test]
fn tokens_seen_again_and_again_still_beat_rounding() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let w = random(8, 32, &mut rng);
    let (u, f) = streams(4, 32, &mut rng);
    let mut statistics = Statistics::new(32, true);
    for _ in 0..16 {
        statistics.add("layer", &u, Some(&f), None).unwrap();
    }
    let scheme = scheme(3, Some(16), false);
    let rounded = rtn("layer", &w, scheme, Clip::None).unwrap();
    let rounded = layer_loss(&w, &rounded.dequantize(), statistics.hessian_lower());
    for alpha in [0.0, 0.25] {
        let solved = gptq("layer", &w, &statistics, scheme, &with(true, alpha)).unwrap();
        assert_eq!(solved.dampening_frac, 0.01);
        assert!(solved.weight.scales().data().iter().all(|s| s.is_finite()));
        let loss = solved.loss;
        assert!(loss < 0.1 * rounded, "alpha {alpha}: {loss} and {rounded}");
    }
}

#[test]
fn dead_columns_are_rounded_to_nearest_and_never_zeroed() {
    for act_order in [true, false] {
        let mut layer = layer(8, 32, 64, 4);
        for token in 0..64 {
            layer.u[(token, 5)] = 0.0;
            layer.u[(token, 20)] = 0.0;
        }
        let mut statistics = Statistics::new(32, true);
        statistics
            .add("layer", &layer.u, Some(&layer.f), None)
            .unwrap();
        let scheme = scheme(4, None, true);
        let settings = with(act_order, 0.25);
        let solved = gptq("layer", &layer.w, &statistics, scheme, &settings).unwrap();
        let slow = reference::gptq("layer", &layer.w, &statistics, scheme, &settings).unwrap();
        assert_eq!(solved.n_dead_columns, 2);
        assert!(n_different_rows(&solved.weight, &slow.weight) <= MAX_TIED_ROWS);
        let nearest = rtn("layer", &layer.w, scheme, Clip::None).unwrap();
        for row in 0..8 {
            for column in [5, 20] {
                let index = row * 32 + column;
                assert_eq!(solved.weight.codes()[index], nearest.codes()[index]);
            }
        }
    }
}

#[test]
fn vanished_importance_is_an_error() {
    let layer = layer(8, 32, 64, 5);
    let mut statistics = Statistics::new(32, false);
    statistics
        .add("layer", &layer.u, None, Some(&[0.0; 64]))
        .unwrap();
    let solved = gptq(
        "layer",
        &layer.w,
        &statistics,
        scheme(4, None, true),
        &with(true, 0.0),
    );
    assert!(matches!(solved, Err(Error::Singular { .. })));
}

#[test]
fn bad_numbers_shapes_and_settings_are_errors() {
    let layer = layer(4, 32, 64, 6);
    let scheme = scheme(4, Some(16), true);
    let solve = |w: &Matrix, statistics: &Statistics, settings: &SolverSettings| {
        gptq("layer", w, statistics, scheme, settings)
    };
    let settings = with(true, 0.25);
    let mut w = layer.w.clone();
    w[(1, 3)] = f32::NAN;
    let stage = |result: Result<Solved>| match result {
        Err(Error::NotFinite { stage, .. }) => stage,
        other => format!("{other:?}"),
    };
    assert_eq!(stage(solve(&w, &layer.statistics, &settings)), "weights");
    let mut hessian = layer.statistics.hessian();
    hessian[(9, 3)] = f32::NAN;
    let broken = Statistics::from_moments(&hessian, None);
    assert_eq!(stage(solve(&layer.w, &broken, &with(true, 0.0))), "hessian");
    let wide = layer.w.clone().into_vec();
    let wide = Matrix::from_vec("wide", 2, 64, wide).unwrap();
    let result = solve(&wide, &layer.statistics, &settings);
    assert!(matches!(result, Err(Error::Shape { .. })));
    let narrow = Matrix::from_fn(4, 24, |_, _| 1.0);
    let result = solve(&narrow, &Statistics::new(24, true), &settings);
    assert!(matches!(result, Err(Error::Invalid { .. })));
    let bad = [
        SolverSettings {
            dampening_frac: -1.0,
            ..Default::default()
        },
        SolverSettings {
            dampening_ladder: vec![f64::NAN],
            ..Default::default()
        },
        SolverSettings {
            alpha: 1.5,
            ..Default::default()
        },
        SolverSettings {
            alpha: f32::NAN,
            ..Default::default()
        },
        SolverSettings {
            col_block: 0,
            ..Default::default()
        },
    ];
    for settings in bad {
        let result = solve(&layer.w, &layer.statistics, &settings);
        assert!(matches!(result, Err(Error::Invalid { .. })), "{settings:?}");
    }
}

#[test]
fn huge_weights_overflow_f16_scales_loudly() {
    let w = Matrix::from_fn(2, 16, |_, j| j as f32 * 1e6);
    let scheme = Scheme::new(4, None, true, ScaleDtype::F16).unwrap();
    let result = rtn("layer", &w, scheme, Clip::None);
    assert!(matches!(result, Err(Error::NotFinite { .. })));
}

#[test]
fn same_bytes_for_any_number_of_threads() {
    let layer = layer(70, 328, 400, 7);
    let solve = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut statistics = Statistics::new(328, true);
            let weights: Vec<f32> = (0..400).map(|i| 0.1 + i as f32).collect();
            let f = Some(&layer.f);
            statistics
                .add("layer", &layer.u, f, Some(&weights))
                .unwrap();
            let settings = with(true, 0.25);
            let scheme = scheme(3, Some(8), false);
            let solved = gptq("layer", &layer.w, &statistics, scheme, &settings).unwrap();
            let factor =
                super::factor::Factor::new("layer", statistics.clone(), &settings).unwrap();
            let (upper, pull) = (factor.hessian_lower().clone(), factor.pull().cloned());
            (statistics, solved, upper, pull)
        })
    };
    let one = solve(1);
    for n_threads in [2, 3, 8] {
        assert!(solve(n_threads) == one, "{n_threads} threads");
    }
}

#[test]
fn loss_is_the_weighted_output_error() {
    let layer = layer(70, 300, 350, 8);
    let nearest = rtn("layer", &layer.w, scheme(2, None, false), Clip::Mse).unwrap();
    let q = nearest.dequantize();
    let mut statistics = Statistics::new(300, false);
    let weights: Vec<f32> = (0..350).map(|i| (i % 5) as f32).collect();
    statistics
        .add("layer", &layer.u, None, Some(&weights))
        .unwrap();
    let mut expected = 0.0;
    for (token, weight) in weights.iter().enumerate() {
        for row in 0..70 {
            let differences = layer.w.row(row).iter().zip(q.row(row)).map(|(w, q)| w - q);
            let products = differences.zip(layer.u.row(token));
            let error: f64 = products.map(|(d, u)| f64::from(d) * f64::from(*u)).sum();
            expected += f64::from(*weight) * error * error;
        }
    }
    let nothing = Matrix::zeros(70, 300);
    let energy = layer_loss(&layer.w, &nothing, &statistics.hessian());
    let solved = gptq(
        "layer",
        &layer.w,
        &statistics,
        scheme(2, None, false),
        &with(true, 0.0),
    );
    assert_eq!(solved.unwrap().energy, energy);
    let loss = layer_loss(&layer.w, &q, &statistics.hessian());
    // f32 sums of 350 tokens and 300 columns with random signs.
    assert!(
        (loss - expected).abs() < 1e-5 * expected,
        "{loss} {expected}"
    );
    assert!(layer_loss(&layer.w, &layer.u, &statistics.hessian()).is_nan());
}

/// Loss and codes against plain numpy in f64, whose source is `tests/oracle/solver_golden.py`.
#[test]
fn agrees_with_numpy() {
    // Scales come from f32 ranges, and numpy's from f64 ones: some roundings, if not stored in 16 bits.
    check_all("cases", 15, 4.0 * f32::EPSILON);
}

/// Loss and codes against Brevitas' Qronos in f64, written by `tests/oracle/qronos_golden.py`.
#[test]
fn agrees_with_qronos_authors() {
    // Scales come from the target, which f32 tells to four digits with so little damping: some lie one
    // step of f16 apart.
    check_all("qronos", 4, 2f32.powi(-10));
}

fn check_all(file: &str, n_cases: usize, scale_tolerance: f32) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/solver");
    let bytes = std::fs::read(format!("{folder}/{file}.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let golden = Golden(SafeTensors::deserialize(&bytes).unwrap());
    let cases = header.metadata().as_ref().unwrap()["cases"].clone();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&cases).unwrap();
    assert_eq!(cases.len(), n_cases);
    for (index, case) in cases.iter().enumerate() {
        golden.check(index, case, scale_tolerance);
    }
}

struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn bytes(&self, name: &str) -> Vec<u8> {
        self.0.tensor(name).unwrap().data().to_vec()
    }

    fn matrix(&self, name: &str) -> Matrix {
        let values = self.bytes(name);
        let values = values
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let shape = self.0.tensor(name).unwrap().shape().to_vec();
        let cols = shape.get(1).copied().unwrap_or(1);
        Matrix::from_vec(name, shape[0], cols, values.collect()).unwrap()
    }

    fn check(&self, index: usize, case: &serde_json::Value, scale_tolerance: f32) {
        let group_size = case["group_size"].as_u64().map(|g| g as usize);
        let dtype = serde_json::from_value(case["dtype"].clone()).unwrap();
        let bits = case["bits"].as_u64().unwrap() as u8;
        let symmetric = case["symmetric"].as_bool().unwrap();
        let scheme = Scheme::new(bits, group_size, symmetric, dtype).unwrap();
        let settings: SolverSettings = serde_json::from_value(case.clone()).unwrap();
        let w = self.matrix("weight");
        let (u, f) = (self.matrix("quantized"), self.matrix("full"));
        let omega = self.matrix("token_weights");
        let omega = case["weighted"].as_bool().unwrap().then_some(omega.data());
        let mut statistics = Statistics::new(w.cols(), true);
        statistics.add("layer", &u, Some(&f), omega).unwrap();
        let weight = if case["method"] == "rtn" {
            rtn("layer", &w, scheme, settings.clip).unwrap()
        } else {
            gptq("layer", &w, &statistics, scheme, &settings)
                .unwrap()
                .weight
        };
        let expected = QuantizedWeight::new(
            "numpy",
            scheme,
            [w.rows(), w.cols()],
            self.bytes(&format!("{index}.codes")),
            self.matrix(&format!("{index}.scales")),
            self.bytes(&format!("{index}.zero_points")),
        );
        let expected = expected.unwrap();
        let loss = layer_loss(&w, &weight.dequantize(), &statistics.hessian());
        let numpy_loss = case["loss"].as_f64().unwrap();
        let mut scales = weight.scales().data().iter().zip(expected.scales().data());
        let is_close = |(a, b): (&f32, &f32)| (a - b).abs() <= scale_tolerance * b;
        assert!(scales.all(is_close), "case {index}");
        assert!(
            agree((&weight, loss), (&expected, numpy_loss)),
            "case {index}: {loss}"
        );
    }
}
