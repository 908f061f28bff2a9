//! Mixtures of experts: an MLP that is many, of which each token goes through a few.
//!
//! A router gives each token a score for each expert. The `k` best are the token's *choices*, and
//! the softmax over their scores, which is that over all scores divided by its sum over the chosen,
//! is what their outputs are weighted with.
//!
//! Rows stand in one of two orders. *By token*: `[n, k·width]`, of each token its choices side by
//! side, the best first; hidden states are kept so. *By expert*: `[n·k, width]`, expert by expert,
//! of each its tokens in their order; linears are applied so, each to a run of rows.

use crate::checkpoint::Checkpoint;
use crate::model::config::ConfigNode;
use crate::model::linear::load_tensor;
use crate::{Error, Result};
use candle_core::{D, Device, Tensor};
use std::cmp::Ordering;
use std::ops::Range;

/// More experts than any published model has in a layer: names are made of all of them before the
/// first tensor is looked for.
const MAX_EXPERTS: usize = 4096;

/// The mixtures of a decoder, as data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts that a token goes through.
    pub n_chosen: usize,
    /// Width inside an expert.
    pub width: usize,
    /// For each layer whether its MLP is a mixture.
    pub is_mixture: Vec<bool>,
}

impl Experts {
    /// Reads the keys of Qwen's mixtures, with the defaults that transformers gives them.
    ///
    /// # Errors
    /// [`Error::Format`] for an ill-typed or contradictory key, [`Error::Unsupported`] for more
    /// experts than are handled and for weights that are not normalized.
    pub fn read(text: &ConfigNode, n_layers: usize) -> Result<Self> {
        // transformers calls the same number by two names.
        let n_experts = text.size_or("num_experts", text.size_or("num_local_experts", 60)?)?;
        let n_chosen = text.size_or("num_experts_per_tok", 4)?;
        let width = text.size_or("moe_intermediate_size", 1408)?;
        if n_experts > MAX_EXPERTS {
            let what = format!("num_experts {n_experts} in config.json; up to {MAX_EXPERTS} are");
            return Err(Error::Unsupported { what });
        }
        if n_chosen > n_experts || n_chosen.checked_mul(width).is_none_or(|n| n >= 1 << 31) {
            let why = format!("{n_chosen} of {n_experts} experts of width {width} cannot be");
            return Err(text.invalid("num_experts_per_tok", why));
        }
        if !text.flag_or("norm_topk_prob", true)? {
            let what = "norm_topk_prob: false in config.json; weights of experts sum to one here";
            return Err(Error::Unsupported { what: what.into() });
        }
        let step = text.size_or("decoder_sparse_step", 1)?;
        let dense = text.sizes_or("mlp_only_layers", &[])?;
        let is_mixture = |i: usize| !dense.contains(&i) && (i + 1).is_multiple_of(step);
        Ok(Self {
            n_experts,
            n_chosen,
            width,
            is_mixture: (0..n_layers).map(is_mixture).collect(),
        })
    }
}

/// What sends tokens to experts. It is never quantized.
#[derive(Clone, Debug)]
pub struct Router {
    /// `[n_experts, hidden]`.
    weight: Tensor,
    n_chosen: usize,
}

impl Router {
    /// Reads the weight `name`.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load`].
    pub fn load(
        checkpoint: &Checkpoint,
        name: &str,
        experts: &Experts,
        hidden: usize,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self {
            weight: load_tensor(checkpoint, name, &[experts.n_experts, hidden], device)?,
            n_chosen: experts.n_chosen,
        })
    }

    /// The choices of tokens `x [n, hidden]`.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn route(&self, x: &Tensor) -> Result<Routing> {
        let scores = x.matmul(&self.weight.t()?)?.to_vec2::<f32>()?;
        let n_experts = self.weight.dim(0)?;
        let mut experts = Vec::with_capacity(scores.len() * self.n_chosen);
        let mut weights = Vec::with_capacity(experts.capacity());
        for scores in &scores {
            let mut order: Vec<usize> = (0..n_experts).collect();
            // Of equals the first, so that a token's choices do not depend on anything else.
            let better = |a: &usize, b: &usize| -> Ordering {
                scores[*b].total_cmp(&scores[*a]).then(a.cmp(b))
            };
            order.select_nth_unstable_by(self.n_chosen - 1, better);
            order.truncate(self.n_chosen);
            order.sort_unstable_by(better);
            let best = scores[order[0]];
            let parts: Vec<f32> = order.iter().map(|&e| (scores[e] - best).exp()).collect();
            let sum: f32 = parts.iter().sum();
            weights.extend(parts.iter().map(|part| part / sum));
            experts.extend(order);
        }
        Routing::new(experts, weights, self.n_chosen, n_experts, x.device())
    }

    /// Carries `d`, the gradient with respect to the weights of `routing` by expert `[n·k]`, back
    /// to the tokens `[n, hidden]`: which experts are chosen is taken as it is.
    ///
    /// # Errors
    /// A tensor error if shapes disagree.
    pub fn backward(&self, routing: &Routing, d: &Tensor) -> Result<Tensor> {
        let (k, n_experts) = (routing.n_chosen, self.weight.dim(0)?);
        let d = routing.by_token(&d.unsqueeze(1)?)?.to_vec2::<f32>()?;
        let mut d_scores = vec![0f32; d.len() * n_experts];
        for (token, d) in d.iter().enumerate() {
            let weights = &routing.weights_by_token[token * k..][..k];
            let mean: f32 = d.iter().zip(weights).map(|(d, w)| d * w).sum();
            for (choice, (d, w)) in d.iter().zip(weights).enumerate() {
                let expert = routing.experts_by_token[token * k + choice];
                d_scores[token * n_experts + expert] = w * (d - mean);
            }
        }
        let shape = (d.len(), n_experts);
        let d_scores = Tensor::from_vec(d_scores, shape, self.weight.device())?;
        Ok(d_scores.matmul(&self.weight)?)
    }
}

