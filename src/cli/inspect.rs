//! `vlmq inspect`

use super::quantize::scale_dtype;
use super::{Done, ModelArg, SCHEMA, open_model};
use crate::checkpoint::Quantization;
use crate::model::{DecoderConfig, ModelSource, Module};
use crate::plan::Scheme;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
}

/// What a number format would make of the model.
struct Candidate {
    scheme: Scheme,
    bytes: u64,
    /// Modules that the group size does not divide.
    misfits: Vec<Module>,
}

impl Candidate {
    /// The largest usual group size below this one that all misfits can be cut into.
    fn proposed_group_size(&self) -> Option<usize> {
        let cols = || self.misfits.iter().map(|module| module.shape[1]);
        let below = self.scheme.group_size()?;
        cols().next()?;
        let usual = [128, 64, 32, 16].into_iter().filter(|size| *size < below);
        usual.into_iter().find(|size| cols().all(|n| n % size == 0))
    }

    fn misfits_text(&self) -> String {
        let Some(first) = self.misfits.first() else {
            return String::new();
        };
        let remedy = match self.proposed_group_size() {
            Some(size) => format!("groups of {size} fit"),
            None => "whole rows fit (--group-size=-1)".to_owned(),
        };
        format!(
            "  cannot hold {} modules, first {} with {} columns; {remedy}",
            self.misfits.len(),
            first.name,
            first.shape[1]
        )
    }
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let model = open_model(&args.model.model)?;
    let candidates = candidates(&model)?;
    let text = model_text(&model) + &candidates_text(&candidates);
    Ok(Done::new(summary(&model, &candidates), text))
}

fn n_weights(model: &ModelSource) -> usize {
    let modules = model.modules();
    modules.iter().map(|m| m.shape[0] * m.shape[1]).sum()
}

fn n_quantized(model: &ModelSource) -> usize {
    let checkpoint = model.checkpoint();
    let modules = model.modules();
    modules
        .iter()
        .filter(|m| checkpoint.is_quantized(&m.name))
        .count()
}

fn summary(model: &ModelSource, candidates: &[Candidate]) -> serde_json::Value {
    let modules = model.modules();
    let module = |m: &Module| serde_json::json!({"name": m.name, "shape": m.shape});
    let row = |c: &Candidate| {
        serde_json::json!({
            "scheme": c.scheme,
            "tensor_bytes": c.bytes,
            "misfits": c.misfits.iter().map(|m| &m.name).collect::<Vec<_>>(),
            "proposed_group_size": c.proposed_group_size(),
        })
    };
    serde_json::json!({
        "schema": SCHEMA,
        "command": "inspect",
        "family": model.family(),
        "n_tensors": model.checkpoint().names().count(),
        "tensor_bytes": model.checkpoint().total_bytes(),
        "n_modules": modules.len(),
        "n_module_weights": n_weights(model),
        "n_quantized_modules": n_quantized(model),
        "format": model.checkpoint().quantization().map(Quantization::name),
        "modules": modules.iter().map(module).collect::<Vec<_>>(),
        "schemes": candidates.iter().map(row).collect::<Vec<_>>(),
    })
}

fn model_text(model: &ModelSource) -> String {
    let (d, v) = (model.decoder(), model.vision().size());
    let checkpoint = model.checkpoint();
    let mut text = format!(
        "family      {}\n\
         decoder     {} layers, hidden {}, {}heads {}/{} of {}\n{}\
         vision      {} layers, width {}, heads {}\n\
         tensors     {}, {:.1} MB\n\
         to quantize {} modules, {:.2} M weights\n\
         kept        vision tower, embedding, head\n",
        model.family(),
        d.n_layers,
        d.hidden_size,
        mlp_text(d),
        d.n_heads,
        d.n_kv_heads,
        d.head_dim,
        experts_text(d),
        v.depth,
        v.width,
        v.n_heads,
        checkpoint.names().count(),
        checkpoint.total_bytes() as f64 / 1e6,
        model.modules().len(),
        n_weights(model) as f64 / 1e6
    );
    let n_quantized = n_quantized(model);
    if n_quantized > 0 {
        let format = checkpoint.quantization().map_or("", Quantization::name);
        text += &format!("quantized   {n_quantized} modules already, {format}\n");
    }
    text
}

/// The width of the MLPs, if some are no mixtures.
fn mlp_text(decoder: &DecoderConfig) -> String {
    let is_dense = |layer_idx| decoder.n_experts(layer_idx).is_none();
    match (0..decoder.n_layers).any(is_dense) {
        true => format!("MLP {}, ", decoder.intermediate_size),
        false => String::new(),
    }
}

fn experts_text(decoder: &DecoderConfig) -> String {
    let Some(experts) = &decoder.experts else {
        return String::new();
    };
    format!(
        "experts     {} in each of {} layers, width {}, {} to a token; routers are kept\n",
        experts.n_experts,
        experts.is_mixture.iter().filter(|is| **is).count(),
        experts.width,
        experts.n_chosen
    )
}

fn candidates_text(candidates: &[Candidate]) -> String {
    let mut text = format!("\n{:<24} {:>10}\n", "scheme", "MB");
    for c in candidates {
        let group = c.scheme.group_size();
        let group = group.map_or("channel".into(), |g| format!("g{g}"));
        let kind = match c.scheme.symmetric() {
            true => "symmetric",
            false => "asymmetric",
        };
        let name = format!("{} bits {group} {kind}", c.scheme.bits());
        text += &format!(
            "{name:<24} {:>10.1}{}\n",
            c.bytes as f64 / 1e6,
            c.misfits_text()
        );
    }
    text
}

fn candidates(model: &ModelSource) -> crate::Result<Vec<Candidate>> {
    let mut all = Vec::new();
    for bits in [4, 3, 2] {
        for group_size in [Some(32), Some(64), Some(128), None] {
            let scheme = Scheme::new(bits, group_size, false, scale_dtype(model))?;
            let mut candidate = Candidate {
                scheme,
                bytes: model.checkpoint().total_bytes(),
                misfits: Vec::new(),
            };
            for module in model.modules() {
                let cols = module.shape[1];
                if scheme.group_len(&module.name, cols).is_err() {
                    candidate.misfits.push(module);
                    continue;
                }
                let n_weights = module.shape[0] * cols;
                let packed = n_weights as f64 * scheme.bits_per_weight(cols) / 8.0;
                let packed = packed.ceil() as u64;
                let stored = model.checkpoint().linear_n_bytes(&module.name);
                candidate.bytes = candidate.bytes - stored.unwrap_or(packed) + packed;
            }
            all.push(candidate);
        }
    }
    Ok(all)
}
