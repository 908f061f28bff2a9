//! Laws of what goes beyond GPTQ and GPTAQ: the least-squares target, weighted grids, sweeps, gain.

use super::*;
use crate::solver::reference::damped;

fn least_squares(alpha: f32) -> SolverSettings {
    SolverSettings {
        target: Target::LeastSquares,
        ..with(true, alpha)
    }
}

/// ‖Q U − W F‖² + λ ‖Q − W‖², λ being what the damping adds.
fn drift_objective(layer: &Layer, q: &Matrix) -> f64 {
    let hessian = layer.statistics.hessian();
    let n = hessian.rows();
    let mean = (0..n).map(|i| f64::from(hessian[(i, i)])).sum::<f64>() / n as f64;
    let pairs = q.data().iter().zip(layer.w.data());
    let moved: f64 = pairs.map(|(q, w)| f64::from(q - w).powi(2)).sum();
    output_error(layer, q) + 0.01 * mean * moved
}

/// ‖Q U − W F‖².
fn output_error(layer: &Layer, q: &Matrix) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let tokens = 0..layer.u.rows();
    let token_error = |t: usize| -> f64 {
        let rows = 0..q.rows();
        let error = |r: usize| dot(q.row(r), layer.u.row(t)) - dot(layer.w.row(r), layer.f.row(t));
        rows.map(|r| error(r).powi(2)).sum()
    };
    tokens.map(token_error).sum()
}

fn shifted_target(layer: &Layer, alpha: f32) -> Matrix {
    let settings = least_squares(alpha);
    let factor = Factor::new("layer", layer.statistics.clone(), &settings).unwrap();
    let drift = factor.drift_moments().unwrap();
    super::super::target::target(
        &super::super::rows::Rows::new(&layer.w, 0..layer.w.rows()),
        &factor,
        drift,
        alpha,
    )
    .0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_new_options_follow_the_reference(
        seed: u64,
        scheme in any_scheme(),
        act_order: bool,
        alpha in prop::sample::select(vec![0.0f32, 0.5, 1.0]),
        clip in prop::sample::select(vec![Clip::None, Clip::Mse, Clip::Weighted]),
        target in prop::sample::select(vec![Target::LeastSquares, Target::Qronos]),
        clip_norm in prop::sample::select(vec![ClipNorm::Between, ClipNorm::Square, ClipNorm::Cube]),
        clip_power in prop::sample::select(vec![0.0f32, 0.5, 1.0]),
    ) {
        let layer = layer(12, 32, 64, seed);
        let settings = SolverSettings { act_order, clip, clip_norm, clip_power, target, ..least_squares(alpha) };
        let fast = gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        let slow = reference::gptq("layer", &layer.w, &layer.statistics, scheme, &settings);
        let slow = slow.unwrap().weight;
        let loss = |q: &QuantizedWeight| output_error(&layer, &q.dequantize());
        prop_assert!(agree((&fast.weight, loss(&fast.weight)), (&slow, loss(&slow))));
    }

    /// No sweep raises the damped loss, with or without scales.
    #[test]
    fn sweeps_descend(seed: u64, scheme in any_scheme(), refit_scales: bool) {
        let layer = layer(6, 48, 80, seed);
        let target = shifted_target(&layer, 0.5);
        let hessian = damped(&layer.statistics.hessian(), 0.01).unwrap();
        let mut before = f64::INFINITY;
        for sweeps in 0..4 {
            let settings = SolverSettings { sweeps, refit_scales, ..least_squares(0.5) };
            let solved = gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
            let loss = exact_loss(&target, &solved.weight.dequantize(), &hessian);
            prop_assert!(loss <= before * (1.0 + SAME_LOSS), "sweep {sweeps}: {before} {loss}");
            before = loss;
        }
    }
}

/// The target is where the objective has no slope: any step away costs.
#[test]
fn the_least_squares_target_is_the_minimum() {
    let layer = layer(3, 16, 40, 5);
    let target = shifted_target(&layer, 1.0);
    let least = drift_objective(&layer, &target);
    assert!(least < drift_objective(&layer, &layer.w));
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for _ in 0..20 {
        let step = random(3, 16, &mut rng);
        let at = |size: f32| {
            let moved = Matrix::from_fn(3, 16, |i, j| target[(i, j)] + size * step[(i, j)]);
            drift_objective(&layer, &moved) - least
        };
        let (there, back) = (at(0.05), at(-0.05));
        // Equal both ways: a parabola's bottom. f32 targets err by 1e-6 of what is compared.
        assert!(
            there > 0.0 && (there - back).abs() < 1e-3 * there,
            "{there} {back}"
        );
    }
}

