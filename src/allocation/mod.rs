//! Bits shared out among modules: `--bits 2.5` gives some of them 2, some 3 and some 4 bits, so
//! that codes have 2.5 bits on average at most and the answers change as little as possible.
//!
//! ```text
//!  samples ─► sensitivity: loss of each group at 2, 3, 4 bits ─► knapsack ─► recipe with widths
//! ```
//! Linears that engines run as one (q, k and v; gate and up; all experts of a layer) are a group and
//! have the same bits. The losses are estimates that add up ([`AllocationBy`]): one way through the
//! full-precision model and back, before the first layer. What is counted are the bits of codes;
//! scales and zero points come on top, as they do with any whole number of bits.
//!
//! The result is a function of weights, samples and settings alone, the same for any number of
//! threads: a run that goes on with the layers of another finds the same widths again.
//!
//! Source: sensitivity by the Fisher information of outputs as in arXiv:2505.07004; the knapsack
//! over widths is that of HAWQ-V3 (arXiv:2011.10680), there with integer programming.

mod knapsack;
mod sensitivity;

use crate::calibration::CalibrationSet;
use crate::distributed::Communicator;
use crate::model::{ModelSource, Module, Projection, Slot};
use crate::pipeline::Observer;
use crate::plan::{Bits, Scheme};
use crate::recipe::Recipe;
use crate::{Error, Result};
use knapsack::Item;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Instant;

/// What says how much a group suffers from few bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllocationBy {
    /// The answers: ½ Σ (P ∘ ΔW u)² per answer token, in nats, over the tokens and channels of its
    /// linears, ΔW u being what rounding to nearest changes of an output and P the gradient of the
    /// answers' cross-entropy. The second order of KL, without cross terms.
    Answer,
    /// Its own outputs: Σ ‖ΔW u‖² / Σ ‖W u‖², the mean over its linears. What layers tell without a
    /// way back; a control.
    Output,
    /// The place: as if the first and the last layer mattered a thousand times as much. A control.
    Ends,
    /// Chance: drawn by [`AllocationSettings::seed`]. A control.
    Random,
}

/// How bits are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocationSettings {
    /// What decides.
    pub by: AllocationBy,
    /// Samples that sensitivity is measured on, the first ones of the run's.
    pub samples: usize,
    /// Of [`AllocationBy::Random`].
    pub seed: u64,
}

impl Default for AllocationSettings {
    fn default() -> Self {
        Self {
            by: AllocationBy::Answer,
            samples: 32,
            seed: 0,
        }
    }
}

/// What was shared out, and to whom.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocationReport {
    /// Mean bits that were asked for.
    pub mean_bits: f64,
    /// Mean bits of the codes of all quantized weights.
    pub code_bits_per_weight: f64,
    /// The same with scales and zero points.
    pub stored_bits_per_weight: f64,
    /// Bytes of codes, scales and zero points.
    pub stored_bytes: u64,
    /// How.
    pub settings: AllocationSettings,
    /// Σ of the groups' losses at their widths.
    pub loss: f64,
    /// In order of layers.
    pub groups: Vec<GroupReport>,
    /// Wall time.
    pub seconds: f64,
}

/// Linears with the same bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// Layer.
    pub layer_idx: usize,
    /// Their checkpoint names.
    pub modules: Vec<String>,
    /// Weights of all of them.
    pub n_weights: u64,
    /// Their width.
    pub bits: u8,
    /// Estimated loss at each of [`Bits::SHARED`].
    pub losses: [f64; Bits::SHARED.len()],
}

/// A recipe whose modules all have their widths, and how they came to them.
#[derive(Clone, Debug)]
pub struct Allocated<'a> {
    /// The recipe.
    pub recipe: Cow<'a, Recipe>,
    /// What was done; absent if there was no mean to share out.
    pub report: Option<AllocationReport>,
}

/// Linears with the same bits, before they have them.
struct Group {
    layer_idx: usize,
    modules: Vec<Module>,
}

impl Group {
    fn n_weights(&self) -> u64 {
        self.modules.iter().map(n_weights).sum()
    }
}

fn n_weights(module: &Module) -> u64 {
    (module.shape[0] * module.shape[1]) as u64
}

