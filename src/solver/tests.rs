//! The laws that every solver of this kind obeys, on random layers; the fast solver against the
//! naive one; and both against an independent implementation in Python.

use super::reference::{Rows, rows_from_matrix};
use super::*;
use crate::plan::ScaleDtype;
use crate::statistics::Statistics;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const IN: usize = 24;
const OUT: usize = 4;

fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
}

/// Inputs of which some are large and all are correlated, as hidden states are.
fn inputs(n_tokens: usize, seed: u64) -> Matrix {
    let mix = random(IN, IN, seed + 1);
    let raw = random(n_tokens, IN, seed + 2);
    Matrix::from_fn(n_tokens, IN, |n, i| {
        let shared: f32 = (0..IN).map(|k| raw[(n, k)] * mix[(k, i)]).sum();
        raw[(n, i)] + 0.3 * shared + if i == 5 { 3.0 } else { 0.0 }
    })
}

struct Layer {
    w: Matrix,
    u: Matrix,
    f: Matrix,
}

impl Layer {
    fn new(seed: u64) -> Self {
        let u = inputs(60, seed);
        let noise = random(60, IN, seed + 9);
        let f = Matrix::from_fn(60, IN, |n, i| u[(n, i)] + 0.1 * noise[(n, i)]);
        Self {
            w: random(OUT, IN, seed),
            u,
            f,
        }
    }

    fn statistics(&self, weights: Option<&[f32]>) -> Statistics {
        let mut s = Statistics::new(IN, true);
        s.add("m", &self.u, Some(&self.f), weights).unwrap();
        s
    }

    fn solve(&self, scheme: Scheme, settings: &SolverSettings) -> Solved {
        gptq("m", &self.w, &self.statistics(None), scheme, settings).unwrap()
    }
}

fn scheme(bits: u8, group_size: Option<usize>, symmetric: bool) -> Scheme {
    Scheme::new(bits, group_size, symmetric, ScaleDtype::F32).unwrap()
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let bits = prop::sample::select(vec![2u8, 3, 4]);
    let group = prop::sample::select(vec![None, Some(8), Some(24)]);
    (bits, group, any::<bool>()).prop_map(|(b, g, s)| scheme(b, g, s))
}

fn settings(act_order: bool, alpha: f32) -> SolverSettings {
    SolverSettings {
        act_order,
        alpha,
        ..SolverSettings::default()
    }
}

fn damped(hessian: &Matrix, frac: f64) -> Rows {
    let mut rows = rows_from_matrix(hessian);
    let mean = (0..IN).map(|i| rows[i][i]).sum::<f64>() / IN as f64;
    (0..IN).for_each(|i| rows[i][i] += frac * mean);
    rows
}

fn naive(layer: &Layer, scheme: Scheme, settings: &SolverSettings) -> reference::ReferenceSolution {
    let s = layer.statistics(None);
    let factor = Factor::new("m", &s, settings).unwrap();
    let cross = s
        .cross()
        .map(rows_from_matrix)
        .filter(|_| settings.alpha != 0.0);
    reference::solve(
        &rows_from_matrix(&layer.w),
        &damped(&s.hessian(), settings.dampening_frac),
        cross.as_ref(),
        &factor.order,
        scheme,
        settings,
    )
    .unwrap()
}

/// Rows of codes that differ must part at a weight that lies between two codes, where a last bit
/// decides; what comes after it answers another error.
fn parts_only_at_ties(
    fast: &Solved,
    naive: &reference::ReferenceSolution,
    order: &[usize],
) -> bool {
    (0..OUT).all(|row| {
        let codes = &fast.weight.codes()[row * IN..(row + 1) * IN];
        let parting = order
            .iter()
            .find(|&&col| codes[col] != naive.codes[row][col]);
        parting.is_none_or(|&col| {
            let steps = naive.before[row][col] / f64::from(naive.grids[row][col].scale);
            (steps - steps.floor() - 0.5).abs() < TIE
        })
    })
}

