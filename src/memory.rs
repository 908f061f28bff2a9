//! What a run will hold in memory and write to disk, told before it begins.

use crate::model::qwen2_vl::Qwen2Vl;
use crate::pipeline::CHUNK_TOKENS;
use crate::recipe::Recipe;
use crate::report::peak_memory_bytes;
use serde::Serialize;

const F32: u64 = 4;
const F64: u64 = 8;

/// Bytes by what holds them. Everything else is small or never alive at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The process as it stands: code, tokenizer, data files, and what planning itself has held.
    pub process: u64,
    /// The tower and the work on one image per thread, before the first layer.
    pub vision: u64,
    /// Hidden states and stage inputs of all samples.
    pub streams: u64,
    /// The layer at work in f32.
    pub layer: u64,
    /// H and C of the stage that needs most, with the inputs they come from or with their factor.
    pub solver: u64,
}

impl MemoryPlan {
    /// The peak: the vision part is over when the layers begin.
    pub fn total(&self) -> u64 {
        self.process + self.vision.max(self.streams + self.layer + self.solver)
    }
}

/// Plans a run over samples of these many tokens.
pub fn plan_memory(model: &Qwen2Vl, recipe: &Recipe, n_tokens: &[usize]) -> MemoryPlan {
    let decoder = model.decoder();
    let (hidden, inter) = (decoder.hidden_size as u64, decoder.intermediate_size as u64);
    let heads = (decoder.n_heads * decoder.head_dim) as u64;
    let tokens: u64 = n_tokens.iter().map(|n| *n as u64).sum();
    let schemes: Vec<_> = model
        .modules()
        .iter()
        .filter_map(|m| recipe.scheme_of(&m.name))
        .collect();
    let with_full = recipe.needs_full_stream(&schemes);
    let with_cross = schemes.iter().any(|s| recipe.alpha(*s) != 0.0);
    let calibrated = u64::from(recipe.needs_calibration());
    let sizes = model
        .layer_modules(0)
        .into_iter()
        .map(|m| (m.shape[0] * m.shape[1]) as u64);
    // A layer three times in f32 (full, quantized, being replaced); RTN takes module by module.
    let weights = match recipe.needs_calibration() {
        true => 3 * sizes.sum::<u64>(),
        false => 2 * sizes.max().unwrap_or(0),
    };

    // Per token: U's residual and stage input, rotary tables; F's residual, attention input and y.
    let own = hidden + inter.max(heads) + 2 * decoder.head_dim as u64;
    let full = if with_full { 2 * hidden + heads } else { 0 };
    // One chunk of inputs: stacked, scaled, and with C the other stream's and their difference.
    let chunk = tokens.min(CHUNK_TOKENS as u64) * if with_cross { 5 } else { 3 } * F32;
    let statistics = |n: u64| n * n * F32 * if with_cross { 2 } else { 1 };
    let factor = |n: u64| n * n * (F64 * if with_cross { 5 } else { 3 } + 2 * F32);
    // Statistics of a stage are summed up first and factored then.
    let stage = |n: u64, n_weightings: u64| n_weightings * statistics(n) + factor(n).max(chunk * n);
    let n_weightings = if recipe.importance.is_some() { 3 } else { 1 };
    let solver = stage(hidden, n_weightings).max(stage(inter, 1));
    let vision = model.vision();
    let tower = 12 * vision.embed_dim * vision.embed_dim * vision.depth;
    MemoryPlan {
        process: peak_memory_bytes().unwrap_or(32 << 20),
        vision: calibrated * tower as u64 * F32,
        streams: calibrated * tokens * (own + full) * F32,
        layer: weights * F32,
        solver: calibrated * solver,
    }
}

/// Bytes that a run will write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DiskPlan {
    /// Tensors of the output.
    pub tensors: u64,
    /// Finished layers, until the output is whole ([`crate::journal`]).
    pub progress: u64,
}

/// What a run will write.
pub fn plan_disk(model: &Qwen2Vl, recipe: &Recipe) -> DiskPlan {
    let mut plan = DiskPlan {
        tensors: model.checkpoint().total_bytes(),
        progress: 0,
    };
    for module in model.modules() {
        let info = model.checkpoint().info(&format!("{}.weight", module.name));
        if let (Some(info), Some(scheme)) = (info, recipe.scheme_of(&module.name)) {
            let [rows, cols] = module.shape;
            let packed = (rows * cols) as f64 * scheme.bits_per_weight(cols) / 8.0;
            plan.tensors = plan.tensors - info.n_bytes as u64 + packed.ceil() as u64;
            // A scale in f32 and a zero point of a byte in each group.
            let groups = rows * (cols / scheme.group_size().unwrap_or(cols).max(1));
            plan.progress += (rows * cols * scheme.bits() as usize).div_ceil(8) as u64
                + groups as u64 * (F32 + 1);
        }
    }
    plan
}
