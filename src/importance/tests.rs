//! The analytic gradients against automatic ones (testdata/importance, written by
//! tests/oracle/importance_golden.py) and against finite differences of a naive f64 forward.

use super::backward::{self, AttentionGradients, AttentionPass, MlpGradients};
use super::*;
use crate::checkpoint::Checkpoint;
use crate::model::attention::{Attention, Mask};
use crate::model::context::TokenContext;
use crate::model::decoder::{DecoderLayer, LayerSource, Projection};
use crate::model::decoder_config::{DecoderConfig, RopeAxes};
use crate::model::linear::matrix_from_tensor;
use candle_core::{Device, Tensor};
use std::path::Path;

/// Gradients in f32 against references in f64, largest difference over largest value.
const GRADIENT_TOLERANCE: f64 = 1e-3;
const HIDDEN: usize = 48;
const ROPE_THETA: f64 = 100.0;

fn config() -> DecoderConfig {
    let mut config = DecoderConfig::small(HIDDEN, 40, [6, 2, 8]);
    config.rotary.theta = ROPE_THETA;
    config.rotary.axes = RopeAxes::Sections([1, 1, 2]);
    config
}

/// The golden layer with its two streams.
struct Case {
    golden: Checkpoint,
    layer: DecoderLayer,
    context: TokenContext,
    positions: [Vec<u32>; 3],
    full: Tensor,
    quantized: Tensor,
    _folder: tempfile::TempDir,
}

impl Case {
    fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/importance");
        std::fs::copy(
            source.join("layer.safetensors"),
            folder.path().join("model.safetensors"),
        )
        .unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let golden = Checkpoint::open(folder.path()).unwrap();
        let bytes = golden.bytes("position_ids").unwrap();
        let ids: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let n = ids.len() / 3;
        let positions = std::array::from_fn(|axis| ids[axis * n..(axis + 1) * n].to_vec());
        let stream = |name: &str| {
            let values = golden.load(name, &[n, HIDDEN]).unwrap();
            Tensor::from_vec(values, (n, HIDDEN), &Device::Cpu).unwrap()
        };
        Self {
            layer: LayerSource {
                checkpoint: &golden,
                prefix: "layer".into(),
                layer_idx: 0,
                config: &config(),
                device: &Device::Cpu,
            }
            .whole()
            .unwrap(),
            context: TokenContext::new(&config(), &positions, vec![0; n], &Device::Cpu).unwrap(),
            full: stream("full"),
            quantized: stream("quantized"),
            positions,
            golden,
            _folder: folder,
        }
    }

    fn pass(&self, x: &Tensor) -> AttentionPass<'_> {
        AttentionPass::new(&self.layer, &self.context, x).unwrap()
    }

    fn layer_output(&self, y: &Tensor) -> Tensor {
        let h = self.layer.down_input(&self.layer.gate_up_input(y).unwrap());
        self.layer.after_mlp(y, &h.unwrap()).unwrap()
    }

    fn attention_gradients(&self) -> AttentionGradients {
        let (pass, target) = (self.pass(&self.quantized), self.pass(&self.full).y);
        let d_y = ((&pass.y - target).unwrap() * 2.0).unwrap();
        backward::attention(&pass, &d_y).unwrap()
    }

    fn layer_gradients(&self) -> (AttentionGradients, MlpGradients) {
        let (pass, target) = (self.pass(&self.quantized), self.pass(&self.full).y);
        let residual = (self.layer_output(&pass.y) - self.layer_output(&target)).unwrap();
        let mlp = backward::mlp(&self.layer, &pass.y, &(residual * 2.0).unwrap()).unwrap();
        let attention = backward::attention(&pass, &mlp.y).unwrap();
        (attention, mlp)
    }

    /// A fully connected copy in f64 that shares no code with the model.
    fn naive(&self) -> Naive {
        let weight = |p: Projection| rows(self.layer.linear(p).unwrap().weight());
        let bias = |name: &str, n: usize| {
            let values = self
                .golden
                .load(&format!("layer.self_attn.{name}.bias"), &[n]);
            values.unwrap().into_iter().map(f64::from).collect()
        };
        let norm = |name: &str| {
            let values = self.golden.load(&format!("layer.{name}.weight"), &[HIDDEN]);
            values.unwrap().into_iter().map(f64::from).collect()
        };
        Naive {
            weights: Projection::ALL.map(weight),
            biases: [bias("q_proj", 48), bias("k_proj", 16), bias("v_proj", 16)],
            norms: [norm("input_layernorm"), norm("post_attention_layernorm")],
            positions: self.positions.clone(),
        }
    }
}