/// How near to the middle of two codes f32 and f64 may decide differently, in steps.
const TIE: f64 = 1e-4;

fn differences(layer: &Layer, solution: &reference::ReferenceSolution) -> Rows {
    let rows = rows_from_matrix(&layer.w);
    let pairs = rows.iter().zip(&solution.weights);
    pairs
        .map(|(w, q)| w.iter().zip(q).map(|(w, q)| w - q).collect())
        .collect()
}

fn quadratic(difference: &Rows, hessian: &Rows) -> f64 {
    let one = |d: &Vec<f64>| -> f64 {
        (0..IN)
            .flat_map(|i| (0..IN).map(move |j| (i, j)))
            .map(|(i, j)| d[i] * hessian[i][j] * d[j])
            .sum()
    };
    difference.iter().map(one).sum()
}

/// Sums over the same codes, in f32 products and in f64.
const MAX_RELATIVE_LOSS: f64 = 1e-4;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The fast solver is the naive one.
    #[test]
    fn fast_is_naive(
        seed in 0u64..1000,
        scheme in schemes(),
        act_order: bool,
        alpha in prop::sample::select(vec![0.0f32, 0.25, 1.0]),
        col_block in prop::sample::select(vec![1usize, 8, 128]),
    ) {
        let layer = Layer::new(seed);
        let settings = SolverSettings { col_block, ..settings(act_order, alpha) };
        let fast = layer.solve(scheme, &settings);
        let naive = naive(&layer, scheme, &settings);
        let order = Factor::new("m", &layer.statistics(None), &settings).unwrap().order;
        prop_assert!(parts_only_at_ties(&fast, &naive, &order));
        if fast.weight.codes() == naive.codes.concat() {
            let h = rows_from_matrix(&layer.statistics(None).hessian());
            let expected = quadratic(&differences(&layer, &naive), &h);
            prop_assert!((fast.loss / expected - 1.0).abs() < MAX_RELATIVE_LOSS);
        }
    }

    /// Law (a): what the column loop gathers is the whole loss, with the damped H.
    #[test]
    fn gathered_loss_is_the_quadratic_form(seed in 0u64..1000, scheme in schemes(), act_order: bool) {
        let layer = Layer::new(seed);
        let solution = naive(&layer, scheme, &settings(act_order, 0.0));
        let h = damped(&layer.statistics(None).hessian(), 0.01);
        let whole = quadratic(&differences(&layer, &solution), &h);
        prop_assert!((solution.gathered_loss - whole).abs() <= 1e-8 * whole);
    }

    /// Law (b): the block size changes nothing but the order of sums.
    #[test]
    fn column_blocks_do_not_matter(seed in 0u64..1000, alpha in prop::sample::select(vec![0.0f32, 0.25])) {
        let layer = Layer::new(seed);
        let scheme = scheme(3, Some(8), false);
        let with = |col_block| {
            layer.solve(scheme, &SolverSettings { col_block, ..settings(true, alpha) })
        };
        let (one, all) = (with(1), with(IN));
        let equal = one.weight.codes().iter().zip(all.weight.codes()).filter(|(a, b)| a == b);
        prop_assert!(equal.count() as f64 >= 0.95 * (OUT * IN) as f64);
        prop_assert!((one.loss / all.loss - 1.0).abs() < 0.02);
    }

    /// Law (c) and invariant (2): only ratios of token weights count. A power of two rounds alike.
    #[test]
    fn scaling_the_hessian_changes_nothing(
        seed in 0u64..1000,
        exponent in -12i32..12,
        act_order: bool,
        alpha in prop::sample::select(vec![0.0f32, 0.25]),
    ) {
        let layer = Layer::new(seed);
        let scheme = scheme(2, Some(8), false);
        let plain = layer.statistics(None);
        let scaled = layer.statistics(Some(&[4f32.powi(exponent); 60]));
        let solve = |s: &Statistics| gptq("m", &layer.w, s, scheme, &settings(act_order, alpha));
        prop_assert_eq!(solve(&plain).unwrap().weight, solve(&scaled).unwrap().weight);
    }

    /// Law (d): without correlation there is nothing to correct.
    #[test]
    fn an_isotropic_hessian_gives_rtn(seed in 0u64..1000, scheme in schemes(), act_order: bool, clip: bool) {
        let w = random(OUT, IN, seed);
        let mut s = Statistics::new(IN, false);
        s.add("m", &Matrix::from_fn(IN, IN, |i, j| if i == j { 2.0 } else { 0.0 }), None, None).unwrap();
        let clip = if clip { Clip::Mse } else { Clip::None };
        let settings = SolverSettings { clip, ..settings(act_order, 0.0) };
        let solved = gptq("m", &w, &s, scheme, &settings).unwrap();
        prop_assert_eq!(solved.weight, rtn("m", &w, scheme, clip).unwrap());
    }

    /// Invariant (1) and (3): equal weights are no weights, and weight 2 is the token twice.
    #[test]
    fn weights_count_tokens(seed in 0u64..1000) {
        let layer = Layer::new(seed);
        let scheme = scheme(3, Some(8), true);
        let mut doubled = Statistics::new(IN, true);
        let weights: Vec<f32> = (0..60).map(|n| if n % 3 == 0 { 2.0 } else { 1.0 }).collect();
        let tokens: Vec<usize> = (0..60).flat_map(|n| vec![n; weights[n] as usize]).collect();
        let repeat = |m: &Matrix| Matrix::from_fn(tokens.len(), IN, |n, i| m[(tokens[n], i)]);
        doubled.add("m", &repeat(&layer.u), Some(&repeat(&layer.f)), None).unwrap();
        let a = gptq("m", &layer.w, &layer.statistics(Some(&weights)), scheme, &settings(true, 0.25)).unwrap();
        let b = gptq("m", &layer.w, &doubled, scheme, &settings(true, 0.25)).unwrap();
        prop_assert!((a.loss / b.loss - 1.0).abs() < 0.02, "{} {}", a.loss, b.loss);
        let ones = layer.statistics(Some(&[1.0; 60]));
        let c = gptq("m", &layer.w, &ones, scheme, &settings(true, 0.25)).unwrap();
        let plain = layer.solve(scheme, &settings(true, 0.25));
        prop_assert_eq!(c.weight, plain.weight);
    }

    /// Inside its grid's range no weight of RTN is off by more than half a step.
    #[test]
    fn rounding_is_to_the_nearest(seed in 0u64..1000, scheme in schemes()) {
        let w = random(OUT, IN, seed);
        let q = rtn("m", &w, scheme, Clip::None).unwrap();
        let back = q.dequantize();
        let group_len = scheme.group_size().unwrap_or(IN);
        for row in 0..OUT {
            for col in 0..IN {
                let group = col / group_len;
                let scale = q.scales()[(row, group)];
                let zero = f32::from(q.zero_points()[row * q.scales().cols() + group]);
                let top = (f32::from(scheme.max_code()) - zero) * scale;
                let inside = w[(row, col)] >= -zero * scale && w[(row, col)] <= top;
                let error = (w[(row, col)] - back[(row, col)]).abs();
                prop_assert!(!inside || error <= scale * (0.5 + 1e-5));
            }
        }
    }
}

