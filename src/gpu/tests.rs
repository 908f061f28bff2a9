//! The GPU's path on the emulation, beside the CPU's, on the same cases.

use super::kernels::{NAMES, SOURCE};
use super::{Factor, Gpu, Kept, Sums, TensorBatch, Unfactored, emulated, solve};
use crate::plan::{ScaleDtype, Scheme};
use crate::solver::{self, Clip, ClipNorm, DampeningUnit, Solved, SolverSettings, Target};
use crate::statistics::{Batch, Statistics, StatisticsDtype};
use crate::{Error, Matrix, QuantizedWeight, Result};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// The factor of these sums alone.
fn factor_of(
    gpu: &Arc<dyn Gpu>,
    statistics: Statistics,
    settings: &SolverSettings,
) -> Result<Factor> {
    Unfactored::new(gpu, "case", statistics, settings)?.factor("case", settings)
}

/// Share of rows that may differ: a weight within rounding of a tie may fall either way, about one
/// in 10⁵ codes, and the later columns of its row follow it.
const MAX_TIED_ROWS: f64 = 0.05;

/// Losses of equal codes: f32 sums of a few hundred terms in another order.
const SAME_LOSS: f64 = 1e-4;

fn random(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Matrix {
    Matrix::from_fn(rows, cols, |_, _| {
        (0..4).map(|_| rng.random_range(-0.87f32..0.87)).sum()
    })
}

/// Correlated inputs whose columns differ in size, and the same with drift and noise.
fn streams(n_tokens: usize, cols: usize, rng: &mut ChaCha8Rng) -> [Matrix; 2] {
    let raw = random(n_tokens, cols, rng);
    let noise = random(n_tokens, cols, rng);
    let size: Vec<f32> = (0..cols).map(|_| rng.random_range(0.2f32..2.0)).collect();
    let f = Matrix::from_fn(n_tokens, cols, |t, j| {
        size[j] * (raw[(t, j)] + 0.7 * raw[(t, (j + 1) % cols)] + 0.4 * raw[(t, j / 2)])
    });
    let u = Matrix::from_fn(n_tokens, cols, |t, j| {
        f[(t, j)] * 1.05 + 0.1 * size[j] * noise[(t, j)]
    });
    [u, f]
}

/// A linear and what it sees.
struct Case {
    w: Matrix,
    u: Matrix,
    f: Matrix,
    drift: Matrix,
    weights: Vec<f32>,
}

fn case([rows, cols, n_tokens]: [usize; 3], seed: u64) -> Case {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let [u, f] = streams(n_tokens, cols, &mut rng);
    Case {
        w: random(rows, cols, &mut rng),
        drift: random(n_tokens, rows, &mut rng),
        weights: (0..n_tokens)
            .map(|_| rng.random_range(0.0f32..2.0))
            .collect(),
        u,
        f,
    }
}

/// What statistics keep beside H.
#[derive(Clone, Copy, PartialEq)]
enum Moments {
    None,
    Cross,
    Both,
    Output,
}

impl Moments {
    fn with_cross(self) -> bool {
        matches!(self, Self::Cross | Self::Both)
    }

    fn with_output(self) -> bool {
        matches!(self, Self::Both | Self::Output)
    }
}

fn statistics(case: &Case, moments: Moments, n_tokens: usize) -> Statistics {
    let mut statistics = Statistics::new(case.w.cols(), moments.with_cross());
    if moments.with_output() {
        statistics = statistics.with_output(case.w.rows());
    }
    let part = |m: &Matrix| {
        let values = m.data()[..n_tokens * m.cols()].to_vec();
        Matrix::from_vec("part", n_tokens, m.cols(), values).unwrap()
    };
    let (f, drift) = (part(&case.f), part(&case.drift));
    let batch = Batch {
        u: &part(&case.u),
        f: moments.with_cross().then_some(&f),
        output_drift: moments.with_output().then_some(&drift),
        weights: Some(&case.weights[..n_tokens]),
    };
    statistics.add_batch("case", &batch).unwrap();
    statistics
}

fn scheme(bits: u8, group: Option<usize>, symmetric: bool, scales: ScaleDtype) -> Scheme {
    Scheme::new(bits, group, symmetric, scales).unwrap()
}

fn n_different_rows(a: &QuantizedWeight, b: &QuantizedWeight) -> usize {
    let rows = a.codes().chunks(a.cols()).zip(b.codes().chunks(b.cols()));
    rows.filter(|(a, b)| a != b).count()
}

/// The same codes up to ties, and what else there is to tell.
fn assert_agree(found: &Solved, expected: &Solved, what: &str) {
    let rows = expected.weight.rows();
    let n_different = n_different_rows(&found.weight, &expected.weight);
    println!("{what}: {n_different} of {rows} rows differ");
    let most = (MAX_TIED_ROWS * rows as f64).ceil() as usize;
    assert!(
        n_different <= most,
        "{what}: {n_different} of {rows} rows differ"
    );
    let share = SAME_LOSS + n_different as f64 / rows as f64;
    let close = |a: f64, b: f64, share: f64| (a - b).abs() <= share * b.abs();
    let (loss, wanted) = (found.loss, expected.loss);
    assert!(
        close(loss, wanted, share),
        "{what}: loss {loss}, {wanted} expected"
    );
    assert!(
        close(found.energy, expected.energy, SAME_LOSS),
        "{what}: energy"
    );
    let (alpha, wanted) = (f64::from(found.alpha), f64::from(expected.alpha));
    assert!(
        close(alpha, wanted, 1e-3),
        "{what}: alpha {alpha}, {wanted} expected"
    );
    assert_eq!(found.dampening_steps, expected.dampening_steps, "{what}");
    assert_eq!(found.n_dead_columns, expected.n_dead_columns, "{what}");
}

fn solve_all(
    w: &Matrix,
    factor: &Factor,
    scheme: Scheme,
    settings: &SolverSettings,
) -> Result<Solved> {
    solve::solve("case", w, 0..w.rows(), factor, scheme, settings)
}

/// Solves on both sides.
fn both(
    gpu: &Arc<dyn Gpu>,
    case: &Case,
    moments: Moments,
    scheme: Scheme,
    settings: &SolverSettings,
) -> [Solved; 2] {
    let n_tokens = case.u.rows();
    let all = || statistics(case, moments, n_tokens);
    let part = || statistics(case, moments, n_tokens / 2);
    let mut on_gpu = factor_of(gpu, all(), settings).unwrap();
    let mut on_cpu = solver::Factor::new("case", all(), settings).unwrap();
    if settings.held_out_alpha {
        let of_part = factor_of(gpu, part(), settings).unwrap();
        on_gpu = on_gpu.with_part_factor(of_part);
        on_cpu = on_cpu.with_part("case", part(), settings).unwrap();
    }
    let found = solve_all(&case.w, &on_gpu, scheme, settings).unwrap();
    let loss = solve::loss_of(&case.w, &found.weight, &on_gpu).unwrap();
    assert!(
        (loss - found.loss).abs() <= 3e-4 * loss,
        "{loss} {}",
        found.loss
    );
    [
        found,
        solver::gptq::solve("case", &case.w, &on_cpu, scheme, settings).unwrap(),
    ]
}

#[test]
fn every_kernel_is_in_the_source_once() {
    for name in NAMES {
        let head = format!("extern \"C\" __global__ void {name}(");
        assert_eq!(SOURCE.matches(&head).count(), 1, "{name}");
    }
    assert_eq!(SOURCE.matches("__global__").count(), NAMES.len());
}

/// Widths around a block and a lane, groups within a block, of a block, across blocks and of all columns.
#[test]
fn codes_are_those_of_the_cpu() {
    let Some(gpu) = emulated::gpu() else { return };
    let widths = [
        (8, Some(8)),
        (40, None),
        (96, Some(32)),
        (128, Some(64)),
        (264, Some(88)),
    ];
    let wide = [(256, Some(128)), (320, Some(160)), (384, Some(64))];
    for (index, (cols, group)) in widths.into_iter().chain(wide).enumerate() {
        for act_order in [true, false] {
            let case = case([37, cols, 2 * cols + 16], index as u64);
            let bits = [2, 3, 4, 8][index % 4];
            let scales = [ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32][index % 3];
            let scheme = scheme(bits, group, index % 2 == 0, scales);
            let settings = SolverSettings {
                act_order,
                ..Default::default()
            };
            let [found, expected] = both(&gpu, &case, Moments::None, scheme, &settings);
            let what = format!("{cols} columns, {scheme:?}, act_order {act_order}");
            assert_agree(&found, &expected, &what);
        }
    }
}

#[test]
fn drift_is_corrected_as_on_the_cpu() {
    let Some(gpu) = emulated::gpu() else { return };
    let targets = [
        (Target::Pull, Moments::Cross, false),
        (Target::LeastSquares, Moments::Cross, false),
        (Target::LeastSquares, Moments::Output, true),
        (Target::ResidualStream, Moments::Both, true),
        (Target::Qronos, Moments::Both, false),
    ];
    for (index, (target, moments, held_out_alpha)) in targets.into_iter().enumerate() {
        let case = case([37, 192, 600], 100 + index as u64);
        for act_order in [true, false] {
            let settings = SolverSettings {
                alpha: if target == Target::Pull { 0.25 } else { 1.0 },
                act_order,
                target,
                held_out_alpha,
                ..Default::default()
            };
            let scheme = scheme(3, Some(64), false, ScaleDtype::Bf16);
            let [found, expected] = both(&gpu, &case, moments, scheme, &settings);
            assert_agree(
                &found,
                &expected,
                &format!("{target:?}, act_order {act_order}"),
            );
        }
    }
}

/// A search over sums in another order may find another grid where two are equally good; so losses
/// are compared, and most grids.
#[test]
fn searched_grids_are_as_good_as_the_cpus() {
    let Some(gpu) = emulated::gpu() else { return };
    let clips = [
        (Clip::Mse, ClipNorm::Cube),
        (Clip::Weighted, ClipNorm::Square),
        (Clip::Weighted, ClipNorm::Between),
        (Clip::Weighted, ClipNorm::Cube),
    ];
    for (index, (clip, clip_norm)) in clips.into_iter().enumerate() {
        for act_order in [true, false] {
            let case = case([32, 128, 400], 200 + index as u64);
            let settings = SolverSettings {
                clip,
                clip_norm,
                act_order,
                ..Default::default()
            };
            let scheme = scheme(2 + index as u8 % 2, Some(32), index == 1, ScaleDtype::Bf16);
            let [found, expected] = both(&gpu, &case, Moments::None, scheme, &settings);
            let pairs = found.weight.scales().data().iter();
            let pairs = pairs.zip(expected.weight.scales().data());
            let n_others = pairs.filter(|(a, b)| a != b).count();
            let n_grids = 32 * 4;
            assert!(
                n_others <= n_grids / 50,
                "{clip:?} {clip_norm:?}: {n_others} others"
            );
            let ratio = found.loss / expected.loss;
            assert!(
                (ratio - 1.0).abs() < 0.02,
                "{clip:?} {clip_norm:?}: loss {ratio}"
            );
        }
    }
}

#[test]
fn dead_columns_and_dampings_are_treated_as_on_the_cpu() {
    let Some(gpu) = emulated::gpu() else { return };
    let mut case = case([20, 96, 20], 300);
    for token in 0..20 {
        case.u.row_mut(token)[5..8].fill(0.0);
    }
    // Fewer tokens than columns: without damping H is singular.
    let settings = SolverSettings {
        dampening_frac: 0.0,
        ..Default::default()
    };
    let scheme = scheme(4, Some(32), false, ScaleDtype::Bf16);
    let [found, expected] = both(&gpu, &case, Moments::None, scheme, &settings);
    assert_eq!((found.dampening_frac, found.n_dead_columns), (0.02, 3));
    assert_agree(&found, &expected, "dead columns");
    let settings = SolverSettings {
        dampening_unit: DampeningUnit::LargestEigenvalue,
        dampening_frac: 1e-3,
        ..Default::default()
    };
    let [found, expected] = both(&gpu, &case, Moments::None, scheme, &settings);
    let ratio = found.dampening_frac / expected.dampening_frac;
    assert!((ratio - 1.0).abs() < 1e-4, "{ratio}");
}

#[test]
fn singular_and_infinite_are_errors() {
    let Some(gpu) = emulated::gpu() else { return };
    let mut case = case([8, 32, 40], 400);
    let settings = SolverSettings::default();
    let nothing = Statistics::new(32, false);
    let error = factor_of(&gpu, nothing, &settings).unwrap_err();
    assert!(matches!(error, Error::Singular { .. }));
    let settings = SolverSettings {
        dampening_frac: 0.0,
        dampening_ladder: vec![],
        ..Default::default()
    };
    let few = statistics(&case, Moments::None, 5);
    let error = factor_of(&gpu, few, &settings).unwrap_err();
    assert!(matches!(error, Error::Singular { .. }));
    let factor = factor_of(&gpu, statistics(&case, Moments::None, 40), &settings).unwrap();
    let scheme = scheme(4, Some(32), false, ScaleDtype::F16);
    let unit_gain = SolverSettings {
        unit_gain: true,
        ..settings.clone()
    };
    let error = solve_all(&case.w, &factor, scheme, &unit_gain).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }));
    case.w[(3, 3)] = 1e30;
    let error = solve_all(&case.w, &factor, scheme, &settings).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
}

