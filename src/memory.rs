//! What a run will hold in memory and write to disk, told before it begins.

use crate::model::attention::block_len;
use crate::model::vision::VisionSize;
use crate::model::{DecoderConfig, ModelSource, Projection, Slot};
use crate::pipeline::GROUPS_AT_ONCE;
use crate::recipe::Recipe;
use crate::report::peak_memory_bytes;
use crate::shards::BATCH_TOKENS;
use crate::solver::Target;
use crate::statistics::is_output_cheaper;
use serde::Serialize;

const F32: u64 = 4;

/// Bytes by what holds them. Everything else is small or never alive at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The process as it stands: code, tokenizer, data files, and what planning itself has held.
    pub process: u64,
    /// What the allocator keeps for later, threads included: measured, 16 MB and a sixth of the
    /// hidden states in memory.
    pub allocator: u64,
    /// The vision tower at work, before the first layer.
    pub vision: u64,
    /// Hidden states of all samples, as far as they are not on disk.
    pub streams: u64,
    /// Hidden states on disk.
    pub streams_on_disk: u64,
    /// The linears of attention, and what attention makes of the longest sample in each thread.
    pub attention: u64,
    /// The statistics of q, k and v, or of gate and up, with the weights being solved.
    pub narrow: u64,
    /// gate and up, both as they were and quantized, and the activations of a batch in each thread.
    pub mlp: u64,
    /// H and C of down, with a batch of its inputs or its weight.
    pub wide: u64,
    /// Moments on their way between ranks, where there are several.
    pub exchange: u64,
}

impl MemoryPlan {
    /// The peak: the vision part is over when the layers begin, and the others take turns.
    pub fn total(&self) -> u64 {
        self.streams + self.allocator + self.without_streams()
    }

    /// The peak of all but the hidden states.
    pub fn without_streams(&self) -> u64 {
        let steps = [self.attention, self.narrow, self.mlp, self.wide];
        self.process + self.exchange + steps.into_iter().fold(self.vision, u64::max)
    }

    /// Bytes that hidden states may take in memory if all is to stay below `memory_bytes`.
    pub fn room(&self, memory_bytes: u64) -> u64 {
        let room = memory_bytes.saturating_sub(self.without_streams() + allowance(0));
        room / 7 * 6
    }

    /// The plan for staying below `memory_bytes`, as far as it can be: hidden states give way.
    #[must_use]
    pub fn within(mut self, memory_bytes: u64) -> Self {
        let all = self.streams + self.streams_on_disk;
        self.streams = all.min(self.room(memory_bytes));
        self.streams_on_disk = all - self.streams;
        self.allocator = allowance(self.streams);
        self
    }
}

/// Plans a run over samples of these many tokens, all in memory; inputs of `down_proj` are among the
/// hidden states if they are kept, else made again.
pub fn plan_memory(
    model: &ModelSource,
    recipe: &Recipe,
    n_tokens: &[usize],
    keeps_down_inputs: bool,
) -> MemoryPlan {
    plan_memory_among(1, model, recipe, n_tokens, keeps_down_inputs)
}