/// Invariant (11): on a mean over layers, correcting errors beats not correcting them.
#[test]
fn gptq_beats_rtn_on_average() {
    for bits in [2, 3, 4] {
        let scheme = scheme(bits, Some(8), false);
        let ratio = |seed: u64| {
            let layer = Layer::new(seed * 31);
            let settings = SolverSettings {
                clip: Clip::Mse,
                ..settings(true, 0.0)
            };
            let solved = layer.solve(scheme, &settings);
            let nearest = rtn("m", &layer.w, scheme, Clip::Mse).unwrap().dequantize();
            solved.loss / layer_loss(&layer.w, &nearest, &layer.statistics(None).hessian())
        };
        let mean = (0..40).map(ratio).sum::<f64>() / 40.0;
        assert!(mean < 0.8, "{bits} bits: {mean}");
    }
}

/// GPTAQ exists to follow the full-precision stream: it must do so better than GPTQ.
#[test]
fn drift_correction_lowers_the_asymmetric_error() {
    let asymmetric = |layer: &Layer, q: &Matrix| -> f64 {
        (0..60)
            .flat_map(|n| (0..OUT).map(move |o| (n, o)))
            .map(|(n, o)| {
                let dot =
                    |m: &Matrix, x: &Matrix| (0..IN).map(|i| m[(o, i)] * x[(n, i)]).sum::<f32>();
                f64::from(dot(q, &layer.u) - dot(&layer.w, &layer.f)).powi(2)
            })
            .sum()
    };
    let ratio = |seed: u64| {
        let layer = Layer::new(seed * 17);
        let scheme = scheme(4, Some(8), false);
        let error = |alpha| {
            let solved = layer.solve(scheme, &settings(true, alpha));
            asymmetric(&layer, &solved.weight.dequantize())
        };
        error(1.0) / error(0.0)
    };
    let mean = (0..40).map(ratio).sum::<f64>() / 40.0;
    assert!(mean < 0.97, "{mean}");
}