/// As on the CPU: a rank solves rows of its own.
#[test]
fn shares_of_rows_are_those_of_all_rows() {
    const N_ROWS: usize = 150;
    let Some(gpu) = emulated::gpu() else { return };
    let base = SolverSettings::default();
    let ways = [
        (Moments::None, base.clone()),
        (
            Moments::Cross,
            SolverSettings {
                act_order: true,
                alpha: 0.25,
                ..base.clone()
            },
        ),
        (
            Moments::Cross,
            SolverSettings {
                target: Target::Qronos,
                alpha: 1.0,
                ..base.clone()
            },
        ),
        (
            Moments::Both,
            SolverSettings {
                target: Target::ResidualStream,
                alpha: 1.0,
                clip: Clip::Weighted,
                held_out_alpha: true,
                ..base
            },
        ),
    ];
    let case = case([N_ROWS, 64, 160], 21);
    let scheme = scheme(3, Some(32), false, ScaleDtype::Bf16);
    for (moments, settings) in ways {
        let mut factor = factor_of(&gpu, statistics(&case, moments, 160), &settings).unwrap();
        if settings.held_out_alpha {
            let part = statistics(&case, moments, 80);
            let part = factor_of(&gpu, part, &settings).unwrap();
            factor = factor.with_part_factor(part);
        }
        let whole = solve_all(&case.w, &factor, scheme, &settings).unwrap();
        let mut loss = 0.0;
        for rows in [0..128, 128..N_ROWS] {
            let share = solve::solve("case", &case.w, rows.clone(), &factor, scheme, &settings);
            let share = share.unwrap();
            loss += share.loss;
            let codes = &whole.weight.codes()[rows.start * 64..rows.end * 64];
            assert!(share.weight.codes() == codes, "{settings:?} {rows:?}");
            let scales = &whole.weight.scales().data()[rows.start * 2..rows.end * 2];
            assert_eq!(share.weight.scales().data(), scales, "{settings:?}");
        }
        assert!((loss / whole.loss - 1.0).abs() < SAME_LOSS, "{settings:?}");
    }
}

