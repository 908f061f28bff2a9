//! The quantized model with scales that move.

use crate::importance::backward::{AttentionPass, LayerGradients};
use crate::importance::sides::Sides;
use crate::importance::walk::Layers;
use crate::model::decoder::DecoderLayer;
use crate::model::projection::slots;
use crate::model::{ModelSource, Module};
use crate::{Matrix, QuantizedWeight, Result};
use candle_core::Tensor;

/// Adam's (arXiv:1412.6980).
const DECAYS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-12;

/// Farthest that a scale goes from where it was: e^±1.
const MOST: f32 = 1.0;

/// A quantized linear and the state of its scales, each `[rows · n_groups]`.
struct Part {
    module: Module,
    weight: QuantizedWeight,
    /// Scales before tuning.
    start: Vec<f32>,
    /// θ in scale = start·exp(θ).
    theta: Vec<f32>,
    /// Adam's means of gradients and of their squares.
    mean: Vec<f32>,
    square: Vec<f32>,
}

/// The model whose quantized linears have scales that move; its other weights are the source's.
pub(super) struct Student<'a> {
    model: &'a ModelSource,
    parts: Vec<Part>,
    /// Parts of each layer.
    layers: Vec<Vec<usize>>,
    n_steps: i32,
}

impl<'a> Student<'a> {
    pub(super) fn new(model: &'a ModelSource, weights: Vec<(Module, QuantizedWeight)>) -> Self {
        let mut layers = vec![Vec::new(); model.decoder().n_layers];
        for (index, (module, _)) in weights.iter().enumerate() {
            if let Some(own) = layers.get_mut(module.layer_idx) {
                own.push(index);
            }
        }
        let parts = weights.into_iter().map(|(module, weight)| {
            let start = weight.scales().data().to_vec();
            let zeros = || vec![0.0; start.len()];
            Part {
                theta: zeros(),
                mean: zeros(),
                square: zeros(),
                module,
                weight,
                start,
            }
        });
        Self {
            model,
            parts: parts.collect(),
            layers,
            n_steps: 0,
        }
    }

    pub(super) fn into_weights(self) -> Vec<(Module, QuantizedWeight)> {
        let parts = self.parts.into_iter();
        parts.map(|part| (part.module, part.weight)).collect()
    }

    /// θ of all parts.
    pub(super) fn thetas(&self) -> Vec<Vec<f32>> {
        self.parts.iter().map(|part| part.theta.clone()).collect()
    }

    /// Goes back to θ of earlier.
    pub(super) fn restore(&mut self, thetas: &[Vec<f32>]) -> Result<()> {
        for (part, theta) in self.parts.iter_mut().zip(thetas) {
            part.theta.clone_from(theta);
            part.set_scales()?;
        }
        Ok(())
    }

    /// A zero for each scale of each part.
    pub(super) fn zeros(&self) -> Vec<Vec<f32>> {
        let parts = self.parts.iter();
        parts.map(|part| vec![0.0; part.start.len()]).collect()
    }

    /// Adds the gradients of one sample in one layer to the sums of all parts.
    pub(super) fn add(&self, layer_idx: usize, own: &[Vec<f32>], sums: &mut [Vec<f32>]) {
        for (&index, own) in self.layers[layer_idx].iter().zip(own) {
            let pairs = sums[index].iter_mut().zip(own);
            pairs.for_each(|(sum, value)| *sum += value);
        }
    }

    /// ∂L/∂scale of each part of a layer from one sample.
    pub(super) fn scale_gradients(
        &self,
        layer_idx: usize,
        pass: &AttentionPass,
        gradients: &LayerGradients,
    ) -> Result<Vec<Vec<f32>>> {
        let sides = Sides::new(pass, gradients)?;
        let of_part = |&index: &usize| {
            let part = &self.parts[index];
            match sides.of(part.module.slot)? {
                Some((p, u)) => part.scale_gradients(&p, &u),
                None => Ok(vec![0.0; part.start.len()]),
            }
        };
        self.layers[layer_idx].iter().map(of_part).collect()
    }