/// As [`plan_memory`], for one of `n_ranks` with samples of these many tokens of its own.
pub fn plan_memory_among(
    n_ranks: usize,
    model: &ModelSource,
    recipe: &Recipe,
    n_tokens: &[usize],
    keeps_down_inputs: bool,
) -> MemoryPlan {
    let process = peak_memory_bytes().unwrap_or(32 << 20);
    let config = model.decoder();
    if !recipe.needs_calibration() {
        // One module at a time: its weight, its codes, and what packing makes of them.
        let sizes = model.modules().into_iter().map(|m| m.shape);
        let widest = sizes.map(|[out, inp]| (out * inp) as u64 * F32).max();
        return MemoryPlan {
            process,
            allocator: allowance(0),
            vision: 0,
            streams: 0,
            streams_on_disk: 0,
            attention: 0,
            narrow: 0,
            mlp: 2 * widest.unwrap_or(0),
            wide: 0,
            exchange: 0,
        };
    }
    let schemes: Vec<_> = model
        .modules()
        .iter()
        .filter_map(|m| recipe.scheme_of(&m.name))
        .collect();
    let step = Step {
        config,
        keeps_down_inputs,
        with_full: recipe.needs_full_stream(&schemes),
        with_cross: schemes.iter().any(|s| recipe.alpha(*s) != 0.0),
        with_target: recipe.solver.target != Target::Pull,
        with_stream: recipe.solver.target == Target::ResidualStream,
        with_part: recipe.solver.held_out_alpha,
        with_importance: recipe.importance.is_some(),
        with_mlp_loss: recipe.importance.is_some_and(|i| i.needs_mlp()),
        with_rounded: recipe.importance.is_some_and(|i| i.needs_rounded()),
        longest: n_tokens.iter().copied().max().unwrap_or(0) as u64,
        batch: n_tokens.iter().sum::<usize>().min(BATCH_TOKENS) as u64,
        n_deepstack: model.vision().n_deepstack(),
        with_scales: recipe.method.is_scaled(),
        n_threads: rayon::current_num_threads().min(n_tokens.len().max(1)) as u64,
    };
    let streams = n_tokens.iter().sum::<usize>() as u64 * step.stream_width() * F32;
    MemoryPlan {
        process,
        allocator: allowance(streams),
        vision: plan_vision(model.vision().size(), &step),
        streams,
        streams_on_disk: 0,
        attention: step.attention(),
        narrow: step.narrow(),
        mlp: step.mlp(),
        wide: step.wide(),
        exchange: if n_ranks > 1 { step.exchange() } else { 0 },
    }
}

/// The tower, and in each thread a sample whose tokens are all of one picture.
fn plan_vision(tower: VisionSize, step: &Step) -> u64 {
    let dim = tower.width as u64;
    let weights = (4 * dim * dim + 2 * dim * tower.mlp_dim as u64) * tower.depth as u64;
    let patches = step.longest * tower.patches_per_token as u64;
    let seen = (tower.patches_per_tile).map_or(patches, |tile| patches.min(tile as u64));
    let n_queries = block_len(tower.n_heads, seen as usize) as u64;
    let map = tower.n_heads as u64 * seen * seen.min(n_queries);
    // The stream; in attention q, k and v before and after rotation, in the MLP two activations.
    let rows = patches * (dim + (6 * dim).max(2 * tower.mlp_dim as u64));
    (weights + step.n_threads * (3 * map + rows)) * F32
}

fn allowance(streams: u64) -> u64 {
    (16 << 20) + streams / 6
}

/// What the steps of a layer hold, beside the hidden states.
struct Step<'a> {
    config: &'a DecoderConfig,
    keeps_down_inputs: bool,
    with_full: bool,
    with_cross: bool,
    /// Whether a target is made, for which drift may be summed up at the output.
    with_target: bool,
    /// Whether cross moments of the residual stream are kept too.
    with_stream: bool,
    /// Whether the statistics of a part of the samples are kept apart.
    with_part: bool,
    with_importance: bool,
    with_mlp_loss: bool,
    /// A layer twice, once rounded.
    with_rounded: bool,
    /// Tokens of the longest sample.
    longest: u64,
    /// Tokens of a batch.
    batch: u64,
    n_threads: u64,
    /// Layers after which the tower adds something.
    n_deepstack: usize,
    /// Whether scales are searched for, without statistics.
    with_scales: bool,
}

