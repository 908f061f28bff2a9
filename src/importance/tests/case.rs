//! A layer with its two streams: the golden one, or one of random weights.

use super::naive::{Naive, Rows, norms_of};
use crate::checkpoint::Checkpoint;
use crate::importance::backward::{self, AttentionGradients, AttentionPass, MlpGradients};
use crate::importance::{FullPass, SampleInLayer};
use crate::model::context::TokenContext;
use crate::model::decoder::DecoderLayer;
use crate::model::decoder_config::{DecoderConfig, NormScale};
use crate::model::layer_source::LayerSource;
use crate::model::linear::matrix_from_tensor;
use crate::model::projection::{Slot, slots};
use crate::processor::TokenClass;
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::path::Path;
use tempfile::TempDir;

/// The router's name in a layer's file.
const ROUTER: &str = "layer.mlp.gate.weight";

/// A layer, two streams through it, and where its tokens stand.
pub(super) struct Case {
    pub checkpoint: Checkpoint,
    pub layer: DecoderLayer,
    pub full: Tensor,
    pub quantized: Tensor,
    pub config: DecoderConfig,
    pub images: Vec<u32>,
    context: TokenContext,
    positions: [Vec<u32>; 3],
    _folder: TempDir,
}

impl Case {
    /// The layer of testdata/importance, of these sizes.
    pub fn golden(config: DecoderConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/importance");
        std::fs::copy(
            source.join("layer.safetensors"),
            folder.path().join("model.safetensors"),
        )
        .unwrap();
        let checkpoint = opened(&folder);
        let bytes = checkpoint.bytes("position_ids").unwrap();
        let ids: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let n = ids.len() / 3;
        let positions = std::array::from_fn(|axis| ids[axis * n..(axis + 1) * n].to_vec());
        Self::new(folder, checkpoint, config, positions, vec![0; n])
    }

    /// Random weights and streams of tokens of these images.
    pub fn random(config: DecoderConfig, images: &[u32], seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut random = |shape: &[usize], scale: f64, around: f64| {
            let n: usize = shape.iter().product();
            let values = (0..n).map(|_| around + scale * rng.random_range(-1.7..1.7));
            let values: Vec<f32> = values.map(|v| v as f32).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let mut tensors = HashMap::new();
        for slot in slots(&config, 0) {
            let shape = slot.shape(&config);
            let name = format!("layer.{}.weight", slot.name());
            let scale = 1.0 / (shape[1] as f64).sqrt();
            tensors.insert(name, random(&shape, scale, 0.0));
        }
        if let Some(n_experts) = config.n_experts(0) {
            let router = random(&[n_experts, config.hidden_size], 0.5, 0.0);
            tensors.insert(ROUTER.into(), router);
        }
        let around = match config.norm_scale {
            NormScale::Weight => 1.0,
            NormScale::OnePlusWeight => 0.0,
        };
        for (name, dim) in norms_of(&config) {
            let weight = random(&[dim], 0.3, around);
            tensors.insert(format!("layer.{name}.weight"), weight);
        }
        let shape = [images.len(), config.hidden_size];
        let full = random(&shape, 1.0, 0.0);
        let quantized = (&full + random(&shape, 0.1, 0.0)).unwrap();
        tensors.insert("full".into(), full);
        tensors.insert("quantized".into(), quantized);
        let folder = tempfile::tempdir().unwrap();
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        // Each axis goes its own way, so that none is taken for another.
        let positions = [[1, 1, 0], [0, 2, 1], [1, 3, 5]].map(|[step, turn, shift]| {
            let tokens = 0..images.len() as u32;
            tokens.map(|i| step * i + turn * i % 5 + shift).collect()
        });
        let checkpoint = opened(&folder);
        Self::new(folder, checkpoint, config, positions, images.to_vec())
    }

    fn new(
        folder: TempDir,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        positions: [Vec<u32>; 3],
        images: Vec<u32>,
    ) -> Self {
        let shape = [images.len(), config.hidden_size];
        let stream = |name: &str| {
            let values = checkpoint.load(name, &shape).unwrap();
            Tensor::from_vec(values, &shape, &Device::Cpu).unwrap()
        };
        let source = LayerSource {
            checkpoint: &checkpoint,
            prefix: "layer".into(),
            layer_idx: 0,
            config: &config,
            device: &Device::Cpu.into(),
        };
        Self {
            layer: source.whole().unwrap(),
            context: TokenContext::new(&config, &positions, images.clone(), &Device::Cpu).unwrap(),
            full: stream("full"),
            quantized: stream("quantized"),
            config,
            images,
            positions,
            checkpoint,
            _folder: folder,
        }
    }

    pub fn pass(&self, x: &Tensor) -> AttentionPass<'_> {
        AttentionPass::new(&self.layer, &self.context, x).unwrap()
    }