    /// One step of Adam along `gradients` with respect to the scales, each of the relative size
    /// `rate`.
    pub(super) fn step(&mut self, gradients: &[Vec<f32>], rate: f64) -> Result<()> {
        self.n_steps += 1;
        let corrections = DECAYS.map(|decay| 1.0 - decay.powi(self.n_steps));
        for (part, gradients) in self.parts.iter_mut().zip(gradients) {
            part.step(gradients, corrections, rate);
            part.set_scales()?;
        }
        Ok(())
    }
}

impl Layers for Student<'_> {
    fn n_layers(&self) -> usize {
        self.model.decoder().n_layers
    }

    fn layer(&self, layer_idx: usize) -> Result<DecoderLayer> {
        let source = self.model.layer_source(layer_idx);
        let mut layer = source.norms()?;
        for &index in &self.layers[layer_idx] {
            let part = &self.parts[index];
            let linear = source.linear(part.module.slot, part.weight.dequantize())?;
            layer.replace(part.module.slot, linear);
        }
        source.complete(&mut layer, &slots(self.model.decoder(), layer_idx))?;
        Ok(layer)
    }
}

impl Part {
    /// Σ over a group's columns of dW·(code − zero_point), dW = Pᵀ·u, for `p [n, out]` and
    /// `u [n, in]`.
    fn scale_gradients(&self, p: &Tensor, u: &Tensor) -> Result<Vec<f32>> {
        let dw: Vec<f32> = p.t()?.matmul(u)?.flatten_all()?.to_vec1()?;
        let group_len = self.weight.cols() / self.weight.n_groups().max(1);
        let groups = dw.chunks(group_len.max(1));
        let groups = groups.zip(self.weight.codes().chunks(group_len.max(1)));
        let sums = groups.zip(self.weight.zero_points());
        let sum = |((dw, codes), zero): ((&[f32], &[u8]), &u8)| {
            let zero = f32::from(*zero);
            let terms = dw.iter().zip(codes);
            terms.map(|(d, code)| d * (f32::from(*code) - zero)).sum()
        };
        Ok(sums.map(sum).collect())
    }

    fn step(&mut self, gradients: &[f32], corrections: [f64; 2], rate: f64) {
        let scales = self.weight.scales().data();
        for (i, (gradient, scale)) in gradients.iter().zip(scales).enumerate() {
            // ∂L/∂θ = ∂L/∂s · s.
            let g = f64::from(gradient * scale);
            if !g.is_finite() {
                continue;
            }
            let mean = DECAYS[0] * f64::from(self.mean[i]) + (1.0 - DECAYS[0]) * g;
            let square = DECAYS[1] * f64::from(self.square[i]) + (1.0 - DECAYS[1]) * g * g;
            (self.mean[i], self.square[i]) = (mean as f32, square as f32);
            let size = (square / corrections[1]).sqrt() + EPSILON;
            let theta = self.theta[i] - (rate * mean / corrections[0] / size) as f32;
            self.theta[i] = theta.clamp(-MOST, MOST);
        }
    }

    /// Brings the weight's scales to start·exp(θ), rounded as they are stored; one that rounding
    /// would make zero or infinite stays where it started.
    fn set_scales(&mut self) -> Result<()> {
        let dtype = self.weight.scheme().scale_dtype();
        let moved = self.start.iter().zip(&self.theta).map(|(start, theta)| {
            let scale = dtype.round(start * theta.exp());
            match scale > 0.0 && scale.is_finite() {
                true => scale,
                false => *start,
            }
        });
        let (rows, cols) = (self.weight.rows(), self.weight.n_groups());
        let scales = Matrix::from_vec(&self.module.name, rows, cols, moved.collect())?;
        self.weight.set_scales(&self.module.name, scales)
    }
}
