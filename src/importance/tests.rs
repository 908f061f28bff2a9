//! The analytic gradients against automatic ones (testdata/importance, written by
//! tests/oracle/importance_golden.py) and against finite differences of a naive f64 forward.

mod case;
mod naive;
mod sources;

use self::case::{Case, rows};
use self::naive::{Nudge, Rows};
use super::backward::{self, AttentionGradients, MlpGradients};
use super::*;
use crate::model::attention::{Attention, Mask};
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::{
    Activation, Ahead, DecoderConfig, LocalAttention, NormScale, RopeAxes, RopeScaling,
};
use crate::model::experts::Experts;
use crate::model::projection::Projection;
use candle_core::Tensor;

/// Gradients in f32 against references in f64, largest difference over largest value.
const GRADIENT_TOLERANCE: f64 = 1e-3;

/// Two images, the first longer than the window of [`gemma3`], the second right after it.
const IMAGES: [u32; 10] = [0, 1, 1, 1, 1, 1, 2, 2, 0, 0];

/// A prompt longer than the window, and an answer.
const PROMPT: [u32; 10] = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0];

fn golden() -> Case {
    let mut config = DecoderConfig::small(48, 40, [6, 2, 8]);
    config.rotary.theta = 100.0;
    config.rotary.axes = RopeAxes::Sections([1, 1, 2]);
    Case::golden(config)
}

/// A layer as in Qwen3: query and key norms, interleaved axes, no biases; heads wider in all than
/// the stream.
fn qwen3() -> DecoderConfig {
    let mut config = DecoderConfig::small(24, 20, [4, 2, 8]);
    config.qkv_bias = false;
    config.qk_norm = true;
    config.rotary.theta = 100.0;
    config.rotary.axes = RopeAxes::Interleaved([2, 1, 1]);
    config
}

/// A layer as in Gemma 3: norms on both sides that multiply by 1 + weight, GELU, images that see
/// themselves, and a window or stretched positions.
fn gemma3(is_local: bool) -> DecoderConfig {
    let mut config = qwen3();
    config.norm_scale = NormScale::OnePlusWeight;
    config.sandwich_norms = true;
    config.activation = Activation::GeluTanh;
    config.score_scale = 1.0 / 12f64.sqrt();
    config.ahead = Ahead::Image;
    config.rotary.axes = RopeAxes::One;
    let local = LocalAttention {
        window: 3,
        rotary: config.rotary,
        is_local: vec![is_local],
    };
    config.local = Some(local);
    config.rotary.theta = 1000.0;
    config.rotary.scaling = RopeScaling::Linear(2.0);
    config
}

/// A layer as in PaliGemma 2: caps that scores come near, norms on both sides, and a prompt that
/// sees all of itself in spite of a window.
fn gemma2() -> DecoderConfig {
    let mut config = gemma3(true);
    config.qk_norm = false;
    config.ahead = Ahead::Prompt;
    config.score_cap = Some(0.7);
    config
}

/// A layer as in Qwen3's mixtures: of five experts the best two.
fn mixture() -> DecoderConfig {
    let mut config = qwen3();
    config.experts = Some(Experts {
        n_experts: 5,
        n_chosen: 2,
        width: 8,
        is_mixture: vec![true],
    });
    config
}