/// Shares out the recipe's mean bits; a recipe without one is given back as it is.
///
/// # Errors
/// [`Error::Invalid`] if rules leave too little for the other modules, or no sample has an answer;
/// [`Error::NotFinite`] if a loss is no number; [`Error::Interrupted`]; the model's.
pub fn allocate<'a>(
    model: &ModelSource,
    recipe: &'a Recipe,
    set: &CalibrationSet,
    among: (&dyn Communicator, &dyn Observer),
) -> Result<Allocated<'a>> {
    let Bits::Mean(mean) = recipe.bits() else {
        return Ok(Allocated {
            recipe: Cow::Borrowed(recipe),
            report: None,
        });
    };
    let began = Instant::now();
    let groups = groups(model, recipe);
    let budget = budget(model, recipe, mean)?;
    let losses = sensitivity::losses(model, recipe, set, &groups, among)?;
    let items = groups.iter().zip(&losses);
    let items = items.map(|(group, losses)| Item {
        n_weights: group.n_weights(),
        losses: *losses,
    });
    let items: Vec<Item> = items.collect();
    let widths = knapsack::solve(&items, budget).ok_or_else(|| too_little(mean))?;
    let reports = groups.iter().zip(&items).zip(widths);
    let reports = reports.map(|((group, item), width)| GroupReport {
        layer_idx: group.layer_idx,
        modules: group.modules.iter().map(|m| m.name.clone()).collect(),
        n_weights: item.n_weights,
        bits: Bits::SHARED[width],
        losses: item.losses,
    });
    let groups: Vec<GroupReport> = reports.collect();
    let recipe = recipe.with_widths(
        groups
            .iter()
            .flat_map(|group| group.modules.iter().map(|name| (name.as_str(), group.bits))),
    )?;
    let mut report = report(model, &recipe, mean, groups);
    report.seconds = began.elapsed().as_secs_f64();
    Ok(Allocated {
        recipe: Cow::Owned(recipe),
        report: Some(report),
    })
}

/// Modules that a mean is shared out to, by what engines run as one.
fn groups(model: &ModelSource, recipe: &Recipe) -> Vec<Group> {
    let mut groups: BTreeMap<(usize, usize), Vec<Module>> = BTreeMap::new();
    for module in model.modules() {
        if recipe.shares_bits(&module.name) {
            groups
                .entry((module.layer_idx, place(module.slot)))
                .or_default()
                .push(module);
        }
    }
    let groups = groups.into_iter();
    groups
        .map(|((layer_idx, _), modules)| Group { layer_idx, modules })
        .collect()
}

/// Number of the group within its layer.
fn place(slot: Slot) -> usize {
    match (slot.expert, slot.projection) {
        (None, Projection::Q | Projection::K | Projection::V) => 0,
        (None, Projection::O) => 1,
        (None, Projection::Gate | Projection::Up) => 2,
        (None, Projection::Down) => 3,
        // Engines hold all experts of a layer in one tensor.
        (Some(_), _) => 4,
    }
}

/// Code bits for all modules that share, once those with bits of their own have them.
fn budget(model: &ModelSource, recipe: &Recipe, mean: f64) -> Result<u64> {
    let (mut n_all, mut n_spent) = (0, 0);
    for module in model.modules() {
        let Some(scheme) = recipe.scheme_of(&module.name) else {
            continue;
        };
        n_all += n_weights(&module);
        if !recipe.shares_bits(&module.name) {
            n_spent += n_weights(&module) * u64::from(scheme.bits());
        }
    }
    let budget = (mean * n_all as f64) as u64;
    budget.checked_sub(n_spent).ok_or_else(|| too_little(mean))
}

fn too_little(mean: f64) -> Error {
    Error::Invalid {
        what: format!("--bits {mean}"),
        why: format!(
            "the recipe's rules give so many bits to some modules that the others would have less \
             than {}",
            Bits::SHARED[0]
        ),
    }
}

fn report(
    model: &ModelSource,
    recipe: &Recipe,
    mean_bits: f64,
    groups: Vec<GroupReport>,
) -> AllocationReport {
    let (mut n_all, mut code_bits, mut stored_bits) = (0, 0, 0.0);
    for module in model.modules() {
        if let Some(scheme) = recipe.scheme_of(&module.name) {
            let n = n_weights(&module);
            n_all += n;
            code_bits += n * u64::from(scheme.bits());
            stored_bits += n as f64 * scheme.bits_per_weight(module.shape[1]);
        }
    }
    let per_weight = |bits: f64| bits / n_all.max(1) as f64;
    AllocationReport {
        mean_bits,
        code_bits_per_weight: per_weight(code_bits as f64),
        stored_bits_per_weight: per_weight(stored_bits),
        stored_bytes: (stored_bits / 8.0).ceil() as u64,
        settings: recipe.allocation,
        loss: groups.iter().map(loss_of).sum(),
        groups,
        seconds: 0.0,
    }
}

fn loss_of(group: &GroupReport) -> f64 {
    let pairs = Bits::SHARED.iter().zip(group.losses);
    let own = pairs.filter(|(bits, _)| **bits == group.bits);
    own.map(|(_, loss)| loss).sum()
}

/// The number format that a module would have with each of [`Bits::SHARED`].
fn schemes(recipe: &Recipe, module: &Module) -> Result<Vec<Scheme>> {
    let Some(scheme) = recipe.scheme_of(&module.name) else {
        return Ok(Vec::new());
    };
    Bits::SHARED
        .into_iter()
        .map(|bits| scheme.with_bits(bits))
        .collect()
}

#[cfg(test)]
mod tests;