#[cfg(test)]
impl Router {
    /// A router of given weights `[n_experts, hidden]`.
    pub(crate) fn of(weight: Tensor, n_chosen: usize) -> Self {
        Self { weight, n_chosen }
    }
}

/// Which tokens go to which experts.
#[derive(Clone, Debug)]
pub struct Routing {
    n_chosen: usize,
    /// Of each token the experts of its choices.
    experts_by_token: Vec<usize>,
    weights_by_token: Vec<f32>,
    /// For each expert its rows by expert.
    runs: Vec<Range<usize>>,
    /// For each row by expert where it is by token: token · k + choice.
    places: Vec<u32>,
    /// The same, and its token, and back, for the device.
    places_tensor: Tensor,
    tokens: Tensor,
    back: Tensor,
    /// By expert, `[n·k, 1]`.
    weights: Tensor,
}

impl Routing {
    fn new(
        experts: Vec<usize>,
        weights: Vec<f32>,
        n_chosen: usize,
        n_experts: usize,
        device: &Device,
    ) -> Result<Self> {
        let mut places: Vec<u32> = (0..experts.len() as u32).collect();
        places.sort_by_key(|&place| experts[place as usize]);
        let mut runs = vec![0..0; n_experts];
        let mut start = 0;
        for (expert, run) in runs.iter_mut().enumerate() {
            let rest = places[start..].iter();
            let len = rest.take_while(|&&p| experts[p as usize] == expert).count();
            *run = start..start + len;
            start += len;
        }
        let mut back = vec![0u32; places.len()];
        for (row, &place) in places.iter().enumerate() {
            back[place as usize] = row as u32;
        }
        let n = places.len();
        let tokens: Vec<u32> = places.iter().map(|p| p / n_chosen as u32).collect();
        let by_expert: Vec<f32> = places.iter().map(|&p| weights[p as usize]).collect();
        Ok(Self {
            n_chosen,
            experts_by_token: experts,
            weights_by_token: weights,
            runs,
            places_tensor: Tensor::from_vec(places.clone(), n, device)?,
            places,
            tokens: Tensor::from_vec(tokens, n, device)?,
            back: Tensor::from_vec(back, n, device)?,
            weights: Tensor::from_vec(by_expert, (n, 1), device)?,
        })
    }

    /// What outputs are weighted with, by expert, `[n·k, 1]`.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Of an expert its tokens, and for each which of the token's choices it is.
    pub fn of_expert(&self, expert: usize) -> impl Iterator<Item = (usize, usize)> {
        let places = self.places[self.runs[expert].clone()].iter();
        places.map(|&p| (p as usize / self.n_chosen, p as usize % self.n_chosen))
    }

    /// Which of a token's choices an expert is, if it is one.
    pub fn choice(&self, token: usize, expert: usize) -> Option<usize> {
        let k = self.n_chosen;
        let choices = self.experts_by_token[token * k..][..k].iter();
        choices.copied().position(|e| e == expert)
    }

