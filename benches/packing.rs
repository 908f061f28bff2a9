//! Time of packing codes into words and of taking them out again.
//!
//! Run: `cargo bench --bench packing`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::hint::black_box;
use vlmq::pack::{pack, unpack};

const N_CODES: usize = 1 << 20;

fn packing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("packing");
    group.throughput(Throughput::Elements(N_CODES as u64));
    for bits in [2u8, 3, 4, 8] {
        let mut rng = ChaCha8Rng::seed_from_u64(u64::from(bits));
        let mask = u8::MAX >> (8 - bits);
        let codes: Vec<u8> = (0..N_CODES).map(|_| rng.random::<u8>() & mask).collect();
        let words = pack(&codes, bits);
        group.bench_function(BenchmarkId::new("pack", bits), |bencher| {
            bencher.iter(|| pack(black_box(&codes), bits));
        });
        group.bench_function(BenchmarkId::new("unpack", bits), |bencher| {
            bencher.iter(|| unpack(black_box(&words), bits, N_CODES));
        });
    }
    group.finish();
}

criterion_group!(benches, packing);
criterion_main!(benches);