impl Step<'_> {
    fn weights(&self, projections: &[Projection], expert: Option<usize>) -> u64 {
        let slots = projections
            .iter()
            .map(|&projection| Slot { projection, expert });
        let sizes = slots.map(|slot| slot.shape(self.config));
        sizes.map(|[out, inp]| (out * inp) as u64 * F32).sum()
    }

    fn of_attention(&self) -> u64 {
        self.weights(&Projection::ATTENTION, None)
    }

    /// The most that any kind of MLP of this decoder needs.
    fn worst(&self, needs: impl Fn(&Mlp) -> u64) -> u64 {
        let n_layers = self.config.n_layers;
        let kinds = (0..n_layers).map(|layer_idx| match self.config.n_experts(layer_idx) {
            Some(n_experts) => Mlp {
                n_experts: n_experts as u64,
                expert: Some(0),
                width: self.config.mlp_width(true),
            },
            None => Mlp {
                n_experts: 1,
                expert: None,
                width: self.config.mlp_width(false),
            },
        });
        kinds.map(|kind| needs(&kind)).max().unwrap_or(0)
    }

    /// Values per token: U's residual and input, rotary tables, what the tower adds on the way; F's
    /// residual, y and input.
    fn stream_width(&self) -> u64 {
        let hidden = self.config.hidden_size;
        let heads = self.config.n_heads * self.config.head_dim;
        let widest = match self.keeps_down_inputs {
            true => hidden.max(heads).max(self.config.widest_mlp()),
            false => hidden.max(heads),
        };
        let n_tables = 2 + 2 * usize::from(self.config.local.is_some());
        let own = hidden + widest + n_tables * self.config.head_dim + self.n_deepstack * hidden;
        let full = if self.with_full {
            2 * hidden + widest
        } else {
            0
        };
        (own + full) as u64
    }

    fn attention(&self) -> u64 {
        let linears = match self.with_mlp_loss {
            true => self.of_attention() + self.worst(|mlp| self.of_mlp(mlp, &Projection::ALL[4..])),
            // The linears being tried, beside those that are.
            false if self.with_scales => 2 * self.of_attention(),
            false => self.of_attention(),
        };
        let linears = if self.with_rounded { 2 } else { 1 } * linears;
        // Scores, masked scores and probabilities; on the way back also their gradients.
        let maps = if self.with_importance { 4 } else { 3 };
        let maps = maps + u64::from(self.config.score_cap.is_some());
        let n_queries = block_len(self.config.n_heads, self.longest as usize) as u64;
        let n_scores = self.config.n_heads as u64 * self.longest * self.longest.min(n_queries);
        let map = n_scores * F32;
        let rows = 8 * self.longest * self.config.hidden_size as u64 * F32;
        linears + self.n_threads * (maps * map + rows)
    }

    fn moments(&self, in_features: usize) -> u64 {
        let n = in_features as u64;
        let squares = if self.with_cross { 2 } else { 1 };
        n * n * F32 * squares * self.n_copies()
    }

    /// How often statistics are held.
    fn n_copies(&self) -> u64 {
        if self.with_cross && self.with_part {
            2
        } else {
            1
        }
    }

    /// The same of a linear that shares them with no other, whose drift may be summed up at its output,
    /// with its weight then.
    fn own_moments(&self, [out, inp]: [usize; 2], with_stream: bool) -> u64 {
        let output = (out * inp) as u64 * F32;
        let at_output = self.with_target && is_output_cheaper([out, inp], with_stream);
        match self.with_cross {
            true if at_output => {
                let square = (inp * inp) as u64 * F32;
                (square + output) * self.n_copies() + output
            }
            true if with_stream => self.moments(inp) + output * self.n_copies(),
            _ => self.moments(inp),
        }
    }

    /// A batch of inputs: as it is, weighted, and with C the other stream's and their difference.
    fn inputs(&self, in_features: usize) -> u64 {
        self.batch * in_features as u64 * F32 * if self.with_cross { 5 } else { 3 }
    }

    fn narrow(&self) -> u64 {
        if self.with_scales {
            return 0;
        }
        let hidden = self.config.hidden_size;
        let qkv = &Projection::ATTENTION[..3];
        let first = match self.with_importance {
            true => {
                let shapes = qkv.iter().map(|p| Slot::from(*p).shape(self.config));
                let each = shapes.map(|shape| self.own_moments(shape, false));
                each.sum::<u64>().max(self.moments(hidden))
            }
            false => self.moments(hidden),
        };
        let first = first + self.inputs(hidden).max(2 * self.weights(qkv, None));
        let second = self.worst(|mlp| {
            // The first is quantized while the second is solved: weight and codes.
            let [gate, up] = [Projection::Gate, Projection::Up];
            let one = self.weights(&[gate, up, up], mlp.expert);
            let solved = self.of_mlp(mlp, &[gate, up]) - self.weights(&[gate, up], mlp.expert);
            mlp.n_groups() * self.moments(hidden) + solved + self.inputs(hidden).max(one)
        });
        first.max(second)
    }

    /// What a group's moments are sent as, and what comes in their place.
    fn exchange(&self) -> u64 {
        if self.with_scales {
            return 0;
        }
        let hidden = self.config.hidden_size;
        let widest = self.worst(|mlp| match mlp.expert {
            Some(_) => self.moments(mlp.width),
            None => self.own_moments([hidden, mlp.width], self.with_stream),
        });
        2 * widest.max(self.moments(hidden))
    }

    fn of_mlp(&self, mlp: &Mlp, projections: &[Projection]) -> u64 {
        mlp.n_experts * self.weights(projections, mlp.expert)
    }

    fn mlp(&self) -> u64 {
        if self.with_scales {
            let linears = self.worst(|mlp| self.of_mlp(mlp, &[Projection::Gate, Projection::Up]));
            // All three as they were; gate and up as they are tried, one of them on its way.
            let down = self.worst(|mlp| self.of_mlp(mlp, &[Projection::Down]));
            let rows = 6 * self.batch * self.config.widest_mlp() as u64 * F32;
            return 3 * linears + down + self.n_threads * rows;
        }
        self.making_down_inputs(self.n_threads)
    }

    /// gate and up of both streams, and what they make of so many batches.
    fn making_down_inputs(&self, n_batches: u64) -> u64 {
        let linears = self.worst(|mlp| self.of_mlp(mlp, &[Projection::Gate, Projection::Up]));
        let copies = if self.with_full { 2 } else { 1 };
        let activations = 4 * self.batch * self.config.widest_mlp() as u64 * F32;
        copies * linears + n_batches * activations
    }

    fn wide(&self) -> u64 {
        if self.with_scales {
            return 0;
        }
        let wide = self.worst(|mlp| {
            let down = self.weights(&[Projection::Down], mlp.expert);
            let solved = self.of_mlp(mlp, &[Projection::Down]) - down;
            // Weight and codes; then the same as f32 again.
            let inputs = self.inputs(self.config.widest_mlp()).max(down + down / 2);
            let moments = match mlp.expert {
                Some(_) => self.moments(mlp.width),
                None => self.own_moments([self.config.hidden_size, mlp.width], self.with_stream),
            };
            mlp.n_groups() * moments + solved + inputs
        });
        match self.keeps_down_inputs {
            true => wide,
            // With a batch of both streams' inputs, and what they are made with.
            false => wide + self.making_down_inputs(1),
        }
    }
}