    /// Rows of tokens `x [n, width]` by expert.
    ///
    /// # Errors
    /// A tensor error if `x` has other rows.
    pub fn dispatch(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.index_select(&self.tokens, 0)?)
    }

    /// Rows by token `[n, k·width]` by expert.
    ///
    /// # Errors
    /// A tensor error if `h` has other rows, or columns that are no multiple of k.
    pub fn by_expert(&self, h: &Tensor) -> Result<Tensor> {
        let (n, columns) = h.dims2()?;
        let rows = h.reshape((n * self.n_chosen, columns / self.n_chosen))?;
        Ok(rows.index_select(&self.places_tensor, 0)?)
    }

    /// Rows by expert `[n·k, width]` by token.
    ///
    /// # Errors
    /// A tensor error if `rows` has other rows.
    pub fn by_token(&self, rows: &Tensor) -> Result<Tensor> {
        let (n_rows, width) = rows.dims2()?;
        let shape = (n_rows / self.n_chosen, self.n_chosen * width);
        Ok(rows.index_select(&self.back, 0)?.reshape(shape)?)
    }

    /// Rows by expert `[n·k, width]` summed over the choices of each token, `[n, width]`.
    ///
    /// # Errors
    /// As [`Routing::by_token`].
    pub fn sum(&self, rows: &Tensor) -> Result<Tensor> {
        let (n_rows, width) = rows.dims2()?;
        let shape = (n_rows / self.n_chosen, self.n_chosen, width);
        Ok(self.by_token(rows)?.reshape(shape)?.sum(D::Minus2)?)
    }

    /// Each expert that has rows, with its run of them.
    pub fn runs(&self) -> impl Iterator<Item = (usize, &Range<usize>)> {
        let runs = self.runs.iter().enumerate();
        runs.filter(|(_, run)| !run.is_empty())
    }

    /// What `map` makes of the rows of each expert that has some, put together again.
    ///
    /// # Errors
    /// Those of `map`.
    pub fn each(
        &self,
        rows: &Tensor,
        map: impl Fn(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let of_run = |(expert, run): (usize, &Range<usize>)| {
            map(expert, &rows.narrow(0, run.start, run.len())?)
        };
        let parts = self.runs().map(of_run).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three experts, of which tokens choose two by the first two of three scores.
    fn routing() -> (Router, Routing) {
        let router = Router {
            weight: Tensor::from_vec(vec![1f32, 0.0, 0.0, 1.0, 0.5, 0.5], (3, 2), &Device::Cpu)
                .unwrap(),
            n_chosen: 2,
        };
        let x = Tensor::new(&[[4f32, 0.0], [0.0, 2.0], [-3.0, -1.0]], &Device::Cpu).unwrap();
        let routing = router.route(&x).unwrap();
        (router, routing)
    }

    #[test]
    fn the_best_experts_are_chosen_and_weighted_by_their_scores() {
        let (_, routing) = routing();
        assert_eq!(routing.experts_by_token, [0, 2, 1, 2, 1, 2]);
        // Scores 4 and 2, 2 and 1, −1 and −2.
        let first = |a: f32, b: f32| a.exp() / (a.exp() + b.exp());
        for (i, pair) in [(4.0, 2.0), (2.0, 1.0), (-1.0, -2.0)].iter().enumerate() {
            let expected = first(pair.0, pair.1);
            assert!((routing.weights_by_token[2 * i] - expected).abs() < 1e-6);
            assert!((routing.weights_by_token[2 * i + 1] - 1.0 + expected).abs() < 1e-6);
        }
    }

    #[test]
    fn rows_find_their_way_to_experts_and_back() {
        let (_, routing) = routing();
        let of = |expert| routing.of_expert(expert).collect::<Vec<_>>();
        assert_eq!(of(0), [(0, 0)]);
        assert_eq!(of(1), [(1, 0), (2, 0)]);
        assert_eq!(of(2), [(0, 1), (1, 1), (2, 1)]);
        assert_eq!(
            (routing.choice(1, 2), routing.choice(1, 0)),
            (Some(1), None)
        );
        let h = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap();
        let h = h.reshape((3, 4)).unwrap();
        let there = routing.by_expert(&h).unwrap();
        assert_eq!(there.to_vec2::<f32>().unwrap()[1], [4.0, 5.0]);
        let back = routing.by_token(&there).unwrap();
        assert_eq!(back.to_vec2::<f32>().unwrap(), h.to_vec2::<f32>().unwrap());
        let sum = routing.sum(&there).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(sum, [[2.0, 4.0], [10.0, 12.0], [18.0, 20.0]]);
        let twice = routing
            .each(&there, |e, rows| Ok((rows * e as f64)?))
            .unwrap();
        assert_eq!(twice.to_vec2::<f32>().unwrap()[2], [8.0, 9.0]);
    }
}
