//! Time of what happens to a picture and its text before the model sees them.
//!
//! Run: `cargo bench --bench processor`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::hint::black_box;
use std::path::Path;
use vlmq::families::open_processor;
use vlmq::processor::RgbImage;
use vlmq::processor::resize::{Filter, resize};

/// Sides before and after resizing.
const SIDES: [(usize, usize); 3] = [(336, 168), (1024, 448), (2048, 1008)];

fn picture(side: usize) -> RgbImage {
    let mut rng = ChaCha8Rng::seed_from_u64(side as u64);
    RgbImage {
        width: side,
        height: side,
        data: (0..side * side * 3).map(|_| rng.random()).collect(),
    }
}

fn processor(criterion: &mut Criterion) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("testbed/model");
    let processor = open_processor(&model).expect("the bundled model is whole");
    let mut group = criterion.benchmark_group("processor");
    for (from, to) in SIDES {
        let picture = picture(from);
        group.throughput(Throughput::Elements((from * from) as u64));
        group.bench_function(BenchmarkId::new("resize", format!("{from} to {to}")), |b| {
            b.iter(|| resize(black_box(&picture), to, to, Filter::Bicubic).is_ok());
        });
        group.bench_function(BenchmarkId::new("patches of 168", from), |b| {
            b.iter(|| processor.vision_input(black_box(&picture), 1).is_ok());
        });
    }
    let text = "The quick brown fox jumps over 12 lazy dogs; which of them is red?\n".repeat(32);
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("tokenize", |b| {
        b.iter(|| processor.encode_text(black_box(&text)).is_ok());
    });
    group.finish();
}

criterion_group!(benches, processor);
criterion_main!(benches);