/// A kind of MLP: one for all tokens, or a mixture.
struct Mlp {
    n_experts: u64,
    /// One of its experts, all of which have the same shapes.
    expert: Option<usize>,
    width: usize,
}

impl Mlp {
    /// Statistics in memory at once.
    fn n_groups(&self) -> u64 {
        self.n_experts.min(GROUPS_AT_ONCE as u64)
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
pub fn plan_disk(model: &ModelSource, recipe: &Recipe) -> DiskPlan {
    let mut plan = DiskPlan {
        tensors: model.checkpoint().total_bytes(),
        progress: 0,
    };
    for module in model.modules() {
        let stored = model.checkpoint().linear_n_bytes(&module.name);
        if let (Some(stored), Some(scheme)) = (stored, recipe.scheme_of(&module.name)) {
            let [rows, cols] = module.shape;
            // A mean that is yet to be shared out: no module's own bits are known.
            let bits = match recipe.shares_bits(&module.name) {
                true => recipe.bits().value(),
                false => scheme.bits().into(),
            };
            let beside = scheme.bits_per_weight(cols) - f64::from(scheme.bits());
            let packed = (rows * cols) as f64 * (bits + beside) / 8.0;
            plan.tensors = plan.tensors - stored + packed.ceil() as u64;
            // A scale in f32 and a zero point of a byte in each group.
            let groups = rows * (cols / scheme.group_size().unwrap_or(cols).max(1));
            plan.progress +=
                ((rows * cols) as f64 * bits / 8.0).ceil() as u64 + groups as u64 * (F32 + 1);
        }
    }
    plan
}
