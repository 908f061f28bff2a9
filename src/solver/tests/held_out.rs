//! Laws of the residual stream's drift and of α found on held-out samples.

use super::*;
use crate::solver::rows::Rows;
use crate::solver::target::target;
use crate::statistics::Batch;

fn whole(w: &Matrix) -> Rows<'_> {
    Rows::new(w, 0..w.rows())
}

/// W, inputs and what the stream lacks.
struct Streams {
    w: Matrix,
    u: Matrix,
    f: Matrix,
    drift: Matrix,
}

impl Streams {
    fn new(rows: usize, cols: usize, n_tokens: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let w = random(rows, cols, &mut rng);
        let (u, f) = streams(n_tokens, cols, &mut rng);
        let way = random(rows, cols, &mut rng);
        let noise = random(n_tokens, rows, &mut rng);
        let drift = Matrix::from_fn(n_tokens, rows, |t, r| {
            let seen: f32 = u.row(t).iter().zip(way.row(r)).map(|(u, w)| u * w).sum();
            0.1 * seen + 0.1 * noise[(t, r)]
        });
        Self { w, u, f, drift }
    }

    fn statistics(&self, tokens: std::ops::Range<usize>) -> Statistics {
        let part = |m: &Matrix| {
            let first = tokens.start;
            Matrix::from_fn(tokens.len(), m.cols(), |t, j| m[(first + t, j)])
        };
        let (u, f, drift) = (part(&self.u), part(&self.f), part(&self.drift));
        let mut statistics = Statistics::new(u.cols(), true).with_output(drift.cols());
        let batch = Batch {
            u: &u,
            f: Some(&f),
            output_drift: Some(&drift),
            weights: None,
        };
        statistics.add_batch("layer", &batch).unwrap();
        statistics
    }

    /// What outputs of `q` lack at a token, by row.
    fn missing(&self, q: &Matrix, t: usize, r: usize) -> f64 {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            let pairs = a.iter().zip(b);
            pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        dot(self.w.row(r), self.f.row(t)) + f64::from(self.drift[(t, r)])
            - dot(q.row(r), self.u.row(t))
    }
}

/// What is summed up at the output is what C and S come to.
#[test]
fn drift_at_the_output_is_drift_at_the_input() {
    let streams = Streams::new(12, 32, 64, 7);
    let lacking = Matrix::from_fn(64, 12, |t, r| {
        let pairs = streams.w.row(r).iter().zip(streams.f.row(t));
        let drift = pairs.zip(streams.u.row(t)).map(|((w, f), u)| w * (f - u));
        drift.sum::<f32>() + streams.drift[(t, r)]
    });
    let omega: Vec<f32> = (0..64).map(|t| 0.5 + (t % 3) as f32).collect();
    let batch = |with_cross: bool| Batch {
        u: &streams.u,
        f: with_cross.then_some(&streams.f),
        output_drift: Some(if with_cross { &streams.drift } else { &lacking }),
        weights: Some(&omega),
    };
    let target = |with_cross: bool| {
        let mut statistics = Statistics::new(32, with_cross).with_output(12);
        statistics.add_batch("layer", &batch(with_cross)).unwrap();
        let factor = Factor::new("layer", statistics, &residual_stream()).unwrap();
        target(
            &whole(&streams.w),
            &factor,
            factor.drift_moments().unwrap(),
            1.0,
        )
        .0
    };
    let (at_output, at_input) = (target(false), target(true));
    let pairs = at_output.data().iter().zip(at_input.data());
    // Two ways to sum in f32, then H⁻¹, whose damping bounds it.
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-3));
}

fn residual_stream() -> SolverSettings {
    SolverSettings {
        target: Target::ResidualStream,
        ..with(true, 1.0)
    }
}

fn whole_target(streams: &Streams, n_tokens: usize) -> Matrix {
    let statistics = streams.statistics(0..n_tokens);
    let factor = Factor::new("layer", statistics, &residual_stream()).unwrap();
    target(
        &whole(&streams.w),
        &factor,
        factor.drift_moments().unwrap(),
        1.0,
    )
    .0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn the_streams_target_follows_the_reference(seed: u64, scheme in any_scheme()) {
        let streams = Streams::new(12, 32, 64, seed);
        let statistics = streams.statistics(0..64);
        let settings = residual_stream();
        let fast = gptq("layer", &streams.w, &statistics, scheme, &settings).unwrap();
        let slow = reference::gptq("layer", &streams.w, &statistics, scheme, &settings);
        let slow = slow.unwrap().weight;
        let loss = |q: &QuantizedWeight| -> f64 {
            let q = q.dequantize();
            let tokens = (0..64).flat_map(|t| (0..12).map(move |r| (t, r)));
            tokens.map(|(t, r)| streams.missing(&q, t, r).powi(2)).sum()
        };
        prop_assert!(agree((&fast.weight, loss(&fast.weight)), (&slow, loss(&slow))));
    }

    /// α by its definition: the least error of the rest along what the part asks for.
    #[test]
    fn alpha_is_where_held_out_tokens_err_least(seed: u64) {
        const HALF: usize = 80;
        let streams = Streams::new(5, 24, 2 * HALF, seed);
        let settings = SolverSettings { held_out_alpha: true, ..residual_stream() };
        let factor = Factor::new("layer", streams.statistics(0..2 * HALF), &settings).unwrap();
        let part = streams.statistics(0..HALF);
        let factor = factor.with_part("layer", part, &settings).unwrap();
        let drift = factor.drift_moments().unwrap();
        let (found, mean) = target(&whole(&streams.w), &factor, drift, 1.0);
        let (in_part, whole) = (whole_target(&streams, HALF), whole_target(&streams, 2 * HALF));
        let mut sum = 0.0;
        for row in 0..5 {
            let error = |step: f64| -> f64 {
                let at = |t| {
                    let (old, new) = (
                        streams.missing(&streams.w, t, row),
                        streams.missing(&in_part, t, row),
                    );
                    (old + step * (new - old)).powi(2)
                };
                (HALF..2 * HALF).map(at).sum()
            };
            // A parabola through three points.
            let (left, middle, right) = (error(0.0), error(0.5), error(1.0));
            let bend = 2.0 * (left - 2.0 * middle + right);
            let half = ((left - right + bend) / (2.0 * bend)).clamp(0.0, 1.0);
            let alpha = 2.0 * half / (1.0 + half);
            sum += alpha;
            for column in 0..24 {
                let w = f64::from(streams.w[(row, column)]);
                let expected = w + alpha * (f64::from(whole[(row, column)]) - w);
                let off = (f64::from(found[(row, column)]) - expected).abs();
                prop_assert!(off < 2e-3, "row {row}: {off}");
            }
        }
        prop_assert!((f64::from(mean) - sum / 5.0).abs() < 2e-3);
    }
}