type Rows = Vec<Vec<f64>>;

fn rows(x: &Tensor) -> Rows {
    let m = matrix_from_tensor(x).unwrap();
    (0..m.rows())
        .map(|r| m.row(r).iter().map(|&v| f64::from(v)).collect())
        .collect()
}

struct Naive {
    weights: [Rows; 7],
    biases: [Vec<f64>; 3],
    norms: [Vec<f64>; 2],
    positions: [Vec<u32>; 3],
}

/// `amount` added to one output value of one linear, or to a whole row of them.
#[derive(Clone)]
struct Nudge {
    projection: Projection,
    token: usize,
    amounts: Vec<(usize, f64)>,
}

impl Naive {
    fn linear(&self, p: Projection, x: &Rows, nudge: &[Nudge]) -> Rows {
        let mut out: Rows = x
            .iter()
            .map(|x| {
                let dot = |w: &Vec<f64>| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
                self.weights[p as usize].iter().map(dot).collect()
            })
            .collect();
        if let Some(bias) = self.biases.get(p as usize) {
            for row in &mut out {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        for nudge in nudge.iter().filter(|n| n.projection == p) {
            for &(channel, amount) in &nudge.amounts {
                out[nudge.token][channel] += amount;
            }
        }
        out
    }

    fn norm(&self, which: usize, x: &Rows) -> Rows {
        let one = |x: &Vec<f64>| {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let r = 1.0 / (mean + 1e-6).sqrt();
            x.iter()
                .zip(&self.norms[which])
                .map(|(v, g)| v * r * g)
                .collect()
        };
        x.iter().map(one).collect()
    }

    /// Rotates every head of `x`: frequency i of 4 follows axis 0, 1, 2, 2.
    fn rotate(&self, x: &mut Rows) {
        for (token, row) in x.iter_mut().enumerate() {
            for head in row.chunks_exact_mut(8) {
                for i in 0..4 {
                    let axis = [0, 1, 2, 2][i];
                    let angle = f64::from(self.positions[axis][token])
                        * ROPE_THETA.powf(-2.0 * i as f64 / 8.0);
                    let (a, b) = (head[i], head[i + 4]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + 4] = b * angle.cos() + a * angle.sin();
                }
            }
        }
    }

    /// The streams after attention and after the whole layer.
    fn forward(&self, x: &Rows, nudge: &[Nudge]) -> (Rows, Rows) {
        let n1 = self.norm(0, x);
        let [mut q, mut k, v] =
            [Projection::Q, Projection::K, Projection::V].map(|p| self.linear(p, &n1, nudge));
        self.rotate(&mut q);
        self.rotate(&mut k);
        let mut heads = vec![vec![0.0; 48]; x.len()];
        for (head, i) in (0..6).flat_map(|h| (0..x.len()).map(move |i| (h, i))) {
            let at = |row: &Vec<f64>, head: usize| row[head * 8..head * 8 + 8].to_vec();
            let query = at(&q[i], head);
            let score = |j: usize| {
                let key = at(&k[j], head / 3);
                query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>() / 8f64.sqrt()
            };
            let exps: Vec<f64> = (0..=i).map(|j| score(j).exp()).collect();
            let total: f64 = exps.iter().sum();
            for (j, e) in exps.iter().enumerate() {
                for (c, value) in at(&v[j], head / 3).iter().enumerate() {
                    heads[i][head * 8 + c] += e / total * value;
                }
            }
        }
        let add = |a: &Rows, b: &Rows| -> Rows {
            let pairs = a.iter().zip(b);
            pairs
                .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect())
                .collect()
        };
        let y = add(x, &self.linear(Projection::O, &heads, nudge));
        let n2 = self.norm(1, &y);
        let gate = self.linear(Projection::Gate, &n2, nudge);
        let up = self.linear(Projection::Up, &n2, nudge);
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let h = gate.iter().zip(&up);
        let h = h
            .map(|(g, u)| g.iter().zip(u).map(|(g, u)| silu(*g) * u).collect())
            .collect();
        let out = add(&y, &self.linear(Projection::Down, &h, nudge));
        (y, out)
    }
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
    let case = Case::open();
    let (a, m) = case.layer_gradients();
    let losses = [
        ("attention", named(&case.attention_gradients(), None)),
        ("layer", named(&a, Some(&m))),
    ];
    for (name, gradients) in losses {
        for (projection, ours) in gradients {
            let tensor = format!("{name}.{}", projection.name());
            let values = case
                .golden
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
    let case = Case::open();
    let pass = case.pass(&case.quantized);
    let d_y = ((&pass.y - case.pass(&case.full).y).unwrap() * 2.0).unwrap();
    let n = d_y.dim(0).unwrap();
    let gradients = |trace: &Attention| {
        let mut pass = pass.clone();
        pass.trace = trace.clone();
        named(&backward::attention(&pass, &d_y).unwrap(), None)
    };
    let whole = &pass.trace;
    for block_len in [1, 3, n - 1] {
        let cut = Attention::new(
            whole.queries.clone(),
            whole.keys.clone(),
            whole.values.clone(),
            &Mask::causal(&[n]),
            whole.scale(),
            block_len,
        );
        let cut = cut.unwrap();
        assert_eq!(cut.blocks().count(), n.div_ceil(block_len));
        let error = worst(&rows(&cut.output), &rows(&whole.output));
        assert!(error <= 1e-6, "output, {block_len}: {error:.2e}");
        for ((p, cut), (_, whole)) in gradients(&cut).iter().zip(gradients(whole)) {
            let error = worst(cut, &whole);
            assert!(error <= 1e-5, "{p:?}, {block_len}: {error:.2e}");
        }
    }
}

#[test]
fn gradients_are_finite_differences_of_the_loss() {
    const STEP: f64 = 1e-5;
    let case = Case::open();
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
                "{projection:?}, whole {whole}: {error:.2e}"
            );
        }
    }
}

