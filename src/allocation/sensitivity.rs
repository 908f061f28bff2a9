//! What each group loses with each width, as numbers that may be added up and compared.

use super::{AllocationBy, Group, schemes};
use crate::calibration::{CalibrationSample, CalibrationSet};
use crate::distributed::Communicator;
use crate::importance::backward::{AttentionPass, LayerGradients};
use crate::importance::end_loss::{carried_back, sum};
use crate::importance::sides::Sides;
use crate::importance::walk::answer_places;
use crate::model::decoder::DecoderLayer;
use crate::model::linear::{matrix_from_tensor, tensor_from_matrix};
use crate::model::projection::Slot;
use crate::model::{ModelSource, Module};
use crate::pipeline::Observer;
use crate::plan::Bits;
use crate::recipe::Recipe;
use crate::solver::rtn;
use crate::{Error, Result};
use candle_core::Tensor;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const N_WIDTHS: usize = Bits::SHARED.len();

/// How much less a loss is with one more bit, where nothing is measured: half the step, a quarter of
/// its square.
const PER_BIT: f64 = 0.25;

/// How much more the first and last layer matter by [`AllocationBy::Ends`].
const ENDS: f64 = 1000.0;

/// ln of how much more one group may matter than another by [`AllocationBy::Random`].
const SPREAD: f64 = 6.0;

/// By group, then by width.
pub(super) fn losses(
    model: &ModelSource,
    recipe: &Recipe,
    set: &CalibrationSet,
    groups: &[Group],
    among: (&dyn Communicator, &dyn Observer),
) -> Result<Vec<[f64; N_WIDTHS]>> {
    let settings = recipe.allocation;
    let by_size = |weight: f64, group: &Group| {
        let loss = weight * group.n_weights() as f64;
        std::array::from_fn(|width| loss * PER_BIT.powi(width as i32))
    };
    match settings.by {
        AllocationBy::Answer | AllocationBy::Output => measured(model, recipe, set, groups, among),
        AllocationBy::Ends => {
            let last = model.decoder().n_layers - 1;
            let weight = |group: &Group| match [0, last].contains(&group.layer_idx) {
                true => ENDS,
                false => 1.0,
            };
            Ok(groups
                .iter()
                .map(|group| by_size(weight(group), group))
                .collect())
        }
        AllocationBy::Random => {
            let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
            let mut draw = || (SPREAD * rng.random::<f64>()).exp();
            Ok(groups.iter().map(|group| by_size(draw(), group)).collect())
        }
    }
}

/// What rounding to nearest changes of a linear's weight, for each width `[out, in]`.
struct Errors {
    slot: Slot,
    weight: Tensor,
    by_width: Vec<Tensor>,
}

/// Sums over tokens and channels of one linear.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Sums {
    /// By width.
    losses: [f64; N_WIDTHS],
    /// Of the output as it was.
    energy: f64,
}

fn measured(
    model: &ModelSource,
    recipe: &Recipe,
    set: &CalibrationSet,
    groups: &[Group],
    among: (&dyn Communicator, &dyn Observer),
) -> Result<Vec<[f64; N_WIDTHS]>> {
    let by = recipe.allocation.by;
    let is_used = |sample: &&CalibrationSample| sample.index < recipe.allocation.samples;
    let own = set.samples.iter().take_while(is_used);
    let own: Vec<&CalibrationSample> = own.collect();
    let of_layer = |layer_idx: usize| {
        let own = groups
            .iter()
            .filter(move |group| group.layer_idx == layer_idx);
        own.flat_map(|group| &group.modules)
    };
    let begin = |layer_idx: usize, layer: &DecoderLayer| {
        let modules = of_layer(layer_idx);
        modules
            .map(|module| errors(recipe, module, layer))
            .collect()
    };
    let see = |errors: &Vec<Errors>,
               _: &CalibrationSample,
               pass: &AttentionPass,
               gradients: &LayerGradients| {
        let sides = Sides::new(pass, gradients)?;
        let sums = errors.iter().map(|errors| sums(by, errors, &sides));
        sums.collect::<Result<Vec<Sums>>>()
    };
    let layers = carried_back(model, set, own.len(), among, begin, see)?;
    let places = own.iter().map(|s| answer_places(&s.classes).len());
    let n_places: usize = among.0.all_gather_value(&places.sum())?.iter().sum();
    let mut losses = Vec::new();
    for (layer_idx, samples) in layers.into_iter().enumerate() {
        let indices = own.iter().map(|sample| sample.index);
        let samples: Vec<(usize, Vec<Sums>)> = indices.zip(samples).collect();
        let mut samples = among.0.all_gather_value(&samples)?.concat();
        samples.sort_by_key(|(index, _)| *index);
        let samples: Vec<Vec<Sums>> = samples.into_iter().map(|(_, sums)| sums).collect();
        let mut all = total(&samples).into_iter();
        for group in groups.iter().filter(|group| group.layer_idx == layer_idx) {
            let own: Vec<Sums> = all.by_ref().take(group.modules.len()).collect();
            losses.push(check(group, of_group(by, &own, n_places))?);
        }
    }
    Ok(losses)
}

