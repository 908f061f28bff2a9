//! A decoder layer in f64, written out plainly: it shares data with the model, and no code.

use crate::model::decoder_config::{
    Activation, Ahead, DecoderConfig, RopeAxes, RopeScaling, Rotary,
};
use crate::model::projection::{Projection, Slot};
use std::collections::HashMap;

pub(super) type Rows = Vec<Vec<f64>>;

/// The first layer of `config`.
pub(super) struct Naive {
    pub config: DecoderConfig,
    pub weights: HashMap<Slot, Rows>,
    pub biases: HashMap<Slot, Vec<f64>>,
    /// Scores of experts, where the MLP is a mixture.
    pub router: Option<Rows>,
    /// What norms multiply by, by the names that they have in a layer.
    pub norms: HashMap<&'static str, Vec<f64>>,
    pub positions: [Vec<u32>; 3],
    /// For each token 0, or the number of its image or prompt.
    pub images: Vec<u32>,
}

/// `amount` added to one output value of one linear, or to a whole row of them. In a mixture the
/// row has a part for each of the token's experts, the best first.
#[derive(Clone)]
pub(super) struct Nudge {
    pub projection: Projection,
    pub token: usize,
    pub amounts: Vec<(usize, f64)>,
}

/// The norms that a layer has, with their widths.
pub(super) fn norms_of(config: &DecoderConfig) -> Vec<(&'static str, usize)> {
    let (hidden, head_dim) = (config.hidden_size, config.head_dim);
    let mut all = vec![
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
    ];
    if config.sandwich_norms {
        all.push(("pre_feedforward_layernorm", hidden));
        all.push(("post_feedforward_layernorm", hidden));
    }
    if config.qk_norm {
        all.push(("self_attn.q_norm", head_dim));
        all.push(("self_attn.k_norm", head_dim));
    }
    all
}

impl Naive {
    /// The streams after attention and after the whole layer.
    pub fn forward(&self, x: &Rows, nudge: &[Nudge]) -> (Rows, Rows) {
        let is_sandwich = self.config.sandwich_norms;
        let n1 = self.norm("input_layernorm", x);
        let [q, k, v] =
            [Projection::Q, Projection::K, Projection::V].map(|p| self.linear(p, &n1, nudge));
        let q = self.rotated(&self.norm_if(self.config.qk_norm, "self_attn.q_norm", q));
        let k = self.rotated(&self.norm_if(self.config.qk_norm, "self_attn.k_norm", k));
        let o = self.linear(Projection::O, &self.attention(&q, &k, &v), nudge);
        let y = sum(x, &self.norm_if(is_sandwich, "post_attention_layernorm", o));
        let before_mlp = match is_sandwich {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        };
        let n2 = self.norm(before_mlp, &y);
        let down = n2.iter().enumerate();
        let down = down.map(|(token, x)| self.mlp(token, x, nudge)).collect();
        let down = self.norm_if(is_sandwich, "post_feedforward_layernorm", down);
        let out = sum(&y, &down);
        (y, out)
    }

    fn linear(&self, p: Projection, x: &Rows, nudge: &[Nudge]) -> Rows {
        let rows = x.iter().enumerate();
        rows.map(|(token, x)| self.apply(p.into(), 0, token, x, nudge))
            .collect()
    }