#[test]
fn without_drift_the_target_is_the_weight() {
    let mut layer = layer(4, 32, 60, 2);
    layer.f = layer.u.clone();
    let mut statistics = Statistics::new(32, true);
    statistics
        .add("layer", &layer.u, Some(&layer.f), None)
        .unwrap();
    let scheme = scheme(3, Some(16), false);
    let plain = gptq("layer", &layer.w, &statistics, scheme, &with(true, 0.0)).unwrap();
    let shifted = gptq("layer", &layer.w, &statistics, scheme, &least_squares(1.0)).unwrap();
    assert_eq!(plain.weight, shifted.weight);
}

/// After many sweeps no code can be changed for the better, given all others, and no scale.
#[test]
fn sweeps_end_where_nothing_alone_improves() {
    let layer = layer(5, 32, 60, 11);
    let scheme = scheme(3, Some(16), false);
    let settings = SolverSettings {
        sweeps: 60,
        ..with(true, 0.0)
    };
    let solved = gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
    let hessian = damped(&layer.statistics.hessian(), 0.01).unwrap();
    let weight = &solved.weight;
    let loss = |q: &Matrix| exact_loss(&layer.w, q, &hessian);
    let q = weight.dequantize();
    let least = loss(&q);
    for (row, column) in (0..5).flat_map(|i| (0..32).map(move |j| (i, j))) {
        let scale = weight.scales()[(row, column / 16)];
        let code = weight.codes()[row * 32 + column];
        for step in [-1.0f32, 1.0] {
            if (0.0..=7.0).contains(&(f32::from(code) + step)) {
                let mut other = q.clone();
                other[(row, column)] += step * scale;
                assert!(loss(&other) >= least * (1.0 - 1e-5));
            }
        }
    }
    for (row, group) in (0..5).flat_map(|i| (0..2).map(move |g| (i, g))) {
        // Two bf16 steps, so that the nearest representable scale is not beaten by rounding.
        for factor in [1.0 - 1.0 / 64.0, 1.0 + 1.0 / 64.0] {
            let mut other = q.clone();
            let columns = group * 16..group * 16 + 16;
            columns.for_each(|column| other[(row, column)] *= factor);
            assert!(loss(&other) >= least * (1.0 - 1e-5));
        }
    }
}

/// The projection of a row's output on the original's is the original, to bf16's rounding.
#[test]
fn unit_gain_is_that() {
    let layer = layer(9, 304, 500, 4);
    let scheme = scheme(2, Some(152), false);
    let gains = |unit_gain| -> Vec<f64> {
        let settings = SolverSettings {
            unit_gain,
            clip: Clip::Mse,
            ..with(true, 0.0)
        };
        let solved = gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        let (h, q) = (layer.statistics.hessian(), solved.weight.dequantize());
        let gain = |row: usize| {
            let form = |a: &[f32]| -> f64 {
                let products = (0..304).map(|i| {
                    let pairs = h.row(i).iter().zip(a);
                    let product: f64 = pairs.map(|(h, a)| f64::from(*h) * f64::from(*a)).sum();
                    f64::from(layer.w[(row, i)]) * product
                });
                products.sum()
            };
            form(q.row(row)) / form(layer.w.row(row))
        };
        (0..9).map(gain).collect()
    };
    let bf16_step = 1.0 / 256.0;
    assert!(
        gains(false)
            .iter()
            .any(|g| (g - 1.0).abs() > 2.0 * bf16_step)
    );
    assert!(gains(true).iter().all(|g| (g - 1.0).abs() < bf16_step));
}

#[test]
fn sweeps_need_an_objective() {
    let settings = SolverSettings {
        sweeps: 1,
        ..with(true, 0.25)
    };
    let error = settings.check().unwrap_err().to_string();
    assert!(error.contains("target=least_squares"), "{error}");
}

#[test]
fn refined_bytes_are_the_same_for_any_number_of_threads() {
    let layer = layer(150, 160, 200, 8);
    let settings = SolverSettings {
        sweeps: 2,
        clip: Clip::Weighted,
        unit_gain: true,
        ..least_squares(1.0)
    };
    let solve = |n_threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
        let scheme = scheme(2, Some(32), false);
        let solve = || gptq("layer", &layer.w, &layer.statistics, scheme, &settings).unwrap();
        pool.build().unwrap().install(solve)
    };
    assert_eq!(solve(1), solve(3));
}