fn tensor(m: &Matrix) -> Tensor {
    Tensor::from_slice(m.data(), (m.rows(), m.cols()), &Device::Cpu).unwrap()
}

/// Largest difference in units of the largest entry.
fn distance(a: &Matrix, b: &Matrix) -> f32 {
    let pairs = a.data().iter().zip(b.data());
    let most = b.data().iter().fold(0.0f32, |most, b| most.max(b.abs()));
    pairs.fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / most
}

#[test]
fn sums_are_those_of_the_cpu() {
    let Some(gpu) = emulated::gpu() else { return };
    let cases = [
        (StatisticsDtype::F32, Moments::Both, true),
        (StatisticsDtype::F32, Moments::None, false),
        (StatisticsDtype::Bf16, Moments::Both, true),
        (StatisticsDtype::Bf16, Moments::Cross, false),
    ];
    for (dtype, moments, with_weights) in cases {
        for cols in [1usize, 9, 100] {
            let case = case([7, cols, 33], cols as u64);
            let kept = Kept {
                in_features: cols,
                with_cross: moments.with_cross(),
                out_features: moments.with_output().then_some(7),
                dtype,
            };
            let mut found = Sums::new(&gpu, kept).unwrap();
            let mut expected = Statistics::new(cols, moments.with_cross()).rounded_to(dtype);
            if moments.with_output() {
                expected = expected.with_output(7);
            }
            let (u, f, drift) = (tensor(&case.u), tensor(&case.f), tensor(&case.drift));
            for _ in 0..2 {
                let weights = with_weights.then_some(&case.weights[..]);
                let batch = TensorBatch {
                    u: &u,
                    f: moments.with_cross().then_some(&f),
                    output_drift: moments.with_output().then_some(&drift),
                    weights,
                };
                found.add("case", &batch).unwrap();
                let batch = Batch {
                    u: &case.u,
                    f: moments.with_cross().then_some(&case.f),
                    output_drift: moments.with_output().then_some(&case.drift),
                    weights,
                };
                expected.add_batch("case", &batch).unwrap();
            }
            let found = found.finish("case").unwrap();
            assert_eq!(found.n_tokens(), 66);
            assert_eq!(found.weight_sum(), expected.weight_sum());
            assert_eq!(
                found.effective_sample_size(),
                expected.effective_sample_size()
            );
            let pairs = [
                (Some(found.hessian_lower()), Some(expected.hessian_lower())),
                (found.cross(), expected.cross()),
                (found.output_cross(), expected.output_cross()),
            ];
            for (found, expected) in pairs {
                assert_eq!(found.is_some(), expected.is_some());
                if let (Some(found), Some(expected)) = (found, expected) {
                    // 66 products, each rounded once more than the other way round.
                    let most = 66.0 * f32::EPSILON;
                    assert!(distance(found, expected) <= most, "{dtype:?} {cols}");
                }
            }
        }
    }
}

