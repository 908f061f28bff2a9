//! Time of the statistics and of the solvers, by shape of the linear.
//!
//! Run: `cargo bench --bench solver`, with a filter such as `1536x1536` to spare the large ones.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::hint::black_box;
use vlmq::Matrix;
use vlmq::plan::{ScaleDtype, Scheme};
use vlmq::solver::{Clip, SolverSettings, gptq, rtn};
use vlmq::statistics::Statistics;

/// `[out, in]` of square attention, and of an MLP's way down, in a 2B model.
const SHAPES: [[usize; 2]; 3] = [[256, 768], [1536, 1536], [1536, 8960]];

const TOKENS: usize = 2048;

fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
}

fn statistics(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("statistics");
    group.sample_size(10);
    for cols in [768, 1536, 8960] {
        let (u, f) = (random(TOKENS, cols, 0), random(TOKENS, cols, 1));
        let weights: Vec<f32> = (0..TOKENS).map(|t| 0.5 + (t % 7) as f32).collect();
        group.throughput(Throughput::Elements((TOKENS * cols * cols) as u64));
        for with_cross in [false, true] {
            let name = if with_cross { "H and C" } else { "H" };
            let mut statistics = Statistics::new(cols, with_cross);
            let f = with_cross.then_some(&f);
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

fn solvers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("solver");
    group.sample_size(10);
    let scheme = Scheme::new(3, Some(128), false, ScaleDtype::Bf16);
    let scheme = scheme.expect("3 bits in groups of 128 are allowed");
    for [rows, cols] in SHAPES {
        let shape = format!("{rows}x{cols}");
        let w = random(rows, cols, 2);
        let (u, f) = (random(TOKENS, cols, 0), random(TOKENS, cols, 1));
        let mut statistics = Statistics::new(cols, true);
        let added = statistics.add("bench", &u, Some(&f), None);
        added.expect("random inputs are finite");
        for (name, alpha) in [("gptq", 0.0), ("gptaq", 0.25)] {
            let settings = SolverSettings {
                alpha,
                ..Default::default()
            };
            group.bench_function(BenchmarkId::new(name, &shape), |bencher| {
                bencher
                    .iter(|| gptq("bench", black_box(&w), &statistics, scheme, &settings).is_ok());
            });
        }
        for (name, clip) in [("rtn", Clip::None), ("rtn with clip search", Clip::Mse)] {
            group.bench_function(BenchmarkId::new(name, &shape), |bencher| {
                bencher.iter(|| rtn("bench", black_box(&w), scheme, clip).is_ok());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, statistics, solvers);
criterion_main!(benches);