#[test]
fn equal_streams_make_gptaq_gptq() {
    let mut layer = Layer::new(3);
    layer.f = layer.u.clone();
    let scheme = scheme(3, None, false);
    let (a, b) = (settings(true, 0.25), settings(true, 0.0));
    assert_eq!(
        layer.solve(scheme, &a).weight,
        layer.solve(scheme, &b).weight
    );
}

#[test]
fn dead_inputs_keep_their_weights() {
    let mut layer = Layer::new(4);
    for n in 0..60 {
        layer.u[(n, 7)] = 0.0;
        layer.f[(n, 7)] = 0.0;
    }
    let scheme = scheme(4, None, false);
    let factor = Factor::new("m", &layer.statistics(None), &settings(true, 0.25)).unwrap();
    assert_eq!(factor.n_dead_columns, 1);
    let solved = layer.solve(scheme, &settings(true, 0.25));
    let nearest = rtn("m", &layer.w, scheme, Clip::None).unwrap();
    for row in 0..OUT {
        assert_eq!(
            solved.weight.codes()[row * IN + 7],
            nearest.codes()[row * IN + 7]
        );
    }
}

#[test]
fn no_weight_at_all_is_rtn_and_never_zero() {
    let layer = Layer::new(5);
    let scheme = scheme(3, Some(8), false);
    let none = layer.statistics(Some(&[0.0; 60]));
    let solved = gptq("m", &layer.w, &none, scheme, &settings(true, 0.25)).unwrap();
    assert_eq!(
        solved.weight,
        rtn("m", &layer.w, scheme, Clip::None).unwrap()
    );
}

#[test]
fn fewer_tokens_than_inputs_are_damped() {
    let layer = Layer::new(6);
    let mut s = Statistics::new(IN, false);
    let first = Matrix::from_fn(6, IN, |n, i| layer.u[(n / 2, i)]);
    s.add("m", &first, None, None).unwrap();
    let solved = gptq(
        "m",
        &layer.w,
        &s,
        scheme(3, None, false),
        &settings(true, 0.0),
    )
    .unwrap();
    assert!(solved.loss.is_finite() && solved.loss < solved.energy);
}

#[test]
fn the_ladder_is_climbed_and_reported() {
    let mut s = Statistics::new(2, false);
    s.add("m", &Matrix::from_fn(1, 2, |_, _| 1.0), None, None)
        .unwrap();
    let none = SolverSettings {
        dampening_frac: 0.0,
        dampening_ladder: vec![],
        ..SolverSettings::default()
    };
    let singular = Factor::new("m", &s, &none);
    assert!(
        matches!(singular, Err(Error::Singular { dampening_frac, .. }) if dampening_frac == 0.0)
    );
    let ladder = SolverSettings {
        dampening_ladder: vec![0.0, 0.1],
        ..none
    };
    let factor = Factor::new("m", &s, &ladder).unwrap();
    assert_eq!(
        (factor.dampening_frac, factor.dampening_steps),
        (0.1, vec![0.0])
    );
}