#[test]
fn bad_batches_are_errors_and_change_nothing() {
    let Some(gpu) = emulated::gpu() else { return };
    let kept = Kept {
        in_features: 3,
        with_cross: true,
        out_features: None,
        dtype: StatisticsDtype::F32,
    };
    let mut sums = Sums::new(&gpu, kept).unwrap();
    let good = Matrix::from_fn(4, 3, |i, j| (i + j) as f32);
    let mut bad = good.clone();
    bad[(2, 1)] = f32::NAN;
    bad[(1, 1)] = f32::INFINITY;
    let (good, bad) = (tensor(&good), tensor(&bad));
    let mut error = |u: &Tensor, f: Option<&Tensor>, weights: Option<&[f32]>| {
        let batch = TensorBatch {
            u,
            f,
            output_drift: None,
            weights,
        };
        sums.add("case", &batch).unwrap_err()
    };
    assert!(matches!(
        error(&bad, Some(&good), None),
        Error::NotFinite { count: 2, .. }
    ));
    assert!(matches!(
        error(&good, Some(&bad), None),
        Error::NotFinite { .. }
    ));
    assert!(matches!(error(&good, None, None), Error::Missing { .. }));
    let narrow = good.narrow(1, 0, 2).unwrap().contiguous().unwrap();
    assert!(matches!(
        error(&narrow, Some(&good), None),
        Error::Shape { .. }
    ));
    let weights = [1.0, -1.0, 1.0, 1.0];
    assert!(matches!(
        error(&good, Some(&good), Some(&weights)),
        Error::Invalid { .. }
    ));
    let strided = good.t().unwrap().narrow(0, 0, 3).unwrap();
    assert!(matches!(
        error(&strided, Some(&good), None),
        Error::Shape { .. }
    ));
    let statistics = sums.finish("case").unwrap();
    assert_eq!(statistics.n_tokens(), 0);
    assert!(statistics.hessian_lower().data().iter().all(|v| *v == 0.0));
}