/// Drift that inputs tell is corrected nearly whole, drift that they do not is let be.
#[test]
fn noise_is_not_corrected() {
    let alpha = |is_noise: bool| {
        let mut streams = Streams::new(8, 48, 120, 3);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let noise = random(120, 48, &mut rng);
        streams.drift = Matrix::zeros(120, 8);
        streams.f = Matrix::from_fn(120, 48, |t, j| match is_noise {
            true => streams.u[(t, j)] + 0.3 * noise[(t, j)],
            false => 1.1 * streams.u[(t, j)],
        });
        let settings = SolverSettings {
            held_out_alpha: true,
            ..residual_stream()
        };
        let factor = Factor::new("layer", streams.statistics(0..120), &settings).unwrap();
        let part = streams.statistics(0..60);
        let factor = factor.with_part("layer", part, &settings).unwrap();
        let solved = gptq::solve(
            "layer",
            &streams.w,
            &factor,
            scheme(4, None, false),
            &settings,
        )
        .unwrap();
        solved.alpha
    };
    assert!(alpha(true) < 0.3, "{}", alpha(true));
    assert!(alpha(false) > 0.95, "{}", alpha(false));
}

#[test]
fn a_pull_has_no_alpha_to_find() {
    let settings = SolverSettings {
        held_out_alpha: true,
        ..with(true, 1.0)
    };
    assert!(matches!(settings.check(), Err(Error::Invalid { .. })));
}

/// A part too small for its Hessian needs more damping than all samples, and both are told apart.
#[test]
fn the_parts_damping_is_its_own() {
    let streams = Streams::new(4, 32, 200, 3);
    let settings = SolverSettings {
        dampening_frac: 1e-9,
        target: Target::ResidualStream,
        held_out_alpha: true,
        ..with(true, 1.0)
    };
    let factor = Factor::new("layer", streams.statistics(0..200), &settings).unwrap();
    let factor = factor.with_part("layer", streams.statistics(0..9), &settings);
    let factor = factor.unwrap();
    let of: Vec<_> = factor
        .all()
        .map(|(f, of_part)| (f.dampening_steps.len(), of_part))
        .collect();
    assert_eq!(of.len(), 2);
    assert_eq!(of[0], (0, false));
    assert!(of[1].1 && of[1].0 > 0, "{of:?}");
}

/// Rows that are solved apart have the bits that they have together, by every way to solve.
#[test]
fn shares_of_rows_are_those_of_all_rows() {
    const N_ROWS: usize = 300;
    let streams = Streams::new(N_ROWS, 64, 160, 11);
    let all = streams.statistics(0..160);
    let solve = |settings: &SolverSettings, rows: std::ops::Range<usize>, with_part: bool| {
        let mut factor = Factor::new("layer", all.clone(), settings).unwrap();
        if with_part {
            let part = streams.statistics(0..80);
            factor = factor.with_part("layer", part, settings).unwrap();
        }
        let scheme = Scheme::new(3, Some(32), false, ScaleDtype::Bf16).unwrap();
        gptq::solve_rows("layer", &streams.w, rows, &factor, scheme, settings).unwrap()
    };
    let base = SolverSettings::default();
    let ways = [
        base.clone(),
        SolverSettings {
            act_order: true,
            alpha: 0.25,
            ..base.clone()
        },
        SolverSettings {
            target: Target::Qronos,
            alpha: 1.0,
            ..base.clone()
        },
        SolverSettings {
            target: Target::ResidualStream,
            alpha: 1.0,
            clip: Clip::Weighted,
            sweeps: 2,
            refit_scales: true,
            unit_gain: true,
            held_out_alpha: true,
            ..base
        },
    ];
    for settings in ways {
        let with_part = settings.held_out_alpha;
        let whole = solve(&settings, 0..N_ROWS, with_part);
        let mut loss = 0.0;
        for rows in [0..128, 128..256, 256..N_ROWS] {
            let share = solve(&settings, rows.clone(), with_part);
            loss += share.loss;
            let codes = &whole.weight.codes()[rows.start * 64..rows.end * 64];
            assert!(share.weight.codes() == codes, "{settings:?} {rows:?}");
            let scales = &whole.weight.scales().data()[rows.start * 2..rows.end * 2];
            assert!(
                share.weight.scales().data() == scales,
                "{settings:?} {rows:?}"
            );
            let zeros = &whole.weight.zero_points()[rows.start * 2..rows.end * 2];
            assert!(share.weight.zero_points() == zeros, "{settings:?} {rows:?}");
        }
        assert!((loss / whole.loss - 1.0).abs() < SAME_LOSS);
    }
}