#[test]
fn broken_input_is_refused() {
    let layer = Layer::new(7);
    let s = layer.statistics(None);
    let solve = |w: &Matrix, scheme| gptq("m", w, &s, scheme, &settings(true, 0.0));
    let mut broken = layer.w.clone();
    broken[(0, 0)] = f32::INFINITY;
    assert!(matches!(
        solve(&broken, scheme(3, None, false)),
        Err(Error::NotFinite { .. })
    ));
    assert!(matches!(
        rtn("m", &broken, scheme(3, None, false), Clip::None),
        Err(Error::NotFinite { .. })
    ));
    let g16 = scheme(3, Some(16), false);
    assert!(matches!(solve(&layer.w, g16), Err(Error::Invalid { .. })));
    assert!(matches!(
        solve(&random(2, 8, 0), scheme(3, None, false)),
        Err(Error::Shape { .. })
    ));
    let without = Statistics::new(IN, false);
    let asked = Factor::new("m", &without, &settings(true, 0.5));
    assert!(matches!(asked, Err(Error::Missing { .. })));
}

#[test]
fn any_number_of_threads_gives_the_same_codes() {
    let mut s = Statistics::new(IN, true);
    let layer = Layer::new(8);
    s.add("m", &layer.u, Some(&layer.f), None).unwrap();
    let w = random(150, IN, 9);
    let on = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build()
            .unwrap();
        pool.install(|| {
            gptq(
                "m",
                &w,
                &s,
                scheme(3, Some(8), false),
                &settings(true, 0.25),
            )
            .unwrap()
        })
    };
    let (one, three) = (on(1), on(3));
    assert_eq!(one.weight, three.weight);
    assert_eq!(one.loss, three.loss);
}

/// Losses of the independent implementation (testdata/solver, by tests/oracle/solver_golden.py).
const GOLDEN_LOSS_TOLERANCE: f64 = 1e-3;

#[test]
fn an_independent_implementation_finds_the_same() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/solver");
    let bytes = std::fs::read(folder.join("layer.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let matrix = |name: &str| {
        let view = tensors.tensor(name).unwrap();
        let values = view.data().chunks_exact(4);
        let values = values
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let rows = view.shape()[0];
        let cols = view.shape().get(1).copied().unwrap_or(1);
        Matrix::from_vec(name, rows, cols, values).unwrap()
    };
    let (w, u, f) = (matrix("w"), matrix("u"), matrix("f"));
    let mut s = Statistics::new(w.cols(), true);
    s.add("golden", &u, Some(&f), Some(matrix("token_weights").data()))
        .unwrap();
    let cases = std::fs::read(folder.join("cases.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_slice(&cases).unwrap();
    for (i, case) in cases.as_array().unwrap().iter().enumerate() {
        let scheme = scheme(
            case["bits"].as_u64().unwrap() as u8,
            Some(case["group"].as_u64().unwrap() as usize),
            case["symmetric"].as_bool().unwrap(),
        );
        let settings = settings(
            case["act_order"].as_bool().unwrap(),
            case["alpha"].as_f64().unwrap() as f32,
        );
        let solved = gptq("golden", &w, &s, scheme, &settings).unwrap();
        let loss = case["loss"].as_f64().unwrap();
        let off = (solved.loss / loss - 1.0).abs();
        assert!(
            off <= GOLDEN_LOSS_TOLERANCE,
            "case {i}: {} for {loss}",
            solved.loss
        );
        let golden = tensors.tensor(&format!("codes.{i}")).unwrap();
        let equal = solved
            .weight
            .codes()
            .iter()
            .zip(golden.data())
            .filter(|(a, b)| a == b);
        let share = equal.count() as f64 / golden.data().len() as f64;
        assert!(share >= 0.995, "case {i}: {share} of the codes");
    }
}
