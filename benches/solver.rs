//! Time of the statistics, of the factor and of the solvers, by width of the linear, and of a plain
//! matrix product to hold them against.
//!
//! Throughput counts the multiply-adds that are needed: of a symmetric or triangular result one half.
//! So "elements per second" compare from one group to the next.
//!
//! Run: `cargo bench --bench solver`, with a filter such as `1536` to spare the large ones.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use faer::linalg::matmul::matmul;
use faer::{Accum, Par};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::hint::black_box;
use vlmq::Matrix;
use vlmq::plan::{ScaleDtype, Scheme};
use vlmq::solver::gptq::solve;
use vlmq::solver::{Clip, Factor, SolverSettings, rtn};
use vlmq::statistics::{Statistics, StatisticsDtype};

/// `[out, in]` of the testbed's way down, of square attention and of the way down in a 2B model.
const SHAPES: [[usize; 2]; 3] = [[256, 768], [1536, 1536], [1536, 8960]];

const TOKENS: usize = 2048;

fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
}

fn statistics_of(cols: usize, with_cross: bool) -> Statistics {
    let (u, f) = (random(TOKENS, cols, 0), random(TOKENS, cols, 1));
    let mut statistics = Statistics::new(cols, with_cross);
    let added = statistics.add("bench", &u, with_cross.then_some(&f), None);
    added.expect("random inputs are finite");
    statistics
}

/// The rate that the others are measured against: a square from tokens, none of it spared.
fn product(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul");
    group.sample_size(10);
    for [_, cols] in SHAPES {
        let (u, f) = (random(TOKENS, cols, 0), random(TOKENS, cols, 1));
        let mut square = Matrix::zeros(cols, cols);
        group.throughput(Throughput::Elements((TOKENS * cols * cols) as u64));
        group.bench_function(BenchmarkId::from_parameter(cols), |bencher| {
            bencher.iter(|| {
                matmul(
                    square.as_faer_mut(),
                    Accum::Add,
                    black_box(&u).as_faer().transpose(),
                    f.as_faer(),
                    1.0,
                    Par::rayon(0),
                );
            });
        });
    }
    group.finish();
}

fn statistics(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("statistics");
    group.sample_size(10);
    let weights: Vec<f32> = (0..TOKENS).map(|t| 0.5 + (t % 7) as f32).collect();
    for [_, cols] in SHAPES {
        let (u, f) = (random(TOKENS, cols, 0), random(TOKENS, cols, 1));
        let half = TOKENS * cols * cols / 2;
        let (f32, bf16) = (StatisticsDtype::F32, StatisticsDtype::Bf16);
        for (name, with_cross, dtype) in [
            ("H", false, f32),
            ("H and C", true, f32),
            ("H, bf16", false, bf16),
            ("H and C, bf16", true, bf16),
        ] {
            let mut statistics = Statistics::new(cols, with_cross).rounded_to(dtype);
            let f = with_cross.then_some(&f);
            let needed = if with_cross { 3 * half } else { half };
            group.throughput(Throughput::Elements(needed as u64));
            group.bench_function(BenchmarkId::new(name, cols), |bencher| {
                bencher.iter(|| {
                    statistics
                        .add("bench", black_box(&u), f, Some(&weights))
                        .is_ok()
                });
            });
        }
    }
    group.finish();
}

/// Cholesky is n³/6; with C two triangular solves of n³/6 each more.
fn factors(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("factor");
    group.sample_size(10);
    for [_, cols] in SHAPES {
        let sixth = (cols * cols * cols / 6) as u64;
        for (name, with_cross, needed) in [("H", false, sixth), ("H and C", true, 3 * sixth)] {
            let statistics = statistics_of(cols, with_cross);
            let settings = SolverSettings::default();
            group.throughput(Throughput::Elements(needed));
            group.bench_function(BenchmarkId::new(name, cols), |bencher| {
                bencher.iter_batched(
                    || statistics.clone(),
                    |statistics| Factor::new("bench", statistics, &settings).is_ok(),
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

/// Each row passes its errors on through half a square, and with α > 0 its weights through another.
fn solvers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("solve");
    group.sample_size(10);
    let scheme = Scheme::new(3, Some(128), false, ScaleDtype::Bf16);
    let scheme = scheme.expect("3 bits in groups of 128 are allowed");
    for [rows, cols] in SHAPES {
        let shape = format!("{rows}x{cols}");
        let w = random(rows, cols, 2);
        let half = (rows * cols * cols / 2) as u64;
        for (name, alpha, needed) in [("gptq", 0.0, half), ("gptaq", 0.25, 2 * half)] {
            let settings = SolverSettings {
                alpha,
                ..Default::default()
            };
            let factor = Factor::new("bench", statistics_of(cols, alpha > 0.0), &settings);
            let factor = factor.expect("more tokens than columns, or damping, make H definite");
            group.throughput(Throughput::Elements(needed));
            group.bench_function(BenchmarkId::new(name, &shape), |bencher| {
                bencher.iter(|| solve("bench", black_box(&w), &factor, scheme, &settings).is_ok());
            });
        }
        group.throughput(Throughput::Elements((rows * cols) as u64));
        for (name, clip) in [("rtn", Clip::None), ("rtn with clip search", Clip::Mse)] {
            group.bench_function(BenchmarkId::new(name, &shape), |bencher| {
                bencher.iter(|| rtn("bench", black_box(&w), scheme, clip).is_ok());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, product, statistics, factors, solvers);
criterion_main!(benches);
