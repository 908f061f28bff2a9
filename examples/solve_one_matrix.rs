//! Quantizes one random matrix to 3 bits by GPTQ, and says how much less it loses than rounding.
//!
//! Run: cargo run --example solve_one_matrix

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vlmq::Matrix;
use vlmq::plan::{ScaleDtype, Scheme};
use vlmq::solver::{Clip, SolverSettings, gptq, layer_loss, rtn};
use vlmq::statistics::Statistics;

fn main() -> vlmq::Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut random = |rows, cols| Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0));
    let (weight, mix, raw) = (random(64, 128), random(128, 128), random(1000, 128));
    // Inputs whose channels are correlated, as hidden states are.
    let inputs = Matrix::from_fn(1000, 128, |token, channel| {
        let shared = (0..8).map(|k| raw[(token, k)] * mix[(k, channel)]);
        raw[(token, channel)] * 0.3 + shared.sum::<f32>()
    });

    let mut statistics = Statistics::new(128, false);
    statistics.add("example", &inputs, None, None)?;
    let scheme = Scheme::new(3, Some(64), false, ScaleDtype::Bf16)?;
    let nearest = rtn("example", &weight, scheme, Clip::None)?;
    let solved = gptq(
        "example",
        &weight,
        &statistics,
        scheme,
        &SolverSettings::default(),
    )?;
    let rounded = layer_loss(&weight, &nearest.dequantize(), &statistics.hessian());
    println!(
        "rounding to nearest loses {rounded:.1}, GPTQ {:.1}",
        solved.loss
    );
    Ok(())
}