fn errors(recipe: &Recipe, module: &Module, layer: &DecoderLayer) -> Result<Errors> {
    let weight = layer.linear(module.slot)?.weight_f32()?;
    let w = matrix_from_tensor(&weight)?;
    let of_width = |scheme| {
        let rounded = rtn(&module.name, &w, scheme, recipe.solver.clip)?;
        let rounded = tensor_from_matrix(rounded.dequantize(), weight.device())?;
        Ok((rounded - &weight)?)
    };
    let by_width = schemes(recipe, module)?.into_iter().map(of_width);
    Ok(Errors {
        slot: module.slot,
        weight: weight.clone(),
        by_width: by_width.collect::<Result<_>>()?,
    })
}

fn sums(by: AllocationBy, errors: &Errors, sides: &Sides) -> Result<Sums> {
    let mut sums = Sums::default();
    let Some((p, u)) = sides.of(errors.slot)? else {
        return Ok(sums);
    };
    let output = |weight: &Tensor| u.matmul(&weight.t()?);
    for (loss, error) in sums.losses.iter_mut().zip(&errors.by_width) {
        let error = match by {
            AllocationBy::Answer => (output(error)? * &p)?,
            _ => output(error)?,
        };
        *loss = sum(&error.sqr()?)?;
    }
    if by == AllocationBy::Output {
        sums.energy = sum(&output(&errors.weight)?.sqr()?)?;
    }
    Ok(sums)
}

/// Over samples, in their order, by linear.
fn total(samples: &[Vec<Sums>]) -> Vec<Sums> {
    let n = samples.first().map_or(0, Vec::len);
    let mut total = vec![Sums::default(); n];
    for sample in samples {
        for (total, own) in total.iter_mut().zip(sample) {
            total.energy += own.energy;
            let pairs = total.losses.iter_mut().zip(own.losses);
            pairs.for_each(|(total, loss)| *total += loss);
        }
    }
    total
}

fn of_group(by: AllocationBy, linears: &[Sums], n_places: usize) -> [f64; N_WIDTHS] {
    std::array::from_fn(|width| {
        let losses = linears.iter().map(|linear| match by {
            AllocationBy::Answer => 0.5 * linear.losses[width] / n_places.max(1) as f64,
            // A linear whose outputs are all zero loses nothing.
            _ if linear.energy == 0.0 => 0.0,
            _ => linear.losses[width] / linear.energy / linears.len() as f64,
        });
        losses.sum()
    })
}

fn check(group: &Group, losses: [f64; N_WIDTHS]) -> Result<[f64; N_WIDTHS]> {
    let count = losses.iter().filter(|loss| !loss.is_finite()).count();
    match (count, group.modules.first()) {
        (0, _) => Ok(losses),
        (_, first) => Err(Error::NotFinite {
            module: first.map_or(String::new(), |module| module.name.clone()),
            stage: "losses by width".into(),
            count,
        }),
    }
}