/// The paper's first-order claim: a small error at a token's output changes the loss by ⟨P, ΔZ⟩,
/// and what that leaves out shrinks with the square of the error.
#[test]
fn small_token_errors_change_the_loss_to_first_order() {
    let case = Case::open();
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

fn settings(power: f64) -> ImportanceSettings {
    ImportanceSettings {
        power,
        norm: TokenNorm::MeanAbs,
        loss: ImportanceLoss::Attention,
    }
}

fn importance(case: &Case, power: f64, quantized: &Tensor) -> LayerImportance {
    let (pass, target) = (case.pass(quantized), case.pass(&case.full).y);
    let factors = settings(power).sample_factors(&pass, &target);
    LayerImportance::new(settings(power), vec![factors.unwrap()]).unwrap()
}

#[test]
fn weights_are_powers_of_factors_with_mean_one() {
    let case = Case::open();
    let first = importance(&case, 1.0, &case.quantized);
    let second = importance(&case, 2.0, &case.quantized);
    for projection in [Projection::Q, Projection::K, Projection::V, Projection::O] {
        let g = first.token_weights(projection).unwrap().unwrap().concat();
        let g2 = second.token_weights(projection).unwrap().unwrap().concat();
        let mean = g.iter().sum::<f32>() / g.len() as f32;
        assert!((mean - 1.0).abs() < 1e-5, "{mean}");
        for (g, g2) in g.iter().zip(&g2) {
            assert!((g * g - g2).abs() <= 1e-5 * g2.max(1.0));
        }
    }
    assert!(first.token_weights(Projection::Gate).unwrap().is_none());
}

#[test]
fn a_layer_without_residual_gets_uniform_weights() {
    let case = Case::open();
    let same = importance(&case, 2.0, &case.full);
    assert_eq!(
        same.token_weights(Projection::Q),
        Err(Uniform::VanishingResidual)
    );
}

#[test]
fn an_overflowing_gradient_gives_uniform_weights() {
    let case = Case::open();
    let far = (&case.quantized * 2e38).unwrap();
    let wild = importance(&case, 2.0, &far);
    assert_eq!(wild.token_weights(Projection::O), Err(Uniform::NotFinite));
}