    /// Where F goes.
    pub fn full_pass(&self) -> FullPass {
        let pass = self.pass(&self.full);
        FullPass {
            n1: pass.n1.clone(),
            a: pass.trace.output.clone(),
            y: pass.y.clone(),
        }
    }

    /// What classes the tokens are given: vision first, then a prompt, then an answer.
    pub fn classes(&self) -> Vec<TokenClass> {
        let n = self.images.len();
        let class = |token: usize| match 3 * token / n {
            0 => TokenClass::Vision,
            1 => TokenClass::Prompt,
            _ => TokenClass::Answer,
        };
        (0..n).map(class).collect()
    }

    pub fn sample<'a>(
        &'a self,
        x: &'a Tensor,
        full: &'a FullPass,
        rounded: Option<&'a DecoderLayer>,
        classes: &'a [TokenClass],
    ) -> SampleInLayer<'a> {
        SampleInLayer {
            layer: &self.layer,
            rounded,
            context: &self.context,
            x,
            full: Some(full),
            classes,
            layer_idx: 0,
            sample_idx: 0,
        }
    }

    fn layer_output(&self, y: &Tensor) -> Tensor {
        let h = self.layer.down_input(&self.layer.gate_up_input(y).unwrap());
        self.layer.after_mlp(y, &h.unwrap()).unwrap()
    }

    pub fn attention_gradients(&self) -> AttentionGradients {
        let (pass, target) = (self.pass(&self.quantized), self.pass(&self.full).y);
        let d_y = ((&pass.y - target).unwrap() * 2.0).unwrap();
        backward::attention(&pass, &d_y).unwrap()
    }

    pub fn layer_gradients(&self) -> (AttentionGradients, MlpGradients) {
        let (pass, target) = (self.pass(&self.quantized), self.pass(&self.full).y);
        let residual = (self.layer_output(&pass.y) - self.layer_output(&target)).unwrap();
        let mlp = backward::mlp(&self.layer, &pass.y, &(residual * 2.0).unwrap()).unwrap();
        let attention = backward::attention(&pass, &mlp.y).unwrap();
        (attention, mlp)
    }

    /// ∂L/∂(input of the layer), of the loss after attention (false) and of the layer's (true).
    pub fn input_gradients(&self) -> [(bool, Rows); 2] {
        let (pass, target) = (self.pass(&self.quantized), self.pass(&self.full));
        let d_y = ((&pass.y - &target.y).unwrap() * 2.0).unwrap();
        let attention = backward::attention(&pass, &d_y).unwrap();
        let local = backward::input(&pass, &attention, &d_y).unwrap();
        let out = |pass: &AttentionPass| pass.layer_output().unwrap();
        let d_out = ((out(&pass) - out(&target)).unwrap() * 2.0).unwrap();
        let whole = backward::layer(&pass, &d_out).unwrap().x;
        [(false, rows(&local)), (true, rows(&whole))]
    }

    /// The same layer in f64, read from the file by itself.
    pub fn naive(&self) -> Naive {
        let load = |name: String, shape: &[usize]| -> Vec<f64> {
            let values = self.checkpoint.load(&name, shape).unwrap();
            values.into_iter().map(f64::from).collect()
        };
        let matrix = |name: String, [out, inp]: [usize; 2]| -> Rows {
            let values = load(name, &[out, inp]);
            values.chunks_exact(inp).map(<[f64]>::to_vec).collect()
        };
        let all = slots(&self.config, 0);
        let weight = |&slot: &Slot| {
            let name = format!("layer.{}.weight", slot.name());
            (slot, matrix(name, slot.shape(&self.config)))
        };
        let bias = |&slot: &Slot| {
            let name = format!("layer.{}.bias", slot.name());
            let [out, _] = slot.shape(&self.config);
            (self.checkpoint.contains(&name)).then(|| (slot, load(name, &[out])))
        };
        let router = (self.config.n_experts(0))
            .map(|n_experts| matrix(ROUTER.into(), [n_experts, self.config.hidden_size]));
        let more = match self.config.norm_scale {
            NormScale::Weight => 0.0,
            NormScale::OnePlusWeight => 1.0,
        };
        let norms = norms_of(&self.config).into_iter().map(|(name, dim)| {
            let weight = load(format!("layer.{name}.weight"), &[dim]);
            (name, weight.iter().map(|w| w + more).collect())
        });
        Naive {
            weights: all.iter().map(weight).collect(),
            biases: all.iter().filter_map(bias).collect(),
            router,
            norms: norms.collect(),
            positions: self.positions.clone(),
            images: self.images.clone(),
            config: self.config.clone(),
        }
    }
}

fn opened(folder: &TempDir) -> Checkpoint {
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    Checkpoint::open(folder.path()).unwrap()
}

pub(super) fn rows(x: &Tensor) -> Rows {
    let m = matrix_from_tensor(x).unwrap();
    (0..m.rows())
        .map(|r| m.row(r).iter().map(|&v| f64::from(v)).collect())
        .collect()
}