    /// One row of a linear, which is the part `choice` of the token's.
    fn apply(
        &self,
        slot: Slot,
        choice: usize,
        token: usize,
        x: &[f64],
        nudge: &[Nudge],
    ) -> Vec<f64> {
        let dot = |w: &Vec<f64>| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let mut out: Vec<f64> = self.weights[&slot].iter().map(dot).collect();
        if let Some(bias) = self.biases.get(&slot) {
            out.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
        let part = choice * out.len()..(choice + 1) * out.len();
        let own = |n: &&Nudge| n.projection == slot.projection && n.token == token;
        for &(channel, amount) in nudge.iter().filter(own).flat_map(|n| &n.amounts) {
            if part.contains(&channel) {
                out[channel - part.start] += amount;
            }
        }
        out
    }

    /// The MLP of one token: one, or the weighted sum of its best experts.
    fn mlp(&self, token: usize, x: &[f64], nudge: &[Nudge]) -> Vec<f64> {
        let Some(router) = &self.router else {
            return self.gated(None, 0, token, x, nudge);
        };
        let score = |w: &Vec<f64>| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>().exp();
        let scores: Vec<f64> = router.iter().map(score).collect();
        let total: f64 = scores.iter().sum();
        let mut best: Vec<(usize, f64)> = scores.iter().map(|s| s / total).enumerate().collect();
        best.sort_by(|a, b| b.1.total_cmp(&a.1));
        best.truncate(self.config.experts.as_ref().unwrap().n_chosen);
        let chosen: f64 = best.iter().map(|(_, p)| p).sum();
        let mut sum = vec![0.0; self.config.hidden_size];
        for (choice, (expert, p)) in best.iter().enumerate() {
            let out = self.gated(Some(*expert), choice, token, x, nudge);
            sum.iter_mut()
                .zip(out)
                .for_each(|(s, o)| *s += p / chosen * o);
        }
        sum
    }

    fn gated(
        &self,
        expert: Option<usize>,
        choice: usize,
        token: usize,
        x: &[f64],
        nudge: &[Nudge],
    ) -> Vec<f64> {
        let apply = |projection, x: &[f64]| {
            self.apply(Slot { projection, expert }, choice, token, x, nudge)
        };
        let (gate, up) = (apply(Projection::Gate, x), apply(Projection::Up, x));
        let pairs = gate.iter().zip(&up);
        let h: Vec<f64> = pairs.map(|(g, u)| self.activated(*g) * u).collect();
        apply(Projection::Down, &h)
    }

    fn norm_if(&self, is_there: bool, name: &str, x: Rows) -> Rows {
        match is_there {
            true => self.norm(name, &x),
            false => x,
        }
    }

    /// Norms a row, or each of the heads that it consists of.
    fn norm(&self, name: &str, x: &Rows) -> Rows {
        let factors = &self.norms[name];
        let one = |x: &[f64]| -> Vec<f64> {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let r = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
            x.iter().zip(factors).map(|(v, g)| v * r * g).collect()
        };
        let row = |x: &Vec<f64>| x.chunks_exact(factors.len()).flat_map(one).collect();
        x.iter().map(row).collect()
    }

    /// The window of the layer, and what it turns by.
    fn locality(&self) -> (usize, Rotary) {
        match &self.config.local {
            Some(local) if local.is_local[0] => (local.window, local.rotary),
            _ => (usize::MAX, self.config.rotary),
        }
    }

    /// Every head of `x` turned by the positions of its token.
    fn rotated(&self, x: &Rows) -> Rows {
        let (dim, rotary) = (self.config.head_dim, self.locality().1);
        let mut turned = x.clone();
        for (token, row) in turned.iter_mut().enumerate() {
            for head in row.chunks_exact_mut(dim) {
                for i in 0..dim / 2 {
                    let position = f64::from(self.positions[axis(rotary.axes, i)][token]);
                    let angle = position * rotary.theta.powf(-2.0 * i as f64 / dim as f64)
                        / stretch(rotary.scaling);
                    let (a, b) = (head[i], head[i + dim / 2]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + dim / 2] = b * angle.cos() + a * angle.sin();
                }
            }
        }
        turned
    }

    fn sees(&self, query: usize, key: usize) -> bool {
        let (window, _) = self.locality();
        let together = self.images[query] != 0 && self.images[query] == self.images[key];
        let near = query.saturating_sub(key) < window;
        match self.config.ahead {
            Ahead::Nothing => key <= query && near,
            Ahead::Image => (key <= query || together) && near,
            Ahead::Prompt => (key <= query && near) || together,
        }
    }

    fn attention(&self, q: &Rows, k: &Rows, v: &Rows) -> Rows {
        let (dim, n_heads) = (self.config.head_dim, self.config.n_heads);
        let n_groups = n_heads / self.config.n_kv_heads;
        let mut heads = vec![vec![0.0; n_heads * dim]; q.len()];
        for (head, i) in (0..n_heads).flat_map(|h| (0..q.len()).map(move |i| (h, i))) {
            let own = |row: &Vec<f64>| row[head * dim..][..dim].to_vec();
            let shared = |row: &Vec<f64>| row[head / n_groups * dim..][..dim].to_vec();
            let query = own(&q[i]);
            let weight = |j: usize| {
                let key = shared(&k[j]);
                let score: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                let score = score * self.config.score_scale;
                let score = match self.config.score_cap {
                    Some(cap) => cap * (score / cap).tanh(),
                    None => score,
                };
                match self.sees(i, j) {
                    true => score.exp(),
                    false => 0.0,
                }
            };
            let weights: Vec<f64> = (0..q.len()).map(weight).collect();
            let total: f64 = weights.iter().sum();
            for (j, weight) in weights.iter().enumerate() {
                for (c, value) in shared(&v[j]).iter().enumerate() {
                    heads[i][head * dim + c] += weight / total * value;
                }
            }
        }
        heads
    }

    fn activated(&self, g: f64) -> f64 {
        match self.config.activation {
            Activation::Silu => g / (1.0 + (-g).exp()),
            Activation::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                0.5 * g * (1.0 + inner.tanh())
            }
        }
    }
}

/// Which position frequency i follows.
fn axis(axes: RopeAxes, i: usize) -> usize {
    match axes {
        RopeAxes::One => 0,
        RopeAxes::Sections([first, _, _]) if i < first => 0,
        RopeAxes::Sections([first, second, _]) => 1 + usize::from(i >= first + second),
        RopeAxes::Interleaved(lengths) => match i % 3 {
            turn if turn != 0 && i < 3 * lengths[turn] => turn,
            _ => 0,
        },
    }
}

fn stretch(scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => 1.0,
        RopeScaling::Linear(factor) => factor,
        RopeScaling::Dynamic { .. } | RopeScaling::Llama3 { .. } => {
            panic!("no test stretches by length or wavelength")
        }
    }
}

fn sum(a: &Rows, b: &Rows) -> Rows {
    let pairs = a.iter().zip(b);
    pairs
        .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect())
        .collect()
}