fn cases() -> [(&'static str, Case); 6] {
    [
        ("gemma2", Case::random(gemma2(), &PROMPT, 4)),
        ("golden", golden()),
        ("qwen3", Case::random(qwen3(), &[0; 10], 1)),
        ("gemma3, local", Case::random(gemma3(true), &IMAGES, 2)),
        ("gemma3, global", Case::random(gemma3(false), &IMAGES, 3)),
        ("mixture", Case::random(mixture(), &[0; 10], 4)),
    ]
}

fn loss(out: &Rows, target: &Rows) -> f64 {
    let pairs = out.iter().flatten().zip(target.iter().flatten());
    pairs.map(|(a, b)| (a - b).powi(2)).sum()
}

fn worst(ours: &Rows, reference: &Rows) -> f64 {
    let largest = reference.iter().flatten().fold(0f64, |m, v| m.max(v.abs()));
    let pairs = ours.iter().flatten().zip(reference.iter().flatten());
    pairs.fold(0f64, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn named(a: &AttentionGradients, m: Option<&MlpGradients>) -> Vec<(Projection, Rows)> {
    let mut all = vec![
        (Projection::Q, rows(&a.q)),
        (Projection::K, rows(&a.k)),
        (Projection::V, rows(&a.v)),
        (Projection::O, rows(&a.o)),
    ];
    if let Some(m) = m {
        all.push((Projection::Gate, rows(&m.gate)));
        all.push((Projection::Up, rows(&m.up)));
        all.push((Projection::Down, rows(&m.down)));
    }
    all
}

#[test]
fn gradients_are_those_of_automatic_differentiation() {
    let case = golden();
    let (a, m) = case.layer_gradients();
    let losses = [
        ("attention", named(&case.attention_gradients(), None)),
        ("layer", named(&a, Some(&m))),
    ];
    for (name, gradients) in losses {
        for (projection, ours) in gradients {
            let tensor = format!("{name}.{}", projection.name());
            let values = case
                .checkpoint
                .load(&tensor, &[ours.len(), ours[0].len()])
                .unwrap();
            let golden: Rows = values
                .chunks_exact(ours[0].len())
                .map(|row| row.iter().map(|&v| f64::from(v)).collect())
                .collect();
            let error = worst(&ours, &golden);
            assert!(error <= GRADIENT_TOLERANCE, "{tensor}: {error:.2e}");
        }
    }
}

#[test]
fn attention_in_blocks_of_queries_is_attention() {
    for (name, case) in cases() {
        in_blocks_as_whole(name, &case);
    }
}

fn in_blocks_as_whole(name: &str, case: &Case) {
    let pass = case.pass(&case.quantized);
    let d_y = ((&pass.y - case.pass(&case.full).y).unwrap() * 2.0).unwrap();
    let n = d_y.dim(0).unwrap();
    let gradients = |trace: &Attention| {
        let mut pass = pass.clone();
        pass.trace = trace.clone();
        named(&backward::attention(&pass, &d_y).unwrap(), None)
    };
    let whole = &pass.trace;
    let (config, window) = (&case.config, case.config.window(0));
    let mask = Mask::new(&[n], &case.images, config.ahead, window);
    for block_len in [1, 3, n - 1] {
        let cut = Attention::new(
            whole.queries.clone(),
            whole.keys.clone(),
            whole.values.clone(),
            &mask,
            whole.scoring(),
            block_len,
        );
        let cut = cut.unwrap();
        assert_eq!(cut.blocks().count(), n.div_ceil(block_len));
        let error = worst(&rows(&cut.output), &rows(&whole.output));
        assert!(error <= 1e-6, "{name}, output, {block_len}: {error:.2e}");
        for ((p, cut), (_, whole)) in gradients(&cut).iter().zip(gradients(whole)) {
            let error = worst(cut, &whole);
            assert!(error <= 1e-5, "{name}, {p:?}, {block_len}: {error:.2e}");
        }
    }
}

#[test]
fn gradients_are_finite_differences_of_the_loss() {
    for (name, case) in cases() {
        gradients_as_differences(name, &case);
    }
}

fn gradients_as_differences(name: &str, case: &Case) {
    const STEP: f64 = 1e-5;
    let naive = case.naive();
    let (full, quantized) = (rows(&case.full), rows(&case.quantized));
    let target = naive.forward(&full, &[]);
    let (a, m) = case.layer_gradients();
    let losses = [
        (false, named(&case.attention_gradients(), None)),
        (true, named(&a, Some(&m))),
    ];
    for (whole, gradients) in losses {
        let value = |nudge: Nudge| {
            let (y, out) = naive.forward(&quantized, &[nudge]);
            if whole {
                loss(&out, &target.1)
            } else {
                loss(&y, &target.0)
            }
        };
        for (projection, ours) in gradients {
            // Every third channel of every second token: both heads of a group, all sections.
            let differences: Rows = (0..ours.len())
                .step_by(2)
                .map(|token| {
                    let slope = |channel: usize| {
                        let nudge = |amount: f64| Nudge {
                            projection,
                            token,
                            amounts: vec![(channel, amount)],
                        };
                        (value(nudge(STEP)) - value(nudge(-STEP))) / (2.0 * STEP)
                    };
                    (0..ours[0].len()).step_by(3).map(slope).collect()
                })
                .collect();
            let picked = ours.iter().step_by(2);
            let picked: Rows = picked
                .map(|row| row.iter().step_by(3).copied().collect())
                .collect();
            let error = worst(&picked, &differences);
            assert!(
                error <= GRADIENT_TOLERANCE,
                "{name}, {projection:?}, whole {whole}: {error:.2e}"
            );
        }
    }
}

#[test]
fn gradients_at_the_input_are_finite_differences_of_the_loss() {
    const STEP: f64 = 1e-5;
    for (name, case) in cases() {
        let naive = case.naive();
        let quantized = rows(&case.quantized);
        let target = naive.forward(&rows(&case.full), &[]);
        for (whole, ours) in case.input_gradients() {
            let value = |token: usize, channel: usize, step: f64| {
                let mut x = quantized.clone();
                x[token][channel] += step;
                let (y, out) = naive.forward(&x, &[]);
                match whole {
                    true => loss(&out, &target.1),
                    false => loss(&y, &target.0),
                }
            };
            let slope = |t, c| (value(t, c, STEP) - value(t, c, -STEP)) / (2.0 * STEP);
            let picked = |row: &Vec<f64>| row.iter().step_by(3).copied().collect();
            let own: Rows = ours.iter().step_by(2).map(picked).collect();
            let tokens = (0..ours.len()).step_by(2);
            let channels = || (0..ours[0].len()).step_by(3);
            let differences: Rows = tokens
                .map(|t| channels().map(|c| slope(t, c)).collect())
                .collect();
            let error = worst(&own, &differences);
            assert!(
                error <= GRADIENT_TOLERANCE,
                "{name}, whole {whole}: {error:.2e}"
            );
        }
    }
}

/// The paper's first-order claim: a small error at a token's output changes the loss by ⟨P, ΔZ⟩,
/// and what that leaves out shrinks with the square of the error.
#[test]
fn small_token_errors_change_the_loss_to_first_order() {
    let case = golden();
    let naive = case.naive();
    let (full, quantized) = (rows(&case.full), rows(&case.quantized));
    let target = naive.forward(&full, &[]).0;
    let before = loss(&naive.forward(&quantized, &[]).0, &target);
    for (projection, gradient) in named(&case.attention_gradients(), None) {
        let deviation = |size: f64| -> f64 {
            let nudges: Vec<Nudge> = (0..gradient.len())
                .map(|token| {
                    let wave = |c: usize| size * ((token * 31 + c * 17) as f64).sin();
                    let amounts = (0..gradient[0].len()).map(|c| (c, wave(c))).collect();
                    Nudge {
                        projection,
                        token,
                        amounts,
                    }
                })
                .collect();
            let terms = nudges.iter().flat_map(|n| {
                let row = &gradient[n.token];
                n.amounts.iter().map(move |&(channel, a)| row[channel] * a)
            });
            let (predicted, bound) =
                terms.fold((0.0, 0.0), |(sum, abs), t| (sum + t, abs + t.abs()));
            let measured = loss(&naive.forward(&quantized, &nudges).0, &target) - before;
            (measured - predicted).abs() / bound
        };
        let (large, small) = (deviation(1e-2), deviation(1e-4));
        assert!(small < 0.01, "{projection:?}: {small:.2e} off at 1e-4");
        assert!(
            small < large / 20.0,
            "{projection:?}: {small:.2e} at 1e-4, {large:.2e} at 1e-2"
        );
    }
}

fn importance_of(
    case: &Case,
    settings: ImportanceSettings,
    quantized: &Tensor,
    rounded: Option<&DecoderLayer>,
) -> LayerImportance {
    let (full, classes) = (case.full_pass(), case.classes());
    let sample = case.sample(quantized, &full, rounded, &classes);
    let factors = settings.sample_factors(&sample);
    LayerImportance::new(settings, vec![factors.unwrap()]).unwrap()
}

fn importance(case: &Case, power: f64, quantized: &Tensor) -> LayerImportance {
    importance_of(case, ImportanceSettings::paper(power), quantized, None)
}

fn weights(all: &LayerImportance, projection: Projection) -> Option<Vec<f32>> {
    let found = all.token_weights(projection, 8).unwrap()?;
    Some(found.weights.concat())
}

#[test]
fn weights_are_powers_of_factors_with_mean_one() {
    let case = golden();
    let first = importance(&case, 1.0, &case.quantized);
    let second = importance(&case, 2.0, &case.quantized);
    for projection in [Projection::Q, Projection::K, Projection::V, Projection::O] {
        let g = weights(&first, projection).unwrap();
        let g2 = weights(&second, projection).unwrap();
        let mean = g.iter().sum::<f32>() / g.len() as f32;
        assert!((mean - 1.0).abs() < 1e-5, "{mean}");
        for (g, g2) in g.iter().zip(&g2) {
            assert!((g * g - g2).abs() <= 1e-5 * g2.max(1.0));
        }
    }
    assert!(first.token_weights(Projection::Gate, 8).unwrap().is_none());
}

#[test]
fn a_layer_without_residual_gets_uniform_weights() {
    let case = golden();
    let same = importance(&case, 2.0, &case.full);
    assert_eq!(
        same.token_weights(Projection::Q, 8),
        Err(Uniform::VanishingResidual)
    );
}

#[test]
fn an_overflowing_gradient_gives_uniform_weights() {
    let case = golden();
    let far = (&case.quantized * 2e38).unwrap();
    let wild = importance(&case, 2.0, &far);
    assert_eq!(
        wild.token_weights(Projection::O, 8),
        Err(Uniform::NotFinite)
    );
}
